package cli

import (
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/trust"
)

// roots are what upstreams are verified against: the host's bundle, and the
// files that the plan names and pins by digest.
func roots(b *plan.Bottle, at trust.Place) ([][]byte, error) {
	system, err := ca.SystemRoots()
	if err != nil {
		return nil, err
	}
	own, err := ca.PlanRoots(b.Egress.Roots, at.Path)
	return append([][]byte{system}, own...), err
}
