package cli

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/tool"
)

func explainCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-egress explain")
	method := fs.String("method", "GET", "the `METHOD` of the request, where a path is given and the gate reads it")
	pretty := fs.Bool("pretty", false, "write sentences, for people, instead of JSON")
	return &tool.Command{
		Name:       "explain",
		ShortUsage: "bottle-plan … | bottle-egress explain [--pretty] [--method METHOD] HOST[:PORT][/PATH]",
		ShortHelp:  "tell what the gate would answer, which rule decides, and where it comes from",
		LongHelp: `
Reads documents and says for each, in one line of JSON, what its gate would
answer to a request for HOST and PORT (443): the verdict, the rule that decides
with the line of the manifest or the preset that it comes from, what pipelock
would say, whether the gate reads the traffic, which secrets it puts in, and
what nobody can see there. Nothing is resolved or connected to; at_the_gate
lists what only the gate finds out. An IPv6 address with a port is in brackets.
A PATH is decided about where the gate reads requests; elsewhere nobody sees it.

Exits with 0 if every document allows it, and with 1 if one denies it.

  bottle-plan claude | bottle-egress explain --pretty api.example.com
  bottle-plan --all | bottle-egress explain git.example.net:22`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.CheckArgs(args); err != nil {
				return err
			}
			if len(args) != 1 {
				return fault.New(fault.Usage, "usage", "explain takes one host, and %d were given", len(args)).
					WithHint("bottle-plan AGENT | bottle-egress explain api.example.com:443")
			}
			t, err := parseTarget(args[0])
			if err == nil {
				err = t.setMethod(*method)
			}
			if err != nil {
				return err
			}
			out := p.StdoutOutput()
			denied := false
			err = each(ctx, p, func(b *plan.Bottle) error {
				a, err := explain(b, t)
				if err != nil {
					return err
				}
				denied = denied || a.Verdict == "deny"
				if *pretty {
					return a.people(p)
				}
				line, err := plan.Encode(a)
				if err != nil {
					return err
				}
				return out.WriteLine(line)
			})
			if err == nil && denied {
				err = tool.Exit(fault.No)
			}
			return err
		},
	}
}

// target is what explain is asked about.
type target struct {
	host string // as programs ask for it
	port int
	// path is as it leaves the gate, "" if none was given.
	path   string
	method string
}

// defaultPort is where programs go that are given a name alone.
const defaultPort = 443

func parseTarget(arg string) (target, error) {
	if scheme, rest, ok := strings.Cut(arg, "://"); ok {
		return target{}, fault.New(fault.Usage, "usage", "a URL was given, and explain takes HOST[:PORT][/PATH]").
			WithHint("bottle-egress explain %s", withPort(scheme, rest))
	}
	t := target{port: defaultPort}
	authority, path, hasPath := strings.Cut(arg, "/")
	var port string
	var err error
	if hasPath {
		if t.path, err = sentPath("/" + path); err != nil {
			return t, err
		}
	}
	if t.host, port, err = cutPort(authority); err != nil {
		return t, err
	}
	if _, err := strconv.Atoi(path); err == nil && hasPath && len(path) <= 3 && looksLikeAddress(t.host) {
		return t, fault.New(fault.Usage, "usage", "%q is a range, and explain is about one host", arg).
			WithHint("name one of its addresses")
	}
	if port != "" {
		t.port, err = strconv.Atoi(port)
		if err == nil {
			err = policy.CheckPort(t.port)
		}
		if err != nil {
			return t, fault.New(fault.Usage, "usage", "%q is no port", port).WithHint("ports go from 1 to 65535")
		}
	}
	if t.host, err = policy.Hostname(t.host); err != nil {
		f := fault.As(err)
		return t, &fault.Error{Exit: fault.Usage, Code: f.Code, Msg: f.Msg, Hint: f.Hint}
	}
	return t, nil
}

// sentPath is a path as net/http sends it, which is what the gate decides about.
func sentPath(s string) (string, error) {
	u, err := url.ParseRequestURI(s)
	if err != nil {
		return "", fault.New(fault.Usage, "usage", "%q is no path of a request", s).WithHint("write it as programs send it, with %%20 for a space")
	}
	return u.EscapedPath(), nil
}

