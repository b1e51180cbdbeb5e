package pipelock

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"go.yaml.in/yaml/v3"
)

func bottle(rules ...plan.Rule) *plan.Bottle {
	return &plan.Bottle{Egress: plan.Policy{Proxy: "auto", Rules: rules}}
}

// allow makes an allow rule for an entry as a manifest has it.
func allow(entry, protocol string, port int) plan.Rule {
	e, err := policy.Normalize(entry)
	if err != nil {
		panic(err)
	}
	return plan.Rule{Host: e.Host, CIDR: e.CIDR(), Ports: []int{port}, Protocol: protocol, Verdict: "allow", Class: e.Class, From: "test"}
}

func tls(entry string) plan.Rule { return allow(entry, "tls", 443) }

func deny(entry string) plan.Rule {
	e, err := policy.NormalizeDeny(entry)
	if err != nil {
		panic(err)
	}
	return plan.Rule{Host: e.Host, CIDR: e.CIDR(), Protocol: "any", Verdict: "deny", Class: e.Class, From: "test"}
}

func pinned(r plan.Rule, addresses ...string) plan.Rule {
	r.Addresses = addresses
	return r
}

func mustYAML(t *testing.T, rules ...plan.Rule) []byte {
	t.Helper()
	y, err := YAML(bottle(rules...))
	if err != nil {
		t.Fatal(err)
	}
	return y
}

func mustDecode(t *testing.T, y []byte) config {
	t.Helper()
	c, err := decode(y)
	if err != nil {
		t.Fatalf("%v\n%s", err, y)
	}
	return c
}

func TestYAMLIsStrict(t *testing.T) {
	y := mustYAML(t, tls("api.example.com"), allow("plain.example.com", "http", 80))
	// Read without our types, as another program would.
	var m map[string]any
	if err := yaml.Unmarshal(y, &m); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]any{
		"mode":                                  "strict",
		"enforce":                               true,
		"explain_blocks":                        false,
		"bind_default_agent_identity":           true,
		"forward_proxy.enabled":                 true,
		"forward_proxy.sni_verification":        true,
		"websocket_proxy.enabled":               false,
		"tls_interception.enabled":              false,
		"dlp.scan_env":                          false,
		"dlp.include_defaults":                  true,
		"request_body_scanning.enabled":         true,
		"request_body_scanning.action":          "block",
		"request_body_scanning.scan_headers":    true,
		"request_body_scanning.header_mode":     "all",
		"response_scanning.enabled":             true,
		"response_scanning.action":              "warn",
		"logging.format":                        "json",
		"logging.output":                        "stdout",
		"fetch_proxy.monitoring.max_url_length": 8192,
	} {
		var at any = m
		for k := range strings.SplitSeq(path, ".") {
			at = at.(map[string]any)[k]
		}
		if at != want {
			t.Errorf("%s is %v, want %v", path, at, want)
		}
	}
	// What belongs to one run is not in a policy.
	for _, k := range []string{"metrics_listen", "kill_switch", "emit"} {
		if m[k] != nil {
			t.Errorf("%s is in the policy", k)
		}
	}
	if m["fetch_proxy"].(map[string]any)["listen"] != nil {
		t.Error("a port is in the policy")
	}
	internal := m["internal"].([]any)
	for _, r := range defaultInternal {
		if !slices.Contains(internal, any(r)) {
			t.Errorf("internal lacks pipelock's default %s", r)
		}
	}
}

