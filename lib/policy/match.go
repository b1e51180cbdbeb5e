package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Codes of a decision. They are stable: audit logs and answers to the guest
// hold them.
const (
	Allowed        = "allowed"
	NotInAllowlist = "not_in_allowlist"
	DeniedByRule   = "denied_by_rule"
	PortNotAllowed = "port_not_allowed"
	BadHost        = "bad_host"
	BadPort        = "bad_port"
)

// Decision is the answer to one request. Index and Rule tell which rule made
// it; -1 and nil if none did. With PortNotAllowed they tell a rule that has the
// host and not the port.
type Decision struct {
	Allow  bool
	Index  int
	Rule   *plan.Rule
	Code   string
	Reason string // one sentence, lower case, for people
	Hint   string // what would change the answer; empty if allowed
	// Live tells that Rule was added while the bottle runs (Overlay); Index
	// counts in the rules that were added then.
	Live bool
}

// Matcher answers for one list of rules. It does not change after Compile and
// may be used by many goroutines.
type Matcher struct {
	rules []plan.Rule
	allow table
	deny  table
}

// table finds the rules of one verdict. Rules that share a key are chained
// through next in the order of the document; -1 ends a chain.
type table struct {
	exact    map[string]int32
	wildcard map[string]int32 // key without "*."
	prefix   map[netip.Prefix]int32
	bits4    []int // lengths that prefix holds, longest first
	bits6    []int
	next     []int32
}

// Compile checks rules and makes them ready for Decide. The rules must not be
// changed afterwards. Since people edit documents, every rule is checked again:
// a fault (65) says which one is wrong, as egress.rules[N].
func Compile(rules []plan.Rule) (*Matcher, error) {
	m := &Matcher{rules: rules}
	m.allow.init(len(rules))
	m.deny.init(len(rules))
	// Backwards, so that chains run in the order of the document.
	for i := len(rules) - 1; i >= 0; i-- {
		r := &rules[i]
		e, err := checkRule(r)
		if err != nil {
			return nil, fault.As(err).At(fmt.Sprintf("egress.rules[%d]", i))
		}
		t := &m.allow
		if r.Verdict == "deny" {
			t = &m.deny
		}
		t.add(e, int32(i))
	}
	m.allow.sortBits()
	m.deny.sortBits()
	return m, m.checkConflicts()
}

func (t *table) init(n int) {
	t.exact = make(map[string]int32)
	t.wildcard = make(map[string]int32)
	t.prefix = make(map[netip.Prefix]int32)
	t.next = make([]int32, n)
}

func (t *table) add(e Entry, i int32) {
	t.next[i] = -1
	switch {
	case e.Host == "":
		if first, ok := t.prefix[e.Prefix]; ok {
			t.next[i] = first
		}
		t.prefix[e.Prefix] = i
	case e.Class == ClassWildcard:
		t.next[i] = push(t.wildcard, e.Host[2:], i)
	default:
		t.next[i] = push(t.exact, e.Host, i)
	}
}

func push(m map[string]int32, key string, i int32) (next int32) {
	next = -1
	if first, ok := m[key]; ok {
		next = first
	}
	m[key] = i
	return next
}

func (t *table) sortBits() {
	for p := range t.prefix {
		bits := &t.bits6
		if p.Addr().Is4() {
			bits = &t.bits4
		}
		if !slices.Contains(*bits, p.Bits()) {
			*bits = append(*bits, p.Bits())
		}
	}
	longest := func(a, b int) int { return b - a }
	slices.SortFunc(t.bits4, longest)
	slices.SortFunc(t.bits6, longest)
}

// MaxPerHost is how many allow rules may be about one host or range. Ports go
// into one rule; the bound keeps the comparison of rules from being quadratic.
const MaxPerHost = 100

