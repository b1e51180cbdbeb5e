package keeper

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gateproc"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

// control listens for the commands of the bottle's owner: the socket lies in a
// folder that is 0700.
func (k *keeper) control() (net.Listener, error) {
	l, err := net.Listen("unix", control.Socket(k.rec.RunDir))
	if err != nil {
		return nil, fault.New(fault.CantCreate, "cannot_create", "the keeper's socket: %w", err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					k.logf("control: %v", err)
				}
				return
			}
			go k.answer(c)
		}
	}()
	return l, nil
}

func (k *keeper) answer(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	var q control.Request
	if err := json.NewDecoder(io.LimitReader(c, 256<<10)).Decode(&q); err != nil {
		return
	}
	// The folder keeps others out; this is for one whose mode was changed.
	uid, err := peerUID(c)
	if err != nil || uid != os.Geteuid() {
		k.logf("control: refused to talk to uid %d (%v)", uid, err)
		_ = json.NewEncoder(c).Encode(control.Answer{Error: plan.NewFailure("vm", fault.New(fault.NoPerm, "not_yours",
			"bottle %s belongs to uid %d", k.cfg.ID, os.Geteuid()))})
		return
	}
	var a control.Answer
	switch q.Do {
	case "status":
	case "change":
		var change control.Change
		if q.Change != nil {
			change = *q.Change
		}
		if a.Changed, a.Cut, err = k.live.change(change, uid); err != nil {
			a.Error = plan.NewFailure("egress", err)
		}
	case "report":
		r, err := k.live.report()
		if err != nil {
			a.Error = plan.NewFailure("vm", err)
		}
		a.Report = &control.Report{GateRules: r.RulesSHA256, GateLive: r.LiveSHA256, ProxyConfig: k.proxy.ref().RunConfigSHA256,
			Document: plan.SHA256(k.doc.Line()), Watches: k.monitor != nil, Sidecar: k.aside.report()}
	case "stop":
		if err := k.halt("stopped by command"); err != nil {
			if f := fault.As(err); f.Exit != fault.TempFail {
				err = fault.New(fault.IO, "stop_failed", "stopping: %w", err)
			}
			a.Error = plan.NewFailure("vm", err)
		}
	case "start":
		_ = c.SetDeadline(time.Now().Add(AgainLimit))
		warnings, err := k.again()
		if err != nil {
			a.Error = plan.NewFailure("vm", err)
		} else {
			// Another keeper has the bottle: nothing here tells of it any more.
			_ = json.NewEncoder(c).Encode(control.Answer{Phase: state.Ready, Findings: warnings})
			return
		}
	default:
		a.Error = plan.NewFailure("vm", fault.New(fault.Usage, "usage", "the keeper knows no %q", q.Do))
	}
	k.mu.Lock()
	a.Phase, a.Reason = k.phase, k.reason
	k.mu.Unlock()
	a.Gate, a.Proxy, a.Sidecar = "down", k.proxy.status(), k.aside.status()
	if p := k.gate.get(); a.Phase != stopped && p != nil {
		a.Gate = "up"
		if s := p.State(); s.Gate == gateproc.Shut {
			a.Gate, a.Reason = "shut", "the gate is shut: "+s.Why
		}
	}
	if why := k.gate.lostLog(); a.Phase != stopped && why != "" {
		a.Reason = "there will be no gate any more: " + why
	}
	a.Findings = k.guard.report()
	a.Live = k.live.list()
	_ = json.NewEncoder(c).Encode(a)
}
