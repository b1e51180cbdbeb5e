package cli

import (
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/probe"
	"github.com/bottle-tools/bottle/lib/tool"
)

func listCommand(p *tool.Proc) *tool.Command {
	var pretty bool
	fs := p.Flags("bottle-probe list")
	fs.BoolVar(&pretty, "pretty", false, "a table, for people")
	return &tool.Command{
		Name:       "list",
		ShortUsage: "bottle-probe list [--pretty]",
		ShortHelp:  "the probes that there are, one JSON object a line",
		LongHelp: `
id, name, title, and needs: the control without which the probe proves nothing.

  bottle-probe list | jq -r .name`,
		FlagSet: fs,
		Exec: func(_ context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			return printList(p, pretty)
		},
	}
}

func printList(p *tool.Proc, pretty bool) error {
	if pretty {
		w := tabwriter.NewWriter(p.Stdout, 0, 0, 2, ' ', 0)
		for _, i := range probe.List() {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", i.ID, i.Name, i.Needs, i.Title)
		}
		return writing(w.Flush())
	}
	out := p.StdoutOutput()
	for _, i := range probe.List() {
		line, err := plan.Encode(i)
		if err == nil {
			err = out.WriteLine(line)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func writing(err error) error {
	if err != nil {
		return fault.New(fault.IO, "write_failed", "writing stdout: %w", err)
	}
	return nil
}
