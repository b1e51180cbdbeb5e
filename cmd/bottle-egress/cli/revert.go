package cli

import (
	"context"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/tool"
)

func revertCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-egress revert")
	var f liveFlags
	var all bool
	f.common(fs)
	fs.BoolVar(&all, "all", false, "take back all that was added")
	return &tool.Command{
		Name:       "revert",
		ShortUsage: "bottle-egress revert --bottle ID (--all | HOST[:PORT]...)",
		ShortHelp:  "take back what allow and deny added to a running bottle",
		LongHelp: `
Takes rules back that were added while the bottle runs, so that the plan alone
holds again: what only they allowed is cut at once, and what only they denied is
open again. HOST is as rules prints it; without a PORT it is about every rule of
that host. Status 1 if there is none. Prints one line of JSON.

  bottle-egress revert --bottle claude docs.example.org
  bottle-egress revert --bottle claude --all`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.CheckArgs(args); err != nil {
				return err
			}
			if all == (len(args) > 0) {
				return fault.New(fault.Usage, "usage", "revert takes hosts, or --all").WithHint("bottle-egress rules --bottle ID lists what there is")
			}
			c := control.Change{All: all}
			for _, arg := range args {
				host, port, err := cutTarget(arg)
				if err != nil {
					return err
				}
				e, err := policy.NormalizeDeny(host)
				if err != nil {
					return err
				}
				c.Revert = append(c.Revert, control.Target{Host: e.Host, CIDR: e.CIDR(), Port: port})
			}
			return sendChange(ctx, p, f.bottle, "revert", c)
		},
	}
}
