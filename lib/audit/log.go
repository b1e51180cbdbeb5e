package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Bounds of a log, if its options say nothing else.
const (
	DefaultMaxBytes = 16 << 20
	DefaultKeep     = 16
	MinMaxBytes     = 64 << 10
)

const (
	// lazySync is how long a line on which nothing hangs may not be durable.
	lazySync = time.Second
	// maxHeld bounds the lines that are not durable, or wait for a log to open
	// again: as many as a gate has tunnels, and some.
	maxHeld = 4096
)

// Options of a log.
type Options struct {
	Bottle   string           // vm.id, in every line
	Now      func() time.Time // nil: time.Now
	MaxBytes int64            // of a file, before it is rotated; 0: DefaultMaxBytes
	Keep     int              // rotated files; 0: DefaultKeep
	// Head is the last line as somebody else saw it, which Open then has to
	// find as the last one; zero if nobody did.
	Head Head
}

// Head is a line of a log, and by their chain all that come before it.
type Head struct {
	Seq    uint64 `json:"seq"`
	SHA256 string `json:"sha256"` // sha256:HEX of the line, newline included
}

// file is what a log writes to.
type file interface {
	io.WriteCloser
	// Sync makes durable what was written, and fails if the file has less than
	// size bytes or is not the log any more.
	Sync(size int64) error
	Truncate(size int64) error
}

// Log appends events to one file. It may be used by many goroutines.
type Log struct {
	opts   Options
	path   string               // "" for a stream, which is never rotated
	create func() (file, error) // makes the file at path anew

	mu      sync.Mutex
	turn    *sync.Cond // a sync has ended, or the log was closed
	file    file       // nil between two files
	number  int        // of the file
	head    Head       // of the last line
	size    int64
	torn    *Torn // to be accounted for by the next line
	durable mark
	held    []*held // the lines after durable
	syncing bool
	flusher *time.Timer
	started bool

	err    error
	closed time.Time // since when err is set
	gone   bool      // it stays closed
	missed int       // events that found no room in held
	failed func(error)
	buf    bytes.Buffer
}

// mark is a place in the log.
type mark struct {
	head Head
	size int64
	torn *Torn
}

func (l *Log) here() mark { return mark{l.head, l.size, l.torn} }

// held is an event that is not durable yet.
type held struct {
	event Event
	err   error // its writer was told that it failed
}

// New writes to w, which gets one Write call for each line. There is no
// rotation, nothing is made durable, and after an error the log stays closed.
func New(w io.WriteCloser, opts Options) *Log { return newLog(stream{w}, opts) }

type stream struct{ io.WriteCloser }

func (stream) Sync(int64) error     { return nil }
func (stream) Truncate(int64) error { return errStream }

var errStream = errors.New("a stream cannot be shortened")

func newLog(f file, opts Options) *Log {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.MaxBytes == 0 {
		opts.MaxBytes = DefaultMaxBytes
	}
	if opts.Keep == 0 {
		opts.Keep = DefaultKeep
	}
	l := &Log{opts: opts, file: f, number: 1}
	l.turn = sync.NewCond(&l.mu)
	return l
}

// OnFailure has f called, from a goroutine of its own, each time the log is
// closed by an error.
func (l *Log) OnFailure(f func(error)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = f
}

// Start writes the line of a gate that takes up its work, once.
func (l *Log) Start() error {
	l.mu.Lock()
	was := l.started
	l.started = true
	l.mu.Unlock()
	if was {
		return nil
	}
	return l.Write(Event{Event: KindStart})
}

// lazy tells the lines on which nothing hangs: nothing flows because of a
// refusal, and what a close line tells of has flowed. They are durable within
// lazySync; all others before Write returns.
func lazy(e *Event) bool {
	decision := e.Event == KindConnect || e.Event == KindRequest || e.Event == KindLookup
	return e.Event == KindClose || decision && e.Verdict != Allow
}

