// Package audit is the log of what a bottle's gate decided: one JSON object a
// line, appended with one write(2) each, so that a reader never sees half a
// line and two writers never mix.
//
// The log is part of the boundary and not a help for debugging: when a line
// cannot be written, the log stays closed, and the gate with it. Lines never
// hold a secret, a header, a body or a query.
package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Kinds of line.
const (
	KindStart   = "start"   // the gate took up its work
	KindConnect = "connect" // decision about a tunnel
	KindRequest = "request" // decision about one HTTP request
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

// Event is one line. Open sets Time, Bottle and Seq itself. Members that do not
// apply are absent.
type Event struct {
	Time   string `json:"time"`   // RFC 3339 with nanoseconds, UTC
	Bottle string `json:"bottle"` // vm.id
	Seq    uint64 `json:"seq"`    // 1, 2, 3 … over restarts of the gate
	Event  string `json:"event"`  // start | connect | request | close | change | stop
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
	Path     string `json:"path,omitempty"`   // without its query, which may hold anything
	SNI      string `json:"sni,omitempty"`    // as the client sent it
	Rule     *int   `json:"rule,omitempty"`   // index into bottle.egress.rules
	From     string `json:"from,omitempty"`   // the rule's provenance
	Reason   string `json:"reason,omitempty"`
	Address  string `json:"address,omitempty"` // IP:port that was dialled
	Via      string `json:"via,omitempty"`     // the proxy in between, if not the gate itself
	Secret   string `json:"secret,omitempty"`  // name of the secret that was injected
	Status   int    `json:"status,omitempty"`  // HTTP status the guest got
	// BytesOut left the bottle, BytesIn came into it; on close lines.
	BytesOut   int64 `json:"bytes_out,omitempty"`
	BytesIn    int64 `json:"bytes_in,omitempty"`
	DurationMS int64 `json:"duration_ms,omitempty"`
	// By is the uid that changed a rule, and Until when that rule ends by itself
	// (RFC 3339, UTC); on change lines. Their host may be a range, and without a
	// port they are about all of them.
	By    *int   `json:"by,omitempty"`
	Until string `json:"until,omitempty"`
}

// Limits of members that the guest can influence, in bytes.
const (
	maxHost   = 255
	maxPath   = 1024
	maxMethod = 32
	maxText   = 512
)

// Options of a log.
type Options struct {
	Bottle string           // vm.id, in every line
	Now    func() time.Time // nil: time.Now
}

// Log appends events to one file. It may be used by many goroutines.
type Log struct {
	mu   sync.Mutex
	w    io.WriteCloser
	opts Options
	seq  uint64
	err  error
	buf  bytes.Buffer
}

// Open opens or makes the log at path, 0600. A file that is no regular file of
// the caller's own, or that others may write, is a fault (77). Numbering goes
// on where the file ends; a last line that a crash cut short is closed first,
// so that the next one stays readable.
func Open(path string, opts Options) (*Log, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, cannotOpen(path, err)
	}
	seq, err := resume(f, path)
	if err != nil {
		f.Close()
		return nil, err
	}
	l := New(f, opts)
	l.seq = seq
	return l, nil
}

// New writes to w, which gets one Write call for each line.
func New(w io.WriteCloser, opts Options) *Log {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	return &Log{w: w, opts: opts}
}

func cannotOpen(path string, err error) error {
	switch {
	case errors.Is(err, syscall.ELOOP):
		return fault.New(fault.NoPerm, "audit_log_untrusted", "audit log %s is a symbolic link", path).
			WithHint("remove it; the log has to be a file of its own")
	case errors.Is(err, fs.ErrPermission):
		return fault.New(fault.NoPerm, "audit_log_denied", "audit log: %w", err).
			WithHint("the bottle's state folder has to belong to the user who runs the gate")
	}
	return fault.New(fault.CantCreate, "audit_log_failed", "audit log: %w", err).
		WithHint("make the folder first, and check the room on its disk")
}

// resume checks the open file and finds the number of its last whole line.
func resume(f *os.File, path string) (uint64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, fault.New(fault.IO, "audit_log_failed", "audit log: %w", err)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o022 != 0 || !ok || int(sys.Uid) != os.Geteuid() || sys.Nlink > 1 {
		return 0, fault.New(fault.NoPerm, "audit_log_untrusted",
			"audit log %s has to be a regular file of the user's own that nobody else may write or link", path).
			WithHint("move it away; a new one is made")
	}
	tail := make([]byte, min(st.Size(), 64<<10))
	if _, err := f.ReadAt(tail, st.Size()-int64(len(tail))); err != nil && err != io.EOF {
		return 0, fault.New(fault.IO, "audit_log_failed", "audit log: %w", err)
	}
	if len(tail) > 0 && tail[len(tail)-1] != '\n' {
		if _, err := f.Write([]byte("\n")); err != nil {
			return 0, fault.New(fault.IO, "audit_write_failed", "audit log: %w", err)
		}
	}
	return lastSeq(tail), nil
}

// lastSeq is the highest number of the lines in tail: the last line may be a
// torn one, and the first one cut off.
func lastSeq(tail []byte) (seq uint64) {
	for line := range bytes.SplitSeq(tail, []byte("\n")) {
		var e struct {
			Seq uint64 `json:"seq"`
		}
		if json.Unmarshal(line, &e) == nil && e.Seq > seq {
			seq = e.Seq
		}
	}
	return seq
}

// Write appends one line. After the first error every call fails with it (74):
// a log with a hole is no log, so its owner has to stop as well.
func (l *Log) Write(e Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	l.seq++
	e.Seq, e.Bottle = l.seq, l.opts.Bottle
	e.Time = l.opts.Now().UTC().Format(time.RFC3339Nano)
	bound(&e)
	l.buf.Reset()
	enc := json.NewEncoder(&l.buf)
	enc.SetEscapeHTML(false)
	err := enc.Encode(e)
	if err == nil {
		var n int
		n, err = l.w.Write(l.buf.Bytes())
		if err == nil && n < l.buf.Len() {
			err = io.ErrShortWrite
		}
	}
	if err != nil {
		l.err = fault.New(fault.IO, "audit_write_failed", "audit log: %w", err).
			WithHint("make room on the disk of the state folder; without its log the gate stays closed")
	}
	return l.err
}

// Seq is the number of the last line.
func (l *Log) Seq() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seq
}

// Close closes the file. Later writes fail.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = fault.New(fault.IO, "audit_closed", "audit log is closed")
	}
	return l.w.Close()
}

// bound cuts what a guest can make long. JSON itself escapes control characters
// and replaces bytes that are no UTF-8.
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
