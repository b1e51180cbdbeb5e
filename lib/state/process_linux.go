package state

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/plan"
)

var bootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
})

// Identify gives the identity of a live process.
func Identify(pid int) (plan.Process, error) {
	start, state, err := stat(pid)
	if err != nil {
		return plan.Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	if state == 'Z' || state == 'X' {
		return plan.Process{}, fmt.Errorf("process %d has ended", pid)
	}
	return plan.Process{PID: pid, StartTime: start, BootID: bootID()}, nil
}

// stat reads start time (field 22, clock ticks since boot) and state (field 3)
// of /proc/PID/stat. The command name is in parentheses and may hold anything.
func stat(pid int) (start uint64, state byte, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, err
	}
	i := bytes.LastIndexByte(b, ')')
	f := bytes.Fields(b[i+1:])
	if i < 0 || len(f) < 20 {
		return 0, 0, errors.New("unreadable /proc stat")
	}
	start, err = strconv.ParseUint(string(f[19]), 10, 64)
	return start, f[0][0], err
}

// Alive tells whether exactly this process still runs. A zombie does not.
func Alive(p plan.Process) bool {
	if p.PID <= 0 || p.BootID != bootID() {
		return false
	}
	start, state, err := stat(p.PID)
	return err == nil && start == p.StartTime && state != 'Z' && state != 'X'
}

// Signal sends sig to exactly this process, through a pidfd that is opened
// before the identity is checked, so that no other process can get it. A
// process that is gone is success.
func Signal(p plan.Process, sig unix.Signal) error {
	if p.PID <= 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd of %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if !Alive(p) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signalling %d: %w", p.PID, err)
	}
	return nil
}

// Await waits until the process has ended, at most d; it tells whether it has.
func Await(p plan.Process, d time.Duration) bool {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil || !Alive(p) {
		if err == nil {
			unix.Close(fd)
		}
		return !Alive(p)
	}
	defer unix.Close(fd)
	deadline := time.Now().Add(d)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return !Alive(p)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return !Alive(p)
		}
		if n > 0 {
			return true
		}
	}
}

// Kill ends exactly this process: SIGTERM, grace, SIGKILL.
func Kill(p plan.Process, grace time.Duration) error {
	if !Alive(p) {
		return nil
	}
	if grace > 0 {
		if err := Signal(p, unix.SIGTERM); err != nil {
			return err
		}
		if Await(p, grace) {
			return nil
		}
	}
	if err := Signal(p, unix.SIGKILL); err != nil {
		return err
	}
	if !Await(p, 5*time.Second) {
		return fmt.Errorf("process %d does not end", p.PID)
	}
	return nil
}
