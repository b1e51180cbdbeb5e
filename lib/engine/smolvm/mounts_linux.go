package smolvm

import (
	"errors"
	"path/filepath"
	"strings"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/mountns"
	"github.com/bottle-tools/bottle/lib/smolvm"
)

const (
	mountsOfItsOwn = true
	inMountsVerb   = mountns.Verb
)

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
	return mountns.Launcher(s.Self, binds)
}

// withImage lets the monitor see the image that bottles share where the bottle's
// own would be, as something that it cannot write to.
func withImage(s *engine.Spec) smolvm.Launch {
	return mountns.Launcher(s.Self, []mountns.Bind{{Source: s.Rootfs, Target: rootfsDir(s.Dir), ReadOnly: true}})
}

// notMounted tells whether err is that of a call that never was: the host does not
// let this user mount, or not this. why is what it said.
func notMounted(err error) (why string, ok bool) {
	var e *smolvm.Error
	if !errors.As(err, &e) {
		return "", false
	}
	if e.Exit < 0 { // where there are no user namespaces, not even that program begins
		return e.Detail, e.Kind == smolvm.ErrMissing || e.Kind == smolvm.ErrFailed && strings.HasPrefix(e.Detail, "fork/exec ")
	}
	return strings.TrimSpace(e.Stderr), e.Exit == mountns.Failed && strings.HasPrefix(e.Stderr, mountns.Verb+": ")
}