func TestYAMLLists(t *testing.T) {
	for _, c := range []struct {
		name                 string
		rules                []plan.Rule
		allow, block, ranges []string
	}{
		{
			name:  "sorted and without repeats",
			rules: []plan.Rule{tls("b.example"), tls("a.example"), allow("a.example", "tls", 8443), tls("*.c.example"), tls("9.9.9.9"), tls("2606:4700::1111")},
			allow: []string{"*.c.example", "2606:4700::1111", "9.9.9.9", "a.example", "b.example"},
		}, {
			name: "what pipelock cannot hold leaves from the gate",
			rules: []plan.Rule{
				tls("a.example"),
				allow("git.example", "ssh", 22), allow("raw.example", "tcp", 5432),
				pinned(allow("ollama.example", "http", 11434), "127.0.0.1"), pinned(tls("pub.example"), "9.9.9.9"),
				tls("10.0.0.7"), tls("100.64.0.7"), tls("127.0.0.1"), tls("fd00::1"), tls("9.9.9.0/24"),
			},
			allow: []string{"a.example"},
		}, {
			name:   "deny",
			rules:  []plan.Rule{tls("*.example.org"), deny("bad.example.org"), deny("*.ads.example.org"), deny("9.9.9.0/24"), deny("8.8.8.8")},
			allow:  []string{"*.example.org"},
			block:  []string{"bad.example.org"},
			ranges: []string{"9.9.9.0/24", "8.8.8.8/32"},
		}, {
			name:  "a denied wildcard whose apex is allowed",
			rules: []plan.Rule{tls("ads.example.org"), deny("*.ads.example.org")},
			allow: []string{"ads.example.org"},
		}, {
			name:  "a denied wildcard whose apex is not",
			rules: []plan.Rule{tls("x.ads.example.org"), deny("*.ads.example.org")},
			allow: []string{"x.ads.example.org"},
			block: []string{"*.ads.example.org"},
		}, {
			name:  "a denial of single ports is the gate's",
			rules: []plan.Rule{tls("a.example"), {Host: "a.example", Ports: []int{8443}, Protocol: "any", Verdict: "deny", Class: "exact"}},
			allow: []string{"a.example"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := mustDecode(t, mustYAML(t, c.rules...))
			if !slices.Equal(got.APIAllowlist, c.allow) {
				t.Errorf("api_allowlist %q, want %q", got.APIAllowlist, c.allow)
			}
			if b := got.FetchProxy.Monitoring.Blocklist; !slices.Equal(b, c.block) {
				t.Errorf("blocklist %q, want %q", b, c.block)
			}
			if more := got.Internal[len(specialRanges()):]; !slices.Equal(more, c.ranges) {
				t.Errorf("internal has %q more, want %q", more, c.ranges)
			}
		})
	}
}

func TestYAMLDeterministic(t *testing.T) {
	a := mustYAML(t, tls("a.example"), tls("b.example"), deny("c.example"))
	b := mustYAML(t, deny("c.example"), tls("b.example"), tls("a.example"))
	if string(a) != string(b) {
		t.Error("the order of rules shows")
	}
	if c := mustDecode(t, a); func() string { y, _ := encode(c); return string(y) }() != string(a) {
		t.Error("reading back and writing gives something else")
	}
}

// What pipelock takes without a word, and what no rule may be.
func TestYAMLRefuses(t *testing.T) {
	long := strings.Repeat("a", 64) + ".example"
	for _, host := range []string{
		"*", "*.", "*.com", "https://a.example", "a.example:443", "a.example/x", "a.*.example", "*.*.example",
		"", " ", "a.example ", "A.example", "a.example.", ".example", "a..example", "-a.example", "a-.example",
		"exämple.org", "a\nmode: audit", "1.2.3.4", "0x7f000001", "1.0x7f", "2130706433", "[::1]", "user@a.example", long,
		strings.Repeat("abc.", 70) + "example", "a.example,b.example", "a.example#x",
	} {
		r := plan.Rule{Host: host, Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: "exact"}
		wantRefusal(t, host, r)
	}
	for _, cidr := range []string{"1.2.3.4", "1.2.3.4/24", "0.0.0.0/0", "::/0", "1.2.3.4/33", "::ffff:1.2.3.4/128", "2001:DB8::/32", "*"} {
		wantRefusal(t, cidr, plan.Rule{CIDR: cidr, Ports: []int{443}, Protocol: "tls", Verdict: "allow"})
	}
	wantRefusal(t, "both", plan.Rule{Host: "a.example", CIDR: "1.2.3.4/32", Protocol: "tls", Verdict: "allow"})
}

