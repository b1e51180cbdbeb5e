package keeper

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

// AgainLimit is for who asks: a start, and a first one of an engine, too.
const AgainLimit = time.Hour

// again boots the guest of a stopped bottle. A new keeper does it, with what this
// one was given: nothing of the run that has ended is left in it. This process
// goes when that one has the bottle, and keeps it if that fails.
func (k *keeper) again() ([]string, error) {
	r, ok := k.eng.(engine.Restarter)
	if !ok || r == nil {
		return nil, fault.New(fault.Host, "no_disk", "engine %s keeps no disk of a stopped bottle: what its guest changed outside of the workspace is gone", k.eng.Name()).
			WithHint("look at it with bottle-vm logs and diff, remove it with bottle-vm down, and start a new one with bottle-vm up")
	}
	k.mu.Lock()
	phase := k.phase
	if phase == stopped {
		k.phase, k.handing = state.Starting, true // the next one that asks is told so
	}
	k.mu.Unlock()
	if phase != stopped {
		return nil, fault.New(fault.TempFail, "not_stopped", "bottle %s is not stopped, but %s", k.cfg.ID, phase).
			WithHint("bottle-vm stop %s ends its guest and keeps the disk", k.cfg.ID)
	}
	k.ending.Lock() // the stop may be at it still
	defer k.ending.Unlock()
	next, err := k.successor()
	if err != nil {
		k.mu.Lock()
		k.phase, k.handing = stopped, false
		k.mu.Unlock()
		return nil, err
	}
	warnings, err := k.handOver(next)
	if err == nil {
		close(k.handed)
		return warnings, nil
	}
	if kerr := k.takeBack(); kerr != nil {
		// Somebody else is at it: down or gc, which remove it.
		k.logf("taking the bottle back: %v", kerr)
		close(k.handed)
	}
	return nil, err
}

// successor starts another keeper, which waits to be configured. The bottle is
// this one's still.
func (k *keeper) successor() (*Handle, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fault.New(fault.Host, "no_self", "cannot tell where this program lies: %w", err)
	}
	if k.cfg.AuditHead, err = k.gate.logEnd(); err != nil {
		return nil, err
	}
	h, err := Spawn(exe, k.bottle.Path("keeper.log"), os.Environ())
	if err != nil {
		return nil, err
	}
	if err := k.record("keeper", h.PID); err != nil {
		h.Abandon()
		h.Wait()
		return nil, err
	}
	return h, nil
}

// handOver gives it the bottle, and waits until it has booted the guest.
func (k *keeper) handOver(h *Handle) ([]string, error) {
	defer context.AfterFunc(k.leaving, h.Abandon)() // what ends it clears up
	cfg := k.cfg
	cfg.Again, cfg.Denied = true, k.live.denies()
	for _, l := range k.gates {
		l.Close()
	}
	k.gates = nil
	k.socket.Close()
	k.lock.Close()
	err := h.Configure(cfg)
	var r *Reply
	if err == nil {
		r, err = h.Await()
	}
	switch {
	case err == nil && r.Error == nil:
		return r.Warnings, nil
	case err == nil:
		err = fault.New(r.Error.Exit, r.Error.Code, "%s", r.Error.Message).WithHint("%s", r.Error.Hint)
	}
	h.Abandon()
	h.Wait()
	return nil, err
}

// takeBack is after a keeper that could not boot the guest: the bottle is stopped,
// as it was.
func (k *keeper) takeBack() (err error) {
	if k.lock, err = k.bottle.Lock(); err != nil {
		return err
	}
	rec, err := k.bottle.Load()
	if err != nil {
		return err
	}
	self, err := state.Identify(os.Getpid())
	if err != nil {
		return err
	}
	k.dropSockets() // that keeper may have been killed
	if k.socket, err = k.control(); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.rec = rec
	k.rec.Keeper, k.rec.Phase, k.phase, k.handing = &self, state.Stopped, stopped, false
	return k.bottle.Save(k.rec)
}

// dropSockets removes those of a keeper that is gone. Who holds the lock may.
func (k *keeper) dropSockets() {
	_ = os.Remove(control.Socket(k.rec.RunDir))
	_ = os.Remove(k.gateSocket())
}

// prepareAgain clears away what the ended run has left for its like, and gives
// what boots the guest.
func (k *keeper) prepareAgain() (func(context.Context, *engine.Spec) (*engine.Started, error), error) {
	r, ok := k.eng.(engine.Restarter)
	if !ok {
		return nil, fault.New(fault.Bug, "bug", "engine %s cannot boot a guest again", k.eng.Name())
	}
	k.dropSockets()
	for _, name := range []string{"pipelock", "mitmdump", "empty-file", "empty-dir"} {
		if err := state.RemoveAll(filepath.Join(k.bottle.Dir, name)); err != nil {
			return nil, fault.New(fault.IO, "remove_failed", "%w", err)
		}
	}
	return r.Restart, nil
}

// fallBack is after a start that failed, of a bottle that was stopped: its disk is
// kept, and the keeper that had it takes it back.
func (k *keeper) fallBack(reply io.WriteCloser, cause error) error {
	r := Reply{Error: plan.NewFailure("vm", cause)}
	if err := k.end(k.stopGuest); err != nil {
		k.logf("ending: %v", err)
		r.Warnings = []string{fmt.Sprintf("clearing up after the failed start: %v", err)}
	}
	for _, l := range k.gates {
		l.Close()
	}
	if k.socket != nil {
		k.socket.Close()
	}
	_ = send(reply, r)
	return cause
}
