package policy

import (
	"net/netip"
	"slices"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Overlay answers for the rules of a plan and those that were added while its
// bottle runs. It does not change after NewOverlay and may be used by many
// goroutines.
//
// A deny rule wins, of whichever list. What the plan allows it decides alone:
// an added rule can open what was closed, and cannot change how something is
// treated that is open (its inspection, its protocol, its addresses).
type Overlay struct {
	base, live *Matcher
}

// NewOverlay puts rules on top of base. Compiling them takes time by their
// number, whatever the size of base. Errors are those of Compile.
func NewOverlay(base *Matcher, rules []plan.Rule) (*Overlay, error) {
	live, err := Compile(rules)
	if err != nil {
		return nil, err
	}
	return &Overlay{base, live}, nil
}

// Decide is Matcher.Decide over both lists.
func (o *Overlay) Decide(host string, port int) Decision { return o.DecideAs(host, port, "") }

// DecideAs is Matcher.DecideAs over both lists.
func (o *Overlay) DecideAs(host string, port int, protocol string) Decision {
	if len(o.live.rules) == 0 {
		return o.base.DecideAs(host, port, protocol)
	}
	q, bad := ask(host, port)
	if bad != nil {
		return *bad
	}
	if i, _ := o.base.find(&o.base.deny, q.name, q.ip, port); i >= 0 {
		return o.base.denied(i)
	}
	if i, _ := o.live.find(&o.live.deny, q.name, q.ip, port); i >= 0 {
		return o.live.liveDenied(i)
	}
	i, near := o.base.find(&o.base.allow, q.name, q.ip, port)
	if i >= 0 {
		return o.base.allowed(i)
	}
	i, liveNear := o.live.find(&o.live.allow, q.name, q.ip, port)
	switch {
	case i >= 0:
		d := o.live.allowed(i)
		d.Live = true
		return d
	case near < 0 && liveNear >= 0:
		d := o.live.refused(q, liveNear, protocol)
		d.Live = true
		return d
	}
	return o.base.refused(q, near, protocol)
}

func (m *Matcher) liveDenied(i int) Decision {
	d := m.denied(i)
	d.Live = true
	d.Hint = "the bottle's owner denied it while the bottle runs; bottle-egress rules lists such rules, and bottle-egress revert takes one back"
	return d
}

// CheckAddr is Matcher.CheckAddr over both lists.
func (o *Overlay) CheckAddr(rule *plan.Rule, ip netip.Addr, port int, local []netip.Addr) error {
	if err := o.Denies(ip, port); err != nil {
		return err
	}
	return CheckAddr(rule, ip, local)
}

// Denies is the part of CheckAddr that the deny rules decide, for an address
// that was dialled before one of them was added. The fault has exit 1 and the
// code denied_by_rule.
func (o *Overlay) Denies(ip netip.Addr, port int) error {
	if err := o.base.denies(ip, port); err != nil {
		return err
	}
	for _, a := range append(carried(ip), ip.WithZone("").Unmap()) {
		if i, _ := o.live.find(&o.live.deny, "", a, port); i >= 0 {
			d := o.live.liveDenied(i)
			return refused(d.Code, "%s is %s", ip, d.Reason).WithHint("%s", d.Hint)
		}
	}
	return nil
}

// Admit tells if rule, an allow rule with one port, would have an effect on top
// of base and of what was added before. One that would not is refused rather
// than taken in silence: faults with exit 1 and the codes denied_by_rule,
// already_allowed and conflicting_rules. The rule has to be one that Compile
// takes.
func (o *Overlay) Admit(rule *plan.Rule) error {
	if i := o.base.covering(&o.base.deny, rule); i >= 0 {
		d := o.base.denied(i)
		return refused(d.Code, "%s is %s, and what the plan denies cannot be allowed while the bottle runs", rule.Host+rule.CIDR, d.Reason).
			WithHint("remove that entry from egress.deny in the manifest, and start the bottle anew")
	}
	if i := o.live.covering(&o.live.deny, rule); i >= 0 {
		d := o.live.denied(i)
		return refused(d.Code, "%s is %s", rule.Host+rule.CIDR, d.Reason).
			WithHint("take that back first: bottle-egress revert %s", o.live.rules[i].Host+o.live.rules[i].CIDR)
	}
	for _, a := range rule.Addresses {
		ip, err := netip.ParseAddr(a)
		if err != nil {
			return badRule("address %q is none", a)
		}
		if err := o.Denies(ip, rule.Ports[0]); err != nil {
			return err
		}
	}
	i := o.base.covering(&o.base.allow, rule)
	if i < 0 {
		return nil
	}
	old := &o.base.rules[i]
	if Conflict(&plan.Rule{Protocol: rule.Protocol, Inspect: old.Inspect, Addresses: rule.Addresses, Ports: rule.Ports}, old) {
		return fault.New(fault.No, "conflicting_rules", "the plan allows %s on port %d already, in another way (%s, protocol %s), and stays as it is",
			rule.Host+rule.CIDR, rule.Ports[0], old.From, old.Protocol).
			WithHint("change that entry in the manifest, and start the bottle anew")
	}
	return fault.New(fault.No, "already_allowed", "the plan allows %s on port %d already (%s)", rule.Host+rule.CIDR, rule.Ports[0], old.From).
		WithHint("there is nothing to do; bottle-egress deny closes it while the bottle runs")
}

// covering gives the first rule of t whose hosts and port are all of those of
// rule, or -1.
func (m *Matcher) covering(t *table, rule *plan.Rule) int {
	port := rule.Ports[0]
	if rule.Host != "" {
		// A wildcard is found under what is below it, never as a name.
		i, _ := m.find(t, rule.Host, netip.Addr{}, port)
		return i
	}
	p, err := netip.ParsePrefix(rule.CIDR)
	if err != nil {
		return -1
	}
	for i := range m.rules {
		r := &m.rules[i]
		outer, err := netip.ParsePrefix(r.CIDR)
		if (r.Verdict == "deny") != (t == &m.deny) || err != nil || !within(p, outer) {
			continue
		}
		if len(r.Ports) == 0 || slices.Contains(r.Ports, port) {
			return i
		}
	}
	return -1
}