func (t *target) setMethod(method string) error {
	if _, err := policy.NormalizeRequest(method + " /"); err != nil || method == "*" {
		return fault.New(fault.Usage, "usage", "%q is no method that the gate lets through", method).WithHint("write one such as GET or POST, in upper case")
	}
	t.method = method
	return nil
}

// withPort writes a URL the way explain takes it.
func withPort(scheme, rest string) string {
	authority, path, hasPath := strings.Cut(rest, "/")
	if i := strings.LastIndexByte(authority, '@'); i >= 0 {
		authority = authority[i+1:]
	}
	path, _, _ = strings.Cut(path, "?")
	path, _, _ = strings.Cut(path, "#")
	if _, port, err := cutPort(authority); err == nil && port == "" {
		standard := map[string]string{"http": "80", "ssh": "22"}[strings.ToLower(scheme)]
		if standard != "" {
			authority += ":" + standard
		}
	}
	if hasPath && path != "" {
		authority += "/" + path
	}
	return authority
}

// cutPort takes HOST[:PORT] apart. Several colons without brackets are an IPv6
// address.
func cutPort(s string) (host, port string, err error) {
	if rest, ok := strings.CutPrefix(s, "["); ok {
		host, after, closed := strings.Cut(rest, "]")
		port, hasPort := strings.CutPrefix(after, ":")
		if !closed || !strings.Contains(host, ":") || after != "" && (!hasPort || port == "") {
			return "", "", fault.New(fault.Usage, "usage", "%q is no host", s).WithHint("an IPv6 address with a port is written like [2001:db8::1]:443")
		}
		return host, port, nil
	}
	if strings.Count(s, ":") != 1 {
		return s, "", nil
	}
	host, port, _ = strings.Cut(s, ":")
	if port == "" {
		return "", "", fault.New(fault.Usage, "usage", "%q ends in a colon", s).WithHint("name the port, or leave the colon out for %d", defaultPort)
	}
	return host, port, nil
}

func looksLikeAddress(s string) bool {
	return strings.Contains(s, ":") || s != "" && strings.Trim(s, "0123456789.") == ""
}

// explanation is what explain says about one document.
type explanation struct {
	Bottle  string `json:"bottle"`
	Host    string `json:"host"`
	Port    int    `json:"port"`
	Method  string `json:"method,omitempty"` // with a path
	Path    string `json:"path,omitempty"`
	Verdict string `json:"verdict"` // allow | deny
	Code    string `json:"code"`    // as in the gate's answer and its audit log
	Reason  string `json:"reason"`
	Hint    string `json:"hint,omitempty"` // what would change a denial
	// Rule decided, or is the nearest one: it has the host and not the port.
	Rule      *ruleAt                 `json:"rule,omitempty"`
	From      string                  `json:"from,omitempty"` // its provenance
	Class     string                  `json:"class,omitempty"`
	Inspected bool                    `json:"inspected"`
	PathSeen  bool                    `json:"path_seen"`         // whether the gate reads paths there
	Request   string                  `json:"request,omitempty"` // entry of the rule's requests that allows the path
	Secrets   []policy.NamedInjection `json:"secrets"`
	Pipelock  pipelockView            `json:"pipelock"`
	Residual  []string                `json:"residual"`    // what nobody can see there
	AtTheGate []string                `json:"at_the_gate"` // what is decided only when it is asked for
}

// ruleAt is a rule of bottle.egress.rules with its place there.
type ruleAt struct {
	Index int `json:"index"`
	plan.Rule
}

// pipelockView is what pipelock would say, and how that fits the gate's answer.
type pipelockView struct {
	pipelock.Opinion
	Used    string `json:"used"`    // never | auto | always: whether this bottle's traffic may go through it
	Carries bool   `json:"carries"` // whether traffic of the rule does, where it is used
	Agrees  bool   `json:"agrees"`
	Why     string `json:"why"`
}

// explain answers for one policy, by the code that the gate decides with.
func explain(b *plan.Bottle, t target) (*explanation, error) {
	e, err := pipelock.Derive(b)
	if err != nil {
		return nil, err
	}
	m, err := policy.Compile(b.Egress.Rules)
	if err != nil {
		return nil, err
	}
	d := m.Foresee(t.host, t.port)
	host := strings.TrimSuffix(strings.ToLower(t.host), ".")
	a := &explanation{
		Bottle: b.ID, Host: host, Port: t.port, Path: t.path, Verdict: "deny",
		Code: d.Code, Reason: d.Reason, Hint: d.Hint,
		Secrets: []policy.NamedInjection{}, Residual: []string{}, AtTheGate: []string{},
	}
	if d.Rule != nil {
		a.Rule, a.From, a.Class = &ruleAt{d.Index, *d.Rule}, d.Rule.From, d.Rule.Class
	}
	if d.Allow {
		a.Verdict = "allow"
		a.describe(b, d.Rule)
	}
	if a.Pipelock, err = compare(b, e, d, host); err != nil {
		return nil, err
	}
	if t.path != "" {
		a.Method = t.method
		a.decideRequest(t)
	}
	return a, nil
}

