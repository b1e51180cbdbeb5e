// Package cli is the body of bottle-vm, one file a verb.
package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/reaper"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/trust"
)

// vm is one run of the command.
type vm struct {
	p *tool.Proc
	// guest is what stands behind the first "--" of the raw arguments: a guest
	// command is passed on as it is, never parsed.
	guest    []string
	hasGuest bool
	execRan  bool // exec got past its flags
}

// Run is the command.
func Run(ctx context.Context, p *tool.Proc) int {
	v := &vm{p: p}
	if i := slices.Index(p.Args, "--"); i >= 0 {
		v.guest, v.hasGuest = p.Args[i+1:], true
		p.Args = p.Args[:i]
	}
	verbs := []*tool.Command{
		v.upCommand(), v.execCommand(), v.cpCommand(), v.lsCommand(), v.statusCommand(), v.logsCommand(),
		v.diffCommand(), v.stopCommand(), v.startCommand(), v.downCommand(), v.trustCommand(), v.verifyCommand(), v.doctorCommand(),
	}
	if v.hasGuest && (len(p.Args) == 0 || p.Args[0] != "exec") {
		return p.Report(fault.New(fault.Usage, "usage", "-- stands only before the command of exec").
			WithHint("see bottle-vm --help"))
	}
	code := p.Run(ctx, &tool.Command{
		Name:       "bottle-vm",
		ShortUsage: "bottle-vm VERB [flags] [arguments]",
		ShortHelp:  "start bottles, run commands in them, remove them",
		LongHelp: `
  bottle-plan claude | bottle-vm up          # starts a bottle; prints the document with its vm section
  bottle-vm exec claude -- git status        # an id, or a name that is unique
  bottle-vm down claude

Every verb has its own --help. Exit statuses: docs/exit-codes.md.`,
		FlagSet:     p.Flags("bottle-vm"),
		Subcommands: verbs,
	})
	if code == fault.Usage && len(p.Args) > 0 && p.Args[0] == "exec" && !v.execRan {
		return fault.ExecFailed // a wrong flag, too: 64 could be the guest's
	}
	return code
}

func (v *vm) root() (*state.Root, error) { return state.Open(v.p.Getenv) }

// find resolves an id, given or from the document on stdin.
func (v *vm) find(ctx context.Context, id string) (*state.Bottle, *state.Record, error) {
	root, err := v.root()
	if err != nil {
		return nil, nil, err
	}
	if id == "" {
		if id, err = v.idFromStdin(ctx); err != nil {
			return nil, nil, err
		}
	}
	b, err := root.Find(id)
	if err != nil {
		return nil, nil, err
	}
	rec, err := b.Load()
	if errors.Is(err, state.ErrNoRecord) || errors.Is(err, state.ErrNotFound) {
		return nil, nil, fault.New(fault.NoInput, "no_such_bottle", "bottle %s: %w", b.ID, err).WithHint("bottle-gc clears what is left of it")
	}
	return b, rec, err
}

// named is find for the arguments of a verb that takes one id at most.
func (v *vm) named(ctx context.Context, args []string) (*state.Bottle, *state.Record, error) {
	id, err := oneArg(args)
	if err != nil {
		return nil, nil, err
	}
	return v.find(ctx, id)
}

// idFromStdin takes vm.id out of exactly one document.
func (v *vm) idFromStdin(ctx context.Context) (string, error) {
	in, err := v.p.Input()
	if err != nil {
		return "", fault.New(fault.Usage, "usage", "no bottle named, and stdin is a terminal").WithHint("bottle-vm ls shows the ids")
	}
	d, err := in.Next(ctx)
	if e := fault.As(err); e != nil && e.Code == "empty_input" {
		return "", e.WithHint("name a bottle (bottle-vm ls shows them), or pipe in the document that bottle-vm up printed")
	}
	if err != nil {
		return "", err
	}
	if _, err := in.Next(ctx); !errors.Is(err, io.EOF) {
		return "", fault.New(fault.Data, "many_documents", "more than one document on stdin").WithHint("this verb takes one; name the bottle instead")
	}
	if f := d.Failure(); f != nil {
		return "", fault.New(f.Exit, f.Code, "%s failed before: %s", f.Stage, f.Message).WithHint("%s", f.Hint)
	}
	m, err := d.VM()
	if err != nil {
		return "", err
	}
	return m.ID, nil
}

// live is find for verbs that need the guest to run.
func (v *vm) live(ctx context.Context, id string) (*state.Bottle, *state.Record, *plan.Bottle, error) {
	b, rec, err := v.find(ctx, id)
	if err != nil {
		return nil, nil, nil, err
	}
	if rec.Phase != state.Ready || !rec.Live() {
		return nil, nil, nil, fault.New(fault.Unavailable, "not_running", "bottle %s is not running (%s)", b.ID, phase(rec)).
			WithHint("bottle-vm status %s says more", b.ID)
	}
	p, err := planOf(b)
	return b, rec, p, err
}

func planOf(b *state.Bottle) (*plan.Bottle, error) {
	d, err := b.Document()
	if err != nil {
		return nil, err
	}
	if d == nil {
		return nil, fault.New(fault.NoInput, "no_document", "bottle %s has no document", b.ID).WithHint("it never became ready; bottle-vm down %s", b.ID)
	}
	return d.Bottle()
}

// phase in words: the record's, or what became of it.
func phase(rec *state.Record) string {
	if !rec.Live() {
		return "orphan"
	}
	return rec.Phase
}

func (v *vm) remove(ctx context.Context, b *state.Bottle, rec *state.Record) error {
	return reaper.Remove(ctx, b.Root, b, rec, engines.ByName)
}

// beside finds a program of ours: next to this one.
func beside(name string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fault.New(fault.Host, "no_self", "cannot tell where this program lies: %w", err)
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return "", fault.New(fault.Host, "no_self", "cannot tell where this program lies: %w", err)
	}
	path := filepath.Join(filepath.Dir(self), name)
	if _, err := os.Stat(path); err != nil {
		return "", fault.New(fault.Unavailable, "tool_missing", "%s is not beside %s", name, filepath.Base(self)).
			WithHint("install all bottle tools into one folder: make build")
	}
	return path, nil
}

func (v *vm) place(base string) trust.Place {
	return trust.Place{Base: base, Home: v.p.Getenv("HOME")}
}

// oneArg takes the id, where a verb has at most one.
func oneArg(args []string) (string, error) {
	if err := tool.CheckArgs(args); err != nil {
		return "", err
	}
	if len(args) > 1 {
		return "", fault.New(fault.Usage, "usage", "unexpected argument %q", args[1]).WithHint("one bottle at a time")
	}
	if len(args) == 1 {
		return args[0], nil
	}
	return "", nil
}

// theArg takes the id, where a verb has to have one.
func theArg(args []string) (string, error) {
	id, err := oneArg(args)
	if err == nil && id == "" {
		err = fault.New(fault.Usage, "usage", "which bottle?").WithHint("bottle-vm ls shows the ids")
	}
	return id, err
}
