package cli

import (
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/gate"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/trust"
)

// roots are what upstreams are verified against: the host's bundle, and the
// files that the plan names and pins by digest. A gate that inspects nothing
// verifies nothing itself, and is up sooner without the host's.
func roots(b *plan.Bottle, at trust.Place) ([][]byte, error) {
	own, err := ca.PlanRoots(b.Egress.Roots, at.Path)
	if err != nil || len(gate.InspectedHosts(b)) == 0 {
		return own, err
	}
	system, err := ca.SystemRoots()
	return append([][]byte{system}, own...), err
}
