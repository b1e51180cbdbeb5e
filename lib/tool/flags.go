package tool

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/peterbourgon/ff/v3/ffcli"
	"golang.org/x/term"

	"github.com/bottle-tools/bottle/lib/fault"
)

// flagRules is what flag.FlagSet does not know of its flags.
type flagRules struct {
	ambient map[string]bool // may come from the environment
}

// Flags makes a flag set that prints nothing by itself.
func (p *Proc) Flags(name string) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	if p.flags == nil {
		p.flags = map[*flag.FlagSet]*flagRules{}
	}
	p.flags[fs] = &flagRules{ambient: map[string]bool{}}
	return fs
}

// Ambient lets the named flags also come from the environment, as BOTTLE_ and
// the name in capitals. Only what says where, how loud or how long may: never
// what may be reached, mounted or injected, and never an --apply.
func (p *Proc) Ambient(fs *flag.FlagSet, names ...string) {
	for _, n := range names {
		if fs.Lookup(n) == nil {
			panic("tool: no flag -" + n)
		}
		p.flags[fs].ambient[n] = true
	}
}

// EnvName is the variable of an ambient flag.
func EnvName(flagName string) string {
	return "BOTTLE_" + strings.ToUpper(strings.ReplaceAll(flagName, "-", "_"))
}

func (p *Proc) prepare(c *Command, full string) {
	if c.FlagSet == nil {
		c.FlagSet = p.Flags(full)
	}
	if c.UsageFunc == nil {
		c.UsageFunc = func(c *ffcli.Command) string { return p.help(c) }
	}
	c.FlagSet.VisitAll(func(f *flag.Flag) {
		if _, wrapped := f.Value.(*once); wrapped {
			return
		}
		if r, ok := f.Value.(interface{ Repeatable() bool }); ok && r.Repeatable() {
			return
		}
		f.Value = &once{Value: f.Value, name: f.Name}
	})
	for _, sub := range c.Subcommands {
		p.prepare(sub, full+" "+sub.Name)
	}
}

// once refuses a flag that is given twice: the last one would win silently.
type once struct {
	flag.Value
	name string
	set  bool
}

func (o *once) Set(s string) error {
	if o.set {
		return fmt.Errorf("given twice")
	}
	o.set = true
	return o.Value.Set(s)
}

func (o *once) IsBoolFlag() bool {
	b, ok := o.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}

// List is a flag that may be repeated.
type List []string

func (l *List) String() string {
	if l == nil {
		return ""
	}
	return strings.Join(*l, ",")
}

func (l *List) Set(s string) error { *l = append(*l, s); return nil }

// Repeatable keeps the flag out of the rule that a flag is given once.
func (l *List) Repeatable() bool { return true }

func (p *Proc) applyEnv(root *Command) error {
	for fs, rules := range p.flags {
		if !fs.Parsed() {
			continue
		}
		given := map[string]bool{}
		fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
		for name := range rules.ambient {
			v := p.Getenv(EnvName(name))
			if v == "" || given[name] {
				continue
			}
			if err := fs.Set(name, v); err != nil {
				return fault.New(fault.Usage, "usage", "%s=%q: %w", EnvName(name), v, err)
			}
		}
	}
	return nil
}

// NoArgs refuses leftover arguments.
func NoArgs(args []string) error {
	if len(args) == 0 {
		return nil
	}
	if err := CheckArgs(args); err != nil {
		return err
	}
	return fault.New(fault.Usage, "usage", "unexpected argument %q", args[0]).WithHint("this command takes flags only; see --help")
}

// CheckArgs refuses a flag behind an argument. Go's flag package stops at the
// first argument, so "down ID --dry-run" would really act.
func CheckArgs(args []string) error {
	for i, a := range args {
		if a == "--" {
			return nil
		}
		if len(a) > 1 && a[0] == '-' {
			before := append([]string{a}, args[:i]...)
			return fault.New(fault.Usage, "usage", "flag %s stands behind an argument", a).
				WithHint("flags come first: %s", strings.Join(append(before, args[i+1:]...), " "))
		}
	}
	return nil
}

// command is the name of the tool with the verb that is being run.
func (p *Proc) command() string {
	name := p.Name
	for fs := range p.flags {
		if fs.Parsed() && len(fs.Name()) > len(name) {
			name = fs.Name()
		}
	}
	return name
}

func (p *Proc) helpFor(c *Command, args []string) string {
	for _, a := range args {
		for _, sub := range c.Subcommands {
			if sub.Name == a {
				return p.helpFor(sub, args[slices.Index(args, a)+1:])
			}
		}
	}
	return p.help(c)
}

func (p *Proc) help(c *Command) string {
	var b strings.Builder
	if c.ShortHelp != "" {
		fmt.Fprintf(&b, "%s: %s\n\n", c.FlagSet.Name(), c.ShortHelp)
	}
	fmt.Fprintf(&b, "usage: %s\n", c.ShortUsage)
	if c.LongHelp != "" {
		fmt.Fprintf(&b, "\n%s\n", strings.Trim(c.LongHelp, "\n"))
	}
	if len(c.Subcommands) > 0 {
		b.WriteString("\nverbs:\n")
		for _, sub := range c.Subcommands {
			if sub.ShortHelp != "" { // what has no help is for our own processes
				fmt.Fprintf(&b, "  %-10s %s\n", sub.Name, sub.ShortHelp)
			}
		}
	}
	first := true
	c.FlagSet.VisitAll(func(f *flag.Flag) {
		if first {
			b.WriteString("\nflags:\n")
			first = false
		}
		kind, text := flag.UnquoteUsage(f)
		name := strings.TrimRight(dashed(f.Name)+" "+kind, " ")
		if p.flags[c.FlagSet] != nil && p.flags[c.FlagSet].ambient[f.Name] {
			text += " [$" + EnvName(f.Name) + "]"
		}
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0s" && f.DefValue != "0" {
			text += fmt.Sprintf(" (default %s)", f.DefValue)
		}
		fmt.Fprintf(&b, "  %-18s %s\n", name, text)
	})
	return strings.TrimRight(b.String(), "\n")
}

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// Duration is a flag value that also takes days, as in 2d.
type Duration time.Duration

func (d *Duration) String() string { return time.Duration(*d).String() }

func (d *Duration) Set(s string) error {
	if n, ok := strings.CutSuffix(s, "d"); ok {
		v, err := time.ParseDuration(n + "h")
		if err != nil || v > math.MaxInt64/24 || v < math.MinInt64/24 {
			return fmt.Errorf("%q is no number of days", s)
		}
		*d = Duration(24 * v)
		return nil
	}
	v, err := time.ParseDuration(s)
	*d = Duration(v)
	return err
}

// Filled is a flag value that is not empty. It is for flags that narrow what a
// command does: an empty value, as of a variable that a script has not set, would
// read as if that were not asked for.
type Filled string

func (f *Filled) String() string { return string(*f) }

func (f *Filled) Set(s string) error {
	if s == "" {
		return errors.New("it is empty")
	}
	*f = Filled(s)
	return nil
}

// Digest is a flag value as the tools print digests: sha256: and 64 hexadecimal
// digits. It is not empty, for the reason that Filled has.
type Digest string

func (d *Digest) String() string { return string(*d) }

func (d *Digest) Set(s string) error {
	h, ok := strings.CutPrefix(s, "sha256:")
	if raw, err := hex.DecodeString(h); !ok || err != nil || len(raw) != sha256.Size || strings.ToLower(h) != h {
		return errors.New("a digest is sha256: and 64 digits of 0-9 and a-f")
	}
	*d = Digest(s)
	return nil
}
