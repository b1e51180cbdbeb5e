// Package tool is the boundary between a bottle command and the process it runs
// in: streams, flags, exit statuses, the error document.
//
// A main is a name and an exit:
//
//	func main() { tool.Main("bottle-plan", cli.Run) }
//
// and the body is importable and takes everything it touches from a Proc:
//
//	func Run(ctx context.Context, p *tool.Proc) int {
//		fs := p.Flags("bottle-egress")
//		out := p.OutputFlags(fs) // -o FILE, --pretty
//		root := &tool.Command{
//			Name:       "bottle-egress",
//			ShortUsage: "bottle-plan … | bottle-egress [-o FILE]",
//			ShortHelp:  "add the egress section to documents",
//			LongHelp:   "…with an example…",
//			FlagSet:    fs,
//			Subcommands: []*tool.Command{…},
//			Exec: func(ctx context.Context, args []string) error {
//				if err := tool.NoArgs(args); err != nil {
//					return err
//				}
//				return p.Filter(ctx, "egress", out, func(ctx context.Context, d *plan.Doc) error { … })
//			},
//		}
//		return p.Run(ctx, root)
//	}
//
// Every error that Exec returns is printed once, as "tool: error: …" on stderr,
// and decides the exit status (lib/fault).
package tool

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/peterbourgon/ff/v3/ffcli"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Version is set by the build (-ldflags -X); go install leaves it at "devel".
var Version = "devel"

// Proc is a command as a value, in the manner of exec.Cmd.
type Proc struct {
	Name           string
	Args           []string // without the name
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	Now            func() time.Time

	flags map[*flag.FlagSet]*flagRules
}

// OS is the Proc of this process.
func OS(name string) *Proc {
	return &Proc{
		Name: name, Args: os.Args[1:],
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Getenv: os.Getenv, Now: time.Now,
	}
}

// Main runs body in this process and exits with its status. SIGINT and SIGTERM
// cancel the context; a second one ends the process at once. A closed stdout is
// an error of the write (74), not a death by SIGPIPE: a command that has
// started something must get to say so, or to take it back.
func Main(name string, body func(context.Context, *Proc) int) {
	signal.Ignore(syscall.SIGPIPE)
	noCore()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // from here on the default action is back
	}()
	code := body(ctx, OS(name))
	os.Exit(code)
}

// noCore keeps what is in memory, secrets in some of the tools, off the disk when
// this process or one that it starts dies. Lowering a limit is always allowed.
func noCore() {
	_ = syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
}

// Command is ffcli's; Usage, ShortHelp and LongHelp are written by hand.
type Command = ffcli.Command

// exitStatus ends a command whose errors have been reported already.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// Exit makes Run return the status without printing anything more.
func Exit(status int) error {
	if status == 0 {
		return nil
	}
	return exitStatus(status)
}

// Run parses the arguments, runs the chosen command and gives the exit status.
func (p *Proc) Run(ctx context.Context, root *Command) int {
	p.prepare(root, root.Name)
	if len(p.Args) == 1 && (p.Args[0] == "--version" || p.Args[0] == "-version") {
		fmt.Fprintln(p.Stdout, p.Name, Version)
		return fault.OK
	}
	if len(p.Args) > 0 && p.Args[0] == "help" { // no bottle can be called that
		fmt.Fprintln(p.Stdout, p.helpFor(root, p.Args[1:]))
		return fault.OK
	}
	err := root.Parse(p.Args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		// Asked for: the help is the output.
		fmt.Fprintln(p.Stdout, p.helpFor(root, p.Args))
		return fault.OK
	case err != nil:
		return p.Report(usage(root, err))
	}
	if err := misplaced(root); err != nil {
		return p.Report(err)
	}
	if err := p.applyEnv(root); err != nil {
		return p.Report(err)
	}
	err = root.Run(ctx)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return Interrupted // whoever did that knows
	}
	return p.Report(err)
}

// Report prints err, if it has not been printed, and gives its exit status.
func (p *Proc) Report(err error) int {
	var status exitStatus
	switch {
	case err == nil:
		return fault.OK
	case errors.As(err, &status):
		return int(status)
	}
	p.PrintError(err)
	return fault.As(err).Exit
}

// PrintError writes err on stderr, one line for each error joined in it.
func (p *Proc) PrintError(err error) {
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range many.Unwrap() {
			p.PrintError(e)
		}
		return
	}
	e := fault.As(err)
	line := e.Error()
	if e.Hint != "" {
		line += "; " + e.Hint
	}
	fmt.Fprintf(p.Stderr, "%s: error: %s\n", p.Name, fault.Line(line))
}

// Warn writes a warning on stderr.
func (p *Proc) Warn(format string, args ...any) {
	fmt.Fprintf(p.Stderr, "%s: warning: %s\n", p.Name, fault.Line(fmt.Sprintf(format, args...)))
}

// IsTerminal tells whether v is a terminal.
func IsTerminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && isTerminal(f)
}

func usage(c *Command, err error) error {
	var none ffcli.NoExecError
	if errors.As(err, &none) {
		var verbs []string
		for _, sub := range none.Command.Subcommands {
			if sub.ShortHelp != "" {
				verbs = append(verbs, sub.Name)
			}
		}
		if args := none.Command.FlagSet.Args(); len(args) > 0 {
			return fault.New(fault.Usage, "usage", "unknown verb %q", args[0]).WithHint("one of %s", strings.Join(verbs, ", "))
		}
		return fault.New(fault.Usage, "usage", "a verb is missing").WithHint("one of %s", strings.Join(verbs, ", "))
	}
	text := strings.TrimPrefix(err.Error(), "error parsing commandline arguments: ")
	return fault.New(fault.Usage, "usage", "%s", flagText(text)).WithHint("see %s --help", parsed(c))
}

// misplaced refuses flags before a verb: they would be read and not used.
func misplaced(root *Command) error {
	for _, sub := range root.Subcommands {
		if !sub.FlagSet.Parsed() {
			continue
		}
		var err error
		root.FlagSet.Visit(func(f *flag.Flag) {
			err = fault.New(fault.Usage, "usage", "%s stands before the verb %s", dashed(f.Name), sub.Name).
				WithHint("flags come behind it; see %s --help", sub.FlagSet.Name())
		})
		return err
	}
	return nil
}

// dashed is a flag as it is written.
func dashed(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

// oneDash finds how package flag writes a flag: -name, with one dash.
// Compiled when it is first needed: every start of a tool would pay for it.
var oneDash = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`((?:: )|(?:flag ))-([a-z]{2})`) })

// flagText writes flags as the help does.
func flagText(s string) string {
	return oneDash().ReplaceAllString(strings.Replace(s, "flag provided but not defined", "no such flag", 1), "${1}--$2")
}

// parsed is the command whose flags were read last: the verb, or the tool.
func parsed(c *Command) string {
	for _, sub := range c.Subcommands {
		if sub.FlagSet != nil && sub.FlagSet.Parsed() {
			return parsed(sub)
		}
	}
	return c.FlagSet.Name()
}
