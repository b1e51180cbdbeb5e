package keeper

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// control listens for the commands of the bottle's owner: the socket lies in a
// folder that is 0700.
func (k *keeper) control() (net.Listener, error) {
	l, err := net.Listen("unix", controlSocket(k.rec.RunDir))
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
	var q Request
	if err := json.NewDecoder(io.LimitReader(c, 64<<10)).Decode(&q); err != nil {
		return
	}
	var a Answer
	switch q.Do {
	case "status":
	case "stop":
		if err := k.halt("stopped by command"); err != nil {
			a.Error = plan.NewFailure("vm", fault.New(fault.IO, "stop_failed", "stopping: %w", err))
		}
	default:
		a.Error = plan.NewFailure("vm", fault.New(fault.Usage, "usage", "the keeper knows no %q", q.Do))
	}
	k.mu.Lock()
	a.Phase, a.Reason = k.phase, k.reason
	k.mu.Unlock()
	a.Gate, a.Proxy = "down", k.proxy.status()
	if a.Phase != stopped && k.gate.get() != nil {
		a.Gate = "up"
	}
	a.Findings = k.guard.report()
	_ = json.NewEncoder(c).Encode(a)
}
