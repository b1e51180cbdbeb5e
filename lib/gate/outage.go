package gate

import (
	"fmt"
	"net/http"
	"time"
)

// reopenEvery is how often a gate whose log cannot be written tries to.
const reopenEvery = 250 * time.Millisecond

// logFailed shuts the gate: without its log nothing leaves. What is open is cut,
// requests are answered with audit_failed, and as soon as the log can be written
// again the gate is open by itself. Where that cannot be it ends.
func (g *Gate) logFailed(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || g.shut != nil {
		return
	}
	g.shut = err
	fmt.Fprintf(g.cfg.Log, "gate: nothing leaves the bottle until the audit log can be written: %v\n", err)
	var relayed, asking []*guestConn
	for c := range g.conns {
		if c.relayed.Load() {
			relayed = append(relayed, c)
		} else {
			asking = append(asking, c)
		}
	}
	go cut(relayed)
	// Who asked for what could not be written down should still get the answer.
	time.AfterFunc(50*time.Millisecond, func() { cut(asking) })
	go g.reopen(err)
}

func cut(conns []*guestConn) {
	for _, c := range conns {
		c.Close()
	}
}

func (g *Gate) reopen(why error) {
	g.cfg.OnShut(why)
	for {
		time.Sleep(reopenEvery)
		retry, err := g.cfg.Audit.Recover()
		g.mu.Lock()
		switch {
		case g.closed:
			retry = false
		case err == nil:
			g.shut, retry = nil, false
			fmt.Fprintf(g.cfg.Log, "gate: the audit log can be written again\n")
		case !retry:
			g.failed = err
		}
		end, open := g.failed != nil, g.shut == nil
		g.mu.Unlock()
		if open {
			g.cfg.OnShut(nil)
		}
		if end {
			g.Close()
		}
		if !retry {
			return
		}
	}
}

// isShut tells if the gate waits for its log.
func (g *Gate) isShut() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.shut != nil
}

// auditFailed is the answer when a decision could not be written down. It is
// none itself: the same request may pass as soon as it can be.
func auditFailed(host string, port int) *Refusal {
	return &Refusal{Status: http.StatusServiceUnavailable, Code: "audit_failed", Host: host, Port: port, Retry: 1,
		Reason: "the gate is closed, since its audit log cannot be written",
		Hint:   "make room on the host's disk; the gate opens again by itself"}
}
