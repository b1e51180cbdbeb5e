package state

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/bottle-tools/bottle/lib/fault"
)

// ReadFile reads a file that all bottles of the user share, such as trust.json.
// An absent one is nil.
func (r *Root) ReadFile(name string) ([]byte, error) {
	if err := ownFolder(r.Dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(filepath.Join(r.Dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	return raw, nil
}

// Update changes a shared file, atomically and alone: fn gets what is there (nil
// for an absent file) and gives what shall be.
func (r *Root) Update(name string, fn func(old []byte) ([]byte, error)) error {
	if err := mkdir(r.Dir); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(r.Dir, name+".lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return cannotCreate(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fault.New(fault.IO, "lock_failed", "locking %s: %w", name, err)
	}
	old, err := r.ReadFile(name)
	if err != nil {
		return err
	}
	data, err := fn(old)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(r.Dir, name), data, true)
}
