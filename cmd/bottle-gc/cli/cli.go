// Package cli is the body of bottle-gc.
package cli

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/image"
	"github.com/bottle-tools/bottle/lib/orphan"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/reaper"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
)

const longHelp = `An orphan is what belongs to a bottle whose keeper is dead or whose owner is
gone, or to no bottle at all: machines, sandboxes, processes, sockets, folders,
unfinished cache entries, prepared machines (bottle-vm up --warm) that are dead
or were not used for a day. A live bottle, a bottle being born and what belongs
to another user are never touched, and neither is what was set aside from a
workspace.

Without a flag it lists one line of JSON an orphan and changes nothing.
--apply removes them and prints nothing unless something is wrong, so that
cron stays quiet; with -v it prints each orphan that is gone.

  bottle-gc                  what is left over, and how do we know?
  bottle-gc --check          exit 1 if anything is
  bottle-gc --apply          remove it
  */10 * * * * bottle-gc --apply     all that cron needs

It looks at the bottles of the user who runs it.`

type flags struct {
	apply, check, verbose bool
	minAge                tool.Duration
	cache                 string
}

// Run is bottle-gc.
func Run(ctx context.Context, p *tool.Proc) int {
	f := flags{minAge: tool.Duration(orphan.DefaultMinAge)}
	fs := p.Flags("bottle-gc")
	out := p.OutputFlags(fs)
	fs.BoolVar(&f.apply, "apply", false, "remove the orphans")
	fs.BoolVar(&f.check, "check", false, "list, and exit 1 if there are any")
	fs.BoolVar(&f.verbose, "v", false, "with --apply: print each orphan that was removed")
	fs.Var(&f.minAge, "min-age", "how old something without a record has to be: `DURATION` as 90s, 2h or 1d")
	fs.StringVar(&f.cache, "cache", "", "the image cache `FOLDER`, if it is not at its usual place")
	p.Ambient(fs, "cache")
	return p.Run(ctx, &tool.Command{
		Name:       "bottle-gc",
		ShortUsage: "bottle-gc [--apply [-v] | --check] [--min-age DURATION] [-o FILE]",
		ShortHelp:  "list what dead bottles left behind, and remove it with --apply",
		LongHelp:   longHelp,
		FlagSet:    fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			return f.run(ctx, p, out)
		},
	})
}

func (f flags) run(ctx context.Context, p *tool.Proc, out *tool.Output) error {
	switch {
	case f.apply && f.check:
		return fault.New(fault.Usage, "usage", "--apply and --check exclude each other").
			WithHint("bottle-gc --apply && bottle-gc --check")
	case f.verbose && !f.apply:
		return fault.New(fault.Usage, "usage", "-v goes with --apply").WithHint("without --apply all orphans are printed anyway")
	case f.minAge < 0:
		return fault.New(fault.Usage, "usage", "--min-age %s is negative", f.minAge.String()).WithHint("0 is the least")
	}
	root, err := state.Open(p.Getenv)
	if err != nil {
		return err
	}
	src := f.sources(p, root.Dir)
	minAge := time.Duration(f.minAge)
	facts, err := reaper.Collect(ctx, root, p.Now(), minAge, src)
	status := report(p, err)
	orphans := orphan.Decide(facts)

	var written error
	write := func(o orphan.Orphan) {
		line, err := plan.Encode(o)
		if err == nil {
			err = out.WriteLine(line)
		}
		if written == nil {
			written = err
		}
	}
	if f.apply {
		err := reaper.Apply(ctx, root, orphans, p.Now, minAge, engines.ByName, src, func(o orphan.Orphan) {
			if f.verbose {
				write(o)
			}
		})
		status = fault.Worst(status, report(p, err))
	} else {
		for _, o := range orphans {
			write(o)
		}
	}
	if written == nil {
		written = out.Close()
	}
	if written != nil {
		return written
	}
	if ctx.Err() != nil {
		return tool.Exit(tool.Interrupted)
	}
	if f.check && len(orphans) > 0 {
		status = fault.Worst(status, fault.No)
	}
	return tool.Exit(status)
}

// report prints what went wrong, each with its own line, and gives the worst
// status. An interrupt has a status of its own.
func report(p *tool.Proc, err error) int {
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		status := fault.OK
		for _, e := range many.Unwrap() {
			status = fault.Worst(status, report(p, e))
		}
		return status
	}
	if err == nil || errors.Is(err, context.Canceled) {
		return fault.OK
	}
	p.PrintError(err)
	return fault.As(err).Exit
}

func (f flags) sources(p *tool.Proc, stateDir string) reaper.Sources {
	var src reaper.Sources
	dir := f.cache
	if dir == "" {
		// Without a home there is no cache either.
		dir, _ = image.DefaultDir(p.Getenv, os.Getuid(), p.Getenv("HOME"))
	}
	if dir != "" {
		src.StaleCache = func() ([]string, error) { return image.Stale(dir) }
		src.SweepCache = func() error { return image.Sweep(dir) }
	}
	machines(p, stateDir, &src)
	return src
}
