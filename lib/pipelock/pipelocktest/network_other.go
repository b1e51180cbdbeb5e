//go:build !linux

package pipelocktest

import (
	"errors"
	"testing"
)

// OwnNetwork skips the test: namespaces are a Linux thing.
func OwnNetwork(t *testing.T, hosts string) (inside bool) {
	t.Helper()
	t.Skip("SKIPPED: there are no network namespaces on this system")
	return false
}

func addPublicAddr() error { return errors.ErrUnsupported }
