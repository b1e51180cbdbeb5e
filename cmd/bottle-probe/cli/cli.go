// Package cli is the body of bottle-probe.
package cli

import (
	"context"
	"io"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/probe"
	"github.com/bottle-tools/bottle/lib/tool"
)

// Role runs what the battery calls of its own program; see probe.Role.
func Role(args []string, stdin io.Reader, stdout, stderr io.Writer) (status int, ok bool) {
	return probe.Role(args, stdin, stdout, stderr)
}

// Run is bottle-probe as a value; it returns the exit status.
func Run(ctx context.Context, p *tool.Proc) int {
	var pretty, list bool
	fs := p.Flags("bottle-probe")
	fs.BoolVar(&pretty, "pretty", false, "a table, for people")
	fs.BoolVar(&list, "list", false, "the same as the verb list")
	return p.Run(ctx, &tool.Command{
		Name:       "bottle-probe",
		ShortUsage: "bottle-probe run --allow HOST --deny HOST --sandbox 'CMD with @PROBE' | list | [--pretty] ID",
		ShortHelp:  "try to get out of a sandbox, and report what got out",
		LongHelp: `
A leak battery for any sandbox that can start a command. It makes two networks
of its own, a "host" in which the sandbox is started and an "internet" in which
every address answers and all that arrives is written down, lays out bait, and
runs its client in the sandbox. What the client says counts for nothing: a leak
is what a canary server received or the host's own files say.

  bottle-probe run --allow allowed.test --deny denied.test --pretty \
      --sandbox 'bwrap --unshare-all --ro-bind / / --bind @WORKSPACE @WORKSPACE --proc /proc --dev /dev @PROBE'

With the ID of a running bottle it tries what can be decided beside one: the
host's loopback, sockets, processes and files. The rest takes the laboratory.

docs/probe.md has more, and how well-known sandboxes do.`,
		FlagSet:     fs,
		Subcommands: []*tool.Command{runCommand(p), listCommand(p)},
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.CheckArgs(args); err != nil {
				return err
			}
			switch {
			case list && len(args) == 0:
				return printList(p, pretty)
			case list:
				return fault.New(fault.Usage, "usage", "unexpected argument %q", args[0]).WithHint("--list takes none")
			case len(args) == 0:
				return fault.New(fault.Usage, "usage", "a verb or a bottle is missing").WithHint("one of run, list, or the ID of a running bottle")
			case len(args) > 1:
				return fault.New(fault.Usage, "usage", "unexpected argument %q", args[1]).WithHint("one of run, list, or the ID of a running bottle")
			}
			return report(p, pretty, func(emit func(probe.Result) error) error { return probe.Live(ctx, args[0], p.Getenv, emit) })
		},
	})
}
