package gate

import (
	"os"

	"golang.org/x/sys/unix"
)

// nameless makes a file in memory: no disk sees what it holds.
func nameless() (*os.File, error) {
	fd, err := unix.MemfdCreate("bottle-body", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), "bottle-body"), nil
}
