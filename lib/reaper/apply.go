package reaper

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/orphan"
	"github.com/bottle-tools/bottle/lib/state"
)

// Apply removes orphans, going on past errors. Every bottle is looked at and
// judged once more right before; one that is no orphan any more is left alone.
// done is called with each orphan that is gone.
func Apply(ctx context.Context, root *state.Root, orphans []orphan.Orphan, now func() time.Time, minAge time.Duration,
	engines func(string) engine.Engine, src Sources, done func(orphan.Orphan)) error {
	var errs []error
	for _, group := range byBottle(orphans) {
		err := ctx.Err()
		if err == nil {
			err = applyOne(ctx, root, group[0], now(), minAge, engines, src)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, o := range group {
			done(o)
		}
	}
	return errors.Join(errs...)
}

// byBottle puts together what is removed in one go: all of a bottle, and all of
// the cache.
func byBottle(orphans []orphan.Orphan) [][]orphan.Orphan {
	var groups [][]orphan.Orphan
	at := map[string]int{}
	for _, o := range orphans {
		key := "bottle " + o.ID
		switch {
		case o.Kind == orphan.Cache:
			key = "cache"
		case packer(o):
			key = fmt.Sprintf("process %d", o.Process.PID)
		case o.ID == "":
			key = "path " + o.Path
		}
		i, ok := at[key]
		if !ok {
			i = len(groups)
			at[key] = i
			groups = append(groups, nil)
		}
		groups[i] = append(groups[i], o)
	}
	return groups
}

func packer(o orphan.Orphan) bool { return o.ID == "" && o.Process != nil }

func applyOne(ctx context.Context, root *state.Root, o orphan.Orphan, now time.Time, minAge time.Duration,
	engines func(string) engine.Engine, src Sources) error {
	switch {
	case o.Kind == orphan.Cache:
		return src.SweepCache()
	case packer(o):
		return src.EndPacker(ctx, orphan.Packer{Process: *o.Process, Dir: o.Path})
	case o.Kind == orphan.Base:
		return src.RemoveBase(ctx, o.Path)
	case o.ID == "":
		return removeSockets(root, o.Path)
	case o.Kind == orphan.Machine && o.Process == nil:
		if isDir(root.Bottle(o.ID).Dir) {
			return nil // it has a bottle by now
		}
		return src.DeleteMachine(ctx, o.ID)
	}
	b := root.Bottle(o.ID)
	f := facts(root, now, minAge)
	if err := addBottle(&f, root, b); err != nil {
		return err
	}
	if len(orphan.Decide(f)) == 0 {
		return nil // gone, or in use again
	}
	rec, err := b.Load()
	if err != nil && !errors.Is(err, state.ErrNoRecord) {
		if errors.Is(err, state.ErrNotFound) {
			return nil
		}
		return fault.As(err)
	}
	return Remove(ctx, root, b, rec, engines)
}
