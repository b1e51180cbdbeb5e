//go:build !linux

package gateproc

import "syscall"

// dieWithParent: without a parent-death signal the gate ends when the
// descriptor it receives connections on is closed.
func dieWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