// decideRequest goes on where the gate does: a request to a host that is allowed,
// in traffic that it reads.
func (a *explanation) decideRequest(t target) {
	if a.Verdict != "allow" || !a.PathSeen {
		return
	}
	d := policy.DecideRequest(&a.Rule.Rule, t.method, t.path)
	if d.Allow {
		if d.Index >= 0 {
			a.Request = a.Rule.Requests[d.Index]
		}
		return
	}
	a.Verdict, a.Code, a.Reason, a.Hint = "deny", d.Code, d.Reason, d.Hint
	a.From = a.Rule.RequestsFrom
	a.Residual, a.AtTheGate, a.Secrets = []string{}, []string{}, []policy.NamedInjection{}
	if a.Pipelock.Verdict == "allow" {
		a.Pipelock.Agrees, a.Pipelock.Why = false, "the gate is narrower: pipelock's lists are about hosts, and have no requests"
	}
}

// describe says how traffic is treated that rule allows.
func (a *explanation) describe(b *plan.Bottle, r *plan.Rule) {
	a.Inspected = policy.Inspected(r, a.Host, b.Secrets)
	a.PathSeen = a.Inspected || r.Protocol == "http"
	if a.Inspected {
		a.Secrets = append(a.Secrets, policy.Injections(b.Secrets, a.Host)...)
	}
	a.Residual = residualOf(b, r, a.Host)
	later := func(text string) { a.AtTheGate = append(a.AtTheGate, text) }
	switch ips := policy.KnownAddresses(r, a.Host); {
	case len(ips) == 0:
		later("the name is resolved once, and refused if one of its addresses is private, loopback, metadata, the host's own or denied")
	case r.CIDR != "" && !strings.HasSuffix(r.CIDR, "/32") && !strings.HasSuffix(r.CIDR, "/128"):
		later("refused if it is an address of the host itself, which a range does not open")
	}
	switch {
	case r.Protocol == "tls" && r.Host != "":
		later("the connection has to begin with a TLS ClientHello that names " + a.Host + ", unencrypted")
	case r.Protocol == "tls":
		later("the connection has to begin with a TLS ClientHello that names no server")
	case r.Protocol == "http":
		later("the Host header of each request has to name " + a.Host)
	case r.Protocol == "ssh":
		later("both sides have to begin with an SSH banner")
	}
	if len(r.Requests) > 0 && a.Path == "" {
		later("each request has to be one of the rule's: " + strings.Join(r.Requests, ", "))
	}
	if a.Inspected {
		later("the Host header of each request has to name " + a.Host + ", and the host's certificate has to be trusted")
	}
	if slices.Contains(r.DLPAllow, policy.EveryDLPRule) {
		return
	}
	but := ""
	if len(r.DLPAllow) > 0 {
		but = ", but not for " + strings.Join(r.DLPAllow, ", ") + " (" + r.DLPAllowFrom + ")"
	}
	if r.Class == policy.ClassWildcard {
		later("the labels below the wildcard are looked through for secrets" + but)
	}
	if a.PathSeen {
		later("each request is looked through for secrets before it leaves" + but)
	}
}

// residualOf is what the document's residual says of one host, without its name:
// that of the policy which consists of its rule and its secrets alone.
func residualOf(b *plan.Bottle, r *plan.Rule, host string) []string {
	alone, rule := *b, *r
	rule.Inspect = policy.Inspected(r, host, b.Secrets)
	alone.Egress.Rules = []plan.Rule{rule}
	alone.Secrets = nil
	for _, s := range b.Secrets {
		s.Inject = slices.DeleteFunc(slices.Clone(s.Inject), func(in plan.Injection) bool { return in.Host != host })
		alone.Secrets = append(alone.Secrets, s)
	}
	out := []string{}
	for _, s := range pipelock.Residual(&alone) {
		_, text, _ := strings.Cut(s, ": ") // no name has that in it
		out = append(out, text)
	}
	return out
}

