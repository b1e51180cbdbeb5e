// Package pipelocktest is what tests need to put traffic through the real
// pipelock: the program, and a network of their own, since pipelock dials no
// private address.
package pipelocktest

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"testing"
)

// PublicAddr is where Serve answers.
const PublicAddr = "93.184.216.34"

// inNetwork is set in the process that has the namespaces: a folder.
const inNetwork = "BOTTLE_TEST_IN_NETWORK"

// Path is the pipelock of this host: $BOTTLE_PIPELOCK, or the one on PATH.
// Without one the test is skipped.
func Path(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("BOTTLE_PIPELOCK"); path != "" {
		return path
	}
	path, err := exec.LookPath("pipelock")
	if err != nil {
		t.Skip("SKIPPED: no pipelock on PATH and BOTTLE_PIPELOCK is not set, so the real program is not asked")
	}
	return path
}

// Serve answers on a port of PublicAddr, with TLS (for example.com) or without,
// inside OwnNetwork. The first call gives the address to the host: what looks at
// the host's own addresses before that takes it for somewhere else.
func Serve(t *testing.T, port int, tls bool, h http.Handler) *httptest.Server {
	t.Helper()
	if err := addPublicAddr(); err != nil {
		t.Fatalf("setting up the network: %v", err)
	}
	l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", PublicAddr, port))
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.Listener.Close()
	s.Listener = l
	if tls {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}
