package cli

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
)

// askLimit is long enough for a pipelock that has to be restarted.
const askLimit = 30 * time.Second

// liveFlags say which bottle and what about; what is named is in the arguments.
type liveFlags struct {
	bottle, protocol, why string
	addresses             tool.Filled
	lasts                 lifetime
}

// lifetime is how long a rule holds; not given, 0, it is until the bottle ends.
// So no time that is given may come out as 0: what was to be short would be for
// good.
type lifetime struct{ tool.Duration }

func (l *lifetime) Set(s string) error {
	if err := l.Duration.Set(s); err != nil {
		return err
	}
	if d := time.Duration(l.Duration); d <= 0 || d > live.MaxFor {
		return fmt.Errorf("a rule holds for a time above 0 and up to %dh, or without --for until the bottle ends", live.MaxFor/time.Hour)
	}
	return nil
}

func (f *liveFlags) common(fs *flag.FlagSet) {
	fs.StringVar(&f.bottle, "bottle", "", "the running bottle `ID`; without it stdin is its document")
}

func (f *liveFlags) timed(fs *flag.FlagSet) {
	f.common(fs)
	fs.Var(&f.lasts, "for", "for this `DURATION`, as 90s, 1h or 2d (default until the bottle ends)")
	fs.StringVar(&f.why, "why", "", "a `REASON` for the audit log")
}

func allowCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-egress allow")
	var f liveFlags
	f.timed(fs)
	fs.StringVar(&f.protocol, "protocol", "tls", "the `PROTOCOL` that the host speaks: tls, http, ssh or tcp")
	fs.Var(&f.addresses, "addresses", "reach the host at these `IPS`, separated by commas, and nowhere else; private ones are reached only so")
	return &tool.Command{
		Name:       "allow",
		ShortUsage: "bottle-egress allow --bottle ID [--for D] [flags] HOST[:PORT]...",
		ShortHelp:  "let a running bottle reach further hosts",
		LongHelp: `
Opens hosts for a bottle that runs, at once, and until the bottle ends or --for
is over. HOST is what egress.allow of a manifest takes: a name, *.name, an
address or a range; PORT is the protocol's own if it is left out. What the plan
denies stays denied, and what it allows stays as it is; either is said, with
status 1. A host that is opened so is never inspected and gets no secret: TLS to
it is end to end. Prints one line of JSON; rules lists what was added, and revert
takes it back. The plan document does not change.

In the guest a name that is opened so resolves at once, for programs that know
nothing of proxies too. An address or a range is reached through the proxy
variables only: what leads there without them is laid out when a bottle starts.

  bottle-egress allow --bottle claude --for 1h docs.example.org
  bottle-egress allow --bottle claude --protocol ssh git.example.net
  bottle-egress allow --bottle claude --protocol http --addresses 127.0.0.1 ollama.local:11434`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			return changeRules(ctx, p, &f, "allow", args)
		},
	}
}

func denyCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-egress deny")
	var f liveFlags
	f.timed(fs)
	return &tool.Command{
		Name:       "deny",
		ShortUsage: "bottle-egress deny --bottle ID [--for D] [flags] HOST[:PORT]...",
		ShortHelp:  "close hosts to a running bottle, and cut what is open to them",
		LongHelp: `
Closes hosts for a bottle that runs: tunnels and requests that are open to them
end at once, and the gate refuses new ones until the bottle ends or --for is
over. It wins over everything that is allowed. Without a PORT it is about all of
them; a range of addresses is also held against what names lead to. Prints one
line of JSON with the number of connections that were cut.

  bottle-egress deny --bottle claude telemetry.example.com
  bottle-egress deny --bottle claude --for 10m '*.example.com:443' 192.0.2.0/24`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			return changeRules(ctx, p, &f, "deny", args)
		},
	}
}

func changeRules(ctx context.Context, p *tool.Proc, f *liveFlags, verdict string, args []string) error {
	if err := tool.CheckArgs(args); err != nil {
		return err
	}
	if len(args) == 0 {
		return fault.New(fault.Usage, "usage", "which host?").WithHint("bottle-egress %s --bottle ID HOST", verdict)
	}
	c := control.Change{For: time.Duration(f.lasts.Duration)}
	for _, arg := range args {
		r, err := f.rule(verdict, arg)
		if err != nil {
			return err
		}
		c.Add = append(c.Add, r)
	}
	return sendChange(ctx, p, f.bottle, verdict, c)
}

