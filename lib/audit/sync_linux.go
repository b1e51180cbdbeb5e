package audit

import (
	"os"
	"syscall"
)

// datasync makes what was written durable: fdatasync(2) leaves out the times of
// the file, which nobody needs to know.
func datasync(f *os.File) error {
	for {
		if err := syscall.Fdatasync(int(f.Fd())); err != syscall.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}
