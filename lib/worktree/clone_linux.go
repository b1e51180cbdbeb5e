package worktree

import (
	"os"

	"golang.org/x/sys/unix"
)

// clone shares the blocks of src (FICLONE), on file systems that can.
func clone(dst, src *os.File) error {
	return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
}
