package gate

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/policy"
)

// tunnel is what a CONNECT asked for and got.
type tunnel struct {
	host   string // canonical
	port   int
	scheme string // of the requests inside: https or http
	policy.Decision
	flow   *flow       // of the whole tunnel; nil for what is one request
	opened audit.Event // the line about a tunnel that is terminated
	back   bool        // asked for by the sidecar
}

// authority is host[:port] as a Host header has it.
func (t *tunnel) authority() string {
	if t.scheme == "https" && t.port == 443 || t.scheme == "http" && t.port == 80 {
		return bracket(t.host)
	}
	return net.JoinHostPort(t.host, strconv.Itoa(t.port))
}

func bracket(host string) string {
	if strings.Contains(host, ":") {
		return "[" + host + "]"
	}
	return host
}

const established = "HTTP/1.1 200 Connection established\r\n\r\n"

// ServeHTTP answers a request: CONNECT here, everything else through goproxy.
//
// CONNECT is taken over by hand. goproxy's ConnectHijack hands on the bare
// connection and drops what net/http has read ahead of it, which is the
// ClientHello of a client that does not wait.
func (g *Gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !g.begin() {
		panic(http.ErrAbortHandler)
	}
	defer g.busy.Done()
	c := connOf(r)
	if g.isShut() {
		auditFailed("", 0).write(w, true)
		return
	}
	if r.Method == http.MethodConnect && c.tunnel == nil {
		g.connect(w, r)
		return
	}
	if c.tunnel == nil && c.back {
		// Whoever asks for no tunnel has not said who it is.
		f := refused("not_inspected", "", 0, g.cfg.Sidecar.Name+" is for inspected hosts, by CONNECT", "")
		g.denyStranger(f)
		f.write(w, true)
		return
	}
	if c.tunnel == nil && isLookup(r) {
		g.lookupName(w, r)
		return
	}
	g.request(w, r, c.tunnel)
}

func (g *Gate) connect(w http.ResponseWriter, r *http.Request) {
	host, portText, ok := cutPort(r.RequestURI)
	port, _ := strconv.Atoi(portText)
	host = canonical(host)
	e := g.newEvent(audit.KindConnect, host, port)
	back := connOf(r).back
	if back {
		e.Sender = g.cfg.Sidecar.Name
		if f := g.cfg.Sidecar.known(r); f != nil {
			g.denyStranger(f)
			f.write(w, true)
			return
		}
	}
	if !ok || port == 0 {
		f := badRequest("CONNECT takes host:port")
		f.Host, f.Hint = host, "name the port, such as 443"
		g.deny(f, e)
		f.write(w, true)
		return
	}
	d := g.rules().Decide(host, port)
	describe(&e, d)
	if !d.Allow {
		f := denied(d, host, port)
		g.deny(f, e)
		f.write(w, true)
		return
	}
	t := &tunnel{host: host, port: port, Decision: d, back: back}
	if back && !g.inspected(t) {
		f := refused("not_inspected", host, port, host+" is not an inspected host, and "+e.Sender+" is for no other", "name it in egress.inspect")
		g.deny(f, e)
		f.write(w, true)
		return
	}
	ctx := context.Background() // a tunnel that is terminated outlives this request
	switch {
	case d.Rule.Protocol == "http":
		t.scheme = "http"
	case g.inspected(t):
		t.scheme = "https"
	default:
		ctx = r.Context()
	}
	if f := g.screenName(r.Context(), t, &e); f != nil {
		g.deny(f, e)
		f.write(w, true)
		return
	}
	var f *Refusal
	if t.flow, f = g.follow(ctx, host, port, d.Rule); f != nil {
		g.deny(f, e)
		f.write(w, true)
		return
	}
	if t.scheme != "" {
		g.terminate(w, t, e)
		return
	}
	defer t.flow.end()
	g.pass(w, t, e)
}

