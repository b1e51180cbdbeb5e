package smolvm

import (
	"path/filepath"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/mountns"
	"github.com/bottle-tools/bottle/lib/smolvm"
)

const mountsOfItsOwn = true

// inMounts lets the copy's monitor see the bottle's own folders at the places of
// the base's, and the image as something that it cannot write to. The gate's
// folder and not its socket, which may be another one when the gate was replaced.
func inMounts(s *engine.Spec, vs []smolvm.Volume, b *Base) smolvm.Launch {
	binds := []mountns.Bind{
		{Source: b.rootfs(), Target: b.rootfs(), ReadOnly: true},
		{Source: filepath.Dir(s.GateSocket), Target: b.gateDir()},
	}
	for i, v := range vs {
		binds = append(binds, mountns.Bind{Source: v.Host, Target: b.slot(i), ReadOnly: v.ReadOnly})
	}
	return mountns.Launcher(s.Warm.Exe, binds)
}
