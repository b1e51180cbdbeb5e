package gate

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/plan"
)

func added(r plan.Rule) live.Rule {
	r.From = "live allow by uid 7"
	return live.Rule{Rule: r, By: 7, Since: "2026-11-25T12:00:00Z"}
}

func denyRule(target string, ports ...int) live.Rule {
	r := plan.Rule{Host: target, Ports: append([]int{}, ports...), Protocol: "any", Verdict: "deny", Class: "exact", From: "live deny by uid 7"}
	switch {
	case strings.Contains(target, "/"):
		r.Host, r.CIDR, r.Class = "", target, "cidr"
		if p := netip.MustParsePrefix(target); p.Addr().IsLoopback() {
			r.Class = "private"
		}
	case strings.HasPrefix(target, "*."):
		r.Class = "wildcard"
	}
	return live.Rule{Rule: r, By: 7, Since: "2026-11-25T12:00:00Z"}
}

// apply gives the gate these rules, each as a change.
func (g *rig) apply(what string, rules ...live.Rule) live.Applied {
	g.t.Helper()
	u := live.Update{Rules: rules}
	for _, r := range rules {
		u.Changes = append(u.Changes, live.Change{What: what, Rule: r, By: r.By})
	}
	a, err := g.gate.Apply(u)
	if err != nil {
		g.t.Fatal(err)
	}
	return a
}

// isCut tells if a connection is over: not at its deadline, but ended.
func isCut(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	n, err := io.Copy(io.Discard, c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection is open, %d bytes came", n)
	}
}

// A host that is allowed while the gate runs is reached, end to end; taken back,
// its tunnels are closed. Both are lines of the log.
func TestLiveAllow(t *testing.T) {
	o := startOrigin(t, true, echo, "new.test")
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, []plan.Rule{pin(allowHost("old.test", "tls", o.port), "127.0.0.1")}, nil, nil)
	if status, f, _ := g.connect(hostPort("new.test", o.port)); status != 403 || f.Error.Code != "not_in_allowlist" {
		t.Fatalf("before: %d %+v", status, f)
	}
	tlsRule, raw := added(pin(allowHost("new.test", "tls", o.port), "127.0.0.1")), added(tcpRule("raw.test", port))
	g.apply(live.Added, tlsRule, raw)
	if l, f := g.lookup("new.test"); f != nil || len(l.Services) != 1 {
		t.Errorf("the guest's resolver: %v, %+v", l, f)
	}
	if resp, b := g.get("https://" + hostPort("new.test", o.port) + "/"); resp.StatusCode != 200 {
		t.Fatalf("%s %s", resp.Status, b)
	}
	_, _, tunnel := g.connect(hostPort("raw.test", port))
	fmt.Fprint(tunnel, "x")
	if _, err := io.ReadFull(tunnel, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	a, err := g.gate.Apply(live.Update{Seq: 3, Report: true, Rules: []live.Rule{tlsRule}, Changes: []live.Change{{What: live.Reverted, Rule: raw, By: 8}}})
	if err != nil || a.Seq != 3 || a.Cut != 1 || a.RulesSHA256 == a.LiveSHA256 || a.LiveSHA256 == "" {
		t.Errorf("%+v %v", a, err)
	}
	isCut(t, tunnel)
	if status, _, _ := g.connect(hostPort("raw.test", port)); status != 403 {
		t.Errorf("after: %d", status)
	}
	line := g.await("rule_reverted", func(e audit.Event) bool { return e.Code == "rule_reverted" })
	if line.Event != "change" || line.Verdict != "allow" || line.Host != "raw.test" || line.Port != port || *line.By != 8 {
		t.Errorf("%+v", line)
	}
	line = g.await("revoked", func(e audit.Event) bool { return e.Code == "revoked" })
	if line.Event != "close" || line.Host != "raw.test" || line.BytesOut != 1 || !strings.Contains(line.Reason, "not in the allowlist") {
		t.Errorf("%+v", line)
	}
	for _, e := range g.events() {
		if e.Host == "new.test" && e.Verdict == "allow" && (e.Rule != nil || e.From != "live allow by uid 7") {
			t.Errorf("an added rule is no rule of the plan: %+v", e)
		}
	}
}

