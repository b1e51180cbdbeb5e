package smolvm

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/smolvm"
)

// Stop ends the guest and keeps its disks. A monitor that smolvm does not end, or
// does not know of any more, is ended here.
func (e *Engine) Stop(ctx context.Context, r engine.Ref) error {
	if _, err := os.Lstat(ownDir(r.Dir)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	c, err := e.client(ctx)
	if err != nil {
		return err
	}
	m, err := c.MachineStatus(ctx, r.ID)
	if errors.Is(err, smolvm.ErrNotFound) {
		return nil
	}
	if err == nil {
		if err := ours(m, tagOf(r.Dir)); err != nil {
			return err
		}
		if running(m) {
			flush(ctx, c, r.ID)
		}
		err = c.MachineStop(ctx, r.ID)
	}
	killed, kerr := killMonitors(ctx, dataDirs(ctx, c, r.ID, r.Dir))
	if kerr == nil && (killed > 0 || !running(m)) {
		return nil // it has ended, whatever smolvm said
	}
	return join(err, kerr)
}

// flushLimit bounds the wait for a guest that is about to be ended.
const flushLimit = 20 * time.Second

// flush has the guest write to its disks what it holds in memory. smolvm ends a
// guest that it calls unreachable, as it does slow ones, without that. A guest that
// does not answer keeps its disk as after a loss of power.
func flush(ctx context.Context, c *smolvm.Client, id string) {
	ctx, cancel := context.WithTimeout(ctx, flushLimit)
	defer cancel()
	_, _ = firstExec(ctx, c, id, "", engine.GuestHelper, "sync")
}

// Restart boots the machine again. What it shows of the host was settled when it
// was created, so a plan that comes out otherwise today is refused, and so are
// folders in whose place the guest has left a link.
func (e *Engine) Restart(ctx context.Context, s *engine.Spec) (*engine.Started, error) {
	if err := e.Prepare(ctx, s); err != nil {
		return nil, err
	}
	c, err := e.client(ctx)
	if err != nil {
		return nil, err
	}
	e.note()
	vs, err := volumes(s)
	if err != nil {
		return nil, err
	}
	if err := restartable(ctx, c, s, vs); err != nil {
		return nil, err
	}
	pins, err := pin(elsewhere(vs, s.Dir))
	defer pins.close()
	if err != nil {
		return nil, err
	}
	pid, err := e.bootAgain(ctx, c, s, vs, pins)
	if err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
		defer cancel()
		return nil, join(err, e.Stop(clean, engine.Ref{ID: s.ID, Dir: s.Dir}))
	}
	return started(s, pid), nil
}

func (e *Engine) bootAgain(ctx context.Context, c *smolvm.Client, s *engine.Spec, vs []smolvm.Volume, pins pins) (int, error) {
	if err := stage(s, vs); err != nil {
		return 0, err
	}
	return e.boot(ctx, c, s, pins)
}

func restartable(ctx context.Context, c *smolvm.Client, s *engine.Spec, vs []smolvm.Volume) error {
	m, err := c.MachineStatus(ctx, s.ID)
	if errors.Is(err, smolvm.ErrNotFound) {
		return fault.New(fault.Unavailable, "smolvm_not_found", "the smolvm machine %s is gone, and its disk with it", s.ID).
			WithHint("remove the bottle with bottle-vm down, and start a new one")
	}
	if err != nil {
		return err
	}
	if err := ours(m, tagOf(s.Dir)); err != nil {
		return err
	}
	if running(m) {
		return fault.New(fault.TempFail, "still_running", "the smolvm machine %s still runs", s.ID).WithHint("try again in a moment")
	}
	var rec machineRecord
	b, err := os.ReadFile(machineFile(s.Dir))
	if err == nil {
		err = json.Unmarshal(b, &rec)
	}
	if err != nil {
		return fault.New(fault.IO, "smolvm_record", "what machine %s was created with cannot be read: %w", s.ID, err).
			WithHint("remove the bottle with bottle-vm down, and start a new one")
	}
	if rec.Base != "" {
		// smolvm would show it the places of the machine that it is a copy of.
		return refuse("warm_again", "", "remove it with bottle-vm down and start a new one; leave --warm out for one that can be started again",
			"%s is a copy of %s, and cannot be started again", s.ID, rec.Base)
	}
	if now := shownBy(vs, s.GateSocket); !slices.Equal(rec.Shown, now) {
		was, is := differences(rec.Shown, now), differences(now, rec.Shown)
		return refuse("smolvm_changed", "", "put it back, or remove the bottle with bottle-vm down and start a new one",
			"what the guest was given of the host has changed: it was %q, and would be %q", was, is)
	}
	return nil
}

// differences are those of a that are not in b.
func differences(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}
