package replay

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// Answers of a policy to a past decision.
const (
	Allow   = "allow"
	Deny    = "deny"
	Unknown = "unknown" // it cannot be told from the log
)

// Changed is a past decision that a policy would change.
type Changed struct {
	Host    string `json:"host"`
	Port    int    `json:"port"`             // 0 for a lookup
	Method  string `json:"method,omitempty"` // of a request
	Path    string `json:"path,omitempty"`
	Was     string `json:"was"` // allow | deny
	WasCode string `json:"was_code,omitempty"`
	Now     string `json:"now"` // allow | deny | unknown
	NowCode string `json:"now_code,omitempty"`
	Rule    *int   `json:"rule,omitempty"` // of the new policy
	From    string `json:"from,omitempty"` // its provenance
	Why     string `json:"why,omitempty"`
	Count   int    `json:"count"`
}

// Replay puts the decisions of a log to the policy of b and gives those that it
// would change. Errors are those of policy.Compile.
func Replay(l *Log, b *plan.Bottle) ([]Changed, error) {
	m, err := policy.Compile(b.Egress.Rules)
	if err != nil {
		return nil, err
	}
	index, read := map[Changed]int{}, readTLS(l)
	var out []Changed
	for _, d := range l.Decisions {
		was := Allow // and the network failed
		if d.Verdict == audit.Deny {
			was = Deny
		}
		a := again{d, b, read[endpoint{d.Host, d.Port}]}.decide(m)
		if a.verdict == was {
			continue
		}
		c := Changed{Host: d.Host, Port: d.Port, Method: d.Method, Path: d.Path, Was: was, WasCode: d.Code,
			Now: a.verdict, NowCode: a.code, From: a.from, Why: a.why}
		// Decisions that differ in what is not shown here are one.
		i, ok := index[c]
		if !ok {
			i = len(out)
			index[c] = i
			if a.rule >= 0 {
				c.Rule = &a.rule
			}
			out = append(out, c)
		}
		out[i].Count += l.Counts[d]
	}
	slices.SortStableFunc(out, func(x, y Changed) int {
		if c := strings.Compare(x.Host, y.Host); c != 0 {
			return c
		}
		return x.Port - y.Port
	})
	return out, nil
}

// again is a past decision before another policy.
type again struct {
	Decision
	b    *plan.Bottle
	read bool // the gate read what went there, so that requests have lines of their own
}

type endpoint struct {
	host string
	port int
}

// readTLS finds the hosts whose traffic the gate read inside TLS.
func readTLS(l *Log) map[endpoint]bool {
	read := map[endpoint]bool{}
	for _, d := range l.Decisions {
		if d.Kind == audit.KindRequest && d.Protocol == "tls" {
			read[endpoint{d.Host, d.Port}] = true
		}
	}
	return read
}

type answer struct {
	verdict, code string
	rule          int // -1 if there is none
	from, why     string
}

func (d again) decide(m *policy.Matcher) answer {
	if d.Kind == audit.KindLookup {
		open, now := m.Services(d.Host)
		if len(open) > 0 {
			return answer{verdict: Allow, code: policy.Allowed, rule: now.Index, from: now.Rule.From}
		}
		return answerOf(now)
	}
	now := m.Foresee(d.Host, d.Port)
	a := answerOf(now)
	if !now.Allow {
		return a
	}
	if d.Verdict == audit.Deny {
		return d.denied(m, now.Rule, a)
	}
	if ip, err := netip.ParseAddrPort(d.Address); err == nil && len(now.Rule.Addresses) == 0 {
		if err := m.CheckAddr(now.Rule, ip.Addr(), d.Port, nil); err != nil {
			return a.not(policy.AddressNotAllowed, err.Error())
		}
	}
	return d.allowed(now.Rule, a)
}

func answerOf(d policy.Decision) answer {
	a := answer{verdict: Deny, code: d.Code, rule: d.Index}
	if d.Allow {
		a.verdict = Allow
	}
	if d.Rule != nil {
		a.from = d.Rule.From
	}
	return a
}

func (a answer) not(code, why string) answer {
	a.verdict, a.code, a.why = Deny, code, why
	return a
}

func (a answer) unknown(why string) answer {
	a.verdict, a.code, a.why = Unknown, "", why
	return a
}

// allowed goes on for what was allowed and is allowed by rule r: the client
// speaks as it did.
func (d again) allowed(r *plan.Rule, a answer) answer {
	switch {
	case d.Protocol == r.Protocol || r.Protocol == "tcp" && (d.Kind == audit.KindConnect || d.Protocol == "tls"):
	case d.Protocol == "tcp":
		return a.unknown("what was sent is not in the log, and the rule is about " + r.Protocol + " now")
	case d.Protocol == "http" || r.Protocol == "http":
		return a.not("wrong_protocol", "the rule is about "+r.Protocol+" now, and the client speaks "+d.Protocol)
	default:
		return a.not(map[string]string{"tls": "not_tls", "ssh": "not_ssh"}[r.Protocol], "the client speaks "+d.Protocol)
	}
	return d.request(r, a)
}

