package keeper

import (
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/plan"
)

// A limit that something else holds refuses memory or a fork inside of the
// guest; only a watched one is a reason to end it.
func TestOverLimit(t *testing.T) {
	r := plan.Resources{MemoryMiB: 10, Pids: 10, Enforcement: "watched"}
	above := engine.Usage{MemoryBytes: 11 << 20, Pids: 11}
	for _, c := range []struct {
		memory, pids string
		use          engine.Usage
		want         string
	}{
		{"watched", "watched", engine.Usage{MemoryBytes: 10 << 20, Pids: 10}, ""},
		{"cgroup", "engine", above, ""},
		{"watched", "engine", above, "11 MiB of memory"},
		{"cgroup", "watched", above, "11 processes"},
	} {
		got := overLimit(r, plan.Enforcement{Memory: c.memory, Pids: c.pids}, c.use)
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("memory %s, pids %s: %q", c.memory, c.pids, got)
		}
	}
}
