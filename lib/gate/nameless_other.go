//go:build !linux

package gate

import "os"

// nameless makes a file that has lost its name.
func nameless() (*os.File, error) {
	f, err := os.CreateTemp("", "bottle-body-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