// checkConflicts refuses two allow rules that have the same host and port and
// want different things: which one counts would be a matter of order.
func (m *Matcher) checkConflicts() error {
	for i := range m.rules {
		if m.rules[i].Verdict != "allow" {
			continue
		}
		n := 1
		for j := m.allow.next[i]; j >= 0; j = m.allow.next[j] {
			if n++; n > MaxPerHost {
				return fault.New(fault.Data, "too_many_rules", "more than %d rules are about one host", MaxPerHost).
					At(fmt.Sprintf("egress.rules[%d]", i)).WithHint("put the ports of a host into one rule")
			}
			if Conflict(&m.rules[i], &m.rules[j]) {
				return fault.New(fault.Data, "conflicting_rules", "contradicts egress.rules[%d] about the same host and port", i).
					At(fmt.Sprintf("egress.rules[%d]", j)).WithHint("keep one of the two")
			}
		}
	}
	return nil
}

// Conflict tells if two allow rules of one host have a port in common and treat
// it differently.
func Conflict(a, b *plan.Rule) bool {
	same := a.Protocol == b.Protocol && a.Inspect == b.Inspect && slices.Equal(a.Addresses, b.Addresses) &&
		slices.Equal(a.Requests, b.Requests) && slices.Equal(a.DLPAllow, b.DLPAllow)
	return !same && slices.ContainsFunc(a.Ports, func(p int) bool { return slices.Contains(b.Ports, p) })
}

// checkRule is the strict reading of one rule of a document.
func checkRule(r *plan.Rule) (Entry, error) {
	e, err := entryOf(r)
	if err != nil {
		return e, err
	}
	if e.Class != r.Class {
		return e, badRule("class is %q and has to be %q", r.Class, e.Class)
	}
	for _, p := range r.Ports {
		if err := CheckPort(p); err != nil {
			return e, err
		}
	}
	for _, a := range r.Addresses {
		ip, err := NormalizeAddress(a)
		if err != nil {
			return e, err
		}
		if ip.String() != a {
			return e, badRule("address %q has to be written %q", a, ip)
		}
	}
	if r.Verdict == "deny" {
		if r.Protocol != "any" || r.Inspect || len(r.Addresses) > 0 || len(r.Requests) > 0 || r.RequestsFrom != "" ||
			len(r.DLPAllow) > 0 || r.DLPAllowFrom != "" {
			return e, badRule("a deny rule has protocol \"any\", no addresses, no inspection, no requests and no dlp_allow")
		}
		return e, nil
	}
	return e, checkAllowRule(r, e)
}

func checkAllowRule(r *plan.Rule, e Entry) error {
	switch {
	case len(r.Ports) == 0:
		return badRule("an allow rule without ports allows nothing")
	case !slices.Contains(Protocols, r.Protocol):
		return badRule("protocol %q is unknown", r.Protocol).WithHint("it is one of %s", strings.Join(Protocols, ", "))
	case e.Host == "" && len(r.Addresses) > 0:
		return badRule("addresses pin a name; a rule with a cidr has none")
	case r.Inspect && (r.Protocol != "tls" || e.Host == ""):
		return badRule("only a tls rule with a host name can be inspected")
	}
	if err := checkDLP(r); err != nil {
		return err
	}
	return checkRequests(r)
}

// Protocols are the protocols of an allow rule.
var Protocols = []string{"tls", "http", "ssh", "tcp"}

func entryOf(r *plan.Rule) (Entry, error) {
	normalize := Normalize
	switch r.Verdict {
	case "allow":
	case "deny":
		normalize = NormalizeDeny
	default:
		return Entry{}, badRule("verdict %q is unknown", r.Verdict).WithHint("it is allow or deny")
	}
	if (r.Host == "") == (r.CIDR == "") {
		return Entry{}, badRule("a rule has either a host or a cidr")
	}
	e, err := normalize(r.Host + r.CIDR)
	if err != nil {
		return e, err
	}
	if e.Host != r.Host || e.CIDR() != r.CIDR {
		return e, badRule("%s has to be written %q", quote(r.Host+r.CIDR), e.Host+e.CIDR())
	}
	return e, nil
}

