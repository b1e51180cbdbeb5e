package policy

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/plan"
)

// Effects of a change.
const (
	Narrows = "narrows" // nothing becomes possible that was not
	Same    = "same"
	Widens  = "widens" // something does, or it cannot be told
)

// Worse gives the effect of two changes together.
func Worse(a, b string) string {
	if slices.Index(effects, a) > slices.Index(effects, b) {
		return a
	}
	return b
}

var effects = []string{Same, Narrows, Widens}

// Change is a set of requests that two policies answer, or treat, differently.
type Change struct {
	// Host is a name; "*.x" for all names below x that are named nowhere; or a
	// range, for its addresses that are in no smaller one.
	Host  string `json:"host"`
	Ports []int  `json:"ports"`
	// Resolved tells that it is about the addresses of names, and not about
	// requests for an address.
	Resolved bool      `json:"-"`
	Before   Treatment `json:"before"`
	After    Treatment `json:"after"`
	Effect   string    `json:"-"` // Narrows | Widens
	Why      string    `json:"-"`
}

// Treatment is how one policy treats a set of requests.
type Treatment struct {
	Verdict   string   `json:"verdict"`        // allow | deny
	Code      string   `json:"code,omitempty"` // of a denial
	Protocol  string   `json:"protocol,omitempty"`
	Inspected bool     `json:"inspected,omitzero"`
	Addresses []string `json:"addresses,omitempty"`
	Requests  []string `json:"requests,omitempty"`
	DLPAllow  []string `json:"dlp_allow,omitempty"`
	From      string   `json:"from,omitempty"` // of the rule
}

// Compare finds what policy b answers differently from policy a. It is exact:
// the rules cut names, ports and addresses into finitely many sets in which all
// requests are answered alike, and one of each is put to both by Decide. What
// the gate does behind that answer (protocol, inspection, requests, addresses)
// is compared as well; what cannot be told counts as wider. Errors are those of
// Compile.
func Compare(a, b *plan.Bottle) ([]Change, error) {
	c := comparison{a: side{bottle: a}, b: side{bottle: b}}
	for _, s := range []*side{&c.a, &c.b} {
		var err error
		if s.m, err = Compile(s.bottle.Egress.Rules); err != nil {
			return nil, err
		}
	}
	c.names()
	c.addresses()
	return c.changes, nil
}

type side struct {
	bottle *plan.Bottle
	m      *Matcher
}

type comparison struct {
	a, b    side
	changes []Change
}

// names compares the answers for names.
func (c *comparison) names() {
	named, below := map[string]bool{}, map[string]bool{}
	for _, s := range []*side{&c.a, &c.b} {
		for i := range s.m.rules {
			host := s.m.rules[i].Host
			if base, wild := strings.CutPrefix(host, "*."); wild {
				below[base], named[base] = true, true
			} else if host != "" {
				named[host] = true
			}
		}
		for _, secret := range s.bottle.Secrets {
			for _, in := range secret.Inject {
				named[in.Host] = true
			}
		}
	}
	for _, name := range sortedKeys(named) {
		c.host(name, name)
	}
	for _, base := range sortedKeys(below) {
		if name := unnamed(base, named); name != "" {
			c.host("*."+base, name)
		}
	}
}

// unnamed gives a name directly below base that stands in no rule, "" if there
// is no room for one.
func unnamed(base string, named map[string]bool) string {
	for i := 0; ; i++ {
		label := ""
		for n := i; ; n = n/36 - 1 {
			label = string("abcdefghijklmnopqrstuvwxyz0123456789"[n%36]) + label
			if n < 36 {
				break
			}
		}
		name := label + "." + base
		switch {
		case len(name) > maxName:
			return ""
		case !named[name]:
			return name
		}
	}
}

