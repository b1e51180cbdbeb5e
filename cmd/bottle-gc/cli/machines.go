package cli

import (
	"context"
	"errors"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/orphan"
	"github.com/bottle-tools/bottle/lib/reaper"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/tool"

	engine "github.com/bottle-tools/bottle/lib/engine/smolvm"
)

// machines adds smolvm's machines as a source. A host without a smolvm, or with
// one that is too old for a bottle, has none of our making.
func machines(p *tool.Proc, src *reaper.Sources) {
	src.Machines = func(ctx context.Context) ([]orphan.VM, error) {
		c, err := client(ctx, p)
		if c == nil || err != nil {
			return nil, err
		}
		all, err := c.MachineLs(ctx)
		if err != nil {
			return nil, fault.As(err)
		}
		var ours []orphan.VM
		for _, m := range all {
			if m.Labels[engine.LabelOwner] == engine.OwnerValue {
				ours = append(ours, orphan.VM{Name: m.Name, State: m.State, Created: time.Unix(m.CreatedAt, 0)})
			}
		}
		return ours, nil
	}
	src.DeleteMachine = func(ctx context.Context, name string) error {
		c, err := client(ctx, p)
		if err == nil && c != nil {
			err = c.MachineDelete(ctx, name)
		}
		if err != nil && !errors.Is(err, smolvm.ErrNotFound) {
			return fault.As(err)
		}
		return nil
	}
}

// client gives nil where there is nothing to ask.
func client(ctx context.Context, p *tool.Proc) (*smolvm.Client, error) {
	bin, err := smolvm.Find(p.Getenv)
	var c *smolvm.Client
	if err == nil {
		c, err = smolvm.Open(ctx, bin, nil)
	}
	switch {
	case err == nil && c.Version.Less(smolvm.SinceContainers):
		return nil, nil
	case err == nil:
		return c, nil
	case p.Getenv("BOTTLE_SMOLVM") == "" && (errors.Is(err, smolvm.ErrMissing) || errors.Is(err, smolvm.ErrWrongProgram)):
		return nil, nil
	}
	return nil, fault.As(err)
}
