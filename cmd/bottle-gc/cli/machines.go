package cli

import (
	"context"
	"errors"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/orphan"
	"github.com/bottle-tools/bottle/lib/reaper"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/tool"

	engine "github.com/bottle-tools/bottle/lib/engine/smolvm"
)

// machines adds smolvm's machines as a source. A host without a smolvm, or with
// one that is too old for a bottle, has none of our making.
func machines(p *tool.Proc, stateDir string, src *reaper.Sources) {
	e := engine.NewFrom(p.Getenv)
	listed := map[string]engine.Owned{}
	src.Packers = func() (all []orphan.Packer) {
		for _, h := range e.PackHelpers() {
			all = append(all, orphan.Packer{Process: h.Process, For: h.Packer, Dir: h.Dir})
		}
		return all
	}
	src.EndPacker = func(_ context.Context, o orphan.Packer) error {
		return e.EndPackHelper(engine.PackHelper{Process: o.Process, Dir: o.Dir})
	}
	src.Machines = func(ctx context.Context) ([]orphan.VM, error) {
		all, err := e.Owned(ctx, stateDir)
		switch {
		case err == nil:
		case p.Getenv("BOTTLE_SMOLVM") == "" && (errors.Is(err, smolvm.ErrMissing) || errors.Is(err, smolvm.ErrWrongProgram)):
			return nil, nil
		default:
			return nil, fault.As(err)
		}
		var vms []orphan.VM
		for _, m := range all {
			listed[m.Name] = m
			vms = append(vms, orphan.VM{Name: m.Name, State: m.State, Created: m.Created, Maker: m.Maker})
		}
		return vms, nil
	}
	src.DeleteMachine = func(ctx context.Context, name string) error {
		if err := e.DeleteOwned(ctx, stateDir, listed[name]); err != nil {
			return fault.As(err)
		}
		return nil
	}
}
