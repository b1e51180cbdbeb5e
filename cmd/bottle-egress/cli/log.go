package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
)

// pollLog is how often a log that is followed is looked at.
const pollLog = 200 * time.Millisecond

type logFlags struct {
	follow, verify, pretty bool
	pin                    tool.Digest
}

func logCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-egress log")
	var f logFlags
	fs.BoolVar(&f.follow, "follow", false, "go on as lines are added, until the bottle is gone")
	fs.BoolVar(&f.follow, "f", false, "the same as --follow")
	fs.BoolVar(&f.verify, "verify", false, "hold the log against its chain instead, and print what was found")
	fs.Var(&f.pin, "pin", "with --verify: the `DIGEST` of a line that has to be there still (head.sha256 of an earlier --verify)")
	fs.BoolVar(&f.pretty, "pretty", false, "a table, for people")
	return &tool.Command{
		Name:       "log",
		ShortUsage: "bottle-egress log [--follow | --verify [--pin DIGEST]] [--pretty] [ID | FILE]",
		ShortHelp:  "what a gate decided, one JSON object a line; or whether its log is whole",
		LongHelp: `
Takes a bottle, also one that is gone, or a file (with a / in its name); without
either, stdin is the bottle's document. Files that were rotated (FILE.000001 and
so on) are read first, oldest to newest.

--verify prints one object: verdict (whole, broken), files, lines, dropped, torn,
ended (the gate ended in order), head (the last line), and break, the file, line
and reason of the first break. It exits with 1 if there is one. A log that was
cut at its end, or written anew by somebody with the right to, is whole in
itself: keep head.sha256 elsewhere, and --pin tells.

  bottle-egress log --follow --pretty claude
  bottle-egress log claude | jq 'select(.verdict=="deny")'
  bottle-egress log --verify claude | jq -r .head.sha256`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.CheckArgs(args); err != nil {
				return err
			}
			switch {
			case len(args) > 1:
				return fault.New(fault.Usage, "usage", "log takes one bottle or file, and %d were given", len(args)).WithHint("bottle-vm ls shows the ids")
			case f.verify && f.follow:
				return fault.New(fault.Usage, "usage", "--verify and --follow together").WithHint("give one of them")
			case f.pin != "" && !f.verify:
				return fault.New(fault.Usage, "usage", "--pin is for --verify").WithHint("add --verify")
			}
			path, gone, err := whichLog(ctx, p, args)
			if err != nil {
				return err
			}
			if f.verify {
				return verifyLog(p, f, path)
			}
			return showLog(ctx, p, f, path, gone)
		},
	}
}

// whichLog gives the path of a log, and what tells that nothing will be added
// to it any more.
func whichLog(ctx context.Context, p *tool.Proc, args []string) (path string, gone func() bool, err error) {
	if len(args) == 1 && strings.Contains(args[0], "/") {
		return args[0], func() bool { return false }, nil
	}
	root, err := state.Open(p.Getenv)
	if err != nil {
		return "", nil, err
	}
	var id string
	if len(args) == 1 {
		id, err = root.FindAudit(args[0])
		if f := fault.As(err); f != nil && f.Exit == fault.NoInput {
			if _, statErr := os.Lstat(args[0]); statErr == nil {
				err = f.WithHint("for the file of that name: bottle-egress log ./%s", args[0])
			}
		}
	} else {
		id, err = documentID(ctx, p)
	}
	if err != nil {
		return "", nil, err
	}
	return root.Audit(id), func() bool {
		_, err := os.Lstat(root.Bottle(id).Dir)
		return err != nil
	}, nil
}

func documentID(ctx context.Context, p *tool.Proc) (string, error) {
	if tool.IsTerminal(p.Stdin) {
		return "", fault.New(fault.Usage, "usage", "no bottle or file named, and stdin is a terminal").WithHint("bottle-vm ls shows the ids")
	}
	d, err := one(ctx, p)
	if err != nil {
		return "", err
	}
	m, err := d.VM()
	if err != nil {
		return "", err
	}
	return m.ID, nil
}

