package gate

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/plan"
)

// patience bounds hanging alone: what it is for takes milliseconds on a machine
// that is not busy.
const patience = time.Minute

// eventually waits until cond holds.
func eventually(cond func() bool) bool {
	for began := time.Now(); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > patience {
			return false
		}
	}
	return true
}

const secretValue = "sk-real-0123456789/abc+def"

// origins is a certificate authority of the outside world.
type origins struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

var world = sync.OnceValue(func() *origins {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "world"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		panic(err)
	}
	cert, _ := x509.ParseCertificate(der)
	return &origins{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
})

func (o *origins) leaf(hosts ...string) tls.Certificate {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	t := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, o.cert, key.Public(), o.key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// origin is a server on loopback; its log tells what reached it.
type origin struct {
	*httptest.Server
	port  int
	conns atomic.Int64
	mu    sync.Mutex
	seen  []string // "METHOD host path"
	sni   []string
}

func (o *origin) log() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.seen)
}

func startOrigin(t testing.TB, useTLS bool, h http.Handler, hosts ...string) *origin {
	t.Helper()
	o := &origin{}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.mu.Lock()
		o.seen = append(o.seen, r.Method+" "+r.Host+" "+r.RequestURI)
		o.mu.Unlock()
		h.ServeHTTP(w, r)
	}))
	s.Config.ConnState = func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			o.conns.Add(1)
		}
	}
	s.Config.ErrorLog = nil
	s.Config.ErrorLog = quiet
	if useTLS {
		cert := world().leaf(hosts...)
		s.TLS = &tls.Config{GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			o.mu.Lock()
			o.sni = append(o.sni, h.ServerName)
			o.mu.Unlock()
			return &cert, nil
		}}
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	o.Server = s
	o.port = s.Listener.Addr().(*net.TCPAddr).Port
	return o
}

// echo answers with what it got.
var echo = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"method": r.Method, "host": r.Host, "path": r.RequestURI, "headers": r.Header, "body": string(b)})
})

type echoed struct {
	Method, Host, Path, Body string
	Headers                  http.Header
}

func allowHost(host, protocol string, ports ...int) plan.Rule {
	class := "exact"
	if strings.HasPrefix(host, "*.") {
		class = "wildcard"
	}
	return plan.Rule{Host: host, Ports: ports, Protocol: protocol, Verdict: "allow", Class: class, From: "bottle.json:1:1 " + host}
}

func pin(r plan.Rule, addresses ...string) plan.Rule {
	r.Addresses = addresses
	return r
}

func inspect(r plan.Rule) plan.Rule {
	r.Inspect = true
	return r
}

// unscreened lets requests pass that nobody has looked through.
func unscreened(r plan.Rule) plan.Rule {
	r.DLPAllow, r.DLPAllowFrom = []string{"*"}, "bottle.json:1:1 dlp"
	return r
}

type rig struct {
	t     testing.TB
	gate  *Gate
	ca    *ca.Authority
	sock  string
	log   string
	audit *audit.Log
	done  chan error
}

// start runs a gate on a Unix socket. edit may change its configuration.
func start(t testing.TB, rules []plan.Rule, secrets []plan.Secret, edit func(*Config)) *rig {
	t.Helper()
	g := &rig{t: t, log: filepath.Join(t.TempDir(), "audit.jsonl"), sock: filepath.Join(t.TempDir(), "g"), done: make(chan error, 1)}
	b := &plan.Bottle{ID: "t", Egress: plan.Policy{Rules: rules}, Secrets: secrets}
	var err error
	if g.audit, err = audit.Open(g.log, audit.Options{Bottle: "t-01234567"}); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Bottle: b, Audit: g.audit, RootsPEM: [][]byte{world().pem}, Secrets: map[string]string{"KEY": secretValue}}
	if hosts := InspectedHosts(b); len(hosts) > 0 {
		if g.ca, err = ca.New("t-01234567", hosts, time.Now(), time.Hour); err != nil {
			t.Fatal(err)
		}
		cfg.CA = g.ca
	}
	if edit != nil {
		edit(&cfg)
	}
	if g.gate, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", g.sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { g.done <- g.gate.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-g.done:
		case <-time.After(patience):
			t.Error("the gate does not end")
		}
		g.audit.Close()
	})
	return g
}