// rule reads one argument as an entry of a manifest would be read.
func (f *liveFlags) rule(verdict, arg string) (plan.Rule, error) {
	host, port, err := cutTarget(arg)
	if err != nil {
		return plan.Rule{}, err
	}
	r := plan.Rule{Verdict: verdict, Protocol: "any", Why: f.why, Ports: []int{}}
	normalize := policy.NormalizeDeny
	if verdict == "allow" {
		normalize = policy.Normalize
		r.Protocol = f.protocol
		if port == 0 {
			if port = usualPort[f.protocol]; port == 0 && slices.Contains(policy.Protocols, f.protocol) {
				return r, fault.New(fault.Usage, "usage", "%s: protocol tcp has no port of its own", arg).WithHint("write HOST:PORT")
			}
		}
	}
	if !slices.Contains(policy.Protocols, f.protocol) && verdict == "allow" {
		return r, fault.New(fault.Usage, "usage", "protocol %q is unknown", f.protocol).
			WithHint("it is one of %s", strings.Join(policy.Protocols, ", "))
	}
	e, err := normalize(host)
	if err != nil {
		return r, err
	}
	r.Host, r.CIDR, r.Class = e.Host, e.CIDR(), e.Class
	if port != 0 {
		r.Ports = []int{port}
	}
	r.Addresses, err = f.pins(arg, e)
	return r, err
}

var usualPort = map[string]int{"tls": 443, "http": 80, "ssh": 22}

func (f *liveFlags) pins(arg string, e policy.Entry) ([]string, error) {
	if f.addresses == "" {
		return nil, nil
	}
	if e.Host == "" {
		return nil, fault.New(fault.Usage, "usage", "%s: addresses pin a name, and this is none", arg).WithHint("leave --addresses out")
	}
	var ips []netip.Addr
	for _, s := range strings.Split(string(f.addresses), ",") {
		ip, err := policy.NormalizeAddress(s)
		if err != nil {
			return nil, err
		}
		ips = append(ips, ip)
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	var out []string
	for _, ip := range slices.Compact(ips) {
		out = append(out, ip.String())
	}
	return out, nil
}

// cutTarget takes a port off HOST:PORT, RANGE:PORT and [ADDRESS]:PORT. Other
// text is left for lib/policy, which says what is wrong with it.
func cutTarget(arg string) (host string, port int, err error) {
	host = arg
	i := strings.LastIndexByte(arg, ':')
	switch {
	case i < 0 || strings.Trim(arg[i+1:], "0123456789") != "" || i == len(arg)-1:
		return host, 0, nil
	case strings.HasPrefix(arg, "[") && strings.HasSuffix(arg[:i], "]"):
		host = arg[1 : i-1]
	case strings.Count(arg, ":") == 1:
		host = arg[:i]
	default: // an IPv6 address
		return host, 0, nil
	}
	port, err = strconv.Atoi(arg[i+1:])
	if err != nil || policy.CheckPort(port) != nil {
		return "", 0, fault.New(fault.Data, "bad_port", "%s: there is no port %s", arg, arg[i+1:]).WithHint("ports go from 1 to 65535")
	}
	return host, port, nil
}

// runningBottle finds a bottle of the user's by its id, or by the document on
// stdin.
func runningBottle(ctx context.Context, p *tool.Proc, id string) (*state.Bottle, *state.Record, error) {
	if id == "" {
		d, err := one(ctx, p)
		if e := fault.As(err); e != nil && (e.Code == "empty_input" || e.Code == "usage") {
			return nil, nil, e.WithHint("name the bottle with --bottle (bottle-vm ls shows them), or pipe in the document that bottle-vm up printed")
		}
		if err != nil {
			return nil, nil, err
		}
		vm, err := d.VM()
		if err != nil {
			return nil, nil, err
		}
		id = vm.ID
	}
	root, err := state.Open(p.Getenv)
	if err != nil {
		return nil, nil, err
	}
	b, err := root.Find(id)
	if err != nil {
		return nil, nil, err
	}
	rec, err := b.Load()
	if err != nil {
		if fault.As(err).Code == "bug" { // state's plain errors
			err = fault.New(fault.NoInput, "no_such_bottle", "bottle %s: %w", b.ID, err).WithHint("bottle-gc clears what is left of it")
		}
		return nil, nil, err
	}
	if rec.Phase != state.Ready || !rec.Live() {
		return nil, nil, fault.New(fault.Unavailable, "not_running", "bottle %s is not running", b.ID).WithHint("bottle-vm status %s says more", b.ID)
	}
	return b, rec, nil
}

// changedRules is what allow, deny and revert print.
type changedRules struct {
	Bottle string `json:"bottle"` // vm.id
	Change string `json:"change"` // allow | deny | revert
	// Gate is down for a moment where it is being replaced: the next one begins
	// with these rules, and until then nothing leaves the bottle.
	Gate  string       `json:"gate"` // up | shut | down
	Cut   int          `json:"cut"`  // connections and requests that were ended
	Rules []live.Shown `json:"rules"`
}

func sendChange(ctx context.Context, p *tool.Proc, id, what string, c control.Change) error {
	b, rec, err := runningBottle(ctx, p, id)
	if err != nil {
		return err
	}
	a, err := control.Ask(rec.RunDir, control.Request{Do: "change", Change: &c}, askLimit)
	if err != nil {
		return err
	}
	return printJSON(p, changedRules{b.ID, what, a.Gate, a.Cut, live.Show(a.Changed)})
}

func printJSON(p *tool.Proc, v any) error {
	line, err := plan.Encode(v)
	if err != nil {
		return err
	}
	return p.StdoutOutput().WriteLine(line)
}
