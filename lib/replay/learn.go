package replay

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// Entry is an entry of egress.allow as a manifest has it.
type Entry struct {
	Host      string   `json:"host,omitempty"`
	CIDR      string   `json:"cidr,omitempty"`
	Ports     []int    `json:"ports"`
	Protocol  string   `json:"protocol,omitempty"` // absent: tls
	Addresses []string `json:"addresses,omitempty"`
	Requests  []string `json:"requests,omitempty"` // of an http entry that is kept
	Why       string   `json:"why,omitempty"`
}

// Lesson is what a log teaches.
type Lesson struct {
	Allow []Entry // sorted; what would have served the log, and no more
	// Remarks say what is not proposed and why, and what deserves a look.
	Remarks []string
}

// Options of Learn.
type Options struct {
	// Plan is the policy that is to be replaced. What its secrets and inspected
	// hosts need is kept, what it denies is not proposed, and what its presets
	// open is left to them. nil: only the log is known.
	Plan *plan.Bottle
	// Wildcards above 0: that many hosts or more directly below one name, with
	// the same ports and protocol, become a wildcard.
	Wildcards int
}

// Learn gives the smallest allowlist that would have served all that a log asks
// for: exact hosts, the ports and protocols that were used, each with its
// counts. Left out, with a remark, is what no entry opens, or should: metadata
// addresses, hosts in a form with two readings, what an entry of deny is about,
// what was refused for another reason than host and port, what a preset opens,
// and what a sidecar made of a request. Errors are those of policy.Compile.
func Learn(l *Log, o Options) (*Lesson, error) {
	s := &student{wants: map[endpoint]map[string]*want{}, asides: map[aside]int{}, presets: map[string]bool{}}
	var err error
	if s.nothing, err = policy.Compile(nil); err != nil {
		return nil, err
	}
	if o.Plan != nil {
		if s.plan, err = policy.Compile(o.Plan.Egress.Rules); err != nil {
			return nil, err
		}
	}
	for _, d := range l.Decisions {
		s.hear(d, l.Counts[d])
	}
	entries := s.entries()
	if o.Plan != nil {
		entries = keep(entries, o.Plan)
	}
	if o.Wildcards > 0 {
		entries = fold(entries, o.Wildcards, o.Plan)
	}
	slices.SortFunc(entries, byTarget)
	return &Lesson{Allow: entries, Remarks: s.remarks()}, nil
}

func byTarget(a, b Entry) int {
	return cmp.Or(strings.Compare(a.Host+a.CIDR, b.Host+b.CIDR), strings.Compare(a.Protocol, b.Protocol), slices.Compare(a.Ports, b.Ports))
}

// want is what was asked of one host and port over one protocol.
type want struct {
	allowed, denied, looked int
	pins                    []string // addresses that are not public and were dialled
}

type aside struct{ host, why string }

type student struct {
	plan    *policy.Matcher // nil: not known
	nothing *policy.Matcher // of no rules
	wants   map[endpoint]map[string]*want
	asides  map[aside]int // what is not proposed, and how often it was asked
	presets map[string]bool
}

// usual is the protocol of a port that a denied client is taken to speak.
var usual = map[int]string{22: "ssh", 80: "http"}

// lookedUpPort is proposed for a name that was looked up and never connected to.
const lookedUpPort = 443

func (s *student) hear(d Decision, n int) {
	port := cmp.Or(d.Port, lookedUpPort)
	// What the gate refuses under every policy no entry opens, whatever it would
	// be as an entry.
	if now := s.nothing.Decide(d.Host, port); now.Code != policy.NotInAllowlist {
		s.asides[aside{d.Host, now.Reason}] += n
		return
	}
	e, err := policy.Normalize(d.Host)
	if err != nil {
		s.asides[aside{d.Host, fault.As(err).Msg}] += n
		return
	}
	served := d.Verdict == audit.Allow || d.Verdict == audit.Failed && d.From != ""
	if d.Sender != "" {
		// What it passes on the guest has asked for, in a line of its own.
		if !served {
			s.asides[aside{d.Host, d.Sender + " asked for it, and not the guest"}] += n
		}
		return
	}
	protocol := d.Protocol
	switch {
	case strings.HasPrefix(d.From, "preset ") && served:
		s.presets[d.From] = true
		return
	case served:
	case d.Verdict == audit.Deny && (d.Code == policy.NotInAllowlist || d.Code == policy.PortNotAllowed):
		protocol = cmp.Or(usual[port], "tls")
		if d.Kind == audit.KindRequest {
			protocol = "http"
		}
	case d.Code == "wrong_protocol":
		// An http entry would have served it, and taken TLS from the others.
		s.asides[aside{d.Host, fmt.Sprintf("port %d was spoken to in plain HTTP, and its rule is about %s", d.Port, cmp.Or(d.Protocol, "another protocol"))}] += n
		return
	case d.Code == policy.DeniedByRule:
		s.asides[aside{d.Host, "an entry of deny is about it"}] += n
		return
	case d.Code == policy.AddressNotAllowed:
		s.asides[aside{d.Host, `it leads to an address that is not public or is denied; "addresses" in its entry names it, if that is meant`}] += n
		return
	default:
		s.asides[aside{d.Host, "that was for another reason than host and port: " + d.Code}] += n
		return
	}
	if s.plan != nil {
		switch now := s.plan.Decide(d.Host, port); {
		case now.Code == policy.DeniedByRule:
			s.asides[aside{d.Host, "an entry of deny is about it"}] += n
			return
		case now.Allow && strings.HasPrefix(now.Rule.From, "preset "):
			s.presets[now.Rule.From] = true
			return
		}
	}
	pin, err := pinOf(d)
	if err != nil {
		s.asides[aside{d.Host, fault.As(err).Msg}] += n
		return
	}
	s.want(e, port, cmp.Or(protocol, "tls")).hear(d, pin, served, n)
}