func (g *rig) dial() net.Conn {
	g.t.Helper()
	c, err := net.Dial("unix", g.sock)
	if err != nil {
		g.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	g.t.Cleanup(func() { c.Close() })
	return c
}

// connect asks for a tunnel and returns the answer's status and the connection.
func (g *rig) connect(target string) (int, *refusalBody, net.Conn) {
	g.t.Helper()
	c := g.dial()
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target)
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, &http.Request{Method: "CONNECT"})
	if err != nil {
		g.t.Fatalf("CONNECT %s: %v", target, err)
	}
	if resp.StatusCode == 200 {
		return 200, nil, &buffered{c.(*net.UnixConn), br}
	}
	return resp.StatusCode, decode(g.t, resp), c
}

// buffered reads what came with the answer first.
type buffered struct {
	*net.UnixConn
	r io.Reader
}

func (b *buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

type refusalBody struct {
	Error struct {
		Code, Host, Reason, Hint string
		Port                     int
	}
}

func decode(t testing.TB, resp *http.Response) *refusalBody {
	t.Helper()
	b, _ := io.ReadAll(resp.Body)
	var r refusalBody
	if err := json.Unmarshal(b, &r); err != nil || resp.Header.Get("Content-Type") != "application/json" || resp.Header.Get("X-Bottle-Decision") == "" {
		t.Fatalf("%s %v %q: %v", resp.Status, resp.Header, b, err)
	}
	return &r
}

// client is an HTTP client that goes through the gate and trusts what a guest
// trusts.
func (g *rig) client() *http.Client {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(world().pem)
	if g.ca != nil {
		pool.AppendCertsFromPEM(g.ca.CertPEM())
	}
	tr := &http.Transport{
		Proxy:           http.ProxyURL(&url.URL{Scheme: "http", Host: "gate:3128"}),
		DialContext:     func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", g.sock) },
		TLSClientConfig: &tls.Config{RootCAs: pool}, DisableCompression: true,
	}
	g.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func (g *rig) get(url string) (*http.Response, []byte) {
	g.t.Helper()
	c := g.client()
	defer c.CloseIdleConnections()
	resp, err := c.Get(url)
	if err != nil {
		g.t.Fatalf("GET %s: %v", url, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		g.t.Fatalf("GET %s: %v", url, err)
	}
	return resp, b
}

func (g *rig) events() []audit.Event {
	g.t.Helper()
	return readEvents(g.t, g.log)
}

// await waits for a line of the log, since it may be written after the answer.
func (g *rig) await(what string, match func(audit.Event) bool) audit.Event {
	g.t.Helper()
	var found audit.Event
	if !eventually(func() bool {
		events := g.events()
		i := slices.IndexFunc(events, match)
		if i >= 0 {
			found = events[i]
		}
		return i >= 0
	}) {
		g.t.Fatalf("no line %s in\n%v", what, g.events())
	}
	return found
}

func hostPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

func TestPassThrough(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test", "x.wild.test")
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1")}, nil, nil)
	for _, host := range []string{"api.test", "API.Test"} {
		resp, b := g.get("https://" + hostPort(host, o.port) + "/a?b=c")
		var e echoed
		if json.Unmarshal(b, &e); resp.StatusCode != 200 || e.Path != "/a?b=c" {
			t.Fatalf("%s %s", resp.Status, b)
		}
	}
	e := g.await("close", func(e audit.Event) bool { return e.Event == audit.KindClose })
	if e.BytesIn == 0 || e.BytesOut == 0 || e.Address != hostPort("127.0.0.1", o.port) || e.SNI == "" {
		t.Errorf("%+v", e)
	}
	first := g.events()[1]
	if first.Event != "connect" || first.Verdict != "allow" || *first.Rule != 0 || first.From == "" || first.Protocol != "tls" {
		t.Errorf("%+v", first)
	}
}

func TestDeniedIsNeverResolved(t *testing.T) {
	r := &fakeDNS{answers: map[string][][]netip.Addr{}}
	g := start(t, []plan.Rule{allowHost("ok.test", "tls", 443), allowHost("*.wild.test", "tls", 443), allowHost("http.test", "http", 80)}, nil,
		func(c *Config) { c.Resolver = r })
	for _, target := range []string{
		"denied.test:443", "c2VjcmV0.denied.test:443", "evilok.test:443", "ok.test.evil.test:443", "wild.test:443",
		"ok.test:22", "ok.test:8443", "DENIED.TEST.:443", "203.0.113.5:443", "3405803781:443", "0xcb007105:443", "203.0.113.5.:443",
		"0313.0.113.5:443", "[::1]:443", "[::ffff:127.0.0.1]:443", "localhost:443", "169.254.169.254:443", "[fe80::1%25eth0]:443",
		"127.1:443", "ok.test.:22", "ok..test:443", "*.wild.test:443", "xn--ok-.test:443",
	} {
		status, f, _ := g.connect(target)
		if status != 403 || f.Error.Code == "" || f.Error.Reason == "" {
			t.Errorf("%s: %d %+v", target, status, f)
		}
	}
	for _, url := range []string{"http://denied.test/", "http://ok.test/", "http://ok.test:443/", "http://http.test:8080/", "http://2130706433/"} {
		resp, b := g.get(url)
		if resp.StatusCode != 403 || resp.Header.Get("X-Bottle-Decision") != "deny" {
			t.Errorf("%s: %s %s", url, resp.Status, b)
		}
	}
	if len(r.asked) > 0 {
		t.Errorf("asked the name server for %v", r.asked)
	}
	for _, e := range g.events()[1:] {
		if e.Verdict != "deny" || e.Code == "" || e.Status != 403 {
			t.Errorf("%+v", e)
		}
	}
	if s := g.gate.Stats(); s.Denied != 28 || s.Allowed != 0 {
		t.Errorf("%+v", s)
	}
}

func TestRefusalTellsHowToAllow(t *testing.T) {
	g := start(t, []plan.Rule{allowHost("ok.test", "tls", 443)}, nil, nil)
	_, f, _ := g.connect("other.test:8443")
	if e := f.Error; e.Host != "other.test" || e.Port != 8443 || e.Code != "not_in_allowlist" || !strings.Contains(e.Hint, `{ "host": "other.test", "ports": [8443] }`) {
		t.Errorf("%+v", f)
	}
}

// fakeDNS answers each question with the next of its answers, the last one for
// ever.
type fakeDNS struct {
	mu      sync.Mutex
	answers map[string][][]netip.Addr
	err     error
	asked   []string
}

func (r *fakeDNS) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = append(r.asked, host)
	if r.err != nil {
		return nil, r.err
	}
	a := r.answers[host]
	if len(a) == 0 {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	if len(a) > 1 {
		r.answers[host] = a[1:]
	}
	return slices.Clone(a[0]), nil
}

func ips(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func TestAddresses(t *testing.T) {
	const public = "93.184.216.34"
	for _, c := range []struct {
		name    string
		answers [][]netip.Addr
		status  int
		code    string
		dialled []string
	}{
		{"public", [][]netip.Addr{ips(public)}, 200, "", []string{public}},
		{"loopback", [][]netip.Addr{ips("127.0.0.1")}, 403, "address_not_allowed", nil},
		{"v6 loopback", [][]netip.Addr{ips("::1")}, 403, "address_not_allowed", nil},
		{"v4-mapped loopback", [][]netip.Addr{ips("::ffff:127.0.0.1")}, 403, "address_not_allowed", nil},
		{"NAT64 of metadata", [][]netip.Addr{ips("64:ff9b::a9fe:a9fe")}, 403, "address_not_allowed", nil},
		{"6to4 of private", [][]netip.Addr{ips("2002:0a01:0203::1")}, 403, "address_not_allowed", nil},
		{"metadata", [][]netip.Addr{ips("169.254.169.254")}, 403, "address_not_allowed", nil},
		{"private", [][]netip.Addr{ips("10.1.2.3")}, 403, "address_not_allowed", nil},
		{"unspecified", [][]netip.Addr{ips("0.0.0.0")}, 403, "address_not_allowed", nil},
		{"own", [][]netip.Addr{ips("198.51.100.7")}, 403, "address_not_allowed", nil},
		{"one bad of several", [][]netip.Addr{ips(public, "10.0.0.1")}, 403, "address_not_allowed", nil},
		{"good A and loopback AAAA", [][]netip.Addr{ips(public, "::1")}, 403, "address_not_allowed", nil},
		{"rebinding between check and dial", [][]netip.Addr{ips(public), ips("127.0.0.1")}, 200, "", []string{public}},
		{"no such name", nil, 403, "upstream_unresolvable", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dns := &fakeDNS{answers: map[string][][]netip.Addr{"w.test.": c.answers}}
			var mu sync.Mutex
			var dialled []string
			g := start(t, []plan.Rule{allowHost("w.test", "tcp", 443)}, nil, func(cfg *Config) {
				cfg.Resolver = dns
				cfg.Interfaces = func() ([]netip.Addr, error) { return ips("198.51.100.7"), nil }
				cfg.Dial = func(_ context.Context, _, address string) (net.Conn, error) {
					mu.Lock()
					defer mu.Unlock()
					host, _, _ := net.SplitHostPort(address)
					dialled = append(dialled, host)
					a, b := net.Pipe()
					t.Cleanup(func() { b.Close() })
					return pipeConn{a}, nil
				}
			})
			status, f, _ := g.connect("w.test:443")
			if status != c.status || f != nil && f.Error.Code != c.code {
				t.Errorf("%d %+v", status, f)
			}
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(dialled, c.dialled) || len(dns.asked) != 1 {
				t.Errorf("dialled %v, asked %v", dialled, dns.asked)
			}
		})
	}
}

type pipeConn struct{ net.Conn }

func (pipeConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(1, 2, 3, 4), Port: 5} }

// A decision is a 4xx; only a failing network is a 5xx.
func TestUpstreamFailures(t *testing.T) {
	closed, _ := net.Listen("tcp", "127.0.0.1:0")
	port := closed.Addr().(*net.TCPAddr).Port
	closed.Close()
	g := start(t, []plan.Rule{pin(allowHost("down.test", "tls", port), "127.0.0.1"), pin(allowHost("down.http", "http", port), "127.0.0.1")}, nil, nil)
	if status, f, _ := g.connect(hostPort("down.test", port)); status != 502 || f.Error.Code != "upstream_unreachable" {
		t.Errorf("%d %+v", status, f)
	}
	resp, b := g.get("http://" + hostPort("down.http", port))
	if resp.StatusCode != 502 || resp.Header.Get("X-Bottle-Decision") != "error" || !bytes.Contains(b, []byte("upstream_unreachable")) {
		t.Errorf("%s %s", resp.Status, b)
	}
	for _, e := range g.events() {
		if e.Verdict == "deny" {
			t.Errorf("a failure is written down as a decision: %+v", e)
		}
	}
	for _, c := range []struct {
		err    error
		status int
		code   string
	}{
		{&net.DNSError{Err: "server misbehaving", IsTemporary: true}, 502, "upstream_dns_failed"},
		{&net.DNSError{Err: "i/o timeout", IsTimeout: true}, 504, "upstream_timeout"},
	} {
		g := start(t, []plan.Rule{allowHost("w.test", "tls", 443)}, nil, func(cfg *Config) { cfg.Resolver = &fakeDNS{err: c.err} })
		if status, f, _ := g.connect("w.test:443"); status != c.status || f.Error.Code != c.code {
			t.Errorf("%v: %d %+v", c.err, status, f)
		}
	}
}

func TestHappyEyeballs(t *testing.T) {
	l := defaultLimits
	l.dial = 10 * patience // nobody waits for the black hole
	g := start(t, []plan.Rule{allowHost("w.test", "tcp", 443)}, nil, func(cfg *Config) {
		cfg.limits = &l
		cfg.Resolver = &fakeDNS{answers: map[string][][]netip.Addr{"w.test.": {ips("2606:4700::1", "93.184.216.34", "93.184.216.35")}}}
		cfg.Dial = func(ctx context.Context, _, address string) (net.Conn, error) {
			switch address {
			case "[2606:4700::1]:443": // a black hole
				<-ctx.Done()
				return nil, ctx.Err()
			case "93.184.216.34:443":
				return nil, errors.New("connection refused")
			}
			a, b := net.Pipe()
			t.Cleanup(func() { b.Close() })
			return pipeConn{a}, nil
		}
	})
	if status, f, _ := g.connect("w.test:443"); status != 200 {
		t.Errorf("%d %+v", status, f)
	}
}

// safeBuffer takes remarks of several goroutines.
type safeBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
