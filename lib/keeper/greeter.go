package keeper

import (
	"io"
	"net"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest"
)

// greetLimit bounds the connections that are greeted at one time: nothing but
// the helper, and perhaps the engine's own look, runs in the guest then.
const greetLimit = 16

// greeter answers on a bottle's socket as long as the engine starts the guest.
// That the socket leads from the guest to this keeper is then known from both
// ends, and needs no word of the engine's program.
type greeter struct {
	mu      sync.Mutex
	ended   bool
	greeted int // connections that were given the whole of it
	busy    int
	boot    int               // counts forget
	reports chan guest.Report // the last one of this boot that was not read
}

func newGreeter() *greeter { return &greeter{reports: make(chan guest.Report, 1)} }

// greet takes c and answers on it, unless the guest has been started already.
func (g *greeter) greet(c net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.ended:
		return false
	case g.busy >= greetLimit:
		c.Close()
		return true
	}
	g.busy++
	// It has room in the socket: counted before anybody can have heard it.
	_ = c.SetWriteDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, guest.Greeting); err == nil {
		g.greeted++
	}
	boot := g.boot
	go func() {
		defer func() {
			c.Close()
			g.mu.Lock()
			g.busy--
			g.mu.Unlock()
		}()
		// The other end answers or closes when it has heard: closing first could take
		// the greeting from it.
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if r, ok := guest.ReadReport(c); ok {
			g.told(boot, r)
		}
	}()
	return true
}

// told keeps the report, in place of one that nobody has read.
func (g *greeter) told(boot int, r guest.Report) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if boot != g.boot {
		return
	}
	g.drop()
	g.reports <- r
}

func (g *greeter) drop() {
	select {
	case <-g.reports:
	default:
	}
}

// forget drops what a guest has told, and what connections that are there may yet
// tell: another boot of it is about to begin.
func (g *greeter) forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.boot++
	g.greeted = 0
	g.drop()
}

// over ends the greeting: from now on connections go to the gate. It is an error
// if nobody came. A nil greeter (a guest without a socket) has none to expect.
func (g *greeter) over() error {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
	if g.greeted > 0 {
		return nil
	}
	return fault.New(fault.Unavailable, "gate_socket_missing", "the guest runs, but nothing came from it by the gate's socket").
		WithHint("the engine's program did not do what it was asked for: install another version of it, or use runtime gvisor")
}
