package keeper

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

// restartable is a bottle whose guest has a disk.
func restartable(t *testing.T, rules ...plan.Rule) *keeper {
	t.Helper()
	k := gated(t, rules...)
	k.eng, k.handed = disk{}, make(chan struct{})
	k.leaving, k.leave = context.WithCancel(context.Background())
	var err error
	if k.lock, err = k.bottle.Lock(); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *keeper) stopGate(t *testing.T) {
	t.Helper()
	if err := k.gate.stop(); err != nil {
		t.Fatal(err)
	}
	k.mu.Lock()
	k.phase = stopped
	k.mu.Unlock()
}

// A start that comes to nothing before the bottle is given away leaves it with
// the keeper that has it.
func TestStartThatHasNoKeeper(t *testing.T) {
	k := restartable(t)
	k.stopGate(t)
	if err := os.Mkdir(k.bottle.Path("keeper.log"), 0o700); err != nil { // no other keeper can be started
		t.Fatal(err)
	}
	for range 2 {
		if _, err := k.again(); fault.As(err) == nil || fault.As(err).Code != "cannot_create" {
			t.Errorf("%v", err)
		}
	}
	select {
	case <-k.handed:
		t.Error("nobody has the bottle")
	default:
	}
	if k.phase != stopped || k.handing {
		t.Errorf("it is %s, and handed over: %v", k.phase, k.handing)
	}
}

// What a gate has written is there when its bottle is started again, or there is
// no gate any more: a stop does not make it forgotten.
func TestStartHoldsTheLog(t *testing.T) {
	cut := func(n int64) func(string) error {
		return func(log string) error { return os.Truncate(log, n) }
	}
	for name, change := range map[string]func(log string) error{
		"emptied": cut(0), "taken away": os.Remove,
		"another": func(log string) error {
			l, err := audit.Open(log+".x", audit.Options{})
			if err != nil {
				return err
			}
			if err := l.Close(); err != nil {
				return err
			}
			return os.Rename(log+".x", log)
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := restartable(t)
			if code := k.try(added(denying("a.test"))); code != "" {
				t.Fatal(code)
			}
			k.stopGate(t)
			if _, err := k.gate.logEnd(); err != nil {
				t.Fatalf("untouched: %v", err)
			}
			if err := change(k.root.Audit(k.cfg.ID)); err != nil {
				t.Fatal(err)
			}
			_, err := k.again()
			if f := fault.As(err); f == nil || f.Exit != fault.NoPerm || f.Code != "audit_log_changed" || f.Hint == "" {
				t.Errorf("%v", err)
			}
			if k.phase != stopped {
				t.Error(k.phase)
			}
		})
	}
	// Nor does a gate come back whose log was lost while the bottle ran.
	k := restartable(t)
	k.stopGate(t)
	k.gate.lose("it was cut")
	if _, err := k.again(); fault.As(err) == nil || fault.As(err).Code != "audit_log_changed" {
		t.Errorf("%v", err)
	}
}

// A deny is for as long as there is the bottle; what was allowed ends with a run.
func TestStartKeepsDenies(t *testing.T) {
	k := gated(t, allowing("planned.test", 443))
	for _, c := range []struct {
		rule plan.Rule
		life time.Duration
	}{{denying("planned.test"), 0}, {denying("hour.test"), time.Hour}, {denying("over.test"), time.Nanosecond}, {allowing("a.test", 443), 0}} {
		ch := added(c.rule)
		ch.For = c.life
		if code := k.try(ch); code != "" {
			t.Fatal(code)
		}
	}
	k.stopGate(t)
	kept := k.live.denies()
	if len(kept) != 2 {
		t.Fatalf("%+v", kept)
	}
	// The next keeper's gate has them before it has a connection.
	k.phase, k.cfg.Denied = state.Starting, append(kept, live.Rule{Rule: denying("past.test"), Ends: live.Instant{Boot: 1, Wall: 1}})
	k.live = newLive(k)
	var err error
	if k.cfg.AuditHead, err = k.gate.logEnd(); err != nil {
		t.Fatal(err)
	}
	if k.gate, err = startGate(k); err != nil {
		t.Fatal(err)
	}
	if err := k.gate.awaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.phase = state.Ready
	k.gateHas(t, "deny planned.test", "deny hour.test")
}

// While another keeper is given the bottle, this one neither stops the guest that
// it starts nor takes rules that nobody would hold.
func TestNothingChangesWhileItIsHandedOver(t *testing.T) {
	k := gated(t)
	k.mu.Lock()
	k.phase, k.handing = state.Starting, true
	k.mu.Unlock()
	before, err := os.ReadFile(filepath.Join(k.bottle.Dir, "record.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.halt("the guest ended"); fault.As(err) == nil || fault.As(err).Code != "being_started" || fault.As(err).Exit != fault.TempFail {
		t.Errorf("%v", err)
	}
	if code := k.try(added(denying("a.test"))); code != "not_running" {
		t.Errorf("a rule was taken: %q", code)
	}
	after, err := os.ReadFile(filepath.Join(k.bottle.Dir, "record.json"))
	if err != nil || string(after) != string(before) || k.phase != state.Starting {
		t.Errorf("%s, %v, %s", after, err, k.phase)
	}
}

// Who is told to end while another keeper boots the guest ends that one, too.
func TestEndsItsSuccessor(t *testing.T) {
	k := restartable(t)
	k.stopGate(t)
	var err error
	if k.socket, err = k.control(); err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(t.TempDir(), "keeper")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexec sleep 60\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	h, err := Spawn(script, k.bottle.Path("keeper.log"), nil)
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	time.AfterFunc(50*time.Millisecond, k.leave)
	if _, err := k.handOver(h); err == nil || time.Since(begun) > 30*time.Second {
		t.Errorf("%v after %s", err, time.Since(begun))
	}
}
