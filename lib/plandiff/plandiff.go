// Package plandiff compares two plans clause by clause and says of each
// difference whether it narrows or widens what the bottle may do, see, keep or
// use up. It is pure: it knows the two documents and nothing of the host, so
// that paths are compared as they are written, and the answer in a pull request
// is the same as anywhere else.
//
// It fails closed: a difference that it cannot judge widens.
package plandiff

import (
	"cmp"
	"fmt"
	"path"
	"reflect"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// Clause is one difference. Before and After are what stands in the plans, nil
// where nothing does.
type Clause struct {
	Path  string `json:"path"`            // bottle.mounts["/opt/x"].mode
	Host  string `json:"host,omitempty"`  // of egress.rules: see policy.Change
	Ports []int  `json:"ports,omitempty"` // of egress.rules
	// Resolved: about the addresses to which names resolve, not about requests.
	Resolved bool   `json:"resolved,omitzero"`
	Before   any    `json:"before,omitzero"`
	After    any    `json:"after,omitzero"`
	Verdict  string `json:"verdict"` // policy.Narrows | Same | Widens
	Why      string `json:"why,omitempty"`
}

// Verdict is that of all clauses together.
func Verdict(clauses []Clause) string {
	v := policy.Same
	for _, c := range clauses {
		v = policy.Worse(v, c.Verdict)
	}
	return v
}

// Compare gives the differences of two plans in the order of the document.
// Errors are faults 65 for rules that are none.
func Compare(a, b *plan.Bottle) ([]Clause, error) {
	d := &diff{}
	d.identity(a, b)
	d.runtime(a, b)
	d.image(a.Image, b.Image)
	d.ordered("user", a.User, b.User, "agent", "root")
	d.ordered("home", a.Home, b.Home, "discard", "keep")
	d.workspace(a.Workspace, b.Workspace)
	d.mounts(a.Mounts, b)
	d.hide(a.Hide, b.Hide)
	d.env(a, b)
	d.files(a.Files, b.Files)
	d.resources(a.Resources, b.Resources)
	if err := d.egress(a, b); err != nil {
		return nil, err
	}
	d.secrets(a.Secrets, b.Secrets)
	if !slices.Equal(a.Command, b.Command) {
		d.widens("command", a.Command, b.Command, "what another command does cannot be told from here")
	}
	d.unknown("", *a, *b, "ID", "Agent", "Manifest", "Runtime", "Image", "User", "Home", "Workspace", "Mounts", "Hide", "Env", "Files",
		"Resources", "Egress", "Secrets", "Command")
	return d.clauses, nil
}

// Added and Removed are the clauses of a bottle that only one side has.
func Added(b *plan.Bottle) []Clause {
	return []Clause{{Path: "bottle", After: b.ID, Verdict: policy.Widens, Why: "the bottle is new"}}
}

func Removed(b *plan.Bottle) []Clause {
	return []Clause{{Path: "bottle", Before: b.ID, Verdict: policy.Narrows, Why: "the bottle is gone"}}
}

type diff struct{ clauses []Clause }

func (d *diff) add(verdict, at string, before, after any, why string) {
	d.clauses = append(d.clauses, Clause{Path: "bottle." + at, Before: before, After: after, Verdict: verdict, Why: why})
}

func (d *diff) widens(at string, before, after any, why string) {
	d.add(policy.Widens, at, before, after, why)
}

func (d *diff) narrows(at string, before, after any) { d.add(policy.Narrows, at, before, after, "") }

func (d *diff) same(at string, before, after any, why string) {
	d.add(policy.Same, at, before, after, why)
}

// unknown adds what differs in members that nothing here knows: a plan of a
// later version is not taken for a narrower one.
func (d *diff) unknown(at string, a, b any, known ...string) {
	x, y := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range x.NumField() {
		f := x.Type().Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if u, v := x.Field(i).Interface(), y.Field(i).Interface(); !slices.Contains(known, f.Name) && !reflect.DeepEqual(u, v) {
			d.widens(strings.TrimPrefix(at+"."+name, "."), u, v, "what this member means is not known here")
		}
	}
}

// ordered compares two values of a list in which each one opens more than those
// before it.
func (d *diff) ordered(at, a, b string, order ...string) {
	x, y := slices.Index(order, a), slices.Index(order, b)
	switch {
	case a == b:
	case x < 0 || y < 0:
		d.widens(at, a, b, "one of the two is not known here")
	case x < y:
		d.widens(at, a, b, "")
	default:
		d.narrows(at, a, b)
	}
}

// identity: names decide nothing but which kept home is used.
func (d *diff) identity(a, b *plan.Bottle) {
	name := func(at, x, y string) {
		switch {
		case x == y:
		case b.Home == "keep":
			d.widens(at, x, y, "the home is kept under this name, and another one may have left something there")
		default:
			d.same(at, x, y, "a name opens nothing")
		}
	}
	name("id", a.ID, b.ID)
	name("agent", a.Agent, b.Agent)
	if a.Manifest != b.Manifest {
		d.same("manifest", a.Manifest, b.Manifest, "what follows from the manifest is compared clause by clause")
	}
	d.unknown("manifest", a.Manifest, b.Manifest, "Name", "SHA256")
}

// runtime: an engine is a boundary of its own, and which of two is the stronger
// one is not for a diff to say. Leaving out the less preferred ones is narrower.
func (d *diff) runtime(a, b *plan.Bottle) {
	x, y := engines(a.Runtime), engines(b.Runtime)
	at := "runtime"
	switch {
	case slices.Equal(x, y):
		if !reflect.DeepEqual(a.Runtime, b.Runtime) {
			d.same(at, a.Runtime.Requested, b.Runtime.Requested, "the same engines in the same order")
		}
	case len(y) > 0 && len(y) < len(x) && slices.Equal(x[:len(y)], y):
		d.narrows(at, x, y)
	default:
		d.widens(at, x, y, "the bottle may run behind another boundary than before")
	}
	d.unknown(at, a.Runtime, b.Runtime, "Requested", "Candidates")
}

func engines(r plan.Runtime) []string {
	out := make([]string, len(r.Candidates))
	for i, c := range r.Candidates {
		out[i] = c.Engine
	}
	return out
}

func (d *diff) image(a, b plan.Image) {
	pinned, ok := strings.CutPrefix(b.Source, a.Source)
	switch {
	case a == b:
	case a.Kind == "reference" && b.Kind == "reference" && ok && strings.HasPrefix(pinned, "@sha256:"):
		d.narrows("image", a, b)
	default:
		d.widens("image", a, b, "what another image holds cannot be told from here")
	}
	d.unknown("image", a, b, "Kind", "Source")
}

func (d *diff) workspace(a, b plan.Workspace) {
	d.source("workspace.path", a.Path, b.Path)
	d.ordered("workspace.mode", a.Mode, b.Mode, "ro", "scratch", "rw")
	d.unknown("workspace", a, b, "Path", "Mode")
}

// source compares two host paths as they are written.
func (d *diff) source(at, a, b string) {
	switch {
	case a == b:
	case path.Clean(a) == path.Clean(b):
		d.same(at, a, b, "the same path")
	case inside(b, a):
		d.add(policy.Narrows, at, a, b, "it lies in what was shown before, as far as the paths tell")
	case inside(a, b):
		d.widens(at, a, b, "more of the host is shown")
	default:
		d.widens(at, a, b, "another part of the host is shown")
	}
}

// inside tells if path p lies below dir. Paths are relative to the manifest's
// folder, absolute, or below a home; what leaves its base by .. is inside of
// nothing.
func inside(p, dir string) bool {
	p, dir = path.Clean(p), path.Clean(dir)
	if dir == "." {
		return !path.IsAbs(p) && p != ".." && !strings.HasPrefix(p, "../") && p != "~" && !strings.HasPrefix(p, "~/")
	}
	if strings.HasPrefix(dir, "../") || dir == ".." {
		return false // what is below it depends on where the manifest lies
	}
	return strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}

func (d *diff) mounts(a []plan.Mount, after *plan.Bottle) {
	b := after.Mounts
	target := func(m plan.Mount) string { return m.Target }
	if x, y := common(a, b), common(b, a); !slices.Equal(x, y) {
		d.widens("mounts", x, y, "in another order one may show what another one covered")
	}
	pairs(a, b, target, func(key string, x, y *plan.Mount) {
		at := fmt.Sprintf("mounts[%q]", key)
		switch {
		case x == nil:
			d.widens(at, nil, y, "more of the host is shown")
		case y == nil:
			if what := covered(x, after); what != "" {
				d.widens(at, x, nil, "what "+what+" holds at this place was covered, and is not any more")
				return
			}
			d.narrows(at, x, nil)
		default:
			d.source(at+".source", x.Source, y.Source)
			d.ordered(at+".mode", x.Mode, y.Mode, "ro", "rw")
			d.unknown(at, *x, *y, "Source", "Target", "Mode")
		}
	})
}

// covered is what a mount that is gone has lain over and what is seen in its
// place now, another mount or a kept home; "" for nothing of the host's. In the
// workspace nothing can be mounted.
func covered(gone *plan.Mount, b *plan.Bottle) string {
	for _, m := range b.Mounts {
		if inside(gone.Target, m.Target) {
			return m.Target
		}
	}
	for _, home := range homes { // an engine may lay either of them out
		if b.Home == "keep" && (gone.Target == home || inside(gone.Target, home)) {
			return "the kept home"
		}
	}
	return ""
}

// common are the targets of a that b has too, in the order of a.
func common(a, b []plan.Mount) []string {
	var out []string
	for _, m := range a {
		if slices.ContainsFunc(b, func(o plan.Mount) bool { return o.Target == m.Target }) {
			out = append(out, m.Target)
		}
	}
	return out
}

// pairs calls fn for each key of two lists, sorted, with what stands under it. A
// key that stands several times in a list, which no manifest brings about, is
// compared with as many of the other list: what is left over is new, or gone.
func pairs[T any](a, b []T, key func(T) string, fn func(key string, x, y *T)) {
	index := func(list []T) map[string][]*T {
		m := make(map[string][]*T, len(list))
		for i := range list {
			m[key(list[i])] = append(m[key(list[i])], &list[i])
		}
		return m
	}
	x, y := index(a), index(b)
	var keys []string
	for _, m := range []map[string][]*T{x, y} {
		for k := range m {
			keys = append(keys, k)
		}
	}
	at := func(list []*T, i int) *T {
		if i < len(list) {
			return list[i]
		}
		return nil
	}
	slices.Sort(keys)
	for _, k := range slices.Compact(keys) {
		for i := range max(len(x[k]), len(y[k])) {
			fn(k, at(x[k], i), at(y[k], i))
		}
	}
}

func (d *diff) hide(a, b []string) {
	self := func(s string) string { return s }
	pairs(a, b, self, func(pattern string, x, y *string) {
		at := fmt.Sprintf("hide[%q]", pattern)
		switch {
		case x == nil:
			d.narrows(at, nil, pattern)
		case y == nil && slices.ContainsFunc(b, func(other string) bool { return hides(other, pattern) }):
			d.same(at, pattern, nil, "another pattern hides the same")
		case y == nil:
			d.widens(at, pattern, nil, "names of this form are shown in the workspace")
		}
	})
}

// hides tells if a pattern covers a name that was hidden by itself. Of two
// patterns with stars this is not asked.
func hides(pattern, name string) bool {
	if strings.ContainsAny(name, `*?[\`) {
		return false
	}
	ok, err := path.Match(pattern, name)
	return ok && err == nil
}

// homes are the homes of the guest's users (docs/manifest.md, user).
var homes = map[string]string{"agent": "/home/agent", "root": "/root"}

func (d *diff) env(a, b *plan.Bottle) {
	name := func(v plan.EnvVar) string { return v.Name }
	pairs(a.Env, b.Env, name, func(key string, x, y *plan.EnvVar) {
		at := fmt.Sprintf("env[%q]", key)
		switch {
		case key == "HOME" && a.User != b.User && x != nil && y != nil && x.Value == homes[a.User] && y.Value == homes[b.User]:
			d.same(at, x.Value, y.Value, "it follows from the user")
		case x == nil:
			d.widens(at, nil, y.Value, "what programs make of a variable cannot be told from here")
		case y == nil:
			d.narrows(at, x.Value, nil)
		case x.Value != y.Value:
			d.widens(at, x.Value, y.Value, "what programs make of a variable cannot be told from here")
		}
		if x != nil && y != nil {
			d.unknown(at, *x, *y, "Name", "Value")
		}
	})
}

func (d *diff) files(a, b []plan.File) {
	name := func(f plan.File) string { return f.Path }
	pairs(a, b, name, func(key string, x, y *plan.File) {
		at := fmt.Sprintf("files[%q]", key)
		switch {
		case x == nil:
			d.widens(at, nil, y.Content, "what programs make of a file in their home cannot be told from here")
		case y == nil:
			d.narrows(at, x.Content, nil)
		case x.Content != y.Content:
			d.widens(at, x.Content, y.Content, "what programs make of a file in their home cannot be told from here")
		}
		if x != nil && y != nil {
			d.unknown(at, *x, *y, "Path", "Content")
		}
	})
}

func (d *diff) resources(a, b plan.Resources) {
	limit := func(name string, x, y int) {
		at := "resources." + name
		shown := func(n int) any {
			if n == 0 {
				return nil // no limit
			}
			return n
		}
		switch {
		case x == y:
		case y == 0:
			d.widens(at, x, nil, "there is no limit any more")
		case x == 0 || y < x:
			d.narrows(at, shown(x), y)
		default:
			d.widens(at, x, y, "the limit is higher")
		}
	}
	limit("cpus", a.CPUs, b.CPUs)
	limit("memory_mib", a.MemoryMiB, b.MemoryMiB)
	limit("pids", a.Pids, b.Pids)
	if a.Enforcement != b.Enforcement {
		at := "resources.enforcement"
		if b.Enforcement == "" {
			d.narrows(at, a.Enforcement, nil)
		} else {
			d.widens(at, cmp.Or(a.Enforcement, "cgroup"), b.Enforcement, "limits are not held by the kernel where it cannot, but watched")
		}
	}
	d.unknown("resources", a, b, "CPUs", "MemoryMiB", "Pids", "Enforcement")
}

func (d *diff) egress(a, b *plan.Bottle) error {
	x, y := a.Egress, b.Egress
	switch {
	case x.Proxy == y.Proxy:
	case x.Proxy == "auto" && y.Proxy == "pipelock":
		d.narrows("egress.proxy", x.Proxy, y.Proxy)
	default:
		d.widens("egress.proxy", x.Proxy, y.Proxy, "another program may carry the traffic, or one that looks into it less")
	}
	if err := d.rules(a, b); err != nil {
		return err
	}
	sum := func(r plan.Root) string { return r.SHA256 }
	pairs(x.Roots, y.Roots, sum, func(key string, u, v *plan.Root) {
		at := fmt.Sprintf("egress.roots[%q]", key)
		switch {
		case u == nil:
			d.widens(at, nil, v.Path, "the gate trusts another authority")
		case v == nil:
			d.narrows(at, u.Path, nil)
		case u.Path != v.Path:
			d.same(at, u.Path, v.Path, "the same certificates, by digest")
		}
		if u != nil && v != nil {
			d.unknown(at, *u, *v, "Path", "SHA256")
		}
	})
	d.mitmdump(x.Mitmdump, y.Mitmdump)
	d.unknown("egress", x, y, "Proxy", "Rules", "Roots", "Mitmdump")
	return nil
}

// mitmdump: an addon is a program, of which nobody can tell what it lets through
// less than another one, or than none.
func (d *diff) mitmdump(a, b *plan.Mitmdump) {
	const at = "egress.mitmdump"
	switch {
	case reflect.DeepEqual(a, b):
	case a == nil:
		d.widens(at, nil, b, "other code runs on the host, over the requests of inspected hosts")
	case b == nil:
		d.widens(at, a, nil, "what the addons may have refused is let through")
	case slices.EqualFunc(a.Addons, b.Addons, func(x, y plan.Addon) bool { return x.SHA256 == y.SHA256 }):
		d.same(at, a, b, "the same addons, by digest")
	default:
		d.widens(at, a, b, "other code runs on the host, over the requests of inspected hosts")
	}
	if a != nil && b != nil {
		d.unknown(at, *a, *b, "Addons")
	}
}

func (d *diff) rules(a, b *plan.Bottle) error {
	changes, err := policy.Compare(a, b)
	if err != nil {
		return fault.As(err).WithHint("bottle-plan makes rules that can be compared")
	}
	for _, c := range changes {
		d.clauses = append(d.clauses, Clause{Path: "bottle.egress.rules", Host: c.Host, Ports: c.Ports, Resolved: c.Resolved, Before: c.Before, After: c.After, Verdict: c.Effect, Why: c.Why})
	}
	if x, y := digest(a.Egress.Rules), digest(b.Egress.Rules); len(changes) == 0 && x != y {
		d.same("egress.rules", x, y, "written differently, and every request is answered alike")
	}
	return nil
}

// digest is of what rules say, and not of the lines of the manifest they stand
// in: those shift with every edit.
func digest(rules []plan.Rule) string {
	rules = slices.Clone(rules)
	for i := range rules {
		rules[i].From, rules[i].RequestsFrom, rules[i].DLPAllowFrom = "", "", ""
	}
	return policy.RulesSHA256(rules)
}

func (d *diff) secrets(a, b []plan.Secret) {
	name := func(s plan.Secret) string { return s.Name }
	pairs(a, b, name, func(key string, x, y *plan.Secret) {
		at := fmt.Sprintf("secrets[%q]", key)
		switch {
		case x == nil:
			d.widens(at, nil, y, "the secret is new")
		case y == nil:
			d.narrows(at, x, nil)
		default:
			d.secret(at, x, y)
		}
	})
}

func (d *diff) secret(at string, x, y *plan.Secret) {
	if x.From != y.From {
		d.widens(at+".from", x.From, y.From, "another value is used")
	}
	if !slices.Equal(x.Command, y.Command) {
		d.widens(at+".command", x.Command, y.Command, "another command runs on the host")
	}
	if x.GuestCanRead != y.GuestCanRead {
		d.widens(at+".guest_can_read", x.GuestCanRead, y.GuestCanRead, "a secret is never for the guest to read")
	}
	where := func(in plan.Injection) string { return in.Host + " " + in.Header }
	pairs(x.Inject, y.Inject, where, func(key string, u, v *plan.Injection) {
		at := fmt.Sprintf("%s.inject[%q]", at, key)
		switch {
		case u == nil:
			d.widens(at, nil, v, "the secret goes to another place")
		case v == nil:
			d.narrows(at, u, nil)
		case u.Format != v.Format:
			d.widens(at+".format", u.Format, v.Format, "the secret is sent in another form")
		}
		if u != nil && v != nil {
			d.unknown(at, *u, *v, "Host", "Header", "Format")
		}
	})
	d.unknown(at, *x, *y, "Name", "From", "Command", "Inject", "GuestCanRead")
}