// describe notes which rule decided.
func describe(e *audit.Event, d policy.Decision) {
	e.Code, e.Reason = d.Code, d.Reason
	if d.Rule != nil {
		e.From = d.Rule.From
		if !d.Live { // an index into the plan's rules
			e.Rule = &d.Index
		}
		if d.Allow {
			e.Protocol, e.Reason = d.Rule.Protocol, ""
		}
	}
}

// hijack takes the guest's connection from net/http and says 200. It returns
// the connection and the bytes that were read ahead.
func hijack(w http.ResponseWriter) (*guestConn, []byte, error) {
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, err
	}
	h := c.(*httpConn)
	guest := h.Conn.(*guestConn)
	ahead := make([]byte, rw.Reader.Buffered())
	// These bytes are in the buffer: reading them cannot fail.
	_, _ = io.ReadFull(rw.Reader, ahead)
	ahead = append(ahead, h.ready...)
	_ = guest.SetDeadline(time.Time{})
	if _, err := guest.Write([]byte(established)); err != nil {
		guest.Close()
		return nil, nil, err
	}
	return guest, ahead, nil
}

// pass connects the guest with the host, end to end. The host is dialled before
// the guest gets its 200, so that a failure can still be told in HTTP.
func (g *Gate) pass(w http.ResponseWriter, t *tunnel, e audit.Event) {
	began := time.Now()
	up, address, err := g.reach(t.flow.ctx, t.host, t.port, t.Rule)
	if err == nil && address != "" {
		if err = t.flow.dialled(up); err != nil {
			up.Close()
		}
	}
	if err != nil {
		f := asRefusal(err, t.host, t.port)
		if why := t.flow.cut(); why != nil {
			f = why
		}
		g.deny(f, e)
		f.write(w, true)
		return
	}
	defer up.Close()
	g.stats.tunnels.Add(1)
	defer g.stats.tunnels.Add(-1)
	e.Address = address
	if g.leavesByProxy(t.Rule) {
		e.Via = "proxy"
	}
	if t.Rule.Protocol != "tls" && !g.allow(e) {
		auditFailed(t.host, t.port).write(w, true)
		return
	}
	guest, ahead, err := hijack(w)
	if err != nil {
		g.end(e, began)
		return
	}
	defer guest.Close()
	t.flow.onCut(func() {
		up.Close()
		guest.Close()
	})
	from := replay(guest, ahead)
	var open opening
	switch t.Rule.Protocol {
	case "ssh":
		open = openSSH()
	case "tls":
		raw, ok := g.acceptHello(from, t, &e)
		if !ok {
			return
		}
		if !g.allow(e) {
			_, _ = guest.Write(alert(alertAccessDenied))
			return
		}
		open = openTLS(raw, t)
	}
	guest.relayed.Store(true)
	var broken error
	e.BytesOut, e.BytesIn, broken = relay(from, up, open, g.limits)
	var f *Refusal
	if errors.As(broken, &f) {
		f.Host, f.Port = t.host, t.port
		g.deny(f, e)
		e.Code = f.Code
	}
	revoked(&e, t.flow)
	g.end(e, began)
}

// replayed is the guest's connection with what net/http had read of it already.
type replayed struct {
	*guestConn
	ahead []byte
}

func replay(c *guestConn, ahead []byte) *replayed { return &replayed{c, ahead} }

func (c *replayed) Read(p []byte) (int, error) {
	if len(c.ahead) == 0 {
		return c.guestConn.Read(p)
	}
	n := copy(p, c.ahead)
	c.ahead = c.ahead[n:]
	return n, nil
}

