package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/plandiff"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/tool"
)

func diffCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-plan diff")
	agent := fs.String("agent", "", "compare the plans of `AGENT` alone")
	pretty := fs.Bool("pretty", false, "write one sentence for each difference, for people, instead of JSON")
	return &tool.Command{
		Name:       "diff",
		ShortUsage: "bottle-plan diff [--agent AGENT] [--pretty] A B",
		ShortHelp:  "tell what differs between two plans, and whether it narrows or widens",
		LongHelp: `
A and B are manifests or documents, - is stdin: what has a member "bottle" is a
document, everything else is read as a manifest. Each difference of B from A is
one line of JSON with its path, what stands before and after, and a verdict:

    narrows   the bottle may do, see or keep less
    same      written differently, and means the same
    widens    it may do, see or keep more, or that cannot be told

The last line is the verdict of all, with counts. Plans are paired by the name
of the agent; an agent that only B has widens. Rules are compared by what they
let through, and not as text. Paths are compared as they are written: nothing
but A, B and what the manifests name under roots is read.

Exits with 3 if B widens anything, and 0 otherwise.

  git show main:bottle.json | bottle-plan diff - bottle.json
  git worktree add base main && bottle-plan diff base/bottle.json bottle.json`,
		FlagSet: fs,
		Exec: func(_ context.Context, args []string) error {
			if err := tool.CheckArgs(args); err != nil {
				return err
			}
			if len(args) != 2 {
				return fault.New(fault.Usage, "usage", "diff takes two files, and %d were given", len(args)).
					WithHint("bottle-plan diff OLD NEW; - is stdin")
			}
			if args[0] == "-" && args[1] == "-" {
				return fault.New(fault.Usage, "usage", "both sides are stdin").WithHint("name a file for one of them")
			}
			return diffFiles(p, args[0], args[1], *agent, *pretty)
		},
	}
}

func diffFiles(p *tool.Proc, fileA, fileB, agent string, pretty bool) error {
	a, err := plansOf(p, fileA)
	if err != nil {
		return err
	}
	b, err := plansOf(p, fileB)
	if err != nil {
		return err
	}
	if agent != "" {
		is := func(x *plan.Bottle) bool { return x.Agent != agent }
		a, b = slices.DeleteFunc(a, is), slices.DeleteFunc(b, is)
		if len(a)+len(b) == 0 {
			return fault.New(fault.Usage, "unknown_agent", "neither %s nor %s has an agent %q", fileA, fileB, agent).
				WithHint("bottle-plan check names those of a manifest")
		}
	}
	found, err := diffPlans(a, b)
	if err != nil {
		return err
	}
	// All are found before the first is written.
	if err := writeDiff(p.StdoutOutput(), found, pretty); err != nil {
		return err
	}
	if found.total() == policy.Widens {
		return tool.Exit(fault.Widens)
	}
	return nil
}

