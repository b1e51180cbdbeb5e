package child

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// sysProcAttr keeps the terminal's signals away from the program, and ends it
// with us however we end.
func sysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// awaitEnd waits for a child to end and leaves it to be reaped; false where that
// cannot be.
func awaitEnd(pid int) bool {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return err == nil
		}
	}
}
