package policy

import (
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/plan"
)

// Vouched tells whether the value of the user's variable may go to host without
// the user's word: a preset has the two as a pair, and nothing in p can make of
// the name another place than the one everybody knows. A pinned address, another
// port, another protocol or a trust root of the manifest's own would.
//
// The github preset has no pair: what a guest does at the API of a model is what
// it is there for, and what it does at GitHub with your token is not.
func Vouched(p *plan.Policy, variable, host string) bool {
	if len(p.Roots) > 0 || !slices.ContainsFunc(presets, func(pr Preset) bool {
		return slices.Contains(pr.Keys, PresetKey{variable, host})
	}) {
		return false
	}
	for _, r := range p.Rules {
		if r.Verdict == "allow" && covers(r.Host, host) &&
			(r.Protocol != "tls" || !slices.Equal(r.Ports, []int{443}) || len(r.Addresses) > 0) {
			return false
		}
	}
	return true
}

// covers tells whether a rule for name, which may start with "*.", is about host.
func covers(name, host string) bool {
	below, wild := strings.CutPrefix(name, "*")
	return name == host || wild && strings.HasSuffix(host, below) && len(host) > len(below)
}
