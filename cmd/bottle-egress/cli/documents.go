package cli

import (
	"context"
	"errors"
	"io"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
)

// each gives fn the policy of every document on stdin. It ends at the first that
// cannot be read: what a command says about some of them is no answer.
func each(ctx context.Context, p *tool.Proc, fn func(*plan.Bottle) error) error {
	in, err := p.Input()
	if err != nil {
		return err
	}
	for {
		d, err := in.Next(ctx)
		switch {
		case ctx.Err() != nil:
			return tool.Exit(tool.Interrupted)
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if err := earlierFailure(d); err != nil {
			return err
		}
		b, err := d.Bottle()
		if err == nil {
			err = fn(b)
		}
		if err != nil {
			return err
		}
	}
}

// earlierFailure is the failure of an earlier stage, which has been reported
// there, as this command's own.
func earlierFailure(d *plan.Doc) error {
	f := d.Failure()
	if f == nil {
		return nil
	}
	return &fault.Error{Exit: f.Exit, Code: f.Code, Msg: "the stage " + f.Stage + " before this one failed: " + f.Message, Hint: f.Hint}
}

func writeFailed(err error) error {
	if err == nil {
		return nil
	}
	return fault.New(fault.IO, "write_failed", "writing stdout: %w", err).
		WithHint("was the reader of this pipe gone, or is the disk full?")
}
