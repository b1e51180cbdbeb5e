//go:build !linux

package keeper

import (
	"errors"
	"net"
)

// peerUID is known on Linux, where keepers run.
func peerUID(net.Conn) (int, error) { return -1, errors.ErrUnsupported }
