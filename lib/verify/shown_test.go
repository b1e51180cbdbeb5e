package verify

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/drift"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

func TestShown(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"w/.git", "data"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	at := func(p string) string { return filepath.Join(base, p) }
	b := &Bottle{
		Record: &state.Record{ManifestDir: base, Workspace: at("w")}, Dir: at("state"), Programs: "/opt/bin",
		Plan: &plan.Bottle{Workspace: plan.Workspace{Path: "w", Mode: "rw"}, Image: plan.Image{Kind: "host"}, Home: "discard",
			Mounts: []plan.Mount{{Source: "data", Target: "/opt/data", Mode: "ro"}}},
		VM: &plan.VM{HostUID: 5},
	}
	good := engine.Shown{Workspace: at("w"), GuestHelper: "/opt/bin/bottle-guest", HostUID: 5, Binds: []engine.Bind{
		{Source: at("data"), Target: "/opt/data", ReadOnly: true},
		{Source: at("w/.git"), Target: "/workspace/.git"},
		{Source: at("w/bottle.json"), Target: "/workspace/bottle.json", ReadOnly: true},
		{Source: at("state/empty-file"), Target: "/workspace/.env", ReadOnly: true},
	}}
	with := func(change func(*engine.Shown)) engine.Shown {
		s := good
		s.Binds = slices.Clone(good.Binds)
		change(&s)
		return s
	}
	more := func(source, target string, ro bool) engine.Shown {
		return with(func(s *engine.Shown) {
			s.Binds = append(s.Binds, engine.Bind{Source: source, Target: target, ReadOnly: ro})
		})
	}
	for _, tt := range []struct {
		name  string
		shown engine.Shown
		want  string // what of the findings
	}{
		{"as planned", good, ""},
		{"another workspace", with(func(s *engine.Shown) { s.Workspace = base }), "workspace"},
		{"read-only", with(func(s *engine.Shown) { s.ReadOnly = true }), "workspace: read-only mount /workspace/.git"},
		{"another helper", with(func(s *engine.Shown) { s.GuestHelper = "/tmp/x" }), "guest helper"},
		{"another user", with(func(s *engine.Shown) { s.HostUID = 0 }), "user on the host"},
		{"a home", with(func(s *engine.Shown) { s.Home = "/h" }), "home is kept"},
		{"an image", with(func(s *engine.Shown) { s.Rootfs = "/r" }), "image of the host"},
		{"no mount", with(func(s *engine.Shown) { s.Binds = s.Binds[1:] }), "mount /opt/data"},
		{"a mount that can be written", with(func(s *engine.Shown) { s.Binds[0].ReadOnly = false }), "mount /opt/data mount /opt/data"},
		{"a mount more", more("/etc", "/etc", true), "mount /etc"},
		{"a mount into the workspace", more("/etc", "/workspace/etc", true), "mount /workspace/etc"},
		{"another part of the workspace", more(at("w/.git/hooks"), "/workspace/x", true), "mount /workspace/x"},
		{"a part of a mount that can be written", more(at("data/x"), "/opt/data/x", false), "mount /opt/data/x"},
		{"a cover that can be written", more(at("state/empty-dir"), "/workspace/x", false), "mount /workspace/x"},
		{"beside a mount", more(at("datax"), "/opt/datax", true), "mount /opt/datax"},
	} {
		f := &drift.Findings{}
		b.Shown(f, tt.shown, base)
		var got []string
		for _, x := range f.List {
			got = append(got, x.What)
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%s: %q, want %q (%+v)", tt.name, s, tt.want, f.List)
		}
	}
}

// TestShownLoop: a guest that makes a loop of links of what is mounted is
// reported, and ends nothing.
func TestShownLoop(t *testing.T) {
	x := fixture(t)
	base := t.TempDir()
	x.Record.ManifestDir = base
	for _, name := range []string{"loop", "gone"} {
		x.Plan.Mounts = []plan.Mount{{Source: name, Target: "/x", Mode: "ro"}}
		if name == "loop" {
			if err := os.Symlink("loop", filepath.Join(base, "loop")); err != nil {
				t.Fatal(err)
			}
		}
		f := &drift.Findings{Bottle: "t"}
		x.Shown(f, engine.Shown{}, "")
		if !slices.ContainsFunc(f.List, func(g drift.Finding) bool { return g.Kind == drift.Unknown && g.What == "mount /x" }) {
			t.Errorf("%s: %+v", name, f.List)
		}
	}
	x.Plan.Mounts = []plan.Mount{{Source: "~/data", Target: "/x", Mode: "ro"}}
	f := &drift.Findings{Bottle: "t"}
	x.Shown(f, engine.Shown{}, "") // no home
	if !slices.ContainsFunc(f.List, func(g drift.Finding) bool { return g.Kind == drift.Unknown && g.What == "mount /x" }) {
		t.Errorf("%+v", f.List)
	}
}
