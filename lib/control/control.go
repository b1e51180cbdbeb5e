// Package control is how commands talk to a live keeper: one line of JSON to a
// socket in the bottle's runtime folder, which is its owner's alone, and one
// back.
package control

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Request is one line to the keeper.
type Request struct {
	Do     string  `json:"do"` // stop | start | status | change | report
	Change *Change `json:"change,omitempty"`
}

// Answer is its one line back.
type Answer struct {
	Phase    string        `json:"phase"` // ready | stopped
	Reason   string        `json:"reason,omitempty"`
	Gate     string        `json:"gate"`              // up | shut | down
	Proxy    string        `json:"proxy"`             // up | down | none
	Sidecar  string        `json:"sidecar,omitempty"` // up | down; absent without one
	Findings []string      `json:"findings,omitempty"`
	Live     []live.Rule   `json:"live,omitempty"`    // rules on top of the plan's
	Changed  []live.Rule   `json:"changed,omitempty"` // what change added or took back
	Cut      int           `json:"cut,omitempty"`     // connections that the change ended
	Report   *Report       `json:"report,omitempty"`
	Error    *plan.Failure `json:"error,omitempty"`
}

// Report is what gate and proxy really go by, as digests ("sha256:<64 hex>").
type Report struct {
	GateRules   string `json:"gate_rules"` // of the plan's rules that the gate holds (policy.RulesSHA256)
	GateLive    string `json:"gate_live"`  // of those on top
	ProxyConfig string `json:"proxy_config,omitempty"`
	Document    string `json:"document"` // of the document that the keeper goes by (plan.SHA256)
	Watches     bool   `json:"watches"`  // limits are watched by the keeper
	// Sidecar is how mitmdump was started; absent without one.
	Sidecar *Sidecar `json:"sidecar,omitempty"`
}

// Sidecar is how a sidecar was started.
type Sidecar struct {
	Program string `json:"program"` // absolute path
	Listen  string `json:"listen"`  // host:port of its own
	Back    string `json:"back"`    // of its way back, which keeper and gate hold
}

// Change asks for other rules on top of the plan's. All of it is done, or
// nothing.
type Change struct {
	// Add are rules in their normal form: an allow rule has one port, a deny rule
	// one or none. Who they are from and until when the keeper says.
	Add []plan.Rule `json:"add,omitempty"`
	// For is how long they hold; 0 is until the bottle ends.
	For time.Duration `json:"for,omitempty"` // nanoseconds
	// Revert takes back rules that were added.
	Revert []Target `json:"revert,omitempty"`
	All    bool     `json:"all,omitempty"` // all of them
}

// Target names rules that were added: by host or range, and by port if that
// is not 0.
type Target struct {
	Host string `json:"host,omitempty"`
	CIDR string `json:"cidr,omitempty"`
	Port int    `json:"port,omitempty"`
}

// String is for people.
func (t Target) String() string {
	if t.Port == 0 {
		return t.Host + t.CIDR
	}
	return fmt.Sprintf("%s port %d", t.Host+t.CIDR, t.Port)
}

// Names tells if r is one that t is about.
func (t Target) Names(r *live.Rule) bool {
	return t.Host == r.Host && t.CIDR == r.CIDR && (t.Port == 0 || slices.Contains(r.Ports, t.Port))
}

// Socket is where the keeper of the bottle with this runtime folder listens.
func Socket(runDir string) string { return filepath.Join(runDir, "keeper.sock") }

// Ask sends one request to the keeper of the bottle with this runtime folder.
func Ask(runDir string, q Request, limit time.Duration) (*Answer, error) {
	c, err := net.DialTimeout("unix", Socket(runDir), limit)
	if err != nil {
		return nil, fault.New(fault.Unavailable, "keeper_gone", "the bottle's keeper does not answer: %w", err).
			WithHint("bottle-gc shows what is left; bottle-vm down removes it")
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(limit))
	if err := json.NewEncoder(c).Encode(q); err != nil {
		return nil, fault.New(fault.IO, "keeper_gone", "asking the keeper: %w", err)
	}
	var a Answer
	if err := json.NewDecoder(io.LimitReader(c, 1<<20)).Decode(&a); err != nil {
		return nil, fault.New(fault.IO, "keeper_gone", "the keeper's answer: %w", err)
	}
	if a.Error != nil {
		return nil, fault.New(a.Error.Exit, a.Error.Code, "%s", a.Error.Message).WithHint("%s", a.Error.Hint)
	}
	return &a, nil
}
