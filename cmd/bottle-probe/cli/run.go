package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/probe"
	"github.com/bottle-tools/bottle/lib/tool"
)

type runFlags struct {
	allow, only              tool.List
	allowHTTP, deny, sandbox string
	inside, files, setup, ca string
	document, log            string
	pids                     int
	timeout                  tool.Duration
	plain, pretty            bool
}

func runCommand(p *tool.Proc) *tool.Command {
	f := runFlags{timeout: tool.Duration(5 * time.Minute)}
	fs := p.Flags("bottle-probe run")
	fs.Var(&f.allow, "allow", "the `HOST` that the sandbox lets through by TLS on 443; once more as *.HOST if it has a wildcard")
	fs.StringVar(&f.allowHTTP, "allow-http", "", "the `HOST` that it lets through by plain HTTP on 80")
	fs.StringVar(&f.deny, "deny", "", "a `HOST` that it does not let through")
	fs.StringVar(&f.sandbox, "sandbox", "", "the shell `COMMAND` that runs @PROBE in the sandbox")
	fs.StringVar(&f.inside, "inside", "", "what the sandbox calls the workspace: a `FOLDER`")
	fs.StringVar(&f.files, "files", "", "copy what is in `FOLDER` into the workspace")
	fs.StringVar(&f.setup, "setup", "", "a shell `COMMAND` that is run in each new workspace")
	fs.StringVar(&f.ca, "ca", "", "write the canary servers' authority to `FILE`, for sandboxes that check upstream certificates")
	fs.StringVar(&f.document, "document", "", "a plan document: `FILE`, - for stdin, or @WORKSPACE/… that --setup writes; what its egress.residual names is marked so")
	fs.StringVar(&f.log, "log", "", "write what the sandbox command printed to `FILE`")
	fs.IntVar(&f.pids, "pids", 0, "the `NUMBER` of processes that the sandbox claims to allow at most")
	fs.Var(&f.only, "only", "run these probes and the controls they need: `ID` or name, comma-separated")
	fs.Var(&f.timeout, "timeout", "end a run of the sandbox command after `DURATION`")
	fs.BoolVar(&f.plain, "plain", false, "workspaces without a repository and without a .env, for a sandbox that takes none that have one")
	fs.BoolVar(&f.pretty, "pretty", false, "a table, for people")
	return &tool.Command{
		Name:       "run",
		ShortUsage: "bottle-probe run --allow HOST --deny HOST --sandbox 'CMD with @PROBE' [flags]",
		ShortHelp:  "run the battery against a sandbox",
		LongHelp: `
COMMAND is run a few times, each over a new workspace, which is its working
folder. In it @PROBE is the client with its arguments (letters, digits, / . - _
only, so it can stand inside of quotes), @WORKSPACE and @HOME are folders of the
laboratory, @CA is the canary servers' authority as a PEM file, which also lies
in the workspace as canary-ca.pem. The client is the file bottle-probe in the
workspace, a static program: the sandbox has to show it.

One line of JSON a probe: id, name, title, verdict, evidence. Verdicts are held,
leak, void (the control it depends on failed), n/a (with the reason), residual
(got out where --document says so); works and fails for controls. Exit status 0
if all controls work and nothing leaked, 1 otherwise.

  bottle-probe run --allow allowed.test --deny denied.test --files ./bottle \
      --inside /workspace --sandbox 'bottle run sh -- @PROBE'`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			return f.run(ctx, p)
		},
	}
}

func usage(format string, args ...any) *fault.Error {
	return fault.New(fault.Usage, "usage", format, args...)
}