// Entries that the real pipelock was seen to accept, and that never match.
func TestYAMLRefusesWhatPipelockAccepts(t *testing.T) {
	all, err := load(recordings + "/check.ndjson")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, r := range all {
		if !strings.HasPrefix(r.Name, "note-allowlist-") {
			continue
		}
		var c struct {
			List []string `yaml:"api_allowlist"`
		}
		if err := yaml.Unmarshal([]byte(r.Config), &c); err != nil {
			t.Fatal(err)
		}
		for _, host := range c.List {
			n++
			wantRefusal(t, host, plan.Rule{Host: host, Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: "exact"})
		}
	}
	if n < 7 {
		t.Errorf("only %d entries in the recordings", n)
	}
}

func wantRefusal(t *testing.T, what string, r plan.Rule) {
	t.Helper()
	y, err := YAML(bottle(tls("good.example"), r))
	f := fault.As(err)
	if err == nil || f.Exit != fault.Data || !strings.HasPrefix(f.Where, "bottle.egress.rules[1].") || f.Hint == "" {
		t.Errorf("%q: %+v\n%s", what, f, y)
	}
}

func TestYAMLNumberOfHosts(t *testing.T) {
	many := func(n int) []plan.Rule {
		rules := make([]plan.Rule, n)
		for i := range rules {
			rules[i] = tls(fmt.Sprintf("h%d.example", i))
		}
		return rules
	}
	_, err := YAML(bottle())
	if f := fault.As(err); err == nil || f.Exit != fault.Data || f.Code != "allowlist_empty" || f.Hint == "" {
		t.Errorf("no rule: %+v", f)
	}
	if _, err := YAML(bottle(many(MaxHosts)...)); err != nil {
		t.Error(err)
	}
	_, err = YAML(bottle(many(MaxHosts + 1)...))
	if f := fault.As(err); err == nil || f.Exit != fault.Data || f.Code != "too_many_hosts" {
		t.Errorf("too many: %+v", f)
	}

	// The same, as a section of a document.
	for _, c := range []struct {
		proxy string
		n     int
		has   bool
		code  string
	}{
		{"auto", 0, false, ""}, {"pipelock", 0, false, ""}, {"builtin", 1, true, ""},
		{"auto", MaxHosts, true, ""}, {"auto", MaxHosts + 1, false, ""}, {"builtin", MaxHosts + 1, false, ""},
		{"pipelock", MaxHosts, true, ""}, {"pipelock", MaxHosts + 1, false, "too_many_hosts"},
	} {
		b := bottle(many(c.n)...)
		b.Egress.Proxy = c.proxy
		e, err := Derive(b)
		switch {
		case c.code != "":
			if f := fault.As(err); err == nil || f.Code != c.code || f.Exit != fault.Data {
				t.Errorf("%+v: %v", c, err)
			}
		case err != nil:
			t.Errorf("%+v: %v", c, err)
		case (e.Pipelock != nil) != c.has:
			t.Errorf("%+v: pipelock section is %v", c, e.Pipelock)
		case e.RulesSHA256 == "" || e.Residual == nil:
			t.Errorf("%+v: %+v", c, e)
		}
	}
}

