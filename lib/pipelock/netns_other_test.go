//go:build !linux

package pipelock

import "testing"

const (
	inNetwork  = "BOTTLE_TEST_IN_NETWORK"
	publicAddr = "93.184.216.34"
)

func ownNetwork(t *testing.T) { t.Skip("SKIPPED: network namespaces are a Linux thing") }
