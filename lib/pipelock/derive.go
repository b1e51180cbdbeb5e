package pipelock

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// Derive gives the egress section of a document from its bottle section. It is
// a pure function: bottle-egress writes what it returns, and bottle-vm up
// computes it again and refuses a document that says something else.
//
// The section has no pipelock part where pipelock has no configuration for the
// policy: nothing that it carries is allowed, or, unless the manifest insists
// on pipelock, more than MaxHosts hosts are, or a deny rule is one that it cannot
// hold. Errors are faults 65 that name the rule (bottle.egress.rules[3].host).
func Derive(b *plan.Bottle) (*plan.Egress, error) {
	rules := b.Egress.Rules
	if _, err := policy.Compile(rules); err != nil {
		return nil, inBottle(err, rules)
	}
	c, err := configure(rules)
	if err != nil {
		return nil, err
	}
	e := &plan.Egress{RulesSHA256: policy.RulesSHA256(rules), Residual: Residual(b)}
	n, odd := len(c.APIAllowlist), unheld(rules)
	switch {
	case n > MaxHosts && b.Egress.Proxy == "pipelock":
		return nil, errTooMany(n)
	case odd >= 0 && b.Egress.Proxy == "pipelock":
		return nil, errUnheld(odd, rules)
	case n == 0 || n > MaxHosts || odd >= 0:
		return e, nil
	}
	y, err := encode(c)
	if err != nil {
		return nil, err
	}
	e.Pipelock = &plan.PipelockYAML{YAML: string(y), SHA256: plan.SHA256(y)}
	return e, nil
}

// inBottle completes the place that lib/policy gives of a bad rule.
func inBottle(err error, rules []plan.Rule) error {
	f := fault.As(err)
	var i int
	if n, _ := fmt.Sscanf(f.Where, "egress.rules[%d]", &i); n != 1 || i >= len(rules) {
		return f
	}
	where := fmt.Sprintf("bottle.egress.rules[%d]", i)
	switch {
	case f.Code == "bad_rule":
	case rules[i].Host != "":
		where += ".host"
	case rules[i].CIDR != "":
		where += ".cidr"
	}
	return f.At(where)
}

// Residual is plan.Egress.Residual: what nobody sees, or holds, under the policy
// of b.
func Residual(b *plan.Bottle) []string {
	out := policy.Residual(b.Egress) // never nil, which a document would show as such
	return append(append(out, policy.ResidualOfSecrets(b.Secrets)...), residual(b.Egress)...)
}

// unheld finds a deny rule about addresses on certain ports that names could
// lead to which pipelock carries: it resolves them itself, and its list of
// addresses knows no ports. -1 if there is none.
func unheld(rules []plan.Rule) int {
	ports := map[int]bool{}
	for _, r := range rules {
		if r.Host != "" && Carries(r) {
			for _, p := range r.Ports {
				ports[p] = true
			}
		}
	}
	for i, r := range rules {
		if r.Verdict != "deny" || r.CIDR == "" || !slices.ContainsFunc(r.Ports, func(p int) bool { return ports[p] }) {
			continue
		}
		p, err := netip.ParsePrefix(r.CIDR)
		closed := err == nil && slices.ContainsFunc(specialPrefixes, func(s netip.Prefix) bool { return s.Bits() <= p.Bits() && s.Contains(p.Addr()) })
		if !closed {
			return i
		}
	}
	return -1
}

func errUnheld(i int, rules []plan.Rule) *fault.Error {
	return fault.New(fault.Data, "range_with_ports", "pipelock resolves names itself and knows no ports: it cannot hold that %s is denied on some of them", rules[i].CIDR).
		At(fmt.Sprintf("bottle.egress.rules[%d].ports", i)).
		WithHint(`deny the range on every port, or use "proxy": "builtin"`)
}

// residual says what pipelock does not see where it may be the proxy.
func residual(p plan.Policy) []string {
	if p.Proxy == "builtin" {
		return nil
	}
	var past, clear []string
	for _, r := range p.Rules {
		switch {
		case r.Verdict != "allow":
		case !Carries(r):
			past = append(past, r.Host+r.CIDR)
		case r.Protocol == "http":
			clear = append(clear, r.Host+r.CIDR)
		}
	}
	var out []string
	if len(past) > 0 {
		out = append(out, some(past)+": where the proxy is pipelock, these leave from the gate itself and pipelock does not see them")
	}
	if len(clear) > 0 {
		out = append(out, some(clear)+fmt.Sprintf(": where the proxy is pipelock, it follows redirects itself and cuts answers off at %d MiB", maxResponseMB))
	}
	return out
}

func some(hosts []string) string {
	const most = 5
	if n := len(hosts) - most; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(hosts[:most], ", "), n)
	}
	return strings.Join(hosts, ", ")
}