// A live deny ends every kind of connection to its host, and no other.
func TestLiveDenyCuts(t *testing.T) {
	stream := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "begin")
		w.(http.Flusher).Flush()
		if r.URL.Path == "/stream" {
			<-r.Context().Done()
		}
	})
	secure, plain := startOrigin(t, true, stream, "e2e.test", "seen.test", "other.test"), startOrigin(t, false, stream)
	raw := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	silent := serveTCP(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	local := "127.0.0.1"
	g := start(t, []plan.Rule{
		pin(allowHost("e2e.test", "tls", secure.port), local), inspect(pin(allowHost("seen.test", "tls", secure.port), local)),
		pin(allowHost("other.test", "tls", secure.port), local), pin(allowHost("http.test", "http", plain.port, silent), local),
		tcpRule("raw.test", raw),
	}, nil, nil)
	open := func(c net.Conn, host, path string) net.Conn {
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, host)
		if b, err := io.ReadAll(io.LimitReader(c, 12)); string(b) != "HTTP/1.1 200" {
			t.Fatalf("%s: %q %v", host, b, err)
		}
		return c
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(world().pem)
	pool.AppendCertsFromPEM(g.ca.CertPEM())
	secured := func(host string) net.Conn {
		_, _, c := g.connect(hostPort(host, secure.port))
		return tls.Client(c, &tls.Config{ServerName: host, RootCAs: pool})
	}
	seen, web := hostPort("seen.test", secure.port), hostPort("http.test", plain.port)
	_, _, rawTunnel := g.connect(hostPort("raw.test", raw))
	_, _, webTunnel := g.connect(web)
	cut := map[string]net.Conn{
		"end to end":                      open(secured("e2e.test"), hostPort("e2e.test", secure.port), "/stream"),
		"inspected, streaming":            open(secured("seen.test"), seen, "/stream"),
		"inspected, idle between":         open(secured("seen.test"), seen, "/"),
		"plain, streaming":                open(g.dial(), web, "http://"+web+"/stream"),
		"a tunnel for plain HTTP":         open(webTunnel, web, "/stream"),
		"raw":                             rawTunnel,
		"plain, waiting for an answer":    nil,
		"a tunnel that has not begun TLS": nil,
	}
	waiting := g.dial()
	fmt.Fprintf(waiting, "GET http://%s/ HTTP/1.1\r\nHost: %[1]s\r\n\r\n", hostPort("http.test", silent))
	cut["plain, waiting for an answer"] = waiting
	_, _, begun := g.connect(hostPort("e2e.test", secure.port))
	cut["a tunnel that has not begun TLS"] = begun
	kept := open(secured("other.test"), hostPort("other.test", secure.port), "/stream")
	g.await("the waiting request", func(e audit.Event) bool { return e.Event == "request" && e.Port == silent })

	g.apply(live.Added, denyRule("e2e.test"), denyRule("seen.test"), denyRule("http.test"), denyRule("raw.test"))
	for name, c := range cut {
		t.Run(name, func(t *testing.T) {
			if name != "plain, waiting for an answer" {
				isCut(t, c)
				return
			}
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || resp.StatusCode != 403 || decode(t, resp).Error.Code != "denied_by_rule" {
				t.Errorf("%+v %v", resp, err)
			}
		})
	}
	for _, host := range []string{"e2e.test", "seen.test"} {
		if status, f, _ := g.connect(hostPort(host, secure.port)); status != 403 || f.Error.Code != "denied_by_rule" || !strings.Contains(f.Error.Hint, "bottle-egress revert") {
			t.Errorf("%s after: %d %+v", host, status, f)
		}
	}
	begin := bufio.NewReader(kept)
	for line := ""; line != "begin\r\n"; {
		var err error
		if line, err = begin.ReadString('\n'); err != nil {
			t.Fatalf("another host's connection: %v", err)
		}
	}
	kept.SetDeadline(time.Now().Add(100 * time.Millisecond))
	rest, err := io.ReadAll(begin)
	if !errors.Is(err, os.ErrDeadlineExceeded) || len(rest) > 0 {
		t.Errorf("another host's connection: %q %v", rest, err)
	}
	if !eventually(func() bool { return len(g.gate.flows.all()) <= 2 }) { // kept, and what serves it
		for _, f := range g.gate.flows.all() {
			t.Errorf("%s:%d is listed", f.host, f.port)
		}
	}
}