func badRule(format string, args ...any) *fault.Error {
	return fault.New(fault.Data, "bad_rule", format, args...)
}

// Decide answers for a host and a port as the client sent them. deny wins over
// allow, an exact host over a wildcard, a longer wildcard or range over a
// shorter one; what no rule names is denied. Nothing is resolved: a name is
// matched as a name and an address as an address.
//
// A host that has two readings (number forms of an address, IPv4 in IPv6, a
// zone, brackets, letters outside ASCII) is refused as BadHost.
func (m *Matcher) Decide(host string, port int) Decision { return m.DecideAs(host, port, "") }

// DecideAs is Decide for a client that is known to speak protocol, so that the
// hint is about it. The answer is the same.
func (m *Matcher) DecideAs(host string, port int, protocol string) Decision {
	q, bad := ask(host, port)
	if bad != nil {
		return *bad
	}
	if i, _ := m.find(&m.deny, q.name, q.ip, port); i >= 0 {
		return m.denied(i)
	}
	i, near := m.find(&m.allow, q.name, q.ip, port)
	if i >= 0 {
		return m.allowed(i)
	}
	return m.refused(q, near, protocol)
}

// question is a host and a port in the one reading that they have: a name or an
// address.
type question struct {
	name string
	ip   netip.Addr
	port int
}

// ask reads a host and a port as the client sent them, or gives the decision
// against what has no one reading.
func ask(host string, port int) (question, *Decision) {
	name, ip, f := parseHost(host)
	if f == nil && !ip.IsValid() && !isASCII(name) {
		f = badHost("%s is not ASCII", quote(host))
		if a, bad := toASCII(name); bad == nil {
			f = f.WithHint("ask for %s", a)
		}
	}
	if f != nil {
		return question{}, &Decision{Index: -1, Code: BadHost, Reason: f.Msg, Hint: f.Hint}
	}
	if err := CheckPort(port); err != nil {
		f := fault.As(err)
		return question{}, &Decision{Index: -1, Code: BadPort, Reason: f.Msg, Hint: f.Hint}
	}
	return question{name, ip, port}, nil
}

func (m *Matcher) allowed(i int) Decision {
	r := &m.rules[i]
	return Decision{Allow: true, Index: i, Rule: r, Code: Allowed, Reason: "allowed by " + r.From}
}

// refused says why nothing allows q: near is a rule that has the host with other
// ports, or -1.
func (m *Matcher) refused(q question, near int, protocol string) Decision {
	shown := q.name
	if q.ip.IsValid() {
		shown = q.ip.String()
	}
	if near >= 0 {
		return m.wrongPort(near, shown, q.port, protocol)
	}
	return m.unlisted(shown, q.ip, q.port, protocol)
}

func (m *Matcher) denied(i int) Decision {
	r := &m.rules[i]
	return Decision{Index: i, Rule: r, Code: DeniedByRule,
		Reason: fmt.Sprintf("denied by %s (%s)", r.Host+r.CIDR, r.From),
		Hint:   "deny wins over allow: remove that entry from egress.deny if it is not meant"}
}

func (m *Matcher) wrongPort(i int, host string, port int, protocol string) Decision {
	r := &m.rules[i]
	d := Decision{Index: i, Rule: r, Code: PortNotAllowed,
		Reason: fmt.Sprintf("%s is allowed on %s only, not on port %d (%s)", host, ports(r.Ports), port, r.From),
		Hint:   howToAllow(host, port, cmp.Or(protocol, usual[port], r.Protocol), r.Addresses)}
	if protocol == "http" && r.Protocol == "tls" {
		d.Hint = fmt.Sprintf("use https on %s, or %s", ports(r.Ports), d.Hint)
	}
	return d
}

func (m *Matcher) unlisted(host string, ip netip.Addr, port int, protocol string) Decision {
	d := Decision{Index: -1, Code: NotInAllowlist, Reason: host + " is not in the allowlist"}
	if _, apex := m.allow.wildcard[host]; apex && !ip.IsValid() {
		d.Reason = fmt.Sprintf("%s is not in the allowlist: *.%s covers what is below it and not the name itself", host, host)
	}
	d.Hint = howToAllow(host, port, cmp.Or(protocol, usual[port], "tls"), nil)
	return d
}