func TestDerive(t *testing.T) {
	b := bottle(tls("a.example"), allow("p.example", "http", 80), pinned(tls("l.example"), "127.0.0.1"))
	e, err := Derive(b)
	if err != nil {
		t.Fatal(err)
	}
	if y := mustYAML(t, b.Egress.Rules...); e.Pipelock.YAML != string(y) || e.Pipelock.SHA256 != plan.SHA256(y) {
		t.Error("the section does not hold what YAML gives")
	}
	if e.RulesSHA256 != policy.RulesSHA256(b.Egress.Rules) {
		t.Error("another digest of the rules")
	}
	all := strings.Join(e.Residual, "\n")
	for _, want := range []string{"l.example: where the proxy is pipelock, these leave from the gate", "p.example: where the proxy is pipelock, it follows redirects"} {
		if !strings.Contains(all, want) {
			t.Errorf("residual lacks %q:\n%s", want, all)
		}
	}
	limited := allow("q.example", "http", 80)
	limited.Requests, limited.RequestsFrom = []string{"GET /a"}, "x"
	withSecret := bottle(tls("a.example"), limited)
	withSecret.Secrets = []plan.Secret{{Name: "K", Inject: []plan.Injection{{Host: "a.example", Header: "x-key"}}}}
	if e, err = Derive(withSecret); err != nil || strings.Contains(e.Pipelock.YAML, "q.example") {
		t.Fatalf("pipelock follows redirects past the requests of a rule: %v", err)
	}
	all = strings.Join(e.Residual, "\n")
	for _, want := range []string{"q.example: requests are held", "a.example: answers are searched", "q.example: where the proxy is pipelock, these leave from the gate"} {
		if !strings.Contains(all, want) {
			t.Errorf("residual lacks %q:\n%s", want, all)
		}
	}
	b.Egress.Proxy = "builtin"
	if e, err = Derive(b); err != nil || strings.Contains(strings.Join(e.Residual, "\n"), "pipelock") {
		t.Errorf("builtin: %v %q", err, e.Residual)
	}
}

// A document that was edited by hand: the place of the bad rule is told.
func TestDeriveNamesTheRule(t *testing.T) {
	for _, c := range []struct {
		edit        func(*plan.Rule)
		where, code string
	}{
		{func(r *plan.Rule) { r.Host = "*" }, "bottle.egress.rules[1].host", "too_broad"},
		{func(r *plan.Rule) { r.Host = "https://a.example" }, "bottle.egress.rules[1].host", "bad_host"},
		{func(r *plan.Rule) { r.Host, r.CIDR = "", "9.9.9.0/33" }, "bottle.egress.rules[1].cidr", "bad_cidr"},
		{func(r *plan.Rule) { r.Host, r.CIDR = "", "9.9.9.9" }, "bottle.egress.rules[1]", "bad_rule"},
		{func(r *plan.Rule) { r.Host = "" }, "bottle.egress.rules[1]", "bad_rule"},
		{func(r *plan.Rule) { r.Verdict = "maybe" }, "bottle.egress.rules[1]", "bad_rule"},
		{func(r *plan.Rule) { r.Protocol = "udp" }, "bottle.egress.rules[1]", "bad_rule"},
		{func(r *plan.Rule) { r.Ports = nil }, "bottle.egress.rules[1]", "bad_rule"},
		{func(r *plan.Rule) { r.Class = "wildcard" }, "bottle.egress.rules[1]", "bad_rule"},
	} {
		r := tls("b.example")
		c.edit(&r)
		_, err := Derive(bottle(tls("a.example"), r))
		f := fault.As(err)
		if err == nil || f.Exit != fault.Data || !strings.HasPrefix(f.Where, c.where) || f.Code != c.code {
			t.Errorf("%+v: %+v", r, f)
		}
	}
}

