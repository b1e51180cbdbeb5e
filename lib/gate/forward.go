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
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/elazarl/goproxy"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/policy"
)

// forwarder is goproxy for single requests, with every default replaced that is
// meant for trying things out: its transport skips verification and reads proxy
// variables, and it would intercept CONNECT with a CA whose key is public.
func (g *Gate) forwarder() *goproxy.ProxyHttpServer {
	p := goproxy.NewProxyHttpServer()
	p.Tr = g.direct
	p.ConnectDial = nil
	p.KeepAcceptEncoding = true
	p.Logger = log.New(io.Discard, "", 0)
	p.NonproxyHandler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		badRequest("not a proxy request").write(w, true)
	})
	p.OnRequest().HandleConnect(goproxy.AlwaysReject) // CONNECT never gets here
	p.OnRequest().DoFunc(func(r *http.Request, ctx *goproxy.ProxyCtx) (*http.Request, *http.Response) {
		x, ok := r.Context().Value(exchangeKey{}).(*exchange)
		if !ok {
			return r, badRequest("not a proxy request").response(r)
		}
		ctx.RoundTripper = x
		return r, nil
	})
	return p
}

// transports make the connections for single requests. TLS is verified against
// the gate's roots, from 1.2, HTTP/1.1 alone; nothing is decoded, no redirect is
// followed (a Transport never does), no proxy variable is read.
func (g *Gate) transports(roots *x509.CertPool) (direct, proxied *http.Transport) {
	direct = &http.Transport{
		DialContext:            g.dialHost,
		TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}},
		TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{},
		TLSHandshakeTimeout:    g.limits.handshake,
		ResponseHeaderTimeout:  g.limits.answer,
		ExpectContinueTimeout:  time.Second,
		IdleConnTimeout:        time.Minute,
		MaxIdleConns:           128,
		MaxIdleConnsPerHost:    16,
		MaxResponseHeaderBytes: 64 << 10, // as of a request: a guest may let a thousand of them wait
		DisableCompression:     true,
	}
	proxied = direct.Clone()
	proxied.DialContext = g.dialProxy
	proxied.Proxy = http.ProxyURL(&url.URL{Scheme: "http", Host: g.cfg.Upstream})
	return direct, proxied
}

// dialHost connects for the transport, which knows only the address: the rule is
// looked up again.
func (g *Gate) dialHost(ctx context.Context, _, address string) (net.Conn, error) {
	host, portText, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(portText)
	if err != nil {
		return nil, err
	}
	d := g.rules().Decide(host, port)
	if !d.Allow {
		return nil, denied(d, host, port)
	}
	f, why := g.follow(context.Background(), host, port, d.Rule)
	if why != nil {
		return nil, why
	}
	c, dialled, err := g.reach(ctx, host, port, d.Rule)
	if err == nil && dialled != "" {
		if err = f.dialled(c); err != nil {
			c.Close()
		}
	}
	if err != nil {
		f.end()
		return nil, err
	}
	f.onCut(func() { c.Close() })
	return &followed{c, f}, nil
}

// inspected tells if the gate terminates TLS for a tunnel. Where a secret goes
// is the plan's alone to say: a rule that was added later takes none there.
func (g *Gate) inspected(t *tunnel) bool {
	return !t.Live && policy.Inspected(t.Rule, t.host, g.cfg.Bottle.Secrets)
}

// exchange is one request and its answer.
type exchange struct {
	gate     *Gate
	flow     *flow
	event    *audit.Event
	host     string
	port     int
	tr       *http.Transport
	injector *injector // nil if no secret goes in
	flush    func()    // towards the guest
	guest    net.Conn  // the connection that it came from
	sent     *counted
	body     *body
	over     atomic.Bool
}

type exchangeKey struct{}

