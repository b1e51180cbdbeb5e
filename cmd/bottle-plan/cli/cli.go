// Package cli is the body of bottle-plan. Nothing in it writes a file, opens a
// connection or starts a program, but where the caller asks for it: -o writes,
// and the verbs sign and verify run ssh-keygen.
package cli

import (
	"context"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
)

// defaultManifest is read where -m is not given.
const defaultManifest = "bottle.json"

const help = `
Reads the manifest (JSON with comments) and prints one document a line for each
AGENT: what it may reach, see and use, and where its secrets come from. Without
AGENT, the manifest's only agent. The same manifest gives the same bytes on any
machine; nothing is written, resolved or started.

    bottle-plan claude                    # the plan of one agent
    bottle-plan --pretty claude | less    # for people; flags come first
    bottle-plan claude | bottle-vm up     # and run it
    bottle-plan --hash claude             # the digest of the plan, for a review to pin
    bottle-plan init >bottle.json         # a manifest to start from
    bottle-plan diff old.json bottle.json # what a change of it opens or closes

docs/manifest.md describes every field. Exit statuses: docs/exit-codes.md.`

// Run is the command.
func Run(ctx context.Context, p *tool.Proc) int {
	fs := p.Flags("bottle-plan")
	out := p.OutputFlags(fs)
	c := planCommand{p: p, out: out}
	fs.StringVar(&c.file, "m", defaultManifest, "read the manifest from `FILE`; - is stdin")
	fs.BoolVar(&c.all, "all", false, "plan every agent of the manifest, sorted by name")
	fs.BoolVar(&c.hash, "hash", false, "print the digest of each plan instead of the document")
	c.pretty = func() bool { return fs.Lookup("pretty").Value.String() == "true" }
	root := &tool.Command{
		Name:       "bottle-plan",
		ShortUsage: "bottle-plan [-m FILE] [--hash] [--all | AGENT…]",
		ShortHelp:  "turn a manifest into plan documents",
		LongHelp:   help,
		FlagSet:    fs,
		Subcommands: []*tool.Command{
			checkCommand(p), initCommand(p), schemaCommand(p), diffCommand(p), signCommand(p), verifyCommand(p),
		},
		Exec: func(_ context.Context, args []string) error { return c.run(args) },
	}
	return p.Run(ctx, root)
}

// planCommand is bottle-plan without a verb.
type planCommand struct {
	p         *tool.Proc
	out       *tool.Output
	file      string
	all, hash bool
	pretty    func() bool
}

func (c *planCommand) run(args []string) error {
	if err := tool.CheckArgs(args); err != nil {
		return err
	}
	if c.all && len(args) > 0 {
		return fault.New(fault.Usage, "usage", "--all and agent %q at the same time", args[0]).WithHint("leave one of the two out")
	}
	if c.hash && c.pretty() {
		return fault.New(fault.Usage, "usage", "--hash and --pretty at the same time").WithHint("a digest has one form; leave --pretty out")
	}
	if err := c.out.NotOver(c.file); err != nil {
		return err
	}
	if err := c.plans(args); err != nil {
		return c.failed(err)
	}
	return c.out.Close()
}

// failed reports err, also as a document: the next stage of a pipe forwards it
// and fails with the same status.
func (c *planCommand) failed(err error) error {
	if exit := fault.As(err).Exit; c.hash || exit == fault.IO || exit == fault.CantCreate {
		return err // there is no document, or nowhere to write it
	}
	status, err := c.p.FailDoc("plan", c.out, nil, err)
	if err != nil {
		return err
	}
	if err := c.out.Close(); err != nil {
		return err
	}
	return tool.Exit(status)
}

func (c *planCommand) plans(args []string) error {
	m, err := loadManifest(c.p, c.file)
	if err != nil {
		return err
	}
	agents, err := c.choose(m, args)
	if err != nil {
		return err
	}
	// All are made before the first is written: a stream is whole or an error.
	bottles := make([]*plan.Bottle, len(agents))
	for i, a := range agents {
		if bottles[i], err = m.Plan(a); err != nil {
			return err
		}
	}
	for _, b := range bottles {
		if err := c.write(b, len(bottles) > 1); err != nil {
			return err
		}
	}
	return nil
}

func (c *planCommand) choose(m *manifest.Manifest, args []string) ([]string, error) {
	agents := m.Agents()
	switch {
	case c.all:
		return agents, nil
	case len(args) > 0:
		seen := map[string]bool{}
		for _, a := range args {
			if seen[a] {
				return nil, fault.New(fault.Usage, "usage", "agent %q is named twice", a).WithHint("an id is planned once; give the second agent a name of its own")
			}
			seen[a] = true
			if !slices.Contains(agents, a) {
				return nil, unknownAgent(m, a)
			}
		}
		return args, nil
	case len(agents) == 1:
		return agents, nil
	}
	return nil, fault.New(fault.Usage, "which_agent", "%s has %d agents and none was named", m.Name, len(agents)).
		WithHint("name one of %s, or give --all", strings.Join(agents, ", "))
}

// unknownAgent also names the verbs: a verb that was misspelt is taken for an
// agent.
func unknownAgent(m *manifest.Manifest, name string) error {
	f := fault.New(fault.Usage, "unknown_agent", "%s has no agent %q", m.Name, name)
	if k := m.Nearest(name); k != "" {
		return f.WithHint("did you mean %s?", k)
	}
	return f.WithHint("its agents: %s; verbs: check, diff, init, schema, sign, verify", strings.Join(m.Agents(), ", "))
}

func (c *planCommand) write(b *plan.Bottle, named bool) error {
	if c.hash {
		digest, err := plan.Digest(b)
		if err != nil {
			return err
		}
		if named {
			digest += "  " + b.Agent
		}
		return c.out.WriteLine([]byte(digest))
	}
	d, err := plan.New(b)
	if err != nil {
		return err
	}
	if n := len(d.Raw("bottle")) + 64; n > plan.MaxBytes { // and the envelope
		return fault.New(fault.Data, "too_large", "the plan of %s has %d MiB, and a document may have %d", b.Agent, n>>20, plan.MaxBytes>>20).
			WithHint("allow ranges or wildcards in place of so many hosts")
	}
	return c.out.WriteDoc(d)
}

func writeFailed(err error) error {
	if err == nil {
		return nil
	}
	return fault.New(fault.IO, "write_failed", "writing stdout: %w", err).
		WithHint("was the reader of this pipe gone, or is the disk full?")
}