// plansOf reads the plans of a file: those of a manifest's agents, or documents
// as they are.
func plansOf(p *tool.Proc, file string) ([]*plan.Bottle, error) {
	data, err := manifestBytes(p, file, plan.MaxBytes)
	if e := fault.As(err); e != nil && e.Code == "no_manifest" {
		return nil, e.WithHint("A and B are manifests or documents: bottle-plan diff OLD NEW")
	}
	if err != nil {
		return nil, err
	}
	if file == "-" {
		file = "stdin"
	}
	if isDocument(data) {
		plans, err := readDocuments(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		return plans, nil
	}
	if file == "stdin" {
		file = "-"
	}
	m, err := parseManifest(p, file, data)
	if err != nil {
		return nil, err
	}
	var plans []*plan.Bottle
	for _, name := range m.Agents() {
		b, err := m.Plan(name)
		if err != nil {
			return nil, err
		}
		if named := namedFile(&b.Egress); (file == "-" || isPipe(file)) && named != "" {
			// Those of the working folder may be the other side's: an exchanged
			// certificate or addon would be compared with itself.
			return nil, fault.New(fault.Usage, "roots_elsewhere", "a manifest from a pipe names files (%s), and which ones are meant cannot be told", named).
				WithHint("compare folders: git worktree add base main && bottle-plan diff base/bottle.json bottle.json")
		}
		plans = append(plans, b)
	}
	return plans, nil
}

// namedFile is a file whose content is in the plan, or "".
func namedFile(p *plan.Policy) string {
	switch {
	case len(p.Roots) > 0:
		return p.Roots[0].Path
	case p.Mitmdump != nil && len(p.Mitmdump.Addons) > 0:
		return p.Mitmdump.Addons[0].Path
	}
	return ""
}

// isDocument tells a document from a manifest by the first member that only one
// of them has. A manifest may have comments, which end the search.
func isDocument(data []byte) bool {
	d := jsontext.NewDecoder(bytes.NewReader(data))
	if t, err := d.ReadToken(); err != nil || t.Kind() != '{' {
		return false
	}
	for {
		name, err := d.ReadToken()
		if err != nil || name.Kind() != '"' {
			return false
		}
		switch name.String() {
		case "bottle", "error":
			return true
		case "bottles", "agents":
			return false
		}
		if err := d.SkipValue(); err != nil {
			return false
		}
	}
}

func readDocuments(data []byte) ([]*plan.Bottle, error) {
	if len(data) > plan.MaxBytes {
		return nil, fault.New(fault.Data, "too_large", "more than %d MiB of documents", plan.MaxBytes>>20).WithHint("compare them one by one")
	}
	var plans []*plan.Bottle
	for r := plan.NewReader(bytes.NewReader(data)); ; {
		d, err := r.Next()
		if errors.Is(err, io.EOF) {
			return plans, nil
		}
		if err != nil {
			return nil, err
		}
		if f := d.Failure(); f != nil {
			return nil, &fault.Error{Exit: f.Exit, Code: f.Code, Msg: "the stage " + f.Stage + " failed: " + f.Message, Hint: f.Hint}
		}
		b, err := d.Bottle()
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(plans, func(o *plan.Bottle) bool { return o.ID == b.ID }) {
			return nil, fault.New(fault.Data, "several_documents", "bottle %s stands there twice", b.ID).WithHint("keep one of the two")
		}
		plans = append(plans, b)
	}
}

// difference is one line of diff.
type difference struct {
	Bottle string `json:"bottle"`
	plandiff.Clause
}

type differences []difference

func (ds differences) total() string {
	v := policy.Same
	for _, d := range ds {
		v = policy.Worse(v, d.Verdict)
	}
	return v
}

func (ds differences) count(verdict string) (n int) {
	for _, d := range ds {
		if d.Verdict == verdict {
			n++
		}
	}
	return n
}

// diffPlans pairs plans by id. Two single ones are a pair whatever they are
// called.
func diffPlans(a, b []*plan.Bottle) (differences, error) {
	var out differences
	add := func(id string, clauses []plandiff.Clause) {
		for _, c := range clauses {
			out = append(out, difference{id, c})
		}
	}
	byID := func(list []*plan.Bottle, id string) *plan.Bottle {
		i := slices.IndexFunc(list, func(x *plan.Bottle) bool { return x.ID == id })
		if i < 0 {
			return nil
		}
		return list[i]
	}
	single := len(a) == 1 && len(b) == 1
	for _, y := range b {
		x := byID(a, y.ID)
		if single {
			x = a[0]
		}
		if x == nil {
			add(y.ID, plandiff.Added(y))
			continue
		}
		clauses, err := plandiff.Compare(x, y)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", y.ID, err)
		}
		add(y.ID, clauses)
	}
	for _, x := range a {
		if !single && byID(b, x.ID) == nil {
			add(x.ID, plandiff.Removed(x))
		}
	}
	return out, nil
}

func writeDiff(out *tool.Output, found differences, pretty bool) error {
	for _, d := range found {
		line, err := plan.Encode(d)
		if err != nil {
			return err
		}
		if pretty {
			if line, err = sentence(d); err != nil {
				return err
			}
		}
		if err := out.WriteLine(line); err != nil {
			return err
		}
	}
	total := struct {
		Verdict string `json:"verdict"`
		Narrows int    `json:"narrows"`
		Same    int    `json:"same"`
		Widens  int    `json:"widens"`
	}{found.total(), found.count(policy.Narrows), found.count(policy.Same), found.count(policy.Widens)}
	if pretty {
		return out.WriteLine(fmt.Appendf(nil, "%s: %d narrow, %d mean the same, %d widen", total.Verdict, total.Narrows, total.Same, total.Widens))
	}
	line, err := plan.Encode(total)
	if err != nil {
		return err
	}
	return out.WriteLine(line)
}

// sentence is a difference for people.
func sentence(d difference) ([]byte, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "%-8s %s: %s", d.Verdict, d.Bottle, strings.TrimPrefix(d.Path, "bottle."))
	if d.Host != "" {
		fmt.Fprintf(&b, ": %s port %s", d.Host, strings.Trim(strings.ReplaceAll(fmt.Sprint(d.Ports), " ", ","), "[]"))
		if d.Resolved {
			b.WriteString(", where names resolve to it")
		}
	}
	b.WriteString(": ")
	for i, v := range []any{d.Before, d.After} {
		text := []byte("nothing")
		if v != nil {
			var err error
			if text, err = plan.Encode(v); err != nil {
				return nil, err
			}
		}
		if i > 0 {
			b.WriteString(" -> ")
		}
		b.Write(text)
	}
	if d.Why != "" {
		b.WriteString("; " + d.Why)
	}
	return []byte(b.String()), nil
}