// request answers a request that is no CONNECT: absolute-form on the guest's own
// connection, origin-form inside a tunnel.
func (g *Gate) request(w http.ResponseWriter, r *http.Request, t *tunnel) {
	began := time.Now()
	e := g.newEvent(audit.KindRequest, "", 0)
	e.Method, e.Path = r.Method, r.URL.EscapedPath()
	var f *Refusal
	back := connOf(r).back
	if back {
		e.Sender = g.cfg.Sidecar.Name
	}
	if t == nil {
		t, f = g.target(r)
	} else {
		f = matchTunnel(r, t)
	}
	if bad := shapeOf(r); bad != nil {
		f = bad
	}
	if t != nil {
		e.Host, e.Port = t.host, t.port
	}
	if f == nil {
		f = g.decide(r, t, &e)
	}
	if f != nil {
		if f.Host == "" {
			f.Host, f.Port = e.Host, e.Port
		}
		g.deny(f, e)
		// A body that was announced is not worth reading, and what follows a
		// CONNECT is no request.
		f.write(w, r.ContentLength != 0 || r.Method == http.MethodConnect)
		return
	}
	fl, f := g.follow(r.Context(), t.host, t.port, t.Rule)
	if f != nil {
		g.deny(f, e)
		f.write(w, r.ContentLength != 0)
		return
	}
	defer fl.end()
	r = r.WithContext(fl.ctx)
	x := &exchange{gate: g, flow: fl, event: &e, host: t.host, port: t.port, tr: g.direct, guest: connOf(r).Conn}
	var replaced map[string]bool
	if t.scheme == "https" {
		x.injector = g.inject[t.host]
	} else if g.leavesByProxy(t.Rule) {
		x.tr = g.proxied
	}
	if x.injector != nil {
		f, replaced = x.injector.check(t.host, t.port), x.injector.remove
	}
	if t.scheme == "https" && g.aside != nil && !back {
		// To the sidecar, which gives it back: secrets go in behind it.
		x.tr, x.injector, e.Via = g.aside, nil, g.cfg.Sidecar.Name
	}
	if f == nil {
		f = g.misplaced(r, t, replaced)
	}
	if f != nil {
		g.deny(f, e)
		f.write(w, r.ContentLength != 0)
		return
	}
	if f := g.screenRequest(r, t, &e); f != nil {
		g.deny(f, e)
		f.write(w, r.ContentLength != 0)
		return
	}
	if b, ok := r.Body.(*heldBody); ok {
		defer b.Close() // whatever becomes of the request
	}
	r = x.prepare(r, t)
	if !g.allow(e) {
		auditFailed(t.host, t.port).write(w, true)
		return
	}
	// goproxy flushes event streams only, and not before the first event.
	rc := http.NewResponseController(w)
	x.flush = func() { _ = rc.Flush() }
	// An origin may answer while it still reads; without this net/http would
	// cut the rest of the request's body off.
	_ = rc.EnableFullDuplex()
	defer x.end(began)
	fl.onCut(x.cutGuest(connOf(r)))
	g.forward.ServeHTTP(w, r)
	if x.sent != nil && !x.sent.ended.Load() {
		x.flush()
		connOf(r).drain()
	}
}

// cutGuest ends the guest's connection where the exchange was cut and does not
// end by itself: the guest may have stopped to read.
func (x *exchange) cutGuest(c *httpConn) func() {
	return func() {
		time.AfterFunc(time.Second, func() {
			if !x.over.Load() {
				c.Close()
			}
		})
	}
}

// shapeOf refuses what no rule could allow.
func shapeOf(r *http.Request) *Refusal {
	switch {
	case strings.EqualFold(r.Method, http.MethodConnect):
		return refused("method_refused", "", 0, "CONNECT inside a tunnel is refused", "")
	case strings.EqualFold(r.Method, http.MethodTrace) || strings.EqualFold(r.Method, "TRACK"):
		// The answer would hold the request's headers, the injected one too. Some
		// servers take methods in any case.
		return refused("method_refused", "", 0, r.Method+" is refused", "use another method")
	case r.Header.Get("Upgrade") != "" || r.Header.Get("Http2-Settings") != "":
		return refused("upgrade_refused", "", 0, "changing the protocol of a connection is refused where the gate reads requests",
			"use plain requests; WebSocket works over TLS to hosts that are not inspected")
	}
	return nil
}

