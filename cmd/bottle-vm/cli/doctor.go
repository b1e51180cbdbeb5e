package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/sidecar"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/smolvm/wheel"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/worktree"
)

// finding is a line of doctor.
type finding struct {
	Check    string `json:"check"`
	OK       bool   `json:"ok"`
	Required bool   `json:"required"`
	Detail   string `json:"detail"`
	Hint     string `json:"hint,omitempty"`
	TookMS   int64  `json:"took_ms"`
}

func (v *vm) doctorCommand() *tool.Command {
	const usual = 2 * time.Minute
	var limit tool.Duration
	var install string
	fs := v.p.Flags("bottle-vm doctor")
	fs.Var(&limit, "timeout", fmt.Sprintf("give each check at most `D`; %s if not given, and longer for a first start", usual))
	fs.StringVar(&install, "install", "", "first install `PROGRAM`[@VERSION]: smolvm@"+strings.Join(wheel.Versions(), ", smolvm@"))
	return &tool.Command{
		Name:       "doctor",
		ShortUsage: "bottle-vm doctor [--timeout D] [--install smolvm[@VERSION]]",
		ShortHelp:  "what works on this host, proved by doing it; one JSON object a line",
		LongHelp: `
An engine counts as working when it has booted a guest and run a command in it:
/dev/kvm that opens proves nothing. Exits 78 when no engine works.

--install smolvm fetches the Python package smolmachines with pip, checks it
against the digest that is pinned in this program, and puts smolvm into your
data folder, where all tools find it. Several versions can stand side by side;
the newest is used.`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			if limit < 0 {
				return fault.New(fault.Usage, "usage", "--timeout %s: no check is done in less than no time", time.Duration(limit))
			}
			if err := v.install(ctx, install); err != nil {
				return err
			}
			more := limit == 0
			if more {
				limit = tool.Duration(usual)
			}
			return v.doctor(ctx, time.Duration(limit), more)
		},
	}
}

// install puts a program where the tools find it.
func (v *vm) install(ctx context.Context, what string) error {
	if what == "" {
		return nil
	}
	program, version, ok := strings.Cut(what, "@")
	if !ok {
		version = wheel.Newest
	}
	if program != "smolvm" {
		return fault.New(fault.Usage, "usage", "--install %s: only smolvm can be installed", program).
			WithHint("gVisor comes with the tools; pipelock has to be on PATH, or in BOTTLE_PIPELOCK")
	}
	dir := smolvm.InstallDir(v.p.Getenv)
	if dir == "" {
		return fault.New(fault.Usage, "usage", "--install needs a home: neither XDG_DATA_HOME nor HOME is set")
	}
	path, err := wheel.Install(ctx, dir, version)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(v.p.Stderr, "bottle-vm: smolvm %s is %s\n", version, path)
	return err
}

// doctor runs the checks, each within limit; with more, one that has to start an
// engine for the first time gets the time for that.
func (v *vm) doctor(ctx context.Context, limit time.Duration, more bool) error {
	out := v.p.StdoutOutput()
	worst, working := fault.OK, 0
	run := func(name string, required bool, check func(context.Context) (string, error)) error {
		limit := limit
		if name, ok := strings.CutPrefix(name, "engine "); ok && more {
			limit += v.firstStart(ctx, name)
		}
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		begun := time.Now()
		detail, err := check(ctx)
		if errors.Is(ctx.Err(), context.DeadlineExceeded) && err != nil {
			err = cutOff(limit, err)
		}
		f := finding{Check: name, OK: err == nil, Required: required, Detail: detail, TookMS: time.Since(begun).Milliseconds()}
		if e := fault.As(err); e != nil {
			f.Detail, f.Hint = e.Error(), e.Hint
			if required {
				worst = fault.Host
			}
		} else if strings.HasPrefix(name, "engine ") {
			working++
		}
		return writeJSON(out, f)
	}
	for _, c := range []struct {
		name     string
		required bool
		check    func(context.Context) (string, error)
	}{
		{"state folder", true, v.checkState},
		{"tools", true, checkTools},
		{"engine gvisor", false, v.checkEngine("gvisor")},
		{"engine smolvm", false, v.checkEngine("smolvm")},
		{"proxy pipelock", false, v.checkPipelock},
		{"sidecar mitmdump", false, v.checkMitmdump},
		{"git", false, worktree.GitVersion},
	} {
		if err := run(c.name, c.required, c.check); err != nil {
			return err
		}
	}
	if working == 0 {
		worst = fault.Host
	}
	return tool.Exit(worst)
}

// cutOff is for a check that was ended by its time limit.
func cutOff(limit time.Duration, err error) error {
	return fault.New(fault.Host, "check_timeout", "it was not done after %s: %w", limit, err).WithHint("give it more time with --timeout")
}

func (v *vm) checkState(context.Context) (string, error) {
	root, err := v.root()
	if err != nil {
		return "", err
	}
	if err := root.WriteFile("doctor.json", time.Now().UTC()); err != nil {
		return "", err
	}
	return root.Dir, os.Remove(root.Dir + "/doctor.json")
}

func checkTools(context.Context) (string, error) {
	var paths []string
	for _, name := range []string{"bottle-plan", "bottle-egress", "bottle-pack", "bottle-gc", "bottle-keeper", "bottle-guest"} {
		path, err := beside(name)
		if err != nil {
			return "", err
		}
		paths = append(paths, path)
	}
	return strings.Join(paths, " "), nil
}

func (v *vm) checkEngine(name string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		e, err := engines.Find(name)
		if err == nil {
			err = e.Available(ctx)
		}
		if err != nil {
			return "", err
		}
		if err := v.checkBoot(ctx, e); err != nil {
			return "", err
		}
		return "booted a guest and ran a command in it", nil
	}
}

// firstStart gives the time that an engine's first start may take on top, and says
// why on stderr.
func (v *vm) firstStart(ctx context.Context, name string) time.Duration {
	e, err := engines.Find(name)
	if err != nil {
		return 0
	}
	tellFirst(ctx, e, v.p.Stderr)
	if f, ok := e.(engine.FirstStarter); ok {
		_, more := f.FirstStart(ctx)
		return more
	}
	return 0
}

// checkBoot boots a guest, and remembers what came of it for runtime auto.
func (v *vm) checkBoot(ctx context.Context, e engine.Engine) error {
	found := bootCheck(ctx, e)
	if ctx.Err() != nil {
		return found // cut off by --timeout, it says nothing about the engine
	}
	key, ok, err := checkKey(ctx, e)
	if err != nil || !ok {
		return cmp.Or(found, err)
	}
	root, err := v.root()
	if err == nil {
		_, err = noteCheck(root, key, found, v.p.Now())
	}
	return cmp.Or(found, err)
}

func (v *vm) checkPipelock(ctx context.Context) (string, error) {
	prog, err := pipelock.Find(ctx, v.p.Getenv)
	if err != nil {
		return "", err
	}
	return prog.Path + " " + prog.Version, nil
}

// checkMitmdump does not start it, which takes seconds: up sees whether it does
// what is needed.
func (v *vm) checkMitmdump(context.Context) (string, error) {
	path, err := sidecar.Find(v.p.Getenv)
	if e := fault.As(err); e != nil {
		return "", e.WithHint("only egress.mitmdump needs it: install mitmproxy 9 or newer (pip install mitmproxy), or set BOTTLE_MITMDUMP")
	}
	return path, nil
}
