package smolvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// processes gives the pids of all processes that can be seen.
func processes() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func procFile(pid int, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), name))
	return string(b), err
}

// argvOf gives the arguments of pid, nil if there is no such process.
func argvOf(pid int) []string {
	s, err := procFile(pid, "cmdline")
	if err != nil || s == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(s, "\x00"), "\x00")
}

// environOf gives the environment that pid was started with, nil if it cannot be
// read.
func environOf(pid int) []string {
	s, err := procFile(pid, "environ")
	if err != nil || s == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(s, "\x00"), "\x00")
}

// exists tells whether pid is a process that still runs.
func exists(pid int) bool {
	s, err := procFile(pid, "stat")
	if err != nil {
		return false
	}
	rest := s[strings.LastIndexByte(s, ')')+1:] // the name may hold anything
	return !strings.HasPrefix(rest, " Z") && !strings.HasPrefix(rest, " X")
}

// ownProcess tells whether pid is of this user. The owner of its folder in /proc
// does not: that is root for whatever is not dumpable, which anybody can be.
func ownProcess(pid int) bool {
	status, err := procFile(pid, "status")
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(status, "\nUid:") // a name's line feeds are escaped
	line, _, _ := strings.Cut(rest, "\n")
	me := strconv.Itoa(os.Geteuid())
	uids := strings.Fields(line) // real, effective, saved, of the file system
	return len(uids) == 4 && uids[0] == me && uids[1] == me
}

// killProcess holds pid by a descriptor, asks whether it is still the one that
// is meant, kills it and waits until it has ended.
func killProcess(ctx context.Context, pid int, meant func() bool) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !meant() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return waitPidfd(ctx, fd)
}

// waitProcess blocks until pid has ended.
func waitProcess(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return waitPidfd(ctx, fd)
}

// waitPidfd polls in short turns, so that the context is heard.
func waitPidfd(ctx context.Context, fd int) error {
	const turn = 250 // ms
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, turn)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}
