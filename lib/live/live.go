// Package live is about rules that are added to a bottle while it runs: what
// one is, when it ends, and what keeper and gate tell each other of it. The
// plan stays what was planned; these rules lie on top of it (policy.Overlay) and
// end with the bottle at the latest.
//
// A rule for a limited time ends by two clocks. The one that counts since the
// host's boot goes on while the host is suspended and cannot be set; the wall
// clock also goes on while a virtual host is paused, and can be set. An allow
// ends as soon as either says so, a deny only when both do: no clock that stands
// still, jumps or is set back keeps anything open longer than it was asked for.
package live

import (
	"slices"
	"time"

	"github.com/bottle-tools/bottle/lib/plan"
)

// MaxRules bounds the rules of one bottle.
const MaxRules = 256

// MaxFor is the longest time that a rule can be given; without one it ends with
// the bottle.
const MaxFor = 366 * 24 * time.Hour

// Rule is one rule that was added. An allow rule has exactly one port, is never
// inspected and never gets a secret: both follow from the plan alone. A deny
// rule has one port, or none for all.
type Rule struct {
	plan.Rule
	By    int     `json:"by"`              // uid on the host
	Since string  `json:"since"`           // RFC 3339, UTC
	Until string  `json:"until,omitempty"` // RFC 3339, UTC; "" is until the bottle ends
	Ends  Instant `json:"ends,omitzero"`   // Until by both clocks; zero: never
}

// Instant is a moment by two clocks, in nanoseconds.
type Instant struct {
	Boot int64 `json:"boot"` // since the host's boot, suspended or not
	Wall int64 `json:"wall"` // since 1970
}

// After is the moment d after i.
func (i Instant) After(d time.Duration) Instant {
	return Instant{i.Boot + int64(d), i.Wall + int64(d)}
}

// Over tells if the rule has ended.
func (r *Rule) Over(now Instant) bool {
	return r.Ends != Instant{} && r.left(now) <= 0
}

// left is the time until the rule ends if no clock is set or stands still.
func (r *Rule) left(now Instant) time.Duration {
	boot, wall := time.Duration(r.Ends.Boot-now.Boot), time.Duration(r.Ends.Wall-now.Wall)
	if r.Verdict == "deny" {
		return max(boot, wall)
	}
	return min(boot, wall)
}

// watchEvery is how often the clocks are looked at while a rule is to end: a
// timer does not notice that a clock was set, or that the host was suspended.
const watchEvery = time.Second

// Wait tells when to look at rules the next time, and if there is anything to
// look for.
func Wait(rules []Rule, now Instant) (time.Duration, bool) {
	next, some := watchEvery, false
	for i := range rules {
		if (rules[i].Ends != Instant{}) {
			next, some = min(next, max(rules[i].left(now), 0)), true
		}
	}
	return next, some
}

// Split gives the rules that hold and those that are over, in order.
func Split(rules []Rule, now Instant) (hold, over []Rule) {
	for _, r := range rules {
		if r.Over(now) {
			over = append(over, r)
		} else {
			hold = append(hold, r)
		}
	}
	return hold, over
}

// Plain gives the rules as a matcher takes them.
func Plain(rules []Rule) []plan.Rule {
	out := make([]plan.Rule, len(rules))
	for i := range rules {
		out[i] = rules[i].Rule
	}
	return out
}

// Same tells if two rules are about the same thing: one replaces the other.
func Same(a, b *Rule) bool {
	return a.Verdict == b.Verdict && a.Host == b.Host && a.CIDR == b.CIDR && slices.Equal(a.Ports, b.Ports)
}

// What happened to a rule.
const (
	Added    = "rule_added"
	Replaced = "rule_replaced"
	Reverted = "rule_reverted"
	Expired  = "rule_expired"
)

// Change is one line for the audit log.
type Change struct {
	What string `json:"what"` // Added | Replaced | Reverted | Expired
	Rule Rule   `json:"rule"` // as it is now, or was
	By   int    `json:"by"`   // who changed it; of an expiry, who set the end
}

// Opens tells if the change can allow what was denied before.
func (c *Change) Opens() bool {
	added := c.What == Added || c.What == Replaced
	return added == (c.Rule.Verdict == "allow")
}

// Update is one line from the keeper to its gate: all rules that hold from now
// on, and what is new about them.
type Update struct {
	Seq     uint64   `json:"seq"`
	Rules   []Rule   `json:"rules"`
	Changes []Change `json:"changes,omitempty"`
	// Hold closes the way through the upstream proxy until the next Update: the
	// proxy is about to learn of the rules.
	Hold bool `json:"hold,omitempty"`
	// Report asks for the digests of what the gate decides by.
	Report bool `json:"report,omitempty"`
}

// Applied is the gate's answer, after the rules are in force and what they do
// not allow any more is cut.
type Applied struct {
	Seq uint64 `json:"seq"`
	Cut int    `json:"cut"` // connections and requests
	// RulesSHA256 is the digest of the plan's rules as the gate holds them, and
	// LiveSHA256 that of the rules on top (policy.RulesSHA256); where they were
	// asked for.
	RulesSHA256 string        `json:"rules_sha256,omitempty"`
	LiveSHA256  string        `json:"live_sha256,omitempty"`
	Error       *plan.Failure `json:"error,omitempty"`
}

// Shown is a rule that was added to a running bottle, as commands print it.
type Shown struct {
	Verdict   string   `json:"verdict"`
	Host      string   `json:"host,omitempty"`
	CIDR      string   `json:"cidr,omitempty"`
	Ports     []int    `json:"ports"` // none: all
	Protocol  string   `json:"protocol"`
	Addresses []string `json:"addresses,omitempty"`
	Why       string   `json:"why,omitempty"`
	By        int      `json:"by"`              // uid
	Since     string   `json:"since"`           // RFC 3339, UTC
	Until     string   `json:"until,omitempty"` // absent: until the bottle ends
}

// Show gives rules as commands print them.
func Show(rules []Rule) []Shown {
	out := make([]Shown, len(rules))
	for i, r := range rules {
		out[i] = Shown{r.Verdict, r.Host, r.CIDR, r.Ports, r.Protocol, r.Addresses, r.Why, r.By, r.Since, r.Until}
	}
	return out
}
