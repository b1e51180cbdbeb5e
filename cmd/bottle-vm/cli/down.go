package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/keeper"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
)

func (v *vm) downCommand() *tool.Command {
	var owner int
	var report bool
	fs := v.p.Flags("bottle-vm down")
	fs.IntVar(&owner, "owner", 0, "remove the bottles that were started with --owner `PID`")
	fs.BoolVar(&report, "report", false, "say on stderr which hosts were denied and what was set aside")
	return &tool.Command{
		Name:       "down",
		ShortUsage: "bottle-vm down [--report] [ID... | --owner PID]",
		ShortHelp:  "end bottles and remove what they left; fine to call twice",
		LongHelp: `
Takes ids, or documents on stdin, error documents too. A bottle that is not
there is a warning and no error, so that an EXIT trap can call it in any case.

  bottle-vm down claude
  bottle-vm down --report < claude.doc`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.CheckArgs(args); err != nil {
				return err
			}
			ids, err := v.downIDs(ctx, args, owner)
			if err != nil {
				return err
			}
			var errs []error
			for _, id := range ids {
				if report {
					v.reportDenied(id)
				}
				errs = append(errs, v.down(ctx, id))
				if report {
					v.reportAside(id)
				}
			}
			return errors.Join(errs...)
		},
	}
}

