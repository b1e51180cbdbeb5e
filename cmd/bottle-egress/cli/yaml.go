package cli

import (
	"context"
	"errors"
	"io"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
)

func yamlCommand(p *tool.Proc) *tool.Command {
	return &tool.Command{
		Name:       "yaml",
		ShortUsage: "bottle-plan AGENT | bottle-egress yaml",
		ShortHelp:  "print the pipelock configuration of one document",
		LongHelp: `
Prints the policy of the document on stdin as pipelock configuration, strict
and without ports or paths, as it stands in egress.pipelock.yaml.

  bottle-plan claude | bottle-egress yaml > pipelock.yaml
  pipelock check --config pipelock.yaml`,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			d, err := one(ctx, p)
			if err != nil {
				return err
			}
			y, err := yamlOf(d)
			if err != nil {
				return err
			}
			if _, err := p.Stdout.Write(y); err != nil {
				return fault.New(fault.IO, "write_failed", "writing stdout: %w", err)
			}
			return nil
		},
	}
}

func yamlOf(d *plan.Doc) ([]byte, error) {
	b, err := d.Bottle()
	if err != nil {
		return nil, err
	}
	if _, err := pipelock.Derive(b); err != nil {
		return nil, err
	}
	return pipelock.YAML(b)
}

// one reads the only document on stdin. The failure of an earlier stage, which
// has been reported there, becomes this command's status.
func one(ctx context.Context, p *tool.Proc) (*plan.Doc, error) {
	in, err := p.Input()
	if err != nil {
		return nil, err
	}
	d, err := in.Next(ctx)
	switch {
	case ctx.Err() != nil:
		return nil, tool.Exit(tool.Interrupted)
	case err != nil:
		return nil, err
	}
	if err := earlierFailure(d); err != nil {
		return nil, err
	}
	_, err = in.Next(ctx)
	switch {
	case ctx.Err() != nil:
		return nil, tool.Exit(tool.Interrupted)
	case errors.Is(err, io.EOF):
		return d, nil
	}
	return nil, fault.New(fault.Data, "several_documents", "stdin holds more than one document, and this command takes one").
		WithHint("name one agent: bottle-plan AGENT | %s", p.Name)
}