// Write appends one line. Concurrent ones share one sync. After an error every
// call fails (74) until Recover has opened the log again, and so do the lines
// that were not durable yet: what they allow must not happen.
func (l *Log) Write(e Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Bottle, e.Time = l.opts.Bottle, l.opts.Now().UTC().Format(time.RFC3339Nano)
	bound(&e)
	h := &held{event: e}
	if err := l.append(h); err != nil {
		return err
	}
	if lazy(&e) && len(l.held) < maxHeld {
		if l.flusher == nil {
			l.flusher = time.AfterFunc(lazySync, l.flush)
		}
		return nil
	}
	return l.await(h)
}

// append writes an event's line, in a new file if the present one is full.
func (l *Log) append(h *held) error {
	for l.err == nil {
		line, err := l.encode(&h.event)
		if err == nil && l.path != "" && l.size > 0 && l.size+int64(len(line)) > l.opts.MaxBytes {
			if err = l.rotate(); err == nil {
				continue
			}
		}
		if err == nil {
			err = l.put(h, line)
		}
		if err != nil {
			l.fail(err)
		}
		break
	}
	if l.err != nil {
		l.hold(h)
	}
	return l.err
}

// encode numbers and chains an event; l.buf has its line.
func (l *Log) encode(e *Event) ([]byte, error) {
	e.Seq, e.Prev, e.Torn = l.head.Seq+1, l.head.SHA256, l.torn
	l.buf.Reset()
	enc := json.NewEncoder(&l.buf)
	enc.SetEscapeHTML(false)
	err := enc.Encode(e)
	return unmoving(l.buf.Bytes()), err
}

// unmoving escapes what JSON may hold as it is and a terminal acts on: a guest
// chooses names, and people look at lines.
func unmoving(line []byte) []byte {
	acts := func(r rune) bool { return r > ' ' && fault.Control(r) }
	if !bytes.ContainsFunc(line, acts) {
		return line
	}
	var out bytes.Buffer
	for _, r := range string(line) {
		if acts(r) {
			fmt.Fprintf(&out, `\u%04x`, r)
		} else {
			out.WriteRune(r)
		}
	}
	return out.Bytes()
}

// put writes the line of h.
func (l *Log) put(h *held, line []byte) error {
	n, err := l.file.Write(line)
	if err == nil && n < len(line) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return err
	}
	l.head = Head{h.event.Seq, digest(line)}
	l.size += int64(n)
	l.torn = nil
	l.held = append(l.held, h)
	return nil
}

// digest of a line with its newline.
func digest(line []byte) string {
	sum := sha256.Sum256(line)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// hold keeps an event that could not be written until the log is open again.
func (l *Log) hold(h *held) {
	h.err = l.err
	if len(l.held) >= maxHeld || l.gone {
		l.missed++
		return
	}
	l.held = append(l.held, h)
}

// await returns when h is durable, or refused. The first to wait syncs for all
// whose lines are written by then.
func (l *Log) await(h *held) error {
	seq := h.event.Seq
	for h.err == nil && l.durable.head.Seq < seq {
		if l.syncing {
			l.turn.Wait()
			continue
		}
		l.sync()
	}
	return h.err
}

// sync makes durable what is written. It lets go of the lock meanwhile, so that
// others write the lines that the next sync is for.
func (l *Log) sync() {
	to, n, f := l.here(), len(l.held), l.file
	l.syncing = true
	l.mu.Unlock()
	err := f.Sync(to.size)
	l.mu.Lock()
	l.syncing = false
	switch {
	case l.err != nil: // the writers have been told already
	case err != nil:
		l.fail(err)
	default:
		l.settle(to, n)
	}
	l.turn.Broadcast()
}

// settle notes that the first n held lines, up to to, are durable.
func (l *Log) settle(to mark, n int) {
	l.durable = to
	if l.held = l.held[n:]; len(l.held) == 0 {
		l.held = nil
	}
}

// flush is for the lines that nobody waits for.
func (l *Log) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flusher = nil
	for l.syncing {
		l.turn.Wait()
	}
	if l.err == nil && len(l.held) > 0 {
		l.sync()
	}
}

