package pipelock

import (
	"context"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/trust"
)

// Choose settles which proxy stands behind the gate: the program, or nil for
// the built-in one, and why, in one line for people. e is what Derive gives.
//
// "builtin" and "pipelock" are taken by their word; "auto" is pipelock where it
// is installed. Nothing is looked for if pipelock would have nothing to carry.
// Errors are those of Find, for "pipelock" only, and that it lies in one of the
// folders away, which guests may write (trust.Program).
func Choose(ctx context.Context, b *plan.Bottle, e *plan.Egress, getenv func(string) string, away []string) (*Program, string, error) {
	switch {
	case b.Egress.Proxy == "builtin":
		return nil, "the manifest asks for the built-in proxy", nil
	case e.Pipelock == nil:
		return nil, "pipelock has no configuration for this policy, or nothing to carry", nil
	}
	if path, err := locate(getenv); err == nil {
		if err := trust.Program("pipelock", path, away); err != nil {
			return nil, "", err
		}
	}
	p, err := Find(ctx, getenv)
	switch {
	case err == nil && b.Egress.Proxy == "pipelock":
		return p, "the manifest asks for pipelock", nil
	case err == nil:
		return p, "pipelock " + p.Version + " is installed", nil
	case b.Egress.Proxy == "pipelock":
		return nil, "", err
	}
	return nil, fault.As(err).Msg, nil
}
