//go:build linux

package gvisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
)

// onThread runs fn on a thread that nothing else uses before or after: fn may
// change its mount namespace, its cgroup and its CPUs, and what fn starts is
// born with them. A Pdeathsig of a child refers to that thread.
func onThread(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		// The main thread never ends, and is what /proc/PID shows of a process.
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			done <- onThread(fn) // locked here, it has to be another
			return
		}
		done <- fn() // never unlocked: the thread ends with the goroutine
	}()
	return <-done
}

// privateFolder gives the calling thread a mount namespace of its own and in it
// a folder in memory, for root's bottles. The sandbox's user there owns nothing
// and cannot pass a folder like /root, so everything that the guest gets has to
// be below one that everyone can pass (bindAll). All of it goes with the
// sandbox: no mount shows on the host, runsc's null-netns neither.
func privateFolder(s *engine.Spec, avoid ...string) (string, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return "", fault.New(fault.Host, "no_mount_namespace", "root here may not make a mount namespace: %w", err).
			WithHint("run as a plain user, or give root CAP_SYS_ADMIN")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", fmt.Errorf("private mounts: %w", err)
	}
	avoid = append(avoid, s.Dir, s.RunDir, s.Workspace, s.Rootfs, s.Home, s.GuestHelper)
	for _, b := range s.Binds {
		avoid = append(avoid, b.Source)
	}
	at, err := coverable(avoid)
	if err != nil {
		return "", err
	}
	// Not noexec: in its user namespace runsc could not keep that when it makes
	// the root folder read-only, and the kernel would refuse.
	if err := unix.Mount("bottle", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=711,size=64m"); err != nil {
		return "", fmt.Errorf("folder in memory at %s: %w", at, err)
	}
	return at, nil
}

// coverable finds a folder at the top of the tree that holds nothing of avoid.
func coverable(avoid []string) (string, error) {
	tops := []string{"/mnt", "/srv", "/media", "/opt", "/tmp", "/home"}
next:
	for _, p := range tops {
		fi, err := os.Lstat(p)
		if err != nil || !fi.IsDir() {
			continue
		}
		for _, a := range avoid {
			if under(a, p) {
				continue next
			}
		}
		return p, nil
	}
	return "", fault.New(fault.Host, "no_staging", "each of %s holds something that the bottle uses, or is missing", strings.Join(tops, ", ")).
		WithHint("make an empty folder /mnt")
}

// bindAll binds the sources of l below work, where the sandbox's user reaches
// them, and lets l name those places. No link is followed on the way: a folder
// that the workspace's owner swaps for a link meanwhile is an error.
func bindAll(l *layout, work string) error {
	bind := func(i int, source *string) error {
		if under(*source, work) {
			return nil
		}
		f, err := openSource(*source)
		if err == nil {
			defer f.Close()
			at := filepath.Join(work, strconv.Itoa(i))
			err = bindOpened(f, at)
			*source = at
		}
		if err != nil {
			return fmt.Errorf("mounting %s: %w", *source, err)
		}
		return nil
	}
	for i := range l.binds {
		if err := bind(i, &l.binds[i].Source); err != nil {
			return err
		}
	}
	return bind(len(l.binds), &l.rootfs)
}

func openSource(p string) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(unix.AT_FDCWD, p, &how)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), p), nil
	}
}

func bindOpened(f *os.File, at string) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if err := makeMountpoint(at, fi.IsDir()); err != nil {
		return err
	}
	return unix.Mount("/proc/self/fd/"+strconv.Itoa(int(f.Fd())), at, "", unix.MS_BIND|unix.MS_REC, "")
}
