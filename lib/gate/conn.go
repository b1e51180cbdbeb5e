package gate

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
)

// guestConn is a connection from the guest as it was accepted: counted, and
// known to the gate so that it can be cut.
type guestConn struct {
	net.Conn
	gate *Gate
	back bool // of the sidecar, and not of the guest
	once sync.Once
	// relayed is set once there is no answer any more that it could still get.
	relayed atomic.Bool
}

func (c *guestConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { c.gate.forget(c) })
	return err
}

// CloseWrite passes an end of stream on.
func (c *guestConn) CloseWrite() error { return closeWrite(c.Conn) }

// httpConn is a connection that net/http serves: the guest's own, or what is
// inside a tunnel that the gate terminates. It holds the client to a strict
// framing and to moving on.
type httpConn struct {
	net.Conn
	gate   *Gate
	since  time.Time
	tunnel *tunnel // nil on the guest's own connection
	back   bool    // of the sidecar, and not of the guest
	frame  framing
	held   []byte // of a head that is not complete
	ready  []byte // to be read by net/http
	bad    atomic.Pointer[Refusal]
	// between is set while no request is being answered.
	between atomic.Bool

	mu      sync.Mutex
	aborted bool // net/http wants a pending Read to return
	begun   bool // the client has sent something
}

func (g *Gate) newHTTPConn(c net.Conn, t *tunnel) *httpConn {
	h := &httpConn{Conn: c, gate: g, since: time.Now(), tunnel: t, back: t != nil && t.back}
	h.between.Store(true)
	return h
}

// Close ends the tunnel, too, where there is one.
func (c *httpConn) Close() error {
	if c.tunnel != nil {
		defer c.tunnel.flow.end()
	}
	return c.Conn.Close()
}

// Read gives net/http whole heads only, after they have been looked at: it
// answers a bad first line before it has seen the rest.
func (c *httpConn) Read(p []byte) (int, error) {
	for len(c.ready) == 0 {
		if c.bad.Load() != nil {
			return 0, c.refuse()
		}
		inBody := c.frame.state != inHead && c.frame.state != inTunnel
		if inBody {
			c.extend()
		}
		n, err := c.Conn.Read(p)
		if n == 0 {
			c.unused(err)
			return 0, err
		}
		c.begin()
		ok, bad := c.frame.feed(p[:n])
		c.bad.Store(bad)
		if inBody && c.frame.state == inHead {
			// The rest is net/http's waiting for the client to go away, which
			// may take as long as the answer does.
			c.clear()
		}
		if len(c.held) == 0 && ok == n && c.frame.open() == 0 {
			return n, nil
		}
		c.held = append(c.held, p[:ok]...)
		whole := len(c.held) - c.frame.open()
		c.ready, c.held = c.held[:whole:whole], c.held[whole:]
	}
	n := copy(p, c.ready)
	if c.ready = c.ready[n:]; len(c.ready) == 0 && len(c.held) == 0 {
		c.ready, c.held = nil, nil
	}
	return n, nil
}

// extend lets the client take its time for a body as long as it sends.
func (c *httpConn) extend() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.aborted {
		_ = c.Conn.SetReadDeadline(time.Now().Add(c.gate.limits.stall))
	}
}

func (c *httpConn) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.aborted {
		_ = c.Conn.SetReadDeadline(time.Time{})
	}
}

// begin starts the clock for the first request with its first byte: helpers in
// the guest open connections ahead of need.
func (c *httpConn) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.begun && !c.aborted {
		_ = c.Conn.SetReadDeadline(time.Now().Add(c.gate.limits.head))
	}
	c.begun = true
}

// SetReadDeadline notes when net/http interrupts a Read by a deadline in the
// past, so that extend does not undo it.
func (c *httpConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.aborted = !t.IsZero() && t.Before(now)
	if !c.begun && !c.aborted {
		t = now.Add(c.gate.limits.keepAlive)
		if c.back && c.tunnel == nil { // the sidecar opens none ahead of need
			t = now.Add(c.gate.limits.head)
		}
	}
	return c.Conn.SetReadDeadline(t)
}

// Write gives up on a client that does not take what it asked for.
func (c *httpConn) Write(p []byte) (int, error) {
	_ = c.Conn.SetWriteDeadline(time.Now().Add(c.gate.limits.stall))
	return c.Conn.Write(p)
}

// refuse ends a connection whose bytes cannot be trusted any more. Between
// requests the client is told; net/http, which would answer in its own words,
// is given an end of file.
func (c *httpConn) refuse() error {
	bad := c.bad.Load()
	if !c.between.CompareAndSwap(true, false) {
		return bad
	}
	switch {
	case c.tunnel != nil:
		c.gate.deny(bad, c.gate.newEvent(audit.KindRequest, c.tunnel.host, c.tunnel.port))
	case c.back:
		c.gate.denyStranger(bad)
	default:
		c.gate.deny(bad, c.gate.newEvent(audit.KindRequest, bad.Host, 0))
	}
	_, _ = c.Write(bad.raw())
	lingerClose(c.Conn)
	return io.EOF
}

// drain takes what a client still sends of a body after the last answer of the
// connection: many look for an answer only once all is sent, and a reset could
// take it from them.
func (c *httpConn) drain() {
	buf := make([]byte, 8<<10)
	for until := time.Now().Add(c.gate.limits.handshake); time.Now().Before(until); {
		c.mu.Lock()
		c.aborted = true // the transport may be reading the body, too, and would extend
		_ = c.Conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		c.mu.Unlock()
		if _, err := c.Conn.Read(buf); err != nil {
			return
		}
	}
}

// lingerClose ends the writing side first: closing at once with bytes unread
// would reset the connection and take the answer with it.
func lingerClose(c net.Conn) {
	if closeWrite(c) != nil {
		return
	}
	_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	_, _ = io.CopyN(io.Discard, c, 256<<10)
}

// closeWrite ends the writing side, or all of c where there is no such thing.
func closeWrite(c net.Conn) error {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return c.Close()
}

// queue is a listener for the connections that are inside tunnels.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newQueue() *queue {
	return &queue{conns: make(chan net.Conn), done: make(chan struct{})}
}

// put hands c over; a closed queue closes it.
func (q *queue) put(c net.Conn) {
	select {
	case q.conns <- c:
	case <-q.done:
		c.Close()
	}
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

func (q *queue) Addr() net.Addr { return &net.UnixAddr{Name: "tunnel", Net: "unix"} }

// entry is the listener for the guest's connections: it bounds their number.
type entry struct {
	net.Listener
	gate *Gate
	back bool
}

func (l *entry) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		g := &guestConn{Conn: c, gate: l.gate, back: l.back}
		if l.gate.remember(g) {
			h := l.gate.newHTTPConn(g, nil)
			h.back = l.back
			return h, nil
		}
		l.gate.tooMany(c, l.back)
	}
}