func (s *student) want(e policy.Entry, port int, protocol string) *want {
	at := endpoint{cmp.Or(e.Host, e.CIDR()), port}
	if s.wants[at] == nil {
		s.wants[at] = map[string]*want{}
	}
	if s.wants[at][protocol] == nil {
		s.wants[at][protocol] = &want{}
	}
	return s.wants[at][protocol]
}

// pinOf is the address that was dialled for a name, if only naming it opens it.
// The fault is for one that nothing opens, which no gate has dialled.
func pinOf(d Decision) (string, error) {
	ip, err := netip.ParseAddrPort(d.Address)
	if _, isIP := netip.ParseAddr(d.Host); err != nil || isIP == nil {
		return "", nil
	}
	a := ip.Addr().WithZone("").Unmap()
	if policy.CheckAddr(nil, a, nil) == nil {
		return "", nil
	}
	_, err = policy.NormalizeAddress(a.String())
	return a.String(), err
}

func (w *want) hear(d Decision, pin string, served bool, n int) {
	switch {
	case d.Kind == audit.KindLookup:
		w.looked += n
	case served:
		w.allowed += n
	default:
		w.denied += n
	}
	if pin != "" && !slices.Contains(w.pins, pin) {
		w.pins = append(w.pins, pin)
	}
}

// choose settles the protocol of an endpoint, which has one: what was allowed
// before what was not, then what was asked for most.
func (s *student) choose(at endpoint) (protocol string, w *want) {
	for _, p := range policy.Protocols {
		x := s.wants[at][p]
		if x != nil && (w == nil || x.allowed > w.allowed || x.allowed == w.allowed && x.denied > w.denied) {
			protocol, w = p, x
		}
	}
	for _, p := range policy.Protocols {
		if x := s.wants[at][p]; x != nil && x != w && x.allowed+x.denied > 0 {
			s.asides[aside{at.host, fmt.Sprintf("port %d has one protocol, and %s was used more", at.port, protocol)}] += x.allowed + x.denied
		}
	}
	return protocol, w
}

// entries puts the ports of a host that are treated alike into one entry.
func (s *student) entries() []Entry {
	type key struct{ host, protocol, pins, requests, why string }
	type sum struct {
		ports                   []int
		allowed, denied, looked int
		pins, requests          []string
	}
	sums, connected := map[key]*sum{}, s.connected()
	for at := range s.wants {
		protocol, w := s.choose(at)
		if w.allowed+w.denied == 0 && connected[at.host] {
			continue // looked up first, and then connected to on another port
		}
		slices.Sort(w.pins)
		requests, why := s.known(at, protocol)
		k := key{at.host, protocol, strings.Join(w.pins, ","), strings.Join(requests, ","), why}
		x := sums[k]
		if x == nil {
			x = &sum{pins: w.pins, requests: requests}
			sums[k] = x
		}
		x.ports = append(x.ports, at.port)
		x.allowed, x.denied, x.looked = x.allowed+w.allowed, x.denied+w.denied, x.looked+w.looked
	}
	out := []Entry{}
	for k, x := range sums {
		slices.Sort(x.ports)
		e := Entry{Host: k.host, Ports: x.ports, Addresses: x.pins, Requests: x.requests, Why: counted(x.allowed, x.denied, x.looked)}
		if k.why != "" {
			e.Why = k.why + " (" + e.Why + ")"
		}
		if k.protocol != "tls" {
			e.Protocol = k.protocol
		}
		if strings.Contains(k.host, "/") {
			e.Host, e.CIDR = "", k.host
		}
		out = append(out, e)
	}
	return out
}

