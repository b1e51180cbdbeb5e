package probe

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	connLimit = 30 * time.Second
	keepData  = 256 << 10
	maxConns  = 256
)

// canary is a set of servers that answer everything and write it down.
type canary struct {
	prefix string // before the name of a server: "host-" on the host's own network
	zone   *zone
	ca     *authority
	saw    func(event)
	conns  atomic.Uint64
	slots  chan struct{}
	http2  *http.Server
	queue  chan net.Conn
	done   chan struct{}
	mu     sync.Mutex
	open   map[net.Conn]bool
}

func newCanary(prefix string, z *zone, ca *authority, saw func(event)) *canary {
	c := &canary{prefix: prefix, zone: z, ca: ca, saw: saw, slots: make(chan struct{}, maxConns),
		queue: make(chan net.Conn), done: make(chan struct{}), open: map[net.Conn]bool{}}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	c.http2 = &http.Server{
		Handler: http.HandlerFunc(c.serveHTTP2), Protocols: protocols, TLSConfig: &tls.Config{NextProtos: []string{"h2", "http/1.1"}},
		ReadHeaderTimeout: connLimit, IdleTimeout: connLimit,
		ConnContext: func(ctx context.Context, nc net.Conn) context.Context { return context.WithValue(ctx, connKey{}, nc) },
		ErrorLog:    discardLog,
	}
	go func() { _ = c.http2.Serve((*queued)(c)) }()
	return c
}

// connKey is the connection of a request.
type connKey struct{}

// queued is canary as the listener of its HTTP/2 server.
type queued canary

func (q *queued) Accept() (net.Conn, error) {
	select {
	case c := <-q.queue:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}
func (q *queued) Close() error   { return nil }
func (q *queued) Addr() net.Addr { return &net.TCPAddr{} }

// listen serves ports on every address of this network.
func (c *canary) listen(host string, ports []int) error {
	for _, port := range ports {
		l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err != nil {
			return err
		}
		c.serve(l, "tcp")
	}
	return nil
}

// serve takes the connections of l as what server says.
func (c *canary) serve(l net.Listener, server string) {
	go func() {
		for {
			nc, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				time.Sleep(50 * time.Millisecond)
				continue
			}
			select {
			case c.slots <- struct{}{}:
				go func() {
					defer func() { <-c.slots }()
					c.mu.Lock()
					c.open[nc] = true
					c.mu.Unlock()
					c.handle(nc, server)
					c.mu.Lock()
					delete(c.open, nc)
					c.mu.Unlock()
				}()
			default:
				nc.Close()
			}
		}
	}()
}

// hangUp ends all connections: a proxy that keeps some would not look a name up
// anew.
func (c *canary) hangUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for nc := range c.open {
		nc.Close()
	}
}

// handle finds out what a client speaks: TLS, HTTP/2 without it, or something
// that is answered like HTTP/1.
func (c *canary) handle(nc net.Conn, server string) {
	e := event{Server: c.prefix + server, Conn: c.conns.Add(1), Dst: nc.LocalAddr().String()}
	c.report(e) // that it was reached at all
	_ = nc.SetDeadline(time.Now().Add(connLimit))
	port := 0
	if a, ok := nc.LocalAddr().(*net.TCPAddr); ok {
		port = a.Port
	}
	switch {
	case port == 53:
		c.zone.serveTCP(nc, func(e event) { e.Server = c.prefix + e.Server; c.report(e) })
		return
	case port == 22:
		_, _ = io.WriteString(nc, "SSH-2.0-canary\r\n")
	}
	p := &peeking{Conn: nc}
	first, err := p.peek(1)
	if err == nil && first[0] == 0x16 {
		c.tls(p, e)
		return
	}
	if first, _ = p.peek(len(preface)); bytes.Equal(first, []byte(preface)) {
		c.report(event{Server: c.prefix + "http2", Conn: e.Conn, Dst: e.Dst, Data: first})
		c.give(&tagged{Conn: p, e: e})
		return
	}
	c.stream(p, e)
}

const preface = "PRI * HTTP/2.0\r\n"

func (c *canary) give(nc net.Conn) {
	select {
	case c.queue <- nc:
	case <-c.done:
		nc.Close()
	}
}

func (c *canary) report(e event) {
	e.At = time.Now()
	c.saw(e)
}

// peeking is a connection of which the first bytes can be looked at.
type peeking struct {
	net.Conn
	ahead []byte
}