// target takes the host from an absolute-form request. Host and target were
// compared on the wire.
func (g *Gate) target(r *http.Request) (*tunnel, *Refusal) {
	u := r.URL
	switch {
	case u.Scheme == "https":
		return nil, &Refusal{Status: http.StatusBadRequest, Code: "bad_request",
			Reason: "https in a plain request is refused", Hint: "use CONNECT: the client speaks TLS with the host itself"}
	case u.Scheme != "http" || u.Host == "" || u.Opaque != "":
		return nil, &Refusal{Status: http.StatusBadRequest, Code: "bad_request",
			Reason: "this is a proxy, and takes CONNECT and requests for http:// addresses",
			Hint:   "set HTTP_PROXY and HTTPS_PROXY instead of connecting to it"}
	case u.User != nil:
		return nil, badRequest("a user name in the address is refused")
	}
	host, portText, ok := cutPort(u.Host)
	if !ok {
		return nil, badRequest("the host of the address is malformed")
	}
	port := 80
	if portText != "" {
		port, _ = strconv.Atoi(portText)
	}
	return &tunnel{host: canonical(host), port: port, scheme: "http"}, nil
}

// matchTunnel holds a request inside a tunnel against the tunnel: another Host
// would be served by whoever shares the address (fronting).
func matchTunnel(r *http.Request, t *tunnel) *Refusal {
	if !strings.HasPrefix(r.RequestURI, "/") {
		return badRequest("inside a tunnel a request begins with a path")
	}
	standard := map[string]string{"https": "443", "http": "80"}[t.scheme]
	if !sameAuthority(r.Host, net.JoinHostPort(t.host, strconv.Itoa(t.port)), standard) {
		return refused("host_mismatch", t.host, t.port, "the Host header names another host than the tunnel was opened for",
			"open a tunnel for that host")
	}
	return nil
}

// decide asks the rules, for each request anew.
func (g *Gate) decide(r *http.Request, t *tunnel, e *audit.Event) *Refusal {
	protocol := map[string]string{"http": "http", "https": "tls"}[t.scheme]
	d := g.rules().DecideAs(t.host, t.port, protocol)
	describe(e, d)
	if !d.Allow {
		return denied(d, t.host, t.port)
	}
	if d.Rule.Protocol != protocol {
		return refused("wrong_protocol", t.host, t.port, "the rule for this host and port is about "+d.Rule.Protocol+", not plain HTTP",
			map[bool]string{true: "use https", false: `say "protocol": "http" in its entry if it should be`}[d.Rule.Protocol == "tls"])
	}
	t.Decision = d
	if f := overriddenHost(r, t); f != nil {
		return f
	}
	f := t.limit(r)
	if f != nil {
		e.From = t.Rule.RequestsFrom
	}
	return f
}

// prepare makes the request that leaves from the one that came.
func (x *exchange) prepare(r *http.Request, t *tunnel) *http.Request {
	r = r.WithContext(context.WithValue(r.Context(), exchangeKey{}, x))
	u := *r.URL
	u.Scheme, u.Host = t.scheme, t.authority()
	r.URL, r.Host = &u, t.authority()
	r.Trailer = nil // could repeat a header that was taken out of the head
	dropHopByHop(r.Header)
	if r.Header.Get("User-Agent") == "" {
		r.Header["User-Agent"] = []string{""} // or the transport sends its own
	}
	if x.injector != nil {
		x.event.Secret = strings.Join(x.injector.apply(r.Header), ",")
		// Each of these would hide a reflected secret from the masker.
		r.Header.Set("Accept-Encoding", "identity")
		for _, name := range partial {
			r.Header.Del(name)
		}
	}
	if r.Body != nil && r.Body != http.NoBody {
		x.sent = &counted{ReadCloser: r.Body}
		r.Body = x.sent
	}
	return r
}

// partial ask for a part of an answer, or for one in another form: ranges, also
// as Apache takes them of old browsers, and instance manipulations (RFC 3229).
var partial = []string{"Range", "If-Range", "Request-Range", "A-Im"}

