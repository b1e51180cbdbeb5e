//go:build linux

package helper

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

type syscallConn = syscall.Conn

// becomeRoot changes from the agent's user, as whom the helper is started
// where only that user exists on the host, to the guest's root.
func becomeRoot() error {
	if unix.Geteuid() == 0 {
		return nil
	}
	// syscall's versions change every thread.
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("setgroups: %w", err)
	}
	if err := syscall.Setgid(0); err != nil {
		return fmt.Errorf("setgid: %w", err)
	}
	if err := syscall.Setuid(0); err != nil {
		return fmt.Errorf("setuid: %w", err)
	}
	return nil
}

// drop gives up every capability but those of keep, on every thread, and forbids
// others to look into this process. The bounding set stays: this process executes
// nothing.
func drop(keep ...int) error {
	var kept uint32
	for _, c := range keep {
		kept |= 1 << c
	}
	if _, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, 0); e != 0 && e != unix.EINVAL {
		return fmt.Errorf("clear ambient capabilities: %w", e)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	held := data[0].Permitted & kept
	data = [2]unix.CapUserData{{Effective: held, Permitted: held}}
	// The kernel writes to the header of an unknown version only.
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&data[0])), 0); e != 0 {
		return fmt.Errorf("capset: %w", e)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("undumpable: %w", err)
	}
	return nil
}