// acceptHello reads the guest's ClientHello and holds it against the tunnel. A
// refusal is an alert to the guest, since it has its 200 already, and a line of
// the log.
func (g *Gate) acceptHello(c *replayed, t *tunnel, e *audit.Event) (raw []byte, ok bool) {
	_ = c.SetReadDeadline(time.Now().Add(g.limits.handshake))
	raw, h, err := readHello(c, false)
	_ = c.SetReadDeadline(time.Time{})
	e.SNI = h.sni
	if err == nil {
		err = checkHello(h, t.host)
	}
	if err == nil {
		return raw, true
	}
	f := helloRefusal(err, t)
	if why := t.flow.cut(); why != nil {
		f = why
	}
	g.deny(f, *e)
	_, _ = c.Write(alert(alertAccessDenied))
	lingerClose(c)
	return nil, false
}

// checkHello: a host name needs itself as server name, an address needs none
// (RFC 6066 allows only names), and nothing may be hidden in an encrypted hello.
func checkHello(h hello, host string) error {
	_, notIP := netip.ParseAddr(host)
	switch {
	case h.ech:
		return &helloError{"ech_refused", "the client encrypts its server name (ECH), so that it cannot be checked"}
	case notIP == nil && h.hasSNI:
		return &helloError{"sni_mismatch", "the client asked for an address and names a server in its TLS handshake"}
	case notIP != nil && !h.hasSNI:
		return &helloError{"sni_missing", "the client names no server in its TLS handshake"}
	case notIP != nil && canonical(h.sni) != host:
		return &helloError{"sni_mismatch", "the client names another server in its TLS handshake than it asked for"}
	}
	return nil
}

func helloRefusal(err error, t *tunnel) *Refusal {
	var bad *helloError
	if errors.As(err, &bad) {
		hint := ""
		if bad.code == "not_tls" {
			hint = `if the host speaks no TLS on this port, say so in the manifest: "protocol": "tcp"`
		}
		return refused(bad.code, t.host, t.port, bad.reason, hint)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return refused("no_client_hello", t.host, t.port, "the client did not finish its ClientHello in time", "")
	}
	return refused("no_client_hello", t.host, t.port, "the client went away before its TLS handshake", "")
}

// terminate serves the requests inside a tunnel: those of an http rule, and
// those of an inspected host below TLS with the bottle's own certificate.
func (g *Gate) terminate(w http.ResponseWriter, t *tunnel, e audit.Event) {
	if t.scheme == "http" && !g.allow(e) {
		t.flow.end()
		auditFailed(t.host, t.port).write(w, true)
		return
	}
	if t.scheme == "https" {
		// While it can still be told in HTTP.
		if _, err := g.cfg.CA.Leaf(t.host); err != nil {
			f := fault.As(err)
			bad := refused(f.Code, t.host, t.port, f.Msg, f.Hint)
			t.flow.end()
			g.deny(bad, e)
			bad.write(w, true)
			return
		}
	}
	guest, ahead, err := hijack(w)
	if err != nil {
		t.flow.end()
		return
	}
	t.flow.onCut(func() { guest.Close() })
	from := replay(guest, ahead)
	if t.scheme == "http" {
		g.inner.put(g.newHTTPConn(from, t))
		return
	}
	raw, ok := g.acceptHello(from, t, &e)
	if !ok || !g.allow(e) {
		t.flow.end()
		guest.Close()
		return
	}
	from.ahead = append(raw, from.ahead...)
	t.opened = e
	began := time.Now()
	watch := &watched{replayed: from}
	c := tls.Server(watch, g.tls)
	ctx, cancel := context.WithTimeout(context.Background(), g.limits.handshake)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		f := g.handshakeRefusal(err, watch.alert, t)
		e.Code, e.Reason = f.Code, f.Reason
		revoked(&e, t.flow)
		g.end(e, began)
		t.flow.end()
		guest.Close()
		return
	}
	watch.over = true
	g.inner.put(g.newHTTPConn(c, t))
}

// guestTLS offers HTTP/1.1 only: requests are checked one by one, and HTTP/2
// would let one connection carry several authorities.
func (g *Gate) guestTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			return g.cfg.CA.Leaf(canonical(h.ServerName))
		},
	}
}