// A range that is denied closes what was dialled into it, idle connections of
// the gate's own included: the next request may not go over one.
func TestLiveDenyOfAddresses(t *testing.T) {
	o := startOrigin(t, false, echo)
	rule := pin(allowHost("http.test", "http", o.port), "127.0.0.1")
	raw := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, []plan.Rule{rule, tcpRule("raw.test", raw)}, nil, nil)
	g.get("http://" + hostPort("http.test", o.port) + "/")
	_, _, tunnel := g.connect(hostPort("raw.test", raw))
	if a := g.apply(live.Added, denyRule("127.0.0.0/8")); a.Cut != 2 {
		t.Errorf("%d were cut: the tunnel and the idle connection are two", a.Cut)
	}
	isCut(t, tunnel)
	resp, b := g.get("http://" + hostPort("http.test", o.port) + "/")
	if resp.StatusCode != 403 || !bytes.Contains(b, []byte("address_not_allowed")) || len(o.log()) != 1 {
		t.Errorf("%s %s %v", resp.Status, b, o.log())
	}
}

// A rule that was added never brings a secret to a port that the plan does not
// have, and is never inspected.
func TestLiveRuleGetsNoSecret(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	g := start(t, []plan.Rule{inspect(allowHost("api.test", "tls", 1))}, keySecret("api.test", "x-api-key"), nil)
	g.apply(live.Added, added(pin(allowHost("api.test", "tls", o.port), "127.0.0.1")))
	resp, b := g.get("https://" + hostPort("api.test", o.port) + "/")
	if resp.StatusCode != 200 || bytes.Contains(b, []byte(secretValue)) || resp.TLS.PeerCertificates[0].Issuer.CommonName != "world" {
		t.Errorf("%s %s, certificate of %s", resp.Status, b, resp.TLS.PeerCertificates[0].Issuer)
	}
	g.apply(live.Added, added(pin(allowHost("api.test", "http", o.port), "127.0.0.1")))
	if _, b := g.get("http://" + hostPort("api.test", o.port) + "/"); bytes.Contains(b, []byte(secretValue)) {
		t.Errorf("%s", b)
	}
}

// The end of a rule holds by itself, whatever the clock does, and cuts.
func TestLiveRuleEnds(t *testing.T) {
	raw := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, nil, nil, nil)
	ends := func(d time.Duration) live.Rule {
		r := added(tcpRule("raw.test", raw))
		r.Ends = live.Now().After(d)
		return r
	}
	for d := 200 * time.Millisecond; ; d *= 2 { // until this machine is fast enough to connect before its end
		g.apply(live.Added, ends(d))
		if status, _, tunnel := g.connect(hostPort("raw.test", raw)); status == 200 {
			isCut(t, tunnel)
			break
		}
		if d > patience {
			t.Fatal("it never begins")
		}
	}
	if status, _, _ := g.connect(hostPort("raw.test", raw)); status != 403 {
		t.Errorf("after its end: %d", status)
	}
	g.apply(live.Added, ends(-time.Second))
	if status, _, _ := g.connect(hostPort("raw.test", raw)); status != 403 {
		t.Errorf("over before it began: %d", status)
	}
}

