// Package integration runs the tools that make built with real gVisor bottles,
// as root and as a plain user. After every test nothing may be left over; see
// harness.World.
package integration

import (
	"crypto/sha256"
	"encoding/hex"
	"syscall"
	"testing"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// plain is a manifest's bottle without a way out.
const plain = `"runtime":"gvisor"`

func has(t *testing.T, what, text string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !contains(text, want) {
			t.Errorf("%s: no %q in:\n%s", what, want, text)
		}
	}
}

func sha(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func ownerOf(t *testing.T, path string) int {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil {
		t.Error(err)
		return -1
	}
	return int(st.Uid)
}