// peek waits until n bytes are there, or the client has said all it will.
func (p *peeking) peek(n int) ([]byte, error) {
	for len(p.ahead) < n {
		buf := make([]byte, 512)
		if len(p.ahead) > 0 {
			_ = p.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		}
		m, err := p.Conn.Read(buf)
		_ = p.SetReadDeadline(time.Now().Add(connLimit))
		p.ahead = append(p.ahead, buf[:m]...)
		if err != nil {
			return p.ahead, err
		}
		if len(p.ahead) < n && !strings.HasPrefix(preface, string(p.ahead)) {
			return p.ahead, nil
		}
	}
	return p.ahead[:n], nil
}

func (p *peeking) Read(b []byte) (int, error) {
	if len(p.ahead) > 0 {
		n := copy(b, p.ahead)
		p.ahead = p.ahead[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// tagged is a connection with what is known of it.
type tagged struct {
	net.Conn
	e event
}

// recording keeps the first bytes that a client sent.
type recording struct {
	net.Conn
	mu   sync.Mutex
	data []byte
}

func (r *recording) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	r.mu.Lock()
	r.data = append(r.data, b[:min(n, max(0, 4096-len(r.data)))]...)
	r.mu.Unlock()
	return n, err
}

func (r *recording) head() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.data)
}

// tls notes the hello, even one that leads to nothing, and then what is inside.
func (c *canary) tls(nc net.Conn, e event) {
	rec := &recording{Conn: nc}
	var sni string
	var protos []string
	conf := c.ca.config(e.Dst, func(h *tls.ClientHelloInfo) { sni, protos = h.ServerName, h.SupportedProtos })
	tc := tls.Server(rec, conf)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := tc.HandshakeContext(ctx)
	hello := e
	hello.Server, hello.SNI, hello.Data = c.prefix+"hello", sni, rec.head()
	hello.ALPN = strings.Join(protos, ",")
	c.report(hello)
	if err != nil {
		nc.Close()
		return
	}
	e.Server, e.SNI, e.ALPN = c.prefix+"tls", tc.ConnectionState().ServerName, tc.ConnectionState().NegotiatedProtocol
	if e.ALPN == "h2" {
		h2.Store(tc, e)
		c.give(tc)
		return
	}
	c.stream(tc, e)
}

// h2 has what is known of connections that net/http serves, which wants them as
// *tls.Conn.
var h2 sync.Map

func (c *canary) serveHTTP2(w http.ResponseWriter, r *http.Request) {
	var e event
	switch nc := r.Context().Value(connKey{}).(type) {
	case *tls.Conn:
		if v, ok := h2.Load(nc); ok {
			e = v.(event)
		}
	case *tagged:
		e = nc.e
	}
	body, _ := io.ReadAll(io.LimitReader(r.Body, keepData))
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s %s\r\n", r.Method, r.RequestURI, r.Proto)
	_ = r.Header.Write(&b)
	e.Server, e.Host, e.Data = c.prefix+"http2", r.Host, append(b.Bytes(), body...)
	c.report(e)
	_, _ = io.WriteString(w, "canary\n")
}

// stream answers every message that looks like a request, and keeps what came.
func (c *canary) stream(nc net.Conn, e event) {
	defer nc.Close()
	var data []byte
	answered := 0
	upgraded := false
	buf := make([]byte, 8<<10)
	for {
		_ = nc.SetReadDeadline(time.Now().Add(connLimit))
		n, err := nc.Read(buf)
		if n > 0 {
			data = append(data, buf[:min(n, max(0, keepData-len(data)))]...)
			e.Data = slices.Clone(data)
			c.report(e)
		}
		if err != nil {
			return
		}
		if upgraded {
			continue
		}
		for heads := requestHeads(data); answered < len(heads); answered++ {
			answer := respond(heads[answered])
			if strings.HasPrefix(answer, "HTTP/1.1 101") {
				upgraded = true
			}
			if _, err := io.WriteString(nc, answer); err != nil {
				return
			}
		}
	}
}

// respond is the answer to one head: an upgrade where one is asked for, a
// redirect where the path wants it.
func respond(head string) string {
	lower := strings.ToLower(head)
	if strings.Contains(lower, "\nupgrade: websocket") {
		return "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
	}
	if _, to, ok := strings.Cut(head, "/redirect?"); ok {
		to, _, _ = strings.Cut(to, " ")
		return "HTTP/1.1 302 Found\r\nLocation: " + to + "\r\nContent-Length: 0\r\n\r\n"
	}
	if strings.HasPrefix(head, "CONNECT ") {
		return "HTTP/1.1 200 OK\r\n\r\n"
	}
	return "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 7\r\n\r\ncanary\n"
}
