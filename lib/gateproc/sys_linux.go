package gateproc

import "syscall"

// dieWithParent: a gate without its keeper has nothing to serve.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