// pipelock must not dial what the gate would not: every block that lib/policy
// keeps shut is in "internal".
func TestRangesCoverPolicy(t *testing.T) {
	rule := tls("a.example")
	for _, p := range specialPrefixes {
		if !special(p.Addr()) {
			t.Errorf("%s is not special", p)
		}
	}
	for _, s := range []string{
		"0.0.0.1", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "169.254.169.254", "172.31.255.255", "192.0.0.192",
		"192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1",
		"239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16",
		"::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::a00:1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
		"64:ff9b:1::1", "100::1", "2001::1", "2001:2::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "4000::1", "5f00::1",
		"fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1",
	} {
		a := netip.MustParseAddr(s)
		if !special(a) {
			t.Errorf("pipelock may dial %s", s)
		}
		if policy.CheckAddr(&rule, a, nil) == nil {
			t.Errorf("lib/policy lets %s through: is it still special?", s)
		}
	}
	for _, s := range []string{"1.1.1.1", "9.9.9.9", "100.63.255.255", "100.128.0.1", "172.32.0.1", "2606:4700::1111", "2a00::1", "64:ff9b::808:808"} {
		a := netip.MustParseAddr(s)
		if special(a) {
			t.Errorf("pipelock may not dial %s", s)
		}
		if err := policy.CheckAddr(&rule, a, nil); err != nil {
			t.Error(err)
		}
	}
}

