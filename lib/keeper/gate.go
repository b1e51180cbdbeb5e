package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gateproc"
)

// Roles in the record.
const (
	roleGate  = "gate"
	roleProxy = "proxy"
	roleAside = "mitmdump"
)

// Backoff of a gate or proxy that keeps dying.
const (
	restartFirst = 20 * time.Millisecond
	restartMost  = 500 * time.Millisecond
	steady       = 10 * time.Second // a run this long starts the backoff anew
)

// gateDown is the keeper's answer to whatever a guest asks for while there is
// no gate. It is the gate's form (lib/gate, Refusal), and nothing of the request
// is read for it.
var gateDown = func() []byte {
	const body = `{"error":{"code":"gate_down","host":"","port":0,` +
		`"reason":"the bottle's gate is being started anew; meanwhile nothing leaves the bottle","hint":"try again in a second"}}` + "\n"
	return fmt.Appendf(nil, "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"+
		"Cache-Control: no-store\r\nX-Bottle-Decision: error\r\nRetry-After: 1\r\nConnection: close\r\n\r\n%s", len(body), body)
}()

// telling bounds the connections that are told so at one time; more are closed.
var telling = make(chan struct{}, 64)

// tellDown answers on a guest's connection, unread, and closes it. Closing it at
// once would take the answer from a client that is still sending.
func tellDown(f *os.File) {
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return
	}
	select {
	case telling <- struct{}{}:
	default:
		c.Close()
		return
	}
	go func() {
		defer func() { c.Close(); <-telling }()
		// The answer has room in the socket: only a machine that is very busy
		// comes near the first limit.
		_ = c.SetWriteDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write(gateDown); err != nil {
			return
		}
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if h, ok := c.(interface{ CloseWrite() error }); ok && h.CloseWrite() == nil {
			_, _ = io.CopyN(io.Discard, c, 64<<10)
		}
	}()
}

// pending bounds the connections that wait to be passed to the gate.
const pending = 256

var errNoGate = errors.New("the gate is down")

// gateKeeper keeps one gate process alive and passes connections to it. While
// there is none, connections are told so and closed: the bottle has no way out.
type gateKeeper struct {
	k      *keeper
	config gateproc.Config
	queue  chan *os.File
	quit   chan struct{}
	done   chan struct{}
	once   sync.Once
	first  func() (*gateproc.Process, error) // waits until the first gate was launched

	mu         sync.Mutex
	proc       *gateproc.Process // nil while down
	supervised bool              // supervise will close done
	known      audit.Head        // the last line of the audit log that a gate has told of
	left       audit.Head        // the last line when the gate had been told to end
	lost       string            // why there will be no gate any more
}

// startGate begins to start the first gate; what comes of it awaitReady tells.
// The supervisor takes over from there.
func startGate(k *keeper) (*gateKeeper, error) {
	if err := k.root.MakeAudit(); err != nil {
		return nil, err
	}
	head := k.cfg.AuditHead // a bottle that is started again goes on with its log
	g := &gateKeeper{k: k, queue: make(chan *os.File, pending), quit: make(chan struct{}), done: make(chan struct{}), known: head}
	g.config = gateproc.Config{
		ID: k.cfg.ID, Bottle: k.plan, Base: k.cfg.Base, Secrets: k.cfg.Secrets, CA: k.caPEM,
		Audit: k.root.Audit(k.cfg.ID), AuditBounds: k.cfg.Audit, Upstream: k.proxy.addr(),
		AuditHead: head,
	}
	g.first = sync.OnceValues(func() (*gateproc.Process, error) {
		p, err := g.launch()
		g.set(p)
		return p, err
	})
	go g.first()
	return g, nil
}

func (g *gateKeeper) launch() (*gateproc.Process, error) {
	g.config.Upstream = g.k.proxy.addr()
	g.config.Sidecar = g.k.aside.config()
	p, err := gateproc.Start(g.k.cfg.EgressExe, g.config, g.k.log)
	if err != nil {
		return nil, err
	}
	if err := g.k.record(roleGate, p.PID()); err != nil {
		_ = p.Stop(0)
		return nil, err
	}
	return p, nil
}

func (g *gateKeeper) set(p *gateproc.Process) {
	g.mu.Lock()
	g.proc = p
	g.mu.Unlock()
}

func (g *gateKeeper) get() *gateproc.Process {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.proc
}

// awaitReady waits for the first gate and then starts to supervise it.
func (g *gateKeeper) awaitReady(ctx context.Context) error {
	p, err := g.first()
	if err != nil {
		return err
	}
	if err := p.AwaitReady(ctx); err != nil {
		return err
	}
	if err := g.k.live.adopt(ctx, p); err != nil {
		return err
	}
	g.mu.Lock()
	g.supervised = true
	g.mu.Unlock()
	go g.forward()
	go g.supervise(p)
	return nil
}

// take is a guest.Broker service: it never blocks, and owns f.
func (g *gateKeeper) take(f *os.File) error {
	select {
	case g.queue <- f:
		return nil
	default:
		f.Close()
		return errNoGate
	}
}

func (g *gateKeeper) forward() {
	for {
		select {
		case f := <-g.queue:
			err := errNoGate
			if p := g.get(); p != nil {
				if err = p.Conns.Send([]byte("c"), f); err != nil {
					g.k.logf("passing a connection to the gate: %v", err)
				}
			}
			if err != nil {
				tellDown(f)
				continue
			}
			f.Close() // the gate has its own
		case <-g.quit:
			return
		}
	}
}

