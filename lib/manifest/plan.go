package manifest

import (
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// Why each engine is a candidate. The texts are the same on every machine: what
// this host can do is found out by up.
var (
	smolvm = plan.Candidate{Engine: "smolvm", Why: "own kernel by hardware virtualisation; needs working KVM, proved by a boot check at up"}
	gvisor = plan.Candidate{Engine: "gvisor", Why: "application kernel in user space, embedded; needs no hardware support"}
)

func candidates(requested string) []plan.Candidate {
	chosen := func(c plan.Candidate) []plan.Candidate {
		c.Why = "chosen by the manifest: " + c.Why
		return []plan.Candidate{c}
	}
	switch requested {
	case "smolvm":
		return chosen(smolvm)
	case "gvisor":
		return chosen(gvisor)
	}
	return []plan.Candidate{smolvm, gvisor}
}

// Plan gives the bottle section of one agent. The error is a fault 64 for an
// agent that the manifest does not have. The result shares memory with others
// of the same manifest and must not be changed.
func (m *Manifest) Plan(name string) (*plan.Bottle, error) {
	a, ok := m.agents[name]
	if !ok {
		return nil, fault.New(fault.Usage, "unknown_agent", "%s has no agent %s", m.Name, quote(name)).
			WithHint("its agents: %s", strings.Join(m.Agents(), ", "))
	}
	b := a.bottle
	p := &plan.Bottle{
		ID:        name,
		Agent:     name,
		Manifest:  plan.ManifestRef{Name: m.Name, SHA256: m.SHA256},
		Runtime:   plan.Runtime{Requested: b.runtime, Candidates: candidates(b.runtime)},
		Image:     b.image,
		User:      b.user,
		Home:      b.home,
		Workspace: b.workspace,
		Mounts:    b.mounts,
		Hide:      b.hide,
		Env:       b.guestEnv(a.env),
		Files:     b.files,
		Resources: b.resources,
		Egress:    b.egress,
		Secrets:   b.secrets,
		Command:   a.command,
	}
	if err := p.Validate(); err != nil {
		return nil, fault.New(fault.Bug, "bug", "the plan of %s is not valid: %w", name, err)
	}
	return p, nil
}

// guestEnv is the whole environment of the guest: what every bottle has, under
// presets, placeholders of secrets, env of the bottle, env of the agent.
func (b *bottle) guestEnv(agent []plan.EnvVar) []plan.EnvVar {
	var holders []plan.EnvVar
	for _, s := range b.secrets {
		// An agent may insist on the form of its key; its preset knows.
		if !slices.ContainsFunc(b.env, func(v plan.EnvVar) bool { return v.Name == s.Name }) {
			holders = append(holders, plan.EnvVar{Name: s.Name, Value: placeholder})
		}
	}
	return merge(merge(merge(base(b.user), holders), b.env), agent)
}

// normalizeExact is Normalize for places where only a name will do.
func normalizeExact(s string) (policy.Entry, error) {
	e, err := policy.Normalize(s)
	if err == nil && e.Class != policy.ClassExact {
		err = fault.New(fault.Data, "bad_host", "%s is not one exact host", quote(s)).
			WithHint("a secret goes to a host that is named in full")
	}
	return e, err
}
