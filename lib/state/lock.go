package state

import (
	"errors"
	"os"
	"syscall"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Lock takes the bottle's lock: the keeper holds it for life (the descriptor
// goes with the process, so death releases it), down and gc while they remove.
// Busy is a fault 75.
func (b *Bottle) Lock() (*os.File, error) {
	f, err := os.OpenFile(b.Path("lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fault.New(fault.TempFail, "locked", "bottle %s is in use by another command", b.ID).WithHint("try again")
		}
		return nil, fault.New(fault.IO, "lock_failed", "locking %s: %w", b.ID, err)
	}
	return f, nil
}
