package pipelock

import (
	"fmt"
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
// on pipelock, more than MaxHosts hosts are. Errors are faults 65 that name the
// rule (bottle.egress.rules[3].host).
func Derive(b *plan.Bottle) (*plan.Egress, error) {
	rules := b.Egress.Rules
	if _, err := policy.Compile(rules); err != nil {
		return nil, inBottle(err, rules)
	}
	c, err := configure(rules)
	if err != nil {
		return nil, err
	}
	e := &plan.Egress{
		RulesSHA256: policy.RulesSHA256(rules),
		Residual:    append(policy.Residual(b.Egress), append(policy.ResidualOfSecrets(b.Secrets), residual(b.Egress)...)...),
	}
	switch n := len(c.APIAllowlist); {
	case n > MaxHosts && b.Egress.Proxy == "pipelock":
		return nil, errTooMany(n)
	case n == 0 || n > MaxHosts:
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
