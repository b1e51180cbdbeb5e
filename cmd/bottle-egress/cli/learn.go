package cli

import (
	"context"
	"os"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/replay"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
)

func learnCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-egress learn")
	out := p.OutputFlags(fs)
	name := fs.String("name", "", "the bottle's `NAME` under bottles in the manifest, where the log does not tell it")
	withPlan := fs.Bool("plan", false, "read the plan that is to be replaced from stdin, and keep what its secrets and inspected hosts need")
	unused := fs.Bool("unused", false, "list the rules of the plan on stdin that nothing in the log came to, instead")
	wildcards := fs.Int("wildcards", 0, "propose a wildcard where `N` or more hosts stand directly below one name; 0 is never")
	return &tool.Command{
		Name: "learn",
		ShortUsage: `bottle-egress learn [--name NAME] [--wildcards N] [-o FILE] [--pretty] AUDIT…
       bottle-plan … | bottle-egress learn --plan [--wildcards N] [-o FILE] [--pretty] AUDIT…
       bottle-plan … | bottle-egress learn --unused [-o FILE] AUDIT…`,
		ShortHelp: "propose the smallest allowlist that would have served an audit log",
		LongHelp: `
Reads audit logs, each with the files that were rotated out of it, and prints a
patch for the manifest: a JSON Merge Patch (RFC 7396) that replaces egress.allow
of the bottle by what was asked for, allowed or denied: exact hosts, with the
ports and protocols that were used, and in "why" how often. It is read before it
is applied: what an agent asks for is not what it should have.

AUDIT is a file, a bottle, also one that is gone, or - for stdin.

On stderr it says what is not proposed: metadata addresses, odd spellings of
addresses, hosts that an entry of deny is about, what was refused for another
reason than host and port, and what a preset opens.

  bottle-egress learn claude >patch.json
  jq -s '.[0] * .[1]' bottle.json patch.json >new.json && bottle-plan check -m new.json
  bottle-plan claude | bottle-egress learn --unused claude`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.CheckArgs(args); err != nil {
				return err
			}
			if *wildcards == 1 || *wildcards < 0 {
				return fault.New(fault.Usage, "usage", "--wildcards %d", *wildcards).WithHint("2 is the least: one host is no reason for a wildcard")
			}
			if *unused && (*withPlan || *name != "" || *wildcards > 0) {
				return fault.New(fault.Usage, "usage", "--unused proposes nothing, and goes with none of --plan, --name and --wildcards")
			}
			l, err := readLogs(p, args, *withPlan || *unused)
			if err != nil {
				return err
			}
			var b *plan.Bottle
			if *withPlan || *unused {
				if b, err = onePlan(ctx, p); err != nil {
					return err
				}
			}
			if *unused {
				err = writeUnused(out, l, b)
			} else {
				err = writePatch(p, out, l, b, *name, *wildcards)
			}
			if err != nil {
				return err
			}
			return out.Close()
		},
	}
}

// readLogs reads all logs that are named; - is stdin unless the plan is there.
func readLogs(p *tool.Proc, args []string, stdinTaken bool) (*replay.Log, error) {
	if len(args) == 0 {
		return nil, fault.New(fault.Usage, "usage", "no audit log is named").
			WithHint("name a bottle, also one that is gone, or a file; bottle-vm ls shows the ids")
	}
	l := &replay.Log{}
	for _, a := range args {
		var err error
		switch {
		case a != "-":
			var path string
			if path, err = auditOf(p, a); err == nil {
				err = l.Read(path)
			}
		case stdinTaken:
			err = fault.New(fault.Usage, "usage", "the audit log and the plan cannot both be stdin").WithHint("name the log's file")
		case tool.IsTerminal(p.Stdin):
			err = fault.New(fault.Usage, "usage", "stdin is a terminal, and - reads an audit log from it").WithHint("name the log's file")
		default:
			stdinTaken = true
			err = l.ReadStream(p.Stdin, "stdin")
		}
		if err != nil {
			return nil, err
		}
	}
	for _, name := range l.Unfinished {
		p.Warn("%s: the last line has no end and is left out: the gate is writing it, or was killed at it", name)
	}
	return l, nil
}

// auditOf gives the file that an argument names: itself, or the log of a bottle
// as lib/state finds it.
func auditOf(p *tool.Proc, arg string) (string, error) {
	_, vm := plan.SplitVMID(arg)
	if fi, err := os.Stat(arg); err == nil && !fi.IsDir() || !vm && plan.CheckID(arg) != nil {
		return arg, nil
	}
	root, err := state.Open(p.Getenv)
	if err != nil {
		return "", err
	}
	id, err := root.FindAudit(arg)
	return root.Audit(id), err
}

func onePlan(ctx context.Context, p *tool.Proc) (*plan.Bottle, error) {
	d, err := one(ctx, p)
	if err != nil {
		return nil, err
	}
	return d.Bottle()
}

// patch is a JSON Merge Patch for a manifest. It has no null, which would take a
// member away: jq's * applies it as well.
type patch struct {
	Bottles map[string]patchBottle `json:"bottles"`
}

type patchBottle struct {
	Egress patchEgress `json:"egress"`
}

type patchEgress struct {
	Allow []replay.Entry `json:"allow"`
}

func writePatch(p *tool.Proc, out *tool.Output, l *replay.Log, b *plan.Bottle, name string, wildcards int) error {
	if name == "" {
		name = replay.BottleName(l, b)
	}
	if name == "" {
		return fault.New(fault.Usage, "which_bottle", "nothing in the log tells what the bottle is called in the manifest").
			WithHint("give its name under bottles: --name dev")
	}
	lesson, err := replay.Learn(l, replay.Options{Plan: b, Wildcards: wildcards})
	if err != nil {
		return err
	}
	for _, r := range lesson.Remarks {
		p.Warn("%s", r)
	}
	line, err := plan.Encode(patch{map[string]patchBottle{name: {patchEgress{lesson.Allow}}}})
	if err != nil {
		return err
	}
	return out.WriteLine(line)
}

func writeUnused(out *tool.Output, l *replay.Log, b *plan.Bottle) error {
	list, err := replay.NeverUsed(l, b)
	if err != nil {
		return err
	}
	for _, u := range list {
		line, err := plan.Encode(u)
		if err != nil {
			return err
		}
		if err := out.WriteLine(line); err != nil {
			return err
		}
	}
	return nil
}
