// Package gate is a bottle's one way out: an HTTP proxy on the host that serves
// one guest over a socket of its own, denies by default, checks what it lets
// through, and writes down every decision before a byte flows.
//
// A client asks by CONNECT, or by absolute-form HTTP for rules of protocol
// http. For each protocol of a rule (docs/manifest.md, egress) the gate holds:
//
//	tls   the tunnel begins with a TLS ClientHello whose server name is the
//	      host asked for; end to end from there on, unless the host is
//	      inspected: then the gate terminates TLS with the bottle's own CA
//	http  plain requests whose Host is the host asked for
//	ssh   the tunnel begins as SSH does, in both directions
//	tcp   anything
//
// A name is matched before it is resolved, resolved once, every address of the
// answer is checked, and a checked address is dialled.
//
// Every refusal is an HTTP answer with the JSON body
//
//	{"error":{"code","host","port","reason","hint"}}
//
// and a header X-Bottle-Decision: deny, or error where the network failed.
package gate

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/elazarl/goproxy"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// DefaultMaxConns bounds the guest's connections at one time.
const DefaultMaxConns = 1024

// Config is all that a gate needs. Bottle, Audit and RootsPEM are required; CA
// is if InspectedHosts finds any.
type Config struct {
	Bottle *plan.Bottle
	// Secrets are the values of Bottle.Secrets by name. A name that is missing
	// refuses the requests that need it, and no others.
	Secrets map[string]string
	CA      *ca.Authority
	// RootsPEM are what upstreams are verified against: the host's bundle and
	// the plan's roots.
	RootsPEM [][]byte
	Audit    *audit.Log
	// Upstream is the host:port of pipelock, through which the rules leave that
	// it carries (pipelock.Carries); "" dials directly.
	Upstream string
	// OnShut is told why the gate is shut, and nil when it is open again; it may
	// be nil itself.
	OnShut func(why error)
	// Sidecar reads the requests of inspected hosts; nil: nothing does.
	Sidecar  *Sidecar
	MaxConns int       // 0: DefaultMaxConns
	Log      io.Writer // remarks for people; nil: none

	// For tests and odd hosts; nil is the host's own.
	Resolver   Resolver
	Dial       func(ctx context.Context, network, address string) (net.Conn, error)
	Interfaces func() ([]netip.Addr, error)
	limits     *limits
}

// Resolver looks up the addresses of a fully qualified name (with its final
// dot). *net.Resolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// limits of time, and how often they are looked at.
type limits struct {
	head      time.Duration // a request's head, from its first byte
	keepAlive time.Duration // between two requests
	rejects   time.Duration // how soon after a handshake a hang-up is about the certificate
	handshake time.Duration // a ClientHello, an SSH banner, a TLS handshake
	stall     time.Duration // a body that does not move
	answer    time.Duration // an origin that thinks about its answer
	tunnel    time.Duration // a tunnel in which nothing moves
	halfOpen  time.Duration // the same, once one side has ended
	resolve   time.Duration
	dial      time.Duration
}

var defaultLimits = limits{
	head: 15 * time.Second, keepAlive: 5 * time.Minute, rejects: 2 * time.Second, handshake: 10 * time.Second, stall: 2 * time.Minute,
	answer: 15 * time.Minute, tunnel: time.Hour, halfOpen: 10 * time.Minute,
	resolve: 10 * time.Second, dial: 15 * time.Second,
}

// Gate serves one bottle. Make it with New, run it with Serve.
type Gate struct {
	cfg     Config
	limits  limits
	matcher *policy.Matcher // the plan's rules; rules() is what holds
	current atomic.Pointer[ruleset]
	flows   flowList
	clock   func() live.Instant
	inject  map[string]*injector // by host
	holders []placeholder
	screen  *screener
	tls     *tls.Config // towards the guest
	forward *goproxy.ProxyHttpServer
	direct  *http.Transport // dials itself
	proxied *http.Transport // plain HTTP through Upstream
	aside   *http.Transport // inspected requests through Sidecar; nil without one
	server  *http.Server
	inner   *queue
	local   localAddrs
	start   time.Time
	ids     atomic.Uint64
	stats   counters
	lookups lookups
	// strangers are those who connect in the sidecar's place, by code.
	strangers lookups

	started  chan struct{}
	changing sync.Mutex  // held while the rules change
	ending   *time.Timer // for the next end of a rule

	// turnedAway bounds the connections that were answered before they were
	// read, and are given the time to see it.
	turnedAway chan struct{}

	mu     sync.Mutex
	conns  map[*guestConn]struct{}
	backs  int // of conns, those of the sidecar
	closed bool
	shut   error // why the audit log cannot be written at present
	failed error // why it never will
	busy   sync.WaitGroup
}

type counters struct {
	tunnels, allowed, denied, in, out atomic.Int64
}

