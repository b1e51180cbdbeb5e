//go:build linux

package gvisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

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

// stage makes the sources of l reachable for the sandbox's user, when root
// starts it: that user owns nothing and cannot pass a folder like /root. In a
// mount namespace of the calling thread's own, everything is bound below one
// small folder. It also makes root's mounts end with the sandbox: runsc's
// null-netns never shows on the host.
//
// No link is followed on the way to a source: a folder that the workspace's
// owner swaps for a link meanwhile is an error.
func stage(l layout, s *engine.Spec, avoid ...string) (layout, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return layout{}, fault.New(fault.Host, "no_mount_namespace", "root here may not make a mount namespace: %w", err).
			WithHint("run as a plain user, or give root CAP_SYS_ADMIN")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return layout{}, fmt.Errorf("private mounts: %w", err)
	}
	at, err := stagePoint(append(avoid, s.Dir, s.RunDir)...)
	if err != nil {
		return layout{}, err
	}
	sources := []string{l.rootfs}
	for _, b := range l.binds {
		sources = append(sources, b.Source)
	}
	// All are opened before the folder that one of them may lie below is covered.
	opened := make([]*os.File, len(sources))
	for i, p := range sources {
		if opened[i], err = openSource(p); err != nil {
			return layout{}, fmt.Errorf("mounting %s: %w", p, err)
		}
		defer opened[i].Close()
	}
	if err := unix.Mount("bottle", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=711,size=1m"); err != nil {
		return layout{}, fmt.Errorf("staging folder %s: %w", at, err)
	}
	out := l
	out.binds = append(out.binds[:0:0], l.binds...)
	for i, f := range opened {
		p := filepath.Join(at, strconv.Itoa(i))
		if err := bindOpened(f, p); err != nil {
			return layout{}, fmt.Errorf("mounting %s: %w", sources[i], err)
		}
		if i == 0 {
			out.rootfs = p
		} else {
			out.binds[i-1].Source = p
		}
	}
	return out, nil
}

// stagePoint finds an empty corner of the tree that everyone can reach and that
// runsc does not need.
func stagePoint(avoid ...string) (string, error) {
next:
	for _, p := range []string{"/mnt", "/srv", "/media", "/opt", "/tmp"} {
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
	return "", fault.New(fault.Host, "no_staging", "no folder of /mnt, /srv, /media, /opt and /tmp can be mounted over").
		WithHint("make an empty folder /mnt")
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
