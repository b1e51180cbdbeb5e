package smolvm

import (
	"errors"
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
type pins []*os.File

// pin opens the folders, which are resolved paths, without following a symlink.
func pin(vs []smolvm.Volume) (pins, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_DIRECTORY | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
	var ps pins
	for _, v := range vs {
		fd, err := unix.Openat2(unix.AT_FDCWD, v.Host, &how)
		for errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			fd, err = unix.Openat2(unix.AT_FDCWD, v.Host, &how)
		}
		if err != nil {
			return ps, exchanged(v.Host, err.Error())
		}
		ps = append(ps, os.NewFile(uintptr(fd), v.Host))
	}
	return ps, nil
}

func (ps pins) close() {
	for _, f := range ps {
		f.Close()
	}
}

// heldBy makes sure that the guest's monitor has these folders open, and not
// what took their places: its file server keeps the root of each open.
func (ps pins) heldBy(pid int) error {
	type id struct{ dev, ino uint64 }
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(dir)
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
