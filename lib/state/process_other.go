//go:build !linux

package state

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/plan"
)

// Identify gives the identity of a live process: without /proc, ps tells the
// start time and the boot time stands for the boot id.
func Identify(pid int) (plan.Process, error) {
	out, err := exec.Command("ps", "-o", "lstart=", "-p", strconv.Itoa(pid)).Output()
	if err != nil {
		return plan.Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	t, err := time.ParseInLocation("Mon Jan _2 15:04:05 2006", strings.Join(strings.Fields(string(out)), " "), time.Local)
	if err != nil {
		return plan.Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return plan.Process{PID: pid, StartTime: uint64(t.Unix()), BootID: "none"}, nil
}

// Alive tells whether exactly this process still runs.
func Alive(p plan.Process) bool {
	q, err := Identify(p.PID)
	return err == nil && q == p
}

// Signal sends sig to exactly this process. A process that is gone is success.
func Signal(p plan.Process, sig syscall.Signal) error {
	if !Alive(p) {
		return nil
	}
	proc, err := os.FindProcess(p.PID)
	if err != nil {
		return err
	}
	if err := proc.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Await waits until the process has ended, at most d; it tells whether it has.
func Await(p plan.Process, d time.Duration) bool {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if !Alive(p) {
			return true
		}
	}
	return !Alive(p)
}

// Kill ends exactly this process: SIGTERM, grace, SIGKILL.
func Kill(p plan.Process, grace time.Duration) error {
	if err := Signal(p, syscall.SIGTERM); err != nil || Await(p, grace) {
		return err
	}
	if err := Signal(p, syscall.SIGKILL); err != nil {
		return err
	}
	if !Await(p, 5*time.Second) {
		return fmt.Errorf("process %d does not end", p.PID)
	}
	return nil
}
