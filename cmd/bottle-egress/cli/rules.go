package cli

import (
	"context"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/tool"
)

func rulesCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-egress rules")
	var f liveFlags
	f.common(fs)
	return &tool.Command{
		Name:       "rules",
		ShortUsage: "bottle-egress rules --bottle ID",
		ShortHelp:  "the rules that were added to a running bottle, one JSON object a line",
		LongHelp: `
Lists what allow and deny added to the rules of the plan: verdict, host or cidr,
ports, protocol, who added it (by, a uid), since and until. None is an empty
list. The rules of the plan are in its document, at bottle.egress.rules.

  bottle-egress rules --bottle claude | jq -r 'select(.until) | .host + " until " + .until'`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			_, rec, err := runningBottle(ctx, p, f.bottle)
			if err != nil {
				return err
			}
			a, err := control.Ask(rec.RunDir, control.Request{Do: "status"}, askLimit)
			if err != nil {
				return err
			}
			for _, r := range live.Show(a.Live) {
				if err := printJSON(p, r); err != nil {
					return err
				}
			}
			return nil
		},
	}
}
