package probe

import (
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// The roles that this program plays for itself. Each is a first argument.
const (
	roleInit     = "@init"     // process 1 of the laboratory
	roleLab      = "@lab"      // the laboratory
	roleInternet = "@internet" // the canary internet
	roleWitness  = "@witness"  // a process of the host that should not be seen
	roleDaemon   = "@daemon"   // of the client: outlives it, for a while
	roleSleeper  = "@sleeper"  // of the client: one of a flood
	roleClient   = "client"
)

// Role runs args if they are one of the roles that the battery plays for itself;
// ok is false if they are for people.
func Role(args []string, stdin io.Reader, stdout, stderr io.Writer) (status int, ok bool) {
	if len(args) == 0 {
		return 0, false
	}
	var err error
	switch args[0] {
	case roleInit:
		status, err = initProcess()
	case roleLab:
		err = labProcess(stdin, stdout)
	case roleInternet:
		err = internet(stdin, stdout)
	case roleWitness:
		err = witness(stdout)
	case roleDaemon:
		err = daemon(args[1:])
	case roleSleeper:
		err = sleeper(args[1:])
	case roleClient:
		err = client(args[1:], stdout)
	default:
		return 0, false
	}
	if err != nil {
		f := fault.As(err)
		line := f.Error()
		if f.Hint != "" {
			line += "; " + f.Hint
		}
		fmt.Fprintf(stderr, "bottle-probe: error: %s\n", strings.ReplaceAll(line, "\n", " "))
		return f.Exit, true
	}
	return status, true
}

// self is this program in another role, which dies with the process that starts
// it.
func self(ctx context.Context, role string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{role}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// interrupted is the status of a run that Ctrl-C ended.
const interrupted = 130

// labConfig is what the laboratory is told by the process that people started.
type labConfig struct {
	Options Options
	Dir     string
}

// Run makes a laboratory, runs the battery in it and gives each result to emit.
// Whatever was started has ended when it returns. Errors are faults: no_lab where
// this host does not permit the namespaces, bad_sandbox where the sandbox command
// cannot be run at all.
func Run(ctx context.Context, o Options, stderr io.Writer, emit func(Result) error) error {
	if err := static("/proc/self/exe"); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bp-")
	if err != nil {
		return fault.New(fault.CantCreate, "no_lab_folder", "a folder for the laboratory: %w", err).WithHint("TMPDIR names another place")
	}
	defer removeAll(dir)
	cfg, err := json.Marshal(labConfig{o, dir})
	if err != nil {
		return err
	}
	// Processes that die with the thread that started them need one that stays.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := self(context.Background(), roleInit)
	flags := uintptr(unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS)
	if os.Geteuid() != 0 {
		flags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_ADMIN, unix.CAP_KILL}
	}
	cmd.SysProcAttr.Cloneflags = flags
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		return fault.New(fault.Host, "no_lab", "this host does not permit namespaces for a laboratory: %w", err).
			WithHint("run it as root, or allow user namespaces (user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns)")
	}
	if _, err := stdin.Write(append(cfg, '\n')); err != nil {
		return err
	}
	// Its end tells the laboratory to end.
	stop := context.AfterFunc(ctx, func() { stdin.Close() })
	defer stop()
	var emitted error
	for dec := json.NewDecoder(stdout); emitted == nil; {
		var r Result
		if err := dec.Decode(&r); err != nil {
			break
		}
		emitted = emit(r)
	}
	stdin.Close()
	err = cmd.Wait()
	if o.Log != "" {
		if lerr := keepLog(dir, o.Log); lerr != nil {
			return lerr
		}
	}
	var exit *exec.ExitError
	switch {
	case emitted != nil:
		return emitted
	case ctx.Err() != nil:
		return fault.New(interrupted, "interrupted", "interrupted before the last probe")
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return Reported(exit.ExitCode())
	case err != nil:
		return fault.New(fault.Bug, "lab_failed", "the laboratory ended without a word: %w", err)
	}
	return nil
}

func keepLog(dir, to string) error {
	raw, err := os.ReadFile(filepath.Join(dir, "sandbox.log"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = os.WriteFile(to, raw, 0o600)
	}
	if err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "--log %s: %w", to, err)
	}
	return nil
}

// static refuses a program that could not run inside of a sandbox with other
// libraries.
func static(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fault.New(fault.Host, "no_lab", "this program's own file: %w", err).WithHint("/proc has to be mounted")
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fault.New(fault.Host, "not_static", "this bottle-probe needs shared libraries, which a sandbox may not have").
				WithHint("build it with CGO_ENABLED=0, as make does")
		}
	}
	return nil
}

// initProcess is process 1 of the laboratory: when it ends, so does everything
// in there. It starts the laboratory and buries whoever has no parent.
func initProcess() (int, error) {
	noLab := func(err error) error {
		return fault.New(fault.Host, "no_lab", "this host does not permit a laboratory: %w", err).
			WithHint("run it as root, and not in a container that covers parts of /proc")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, noLab(fmt.Errorf("a mount namespace: %w", err))
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return 0, noLab(fmt.Errorf("mounting /proc: %w", err))
	}
	signal.Ignore(os.Interrupt, syscall.SIGTERM) // the laboratory ends with its stdin
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"bottle-probe", roleLab}, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, noLab(err)
	}
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, noLab(err)
		case got == pid && ws.Signaled():
			return 128 + int(ws.Signal()), nil
		case got == pid:
			return ws.ExitStatus(), nil
		}
	}
}

// covered makes a file of the laboratory stand in for one of the host.
func covered(dir, path, text string) error {
	name := filepath.Join(dir, strings.ReplaceAll(strings.Trim(path, "/"), "/", "-"))
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		return err
	}
	target, err := filepath.EvalSymlinks(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // a resolver without it asks at 127.0.0.1, which answers too
	}
	if err != nil {
		return err
	}
	return unix.Mount(name, target, "", unix.MS_BIND, "")
}

// removeAll removes a folder in which a sandbox may have shut others.
func removeAll(dir string) {
	if os.RemoveAll(dir) == nil {
		return
	}
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(path, 0o700)
		}
		return nil
	})
	_ = os.RemoveAll(dir)
}