// request decides about the request, where the gate would read it.
func (d again) request(r *plan.Rule, a answer) answer {
	if len(r.Requests) == 0 || !(policy.Inspected(r, d.Host, d.b.Secrets) || r.Protocol == "http") {
		return a
	}
	switch {
	case d.Kind == audit.KindConnect && d.Protocol == "tls" && !d.read:
		return a.unknown("the rule is about certain requests now, and those inside are not in the log")
	case d.Kind == audit.KindConnect:
		return a // its requests have lines of their own
	case strings.HasSuffix(d.Path, "…"):
		return a.unknown("the log has only the beginning of the path")
	}
	path := d.Path
	if path == "" {
		path = "/"
	}
	if now := policy.DecideRequest(r, d.Method, path); !now.Allow {
		a.from = r.RequestsFrom
		return a.not(now.Code, "")
	}
	return a
}

// Codes by what would have to change for another answer.
var (
	// The decision about host and port alone.
	byRules = []string{policy.NotInAllowlist, policy.PortNotAllowed, policy.DeniedByRule, policy.BadHost, policy.BadPort}
	// What a tunnel began with: tcp takes anything.
	byOpening = []string{"sni_missing", "sni_mismatch", "ech_refused", "not_tls", "no_client_hello", "bad_client_hello", "not_ssh"}
	// The requests of a rule.
	byRequests = []string{policy.RequestNotAllowed, policy.AmbiguousPath}
)

// denied goes on for what was denied, where rule r allows host and port.
func (d again) denied(m *policy.Matcher, r *plan.Rule, a answer) answer {
	stays := answer{verdict: Deny}
	switch {
	case slices.Contains(byRules, d.Code):
		if d.Kind == audit.KindRequest {
			// It was plain HTTP: inside a tunnel nothing is denied for these.
			if r.Protocol != "http" {
				return stays
			}
			return d.request(r, a)
		}
		return a
	case d.Code == policy.AddressNotAllowed:
		if len(r.Addresses) > 0 || r.Host == "" || d.deniedAddressPasses(m, r) {
			return a
		}
	case d.Code == "wrong_protocol":
		if r.Protocol == "http" {
			return d.request(r, a)
		}
	case slices.Contains(byOpening, d.Code):
		if r.Protocol == "tcp" {
			return a
		}
	case slices.Contains(byRequests, d.Code):
		if read := r.Protocol == "http" || policy.Inspected(r, d.Host, d.b.Secrets); !read || len(r.Requests) == 0 {
			return a
		}
		if now := d.request(r, a); now.verdict != Deny {
			return now
		}
	case d.Kind == audit.KindRequest && r.Protocol == "tls" && !policy.Inspected(r, d.Host, d.b.Secrets) && isTLS(d):
		a.why = "nobody reads the request any more"
		return a
	}
	return stays
}

// isTLS tells a request inside an inspected tunnel from plain HTTP. What is
// refused for its form has no rule; port 80 speaks for itself then.
func isTLS(d again) bool { return d.Protocol == "tls" || d.Protocol == "" && d.Port != 80 }

// deniedAddressPasses: an address that a deny rule was about is in the reason.
// All others were refused for what they are, and still are.
func (d again) deniedAddressPasses(m *policy.Matcher, r *plan.Rule) bool {
	rest, ok := strings.CutPrefix(d.Reason, d.Host+": ")
	text, why, found := strings.Cut(rest, " ")
	ip, err := netip.ParseAddr(text)
	return ok && found && err == nil && strings.HasPrefix(why, "is denied by ") && m.CheckAddr(r, ip, d.Port, nil) == nil
}

// Unused is a rule, or a part of one, that no decision of a log needed.
type Unused struct {
	Index    int       `json:"index"` // in bottle.egress.rules
	Rule     plan.Rule `json:"rule"`
	Ports    []int     `json:"ports,omitempty"`    // that were not used, where others were
	Requests []string  `json:"requests,omitempty"` // the same
	Note     string    `json:"note,omitempty"`
}

// NeverUsed gives the rules of b that none of the decisions of a log would come
// to, put to b anew. Errors are those of policy.Compile.
func NeverUsed(l *Log, b *plan.Bottle) ([]Unused, error) {
	m, err := policy.Compile(b.Egress.Rules)
	if err != nil {
		return nil, err
	}
	type place struct{ rule, port int }
	hit, ports, requests := map[int]bool{}, map[place]bool{}, map[place]bool{}
	for _, d := range l.Decisions {
		now := m.Decide(d.Host, d.Port)
		if d.Kind == audit.KindLookup {
			_, now = m.Services(d.Host)
		}
		if now.Index < 0 || !now.Allow && now.Code != policy.DeniedByRule {
			continue
		}
		hit[now.Index] = true
		ports[place{now.Index, d.Port}] = true
		if asked := policy.DecideRequest(now.Rule, d.Method, d.Path); d.Kind == audit.KindRequest && asked.Allow {
			requests[place{now.Index, asked.Index}] = true
		}
	}
	var out []Unused
	for i := range b.Egress.Rules {
		r := b.Egress.Rules[i]
		u := Unused{Index: i, Rule: r}
		if hit[i] {
			for _, p := range r.Ports {
				if !ports[place{i, p}] && !ports[place{i, 0}] {
					u.Ports = append(u.Ports, p)
				}
			}
			for j, s := range r.Requests {
				if !requests[place{i, j}] {
					u.Requests = append(u.Requests, s)
				}
			}
			if len(u.Ports)+len(u.Requests) == 0 {
				continue
			}
		} else if r.Verdict == "deny" && r.CIDR != "" {
			u.Note = "it also holds for the addresses to which names resolve, which the log does not have"
		}
		out = append(out, u)
	}
	return out, nil
}
