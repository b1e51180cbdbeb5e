package policy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// rule builds a rule as bottle-plan would: "host:port,port" with an optional
// protocol in front ("ssh git.example:22") or "!" for deny.
func rule(t testing.TB, s string) plan.Rule {
	t.Helper()
	r := plan.Rule{Protocol: "tls", Verdict: "allow", From: "test " + s}
	normalize := Normalize
	if rest, ok := strings.CutPrefix(s, "!"); ok {
		s, r.Verdict, r.Protocol, normalize = rest, "deny", "any", NormalizeDeny
	}
	if proto, rest, ok := strings.Cut(s, " "); ok {
		s, r.Protocol = rest, proto
	}
	if i := strings.LastIndex(s, "@"); i >= 0 {
		for _, p := range strings.Split(s[i+1:], ",") {
			var n int
			if _, err := fmt.Sscan(p, &n); err != nil {
				t.Fatal(err)
			}
			r.Ports = append(r.Ports, n)
		}
		s = s[:i]
	} else if r.Verdict == "allow" {
		r.Ports = []int{443}
	}
	e, err := normalize(s)
	if err != nil {
		t.Fatal(err)
	}
	r.Host, r.CIDR, r.Class = e.Host, e.CIDR(), e.Class
	return r
}

func compile(t testing.TB, entries ...string) *Matcher {
	t.Helper()
	var rules []plan.Rule
	for _, s := range entries {
		rules = append(rules, rule(t, s))
	}
	m, err := Compile(rules)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestDecide(t *testing.T) {
	m := compile(t,
		"api.example.com",                // 0
		"*.example.org@443,8443",         // 1
		"ssh git.example.net@22",         // 2
		"!telemetry.example.org",         // 3
		"tcp 100.64.0.0/10@22",           // 4
		"tcp 100.64.0.7@2222",            // 5
		"!100.64.9.0/24",                 // 6
		"*.deep.example.org@9443",        // 7
		"2606:4700::/32",                 // 8
		"api.example.com@8443",           // 9
		"xn--bcher-kva.example",          // 10
		"!*.bad.example.org@443",         // 11
		"*.both.example", "both.example", // 12, 13
	)
	for _, tt := range []struct {
		host  string
		port  int
		code  string
		index int
	}{
		{"api.example.com", 443, Allowed, 0},
		{"API.EXAMPLE.COM", 443, Allowed, 0},
		{"api.example.com.", 443, Allowed, 0},
		{"api.example.com", 8443, Allowed, 9},
		{"api.example.com", 80, PortNotAllowed, 0},
		{"api.example.com..", 443, BadHost, -1},
		{"api.example.com ", 443, BadHost, -1},
		{"api.example.com\x00.evil.test", 443, BadHost, -1},
		{"evilapi.example.com", 443, NotInAllowlist, -1},
		{"x.api.example.com", 443, NotInAllowlist, -1},
		{"example.com", 443, NotInAllowlist, -1},
		{"a.example.org", 443, Allowed, 1},
		{"a.b.c.example.org", 8443, Allowed, 1},
		{"example.org", 443, NotInAllowlist, -1},
		{"evilexample.org", 443, NotInAllowlist, -1},
		{"a.example.org.evil.test", 443, NotInAllowlist, -1},
		{"a.example.org", 22, PortNotAllowed, 1},
		{"x.deep.example.org", 9443, Allowed, 7},
		{"x.deep.example.org", 443, Allowed, 1},
		{"deep.example.org", 9443, PortNotAllowed, 1},
		{"telemetry.example.org", 443, DeniedByRule, 3},
		{"telemetry.example.org", 8443, DeniedByRule, 3},
		{"Telemetry.Example.org.", 443, DeniedByRule, 3},
		{"x.telemetry.example.org", 443, Allowed, 1},
		{"x.bad.example.org", 443, DeniedByRule, 11},
		{"x.bad.example.org", 8443, Allowed, 1},
		{"git.example.net", 22, Allowed, 2},
		{"git.example.net", 443, PortNotAllowed, 2},
		{"100.64.0.7", 2222, Allowed, 5},
		{"100.64.0.7", 22, Allowed, 4},
		{"100.64.0.8", 2222, PortNotAllowed, 4},
		{"100.64.9.1", 22, DeniedByRule, 6},
		{"100.128.0.1", 22, NotInAllowlist, -1},
		{"2606:4700::1", 443, Allowed, 8},
		{"2606:4700:0:0:0:0:0:1", 443, Allowed, 8},
		{"2606:4701::1", 443, NotInAllowlist, -1},
		{"::ffff:100.64.0.7", 22, BadHost, -1},
		{"[2606:4700::1]", 443, BadHost, -1},
		{"2606:4700::1%eth0", 443, BadHost, -1},
		{"0x64400007", 22, BadHost, -1},
		{"1681915911", 22, BadHost, -1},
		{"100.64.7", 22, BadHost, -1},
		{"0144.64.0.7", 22, BadHost, -1},
		{"xn--bcher-kva.example", 443, Allowed, 10},
		{"bücher.example", 443, BadHost, -1},
		{"api.example.com", 443, BadHost, -1}, // U+212A, the Kelvin sign, is put in below
		{"both.example", 443, Allowed, 13},
		{"", 443, BadHost, -1},
		{".", 443, BadHost, -1},
		{"*", 443, BadHost, -1},
		{"*.example.org", 443, BadHost, -1},
		{"user@api.example.com", 443, BadHost, -1},
		{"api.example.com/", 443, BadHost, -1},
		{"api.example.com:443", 443, BadHost, -1},
		{"api.example.com", 0, BadPort, -1},
		{"api.example.com", 65536, BadPort, -1},
		{"api.example.com", -1, BadPort, -1},
		{"nowhere.test", 443, NotInAllowlist, -1},
		{strings.Repeat("a.", 200) + "example.org", 443, BadHost, -1},
		{strings.Repeat("a.", 115) + "example.org", 443, Allowed, 1},
	} {
		if tt.code == BadHost && tt.host == "api.example.com" {
			tt.host = "both.examp\u212ae"
		}
		d := m.Decide(tt.host, tt.port)
		if d.Code != tt.code || d.Index != tt.index {
			t.Errorf("Decide(%q, %d) = %s %d (%s), want %s %d", tt.host, tt.port, d.Code, d.Index, d.Reason, tt.code, tt.index)
		}
		if d.Allow != (d.Code == Allowed) || (d.Rule != nil) != (d.Index >= 0) || d.Reason == "" {
			t.Errorf("Decide(%q, %d) = %+v: not one answer", tt.host, tt.port, d)
		}
		if !d.Allow && d.Hint == "" {
			t.Errorf("Decide(%q, %d): no hint", tt.host, tt.port)
		}
	}
	if d := m.Decide("example.org", 443); !strings.Contains(d.Reason, "*.example.org") {
		t.Errorf("the reason does not tell about the apex: %s", d.Reason)
	}
	if d := m.Decide("bücher.example", 443); !strings.Contains(d.Hint, "xn--bcher-kva.example") {
		t.Errorf("the hint does not tell the ASCII form: %s", d.Hint)
	}
}

func TestEmptyPolicyDeniesAll(t *testing.T) {
	m := compile(t)
	for _, h := range []string{"a.example", "127.0.0.1", "::1"} {
		if d := m.Decide(h, 443); d.Allow || d.Code != NotInAllowlist {
			t.Errorf("Decide(%q) = %+v", h, d)
		}
	}
}

func TestCompileRefuses(t *testing.T) {
	good := rule(t, "a.example")
	edit := func(f func(*plan.Rule)) plan.Rule { r := good; f(&r); return r }
	for name, r := range map[string]plan.Rule{
		"upper case":       edit(func(r *plan.Rule) { r.Host = "A.example" }),
		"trailing dot":     edit(func(r *plan.Rule) { r.Host = "a.example." }),
		"star":             edit(func(r *plan.Rule) { r.Host = "*" }),
		"star tld":         edit(func(r *plan.Rule) { r.Host, r.Class = "*.com", "wildcard" }),
		"no host":          edit(func(r *plan.Rule) { r.Host = "" }),
		"host and cidr":    edit(func(r *plan.Rule) { r.CIDR = "8.8.8.8/32" }),
		"address as host":  edit(func(r *plan.Rule) { r.Host, r.Class = "8.8.8.8", "ipv4" }),
		"bare address":     edit(func(r *plan.Rule) { r.Host, r.CIDR, r.Class = "", "8.8.8.8", "ipv4" }),
		"name as cidr":     edit(func(r *plan.Rule) { r.Host, r.CIDR = "", "a.example" }),
		"host bits":        edit(func(r *plan.Rule) { r.Host, r.CIDR, r.Class = "", "10.0.0.1/8", "private" }),
		"wrong class":      edit(func(r *plan.Rule) { r.Class = "wildcard" }),
		"no class":         edit(func(r *plan.Rule) { r.Class = "" }),
		"no ports":         edit(func(r *plan.Rule) { r.Ports = nil }),
		"port 0":           edit(func(r *plan.Rule) { r.Ports = []int{0} }),
		"port 70000":       edit(func(r *plan.Rule) { r.Ports = []int{443, 70000} }),
		"protocol":         edit(func(r *plan.Rule) { r.Protocol = "udp" }),
		"protocol any":     edit(func(r *plan.Rule) { r.Protocol = "any" }),
		"verdict":          edit(func(r *plan.Rule) { r.Verdict = "Allow" }),
		"no verdict":       edit(func(r *plan.Rule) { r.Verdict = "" }),
		"metadata address": edit(func(r *plan.Rule) { r.Addresses = []string{"169.254.169.254"} }),
		"address form":     edit(func(r *plan.Rule) { r.Addresses = []string{"FD00::1"} }),
		"address name":     edit(func(r *plan.Rule) { r.Addresses = []string{"b.example"} }),
		"inspect ssh":      edit(func(r *plan.Rule) { r.Protocol, r.Inspect = "ssh", true }),
		"inspect cidr":     edit(func(r *plan.Rule) { r.Host, r.CIDR, r.Class, r.Inspect = "", "8.8.8.8/32", "ipv4", true }),
		"addresses on cidr": edit(func(r *plan.Rule) {
			r.Host, r.CIDR, r.Class, r.Addresses = "", "8.8.8.8/32", "ipv4", []string{"10.0.0.1"}
		}),
		"deny with protocol": edit(func(r *plan.Rule) { r.Verdict = "deny" }),
	} {
		_, err := Compile([]plan.Rule{good, r})
		f := fault.As(err)
		if f == nil || f.Exit != fault.Data || !strings.Contains(f.Where, "egress.rules[1]") {
			t.Errorf("%s: %v, want 65 at egress.rules[1]", name, err)
		}
	}
}

func TestCompileRefusesContradictions(t *testing.T) {
	a, b := rule(t, "a.example@22,443"), rule(t, "ssh a.example@22")
	if _, err := Compile([]plan.Rule{a, b}); fault.As(err) == nil || fault.As(err).Code != "conflicting_rules" {
		t.Errorf("tls and ssh on one port: %v", err)
	}
	b.Ports = []int{2222}
	if _, err := Compile([]plan.Rule{a, b}); err != nil {
		t.Errorf("different ports: %v", err)
	}
	c := a
	c.Addresses = []string{"127.0.0.1"}
	if _, err := Compile([]plan.Rule{a, c}); err == nil {
		t.Error("pinned and unpinned on one port passed")
	}
	if _, err := Compile([]plan.Rule{a, a}); err != nil {
		t.Errorf("the same rule twice: %v", err)
	}
}

func TestMatcherCheckAddrDenies(t *testing.T) {
	m := compile(t, "a.example", "!203.0.0.0/8", "!10.0.0.0/8@443")
	r := m.Decide("a.example", 443).Rule
	for ip, want := range map[string]string{
		"8.8.8.8":            "",
		"203.1.2.3":          DeniedByRule,
		"::ffff:203.1.2.3":   DeniedByRule,
		"64:ff9b::cb01:203":  DeniedByRule,
		"2002:cb01:203::1":   DeniedByRule,
		"10.0.0.1":           DeniedByRule,
		"169.254.169.254":    "metadata_address",
		"2606:4700:4700::64": "",
	} {
		err := m.CheckAddr(r, netip.MustParseAddr(ip), 443, nil)
		if code := codeOf(err); code != want {
			t.Errorf("CheckAddr(%s) = %q, want %q", ip, code, want)
		}
	}
}

func codeOf(err error) string {
	if err == nil {
		return ""
	}
	return fault.As(err).Code
}

func FuzzDecide(f *testing.F) {
	for _, s := range []string{"a.example", "x.b.example", "b.example", "A.EXAMPLE.", "10.0.0.1", "0x0a000001", "::ffff:10.0.0.1", "a.example\x00"} {
		f.Add(s)
	}
	m := compile(f, "a.example", "*.b.example", "10.0.0.0/8")
	f.Fuzz(func(t *testing.T, host string) {
		d := m.Decide(host, 443)
		if !d.Allow {
			return
		}
		h := strings.ToLower(strings.TrimSuffix(host, "."))
		ip, err := netip.ParseAddr(h)
		in := err == nil && netip.MustParsePrefix("10.0.0.0/8").Contains(ip)
		if !in && h != "a.example" && !(strings.HasSuffix(h, ".b.example") && len(h) > len(".b.example")) {
			t.Fatalf("Decide(%q) allows", host)
		}
	})
}

func manyRules(n int) []plan.Rule {
	rules := make([]plan.Rule, n)
	for i := range rules {
		rules[i] = plan.Rule{Host: fmt.Sprintf("h%d.example%d.com", i, i%1000), Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: ClassExact, From: "bench"}
		if i%3 == 1 {
			rules[i].Host, rules[i].Class = "*."+rules[i].Host, ClassWildcard
		}
		if i%3 == 2 {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{20, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
			rules[i].Host, rules[i].CIDR, rules[i].Class = "", p.String(), ClassIPv4
		}
	}
	return rules
}

// A decision among 100,000 rules stays far below 0.1 ms; the bound is loose
// enough for a busy machine, and tight enough to see a linear scan.
func TestDecideIsFast(t *testing.T) {
	m, err := Compile(manyRules(100_000))
	if err != nil {
		t.Fatal(err)
	}
	var took []time.Duration
	for i := range 1001 {
		start := time.Now()
		m.Decide(fmt.Sprintf("a.b.c.h%d.example%d.com", i*97, i%1000), 443)
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	if median := took[len(took)/2]; median > 100*time.Microsecond {
		t.Errorf("a decision takes %s", median)
	}
}

func BenchmarkDecide100k(b *testing.B) {
	m, err := Compile(manyRules(100_000))
	if err != nil {
		b.Fatal(err)
	}
	hosts := []string{"h300.example300.com", "x.y.z.h301.example301.com", "no.such.host.test", "20.0.1.46", strings.Repeat("a.", 115) + "test"}
	for _, h := range hosts {
		name := h
		if len(name) > 40 {
			name = "117 labels"
		}
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				m.Decide(h, 443)
			}
		})
	}
}

