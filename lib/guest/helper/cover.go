//go:build linux

package helper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Cover modes.
const (
	CoverPin  = "pin"  // the path over itself: readable, not writable
	CoverHide = "hide" // something empty over the path
)

// Cover mounts over a path of the running guest, read-only. It needs
// CAP_SYS_ADMIN, which only the engine can give. A path that is gone is
// success: there is nothing to cover. Symbolic links are refused; the mount is
// made on the path as it is when it is opened.
func Cover(mode, target string) error {
	fd, err := unix.Open(target, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", target, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%s: %w", target, err)
	}
	source := target
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
	default:
		return fmt.Errorf("%s: neither a file nor a folder", target)
	}
	if mode == CoverHide {
		if source, err = empty(st.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
			return err
		}
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("covering %s: %w", target, err)
	}
	if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		_ = unix.Unmount(target, unix.MNT_DETACH)
		return fmt.Errorf("covering %s read-only: %w", target, err)
	}
	return nil
}

// empty gives an empty file or folder that only the guest's root can change.
func empty(dir bool) (string, error) {
	if dir {
		const path = "/run/.bottle-empty-dir"
		if err := os.Mkdir(path, 0o555); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
		return path, nil
	}
	const path = "/run/.bottle-empty-file"
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o444)
	if err != nil {
		return "", err
	}
	return path, f.Close()
}
