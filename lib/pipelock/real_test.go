package pipelock

import (
	"bufio"
	"bytes"
	"context"
	cryptotls "crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/pipelock/pipelocktest"
	"github.com/bottle-tools/bottle/lib/plan"
)

// hosts says who is where in the network of TestRealTraffic.
const hosts = `127.0.0.1 localhost
93.184.216.34 a.example x.y.w.example w.example bad.w.example p.example other.example a.test
10.1.2.3 inner.example
168.63.129.16 azure.example
64:ff9b::a01:203 nat64.example
1.2.3.4 own.example
9.9.9.9 quad.example
`

// realProgram is the pipelock of this host; without one the test is skipped.
func realProgram(t *testing.T) *Program {
	t.Helper()
	path := pipelocktest.Path(t)
	p, err := Find(t.Context(), func(k string) string { return map[string]string{"BOTTLE_PIPELOCK": path}[k] })
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRealCheck(t *testing.T) {
	p := realProgram(t)
	for _, rules := range [][]plan.Rule{
		{tls("api.example.com")},
		{tls("*.example.org"), allow("p.example", "http", 80), tls("9.9.9.9"), tls("2606:4700::1111")},
		{tls("a.example"), deny("b.example"), deny("*.c.example"), deny("9.9.9.0/24"), deny("2a00::/12")},
	} {
		y := mustYAML(t, rules...)
		if err := p.Check(t.Context(), y); err != nil {
			t.Errorf("%v\n%s", err, y)
		}
		run, _, err := RunYAML(y, RunOptions{
			Listen: netip.MustParseAddrPort("127.0.0.1:18001"), MetricsListen: netip.MustParseAddrPort("127.0.0.1:18002"),
			Sentinel: "/run/b/kill", InstanceID: "dev-01234567", Own: []netip.Addr{netip.MustParseAddr("9.9.9.9")},
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Check(t.Context(), run); err != nil {
			t.Errorf("%v\n%s", err, run)
		}
	}
	wantFault(t, p.Check(t.Context(), []byte("mode: paranoid\n")), "proxy_refuses", `invalid mode "paranoid"`)
	wantFault(t, p.Check(t.Context(), []byte("nope: 1\n")), "proxy_refuses", "field nope not found")
}

// TestRealOpinion: what Says foretells is what pipelock's own check of a URL
// finds in its lists. Names do not resolve here, which it finds out later.
func TestRealOpinion(t *testing.T) {
	p := realProgram(t)
	y := mustYAML(t, tls("api.example.test"), tls("*.example.invalid"), tls("93.184.216.34"), tls("9.9.9.9"), allow("plain.example.test", "http", 80),
		deny("bad.example.invalid"), deny("*.deep.example.invalid"), deny("9.9.9.0/24"))
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, y, 0o600); err != nil {
		t.Fatal(err)
	}
	scanner := regexp.MustCompile(`Scanner: *(\S+)`)
	for _, host := range []string{"api.example.test", "API.example.test.", "xapi.example.test", "x.api.example.test", "example.invalid", "a.example.invalid",
		"a.b.example.invalid", "bad.example.invalid", "x.bad.example.invalid", "deep.example.invalid", "q.deep.example.invalid", "93.184.216.34", "9.9.9.9",
		"plain.example.test", "evil.test", "10.0.0.1", "127.1"} {
		want, err := Says(string(y), host)
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), p.Path, "check", "-c", file, "--url", "https://"+host+"/").CombinedOutput()
		found := scanner.FindSubmatch(out)
		real := Opinion{Verdict: "allow", List: "api_allowlist"}
		switch {
		case err != nil && found == nil:
			t.Errorf("%s: %v: %s", host, err, out)
			continue
		case err == nil, strings.Contains(string(out), "DNS resolution error"):
		case string(found[1]) == "ssrf":
			real = Opinion{Verdict: "deny", List: "internal"}
		case string(found[1]) == "allowlist":
			real = Opinion{Verdict: "deny", List: "api_allowlist"}
		default:
			real = Opinion{Verdict: "deny", List: string(found[1])}
		}
		if real.Verdict != want.Verdict || real.List != want.List {
			t.Errorf("%s: pipelock says %+v, Says %+v\n%s", host, real, want, out)
		}
	}
}

func TestRealLifecycle(t *testing.T) {
	t.Setenv("AWS_SECRET_ACCESS_KEY", "must not be seen")
	p := realProgram(t)
	one, two := mustYAML(t, tls("a.example")), mustYAML(t, tls("a.example"), tls("b.example"))
	proc, err := p.Start(t.Context(), Options{Dir: t.TempDir(), Policy: one, InstanceID: "dev-01234567"})
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Stop()
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", proc.PID()))
	if err == nil {
		for kv := range strings.SplitSeq(strings.TrimRight(string(env), "\x00"), "\x00") {
			if k, _, _ := strings.Cut(kv, "="); k != "PATH" && k != "HOME" {
				t.Errorf("%s is in its environment", k)
			}
		}
	}
	for _, y := range [][]byte{two, one, one, two, one} {
		if err := proc.Reload(t.Context(), y); err != nil {
			t.Error(err)
		}
	}
	// A change that pipelock does not take while it runs.
	wantFault(t, proc.Reload(t.Context(), []byte(strings.Replace(string(one), "enabled: true\n  action: warn", "enabled: false\n  action: warn", 1))),
		"proxy_reload_refused", "security downgrade")
	if err := proc.Reload(t.Context(), two); err != nil {
		t.Error(err)
	}
	if err := proc.Stop(); err != nil {
		t.Error(err)
	}
	if err := proc.Wait(); err != nil {
		t.Error(err)
	}
	for _, line := range readLog(t, filepath.Join(proc.opts.Dir, "pipelock.log")) {
		if strings.Contains(line, `"agent"`) && !strings.Contains(line, `"agent":"dev-01234567"`) {
			t.Error(line)
		}
	}
}

