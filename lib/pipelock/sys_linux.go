package pipelock

import "syscall"

// sysProcAttr keeps the terminal's signals away from pipelock, and ends it with
// us however we end.
func sysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
