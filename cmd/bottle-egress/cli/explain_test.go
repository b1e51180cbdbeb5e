package cli

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gate"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/tidwall/gjson"
)

// rule makes a rule as a manifest would: "host@port", "http host@port",
// "!host" and "!host@port" to deny.
func rule(t testing.TB, s string) plan.Rule {
	t.Helper()
	r := plan.Rule{Verdict: "allow", Protocol: "tls", Ports: []int{443}, From: "test " + s}
	normalize := policy.Normalize
	if rest, ok := strings.CutPrefix(s, "!"); ok {
		s, normalize = rest, policy.NormalizeDeny
		r.Verdict, r.Protocol, r.Ports = "deny", "any", []int{}
	}
	if protocol, rest, ok := strings.Cut(s, " "); ok {
		s, r.Protocol = rest, protocol
	}
	s, pins, _ := strings.Cut(s, "=")
	if pins != "" {
		r.Addresses = strings.Split(pins, ",")
	}
	if host, port, ok := strings.Cut(s, "@"); ok {
		n, err := strconv.Atoi(port)
		if err != nil {
			t.Fatal(err)
		}
		s, r.Ports = host, []int{n}
	}
	e, err := normalize(s)
	if err != nil {
		t.Fatal(err)
	}
	r.Host, r.CIDR, r.Class = e.Host, e.CIDR(), e.Class
	return r
}

func rules(t testing.TB, list ...string) []plan.Rule {
	t.Helper()
	out := []plan.Rule{}
	for _, s := range list {
		out = append(out, rule(t, s))
	}
	return out
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) Close() error                { return nil }

// resolver gives every name one public address that no rule here is about.
type resolver struct{}

func (resolver) LookupNetIP(context.Context, string, string) ([]netip.Addr, error) {
	return []netip.Addr{netip.MustParseAddr("1.1.1.1")}, nil
}

