package policy

import (
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
)

func TestVouched(t *testing.T) {
	const api = "api.anthropic.com"
	rule := func(host string, change func(*plan.Rule)) plan.Rule {
		r := plan.Rule{Host: host, Ports: []int{443}, Protocol: "tls", Verdict: "allow"}
		if change != nil {
			change(&r)
		}
		return r
	}
	preset := rule(api, nil)
	for _, tc := range []struct {
		name, variable, host string
		policy               plan.Policy
		want                 bool
	}{
		{"the preset's pair", "ANTHROPIC_API_KEY", api, plan.Policy{Rules: []plan.Rule{preset}}, true},
		{"other rules do not matter", "OPENAI_API_KEY", "api.openai.com", plan.Policy{Rules: []plan.Rule{
			rule("api.openai.com", nil), rule("a.example", func(r *plan.Rule) { r.Addresses = []string{"10.0.0.1"} }),
			rule("*.example", func(r *plan.Rule) { r.Protocol = "tcp" })}}, true},
		{"a deny rule does not matter", "ANTHROPIC_API_KEY", api, plan.Policy{Rules: []plan.Rule{preset,
			rule(api, func(r *plan.Rule) { r.Verdict, r.Protocol, r.Ports = "deny", "any", []int{80} })}}, true},
		{"another variable", "AWS_SECRET_ACCESS_KEY", api, plan.Policy{Rules: []plan.Rule{preset}}, false},
		{"another host", "ANTHROPIC_API_KEY", "evil.example", plan.Policy{Rules: []plan.Rule{rule("evil.example", nil)}}, false},
		{"the key of another preset", "OPENAI_API_KEY", api, plan.Policy{Rules: []plan.Rule{preset}}, false},
		{"a token that can publish", "GITHUB_TOKEN", "api.github.com", plan.Policy{Rules: []plan.Rule{rule("api.github.com", nil)}}, false},
		{"pinned", "ANTHROPIC_API_KEY", api, plan.Policy{Rules: []plan.Rule{rule(api, func(r *plan.Rule) { r.Addresses = []string{"203.0.113.1"} })}}, false},
		{"another port as well", "ANTHROPIC_API_KEY", api, plan.Policy{Rules: []plan.Rule{preset, rule(api, func(r *plan.Rule) { r.Ports = []int{8443} })}}, false},
		{"ports", "ANTHROPIC_API_KEY", api, plan.Policy{Rules: []plan.Rule{rule(api, func(r *plan.Rule) { r.Ports = []int{443, 8443} })}}, false},
		{"another protocol", "ANTHROPIC_API_KEY", api, plan.Policy{Rules: []plan.Rule{preset, rule(api, func(r *plan.Rule) { r.Protocol, r.Ports = "http", []int{80} })}}, false},
		{"a wildcard that pins it", "ANTHROPIC_API_KEY", api, plan.Policy{Rules: []plan.Rule{preset,
			rule("*.anthropic.com", func(r *plan.Rule) { r.Ports, r.Addresses = []int{8443}, []string{"203.0.113.1"} })}}, false},
		{"a root of its own", "ANTHROPIC_API_KEY", api, plan.Policy{Rules: []plan.Rule{preset}, Roots: []plan.Root{{Path: "ca.crt"}}}, false},
	} {
		if got := Vouched(&tc.policy, tc.variable, tc.host); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

// A pair is about a host that its preset opens.
func TestPresetKeysAreOfItsHosts(t *testing.T) {
	for _, name := range PresetNames() {
		p, _ := PresetByName(name)
		for _, k := range p.Keys {
			policy := plan.Policy{}
			for _, r := range p.Rules {
				policy.Rules = append(policy.Rules, plan.Rule{Host: r.Host, Ports: []int{443}, Protocol: "tls", Verdict: "allow"})
			}
			opened := false
			for _, r := range p.Rules {
				opened = opened || r.Host == k.Host
			}
			if !opened || !plan.ValidEnvName(k.Variable) || !Vouched(&policy, k.Variable, k.Host) {
				t.Errorf("%s: %+v", name, k)
			}
		}
	}
}