// options checks the flags.
func (f *runFlags) options(p *tool.Proc) (o probe.Options, err error) {
	o = probe.Options{Sandbox: f.sandbox, Inside: f.inside, Files: f.files, Plain: f.plain, Setup: f.setup, CA: f.ca, Log: f.log, Pids: f.pids, Timeout: time.Duration(f.timeout)}
	for _, a := range f.allow {
		name, isWild := strings.CutPrefix(a, "*.")
		to := &o.Allow
		if isWild {
			to = &o.Wildcard
		}
		if *to != "" {
			return o, usage("--allow names two hosts of one kind").WithHint("one HOST, and one *.HOST if the sandbox allows a wildcard")
		}
		if *to, err = host("--allow", name); err != nil {
			return o, err
		}
	}
	if o.Allow == "" {
		return o, usage("--allow HOST is missing").WithHint("without a host that must work, a sandbox that blocks everything would pass")
	}
	if o.Deny, err = host("--deny", f.deny); err != nil {
		return o, err
	}
	if f.allowHTTP != "" {
		if o.AllowHTTP, err = host("--allow-http", f.allowHTTP); err != nil {
			return o, err
		}
	}
	switch {
	case o.Deny == o.Allow || o.Deny == o.AllowHTTP || o.Wildcard != "" && (o.Deny == o.Wildcard || strings.HasSuffix(o.Deny, "."+o.Wildcard)):
		return o, usage("--deny %s is allowed at the same time", o.Deny)
	case !strings.Contains(f.sandbox, "@PROBE"):
		return o, usage("--sandbox has no @PROBE").WithHint("it stands for the command to run inside: --sandbox 'bwrap … @PROBE'; --sandbox @PROBE is no sandbox at all")
	case f.inside != "" && !filepath.IsAbs(f.inside):
		return o, usage("--inside %s is no absolute path", f.inside)
	case f.pids < 0 || f.timeout <= 0:
		return o, usage("--pids and --timeout take no negative values")
	}
	for _, words := range f.only {
		o.Only = append(o.Only, strings.Split(words, ",")...)
	}
	if _, unknown := probe.Choose(o.Only); unknown != "" {
		return o, usage("--only: there is no probe %q", unknown).WithHint("bottle-probe list has them all")
	}
	if f.files != "" {
		if fi, err := os.Stat(f.files); err != nil || !fi.IsDir() {
			return o, fault.New(fault.NoInput, "no_input", "--files: there is no folder %s", f.files)
		}
	}
	for _, path := range []*string{&o.Files, &o.CA, &o.Log} {
		if *path != "" {
			if *path, err = filepath.Abs(*path); err != nil {
				return o, fault.New(fault.IO, "read_failed", "the working folder: %w", err)
			}
		}
	}
	if strings.HasPrefix(f.document, "@WORKSPACE") {
		o.Document = f.document
	}
	o.Residual, err = f.residual(p)
	return o, err
}

// host normalises a name as the policy does.
func host(flag, name string) (string, error) {
	if name == "" {
		return "", usage("%s HOST is missing", flag)
	}
	e, err := policy.Normalize(name)
	if err != nil || e.Class != policy.ClassExact {
		return "", usage("%s: %q is no host name", flag, name).WithHint("such as allowed.test; no URL, port or address")
	}
	return e.Host, nil
}

// residual reads what the document under test says that nobody sees.
func (f *runFlags) residual(p *tool.Proc) ([]string, error) {
	if f.document == "" || strings.HasPrefix(f.document, "@WORKSPACE") {
		return nil, nil
	}
	in := p.Stdin
	if f.document != "-" {
		file, err := os.Open(f.document)
		if err != nil {
			return nil, fault.New(fault.NoInput, "no_document_file", "--document: %w", err)
		}
		defer file.Close()
		in = file
	}
	return probe.ReadResidual(in)
}

func (f *runFlags) run(ctx context.Context, p *tool.Proc) error {
	o, err := f.options(p)
	if err != nil {
		return err
	}
	return report(p, f.pretty, func(emit func(probe.Result) error) error { return probe.Run(ctx, o, p.Stderr, emit) })
}

// report prints the results of a battery, and gives the exit status that follows
// from them.
func report(p *tool.Proc, pretty bool, battery func(emit func(probe.Result) error) error) error {
	bad := 0
	counts := map[probe.Verdict]int{}
	out := p.StdoutOutput()
	err := battery(func(r probe.Result) error {
		counts[r.Verdict]++
		if r.Bad() {
			bad++
		}
		if pretty {
			return out.WriteLine([]byte(strings.TrimRight(fmt.Sprintf("%-4s %-9s %-24s %s", r.ID, mark(r.Verdict), r.Name, words(r)), " ")))
		}
		line, err := plan.Encode(r)
		if err != nil {
			return err
		}
		return out.WriteLine(line)
	})
	var reported probe.Reported
	if errors.As(err, &reported) {
		return tool.Exit(int(reported))
	}
	if err != nil {
		return err
	}
	if pretty {
		if err := out.WriteLine([]byte(summary(counts))); err != nil {
			return err
		}
	}
	if bad > 0 {
		return tool.Exit(fault.No)
	}
	return nil
}

func mark(v probe.Verdict) string {
	if v == probe.Leak || v == probe.Fails || v == probe.Void {
		return strings.ToUpper(string(v))
	}
	return string(v)
}

func words(r probe.Result) string {
	if r.Evidence == "" {
		return r.Title
	}
	return r.Title + " (" + strings.Map(printable, r.Evidence) + ")"
}

// printable keeps what a sandbox sent away from the terminal.
func printable(r rune) rune {
	if r < 0x20 || 0x7f <= r && r < 0xa0 {
		return '?'
	}
	return r
}

func summary(counts map[probe.Verdict]int) string {
	var all []string
	for _, v := range []probe.Verdict{probe.Works, probe.Fails, probe.Held, probe.Leak, probe.Residual, probe.Void, probe.NA} {
		if counts[v] > 0 {
			all = append(all, fmt.Sprintf("%d %s", counts[v], v))
		}
	}
	return strings.Join(all, ", ")
}
