package image

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// syncTree makes everything on dir's file system durable: one call is much
// cheaper than an fsync for each of a hundred thousand files.
func syncTree(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}

func changeTime(st *syscall.Stat_t) time.Time { return time.Unix(st.Ctim.Unix()) }