func sortedKeys(m map[string]bool) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// host compares what is answered to requests for name, which stands for all that
// is shown.
func (c *comparison) host(shown, name string) {
	var changes []Change
	for _, port := range c.portsOf(name, netip.Addr{}) {
		before, after := c.a.m.Decide(name, port), c.b.m.Decide(name, port)
		effect, why := c.weigh(name, before, after)
		changes = merge(changes, Change{Host: shown, Ports: []int{port}, Effect: effect, Why: why,
			Before: c.a.treatment(name, before), After: c.b.treatment(name, after)})
	}
	c.changes = append(c.changes, changes...)
}

// merge adds a change, to the ports of another one that is the same otherwise.
func merge(list []Change, ch Change) []Change {
	if ch.Effect == Same {
		return list
	}
	for i := range list {
		o := list[i]
		o.Ports = ch.Ports
		if reflect.DeepEqual(o, ch) {
			list[i].Ports = append(list[i].Ports, ch.Ports...)
			return list
		}
	}
	return append(list, ch)
}

// portsOf are the ports on which one of the two allows name or ip. On all others
// both deny: an allow rule names its ports.
func (c *comparison) portsOf(name string, ip netip.Addr) []int {
	var ports []int
	for _, s := range []*side{&c.a, &c.b} {
		s.m.covers(&s.m.allow, name, ip, func(i int32) { ports = append(ports, s.m.rules[i].Ports...) })
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// covers goes through the rules of t about a name or an address, whatever their
// ports.
func (m *Matcher) covers(t *table, name string, ip netip.Addr, do func(int32)) {
	chain := func(i int32, ok bool) {
		for ; ok && i >= 0; i = t.next[i] {
			do(i)
		}
	}
	if ip.IsValid() {
		bits := t.bits6
		if ip.Is4() {
			bits = t.bits4
		}
		for _, b := range bits {
			p, _ := ip.Prefix(b)
			i, ok := t.prefix[p]
			chain(i, ok)
		}
		return
	}
	i, ok := t.exact[name]
	chain(i, ok)
	for _, below, more := strings.Cut(name, "."); more; _, below, more = strings.Cut(below, ".") {
		i, ok := t.wildcard[below]
		chain(i, ok)
	}
}

func (s *side) treatment(host string, d Decision) Treatment {
	t := Treatment{Verdict: "deny", Code: d.Code}
	if d.Rule != nil && (d.Allow || d.Code == DeniedByRule) {
		t.From = d.Rule.From
	}
	if d.Allow {
		t.Verdict, t.Code, t.Protocol = "allow", "", d.Rule.Protocol
		t.Inspected = Inspected(d.Rule, host, s.bottle.Secrets)
		t.Addresses, t.Requests, t.DLPAllow = d.Rule.Addresses, d.Rule.Requests, d.Rule.DLPAllow
	}
	return t
}

// weigh compares two decisions about the same requests.
func (c *comparison) weigh(host string, before, after Decision) (effect, why string) {
	switch {
	case !before.Allow && !after.Allow:
		return Same, ""
	case !before.Allow:
		return Widens, "it was denied"
	case !after.Allow:
		return Narrows, ""
	}
	down := c.wider(&c.a, &c.b, host, before.Rule, after.Rule)
	if down != "" {
		return Widens, down
	}
	if c.wider(&c.b, &c.a, host, after.Rule, before.Rule) != "" {
		return Narrows, ""
	}
	return Same, ""
}

// wider says in what y lets more through than x does under its own rule, or
// nothing. The deny rules about addresses to which a name resolves are not part
// of it.
func (c *comparison) wider(x, y *side, host string, rx, ry *plan.Rule) string {
	ix, iy := Inspected(rx, host, x.bottle.Secrets), Inspected(ry, host, y.bottle.Secrets)
	switch {
	case rx.Protocol != ry.Protocol && rx.Protocol != "tcp":
		return fmt.Sprintf("protocol %s lets other things through than %s", ry.Protocol, rx.Protocol)
	case ix && !iy:
		return "it is not inspected any more: what was read leaves unseen"
	case !ix && iy && y.bottle.Egress.Mitmdump != nil:
		return "it is inspected now, and so read and changed by the addons of mitmdump"
	}
	if why := moreRequests(rx, ry); why != "" {
		return why
	}
	if why := moreDLP(rx, ry); why != "" {
		return why
	}
	if why := moreAddresses(x.m, y.m, rx, ry); why != "" {
		return why
	}
	if differsElsewhere(rx, ry) {
		return "the rules differ in members that cannot be compared"
	}
	return ""
}

// moreRequests says that a request passes ry and perhaps not rx.
func moreRequests(rx, ry *plan.Rule) string {
	if len(rx.Requests) == 0 {
		return ""
	}
	if len(ry.Requests) == 0 {
		return "every request is allowed, and only some were"
	}
	for _, y := range ry.Requests {
		if !slices.ContainsFunc(rx.Requests, func(x string) bool { return coversRequest(x, y) }) {
			return fmt.Sprintf("request %q was not allowed", y)
		}
	}
	return ""
}

// coversRequest tells if entry x of a rule's requests allows all that entry y
// does.
func coversRequest(x, y string) bool {
	xm, xp, _ := strings.Cut(x, " ")
	ym, yp, _ := strings.Cut(y, " ")
	if xm != ym && xm != "*" && (xm != "GET" || ym != "HEAD") {
		return false
	}
	if yp == "/*" {
		return xp == "/*" // which lets ambiguous paths through as well
	}
	for {
		xs, xRest, xMore := strings.Cut(xp, "/")
		if xs == "*" && !xMore {
			return true
		}
		ys, yRest, yMore := strings.Cut(yp, "/")
		switch {
		case ys == "*" && !yMore, xMore != yMore:
			return false
		case isWildcard(xs):
			if ys == "" {
				return false
			}
		case xs != ys || isWildcard(ys):
			return false
		}
		if !xMore {
			return true
		}
		xp, yp = xRest, yRest
	}
}

// moreAddresses says that ry leads to an address to which rx does not.
func moreAddresses(mx, my *Matcher, rx, ry *plan.Rule) string {
	switch {
	case ry.Host == "":
		if single(ry) && !single(rx) {
			return ry.CIDR + " by itself is opened even where it is the host's own address, which a range does not open"
		}
		return ""
	case len(ry.Addresses) == 0 && len(rx.Addresses) == 0:
		return ""
	case len(ry.Addresses) == 0:
		return "the name is resolved, and led to " + strings.Join(rx.Addresses, ", ") + " alone"
	case len(rx.Addresses) == 0:
		return "it leads to " + strings.Join(ry.Addresses, ", ") + " whatever the name resolves to, even if that is the host's own"
	}
	for _, port := range ry.Ports {
		// One address that may not be dialled refuses them all.
		if !slices.Contains(rx.Ports, port) || !pinsPass(my, ry, port) {
			continue
		}
		if !pinsPass(mx, rx, port) {
			return "its addresses could not be dialled"
		}
		for _, a := range ry.Addresses {
			if !slices.Contains(rx.Addresses, a) {
				return "it did not lead to " + a
			}
		}
	}
	return ""
}

func pinsPass(m *Matcher, r *plan.Rule, port int) bool {
	for _, ip := range KnownAddresses(r, r.Host) {
		if m.CheckAddr(r, ip, port, nil) != nil {
			return false
		}
	}
	return true
}

// single tells that a rule names one address that may be the host's own and is
// opened by that.
func single(r *plan.Rule) bool {
	p, err := netip.ParsePrefix(r.CIDR)
	return err == nil && p.IsSingleIP() && !p.Addr().IsLoopback()
}

// compared are the members of a rule that Compare knows. A new one that it does
// not know makes two rules that differ in it incomparable.
var compared = []string{"Host", "CIDR", "Ports", "Protocol", "Verdict", "Class", "Addresses", "Inspect", "Requests", "RequestsFrom", "DLPAllow", "DLPAllowFrom", "Why", "From"}

func differsElsewhere(a, b *plan.Rule) bool {
	x, y := reflect.ValueOf(a).Elem(), reflect.ValueOf(b).Elem()
	for i := range x.NumField() {
		if !slices.Contains(compared, x.Type().Field(i).Name) && !reflect.DeepEqual(x.Field(i).Interface(), y.Field(i).Interface()) {
			return true
		}
	}
	return false
}

// addresses compares the answers for addresses, asked for and resolved to.
func (c *comparison) addresses() {
	prefixes := borders()
	for _, s := range []*side{&c.a, &c.b} {
		for i := range s.m.rules {
			if p, err := netip.ParsePrefix(s.m.rules[i].CIDR); err == nil {
				prefixes = append(prefixes, p)
			}
		}
	}
	before, after := c.a.resolving(), c.b.resolving()
	for _, r := range regions(prefixes) {
		c.region(r)
		c.resolved(r, before, after)
	}
}

// region compares what is answered to requests for the addresses of r.
func (c *comparison) region(r region) {
	var changes []Change
	for _, port := range c.portsOf("", r.sample) {
		before, after := c.a.at(r.sample, port), c.b.at(r.sample, port)
		effect, why := c.weigh("", before, after)
		changes = merge(changes, Change{Host: r.prefix.String(), Ports: []int{port}, Effect: effect, Why: why,
			Before: c.a.treatment("", before), After: c.b.treatment("", after)})
	}
	c.changes = append(c.changes, changes...)
}

// at is Decide for the address of a region, with what CheckAddr says of all of
// it. What its addresses carry is left to the deny rules about that.
func (s *side) at(ip netip.Addr, port int) Decision {
	d := s.m.Decide(ip.String(), port)
	if d.Allow {
		if sp := specialOf(ip); neverReachable(ip) != nil || sp != nil && !names(d.Rule, ip, sp.code) {
			d.Allow, d.Code = false, AddressNotAllowed
		}
	}
	return d
}

// resolving are the ports on which an address counts that nobody asked for:
// names resolve to it, or an IPv6 address of an open range carries it.
func (s *side) resolving() []int {
	var ports []int
	for i := range s.m.rules {
		r := &s.m.rules[i]
		if r.Verdict == "allow" && (r.Host != "" && len(r.Addresses) == 0 || strings.Contains(r.CIDR, ":")) {
			ports = append(ports, r.Ports...)
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// resolved compares the deny rules about the addresses of r, as far as a name
// may lead there: not into blocks that only a rule's own address opens.
func (c *comparison) resolved(r region, before, after []int) {
	if specialOf(r.sample) != nil || neverReachable(r.sample) != nil {
		return
	}
	var changes []Change
	for _, port := range before {
		if !slices.Contains(after, port) {
			continue // what is new or gone on this port has been told by name
		}
		x, _ := c.a.m.find(&c.a.m.deny, "", r.sample, port)
		y, _ := c.b.m.find(&c.b.m.deny, "", r.sample, port)
		ch := Change{Host: r.prefix.String(), Ports: []int{port}, Resolved: true, Effect: Same,
			Before: c.a.denial(x), After: c.b.denial(y)}
		switch {
		case x >= 0 && y < 0:
			ch.Effect, ch.Why = Widens, "names that resolve there were refused"
		case x < 0 && y >= 0:
			ch.Effect = Narrows
		}
		changes = merge(changes, ch)
	}
	c.changes = append(c.changes, changes...)
}

func (s *side) denial(i int) Treatment {
	if i < 0 {
		return Treatment{Verdict: "allow"}
	}
	return Treatment{Verdict: "deny", Code: DeniedByRule, From: s.m.rules[i].From}
}
