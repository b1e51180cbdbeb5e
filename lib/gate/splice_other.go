//go:build !linux

package gate

import "net"

// splicer has nothing to offer here: bytes are copied.
func splicer(_, _ net.Conn) func() (int, error) { return nil }
