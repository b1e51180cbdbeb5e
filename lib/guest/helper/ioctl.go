//go:build linux

package helper

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rndReseedCRNG is _IO('R', 7) of random(4), which x/sys does not name.
const rndReseedCRNG = 0x5207

// ioctl with a buffer, or none.
func ioctl(f *os.File, request uintptr, buf []byte) error {
	var arg unsafe.Pointer
	if len(buf) > 0 {
		arg = unsafe.Pointer(&buf[0])
	}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); e != 0 {
		return e
	}
	return nil
}
