//go:build !linux

package gitguard

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// scanEvery is how often the workspace is looked at where it can't be watched.
const scanEvery = 2 * time.Second

// Watch looks at the workspace again and again until ctx ends.
func (g *Guard) Watch(ctx context.Context, report func(Finding)) error {
	if g.opts.Mode != "rw" {
		<-ctx.Done()
		return nil
	}
	report, stop := g.covering(report)
	defer stop()
	for {
		if err := g.look(false, nil, report); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(scanEvery):
		}
	}
}

// unlock opens a folder of ours, with all rights for us whatever its mode was.
func unlock(dir int, name string) (int, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR && int(st.Uid) == os.Geteuid() && st.Mode&0o700 != 0o700 {
		if err := unix.Fchmodat(dir, name, uint32(st.Mode)&0o7777|0o700, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return -1, err
		}
	}
	return unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}