func (v *vm) downIDs(ctx context.Context, args []string, owner int) ([]string, error) {
	switch {
	case owner != 0 && len(args) > 0:
		return nil, fault.New(fault.Usage, "usage", "--owner and ids together").WithHint("give one of them")
	case owner != 0:
		ids, err := v.owned(owner)
		if e := fault.As(err); e != nil && (e.Code == "no_home" || e.Exit == fault.Usage) {
			return nil, nil // no place for a record: up has said so, and started nothing
		}
		return ids, err
	case len(args) > 0:
		return args, nil
	}
	in, err := v.p.Input()
	if err != nil {
		return nil, fault.New(fault.Usage, "usage", "no bottle named, and stdin is a terminal").WithHint("bottle-vm ls shows the ids")
	}
	var ids []string
	for first := true; ; first = false {
		d, err := in.Next(ctx)
		if errors.Is(err, io.EOF) {
			return ids, nil
		}
		if e := fault.As(err); first && e != nil && e.Code == "empty_input" {
			// The stage that should have written a document was killed before it
			// could: there is nothing to name, and up takes back what it began.
			v.p.Warn("no document on stdin, so nothing to remove")
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if m, err := d.VM(); err == nil {
			ids = append(ids, m.ID)
		}
	}
}

// owned lists the bottles of one owner, whatever state they are in.
func (v *vm) owned(pid int) ([]string, error) {
	root, err := v.root()
	if err != nil {
		return nil, err
	}
	all, err := root.List()
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, b := range all {
		rec, err := b.Load()
		if err == nil && rec.Owner != nil && rec.Owner.PID == pid {
			ids = append(ids, b.ID)
		}
	}
	return ids, nil
}

// down removes one bottle. A name that fits none is done already.
func (v *vm) down(ctx context.Context, id string) error {
	root, err := v.root()
	if err != nil {
		return err
	}
	b, err := root.Find(id)
	if e := fault.As(err); e != nil && e.Code == "no_such_bottle" {
		// Not an error, so that down can be called twice; but it may be a slip.
		v.p.Warn("no bottle %q, so nothing to remove", id)
		return nil
	}
	if err != nil {
		return err
	}
	rec, err := b.Load()
	switch {
	case errors.Is(err, state.ErrNotFound):
		return nil
	case errors.Is(err, state.ErrNoRecord):
		rec = nil
	case err != nil:
		return err
	}
	return v.remove(ctx, b, rec)
}

// reportDenied tells which hosts the agent asked for in vain. It is prose, and
// a bottle that cannot tell any more is no error.
func (v *vm) reportDenied(id string) {
	root, err := v.root()
	if err != nil {
		return
	}
	b, err := root.Find(id)
	if err != nil {
		return
	}
	reportTo(v.p.Stderr, b.ID, denied(root.Audit(b.ID)), hints(b))
}

func reportTo(w io.Writer, id string, all []denial, how func(denial) string) {
	for _, d := range all[:min(len(all), maxReported)] {
		d.hint = how(d)
		fmt.Fprintln(w, d)
	}
	if more := len(all) - maxReported; more > 0 {
		fmt.Fprintf(w, "bottle: %d more denied, which bottle-egress log %s lists\n", more, id)
	}
}

// maxReported bounds the lines of a report: a guest can ask for any number of
// hosts, and this goes to somebody's terminal.
const maxReported = 50

// hints tells what would open a host, as the gate told the guest: the audit log
// has the decision only.
func hints(b *state.Bottle) func(denial) string {
	p, err := planOf(b)
	if err != nil {
		return func(denial) string { return "" }
	}
	return hintsOf(p)
}

func hintsOf(p *plan.Bottle) func(denial) string {
	m, err := policy.Compile(p.Egress.Rules)
	if err != nil {
		return func(denial) string { return "" }
	}
	return func(d denial) string {
		if d.code == "guest_rejects_ca" || d.code == "guest_needs_http2" {
			return policy.HowToUninspect(p, d.host)
		}
		now := m.DecideAs(d.host, d.port, d.protocol)
		if d.port == 0 { // a name that was looked up, for any port
			_, now = m.Services(d.host)
		}
		if now.Allow && d.request != "" {
			method, path, _ := strings.Cut(d.request, " ")
			if asked := policy.DecideRequest(now.Rule, method, path); asked.Code == d.code {
				return asked.Hint
			}
			return ""
		}
		if now.Code == d.code {
			return now.Hint
		}
		return ""
	}
}

// reportAside tells, once the bottle is gone, what was taken out of its
// workspace because git on the host would have run it.
func (v *vm) reportAside(id string) {
	root, err := v.root()
	if err != nil {
		return
	}
	entries, err := os.ReadDir(root.AsidePath(id))
	if err != nil {
		return
	}
	for _, e := range entries {
		fmt.Fprintf(v.p.Stderr, "bottle: set aside from the workspace: %s\n", filepath.Join(root.AsidePath(id), e.Name()))
	}
}

type denial struct {
	host               string
	port               int
	target             string // host and port, safe to print
	protocol           string // http where the client spoke it
	request            string // method and path, where they were what was denied
	code, reason, hint string
	byClient           bool // the client would not go on; the gate had allowed it
	n                  int
}

func (d denial) String() string {
	s := "bottle: denied "
	if d.byClient {
		s = "bottle: not reached: "
	}
	s += d.target
	if d.n > 1 {
		s += fmt.Sprintf(", %d times", d.n)
	}
	s += " (" + d.code + "): " + d.reason
	if d.hint != "" {
		s += "; " + d.hint
	}
	return s
}

// maxRequests bounds the lines about requests to one host.
const maxRequests = 10

// denied sums the refusals of an audit log up by host and port, those of single
// requests by method and path too.
func denied(path string) []denial {
	sums := map[string]*denial{}
	requests := map[string]int{}
	for l, err := range audit.Read(path) {
		if err != nil {
			break
		}
		e := &l.Event
		byClient := e.Code == "guest_rejects_ca" || e.Code == "guest_needs_http2"
		if e.Verdict != audit.Deny && !byClient || e.Event == audit.KindChange { // that one the owner asked for
			continue
		}
		target := cmp.Or(e.Host, "what names no host")
		if e.Port != 0 {
			target = net.JoinHostPort(e.Host, strconv.Itoa(e.Port))
		}
		request := ""
		if e.Code == policy.RequestNotAllowed || e.Code == policy.AmbiguousPath {
			request = e.Method + " " + e.Path
		}
		key := target + " " + e.Code + " " + request
		if sums[key] == nil {
			of := target + " " + e.Code
			if request != "" {
				requests[of]++
			}
			if requests[of] > maxRequests {
				more(sums, of, printable(target), e)
				continue
			}
			d := denial{host: e.Host, port: e.Port, target: printable(target), request: request, code: e.Code, reason: printable(e.Reason), byClient: byClient}
			if e.Method != "" && e.Method != "CONNECT" {
				d.protocol = "http"
			}
			sums[key] = &d
		}
		sums[key].n++
	}
	all := make([]denial, 0, len(sums))
	for _, d := range sums {
		all = append(all, *d)
	}
	slices.SortFunc(all, func(a, b denial) int {
		return cmp.Or(cmp.Compare(a.target, b.target), cmp.Compare(a.code, b.code), cmp.Compare(a.request, b.request))
	})
	return all
}

// more counts requests that get no line of their own.
func more(sums map[string]*denial, of, target string, e *audit.Event) {
	const last = "\xff" // sorts behind every method
	if sums[of+last] == nil {
		sums[of+last] = &denial{host: e.Host, port: e.Port, target: target, request: last, code: e.Code,
			reason: "other requests, which bottle-vm logs --audit lists"}
	}
	sums[of+last].n++
}

// printable keeps a name that a guest chose from driving a terminal.
func printable(s string) string {
	q := fmt.Sprintf("%+q", s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

func (v *vm) stopCommand() *tool.Command {
	return &tool.Command{
		Name:       "stop",
		ShortUsage: "bottle-vm stop [ID]",
		ShortHelp:  "end the guest and its way out; logs and diff stay until down",
		LongHelp: `
Without an ID, stdin is the bottle's document. On smolvm the guest's disk stays,
too, and bottle-vm start boots it again; on gVisor what the guest changed outside
of its workspace is gone.

  bottle-vm stop claude; bottle-vm diff claude > change.patch; bottle-vm down claude`,
		Exec: func(ctx context.Context, args []string) error {
			_, rec, err := v.named(ctx, args)
			if err != nil {
				return err
			}
			_, err = control.Ask(rec.RunDir, control.Request{Do: "stop"}, time.Minute)
			return err
		},
	}
}

func (v *vm) startCommand() *tool.Command {
	return &tool.Command{
		Name:       "start",
		ShortUsage: "bottle-vm start [ID]",
		ShortHelp:  "boot a stopped bottle again, with its disk; prints its document",
		LongHelp: `
For bottles on smolvm; on gVisor a stopped guest leaves no disk, and start is
refused (78). Plan, secrets and mounts are those that up took. Of the rules that
were added while it ran, denies stay for the time they were given, and allows do
not come back. Where the workspace has become one that the engine cannot hold, a
mounted folder leads elsewhere now, or the audit log lacks what its gates have
written (77), it is refused, too. Without an ID, stdin is the bottle's document.

  bottle-vm stop claude; bottle-vm start claude`,
		Exec: func(ctx context.Context, args []string) error {
			b, rec, err := v.named(ctx, args)
			if err != nil {
				return err
			}
			defer v.tellWaiting(b.ID, rec.Engine)()
			a, err := control.Ask(rec.RunDir, control.Request{Do: "start"}, keeper.AgainLimit)
			if err != nil {
				return err
			}
			for _, f := range a.Findings {
				v.p.Warn("%s", f)
			}
			d, err := b.Document()
			if err != nil || d == nil {
				return fault.New(fault.IO, "no_document", "bottle %s runs, and its document cannot be read: %v", b.ID, err)
			}
			_, err = v.p.Stdout.Write(append(d.Line(), '\n'))
			return err
		},
	}
}