// TestRealTraffic shows clause by clause that the configuration does what it is
// written for, in a network of its own: a namespace whose only interface also
// has a public address, and an /etc/hosts that says who is where.
func TestRealTraffic(t *testing.T) {
	p := realProgram(t)
	if !pipelocktest.OwnNetwork(t, hosts) {
		return
	}
	hello := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		fmt.Fprintln(w, "hello")
	})
	pipelocktest.Serve(t, 80, false, hello)
	pipelocktest.Serve(t, 443, true, hello)
	rules := []plan.Rule{
		tls("a.example"), tls("*.w.example"), deny("bad.w.example"), tls("inner.example"), tls("azure.example"), tls("nat64.example"),
		tls("own.example"), tls(pipelocktest.PublicAddr), allow("p.example", "http", 80), deny("9.9.9.0/24"), tls("quad.example"),
	}
	proc, err := p.Start(t.Context(), Options{Dir: t.TempDir(), Policy: mustYAML(t, rules...), InstanceID: "dev-01234567",
		Own: []netip.Addr{netip.MustParseAddr("1.2.3.4")}})
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Stop()

	for _, c := range []struct {
		host, sni string
		status    int
		works     bool
	}{
		{"a.example", "a.example", 200, true},
		{"A.Example.", "a.example", 200, true},
		{"x.y.w.example", "x.y.w.example", 200, true},
		{"w.example", "w.example", 200, true}, // wider than our wildcard: the gate refuses it
		{"a.example", "p.example", 200, false},
		{pipelocktest.PublicAddr, "", 200, true},
		{"bad.w.example", "bad.w.example", 403, false},
		{"other.example", "other.example", 403, false},
		{"a.example.other.example", "x", 403, false},
		{"inner.example", "inner.example", 403, false},
		{"azure.example", "azure.example", 403, false},
		{"nat64.example", "nat64.example", 403, false},
		{"own.example", "own.example", 403, false},
		{"quad.example", "quad.example", 403, false},
		{"127.0.0.1", "", 403, false},
		{"0x7f000001", "", 403, false},
	} {
		status, err := tunnel(proc.Addr(), c.host, c.sni)
		if status != c.status || (err == nil) != c.works {
			t.Errorf("CONNECT %s with SNI %q: %d %v, want %d %v", c.host, c.sni, status, err, c.status, c.works)
		}
	}

	const key = "AKIAIOSFODNN7EXAMPLQ"
	for _, c := range []struct {
		what, url, header, body string
		status                  int
	}{
		{"plain", "http://p.example/", "", "", 200},
		{"body", "http://p.example/", "", "hello", 200},
		{"not allowed", "http://a.test/", "", "", 403},
		{"key in url", "http://p.example/?q=" + key, "", "", 403},
		{"key in body", "http://p.example/", "", "here: " + key, 403},
		{"key in any header", "http://p.example/", key, "", 403},
		{"body too large", "http://p.example/", "", strings.Repeat("a b c ", maxBodyBytes/6+1), 403},
	} {
		if status, body := request(t, proc.Addr(), c.url, c.header, c.body); status != c.status {
			t.Errorf("%s: %d %q, want %d", c.what, status, body, c.status)
		}
	}

	if err := proc.Reload(t.Context(), mustYAML(t, tls("p.example"))); err != nil {
		t.Fatal(err)
	}
	if status, _ := tunnel(proc.Addr(), "a.example", "a.example"); status != 403 {
		t.Errorf("after its removal: %d", status)
	}
	if status, err := tunnel(proc.Addr(), "p.example", "p.example"); status != 200 || err != nil {
		t.Errorf("after its addition: %d %v", status, err)
	}
}

// tunnel asks for host:443 and shakes hands inside.
func tunnel(proxy netip.AddrPort, host, sni string) (int, error) {
	c, err := net.DialTimeout("tcp", proxy.String(), time.Minute)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	target := net.JoinHostPort(host, "443")
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target)
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return 0, err
	}
	res.Body.Close()
	if res.StatusCode != 200 {
		return res.StatusCode, fmt.Errorf("%s", res.Status)
	}
	s := cryptotls.Client(c, &cryptotls.Config{ServerName: sni, InsecureSkipVerify: true})
	return 200, s.HandshakeContext(context.Background())
}

func request(t *testing.T, proxy netip.AddrPort, target, header, body string) (int, string) {
	t.Helper()
	u := &url.URL{Scheme: "http", Host: proxy.String()}
	h := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(u), DisableKeepAlives: true}, Timeout: 30 * time.Second}
	req, err := http.NewRequest(http.MethodPost, target, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "text/plain")
	if header != "" {
		req.Header.Set("X-Custom", header)
	}
	res, err := h.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(res.Body, 300))
	return res.StatusCode, string(bytes.TrimSpace(b))
}
