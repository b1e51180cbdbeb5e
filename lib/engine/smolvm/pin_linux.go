package smolvm

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/smolvm"
)

// pins are the folders that a guest is meant to get, held open. smolvm takes
// paths, follows symlinks in them, and opens them once more at the start: where
// another bottle's guest can write, a folder may be a link to anywhere by then.
type pins []pinned

type pinned struct {
	*os.File
	guest string // where the guest has it
}

// pin opens the folders, which are resolved paths, without following a symlink.
func pin(vs []smolvm.Volume) (pins, error) {
	var ps pins
	for _, v := range vs {
		f, err := openFolder(v.Host)
		if err != nil {
			return ps, exchanged(v.Host, err.Error())
		}
		ps = append(ps, pinned{f, v.Guest})
	}
	return ps, nil
}

func openFolder(path string) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_DIRECTORY | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(unix.AT_FDCWD, path, &how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), path), nil
		case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN):
			return nil, err
		}
	}
}

func (ps pins) close() {
	for _, f := range ps {
		f.Close()
	}
}

// folders are their places in the guest.
func (ps pins) folders() []string {
	var all []string
	for _, f := range ps {
		all = append(all, f.guest)
	}
	return all
}

// mounted makes sure that the guest has these folders, and not what took their
// places. inodes are what the guest tells of theirs.
func (ps pins) mounted(pid int, inodes []uint64) error {
	err := ps.heldBy(pid)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	// Of a plain user's monitor the kernel tells nothing (it is not dumpable).
	if err := ps.still(); err != nil {
		return err
	}
	return ps.seen(inodes)
}

// heldBy looks at what the guest's monitor has open: its file server keeps the
// root of each folder open.
func (ps pins) heldBy(pid int) error {
	type id struct{ dev, ino uint64 }
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrPermission) {
		return err
	}
	if err != nil {
		return exchanged("what it was given", err.Error())
	}
	open := map[id]bool{}
	for _, e := range entries {
		if fi, err := os.Stat(filepath.Join(dir, e.Name())); err == nil && fi.IsDir() {
			st := fi.Sys().(*syscall.Stat_t)
			open[id{uint64(st.Dev), st.Ino}] = true
		}
	}
	for _, f := range ps {
		fi, err := f.Stat()
		if err != nil {
			return exchanged(f.Name(), err.Error())
		}
		if st := fi.Sys().(*syscall.Stat_t); !open[id{uint64(st.Dev), st.Ino}] {
			return exchanged(f.Name(), "the guest's monitor has another folder open")
		}
	}
	return nil
}

// still makes sure that the paths lead to these folders, without a symlink.
func (ps pins) still() error {
	for _, f := range ps {
		now, err := openFolder(f.Name())
		if err != nil {
			return exchanged(f.Name(), err.Error())
		}
		was, err1 := f.Stat()
		is, err2 := now.Stat()
		now.Close()
		if err1 != nil || err2 != nil || !os.SameFile(was, is) {
			return exchanged(f.Name(), "there is another folder now")
		}
	}
	return nil
}

// seen compares the inode numbers that the guest tells of its folders. The helper
// answers, of which the image has no say; another folder with the same number would
// have to be on another file system.
func (ps pins) seen(got []uint64) error {
	for i, f := range ps {
		fi, err := f.Stat()
		if err != nil {
			return exchanged(f.Name(), err.Error())
		}
		if i >= len(got) || got[i] != fi.Sys().(*syscall.Stat_t).Ino {
			return exchanged(f.Name(), "the guest has another folder")
		}
	}
	return nil
}
