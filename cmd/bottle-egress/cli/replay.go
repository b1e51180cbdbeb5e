package cli

import (
	"context"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/replay"
	"github.com/bottle-tools/bottle/lib/tool"
)

func replayCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-egress replay")
	out := p.OutputFlags(fs)
	return &tool.Command{
		Name:       "replay",
		ShortUsage: "bottle-plan … | bottle-egress replay [-o FILE] [--pretty] AUDIT…",
		ShortHelp:  "tell which past decisions a new policy would change",
		LongHelp: `
Puts the decisions of audit logs, each with the files that were rotated out of
it, to the policy of the document on stdin. Each one that comes out otherwise is
a line of JSON: host and port, what it was and what it would be now (allow, deny,
or unknown where the log does not tell), the rule, and how often. The last line
counts. AUDIT is a file, or a bottle, also one that is gone.

Exits with 0 if nothing changes, and with 1 if something does.

  bottle-plan -m new.json claude | bottle-egress replay claude`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.CheckArgs(args); err != nil {
				return err
			}
			l, err := readLogs(p, args, true)
			if err != nil {
				return err
			}
			b, err := onePlan(ctx, p)
			if err != nil {
				return err
			}
			changed, err := replay.Replay(l, b)
			if err != nil {
				return err
			}
			if err := writeReplay(out, l, changed); err != nil {
				return err
			}
			if err := out.Close(); err != nil || len(changed) == 0 {
				return err
			}
			return tool.Exit(fault.No)
		},
	}
}

// replayed is the last line of replay: decisions, and those that change by what
// they would be now.
type replayed struct {
	Decisions int `json:"decisions"`
	Changed   int `json:"changed"`
	Allow     int `json:"allow"`
	Deny      int `json:"deny"`
	Unknown   int `json:"unknown"`
}

func writeReplay(out *tool.Output, l *replay.Log, changed []replay.Changed) error {
	total := replayed{Decisions: l.Total()}
	for _, c := range changed {
		total.Changed += c.Count
		switch c.Now {
		case replay.Allow:
			total.Allow += c.Count
		case replay.Deny:
			total.Deny += c.Count
		case replay.Unknown:
			total.Unknown += c.Count
		}
		line, err := plan.Encode(c)
		if err != nil {
			return err
		}
		if err := out.WriteLine(line); err != nil {
			return err
		}
	}
	line, err := plan.Encode(total)
	if err != nil {
		return err
	}
	return out.WriteLine(line)
}
