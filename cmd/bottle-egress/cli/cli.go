// Package cli is the body of bottle-egress. The filter is in this file; every
// verb has a file of its own.
package cli

import (
	"context"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
)

// stage is the name under which failures and diagnostics are recorded.
const stage = "egress"

// Run is bottle-egress as a value; it returns the exit status.
func Run(ctx context.Context, p *tool.Proc) int {
	fs := p.Flags("bottle-egress")
	out := p.OutputFlags(fs)
	return p.Run(ctx, &tool.Command{
		Name:       "bottle-egress",
		ShortUsage: "bottle-plan … | bottle-egress [-o FILE] [--pretty]",
		ShortHelp:  "add to documents what may leave the bottle, and what no proxy can see",
		LongHelp: `
Reads documents that have a bottle section and adds egress: the digest of the
rules, the configuration for pipelock with its sha256 (where pipelock has one
for the policy), and residual, the list of what this policy cannot see. Nothing
is looked up, run or written.

  bottle-plan claude | bottle-egress --pretty
  bottle-plan claude | bottle-egress yaml > pipelock.yaml
  bottle-plan claude | bottle-egress serve --listen tcp:127.0.0.1:3128
  bottle-plan claude | bottle-egress explain api.example.com
  bottle-egress allow --bottle claude --for 1h docs.example.org
  bottle-egress log --follow claude`,
		FlagSet: fs,
		Subcommands: []*tool.Command{yamlCommand(p), serveCommand(p), explainCommand(p), learnCommand(p), replayCommand(p),
			allowCommand(p), denyCommand(p), rulesCommand(p), revertCommand(p), logCommand(p)},
		Exec: func(ctx context.Context, args []string) error {
			if err := noVerb(args); err != nil {
				return err
			}
			return p.Filter(ctx, stage, out, func(_ context.Context, d *plan.Doc) error { return derive(p, d) })
		},
	})
}

func noVerb(args []string) error {
	if err := tool.CheckArgs(args); err != nil || len(args) == 0 {
		return err
	}
	return fault.New(fault.Usage, "usage", "unknown verb %q", args[0]).
		WithHint("the verbs are yaml, serve, explain, learn, replay, allow, deny, rules, revert and log; without one, documents are read from stdin")
}

// derive writes the egress section. One that stands in the document already is
// computed again: it is derived from bottle, and an edit of it has no effect.
func derive(p *tool.Proc, d *plan.Doc) error {
	b, err := d.Bottle()
	if err != nil {
		return err
	}
	e, err := pipelock.Derive(b)
	if err != nil {
		return err
	}
	before := string(d.Raw("egress"))
	if err := d.Set("egress", e); err != nil {
		return err
	}
	if before == "" || before == string(d.Raw("egress")) {
		return nil
	}
	const text = "the egress section differed from what follows from bottle and was computed again; edit the policy in bottle.egress or the manifest"
	p.Warn("%s: %s", b.ID, text)
	return d.Note(plan.Diagnostic{Stage: stage, Severity: "warning", Code: "egress_recomputed", Message: text, Path: "egress"})
}