func BenchmarkCompile100k(b *testing.B) {
	rules := manyRules(100_000)
	for b.Loop() {
		if _, err := Compile(rules); err != nil {
			b.Fatal(err)
		}
	}
}

// An entry that a hint gives, put into the manifest as it stands, opens what was
// refused, for the protocol that was spoken.
func TestHintsWorkAsTheyStand(t *testing.T) {
	rules := []plan.Rule{
		{Host: "known.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: ClassExact, From: "x"},
		{Host: "local.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: ClassExact, From: "x", Addresses: []string{"127.0.0.1"}},
		{Host: "*.wild.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: ClassWildcard, From: "x"},
		{CIDR: "10.0.0.0/8", Ports: []int{22}, Protocol: "ssh", Verdict: "allow", Class: ClassPrivate, From: "x"},
	}
	entry := regexp.MustCompile(`add ("[^"]*"|\{.*\}) to egress\.allow in the manifest$`)
	for _, tt := range []struct {
		host           string
		port           int
		spoken, wanted string
	}{
		{"new.test", 443, "", "tls"},
		{"new.test", 443, "http", "http"},
		{"new.test", 80, "http", "http"},
		{"new.test", 80, "", "http"},
		{"new.test", 8080, "http", "http"},
		{"new.test", 8443, "", "tls"},
		{"new.test", 22, "", "ssh"},
		{"known.test", 80, "http", "http"},
		{"known.test", 8443, "", "tls"},
		{"known.test", 22, "", "ssh"},
		{"local.test", 8443, "", "tls"},
		{"local.test", 8080, "http", "http"},
		{"x.wild.test", 80, "http", "http"},
		{"wild.test", 443, "", "tls"},
		{"wild.test", 80, "http", "http"},
		{"192.0.2.1", 443, "", "tls"},
		{"8.8.8.8", 53, "", "tls"},
		{"10.1.2.3", 80, "http", "http"},
		{"10.1.2.3", 2222, "", "ssh"},
		{"::1", 8080, "http", "http"},
		{"2001:db8::1", 22, "", "ssh"},
	} {
		m, err := Compile(rules)
		if err != nil {
			t.Fatal(err)
		}
		d := m.DecideAs(tt.host, tt.port, tt.spoken)
		found := entry.FindStringSubmatch(d.Hint)
		if d.Allow || found == nil {
			t.Errorf("%s:%d %s: %+v", tt.host, tt.port, tt.spoken, d)
			continue
		}
		r := plan.Rule{Ports: []int{443}, Protocol: "tls", Verdict: "allow", From: "hint"}
		if text := []byte(found[1]); text[0] == '{' {
			err = json.Unmarshal(text, &r)
		} else {
			err = json.Unmarshal(text, &r.Host)
		}
		e, nerr := Normalize(r.Host + r.CIDR)
		if err != nil || nerr != nil {
			t.Errorf("%s: %v %v", found[1], err, nerr)
			continue
		}
		r.Host, r.CIDR, r.Class = e.Host, e.CIDR(), e.Class
		if m, err = Compile(append(slices.Clone(rules), r)); err != nil {
			t.Errorf("%s: %v", found[1], err)
			continue
		}
		d = m.Decide(tt.host, tt.port)
		if !d.Allow || d.Rule.Protocol != tt.wanted {
			t.Errorf("%s:%d %s: %s gives %+v", tt.host, tt.port, tt.spoken, found[1], d)
		}
		for _, a := range []string{"127.0.0.1", tt.host} {
			if ip, err := netip.ParseAddr(a); err == nil && (a == tt.host || tt.host == "local.test") {
				if err := m.CheckAddr(d.Rule, ip, tt.port, nil); err != nil {
					t.Errorf("%s:%d: %s does not open %s: %v", tt.host, tt.port, found[1], ip, err)
				}
			}
		}
	}
	m, _ := Compile(rules)
	for _, host := range []string{"169.254.169.254", "0.0.0.0", "localhost", "2002:7f00:1::", "64:ff9b::a9fe:a9fe"} {
		if d := m.Decide(host, 80); d.Allow || d.Hint == "" || entry.MatchString(d.Hint) {
			t.Errorf("%s cannot be opened, and the hint says: %s", host, d.Hint)
		}
	}
}