// usual are the protocols of ports that are hardly ever used for another one.
var usual = map[int]string{22: "ssh", 80: "http", 443: "tls"}

// howToAllow gives an entry that opens the host and the port as it stands. A
// single name on port 443 with TLS is what an entry without members means.
func howToAllow(host string, port int, protocol string, addresses []string) string {
	e, err := Normalize(host)
	if err != nil {
		f := fault.As(err)
		if e, err = NormalizeDeny(host); err == nil && e.Host == "" {
			return "no entry can open it: " + f.Msg
		}
		return f.Hint
	}
	if port == 443 && protocol == "tls" && len(addresses) == 0 {
		return fmt.Sprintf("add %q to egress.allow in the manifest", host)
	}
	entry := fmt.Sprintf(`"host": %q, "ports": [%d]`, host, port)
	if e.Host == "" {
		entry = fmt.Sprintf(`"cidr": %q, "ports": [%d]`, e.CIDR(), port)
	}
	if protocol != "tls" {
		entry += fmt.Sprintf(`, "protocol": %q`, protocol)
	}
	if len(addresses) > 0 {
		entry += fmt.Sprintf(`, "addresses": ["%s"]`, strings.Join(addresses, `", "`))
	}
	return "add { " + entry + " } to egress.allow in the manifest"
}

func ports(list []int) string {
	s := make([]string, len(list))
	for i, p := range list {
		s[i] = strconv.Itoa(p)
	}
	if len(s) == 1 {
		return "port " + s[0]
	}
	return "ports " + strings.Join(s, ", ")
}

// find gives the first rule of t for the host and port, and otherwise the first
// that has the host with other ports; -1 where there is none.
func (m *Matcher) find(t *table, name string, ip netip.Addr, port int) (hit, near int) {
	near = -1
	// try walks one chain.
	try := func(first int32, ok bool) int {
		if !ok {
			return -1
		}
		for i := first; i >= 0; i = t.next[i] {
			// A deny rule without ports is about every port.
			if p := m.rules[i].Ports; len(p) == 0 || slices.Contains(p, port) {
				return int(i)
			}
			if near < 0 {
				near = int(i)
			}
		}
		return -1
	}
	if ip.IsValid() {
		bits := t.bits6
		if ip.Is4() {
			bits = t.bits4
		}
		for _, b := range bits {
			p, _ := ip.Prefix(b)
			first, ok := t.prefix[p]
			if hit = try(first, ok); hit >= 0 {
				return hit, near
			}
		}
		return -1, near
	}
	first, ok := t.exact[name]
	if hit = try(first, ok); hit >= 0 {
		return hit, near
	}
	for rest := name; ; {
		_, below, more := strings.Cut(rest, ".")
		if !more {
			return -1, near
		}
		first, ok := t.wildcard[below]
		if hit = try(first, ok); hit >= 0 {
			return hit, near
		}
		rest = below
	}
}

// CheckAddr is the check on each address that a name resolved to, before it is
// dialled: the deny rules about addresses, and then CheckAddr of this package.
func (m *Matcher) CheckAddr(rule *plan.Rule, ip netip.Addr, port int, local []netip.Addr) error {
	if err := m.denies(ip, port); err != nil {
		return err
	}
	return CheckAddr(rule, ip, local)
}

// denies looks for a deny rule about an address, or about one that it carries.
func (m *Matcher) denies(ip netip.Addr, port int) error {
	for _, a := range append(carried(ip), ip.WithZone("").Unmap()) {
		if i, _ := m.find(&m.deny, "", a, port); i >= 0 {
			d := m.denied(i)
			return refused(d.Code, "%s is %s", ip, d.Reason).WithHint("%s", d.Hint)
		}
	}
	return nil
}