// A clock that jumps over the end is noticed by the next request, before any
// timer.
func TestLiveRuleEndsByEitherClock(t *testing.T) {
	raw := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, nil, nil, nil)
	var jump atomic.Int64
	g.gate.clock = func() live.Instant {
		now := live.Now()
		now.Wall += jump.Load()
		return now
	}
	r := added(tcpRule("raw.test", raw))
	r.Ends = live.Now().After(time.Hour)
	g.apply(live.Added, r)
	status, _, tunnel := g.connect(hostPort("raw.test", raw))
	if status != 200 {
		t.Fatal(status)
	}
	jump.Store(int64(2 * time.Hour))
	if status, _, _ := g.connect(hostPort("raw.test", raw)); status != 403 {
		t.Errorf("after the jump: %d", status)
	}
	isCut(t, tunnel)
}

// While the upstream proxy learns, nothing goes through it.
func TestLiveHold(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	proxy, _ := standIn(t, func(w http.ResponseWriter, r *http.Request) bool { return false })
	g := start(t, []plan.Rule{allowHost("api.test", "tls", o.port)}, nil, func(c *Config) { c.Upstream = proxy })
	_, _, tunnel := g.connect(hostPort("api.test", o.port))
	if a, err := g.gate.Apply(live.Update{Hold: true}); err != nil || a.Cut != 1 {
		t.Errorf("%+v %v", a, err)
	}
	isCut(t, tunnel)
	if status, f, _ := g.connect(hostPort("api.test", o.port)); status != 503 || f.Error.Code != "proxy_down" {
		t.Errorf("%d %+v", status, f)
	}
	if _, err := g.gate.Apply(live.Update{}); err != nil {
		t.Fatal(err)
	}
	if status, _, _ := g.connect(hostPort("api.test", o.port)); status != 200 {
		t.Errorf("after the hold: %d", status)
	}
}

// What cannot be written down is not opened.
func TestLiveAllowWithoutLog(t *testing.T) {
	raw := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, nil, nil, nil)
	g.audit.Close()
	_, err := g.gate.Apply(live.Update{Rules: []live.Rule{added(tcpRule("raw.test", raw))},
		Changes: []live.Change{{What: live.Added, Rule: added(tcpRule("raw.test", raw))}}})
	if fault.As(err) == nil || fault.As(err).Code != "audit_failed" || len(g.gate.current.Load().added) > 0 {
		t.Errorf("%v", err)
	}
	if _, err := g.gate.Apply(live.Update{Rules: []live.Rule{{Rule: plan.Rule{Host: "*", Verdict: "allow"}}}}); err == nil {
		t.Error("a rule that no manifest could have is taken")
	}
}

// Rules may change at any moment of a connection's making: none outlives its
// rule.
func TestLiveRace(t *testing.T) {
	raw := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, nil, nil, nil)
	rule := added(tcpRule("raw.test", raw))
	for range 40 {
		g.apply(live.Added, rule)
		opened := make(chan net.Conn, 8)
		for range cap(opened) {
			go func() {
				_, _, c := g.connect(hostPort("raw.test", raw))
				opened <- c
			}()
		}
		g.apply(live.Added)
		for range cap(opened) {
			isCut(t, <-opened)
		}
	}
	// The guest sees the end before the gate has cleared up.
	if !eventually(func() bool { return len(g.gate.flows.all()) == 0 }) {
		t.Errorf("%d flows are listed", len(g.gate.flows.all()))
	}
}

// Every change is in force when Apply returns: this is the time it takes.
func BenchmarkApply(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprintf("%d rules, 500 tunnels", n), func(b *testing.B) {
			raw := serveTCP(b, func(c *net.TCPConn) { io.Copy(c, c) })
			rules := []plan.Rule{tcpRule("raw.test", raw)}
			for i := range n - 1 {
				rules = append(rules, allowHost(fmt.Sprintf("h%d.test", i), "tls", 443))
			}
			g := start(b, rules, nil, nil)
			for range 500 {
				g.connect(hostPort("raw.test", raw))
			}
			others := []live.Rule{denyRule("x.test")}
			b.ResetTimer()
			for range b.N {
				g.apply(live.Added, others...)
			}
		})
	}
}
