package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/worktree"
)

// listed is a line of ls, and the head of status.
type listed struct {
	ID        string `json:"id"`
	Bottle    string `json:"bottle"`
	Phase     string `json:"phase"` // starting | ready | stopped | stopping | orphan
	Runtime   string `json:"runtime,omitempty"`
	Workspace string `json:"workspace,omitempty"`
	CreatedAt string `json:"created_at,omitempty"` // RFC 3339, UTC
}

func list(b *state.Bottle) listed {
	name, _ := plan.SplitVMID(b.ID)
	l := listed{ID: b.ID, Bottle: name, Phase: "orphan"}
	rec, err := b.Load()
	if err != nil {
		return l
	}
	l.Phase, l.Runtime, l.Workspace = phase(rec), rec.Engine, rec.Workspace
	if l.Phase == state.Ready {
		// A guest can have ended since the record was written; its keeper knows.
		if a, err := control.Ask(rec.RunDir, control.Request{Do: "status"}, time.Second); err == nil {
			l.Phase = a.Phase
		}
	}
	l.CreatedAt = rec.CreatedAt.UTC().Format(time.RFC3339)
	return l
}

func (v *vm) lsCommand() *tool.Command {
	var pretty bool
	fs := v.p.Flags("bottle-vm ls")
	fs.BoolVar(&pretty, "pretty", false, "a table, for people")
	return &tool.Command{
		Name:       "ls",
		ShortUsage: "bottle-vm ls [--pretty]",
		ShortHelp:  "the bottles that are there, one JSON object a line",
		LongHelp: `
id, bottle, phase (starting, ready, stopped, stopping, orphan), runtime,
workspace, created_at. None is an empty list.

  bottle-vm ls | jq -r 'select(.phase=="orphan") | .id'`,
		FlagSet: fs,
		Exec: func(_ context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			root, err := v.root()
			if err != nil {
				return err
			}
			all, err := root.List()
			if err != nil {
				return err
			}
			if pretty {
				return v.table(all)
			}
			out := v.p.StdoutOutput()
			for _, b := range all {
				if err := writeJSON(out, list(b)); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func (v *vm) table(all []*state.Bottle) error {
	w := tabwriter.NewWriter(v.p.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tPHASE\tRUNTIME\tWORKSPACE")
	for _, b := range all {
		l := list(b)
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", l.ID, l.Phase, l.Runtime, l.Workspace)
	}
	if err := w.Flush(); err != nil {
		return fault.New(fault.IO, "write_failed", "writing stdout: %w", err)
	}
	return nil
}

func writeJSON(out *tool.Output, v any) error {
	line, err := plan.Encode(v)
	if err != nil {
		return err
	}
	return out.WriteLine(line)
}

// shown is what status prints.
type shown struct {
	listed
	Reason   string   `json:"reason,omitempty"`
	Gate     string   `json:"gate"`              // up | shut | down
	Proxy    string   `json:"proxy"`             // up | down | none
	Sidecar  string   `json:"sidecar,omitempty"` // up | down
	Findings []string `json:"findings,omitempty"`
	// Live are rules on top of the plan's (bottle-egress allow, deny).
	Live     []live.Shown `json:"live,omitempty"`
	AuditLog string       `json:"audit_log"`
	StateDir string       `json:"state_dir"`
}

func (v *vm) statusCommand() *tool.Command {
	fs := v.p.Flags("bottle-vm status")
	out := v.p.OutputFlags(fs)
	return &tool.Command{
		Name:       "status",
		ShortUsage: "bottle-vm status [ID]",
		ShortHelp:  "one bottle: its phase, gate and proxy, and what was set aside",
		LongHelp: `
One JSON object: what ls prints of it, and gate (up, down, or shut: its audit log
cannot be written), proxy and sidecar (up, down), reason (why it stopped, or is
shut), findings, live (rules that bottle-egress allow and deny added), audit_log
and state_dir. Without an ID, stdin is the bottle's document.

  bottle-vm status claude | jq -r .phase`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			b, rec, err := v.named(ctx, args)
			if err != nil {
				return err
			}
			s := shown{listed: list(b), Gate: "down", Proxy: "none", AuditLog: b.Root.Audit(b.ID), StateDir: b.Dir}
			if rec.Live() && (rec.Phase == state.Ready || rec.Phase == state.Stopped) {
				a, err := control.Ask(rec.RunDir, control.Request{Do: "status"}, 5*time.Second)
				if err != nil {
					return err
				}
				s.Phase, s.Reason, s.Gate, s.Proxy, s.Sidecar, s.Findings = a.Phase, a.Reason, a.Gate, a.Proxy, a.Sidecar, a.Findings
				s.Live = live.Show(a.Live)
			}
			if err := writeJSON(out, s); err != nil {
				return err
			}
			return out.Close()
		},
	}
}

func (v *vm) logsCommand() *tool.Command {
	var follow, auditLog bool
	fs := v.p.Flags("bottle-vm logs")
	fs.BoolVar(&follow, "f", false, "the same as --follow")
	fs.BoolVar(&follow, "follow", false, "go on as lines are added, until the bottle is gone")
	fs.BoolVar(&auditLog, "audit", false, "the gate's decisions (JSON lines) instead of the logs")
	return &tool.Command{
		Name:       "logs",
		ShortUsage: "bottle-vm logs [--follow] [--audit] ID",
		ShortHelp:  "what keeper, gate and engine wrote, or what the gate decided",
		LongHelp: `
The audit log outlives its bottle: bottle-egress log shows that of one that is
gone, too.

  bottle-vm logs --follow claude
  bottle-vm logs --audit claude | jq 'select(.verdict=="deny")'`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			id, err := theArg(args)
			if err != nil {
				return err
			}
			b, _, err := v.find(ctx, id)
			if err != nil {
				return err
			}
			if auditLog {
				return v.decisions(ctx, b, follow)
			}
			return v.tail(ctx, b, []string{b.Path("keeper.log"), b.Path("engine.log"), b.Path("pipelock/pipelock.log"), b.Path("mitmdump/mitmdump.log")}, follow)
		},
	}
}

// tail copies the files, and what is added to them while the bottle is there.
func (v *vm) tail(ctx context.Context, b *state.Bottle, paths []string, follow bool) error {
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, path := range paths {
		if f, err := os.Open(path); err == nil {
			files = append(files, f)
		}
	}
	return following(ctx, b, follow, func() error {
		for _, f := range files {
			if _, err := io.Copy(v.p.Stdout, f); err != nil {
				return copied(err)
			}
		}
		return nil
	})
}

// following copies once, and if follow is set again and again, until the bottle
// is gone or ctx ends.
func following(ctx context.Context, b *state.Bottle, follow bool, copyMore func() error) error {
	for {
		_, gone := os.Lstat(b.Dir) // before the copying, which then has the last words too
		if err := copyMore(); err != nil {
			return err
		}
		if !follow || gone != nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func copied(err error) error {
	if errors.Is(err, syscall.EPIPE) { // head and pagers have seen enough
		return tool.Exit(fault.IO)
	}
	return fault.New(fault.IO, "write_failed", "copying the log: %w", err)
}

// decisions copies the audit log, over all its files.
func (v *vm) decisions(ctx context.Context, b *state.Bottle, follow bool) error {
	r, err := audit.OpenReader(b.Root.Audit(b.ID))
	if err != nil {
		return err
	}
	defer r.Close()
	return following(ctx, b, follow, func() error {
		for {
			l, err := r.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			if _, err := v.p.Stdout.Write(append(l.Raw, '\n')); err != nil {
				return copied(err)
			}
		}
	})
}

func (v *vm) diffCommand() *tool.Command {
	return &tool.Command{
		Name:       "diff",
		ShortUsage: "bottle-vm diff ID",
		ShortHelp:  "what a bottle with workspace mode scratch changed, as a patch; exits 1 if anything",
		LongHelp: `
  bottle-vm diff claude > change.patch; git apply change.patch`,
		Exec: func(ctx context.Context, args []string) error {
			id, err := theArg(args)
			if err != nil {
				return err
			}
			b, rec, err := v.find(ctx, id)
			if err != nil {
				return err
			}
			scratch := b.Path("workspace")
			if _, err := os.Lstat(scratch); err != nil {
				return fault.New(fault.Usage, "not_scratch", "bottle %s works on the workspace itself", b.ID).
					WithHint("git diff shows its changes; workspace mode scratch would keep them apart")
			}
			changed, err := worktree.Diff(ctx, rec.Workspace, scratch, v.p.Stdout)
			if err == nil && changed {
				return tool.Exit(fault.No)
			}
			return err
		},
	}
}