func TestRunYAML(t *testing.T) {
	o := RunOptions{
		Listen: netip.MustParseAddrPort("127.0.0.1:18001"), MetricsListen: netip.MustParseAddrPort("127.0.0.1:18002"),
		Sentinel: "/run/b/kill", InstanceID: "dev-01234567",
		Own: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("2606:4700::1")},
	}
	pol := mustYAML(t, tls("a.example"))
	run, sha, err := RunYAML(pol, o)
	if err != nil {
		t.Fatal(err)
	}
	if plan.SHA256(run) != "sha256:"+sha {
		t.Error("another digest")
	}
	c, p := mustDecode(t, run), mustDecode(t, pol)
	if c.FetchProxy.Listen != "127.0.0.1:18001" || c.Metrics != "127.0.0.1:18002" || c.KillSwitch.SentinelFile != "/run/b/kill" ||
		c.Agent != "dev-01234567" || !c.BindAgent || c.Emit.InstanceID != "dev-01234567" {
		t.Errorf("%+v", c)
	}
	if more := c.Internal[len(p.Internal):]; !slices.Equal(more, []string{"9.9.9.9/32", "2606:4700::1/128"}) {
		t.Errorf("the host's own addresses: %q", more)
	}
	for name, change := range map[string]func(*RunOptions){
		"port 0":       func(o *RunOptions) { o.Listen = netip.MustParseAddrPort("127.0.0.1:0") },
		"not loopback": func(o *RunOptions) { o.Listen = netip.MustParseAddrPort("0.0.0.0:18001") },
		"same port":    func(o *RunOptions) { o.MetricsListen = netip.MustParseAddrPort("127.0.0.2:18001") },
		"no metrics":   func(o *RunOptions) { o.MetricsListen = netip.AddrPort{} },
		"sentinel":     func(o *RunOptions) { o.Sentinel = "kill" },
		"id":           func(o *RunOptions) { o.InstanceID = "" },
	} {
		bad := o
		change(&bad)
		if _, _, err := RunYAML(pol, bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A policy that someone weakened never reaches pipelock.
func TestRunYAMLRefusesWeakPolicies(t *testing.T) {
	o := RunOptions{Listen: netip.MustParseAddrPort("127.0.0.1:1"), MetricsListen: netip.MustParseAddrPort("127.0.0.1:2"), Sentinel: "/k", InstanceID: "x"}
	pol := string(mustYAML(t, tls("a.example")))
	for _, edit := range [][2]string{
		{"mode: strict", "mode: balanced"},
		{"enforce: true", "enforce: false"},
		{"bind_default_agent_identity: true", "bind_default_agent_identity: false"},
		{"sni_verification: true", "sni_verification: false"},
		{"forward_proxy:\n  enabled: true", "forward_proxy:\n  enabled: false"},
		{"  action: block", "  action: warn"},
		{"include_defaults: true", "include_defaults: false"},
		{"  - 169.254.0.0/16\n", ""},
		{"  - a.example\n", ""},
		{"tls_interception:\n  enabled: false", "tls_interception:\n  enabled: true"},
		{"output: stdout", "output: file"},
		{"mode: strict", "mode: strict\nmetrics_listen: 127.0.0.1:3"},
		{"mode: strict", "mode: strict\ntrusted_domains: [a.example]"},
		{"mode: strict", "mode: strict\nmode: strict"},
		{"version: 1", "version: one"},
		{"version: 1\n", "version: 1\n---\nversion: 1\n"},
		{"include_blocked: true\n", "include_blocked: true\n---\nmode: audit\n"},
	} {
		weak := strings.Replace(pol, edit[0], edit[1], 1)
		if weak == pol {
			t.Fatalf("%q is not in the policy", edit[0])
		}
		_, _, err := RunYAML([]byte(weak), o)
		if f := fault.As(err); err == nil || f.Exit != fault.Data || f.Code != "bad_pipelock_yaml" {
			t.Errorf("%q accepted: %v", edit[1], err)
		}
	}
	for _, y := range []string{"", "null", "[]", "\xff", "a: &a [*a]"} {
		if _, _, err := RunYAML([]byte(y), o); err == nil {
			t.Errorf("%q accepted", y)
		}
	}
}

func FuzzHost(f *testing.F) {
	for _, s := range []string{"a.example", "*.a.example", "*", "a:1", "x\ny: z", "ä"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, host string) {
		y, err := YAML(bottle(plan.Rule{Host: host, Ports: []int{443}, Protocol: "tls", Verdict: "allow"}))
		if err != nil {
			return
		}
		// What is accepted comes out as exactly that one entry.
		c, err := decode(y)
		if err != nil || len(c.APIAllowlist) != 1 || c.APIAllowlist[0] != host {
			t.Fatalf("%q: %v %q", host, err, c.APIAllowlist)
		}
		if strings.ContainsAny(host, ":/@?#[]% \t\r\n") || strings.Contains(strings.TrimPrefix(host, "*."), "*") {
			t.Fatalf("%q accepted", host)
		}
	})
}

// TestRangeWithPorts: a deny that pipelock would not hold for the names that it
// resolves is no configuration of its.
func TestRangeWithPorts(t *testing.T) {
	on := func(r plan.Rule, ports ...int) plan.Rule {
		r.Ports = ports
		return r
	}
	for _, tt := range []struct {
		name  string
		rules []plan.Rule
		held  bool
	}{
		{"on every port", []plan.Rule{tls("a.example"), deny("9.9.9.0/24")}, true},
		{"on the port of a name", []plan.Rule{tls("a.example"), on(deny("9.9.9.0/24"), 80, 443)}, false},
		{"on another port", []plan.Rule{tls("a.example"), on(deny("9.9.9.0/24"), 80)}, true},
		{"on the port of a name that does not go through it", []plan.Rule{tls("a.example"), allow("b.example", "ssh", 22), on(deny("9.9.9.0/24"), 22)}, true},
		{"on the port of an address, which the gate sees", []plan.Rule{tls("8.8.8.8"), on(deny("9.9.9.0/24"), 443)}, true},
		{"in a block that is closed on every port", []plan.Rule{tls("a.example"), on(deny("10.0.0.0/9"), 443)}, true},
		{"around such a block", []plan.Rule{tls("a.example"), on(deny("8.0.0.0/5"), 443)}, false},
	} {
		b := bottle(tt.rules...)
		e, err := Derive(b)
		if err != nil || (e.Pipelock != nil) != tt.held {
			t.Errorf("%s: auto: %+v %v", tt.name, e, err)
		}
		_, yamlErr := YAML(b)
		b.Egress.Proxy = "pipelock"
		_, err = Derive(b)
		for _, err := range []error{yamlErr, err} {
			if f := fault.As(err); (f == nil) != tt.held || f != nil && (f.Code != "range_with_ports" || f.Exit != fault.Data || !strings.HasSuffix(f.Where, "].ports")) {
				t.Errorf("%s: %v", tt.name, err)
			}
		}
	}
}
