// Package manifest reads bottle.json, the file people write: JSON with comments
// and trailing commas. It is typed, gets its defaults, is checked as a whole,
// and becomes plan sections. docs/manifest.md describes every field;
// bottle.schema.json is the same for editors.
//
// The package is pure: files that a manifest names are read through a function
// of the caller, nothing is resolved, started or written, and neither time,
// user, host nor environment has a say. Only manifest and named files do, so
// that a plan is the same on every machine.
package manifest

import (
	"fmt"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Manifest is a manifest that was read and found good.
type Manifest struct {
	Name   string // base name of the file, or "-"
	SHA256 string // of its bytes, "sha256:<64 hex>"

	bottles map[string]*bottle
	agents  map[string]*agent
}

// bottle is one entry of bottles, with its defaults.
type bottle struct {
	runtime   string
	image     plan.Image
	user      string
	home      string
	workspace plan.Workspace
	hide      []string
	mounts    []plan.Mount
	env       []plan.EnvVar // presets and env of the bottle, ours not yet
	files     []plan.File
	resources plan.Resources
	egress    plan.Policy
	secrets   []plan.Secret
}

// agent is one entry of agents.
type agent struct {
	bottle  *bottle
	command []string
	env     []plan.EnvVar
}

// Load reads a manifest. name is its base name, for messages and provenance.
// read gives the bytes of a file that the manifest names: its path is as
// written there, relative to the manifest's folder, absolute, or starting with
// ~/. The error is Problems; read may return a fault with a status of its own
// (66 for a file that is missing).
func Load(data []byte, name string, read func(path string) ([]byte, error)) (*Manifest, error) {
	l := &loader{name: name, data: data, read: read}
	m := &Manifest{Name: name, bottles: map[string]*bottle{}, agents: map[string]*agent{}}
	if v := l.parse(); v != nil {
		l.manifest(m, node{v: v})
	}
	if len(l.problems) == 0 {
		m.SHA256 = plan.SHA256(data)
		return m, nil
	}
	return nil, l.all()
}

// all gives what was found, in the order of the file.
func (l *loader) all() Problems {
	slices.SortStableFunc(l.problems, func(a, b problem) int { return a.offset - b.offset })
	var out Problems
	for _, p := range l.problems {
		out = append(out, p.fault)
	}
	if l.more > 0 {
		out = append(out, fault.New(fault.Data, "more_problems", "%d more problems are not shown", l.more).At(l.name))
	}
	return out
}

// Agents lists the agents, sorted.
func (m *Manifest) Agents() []string {
	names := make([]string, 0, len(m.agents))
	for name := range m.agents {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Nearest gives the agent that a name was likely meant to be, or "".
func (m *Manifest) Nearest(name string) string { return nearest(name, m.Agents()) }

func (l *loader) manifest(m *Manifest, root node) {
	ms, ok := l.mapping(root)
	if !ok || !l.version(root, ms) {
		return
	}
	ms = l.known(ms, "$schema", "format_version", "bottles", "agents")
	if n, ok := ms.get("$schema"); ok {
		l.text(n)
	}
	if n, ok := l.required(root, ms, "bottles"); ok {
		named, _ := l.mapping(n)
		for _, b := range named {
			l.checkName(b)
			m.bottles[b.name] = l.bottle(b.node)
		}
		if named != nil && len(named) == 0 {
			l.bad(n, "bad_value", "is empty", "describe at least one bottle")
		}
	}
	if n, ok := l.required(root, ms, "agents"); ok {
		named, _ := l.mapping(n)
		for _, a := range named {
			l.checkName(a)
			m.agents[a.name] = l.agent(a.node, m)
		}
		if named != nil && len(named) == 0 {
			l.bad(n, "bad_value", "is empty", `describe at least one agent, such as "bash": { "bottle": "dev", "command": ["bash"] }`)
		}
	}
}

// version goes first: what another major means by a member is not ours to
// judge.
func (l *loader) version(root node, ms members) bool {
	n, ok := ms.get("format_version")
	if !ok {
		l.bad(root, "no_version", "format_version is missing", fmt.Sprintf("start the manifest with %q", `"format_version": "`+plan.FormatVersion+`"`))
		return false
	}
	s, ok := l.str(n)
	if !ok {
		return false
	}
	if err := plan.CheckVersion(s); err != nil {
		l.record(n.v.StartOffset, fault.As(err).WithHint("this version of the tools reads %q", plan.FormatVersion).At(l.position(n.v.StartOffset)+": "+n.path()))
		return false
	}
	return true
}

func (l *loader) required(n node, ms members, name string) (node, bool) {
	child, ok := ms.get(name)
	if !ok {
		l.bad(n, "missing_member", "member %q is missing", "docs/manifest.md shows a whole manifest", name)
	}
	return child, ok
}

func (l *loader) checkName(m member) {
	if err := plan.CheckID(m.name); err != nil {
		f := fault.As(err)
		hint := f.Hint
		if hint == "" {
			hint = "choose another name"
		}
		l.bad(m.node, "bad_name", "%s", hint, strings.Replace(f.Msg, "bottle id", "name for a bottle or agent", 1))
	}
}

func (l *loader) agent(n node, m *Manifest) *agent {
	a := &agent{}
	ms, ok := l.object(n, "bottle", "command", "env")
	if !ok {
		return a
	}
	if b, ok := l.required(n, ms, "bottle"); ok {
		a.bottle = l.bottleRef(b, m)
	}
	if c, ok := l.required(n, ms, "command"); ok {
		a.command = l.command(c)
	}
	if e, ok := ms.get("env"); ok {
		a.env = l.env(e)
		l.secretInEnv(e, a.env, a.bottle)
	}
	return a
}

func (l *loader) bottleRef(n node, m *Manifest) *bottle {
	name, ok := l.str(n)
	if !ok {
		return nil
	}
	b, ok := m.bottles[name]
	if !ok {
		var names []string
		for k := range m.bottles {
			names = append(names, k)
		}
		slices.Sort(names)
		hint := "described under bottles: " + strings.Join(names, ", ")
		if k := nearest(name, names); k != "" {
			hint = fmt.Sprintf("did you mean %q?", k)
		}
		l.bad(n, "unknown_bottle", "there is no bottle %s", hint, quote(name))
	}
	return b
}

// command reads an argument list that will be run as it stands, without a
// shell.
func (l *loader) command(n node) []string {
	out := []string{}
	nodes := l.list(n)
	for i, e := range nodes {
		s, ok := l.str(e)
		if ok && i == 0 && s == "" {
			l.bad(e, "bad_value", "is empty", "the first argument is the program")
		}
		if ok {
			l.noSecretValue(e, s)
			out = append(out, s)
		}
	}
	if kind(n) == "an array" && len(nodes) == 0 {
		l.bad(n, "bad_value", "is empty", `write the program and its arguments, such as ["claude", "-p", "fix the tests"]`)
	}
	return out
}