// serveGate runs a real gate for b whose network is not there: every dial
// succeeds, a request is answered by 204, and TLS not at all. It returns where
// the gate listens.
func serveGate(t testing.TB, b *plan.Bottle) string {
	t.Helper()
	cfg := gate.Config{
		Bottle: b, Audit: audit.New(discard{}, audit.Options{Bottle: "claude-00000000"}), Resolver: resolver{},
		Interfaces: func() ([]netip.Addr, error) { return []netip.Addr{}, nil },
		Dial: func(context.Context, string, string) (net.Conn, error) {
			near, far := net.Pipe()
			go func() {
				buf := make([]byte, 4096)
				for {
					n, err := far.Read(buf)
					if err != nil {
						return
					}
					if buf[0] == 0x16 && n > 0 { // a TLS handshake
						far.Close()
						return
					}
					if _, err := io.WriteString(far, "HTTP/1.1 204 No Content\r\n\r\n"); err != nil {
						return
					}
				}
			}()
			return near, nil
		},
	}
	if hosts := gate.InspectedHosts(b); len(hosts) > 0 {
		a, err := ca.New("test", hosts, time.Now(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		cfg.CA, cfg.RootsPEM = a, [][]byte{a.CertPEM()}
	}
	g, err := gate.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "g") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", dir+"/s")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return dir + "/s"
}

// ask sends a CONNECT and gives the code of the gate's answer, "allowed" for a
// tunnel. Where the rule is about plain HTTP the tunnel ends in the gate, and a
// request inside is what is decided about.
func ask(t testing.TB, socket, host string, port int, plain bool) string {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	authority := fmt.Sprintf("%s:%d", host, port)
	if _, err := io.WriteString(c, "CONNECT "+authority+" HTTP/1.1\r\nHost: "+authority+"\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
	if err == nil && resp.StatusCode == http.StatusOK && plain {
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: "+authority+"\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		resp, err = http.ReadResponse(br, nil)
	}
	if err != nil {
		t.Fatalf("%s: %v", authority, err)
	}
	if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusNoContent {
		return policy.Allowed
	}
	var refusal struct {
		Error struct {
			Code string `json:"code"`
		} `json:"error"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&refusal); err != nil {
		t.Fatalf("%s: %d %v", authority, resp.StatusCode, err)
	}
	return refusal.Error.Code
}

// agree compares the gate's answer with explain's.
func agree(t testing.TB, b *plan.Bottle, socket, host string, port int) string {
	t.Helper()
	got, err := explain(b, target{host: host, port: port})
	if err != nil {
		t.Fatal(err)
	}
	said := ask(t, socket, host, port, got.Rule != nil && got.Rule.Protocol == "http")
	if said != got.Code || (said == policy.Allowed) != (got.Verdict == "allow") {
		t.Errorf("%s port %d: the gate says %s, explain %s %s (rules %+v)", host, port, said, got.Verdict, got.Code, b.Egress.Rules)
	}
	// The gate is never the wider of the two for what goes through pipelock.
	if p := got.Pipelock; got.Verdict == "allow" && p.Carries && p.Verdict != "allow" {
		t.Errorf("%s port %d: the gate allows it, and pipelock, which carries it, says %+v", host, port, p)
	}
	if got.Pipelock.Why == "" {
		t.Errorf("%s port %d: no word about pipelock", host, port)
	}
	return said
}

// TestExplainAgrees: a real gate and explain give the same answer, with the same
// code, for whatever is asked.
func TestExplainAgrees(t *testing.T) {
	b := bottle(rules(t,
		"api.example.com", "api.example.com@8443", "*.example.org", "http plain.example.net@80", "ssh git.example.net@22",
		"tcp 10.1.0.0/16@5432", "93.184.216.34", "http ollama.example.net@11434=127.0.0.1", "http both.example.net@80=8.8.8.8", "twice.example.net=127.0.0.1,8.8.8.8",
		"2a00::/32", "192.0.0.0/8", "inspected.example.com",
		"!bad.example.org", "!*.deep.example.org", "!odd.example.org@8443", "!8.8.8.0/24", "!10.1.2.0/24")...)
	b.Egress.Rules[12].Inspect = true
	socket := serveGate(t, b)
	codes := map[string]bool{}
	for _, host := range []string{
		"api.example.com", "API.example.com.", "inspected.example.com", "example.org", "a.example.org", "x.y.example.org", "bad.example.org", "x.bad.example.org",
		"deep.example.org", "q.deep.example.org", "odd.example.org", "plain.example.net", "git.example.net", "10.1.0.7", "10.1.2.7", "10.2.0.1",
		"93.184.216.34", "8.8.8.8", "127.0.0.1", "127.1", "2130706433", "0x7f.1", "169.254.169.254", "192.168.1.1", "192.1.1.1", "192.0.0.192",
		"2a00::1", "2a00:0:0:1::5efe:7f00:1", "::1", "::ffff:10.1.0.7", "ollama.example.net", "both.example.net", "twice.example.net", "evil.test", "localhost", "xn--bcher-kva.example",
		strings.Repeat("a", 63) + ".example.org", strings.Repeat("a", 64) + ".example.org",
	} {
		for _, port := range []int{1, 22, 80, 443, 5432, 8443, 11434, 65535} {
			codes[agree(t, b, socket, host, port)] = true
		}
	}
	for _, code := range []string{"allowed", "not_in_allowlist", "port_not_allowed", "denied_by_rule", "bad_host", "address_not_allowed"} {
		if !codes[code] {
			t.Errorf("nothing here is answered by %s: the table does not test it", code)
		}
	}
}

// TestExplainAgreesAtRandom does the same over policies and requests that nobody
// chose, from a small world in which they meet often.
func TestExplainAgreesAtRandom(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 1))
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	pick := func(of ...string) string { return of[rnd.IntN(len(of))] }
	label := func() string { return pick("a", "b", "c") }
	name := func() string {
		n := "z.test"
		for range rnd.IntN(3) {
			n = label() + "." + n
		}
		return n
	}
	address := func() string { return fmt.Sprintf("%s.%d.0.%d", pick("10", "8", "93"), rnd.IntN(2), rnd.IntN(3)) }
	ports := []int{22, 80, 443}
	allowed := 0
	for range 40 {
		list := []plan.Rule{}
		taken := map[string]bool{}
		for range 1 + rnd.IntN(6) {
			var s string
			switch rnd.IntN(4) {
			case 0:
				s = "*." + name()
			case 1:
				s = pick(address(), fmt.Sprintf("%s.0.0.0/8", pick("10", "8")), fmt.Sprintf("8.%d.0.0/16", rnd.IntN(2)))
			default:
				s = name()
			}
			at := fmt.Sprintf("%s@%d", s, ports[rnd.IntN(len(ports))])
			switch {
			case rnd.IntN(3) == 0:
				s = "!" + pick(s, at)
			case taken[at]: // two rules about one endpoint would contradict each other
				continue
			default:
				taken[at] = true
				s = pick("tls ", "http ", "ssh ", "tcp ") + at
				if !strings.Contains(at, "/") && !strings.Contains(at, "*") && strings.Contains(at, "test") && rnd.IntN(3) == 0 {
					s += "=" + address()
				}
			}
			list = append(list, rule(t, s))
		}
		b := bottle(list...)
		if rnd.IntN(2) == 0 {
			b.Egress.Proxy = "auto"
		}
		socket := serveGate(t, b)
		for range 25 {
			host := name()
			if rnd.IntN(3) == 0 {
				host = address()
			}
			port := ports[rnd.IntN(len(ports))]
			if r := list[rnd.IntN(len(list))]; rnd.IntN(2) == 0 && r.Host != "" && len(r.Ports) > 0 {
				host, port = strings.Replace(r.Host, "*", label(), 1), r.Ports[0]
			}
			if agree(t, b, socket, host, port) == policy.Allowed {
				allowed++
			}
		}
	}
	if allowed < 50 {
		t.Errorf("only %d requests were allowed: the world is too large to say much", allowed)
	}
}

// TestExplainAgreesOnRequests: the same for the path of a request, where the
// gate reads it.
func TestExplainAgreesOnRequests(t *testing.T) {
	b := bottle(rules(t, "http api.example.com@80", "http all.example.com@80")...)
	b.Egress.Rules[0].Requests = []string{"GET /repos/*", "POST /repos/{name}/issues", "DELETE /odd%20name"}
	b.Egress.Rules[0].RequestsFrom = "test requests"
	socket := serveGate(t, b)
	codes := map[string]int{}
	for _, host := range []string{"api.example.com", "all.example.com"} {
		for _, method := range []string{"GET", "HEAD", "POST", "DELETE", "PROPFIND"} {
			for _, path := range []string{"/", "/repos/", "/repos/a/b", "/repos/a/issues", "/repos/a/b/issues", "/repos/%2e%2e/x", "/repos/../x", "/Repos/a", "/odd%20name", "/repos//x", "/repos/a?x=y"} {
				arg := host + ":80" + path
				got, err := parseTarget(arg)
				if err == nil {
					err = got.setMethod(method)
				}
				if err != nil {
					t.Fatal(err)
				}
				said, err := explain(b, got)
				if err != nil {
					t.Fatal(err)
				}
				if code := request(t, socket, method, "http://"+arg); code != said.Code || (code == policy.Allowed) != (said.Verdict == "allow") {
					t.Errorf("%s %s: the gate says %s, explain %s %s", method, arg, code, said.Verdict, said.Code)
				}
				codes[said.Code]++
			}
		}
	}
	for _, code := range []string{"allowed", "request_not_allowed", "ambiguous_path"} {
		if codes[code] < 5 {
			t.Errorf("%d requests are answered by %s", codes[code], code)
		}
	}
}

// request sends one absolute-form request and gives the code of the answer.
func request(t testing.TB, socket, method, address string) string {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	host, _, _ := strings.Cut(strings.TrimPrefix(address, "http://"), "/")
	if _, err := fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: 0\r\n\r\n", method, address, host); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: http.MethodGet})
	if err != nil {
		t.Fatalf("%s %s: %v", method, address, err)
	}
	if resp.StatusCode == http.StatusNoContent {
		return policy.Allowed
	}
	body := make([]byte, resp.ContentLength)
	if method == http.MethodHead { // the answer to HEAD has no body to tell it in
		if resp.StatusCode == http.StatusForbidden {
			return headCode(t, socket, address)
		}
		t.Fatalf("%s: %d", address, resp.StatusCode)
	}
	if _, err := io.ReadFull(resp.Body, body); err != nil {
		t.Fatalf("%s %s: %v", method, address, err)
	}
	return gjson.GetBytes(body, "error.code").String()
}

// headCode: GET stands for HEAD, so that it gets the same answer.
func headCode(t testing.TB, socket, address string) string {
	t.Helper()
	return request(t, socket, http.MethodGet, address)
}

// FuzzExplain: whatever is typed, explain refuses it or agrees with the gate.
func FuzzExplain(f *testing.F) {
	for _, s := range []string{"a.example.com", "a.example.com:443", "[::1]:443", "::1", "0x7f.1", "Bücher.example:8443", "a..b", "a:b:c", "[::1", "x/y/z", "*.a", "%", "10.0.0.1/8"} {
		f.Add(s)
	}
	b := bottle(rules(f, "a.example.com", "*.example.org", "10.0.0.0/8", "xn--bcher-kva.example@8443", "!8.8.8.0/24")...)
	socket := serveGate(f, b)
	f.Fuzz(func(t *testing.T, arg string) {
		got, err := parseTarget(arg)
		if err != nil {
			if fault.As(err).Exit != fault.Usage {
				t.Fatalf("%q: %v", arg, err)
			}
			return
		}
		said, err := explain(b, got)
		if err != nil {
			t.Fatalf("%q: %v", arg, err)
		}
		if strings.ContainsAny(got.host, " \t\r\n\x00") || said.Code == policy.BadHost {
			if said.Verdict != "deny" {
				t.Fatalf("%q is allowed", arg)
			}
			return // the gate's own parser may refuse it first, by another code
		}
		agree(t, b, socket, got.host, got.port)
	})
}

func TestExplainOutput(t *testing.T) {
	b := bottle(rules(t, "api.example.com", "*.example.org@8443", "ssh git.example.net@22", "10.0.0.0/8", "!no.example.org")...)
	b.Egress.Rules[0].Inspect = true
	b.Secrets = []plan.Secret{{Name: "KEY", From: "env:KEY", GuestCanRead: "never", Inject: []plan.Injection{{Host: "api.example.com", Header: "x-key"}}}}
	b.Egress.Proxy = "auto"
	doc := document(t, b)
	for _, tt := range []struct {
		arg    string
		status int
		want   map[string]string
	}{
		{"api.example.com/v1/x", 0, map[string]string{"verdict": "allow", "path": "/v1/x", "path_seen": "true", "inspected": "true", "from": "test api.example.com", "rule.index": "0",
			"rule.host": "api.example.com", "class": "exact", "secrets.0.name": "KEY", "secrets.0.header": "x-key", "pipelock.verdict": "allow", "pipelock.agrees": "true", "residual.#": "1"}},
		{"x.example.org:8443", 0, map[string]string{"verdict": "allow", "class": "wildcard", "path_seen": "false", "residual.#": "2", "pipelock.entry": "*.example.org"}},
		{"example.org:8443", 1, map[string]string{"code": "not_in_allowlist", "pipelock.verdict": "allow", "pipelock.agrees": "false", "rule.index": ""}},
		{"x.example.org", 1, map[string]string{"code": "port_not_allowed", "rule.index": "1", "pipelock.agrees": "false", "secrets.#": "0"}},
		{"git.example.net:22", 0, map[string]string{"verdict": "allow", "pipelock.verdict": "deny", "pipelock.carries": "false", "pipelock.agrees": "false"}},
		{"no.example.org:8443", 1, map[string]string{"code": "denied_by_rule", "rule.verdict": "deny", "rule.index": "4", "pipelock.list": "blocklist"}},
		{"10.9.9.9", 0, map[string]string{"verdict": "allow", "at_the_gate.#": "2"}},
	} {
		status, out, errs := run(doc, "explain", tt.arg)
		if status != tt.status || errs != "" {
			t.Errorf("%s: %d %s", tt.arg, status, errs)
		}
		for path, want := range tt.want {
			if got := gjson.Get(out, path).String(); got != want {
				t.Errorf("%s: %s is %q, want %q (%s)", tt.arg, path, got, want, out)
			}
		}
		_, text, _ := run(doc, "explain", "--pretty", tt.arg)
		if !strings.Contains(text, gjson.Get(out, "pipelock.why").String()) || !strings.Contains(text, gjson.Get(out, "from").String()) {
			t.Errorf("%s: %s", tt.arg, text)
		}
	}
	// Several documents: one that denies is enough for a 1.
	status, out, _ := run(doc+document(t, bottle()), "explain", "api.example.com")
	if status != 1 || strings.Count(out, "\n") != 2 || gjson.Get(strings.SplitN(out, "\n", 2)[1], "pipelock.verdict").String() != "none" {
		t.Errorf("%d %s", status, out)
	}
}

// TestExplainAgreesOnInspection: explain says that the gate reads what goes to a
// host exactly where a client gets the bottle's own certificate.
func TestExplainAgreesOnInspection(t *testing.T) {
	b := bottle(rules(t, "plain.example.com", "inspected.example.com", "*.example.org", "secret.example.com")...)
	b.Egress.Rules[1].Inspect, b.Egress.Rules[2].Inspect = true, true
	// By hand, without inspect: the secret alone brings it about.
	b.Secrets = []plan.Secret{{Name: "KEY", From: "env:KEY", GuestCanRead: "never", Inject: []plan.Injection{{Host: "secret.example.com", Header: "x-key"}}}}
	socket := serveGate(t, b)
	for host, want := range map[string]bool{"plain.example.com": false, "inspected.example.com": true, "x.example.org": true, "x.y.example.org": true, "secret.example.com": true} {
		got, err := explain(b, target{host: host, port: 443})
		if err != nil || got.Verdict != "allow" || got.Inspected != want || got.PathSeen != want {
			t.Errorf("%+v %v", got, err)
		}
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		if _, err := io.WriteString(c, "CONNECT "+host+":443 HTTP/1.1\r\nHost: "+host+":443\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		br := bufio.NewReader(c)
		if resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect}); err != nil || resp.StatusCode != http.StatusOK || br.Buffered() > 0 {
			t.Fatalf("%s: %v %v", host, resp, err)
		}
		// The host that is dialled here speaks no TLS.
		inner := tls.Client(c, &tls.Config{ServerName: host, InsecureSkipVerify: true})
		if err := inner.Handshake(); (err == nil) != want {
			t.Errorf("%s: the gate terminates TLS: %v (%v)", host, err == nil, err)
		}
		c.Close()
	}
}

// TestExplainResidual: what the document says nobody can see, explain says of the
// hosts it is about, and nothing else.
func TestExplainResidual(t *testing.T) {
	b := bottle(rules(t, "a.example.com", "*.b.example.com", "http c.example.com@80", "ssh d.example.com@22", "tcp 10.0.0.1@5432", "93.184.216.34", "2a00::/32@8443",
		"pinned.example.com=10.0.0.2", "secret.example.com")...)
	b.Egress.Proxy = "auto"
	b.Egress.Rules[0].Inspect, b.Egress.Rules[8].Inspect = true, true
	b.Egress.Rules[0].Requests, b.Egress.Rules[0].RequestsFrom = []string{"GET /x"}, "test"
	b.Secrets = []plan.Secret{{Name: "KEY", From: "env:KEY", GuestCanRead: "never", Inject: []plan.Injection{{Host: "secret.example.com", Header: "x-key"}}}}
	e, err := pipelock.Derive(b)
	if err != nil {
		t.Fatal(err)
	}
	said := 0
	for i, r := range b.Egress.Rules {
		host := map[string]string{"*.b.example.com": "x.b.example.com", "": strings.Split(r.CIDR, "/")[0]}[r.Host]
		if host == "" {
			host = r.Host
		}
		got, err := explain(b, target{host: host, port: r.Ports[0]})
		if err != nil || got.Verdict != "allow" || got.Rule.Index != i {
			t.Fatalf("%+v %v", got, err)
		}
		var want []string
		for _, s := range e.Residual {
			names, text, _ := strings.Cut(s, ": ")
			if slices.Contains(strings.Split(names, ", "), r.Host+r.CIDR) || strings.Contains(names, " more") {
				want = append(want, text)
			}
		}
		for _, s := range got.Residual {
			if !slices.ContainsFunc(e.Residual, func(all string) bool { return strings.HasSuffix(all, ": "+s) }) {
				t.Errorf("%s: %q is not in the document", host, s)
			}
			said++
		}
		for _, s := range want {
			if !strings.Contains(strings.Join(e.Residual, "\n"), " more: "+s) && !slices.Contains(got.Residual, s) {
				t.Errorf("%s: no word of %q: %q", host, s, got.Residual)
			}
		}
	}
	if said < 12 {
		t.Errorf("%d sentences: %q", said, e.Residual)
	}
}

// TestPipelockOpinion reads what explain claims off the derived text, and not
// off the rules that it was made from.
func TestPipelockOpinion(t *testing.T) {
	e, err := pipelock.Derive(bottle(rules(t, "*.example.org", "93.184.216.34", "!no.example.org")...))
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]pipelock.Opinion{
		"example.org":         {Verdict: "allow", List: "api_allowlist", Entry: "*.example.org"},
		"A.B.example.org.":    {Verdict: "allow", List: "api_allowlist", Entry: "*.example.org"},
		"xexample.org":        {Verdict: "deny", List: "api_allowlist"},
		"no.example.org":      {Verdict: "deny", List: "blocklist", Entry: "no.example.org"},
		"x.no.example.org":    {Verdict: "allow", List: "api_allowlist", Entry: "*.example.org"},
		"93.184.216.34":       {Verdict: "allow", List: "api_allowlist", Entry: "93.184.216.34"},
		"x.93.184.216.34":     {Verdict: "deny", List: "api_allowlist"},
		"0x5d.184.216.34":     {Verdict: "deny", List: "api_allowlist"},
		"::ffff:93.184.216.3": {Verdict: "deny", List: "api_allowlist"},
	} {
		if got, err := pipelock.Says(e.Pipelock.YAML, host); err != nil || got != want {
			t.Errorf("%s: %+v %v, want %+v", host, got, err, want)
		}
	}
	edited := strings.Replace(e.Pipelock.YAML, "internal:\n", "internal:\n  - 93.184.0.0/16\n", 1)
	if got, err := pipelock.Says(edited, "93.184.216.34"); err != nil || got.List != "internal" || got.Verdict != "deny" {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := pipelock.Says("nonsense: 1", "a"); fault.As(err).Code != "bad_pipelock_yaml" {
		t.Error(err)
	}
}
