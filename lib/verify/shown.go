package verify

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/drift"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/trust"
)

// Shown holds what the keeper asked the engine to mount against the plan: that
// every mount of the plan is among it, and nothing that the plan has not, apart
// from parts of the workspace at their own place and the covers of what is
// hidden. home is the user's.
func (b *Bottle) Shown(f *drift.Findings, s engine.Shown, home string) {
	at := trust.Place{Base: b.Record.ManifestDir, Home: home}
	workspace := filepath.Join(b.Dir, "workspace") // the copy
	if b.Plan.Workspace.Mode != "scratch" {
		workspace = resolve(f, "workspace", at, b.Plan.Workspace.Path)
		f.Equal("record: workspace", workspace, b.Record.Workspace)
	}
	f.Equal("workspace", workspace, s.Workspace)
	f.Equal("workspace: read-only", fmt.Sprint(b.Plan.Workspace.Mode == "ro"), fmt.Sprint(s.ReadOnly))
	f.Equal("image of the host", fmt.Sprint(b.Plan.Image.Kind == "host"), fmt.Sprint(s.Rootfs == ""))
	f.Equal("home is kept", fmt.Sprint(b.Plan.Home == "keep"), fmt.Sprint(s.Home != ""))
	f.Equal("guest helper", filepath.Join(b.Programs, "bottle-guest"), s.GuestHelper)
	f.Equal("user on the host", fmt.Sprint(b.VM.HostUID), fmt.Sprint(s.HostUID))

	planned := make(map[int]bool)
	type place struct {
		source, target string
		readOnly       bool
	}
	places := []place{{workspace, engine.GuestWorkspace, s.ReadOnly}}
	for _, m := range b.Plan.Mounts {
		source := resolve(f, "mount "+m.Target, at, m.Source)
		want := engine.Bind{Source: source, Target: m.Target, ReadOnly: m.Mode == "ro"}
		i := slices.Index(s.Binds, want)
		if i < 0 {
			f.Drift("mount "+m.Target, source+" "+m.Mode, "not among what the guest was given")
			continue
		}
		planned[i] = true
		places = append(places, place{source, m.Target, want.ReadOnly})
	}
	for i, bind := range s.Binds {
		if planned[i] {
			continue
		}
		ok := false
		for _, p := range places {
			rel, below := strings.CutPrefix(bind.Target, p.target)
			if !below || rel != "" && rel[0] != '/' {
				continue
			}
			cover := bind.ReadOnly && slices.Contains([]string{"/dev/null", filepath.Join(b.Dir, "empty-file"), filepath.Join(b.Dir, "empty-dir")}, bind.Source)
			ok = ok || cover || bind.Source == filepath.Join(p.source, rel) && (bind.ReadOnly || !p.readOnly)
		}
		if !ok {
			f.Drift("mount "+bind.Target, "absent", bind.Source)
		}
	}
}

func resolve(f *drift.Findings, what string, at trust.Place, path string) string {
	abs, err := at.Path(path)
	var real string
	if err == nil {
		real, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		var at *fs.PathError // the path is in path already
		if errors.As(err, &at) {
			err = at.Err
		}
		f.Unknown(what, path, err)
		return abs
	}
	return real
}