// Stats are counts since New; Conns and Tunnels are of now.
type Stats struct {
	Conns    int   `json:"conns"`
	Tunnels  int64 `json:"tunnels"`
	Allowed  int64 `json:"allowed"` // decisions; a failing network is none
	Denied   int64 `json:"denied"`
	BytesIn  int64 `json:"bytes_in"` // into the bottle, of ended tunnels and requests
	BytesOut int64 `json:"bytes_out"`
}

// New checks cfg and makes a gate. Nothing is opened or dialled. It turns the
// standard logger off: net/http quotes what a host sends unasked there (net/http
// transport.go, "Unsolicited response"), and that may hold a secret.
func New(cfg Config) (*Gate, error) {
	log.SetOutput(io.Discard)
	matcher, err := policy.Compile(cfg.Bottle.Egress.Rules)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool() // verifies nothing: nothing is inspected
	if len(InspectedHosts(cfg.Bottle)) > 0 {
		if roots, err = rootPool(cfg.RootsPEM); err != nil {
			return nil, err
		}
	}
	g := &Gate{cfg: cfg, limits: defaultLimits, matcher: matcher, inner: newQueue(), clock: live.Now, started: make(chan struct{}),
		turnedAway: make(chan struct{}, 64), conns: make(map[*guestConn]struct{}), flows: flowList{list: make(map[*flow]struct{})}, start: time.Now()}
	none, err := g.newRuleset(nil, false)
	if err != nil {
		return nil, err
	}
	g.current.Store(none)
	if g.inject, err = injectors(cfg.Bottle.Secrets, cfg.Secrets); err != nil {
		return nil, err
	}
	g.holders = placeholders(cfg.Bottle)
	for _, h := range InspectedHosts(cfg.Bottle) {
		if cfg.CA == nil || !cfg.CA.Covers(h) && !cfg.CA.Covers("x"+h[1:]) {
			return nil, fault.New(fault.Bug, "gate_without_ca", "%s is inspected and the gate's CA does not cover it", h)
		}
	}
	g.screen = newScreener(cfg.Secrets)
	g.defaults()
	g.tls = g.guestTLS()
	g.direct, g.proxied = g.transports(roots)
	if cfg.Sidecar != nil {
		if g.aside, err = g.sidecarTransport(); err != nil {
			return nil, err
		}
	}
	g.forward = g.forwarder()
	g.server = &http.Server{
		Handler:           g,
		ReadHeaderTimeout: g.limits.head,
		IdleTimeout:       g.limits.keepAlive,
		MaxHeaderBytes:    2 * maxHead, // framing is the tighter one
		// OPTIONS * would be answered without asking the gate.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     log.New(g.cfg.Log, "gate: ", 0),
		ConnState:                    connState,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	return g, nil
}

func (g *Gate) defaults() {
	if g.cfg.MaxConns == 0 {
		g.cfg.MaxConns = DefaultMaxConns
	}
	if g.cfg.limits != nil {
		g.limits = *g.cfg.limits
	}
	if g.cfg.Log == nil {
		g.cfg.Log = io.Discard
	}
	if g.cfg.OnShut == nil {
		g.cfg.OnShut = func(error) {}
	}
	if g.cfg.Resolver == nil {
		g.cfg.Resolver = net.DefaultResolver
	}
	if g.cfg.Dial == nil {
		g.cfg.Dial = (&net.Dialer{KeepAlive: time.Minute}).DialContext
	}
	g.local.read = g.cfg.Interfaces
	if g.local.read == nil {
		g.local.read = pipelock.HostAddrs
	}
}

func rootPool(pems [][]byte) (*x509.CertPool, error) {
	pool, any := x509.NewCertPool(), false
	for _, p := range pems {
		any = pool.AppendCertsFromPEM(p) || any
	}
	if !any {
		return nil, fault.New(fault.Host, "no_system_roots", "the gate has no trusted roots to verify upstreams with").
			WithHint("install the package ca-certificates, or set SSL_CERT_FILE")
	}
	return pool, nil
}

type connKey struct{}

func connOf(r *http.Request) *httpConn {
	c, _ := r.Context().Value(connKey{}).(*httpConn)
	return c
}

// connState tells httpConn when it may answer on its own.
func connState(c net.Conn, s http.ConnState) {
	if h, ok := c.(*httpConn); ok {
		h.between.Store(s == http.StateNew || s == http.StateIdle)
	}
}

// Serve answers the guest's connections on l until ctx ends, Close is called, l
// fails, or the audit log is lost, which is the fault it returns then (a log
// that cannot be written for a while shuts the gate as long). It closes l. A
// gate serves once.
func (g *Gate) Serve(ctx context.Context, l net.Listener) error {
	g.cfg.Audit.OnFailure(g.logFailed)
	if err := g.cfg.Audit.Start(); err != nil {
		l.Close()
		g.Close()
		return err
	}
	close(g.started)
	stop := context.AfterFunc(ctx, func() { g.Close() })
	defer stop()
	go func() { _ = g.server.Serve(g.inner) }()
	if s := g.cfg.Sidecar; s != nil {
		go func() { _ = g.server.Serve(&entry{s.Back, g, true}) }()
	}
	err := g.server.Serve(&entry{l, g, false})
	g.Close()
	g.settle()
	g.endLookups()

	g.mu.Lock()
	failed := g.failed
	g.mu.Unlock()
	switch {
	case failed != nil:
		return failed
	case !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) && ctx.Err() == nil:
		return fault.New(fault.IO, "gate_socket_failed", "the gate's socket: %w", err)
	}
	return g.cfg.Audit.Write(audit.Event{Event: audit.KindStop})
}