func verifyLog(p *tool.Proc, f logFlags, path string) error {
	r, err := audit.Verify(path, string(f.pin))
	if err != nil {
		return err
	}
	verdict := "whole"
	if r.Break != nil {
		verdict = "broken"
	}
	if f.pretty {
		_, err = fmt.Fprintf(p.Stdout, "%s: %s: %d lines (%d to %d) in %d files, %d dropped, %d torn; ended in order: %v\n  head %s\n",
			path, verdict, r.Lines, r.First, r.Head.Seq, r.Files, r.Dropped, r.Torn, r.Ended, r.Head.SHA256)
		err = written(err)
	} else {
		var line []byte
		line, err = plan.Encode(struct {
			Log     string `json:"log"`
			Verdict string `json:"verdict"`
			audit.Report
		}{path, verdict, r})
		if err == nil {
			err = p.StdoutOutput().WriteLine(line)
		}
	}
	if err != nil || r.Break == nil {
		return err
	}
	p.Warn("%s:%d: %s", r.Break.File, r.Break.Line, r.Break.Reason)
	return tool.Exit(fault.No)
}

func written(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.EPIPE) { // head and pagers have seen enough
		return tool.Exit(fault.IO)
	}
	return fault.New(fault.IO, "write_failed", "writing stdout: %w", err)
}

// showLog prints the lines. What is no event goes to stderr: stdout is JSON.
func showLog(ctx context.Context, p *tool.Proc, f logFlags, path string, gone func() bool) error {
	r, err := audit.OpenReader(path)
	if err != nil {
		return err
	}
	defer r.Close()
	if f.pretty {
		if _, err := fmt.Fprintf(p.Stdout, "%-24s %-8s %-8s %-32s %s\n", "TIME", "EVENT", "VERDICT", "HOST", "WHAT"); err != nil {
			return written(err)
		}
	}
	for {
		last := !f.follow || gone()
		for {
			l, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
			switch {
			case l.Torn:
				p.Warn("%s: %d bytes that are no event: %s", l.Where(), len(l.Raw), printable(string(l.Raw[:min(len(l.Raw), 80)])))
				continue
			case f.pretty:
				_, err = fmt.Fprintln(p.Stdout, row(&l.Event))
			default:
				_, err = p.Stdout.Write(append(l.Raw, '\n'))
			}
			if err != nil {
				return written(err)
			}
		}
		if last {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pollLog):
		}
	}
}

// row is an event for people. What a guest chose cannot drive their terminal.
func row(e *audit.Event) string {
	target := e.Host
	if e.Port != 0 {
		target = net.JoinHostPort(e.Host, strconv.Itoa(e.Port))
	}
	var what []string
	add := func(format string, v ...any) { what = append(what, fmt.Sprintf(format, v...)) }
	if e.Method != "" {
		add("%s %s", e.Method, e.Path)
	}
	if e.Code != "" && e.Code != "allowed" {
		add("%s", e.Code)
	}
	if e.Reason != "" {
		add("(%s)", e.Reason)
	}
	if e.Secret != "" {
		add("secret %s", e.Secret)
	}
	if e.Event == audit.KindClose {
		add("%d bytes out, %d in, %d ms", e.BytesOut, e.BytesIn, e.DurationMS)
	}
	if e.File != 0 {
		add("file %d", e.File)
	}
	if e.From != "" && e.Verdict != "" {
		add("from %s", e.From)
	}
	at := e.Time
	if t, err := time.Parse(time.RFC3339Nano, e.Time); err == nil {
		at = t.Format("2006-01-02T15:04:05.000Z")
	}
	return strings.TrimRight(fmt.Sprintf("%-24s %-8s %-8s %-32s %s", printable(at), printable(e.Event), cmp.Or(printable(e.Verdict), "-"),
		cmp.Or(printable(target), "-"), printable(strings.Join(what, " "))), " ")
}

func printable(s string) string {
	q := fmt.Sprintf("%+q", s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}
