package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
)

// policyOf makes a policy of rules as rule reads them; "inspect host" marks the
// rules of that host, "pin host=a,b" pins them, "only host=GET /x" limits them.
func policyOf(t testing.TB, entries ...string) *plan.Bottle {
	t.Helper()
	b := &plan.Bottle{}
	for _, s := range entries {
		word, rest, _ := strings.Cut(s, " ")
		host, value, _ := strings.Cut(rest, "=")
		switch word {
		case "inspect", "pin", "only":
			found := false
			for i := range b.Egress.Rules {
				r := &b.Egress.Rules[i]
				if r.Host != host || r.Verdict != "allow" {
					continue
				}
				found = true
				switch word {
				case "inspect":
					r.Inspect = true
				case "pin":
					r.Addresses = strings.Split(value, ",")
				case "only":
					r.Requests, r.RequestsFrom = append(r.Requests, value), "test"
				}
			}
			if !found {
				t.Fatalf("%s: no such rule", s)
			}
		default:
			b.Egress.Rules = append(b.Egress.Rules, rule(t, s))
		}
	}
	return b
}

func TestCompare(t *testing.T) {
	type l = []string
	for _, tt := range []struct {
		name string
		a, b l
		want l // "effect host@ports", in order
	}{
		{"nothing", l{"a.test"}, l{"a.test"}, nil},
		{"in another order and twice", l{"a.test", "b.test@443,8443"}, l{"b.test@8443", "a.test", "b.test@443"}, nil},
		{"a new host", l{"a.test"}, l{"a.test", "b.test"}, l{"widens b.test@443"}},
		{"a host less", l{"a.test", "b.test"}, l{"a.test"}, l{"narrows b.test@443"}},
		{"a new port", l{"a.test"}, l{"a.test@443,8443"}, l{"widens a.test@8443"}},
		{"a wildcard for a host below it", l{"a.example.test"}, l{"*.example.test"}, l{"widens *.example.test@443"}},
		{"a host in place of its wildcard", l{"*.example.test"}, l{"a.example.test"}, l{"narrows *.example.test@443"}},
		{"the apex in place of the wildcard", l{"*.example.test"}, l{"example.test"}, l{"widens example.test@443", "narrows *.example.test@443"}},
		{"a longer wildcard", l{"*.example.test"}, l{"*.a.example.test"}, l{"narrows a.example.test@443", "narrows *.example.test@443"}},
		{"what the wildcard has anyway", l{"*.example.test"}, l{"*.example.test", "a.example.test"}, nil},
		{"deny dropped", l{"*.example.test", "!a.example.test"}, l{"*.example.test"}, l{"widens a.example.test@443"}},
		{"deny of what is closed anyway dropped", l{"a.test", "!b.test"}, l{"a.test"}, nil},
		{"a new deny", l{"*.example.test"}, l{"*.example.test", "!*.a.example.test"}, l{"narrows *.a.example.test@443"}},
		{"deny on one port only", l{"a.test", "!a.test"}, l{"a.test", "!a.test@80"}, l{"widens a.test@443"}},
		{"http for tls", l{"a.test@443"}, l{"http a.test@443"}, l{"widens a.test@443"}},
		{"tls for http", l{"http a.test@80"}, l{"a.test@80"}, l{"widens a.test@80"}},
		{"tcp for tls", l{"a.test"}, l{"tcp a.test@443"}, l{"widens a.test@443"}},
		{"tls for tcp", l{"tcp a.test@443"}, l{"a.test"}, l{"narrows a.test@443"}},
		{"ssh for tcp", l{"tcp a.test@22"}, l{"ssh a.test@22"}, l{"narrows a.test@22"}},
		{"inspect dropped", l{"a.test", "inspect a.test"}, l{"a.test"}, l{"widens a.test@443"}},
		{"inspect added", l{"a.test"}, l{"a.test", "inspect a.test"}, l{"narrows a.test@443"}},
		{"an exact host that its wildcard inspects", l{"*.x.test", "inspect *.x.test"}, l{"*.x.test", "inspect *.x.test", "a.x.test"}, l{"widens a.x.test@443"}},
		{"range in range", l{"10.0.0.0/8"}, l{"10.1.0.0/16"}, l{"narrows 10.0.0.0/8@443"}},
		{"range around range", l{"10.1.0.0/16"}, l{"10.0.0.0/8"}, l{"widens 10.0.0.0/8@443"}},
		{"range in halves", l{"10.0.0.0/8"}, l{"10.0.0.0/9", "10.128.0.0/9"}, nil},
		{"one address of a range, which may be the host's own", l{"10.0.0.0/8"}, l{"10.1.2.3"}, l{"narrows 10.0.0.0/8@443", "widens 10.1.2.3/32@443"}},
		{"one loopback address of a range", l{"127.0.0.0/8"}, l{"127.0.0.1"}, l{"narrows 127.0.0.0/8@443"}},
		{"a public range does not open what is private in it", l{"192.0.0.0/8"}, l{"192.0.0.0/8", "192.168.0.0/16"}, l{"widens 192.168.0.0/16@443"}},
		{"nor does a private range in it narrow", l{"192.0.0.0/8", "192.168.0.0/16"}, l{"192.0.0.0/8"}, l{"narrows 192.168.0.0/16@443"}},
		{"denied addresses of names", l{"a.test", "!8.8.8.0/24"}, l{"a.test"}, l{"widens 8.8.8.0/24@443"}},
		{"denied private addresses of names, which are closed anyway", l{"a.test", "!10.0.0.0/8"}, l{"a.test"}, nil},
		{"denied addresses without names", l{"10.1.0.0/16", "!8.8.8.0/24"}, l{"10.1.0.0/16"}, nil},
		{"a smaller deny of addresses", l{"a.test", "!8.8.0.0/16"}, l{"a.test", "!8.8.8.0/24"}, l{"widens 8.8.0.0/16@443"}},
		{"denied what IPv6 carries", l{"2a00::/32", "!8.8.8.0/24"}, l{"2a00::/32"}, l{"widens 8.8.8.0/24@443"}},
		{"a deny in NAT64", l{"a.test", "!64:ff9b::/96"}, l{"a.test"}, l{"widens 64:ff9b::/96@443"}},
		{"a pin", l{"a.test"}, l{"a.test", "pin a.test=8.8.8.8"}, l{"widens a.test@443"}},
		{"no pin", l{"a.test", "pin a.test=10.0.0.1"}, l{"a.test"}, l{"widens a.test@443"}},
		{"a pin less", l{"a.test", "pin a.test=10.0.0.1,10.0.0.2"}, l{"a.test", "pin a.test=10.0.0.1"}, l{"narrows a.test@443"}},
		{"a pin more", l{"a.test", "pin a.test=10.0.0.1"}, l{"a.test", "pin a.test=10.0.0.1,10.0.0.2"}, l{"widens a.test@443"}},
		{"a pin that was denied", l{"a.test", "pin a.test=10.0.0.1", "!10.0.0.0/8"}, l{"a.test", "pin a.test=10.0.0.1"}, l{"widens a.test@443"}},
		{"a pin that is denied", l{"a.test", "pin a.test=10.0.0.1"}, l{"a.test", "pin a.test=10.0.0.1", "!10.0.0.0/8"}, l{"narrows a.test@443"}},
		{"requests less", l{"http a.test@80", "only a.test=GET /*"}, l{"http a.test@80", "only a.test=GET /x"}, l{"narrows a.test@80"}},
		{"requests more", l{"http a.test@80", "only a.test=GET /x"}, l{"http a.test@80", "only a.test=GET /*"}, l{"widens a.test@80"}},
		{"requests dropped", l{"http a.test@80", "only a.test=GET /x"}, l{"http a.test@80"}, l{"widens a.test@80"}},
		{"requests new", l{"http a.test@80"}, l{"http a.test@80", "only a.test=GET /x"}, l{"narrows a.test@80"}},
		{"all of them", l{}, l{"a.test", "10.0.0.0/8", "*.b.test"}, l{"widens a.test@443", "widens *.b.test@443", "widens 10.0.0.0/8@443"}},
	} {
		changes, err := Compare(policyOf(t, tt.a...), policyOf(t, tt.b...))
		if err != nil {
			t.Fatal(err)
		}
		var got l
		for _, c := range changes {
			got = append(got, fmt.Sprintf("%s %s@%s", c.Effect, c.Host, strings.Trim(strings.ReplaceAll(fmt.Sprint(c.Ports), " ", ","), "[]")))
			if c.Effect == Widens && c.Why == "" {
				t.Errorf("%s: no word about why: %+v", tt.name, c)
			}
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// A secret makes a host inspected, whatever its rule says.
func TestCompareSecrets(t *testing.T) {
	a, b := policyOf(t, "*.x.test"), policyOf(t, "*.x.test")
	a.Secrets = []plan.Secret{{Name: "K", Inject: []plan.Injection{{Host: "a.x.test", Header: "k"}}}}
	for _, tt := range []struct {
		a, b *plan.Bottle
		want string
	}{{a, b, Widens}, {b, a, Narrows}} {
		changes, err := Compare(tt.a, tt.b)
		if err != nil || len(changes) != 1 || changes[0].Host != "a.x.test" || changes[0].Effect != tt.want {
			t.Errorf("%+v %v, want %s", changes, err, tt.want)
		}
	}
}

func TestCompareRefuses(t *testing.T) {
	good, bad := policyOf(t, "a.test"), policyOf(t, "a.test")
	bad.Egress.Rules[0].Class = "wildcard"
	for _, pair := range [][2]*plan.Bottle{{good, bad}, {bad, good}} {
		if _, err := Compare(pair[0], pair[1]); err == nil {
			t.Error("a bad rule was compared")
		}
	}
}

func TestRegions(t *testing.T) {
	var ps []netip.Prefix
	for _, s := range []string{"10.0.0.0/8", "10.0.0.0/9", "10.128.0.0/9", "10.0.0.0/24", "10.0.0.0/32", "255.255.255.255/32", "255.255.255.254/31", "::/0", "::/1", "8000::/1", "0.0.0.0/0"} {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	var got []string
	for _, r := range regions(ps) {
		got = append(got, fmt.Sprint(r.prefix, " ", r.sample))
	}
	want := []string{"0.0.0.0/0 0.0.0.0", "10.0.0.0/9 10.0.1.0", "10.0.0.0/24 10.0.0.1", "10.0.0.0/32 10.0.0.0", "10.128.0.0/9 10.128.0.0",
		"255.255.255.254/31 255.255.255.254", "255.255.255.255/32 255.255.255.255", "::/1 ::", "8000::/1 8000::"}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
}

func TestUnnamed(t *testing.T) {
	long := strings.Repeat("a.", 125) + "b" // 251 characters: room for one more
	for _, tt := range []struct {
		base  string
		named []string
		want  string
	}{
		{"test", nil, "a.test"},
		{"test", []string{"a.test", "b.test"}, "c.test"},
		{long, nil, "a." + long},
		{long + "cc", nil, ""},
	} {
		named := map[string]bool{}
		for _, n := range tt.named {
			named[n] = true
		}
		if got := unnamed(tt.base, named); got != tt.want {
			t.Errorf("%.20s: %q, want %q", tt.base, got, tt.want)
		}
	}
	full := map[string]bool{}
	for _, c := range "abcdefghijklmnopqrstuvwxyz0123456789" {
		full[string(c)+"."+long] = true
	}
	if got := unnamed(long, full); got != "" {
		t.Errorf("%q is no name that fits", got)
	}
}

// entries of requests and what they let through: if one covers another, then
// nothing passes the other alone.
func TestCoversRequest(t *testing.T) {
	entries := []string{"GET /*", "* /*", "GET /a", "GET /a/*", "GET /a/*/c", "GET /a/{x}", "GET /a/", "POST /a/*", "HEAD /a", "GET /a/b/c", "* /a/{x}/c", "GET /"}
	paths := []string{"/", "/a", "/a/", "/a/b", "/a/b/c", "/a//c", "/a/../b", "/b", "/a/b/"}
	covered := 0
	for _, x := range entries {
		for _, y := range entries {
			rx := &plan.Rule{Protocol: "http", Requests: []string{x}}
			ry := &plan.Rule{Protocol: "http", Requests: []string{y}}
			covers := coversRequest(x, y)
			if x == y && !covers {
				t.Errorf("%q does not cover itself", x)
			}
			if covers && x != y {
				covered++
			}
			for _, method := range []string{"GET", "HEAD", "POST"} {
				for _, p := range paths {
					if covers && DecideRequest(ry, method, p).Allow && !DecideRequest(rx, method, p).Allow {
						t.Errorf("%q is said to cover %q, and %s %s passes the second alone", x, y, method, p)
					}
				}
			}
		}
	}
	if covered < 15 {
		t.Errorf("%d pairs cover each other", covered)
	}
}

// world makes policies and requests from few names and addresses, so that they
// meet.
type world struct{ *rand.Rand }

func (w world) pick(of ...string) string { return of[w.IntN(len(of))] }

func (w world) name() string {
	n := w.pick("z.test", "y.test")
	for range w.IntN(4) {
		n = w.pick("a", "b", "c") + "." + n
	}
	return n
}

func (w world) address() string {
	return w.pick("10.0.0.1", "10.0.0.2", "10.1.0.1", "8.8.8.8", "8.8.4.4", "93.0.0.1", "127.0.0.1", "127.0.0.2", "169.254.169.254", "192.168.0.1",
		"192.1.1.1", "2a00::1", "2a00::5efe:808:808", "2a00::5efe:a00:1", "64:ff9b::808:808", "fd00::1", "168.63.129.16")
}

func (w world) prefix() string {
	return w.pick("10.0.0.0/8", "10.0.0.0/16", "10.1.0.0/16", "10.0.0.0/31", "8.0.0.0/8", "8.8.0.0/16", "8.8.8.8/32", "10.0.0.1/32", "127.0.0.0/8",
		"127.0.0.1/32", "192.0.0.0/8", "192.168.0.0/16", "2a00::/32", "2a00::5efe:808:808/128", "fd00::/16", "93.0.0.0/24", "10.0.0.2/32")
}

func (w world) policy(t *testing.T) *plan.Bottle {
	for {
		var list []string
		for range w.IntN(7) {
			s := w.name()
			switch w.IntN(4) {
			case 0:
				s = "*." + s
			case 1:
				s = w.prefix()
			}
			at := s + "@" + w.pick("80", "443", "22", "80,443")
			if w.IntN(3) == 0 {
				list = append(list, "!"+w.pick(s, at, w.pick("8.8.8.0/24", "64:ff9b::/96", "10.0.0.0/9", "0.0.0.0/1", "2a00::/16")))
				continue
			}
			list = append(list, w.pick("tls", "tls", "tls", "http", "ssh", "tcp")+" "+at)
			isName := !strings.Contains(s, "/")
			exact := isName && !strings.HasPrefix(s, "*")
			if exact && w.IntN(4) == 0 {
				pins := []string{w.address(), w.address()}
				slices.Sort(pins)
				if _, err := NormalizeAddress(pins[0]); err == nil {
					list = append(list, "pin "+s+"="+pins[0])
				}
			}
			if isName && w.IntN(4) == 0 {
				list = append(list, "inspect "+s)
			}
			if isName && w.IntN(4) == 0 {
				list = append(list, "only "+s+"="+w.pick("GET /*", "GET /a", "POST /a/*", "GET /a/{x}"))
			}
		}
		b := policyOf(t, list...)
		if w.IntN(4) == 0 && len(b.Egress.Rules) > 0 {
			b.Secrets = []plan.Secret{{Name: "K", Inject: []plan.Injection{{Host: w.name(), Header: "k"}}}}
		}
		if _, err := Compile(b.Egress.Rules); err == nil { // contradictions are refused
			return b
		}
	}
}

// mutate changes a policy a little, which is what a pull request does.
func (w world) mutate(t *testing.T, a *plan.Bottle) *plan.Bottle {
	for {
		b := &plan.Bottle{Secrets: a.Secrets}
		b.Egress.Rules = slices.Clone(a.Egress.Rules)
		if n := len(b.Egress.Rules); n > 0 {
			i := w.IntN(n)
			r := &b.Egress.Rules[i]
			switch w.IntN(7) {
			case 0:
				b.Egress.Rules = slices.Delete(b.Egress.Rules, i, i+1)
			case 1:
				r.Inspect = !r.Inspect
			case 2:
				r.Addresses = nil
			case 3:
				r.Addresses = []string{w.pick("10.0.0.1", "8.8.8.8", "93.0.0.1")}
			case 4:
				r.Protocol = w.pick(Protocols...)
			case 5:
				if r.CIDR != "" {
					*r = rule(t, w.pick("", "!")+w.prefix()+"@"+w.pick("80", "443"))
				}
			case 6:
				r.Requests, r.RequestsFrom = nil, ""
			}
		}
		if w.IntN(3) == 0 {
			b.Egress.Rules = append(b.Egress.Rules, w.policy(t).Egress.Rules...)
		}
		if _, err := Compile(b.Egress.Rules); err == nil {
			return b
		}
	}
}

// passes is the whole way of a connection through the gate: the decision, the
// check on each address that the rule pins or on the one that the name has.
func passes(b *plan.Bottle, m *Matcher, host string, port int, ip netip.Addr, local []netip.Addr) *plan.Rule {
	d := m.Decide(host, port)
	if !d.Allow {
		return nil
	}
	ips := KnownAddresses(d.Rule, host)
	if len(ips) == 0 {
		ips = []netip.Addr{ip}
	} else if !slices.Contains(ips, ip) {
		return nil
	}
	for _, a := range ips {
		if m.CheckAddr(d.Rule, a, port, local) != nil {
			return nil
		}
	}
	return d.Rule
}

// TestCompareHolds: where Compare says that nothing widens, no request passes
// policy b that does not pass policy a, and none passes less watched.
func TestCompareHolds(t *testing.T) {
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	w := world{rand.New(rand.NewPCG(seed, 2))}
	counts, passed := map[string]int{}, 0
	for range 3000 {
		a := w.policy(t)
		b := w.mutate(t, a)
		changes, err := Compare(a, b)
		if err != nil {
			t.Fatal(err)
		}
		total := Same
		for _, c := range changes {
			total = Worse(total, c.Effect)
		}
		counts[total]++
		ma, _ := Compile(a.Egress.Rules)
		mb, _ := Compile(b.Egress.Rules)
		for range 60 {
			host, ip := w.name(), netip.MustParseAddr(w.address())
			if w.IntN(3) == 0 {
				host = ip.String()
			}
			port := []int{22, 80, 443}[w.IntN(3)]
			if all := slices.Concat(a.Egress.Rules, b.Egress.Rules); len(all) > 0 && w.IntN(2) == 0 {
				// Where something may be open.
				r := all[w.IntN(len(all))]
				if host = strings.Replace(r.Host, "*", "b", 1); host == "" {
					ip = netip.MustParsePrefix(r.CIDR).Addr()
					if w.IntN(2) == 0 {
						ip = netip.MustParseAddr(w.address())
					}
					host = ip.String()
				}
				if len(r.Addresses) > 0 {
					ip = netip.MustParseAddr(r.Addresses[0])
				}
				if len(r.Ports) > 0 {
					port = r.Ports[0]
				}
			}
			var local []netip.Addr
			if w.IntN(2) == 0 {
				local = append(local, netip.MustParseAddr(w.address()), ip)
			}
			ra, rb := passes(a, ma, host, port, ip, local), passes(b, mb, host, port, ip, local)
			if rb != nil {
				passed++
			}
			method, path := w.pick("GET", "POST", "HEAD"), w.pick("/", "/a", "/a/b", "/a/b/c")
			wider := rb != nil && (ra == nil || ra.Protocol != rb.Protocol && ra.Protocol != "tcp" ||
				Inspected(ra, host, a.Secrets) && !Inspected(rb, host, b.Secrets) ||
				DecideRequest(rb, method, path).Allow && !DecideRequest(ra, method, path).Allow)
			if wider && total != Widens {
				t.Fatalf("%s, and yet %s port %d at %s (own: %v) passes the second alone\n%+v\n%+v\n%+v", total, host, port, ip, local, a.Egress.Rules, b.Egress.Rules, changes)
			}
			if total == Same && (ra == nil) != (rb == nil) {
				t.Fatalf("same, and yet %s port %d at %s is answered differently\n%+v\n%+v", host, port, ip, a.Egress.Rules, b.Egress.Rules)
			}
		}
		// The other way round: a host that is said to be newly open is.
		for _, c := range changes {
			if c.Resolved || c.Before.Verdict == c.After.Verdict || strings.ContainsAny(c.Host, "*/") {
				continue
			}
			if x, y := ma.Decide(c.Host, c.Ports[0]), mb.Decide(c.Host, c.Ports[0]); x.Allow == y.Allow || y.Allow != (c.Effect == Widens) {
				t.Fatalf("%+v: %+v %+v", c, x, y)
			}
		}
	}
	for _, effect := range effects {
		if counts[effect] < 100 {
			t.Errorf("%d of the pairs are %s: %v", counts[effect], effect, counts)
		}
	}
	if passed < 1000 {
		t.Errorf("only %d requests passed: the world is too large to say much", passed)
	}
}