// Started is closed when Serve has written the log's first line. Rules that
// change have their place behind it.
func (g *Gate) Started() <-chan struct{} { return g.started }

// Close ends the gate at once: listener, connections and tunnels.
func (g *Gate) Close() error {
	g.mu.Lock()
	g.closed = true
	conns := make([]*guestConn, 0, len(g.conns))
	for c := range g.conns {
		conns = append(conns, c)
	}
	g.mu.Unlock()
	err := g.server.Close()
	g.inner.Close()
	for _, c := range conns {
		c.Close()
	}
	g.direct.CloseIdleConnections()
	g.proxied.CloseIdleConnections()
	if g.aside != nil {
		g.aside.CloseIdleConnections()
	}
	g.changing.Lock()
	if g.ending != nil {
		g.ending.Stop()
	}
	g.changing.Unlock()
	return err
}

// begin counts a request in; it is false once the gate is closed.
func (g *Gate) begin() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.busy.Add(1)
	return true
}

// settle lets what was cut write its last lines.
func (g *Gate) settle() {
	done := make(chan struct{})
	go func() {
		g.busy.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
	}
}

// Stats may be called at any time.
func (g *Gate) Stats() Stats {
	g.mu.Lock()
	n := len(g.conns)
	g.mu.Unlock()
	return Stats{Conns: n, Tunnels: g.stats.tunnels.Load(), Allowed: g.stats.allowed.Load(),
		Denied: g.stats.denied.Load(), BytesIn: g.stats.in.Load(), BytesOut: g.stats.out.Load()}
}

// remember takes a connection up unless there are too many.
func (g *Gate) remember(c *guestConn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	// Each side has its own bound: the guest's requests wait for the sidecar's.
	n := len(g.conns) - g.backs
	if c.back {
		n = g.backs
	}
	if g.closed || n >= g.cfg.MaxConns {
		return false
	}
	g.conns[c] = struct{}{}
	if c.back {
		g.backs++
	}
	return true
}

func (g *Gate) forget(c *guestConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, c)
	if c.back {
		g.backs--
	}
}

// tooMany answers without reading, and without waiting for the client.
func (g *Gate) tooMany(c net.Conn, back bool) {
	f := &Refusal{Status: http.StatusServiceUnavailable, Code: "too_many_connections", Retry: 1,
		Reason: "the bottle has too many connections open", Hint: "close some; try again"}
	if back {
		g.denyStranger(f)
	} else {
		g.deny(f, g.newEvent(audit.KindConnect, "", 0))
	}
	_ = c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := c.Write(f.raw()); err != nil {
		c.Close()
		return
	}
	select {
	case g.turnedAway <- struct{}{}:
		go func() {
			lingerClose(c)
			c.Close()
			<-g.turnedAway
		}()
	default:
		c.Close()
	}
}

// newEvent begins a decision's line.
func (g *Gate) newEvent(kind, host string, port int) audit.Event {
	return audit.Event{Event: kind, ID: g.ids.Add(1), Host: host, Port: port}
}

// allow writes a decision down. Only if it returns true may a byte flow.
func (g *Gate) allow(e audit.Event) bool {
	e.Verdict = audit.Allow
	g.stats.allowed.Add(1)
	return g.write(e)
}

// deny writes down what the gate answered itself: a decision, or that the
// network failed before an allowed byte could flow.
func (g *Gate) deny(f *Refusal, e audit.Event) {
	e.Verdict, e.Code, e.Reason, e.Status = f.decision(), f.Code, f.Reason, f.Status
	if e.Verdict == audit.Deny {
		g.stats.denied.Add(1)
	}
	g.write(e)
}

// end writes the line that closes an allowed tunnel or request.
func (g *Gate) end(e audit.Event, began time.Time) {
	e.Event, e.Verdict, e.DurationMS = audit.KindClose, "", time.Since(began).Milliseconds()
	g.stats.in.Add(e.BytesIn)
	g.stats.out.Add(e.BytesOut)
	g.write(e)
}

// write fails closed: without its log the gate is shut.
func (g *Gate) write(e audit.Event) bool {
	err := g.cfg.Audit.Write(e)
	if err != nil {
		g.logFailed(err)
	}
	return err == nil
}