// hopByHop are about one connection, RFC 9110 section 7.6.1; Alt-Svc offers ways
// that no guest has.
var hopByHop = []string{"Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization",
	"Proxy-Authentication-Info", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Alt-Svc"}

func dropHopByHop(h http.Header) {
	for _, line := range h["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			h.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range hopByHop {
		delete(h, name)
	}
}

// RoundTrip is goproxy's way to the origin. It returns an answer in any case.
func (x *exchange) RoundTrip(r *http.Request, _ *goproxy.ProxyCtx) (*http.Response, error) {
	resp := x.answer(r)
	if x.sent != nil && !x.sent.ended.Load() {
		// An answer before the end of the request's body. net/http may take the
		// rest of that body for the next request (in full duplex it interrupts
		// the transport's Read, and goes on from there), so there is none.
		resp.Header.Set("Connection", "close")
	}
	return resp, nil
}

func (x *exchange) answer(r *http.Request) *http.Response {
	resp, err := x.tr.RoundTrip(r)
	if err == nil {
		err = x.check(resp)
	}
	if err != nil {
		return x.refuse(r, err)
	}
	dropHopByHop(resp.Header)
	if x.tr != x.gate.aside {
		resp.Header.Del("X-Bottle-Decision") // the gate's word alone
	}
	if _, ok := resp.Header["Content-Type"]; !ok {
		resp.Header["Content-Type"] = nil // or net/http guesses one
	}
	x.body = &body{ReadCloser: resp.Body, resp: resp, flush: x.flush, guest: x.guest}
	if x.injector != nil {
		// The names of trailers are announced in the head.
		names := x.injector.mask.maskHeader(resp.Trailer)
		x.body.masked = x.injector.mask.maskHeader(resp.Header) || names
		x.body.mask = newMaskReader(resp.Body, x.injector.mask)
	}
	resp.Body = x.body
	x.event.Status = resp.StatusCode
	return resp
}

// check refuses answers that cannot be passed on.
func (x *exchange) check(resp *http.Response) error {
	var f *Refusal
	encoding := strings.Join(resp.Header.Values("Content-Encoding"), ",")
	switch {
	case resp.StatusCode == http.StatusSwitchingProtocols:
		f = refused("upgrade_refused", x.host, x.port, "the host changed the protocol unasked", "")
	case resp.StatusCode < 200: // 0 to 99, which net/http reads and does not write
		f = failed("upstream_failed", x.host, x.port, "the host answered with a status that does not exist")
	case x.injector != nil && encoding != "" && !strings.EqualFold(encoding, "identity"):
		f = refused("response_encoded", x.host, x.port,
			"the host compresses although it was asked not to, so that a reflected secret could not be found", "ask for another resource")
	case x.tr == x.gate.proxied && x.fromProxy(resp):
		return proxyRefusal(resp, x.host, x.port)
	default:
		return nil
	}
	resp.Body.Close()
	return f
}

// proxyWords are how pipelock (v2.3) begins its own answers to plain requests;
// nothing else about them differs from an origin's.
var proxyWords = []string{"blocked: ", "forward proxy fetch failed"}

// fromProxy tells pipelock's own refusals from an origin's answers.
func (x *exchange) fromProxy(resp *http.Response) bool {
	if resp.StatusCode < 400 || !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain") {
		return false
	}
	peek := &peeked{ReadCloser: resp.Body, head: make([]byte, 32)}
	n, _ := io.ReadFull(resp.Body, peek.head)
	peek.head = peek.head[:n]
	resp.Body = peek
	return slices.ContainsFunc(proxyWords, func(w string) bool { return strings.HasPrefix(string(peek.head), w) })
}

// peeked gives back what was read to look at it.
type peeked struct {
	io.ReadCloser
	head []byte
}

func (p *peeked) Read(b []byte) (int, error) {
	if len(p.head) == 0 {
		return p.ReadCloser.Read(b)
	}
	n := copy(b, p.head)
	p.head = p.head[n:]
	return n, nil
}

