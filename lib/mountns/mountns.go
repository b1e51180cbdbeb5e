//go:build linux

// Package mountns runs a program that sees other folders at some of its paths
// than the host has there: in a mount namespace of its own, which ends with the
// program and all that it started.
//
// A plain user gets a user namespace with it, in which nobody but that user
// exists. The program has the user's rights and no others in either case.
//
// No Go program can mount between fork and exec, so the caller starts one of
// its own programs, which mounts and becomes the other (Attach and Main).
package mountns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Bind shows Source, a folder, at Target, another one that exists.
type Bind struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"read_only"`
}

// Verb is the argument by which a program knows that it is to call Main.
const Verb = "in-mounts"

// Failed is Main's exit status: the program was never run.
const Failed = 125

// Launcher is Attach for a command that is yet to come.
func Launcher(exe string, binds []Bind) func(*exec.Cmd) error {
	return func(cmd *exec.Cmd) error { return Attach(cmd, exe, binds) }
}

// Attach changes cmd so that exe, a program that calls Main, starts it among
// binds. It is for a command without files of its own.
func Attach(cmd *exec.Cmd, exe string, binds []Bind) error {
	if len(cmd.ExtraFiles) > 0 {
		return errors.New("mountns: the command has files of its own")
	}
	list, err := memfile(binds)
	if err != nil {
		return err
	}
	cmd.ExtraFiles = []*os.File{list} // descriptor 3
	cmd.Args = append([]string{exe, Verb, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = exe
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	attr := cmd.SysProcAttr
	attr.Cloneflags |= unix.CLONE_NEWNS
	if uid, gid := os.Geteuid(), os.Getegid(); uid != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		attr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN} // to mount; Main gives it up
	}
	return nil
}

func memfile(binds []Bind) (*os.File, error) {
	raw, err := json.Marshal(binds)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("binds", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "binds")
	if _, err = f.Write(raw); err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Main is the life of a program that was started with Verb: args are what
// follows it. It returns only on failure, with the status to exit with; what is
// wrong is on stderr.
func Main(args []string, stderr io.Writer) int {
	err := run(args)
	fmt.Fprintf(stderr, "%s: %v\n", Verb, err)
	return Failed
}

func run(args []string) error {
	runtime.LockOSThread() // ambient capabilities are a thread's, and exec takes this one's
	if len(args) == 0 {
		return errors.New("no program")
	}
	list := os.NewFile(3, "binds")
	var binds []Bind
	if err := json.NewDecoder(list).Decode(&binds); err != nil {
		return fmt.Errorf("list of folders: %w", err)
	}
	if err := list.Close(); err != nil {
		return err
	}
	// What the host unmounts goes here too; nothing of ours gets out.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mounts of its own: %w", err)
	}
	for _, b := range binds {
		if err := b.mount(); err != nil {
			return fmt.Errorf("%s at %s: %w", b.Source, b.Target, err)
		}
	}
	// The right to mount was for this; a program that is not root's has none then.
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("giving up the right to mount: %w", err)
	}
	return fmt.Errorf("%s: %w", args[0], unix.Exec(args[0], args, os.Environ()))
}

// mount is recursive: in a user namespace the kernel refuses to show a folder
// without what is mounted below it.
func (b Bind) mount() error {
	if err := unix.Mount(b.Source, b.Target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if !b.ReadOnly {
		return nil
	}
	// Private, since what the host mounts later below it would come in writable. (What
	// it unmounts there stays in until the program ends.)
	return unix.MountSetattr(unix.AT_FDCWD, b.Target, unix.AT_RECURSIVE|unix.AT_SYMLINK_NOFOLLOW,
		&unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE})
}
