// Package probe is the leak battery: a list of attempts to get out of a sandbox,
// the laboratory in which they are made, and the verdicts.
//
// The laboratory is two networks of its own: the "host", in which the sandbox is
// started, and an "internet" in which every address answers and everything that
// arrives is written down. Names resolve to it, a home and a workspace full of
// bait belong to it, and all of it ends with it. The part of a probe that runs
// inside the sandbox (the client) tries, and its word counts for nothing: a
// leak is what a canary server received, what the host's files say afterwards,
// or a random secret that the client was never told and gave back.
package probe

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Verdict is what one probe showed.
type Verdict string

const (
	Held     Verdict = "held"     // tried, and nothing got out
	Leak     Verdict = "leak"     // something got out; Evidence has it
	Residual Verdict = "residual" // got out, where the document of the run says that nobody can see it
	Void     Verdict = "void"     // proves nothing: the control failed that shows the way to be there
	NA       Verdict = "n/a"      // not tried, for the reason in Evidence
	Works    Verdict = "works"    // a control that was met
	Fails    Verdict = "fails"    // a control that was not met
)

// Result is one line of output.
type Result struct {
	ID       string  `json:"id"`
	Name     string  `json:"name"`
	Title    string  `json:"title"`
	Verdict  Verdict `json:"verdict"`
	Evidence string  `json:"evidence,omitempty"`
}

// Bad tells whether a run with this result has failed: a leak, a control that
// was not met, or a row that therefore proves nothing.
func (r Result) Bad() bool {
	return r.Verdict == Leak || r.Verdict == Fails || r.Verdict == Void
}

// Options are one run of the battery.
type Options struct {
	// Allow is the name that the sandbox's policy lets through by TLS on port
	// 443, Wildcard the domain of which it lets every name through, AllowHTTP
	// the name that it lets through by plain HTTP on port 80, Deny one that it
	// does not. Wildcard and AllowHTTP may be empty: their rows are n/a then.
	Allow, Wildcard, AllowHTTP, Deny string
	// Sandbox is a shell command, run in the workspace once for each batch of
	// probes. @PROBE in it is the client with its arguments, @WORKSPACE and
	// @HOME are folders of the laboratory, @CA the PEM file of the canary
	// servers' authority.
	Sandbox string
	// Inside is the workspace's path as the sandbox shows it; empty if the same.
	Inside string
	// Files is a folder whose content is copied into the workspace first.
	Files string
	// Plain workspaces have no repository and nothing to hide, for a sandbox that
	// takes none that have. The rows that need them are n/a.
	Plain bool
	// Setup is a shell command that is run in the workspace once, before.
	Setup string
	// CA is a PEM file to which the canary servers' authority is written, too.
	CA string
	// Only holds the ids or names of the probes to run; empty: all of them.
	Only []string
	// Residual are the lines of egress.residual of the document under test.
	// Document is a file below @WORKSPACE that holds it, written by Setup.
	Residual []string
	Document string
	// Pids is the limit of processes that the sandbox claims; 0: none.
	Pids int
	// Timeout bounds one run of the sandbox command.
	Timeout time.Duration
	// Log is a file that gets what the sandbox command printed; empty: none.
	Log string
}

// Info describes a probe for a list.
type Info struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	Title string `json:"title"`
	Needs string `json:"needs,omitempty"` // the control without which it proves nothing
}

// spec is what the client is told, in one argument. No bait is in it: what the
// client gives back of that, it has found.
type spec struct {
	Probes    []task   `json:"p"`
	Allow     string   `json:"a"`
	AllowHTTP string   `json:"h,omitempty"`
	Wildcard  string   `json:"w,omitempty"`
	Deny      string   `json:"d"`
	AllowIP   string   `json:"ai"`
	DenyIP    string   `json:"di"`
	DenyIP6   string   `json:"d6"`
	Resolver  string   `json:"r"`
	HostIP    string   `json:"hi"`
	HostPort  int      `json:"hp"`
	VsockPort uint32   `json:"vp,omitempty"`
	VsockCIDs []uint32 `json:"vc,omitempty"`
	Home      string   `json:"ho"`
	Outside   string   `json:"o"`
	Abstract  string   `json:"ab"`
	Workspace string   `json:"ws"`
	ECH       []byte   `json:"e,omitempty"`
	Pids      int      `json:"n,omitempty"`
}

// task is one probe to try, and the token by which it is recognised.
type task struct {
	ID    string `json:"i"`
	Token string `json:"t"`
}

// word is one line that the client prints: Start of a probe, or the secrets that
// it has Found in one.
type word struct {
	Start string   `json:"start,omitempty"`
	End   string   `json:"end,omitempty"`
	Found []string `json:"found,omitempty"`
	Proof *proof   `json:"proof,omitempty"`
	Note  string   `json:"note,omitempty"`
	// Proxied: the environment names a proxy.
	Proxied bool `json:"proxied,omitempty"`
}

// proof that the client holds an authority's private key: its signature over the
// probe's token.
type proof struct {
	Cert      []byte `json:"cert"`
	Signature []byte `json:"sig"`
}

// event is something that a canary saw.
type event struct {
	Server string    `json:"server"` // tcp, tls, hello, http2, dns, udp, packet, unix, abstract, vsock, proxy, host-…
	Conn   uint64    `json:"conn,omitempty"`
	Dst    string    `json:"dst,omitempty"`
	SNI    string    `json:"sni,omitempty"`
	ALPN   string    `json:"alpn,omitempty"`
	Host   string    `json:"host,omitempty"` // of HTTP/2 alone: Data has the rest
	Data   []byte    `json:"data,omitempty"`
	At     time.Time `json:"at"`
}

func (e event) encode() []byte {
	b, err := json.Marshal(e)
	if err != nil { // a struct of plain fields
		panic(err)
	}
	return append(b, '\n')
}

// ReadResidual reads egress.residual of the first document of r.
func ReadResidual(r io.Reader) ([]string, error) {
	d, err := plan.NewReader(r).Next()
	if err != nil {
		return nil, err
	}
	if !d.Has("egress") {
		return nil, fault.New(fault.Data, "no_egress", "--document: there is no egress section in it").
			WithHint("bottle-plan AGENT | bottle-egress writes one")
	}
	e, err := d.Egress()
	if err != nil {
		return nil, err
	}
	return e.Residual, nil
}

// Reported is the exit status of a failure that has been printed already.
type Reported int

func (r Reported) Error() string { return fmt.Sprintf("exit status %d", int(r)) }