// fail closes the log. Lines that are not durable may be lost: whoever waits
// for one is told so.
func (l *Log) fail(err error) {
	f := fault.As(err)
	if f == nil || f.Code != changed {
		f = fault.New(fault.IO, "audit_write_failed", "audit log: %w", err).
			WithHint("make room on the disk of the state folder; without its log the gate stays closed")
	} else {
		l.gone = true
	}
	l.err, l.closed = f, time.Now()
	for _, h := range l.held {
		h.err = f
	}
	l.turn.Broadcast()
	if l.failed != nil {
		go l.failed(f)
	}
}

// Recover opens a log again that an error has closed: what is not known to be
// durable is taken back and written anew, with the lines that came since. An
// allowed decision that its gate was told not to act on becomes a refusal. With
// retry set it can be tried again later; without, an error is the end.
func (l *Log) Recover() (retry bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.syncing {
		l.turn.Wait()
	}
	if l.err == nil {
		return false, nil
	}
	if _, ok := l.file.(stream); ok || l.gone {
		return false, l.err
	}
	todo := l.held
	if l.file == nil {
		f, err := l.create()
		if err != nil {
			err = l.again(err)
			return !l.gone, err
		}
		l.file = f
		todo = append([]*held{{event: l.rotateEvent()}}, todo...)
		l.held = todo
	}
	if err := l.rewrite(todo); err != nil {
		l.held = todo
		err = l.again(err)
		return !l.gone, err
	}
	l.settle(l.here(), len(l.held))
	l.err, l.missed = nil, 0
	return false, nil
}

// again notes why the log is still closed.
func (l *Log) again(err error) error {
	if f := fault.As(err); f != nil && f.Code == changed {
		l.gone = true
		l.err = f
	}
	return fault.New(fault.IO, "audit_write_failed", "audit log: %w", err)
}

func (l *Log) rewrite(todo []*held) error {
	if err := l.file.Truncate(l.durable.size); err != nil {
		return err
	}
	l.head, l.size, l.torn, l.held = l.durable.head, l.durable.size, l.durable.torn, nil
	now := l.opts.Now().UTC().Format(time.RFC3339Nano)
	reason := fmt.Sprintf("closed for %v: %v", time.Since(l.closed).Round(time.Millisecond), fault.As(l.err).Msg)
	if l.missed > 0 {
		reason += fmt.Sprintf("; %d lines were not kept", l.missed)
	}
	reopen := &held{event: Event{Event: KindReopen, Bottle: l.opts.Bottle, Time: now, Reason: cut(reason, maxText)}}
	for _, h := range append(todo[:len(todo):len(todo)], reopen) {
		if h.err != nil {
			h.event.refuse()
		}
		line, err := l.encode(&h.event)
		if err == nil {
			err = l.put(h, line)
		}
		if err != nil {
			return err
		}
	}
	return l.file.Sync(l.size)
}

// refuse makes an event say what became of it when its line was not durable:
// whoever waited for that was told that it failed.
func (e *Event) refuse() {
	switch {
	case e.Event == KindChange:
		e.Reason = "this line could not be written in time, and whoever made the change was told that it failed"
	case e.Verdict == Allow:
		e.Verdict, e.Code, e.Reason = Deny, "audit_failed", "the decision could not be written to the audit log"
	}
}

// Head is the last line.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Durable is the last line that is on the disk.
func (l *Log) Durable() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.durable.head
}

// Close makes durable what is written and closes the file. Later writes fail.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.syncing || l.err == nil && len(l.held) > 0 {
		if l.syncing {
			l.turn.Wait()
		} else {
			l.sync()
		}
	}
	failed := l.err
	if l.err == nil {
		l.err = fault.New(fault.IO, "audit_closed", "audit log is closed")
	}
	if f := fault.As(failed); f != nil && f.Code == "audit_closed" {
		failed = nil
	}
	l.gone = true
	if l.file == nil {
		return failed
	}
	err := l.file.Close()
	l.file = nil
	return errors.Join(failed, err)
}
