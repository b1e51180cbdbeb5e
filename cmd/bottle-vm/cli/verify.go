package cli

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/drift"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/verify"
)

func (v *vm) verifyCommand() *tool.Command {
	fs := v.p.Flags("bottle-vm verify")
	return &tool.Command{
		Name:       "verify",
		ShortUsage: "bottle-vm verify [ID]",
		ShortHelp:  "compare a running bottle with its plan; exits 1 if it is another one",
		LongHelp: `
Looks from outside at what runs: programs, arguments, variables and listeners of
its processes, namespaces, seccomp, user ids, every mount, limits, the rules that
the gate decides by, what pipelock and mitmdump were given, modes, the document.
Nothing is sent to the guest, and nothing is changed.

Prints each difference as one line of JSON: bottle, kind, what, expected, found.
The kind is drift; live for a rule that bottle-egress allow or deny added; or
unknown for what could not be looked at. Nothing printed and status 0 is: as
planned. Status 1 is drift or live, 78 unknown alone. Without an ID, stdin is the
bottle's document.

  bottle-vm verify claude && echo as planned`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			b, rec, err := v.named(ctx, args)
			if err != nil {
				return err
			}
			if rec.Phase != state.Ready || !rec.Live() {
				return fault.New(fault.Unavailable, "not_running", "bottle %s is not running (%s)", b.ID, phase(rec)).
					WithHint("bottle-vm status %s says more", b.ID)
			}
			f := &drift.Findings{Bottle: b.ID}
			if err := v.verify(b, rec, f); err != nil {
				return err
			}
			return v.printFindings(f)
		},
	}
}

func (v *vm) printFindings(f *drift.Findings) error {
	out := v.p.StdoutOutput()
	status := fault.OK
	for _, x := range f.List {
		if err := writeJSON(out, x); err != nil {
			return err
		}
		switch {
		case x.Kind != drift.Unknown:
			status = fault.No
		case status == fault.OK:
			status = fault.Host
		}
	}
	if status != fault.OK {
		return tool.Exit(status)
	}
	return nil
}

// verify collects what there is to compare. Only what makes comparing impossible
// is an error; a document that cannot be read is a finding.
func (v *vm) verify(b *state.Bottle, rec *state.Record, f *drift.Findings) error {
	d, err := b.Document()
	if err != nil || d == nil {
		if err == nil {
			err = errors.New("it is missing")
		}
		f.Drift("document", "the one that up printed", err.Error())
		return nil
	}
	x := &verify.Bottle{Proc: drift.Host, Record: rec, Dir: b.Dir, Doc: d, KeeperEnv: keeperEnvironment}
	if x.Plan, err = d.Bottle(); err == nil {
		if x.VM, err = d.VM(); err == nil {
			x.Egress, err = d.Egress()
		}
	}
	if err != nil {
		f.Drift("document", "the one that up printed", err.Error())
		return nil
	}
	keeper, err := beside("bottle-keeper")
	if err != nil {
		return err
	}
	x.Programs = filepath.Dir(keeper)
	x.Answer, x.AnswerErr = control.Ask(rec.RunDir, control.Request{Do: "report"}, 10*time.Second)
	ref := engine.Ref{ID: b.ID, Dir: b.Dir, RunDir: rec.RunDir, Bottle: x.Plan}
	eng, err := engines.Find(rec.Engine)
	if err != nil {
		return err
	}
	verifier, can := eng.(engine.Verifier)
	if can {
		x.Own, x.Sockets = verifier.Programs(), verifier.Sockets(ref)
	}
	x.Check(f)
	shown, err := shownOf(b)
	if err != nil {
		f.Unknown("mounts", "those of the plan", err)
	} else {
		x.Shown(f, shown, v.p.Getenv("HOME"))
	}
	if !can {
		for _, what := range []string{"guest: process", "guest: mounts", "guest: limits"} {
			f.Unknown(what, "as planned", errors.New("engine "+eng.Name()+" does not tell from outside"))
		}
		return nil
	}
	verifier.Verify(engine.Running{Ref: ref, Shown: shown, Keeper: pidOf(rec.Keeper), VM: x.VM, Proc: x.Proc,
		Watches: x.Answer != nil && x.Answer.Report != nil && x.Answer.Report.Watches}, f)
	return nil
}

func pidOf(p *plan.Process) int {
	if p == nil {
		return 0
	}
	return p.PID
}

// shownOf reads what the keeper noted before the guest started.
func shownOf(b *state.Bottle) (engine.Shown, error) {
	var s engine.Shown
	raw, err := os.ReadFile(b.Path(engine.ShownFile))
	if err == nil {
		err = json.Unmarshal(raw, &s)
	}
	return s, err
}
