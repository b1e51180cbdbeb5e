// Package audit is the log of what a bottle's gate decided: one JSON object a
// line, appended with one write(2) each, so that a reader never sees half a
// line. Each line holds the digest of the one before it.
//
// The log is part of the boundary and not a help for debugging: what it allows
// is on the disk before the gate acts on it, and when a line cannot be written
// the log is closed, and the gate with it, until it can. Lines never hold a
// secret, a header, a body or a query.
//
// A log is the file that its gate writes, and the files that were rotated out
// of it: FILE.000001 is the oldest. Reader reads them in order, Verify holds
// them against their chain.
package audit

import (
	"strings"
	"unicode/utf8"
)

// Kinds of line.
const (
	KindStart   = "start"   // the gate took up its work
	KindRotate  = "rotate"  // first line of every file but the first
	KindDrop    = "drop"    // the oldest file is removed; written before it is
	KindReopen  = "reopen"  // lines could not be written for a while, and now can
	KindConnect = "connect" // decision about a tunnel
	KindRequest = "request" // decision about one HTTP request
	KindLookup  = "lookup"  // a name that the guest's resolver did not get; bounded
	KindClose   = "close"   // end of an allowed tunnel or request, with its bytes
	KindStop    = "stop"    // the gate ended in order
	KindChange  = "change"  // the bottle's owner changed the rules while it runs
)

// Verdicts.
const (
	Allow  = "allow"
	Deny   = "deny"
	Failed = "error" // allowed, but the network or the upstream proxy failed first
)

// Event is one line. The log sets Time, Bottle, Seq and Prev itself. Members that do not
// apply are absent.
type Event struct {
	Time   string `json:"time"`   // RFC 3339 with nanoseconds, UTC
	Bottle string `json:"bottle"` // vm.id
	Seq    uint64 `json:"seq"`    // 1, 2, 3 … over restarts of the gate
	Event  string `json:"event"`  // one of the kinds above
	// ID ties a close line to the decision that opened it. It counts from 1 in
	// each run of the gate.
	ID      uint64 `json:"id,omitempty"`
	Verdict string `json:"verdict,omitempty"` // allow | deny | error
	Code    string `json:"code,omitempty"`    // why, stable: allowed, not_in_allowlist …
	Host    string `json:"host,omitempty"`
	Port    int    `json:"port,omitempty"`
	// Protocol is the rule's: tls | http | ssh | tcp.
	Protocol string `json:"protocol,omitempty"`
	Method   string `json:"method,omitempty"` // HTTP requests only
	Path     string `json:"path,omitempty"`   // as it was sent, without its query, which may hold anything
	SNI      string `json:"sni,omitempty"`    // as the client sent it
	Rule     *int   `json:"rule,omitempty"`   // index into bottle.egress.rules
	From     string `json:"from,omitempty"`   // the rule's provenance
	Reason   string `json:"reason,omitempty"`
	Address  string `json:"address,omitempty"` // IP:port that was dialled
	Via      string `json:"via,omitempty"`     // the proxy in between, if not the gate itself
	// Sender is what asked, if not the guest: the sidecar, for a request that it
	// got from the gate (with Via) and that is decided again.
	Sender string `json:"sender,omitempty"`
	Secret string `json:"secret,omitempty"` // name of the secret that was injected
	// Finding is the rule of data loss prevention by which a request was refused;
	// what was found is in no line.
	Finding string `json:"finding,omitempty"`
	Status  int    `json:"status,omitempty"` // HTTP status the guest got
	// BytesOut left the bottle, BytesIn came into it; on close lines.
	BytesOut   int64 `json:"bytes_out,omitempty"`
	BytesIn    int64 `json:"bytes_in,omitempty"`
	DurationMS int64 `json:"duration_ms,omitempty"`
	// By is the uid that changed a rule, and Until when that rule ends by itself
	// (RFC 3339, UTC); on change lines. Their host may be a range, and without a
	// port they are about all of them.
	By    *int   `json:"by,omitempty"`
	Until string `json:"until,omitempty"`
	// File is the number of the file that a rotate line begins, or that a drop
	// line is about.
	File int `json:"file,omitempty"`
	// LastSeq and Last are those of the last line of the file that was dropped.
	LastSeq uint64 `json:"last_seq,omitempty"`
	Last    string `json:"last,omitempty"`
	Torn    *Torn  `json:"torn,omitempty"`
	// Prev is the sha256 of the event's line before this one, its newline
	// included; absent in the first line of a log.
	Prev string `json:"prev,omitempty"`
}

// Torn accounts for the bytes between an event's line and the one before it:
// what a gate had written of a line when it was killed.
type Torn struct {
	Bytes  int64  `json:"bytes"` // newlines included
	SHA256 string `json:"sha256"`
}

// Limits of members that the guest can influence, in bytes.
const (
	maxHost   = 255
	maxPath   = 1024
	maxMethod = 32
	maxText   = 512
)

// bound cuts what a guest can make long. JSON itself replaces bytes that are no
// UTF-8, and control characters are escaped as lines are made (unmoving).
func bound(e *Event) {
	e.Host = cut(e.Host, maxHost)
	e.SNI = cut(e.SNI, maxHost)
	e.Path = cut(e.Path, maxPath)
	e.Method = cut(e.Method, maxMethod)
	e.Reason = cut(e.Reason, maxText)
	e.From = cut(e.From, maxText)
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	s = s[:n]
	// Not in the middle of a character.
	for i := 0; i < utf8.UTFMax && !utf8.ValidString(s[max(0, len(s)-utf8.UTFMax):]); i++ {
		s = s[:len(s)-1]
	}
	return strings.ToValidUTF8(s, "") + "…"
}
