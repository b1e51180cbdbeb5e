package cli

import (
	"context"
	"errors"
	"os"
	"syscall"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/orphan"
	"github.com/bottle-tools/bottle/lib/reaper"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
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
	src.BaseLife = engine.BaseLife
	src.Bases = bases
	src.RemoveBase = func(ctx context.Context, dir string) error {
		return e.RemoveBase(ctx, dir)
	}
	src.DeleteMachine = func(ctx context.Context, name string) error {
		if err := e.DeleteOwned(ctx, stateDir, listed[name]); err != nil {
			return fault.As(err)
		}
		return nil
	}
}

// bases lists the prepared machines in dir, and which bottles are copies of them.
func bases(dir string, bottles []*state.Bottle) ([]orphan.Prepared, error) {
	all, err := engine.Bases(dir)
	copies := map[string][]string{}
	for _, b := range bottles {
		if name := engine.BaseOf(b.Dir, b.ID); name != "" {
			copies[name] = append(copies[name], b.ID)
		}
	}
	var found []orphan.Prepared
	for _, b := range all {
		fi, err := os.Lstat(b.Dir())
		if err != nil {
			continue // removed in this moment
		}
		p := orphan.Prepared{Name: b.Name, Dir: b.Dir(), UID: -1, Changed: fi.ModTime(), Locked: b.Locked(),
			Alive: b.Alive(), UsedAt: b.UsedAt, Copies: copies[b.Name]}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			p.UID, p.Inode = int(st.Uid), st.Ino
		}
		found = append(found, p)
	}
	return found, err
}