// compare holds pipelock's opinion against the gate's decision. The gate stands
// in front of pipelock: where the two differ, the narrower one counts, and it
// has to be the gate, or traffic that never goes through pipelock.
func compare(b *plan.Bottle, e *plan.Egress, d policy.Decision, host string) (pipelockView, error) {
	v := pipelockView{Opinion: pipelock.Opinion{Verdict: "none"}, Used: map[string]string{"builtin": "never", "pipelock": "always"}[b.Egress.Proxy]}
	if v.Used == "" {
		v.Used = "auto"
	}
	if e.Pipelock == nil {
		v.Agrees, v.Why = true, "pipelock has no configuration for this policy; the gate alone decides"
		return v, nil
	}
	v.Carries = d.Allow && pipelock.Carries(*d.Rule)
	var err error
	if v.Opinion, err = pipelock.Says(e.Pipelock.YAML, host); err != nil {
		return v, err
	}
	v.Agrees = d.Allow == (v.Verdict == "allow")
	switch {
	case v.Agrees && d.Allow:
		v.Why = fmt.Sprintf("both allow it: %s is in pipelock's api_allowlist", v.Entry)
	case v.Agrees && v.List == "api_allowlist":
		v.Why = "both deny it: no entry of pipelock's api_allowlist matches it"
	case v.Agrees:
		v.Why = fmt.Sprintf("both deny it: pipelock's %s has %s", v.List, v.Entry)
	case d.Allow && !v.Carries:
		v.Why = "the gate allows it and pipelock is not asked: " + pipelock.NotCarried(*d.Rule)
	case d.Allow:
		v.Why = fmt.Sprintf("the gate allows it and pipelock's %s would not: with pipelock as proxy it is refused", v.List)
	default:
		v.Why = "the gate is narrower: " + narrower(v.Entry, d, host)
	}
	return v, nil
}

// narrower says why the gate denies what pipelock's list allows.
func narrower(entry string, d policy.Decision, host string) string {
	switch d.Code {
	case policy.PortNotAllowed:
		return "pipelock never checks ports, and " + entry + " allows the host on every one"
	case policy.DeniedByRule:
		if len(d.Rule.Ports) > 0 {
			return "the deny entry is about single ports, which pipelock does not know"
		}
		return "pipelock would take the deny entry for " + strings.TrimPrefix(d.Rule.Host, "*.") + " too, which is allowed, and is not given it"
	case policy.NotInAllowlist:
		if entry == "*."+host {
			return "pipelock's " + entry + " also matches " + host + " itself, and the gate's only what is below it"
		}
	}
	return d.Reason
}

// people writes the answer as sentences.
func (a *explanation) people(p *tool.Proc) error {
	var b strings.Builder
	verdict := map[string]string{"allow": "allowed", "deny": "denied"}[a.Verdict]
	fmt.Fprintf(&b, "%s: %s %s (%s)\n", a.Bottle, net.JoinHostPort(a.Host, strconv.Itoa(a.Port))+a.Path, verdict, a.Code)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	row("why", "%s", a.Reason)
	if a.Hint != "" {
		row("to change it", "%s", a.Hint)
	}
	if a.Rule != nil {
		row("rule", "%d: %s %s, class %s, from %s", a.Rule.Index, a.Rule.Verdict, a.Rule.Host+a.Rule.CIDR, a.Class, a.From)
		if a.Rule.Why != "" {
			row("", "%q", a.Rule.Why)
		}
	}
	if a.Verdict == "allow" {
		row("read", "%s", map[bool]string{true: "the gate reads what is sent", false: "the gate does not read what is sent"}[a.PathSeen])
	}
	if a.Request != "" {
		row("request", "allowed by %q (%s)", a.Request, a.Rule.RequestsFrom)
	}
	for _, s := range a.Secrets {
		row("secret", "%s goes into header %s", s.Name, s.Header)
	}
	row("pipelock", "%s: %s", a.Pipelock.Verdict, a.Pipelock.Why)
	for _, s := range a.Residual {
		row("unseen", "%s", s)
	}
	for _, s := range a.AtTheGate {
		row("at the gate", "%s", s)
	}
	_, err := p.Stdout.Write([]byte(b.String()))
	return writeFailed(err)
}
