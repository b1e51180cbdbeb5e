// Package integration runs the tools that make built with real gVisor bottles,
// as root and as a plain user. After every test nothing may be left over; see
// harness.World.
package integration

import (
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
