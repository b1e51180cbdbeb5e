// Package replay reads decisions out of audit logs and puts them to a policy:
// which of them it would change, which of its rules nothing ever needed, and
// the smallest allowlist that would have served them.
//
// A log tells what was decided and not all of what was asked: what was denied
// early was never looked at any further. Where that matters the answer is that
// it cannot be told.
package replay

import (
	"errors"
	"io"
	"slices"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/policy"
)

// Decision is a decision of a gate, and how often it was taken.
type Decision struct {
	Kind     string // audit.KindConnect | KindRequest | KindLookup
	Host     string
	Port     int // 0 for a lookup
	Verdict  string
	Code     string
	Protocol string // of the rule that allowed it
	Method   string // of requests
	Path     string
	Address  string // IP:port that was dialled
	From     string // provenance of the rule
	Reason   string // of a denial
	Sender   string // what asked, if not the guest
}

// Log is the decisions of some audit logs.
type Log struct {
	Decisions []Decision // in the order of their first line, each one once
	Counts    map[Decision]int
	// Unfinished are the files whose last line has no end: a gate may be writing
	// it, or was killed at it.
	Unfinished []string
}

// Total is the number of lines that hold a decision.
func (l *Log) Total() (n int) {
	for _, c := range l.Counts {
		n += c
	}
	return n
}

// Read adds the log at path with the files that were rotated out of it. Errors
// are faults: 66 for a log that is not there, 65 (bad_audit_log) with FILE:LINE
// for a line that is none.
func (l *Log) Read(path string) error {
	r, err := audit.OpenReader(path)
	if err != nil {
		return err
	}
	defer r.Close()
	return l.add(r, path)
}

// ReadStream adds a log that comes as one stream, called name in errors.
func (l *Log) ReadStream(in io.Reader, name string) error {
	return l.add(audit.NewReader(in, name), name)
}

func (l *Log) add(r *audit.Reader, name string) error {
	if l.Counts == nil {
		l.Counts = map[Decision]int{}
	}
	var torn *audit.Line
	for {
		line, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if line.Torn {
			if torn == nil {
				torn = &line
			}
			continue
		}
		if torn != nil && line.Event.Torn == nil {
			break // the line after it does not know of it
		}
		torn = nil
		if err := l.take(line); err != nil {
			return err
		}
	}
	switch {
	case torn != nil:
		return notALine(*torn, "it is no event")
	case len(r.Rest()) > 0:
		l.Unfinished = append(l.Unfinished, name)
	}
	return nil
}

func notALine(line audit.Line, why string) error {
	return fault.New(fault.Data, "bad_audit_log", "no line of an audit log: %s", why).At(line.Where()).
		WithHint("is it the audit log of a bottle, and whole? bottle-egress log --verify tells more")
}

// take counts one line, if it holds a decision.
func (l *Log) take(line audit.Line) error {
	e := line.Event
	switch e.Event {
	case audit.KindConnect, audit.KindRequest, audit.KindLookup:
	default:
		return nil
	}
	switch {
	case e.Verdict != audit.Allow && e.Verdict != audit.Deny && e.Verdict != audit.Failed:
		return notALine(line, "it holds a decision without a verdict")
	case e.Port < 0 || e.Port > 65535:
		return notALine(line, "its port does not exist")
	case e.Protocol != "" && !slices.Contains(policy.Protocols, e.Protocol):
		return notALine(line, "its protocol is unknown")
	case e.Host == "":
		return nil // too many connections or lookups, and nobody knows where to
	}
	d := Decision{Kind: e.Event, Host: e.Host, Port: e.Port, Verdict: e.Verdict, Code: e.Code, Protocol: e.Protocol,
		Method: e.Method, Path: e.Path, Address: e.Address, From: e.From, Sender: e.Sender}
	if e.Verdict == audit.Deny {
		d.Reason = e.Reason
	}
	if l.Counts[d]++; l.Counts[d] == 1 {
		l.Decisions = append(l.Decisions, d)
	}
	return nil
}
