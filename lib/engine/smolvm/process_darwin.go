package smolvm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// processes gives the pids of this user's processes.
func processes() []int {
	list, err := unix.SysctlKinfoProcSlice("kern.proc.uid", os.Geteuid())
	if err != nil {
		return nil
	}
	var pids []int
	for _, p := range list {
		pids = append(pids, int(p.Proc.P_pid))
	}
	return pids
}

// argvOf gives the arguments of pid, nil if they cannot be had. The kernel gives
// argc, the path of the program, zeros, and then the arguments.
func argvOf(pid int) []string {
	argv, _ := procargs(pid)
	return argv
}

// environOf gives the environment that pid was started with, nil if it cannot be
// read: it follows the arguments.
func environOf(pid int) []string {
	_, rest := procargs(pid)
	var env []string
	for _, v := range bytes.Split(rest, []byte{0}) {
		if len(v) > 0 {
			env = append(env, string(v))
		}
	}
	return env
}

func procargs(pid int) (argv []string, rest []byte) {
	b, err := unix.SysctlRaw("kern.procargs2", pid)
	if err != nil || len(b) < 4 {
		return nil, nil
	}
	argc := int(binary.LittleEndian.Uint32(b))
	_, rest, _ = bytes.Cut(b[4:], []byte{0})
	rest = bytes.TrimLeft(rest, "\x00")
	for range argc {
		arg, after, ok := bytes.Cut(rest, []byte{0})
		if !ok {
			break
		}
		argv, rest = append(argv, string(arg)), after
	}
	return argv, rest
}

// ownProcess: processes gives no others.
func ownProcess(int) bool { return true }

// exists tells whether pid is a process.
func exists(pid int) bool {
	err := unix.Kill(pid, 0)
	return err == nil || errors.Is(err, unix.EPERM)
}

// killProcess asks whether pid is still the one that is meant, kills it and
// waits until it has ended.
func killProcess(ctx context.Context, pid int, meant func() bool) error {
	if !meant() {
		return nil
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return waitProcess(ctx, pid)
}

// waitProcess blocks until pid has ended.
func waitProcess(ctx context.Context, pid int) error {
	for exists(pid) {
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}
