package cli

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
)

type execFlags struct {
	tty, interactive, agent bool
	env                     tool.List
	dir                     string
	timeout                 tool.Duration
}

func (v *vm) execCommand() *tool.Command {
	var f execFlags
	fs := v.p.Flags("bottle-vm exec")
	fs.BoolVar(&f.tty, "t", false, "give the command a terminal of its own; stdin has to be one")
	fs.BoolVar(&f.interactive, "i", false, "pass stdin, which is the default where a bottle is named")
	fs.BoolVar(&f.agent, "agent", false, "run the plan's own command; what stands behind -- is appended")
	fs.Var(&f.env, "e", "set a variable, `K=V`; may be repeated")
	fs.StringVar(&f.dir, "w", "", "run in the guest's `FOLDER`, absolute; /workspace if not given")
	fs.Var(&f.timeout, "timeout", "end the command after `D` (5s, 2m), with status 124")
	return &tool.Command{
		Name:       "exec",
		ShortUsage: "bottle-vm exec [flags] [ID] -- CMD...",
		ShortHelp:  "run a command in a bottle; exits with its status",
		LongHelp: `
With an ID, stdin is the command's. Without, stdin is the bottle's document and
the command's is empty. Exit status: the command's own; 128+n when signal n
ended it; 124 on --timeout; 125 when bottle-vm itself failed.

  bottle-vm exec claude -- git log --oneline
  bottle-plan claude | bottle-vm up | bottle-vm exec -- make test`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			v.execRan = true
			code, err := v.exec(ctx, &f, args)
			if err != nil {
				// Every failure of ours is 125: the guest's own statuses are 0 to 255.
				v.p.PrintError(err)
				return tool.Exit(fault.ExecFailed)
			}
			return tool.Exit(code)
		},
	}
}

func (v *vm) exec(ctx context.Context, f *execFlags, args []string) (int, error) {
	if len(v.guest) == 0 && (!f.agent || len(args) > 1) {
		return 0, noCommand(args)
	}
	id, err := oneArg(args)
	if err != nil {
		return 0, err
	}
	for _, e := range f.env {
		if name, _, ok := strings.Cut(e, "="); !ok || !plan.ValidEnvName(name) {
			return 0, fault.New(fault.Usage, "usage", "-e %q is not NAME=VALUE", e).WithHint("-e NAME=VALUE, once for each variable")
		}
	}
	b, rec, p, err := v.live(ctx, id)
	if err != nil {
		return 0, err
	}
	eng, err := engines.Find(rec.Engine)
	if err != nil {
		return 0, err
	}
	q := engine.ExecRequest{Argv: v.guest, Env: f.env, Dir: f.dir, TTY: f.tty}
	if f.agent {
		q.Argv = slices.Concat(p.Command, v.guest)
	}
	if err := v.streams(&q, id != ""); err != nil {
		return 0, err
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH)
	defer signal.Stop(signals)
	q.Signals = signals

	// A signal is the command's to answer, so the context that ends with it is
	// not this one.
	ctx = context.WithoutCancel(ctx)
	if f.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(f.timeout))
		defer cancel()
	}
	ref := engine.Ref{ID: b.ID, Dir: b.Dir, RunDir: rec.RunDir, Bottle: p, Env: p.Environ()}
	code, err := eng.Exec(ctx, ref, q)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fault.ExecTimeout, nil
	}
	return code, err
}

// noCommand shows where -- goes: what was typed may be the whole of it but for that.
func noCommand(args []string) error {
	id, cmd := "ID", "CMD..."
	if len(args) > 0 {
		id = args[0]
	}
	if len(args) > 1 {
		cmd = strings.Join(args[1:], " ")
	}
	return fault.New(fault.Usage, "usage", "no command behind --").WithHint("bottle-vm exec %s -- %s", id, cmd)
}

// streams gives the command this process's own. -t adds TERM, the one thing a
// terminal's program needs to know of it.
func (v *vm) streams(q *engine.ExecRequest, named bool) error {
	stdout, ok1 := v.p.Stdout.(*os.File)
	stderr, ok2 := v.p.Stderr.(*os.File)
	stdin, ok3 := v.p.Stdin.(*os.File)
	if !ok1 || !ok2 || named && !ok3 {
		return fault.New(fault.Bug, "bug", "exec needs real files as streams")
	}
	q.Stdout, q.Stderr = stdout, stderr
	if named {
		q.Stdin = stdin
	}
	if !q.TTY {
		return nil
	}
	if !named || !tool.IsTerminal(stdin) {
		return fault.New(fault.Usage, "usage", "-t needs a terminal as stdin").WithHint("leave -t out in a pipe or script")
	}
	if term := v.p.Getenv("TERM"); term != "" {
		q.Env = append([]string{"TERM=" + term}, q.Env...)
	}
	return nil
}