// refuse turns a failed round trip into an answer.
func (x *exchange) refuse(r *http.Request, err error) *http.Response {
	f := asRefusal(err, x.host, x.port)
	var untrusted *tls.CertificateVerificationError
	bad := connOf(r).bad.Load() // in the request's body, so that net/http has ended its context
	why := x.flow.cut()
	switch {
	case why != nil:
		f = asRefusal(why, x.host, x.port)
	case bad != nil:
		f = asRefusal(bad, x.host, x.port)
	case errors.As(err, &untrusted) && x.tr == x.gate.aside:
		f = x.gate.cfg.Sidecar.down()
		f.Host, f.Port, f.Code = x.host, x.port, "sidecar_untrusted"
		f.Reason = "what listens in the place of " + x.event.Via + " is something else: " + untrusted.Err.Error()
	case errors.As(err, &untrusted):
		f = refused("upstream_untrusted", x.host, x.port, "the host's certificate is not trusted: "+untrusted.Err.Error(),
			`add the authority's PEM file to egress.roots in the manifest if it is yours`)
	case r.Context().Err() != nil:
		f = failed("client_gone", x.host, x.port, "the client went away")
	case x.injector != nil && f.Code == "upstream_failed" && !errors.As(err, new(*net.OpError)):
		// A parser quotes what it could not read.
		f.Reason = "the host's answer is no valid HTTP, or ends early; it is not quoted, since it could hold the secret"
	}
	if x.injector != nil {
		// Errors quote what a host chose, as the names in its certificate.
		f.Reason = x.injector.mask.masked(f.Reason)
	}
	x.event.Status, x.event.Code, x.event.Reason = f.Status, f.Code, f.Reason
	if f.Status < 500 {
		x.gate.deny(f, *x.event)
	}
	resp := f.response(r)
	if bad != nil {
		resp.Header.Set("Connection", "close")
	}
	return resp
}

func (x *exchange) end(began time.Time) {
	x.over.Store(true)
	if x.sent != nil {
		x.event.BytesOut = x.sent.n.Load()
	}
	if x.body != nil {
		x.event.BytesIn = x.body.n
		if x.body.masked {
			x.event.Code = "secret_reflected"
			x.event.Reason = "the answer held the secret, which was masked"
		}
	}
	revoked(x.event, x.flow)
	x.gate.end(*x.event, began)
}

// counted counts a request's body.
type counted struct {
	io.ReadCloser
	n     atomic.Int64 // the transport may still be sending when the answer is complete
	ended atomic.Bool
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	if err == io.EOF {
		c.ended.Store(true)
	}
	return n, err
}

// body is an answer's body on its way to the guest.
type body struct {
	io.ReadCloser
	resp   *http.Response
	mask   *maskReader // nil: nothing to look for
	masked bool
	flush  func()
	guest  net.Conn // where it goes
	n      int64
}

func (b *body) Read(p []byte) (n int, err error) {
	if b.mask == nil {
		n, err = b.ReadCloser.Read(p)
	} else {
		n, err = b.mask.Read(p)
		b.masked = b.masked || b.mask.found
	}
	b.n += int64(n)
	if err == io.EOF && b.mask != nil {
		b.masked = b.mask.scan.maskHeader(b.resp.Trailer) || b.masked
	}
	return n, err
}

// WriteTo passes every piece on as it comes, which event streams need, and
// breaks the connection if the origin breaks off: an end in order would make
// half an answer look whole.
func (b *body) WriteTo(w io.Writer) (total int64, err error) {
	if b.resp.ContentLength < 0 {
		b.flush() // the head, while the first event may be far off
	}
	small := buffers.Get().(*[64 << 10]byte)
	defer buffers.Put(small)
	buf, tried := small[:], false
	for {
		n, rerr := b.Read(buf)
		if n > 0 {
			m, werr := w.Write(buf[:n])
			total += int64(m)
			if werr != nil {
				return total, werr
			}
			b.flush()
			if total >= bulkAfter && !tried {
				tried = true
				if large, done := bulk(b.guest); large != nil {
					defer done()
					buf = large
				}
			}
		}
		switch {
		case rerr == io.EOF:
			return total, nil
		case rerr != nil:
			panic(http.ErrAbortHandler)
		}
	}
}