// known is what an entry of the plan says about an endpoint and has to be said
// again: which plain requests it is held to, and what it is for.
func (s *student) known(at endpoint, protocol string) (requests []string, why string) {
	if s.plan == nil {
		return nil, ""
	}
	d := s.plan.Decide(strings.TrimSuffix(strings.TrimSuffix(at.host, "/32"), "/128"), at.port)
	if !d.Allow || d.Rule.Protocol != protocol {
		return nil, ""
	}
	if protocol == "http" {
		requests = d.Rule.Requests
	}
	return requests, d.Rule.Why
}

// connected are the hosts to which somebody connected: of the others the port is
// not known.
func (s *student) connected() map[string]bool {
	hosts := map[string]bool{}
	for at, ws := range s.wants {
		for _, w := range ws {
			if w.allowed+w.denied > 0 {
				hosts[at.host] = true
			}
		}
	}
	return hosts
}

func counted(allowed, denied, looked int) string {
	if allowed+denied == 0 {
		return fmt.Sprintf("looked up %s and never connected to; the port is a guess", times(looked))
	}
	return fmt.Sprintf("asked for %s: %d allowed, %d denied", times(allowed+denied), allowed, denied)
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

// keep adds what a manifest would be refused without: exact hosts that secrets
// go to, and rules that are inspected.
func keep(entries []Entry, b *plan.Bottle) []Entry {
	for i := range b.Egress.Rules {
		r := &b.Egress.Rules[i]
		if r.Verdict != "allow" || r.Host == "" || r.Protocol != "tls" || strings.HasPrefix(r.From, "preset ") || !policy.Inspected(r, r.Host, b.Secrets) {
			continue
		}
		covered := slices.ContainsFunc(entries, func(e Entry) bool { return e.Host == r.Host && e.Protocol == "" })
		if !covered {
			entries = append(entries, Entry{Host: r.Host, Ports: r.Ports, Addresses: r.Addresses, Why: "not asked for; kept, since it is inspected or a secret goes there"})
		}
	}
	return entries
}

// fold makes a wildcard of hosts directly below one name that are treated alike.
func fold(entries []Entry, least int, b *plan.Bottle) []Entry {
	needed := func(host string) bool { // by its exact name
		if b == nil {
			return false
		}
		return len(policy.Injections(b.Secrets, host)) > 0 ||
			slices.ContainsFunc(b.Egress.Rules, func(r plan.Rule) bool { return r.Host == host && r.Inspect })
	}
	type key struct{ parent, ports, protocol string }
	groups := map[key][]int{}
	for i, e := range entries {
		_, parent, ok := strings.Cut(e.Host, ".")
		if _, err := policy.Normalize("*." + parent); !ok || err != nil || len(e.Addresses) > 0 || len(e.Requests) > 0 || needed(e.Host) {
			continue
		}
		k := key{parent, fmt.Sprint(e.Ports), e.Protocol}
		groups[k] = append(groups[k], i)
	}
	gone := map[int]bool{}
	for k, members := range groups {
		if len(members) < least {
			continue
		}
		e := entries[members[0]]
		e.Host, e.Why = "*."+k.parent, fmt.Sprintf("stands for %d hosts that were asked for", len(members))
		for _, i := range members {
			gone[i] = true
		}
		entries = append(entries, e)
	}
	var out []Entry
	for i, e := range entries {
		if !gone[i] {
			out = append(out, e)
		}
	}
	return out
}

func (s *student) remarks() []string {
	var out []string
	for a, n := range s.asides {
		out = append(out, fmt.Sprintf("%q (%s) is not proposed: %s", a.host, times(n), a.why))
	}
	for p := range s.presets {
		out = append(out, p+" opens some of the hosts; the patch leaves it where it is, and does not repeat them")
	}
	for at := range s.wants {
		if p, err := netip.ParsePrefix(at.host); err == nil && policy.CheckAddr(nil, p.Addr(), nil) != nil {
			out = append(out, fmt.Sprintf("%s port %d is proposed, and is no public address: it may be on this host or its networks", p.Addr(), at.port))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// BottleName finds the name that the bottle has in its manifest, from the
// provenance of rules: "bottle.json:12:9 bottles.dev.egress.allow[0]". It is ""
// if nothing tells it, or several things do differently.
func BottleName(l *Log, b *plan.Bottle) string {
	name := ""
	take := func(from string) bool {
		_, rest, ok := strings.Cut(from, " bottles.")
		n, _, end := strings.Cut(rest, ".egress.")
		if !ok || !end || n == name {
			return true
		}
		if name != "" {
			name = ""
			return false
		}
		name = n
		return true
	}
	if b != nil {
		for _, r := range b.Egress.Rules {
			if !take(r.From) {
				return ""
			}
		}
	}
	if name == "" {
		for _, d := range l.Decisions {
			if !take(d.From) {
				return ""
			}
		}
	}
	return name
}