// supervise replaces a gate that ended.
func (g *gateKeeper) supervise(p *gateproc.Process) {
	defer close(g.done)
	wait := restartFirst
	for {
		begun := g.k.now()
		select {
		case <-g.quit:
			g.set(nil)
			_ = p.Stop(gateGrace)
			g.leave(p)
			return
		case <-p.Done():
		}
		g.set(nil)
		p.Conns.Close()
		g.k.logf("the gate ended (%s); the bottle has no way out until the next one is up", p.Exited())
		dead, noted := p, false
		for p = nil; p == nil; wait = min(2*wait, restartMost) {
			noted = noted || g.remember(dead)
			if g.lostLog() != "" {
				<-g.quit
				return
			}
			if g.k.now().Sub(begun) > steady {
				wait = restartFirst
			}
			select {
			case <-g.quit:
				return
			case <-time.After(wait):
			}
			if noted {
				p = g.relaunch()
			}
		}
	}
}

// remember notes how the dead gate p has left the log: what it has told of has to
// be there, and the next one has to find it as it is now. A log that was cut or
// taken away is not gone on with: there is no gate any more. It is false if the
// log cannot be read at present.
func (g *gateKeeper) remember(p *gateproc.Process) bool {
	known := g.toldBy(p)
	there, err := audit.Holds(g.config.Audit, known)
	if err == nil && there {
		g.config.AuditHead, err = audit.Tail(g.config.Audit)
	}
	if err != nil {
		g.k.logf("%v", err)
		return false
	}
	if !there {
		g.lose(lostLine(g.config.Audit, known))
	}
	return true
}

func lostLine(path string, h audit.Head) string {
	return fmt.Sprintf("audit log %s does not hold line %d any more, which its gate has written", path, h.Seq)
}

// toldBy is the last line that p, or a gate before it, has told of.
func (g *gateKeeper) toldBy(p *gateproc.Process) audit.Head {
	h := p.Head()
	g.mu.Lock()
	defer g.mu.Unlock()
	if h.Seq > 0 {
		g.known = h
	}
	return g.known
}

// leave notes how p, which was told to end, has left the log.
func (g *gateKeeper) leave(p *gateproc.Process) {
	g.toldBy(p)
	h, err := audit.Tail(g.config.Audit)
	if err != nil {
		g.k.logf("%v", err)
		return
	}
	g.mu.Lock()
	g.left = h
	g.mu.Unlock()
}

// logEnd is where the log of a stopped bottle ends, for the gate that goes on
// with it: not where what the gates have written is gone.
func (g *gateKeeper) logEnd() (audit.Head, error) {
	g.mu.Lock()
	lost, known, left := g.lost, g.known, g.left
	g.mu.Unlock()
	for _, h := range []audit.Head{known, left} {
		there, err := audit.Holds(g.config.Audit, h)
		if err != nil {
			return audit.Head{}, err
		}
		if !there && lost == "" {
			lost = lostLine(g.config.Audit, h)
		}
	}
	if lost != "" {
		g.lose(lost)
		return audit.Head{}, fault.New(fault.NoPerm, "audit_log_changed", "%s", lost).
			WithHint("look at it with bottle-egress log --verify; remove the bottle with bottle-vm down, and start a new one")
	}
	return audit.Tail(g.config.Audit)
}

func (g *gateKeeper) lose(why string) {
	g.k.logf("there will be no gate any more: %s", why)
	g.mu.Lock()
	g.lost = why
	g.mu.Unlock()
}

func (g *gateKeeper) lostLog() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.lost
}

func (g *gateKeeper) relaunch() *gateproc.Process {
	p, err := g.launch()
	if err != nil {
		g.k.logf("restarting the gate: %v", err)
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := p.AwaitReady(ctx); err != nil {
		g.k.logf("restarting the gate: %v", err)
		_ = p.Stop(0)
		if f := fault.As(err); f.Code == "audit_log_changed" {
			g.lose(f.Msg)
			return nil
		}
		// It may have written that it began.
		for !g.remember(p) {
			select {
			case <-g.quit:
				return nil
			case <-time.After(restartMost):
			}
		}
		return nil
	}
	if err := g.k.live.adopt(ctx, p); err != nil {
		g.k.logf("restarting the gate: %v", err)
		_ = p.Stop(0)
		return nil
	}
	g.k.logf("the gate is up again, process %d", p.PID())
	return p
}

// restart ends the present gate so that the next one takes a new config.
func (g *gateKeeper) restart() {
	_, _ = g.first()
	if p := g.get(); p != nil {
		g.set(nil)
		_ = p.Stop(0)
	}
}

// stop ends the gate for good. It may be called more than once.
func (g *gateKeeper) stop() error {
	g.once.Do(func() { close(g.quit) })
	p, err := g.first()
	if err != nil {
		return nil // there never was one
	}
	g.mu.Lock()
	supervised := g.supervised
	g.mu.Unlock()
	if !supervised {
		return p.Stop(0)
	}
	select {
	case <-g.done:
	case <-time.After(5 * time.Second):
		return errors.New("the gate does not end")
	}
	for {
		select {
		case f := <-g.queue:
			f.Close()
		default:
			return nil
		}
	}
}
