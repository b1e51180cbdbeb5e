package gate

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/dlp"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// Bounds of looking through requests before they leave. A body is kept whole
// until it has been looked through, so that nothing of it leaves before.
const (
	maxScanned  = 32 << 20  // bytes of a body
	maxHeld     = 128 << 20 // bytes of all bodies at one time
	keptInHeap  = 64 << 10  // bytes of a body in the Go heap; more is kept in a file
	scanTimeout = 30 * time.Second
)

// screener looks through what leaves a bottle for secrets.
type screener struct {
	scanner *dlp.Scanner
	held    atomic.Int64
	most    int64 // of a body; for tests
}

func newScreener(secrets map[string]string) *screener {
	return &screener{scanner: dlp.New(secrets, dlp.NoisyRules), most: maxScanned}
}

// allowing gives the options for requests under a rule; off tells that they are
// not looked through at all.
func allowing(r *plan.Rule) (o dlp.Options, off bool) {
	if slices.Contains(r.DLPAllow, policy.EveryDLPRule) {
		return o, true
	}
	return dlp.Options{Allow: func(id string) bool { return slices.Contains(r.DLPAllow, id) }}, false
}

// screenName refuses a name below a wildcard whose labels carry a secret: asking
// a name server for it would give the secret away. The labels are not written
// down either.
func (g *Gate) screenName(ctx context.Context, t *tunnel, e *audit.Event) *Refusal {
	base, ok := strings.CutPrefix(t.Rule.Host, "*")
	o, off := allowing(t.Rule)
	if !ok || off {
		return nil
	}
	labels := strings.TrimSuffix(t.host, base)
	text := labels + "\n" + strings.ReplaceAll(labels, ".", "")
	f, err := g.screen.scanner.Scan(ctx, []byte(text), o)
	if f == nil && err == nil {
		return nil
	}
	e.Host = t.Rule.Host
	return g.screened(ctx, f, err, "the labels of the name", t, e)
}

// screenRequest looks through a request: method and address, headers, body. It
// replaces the body by a copy that has been looked through. What the gate adds
// to the request is added afterwards.
func (g *Gate) screenRequest(r *http.Request, t *tunnel, e *audit.Event) *Refusal {
	if f := g.screenName(r.Context(), t, e); f != nil {
		return f
	}
	o, off := allowing(t.Rule)
	if off {
		return nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), scanTimeout)
	defer cancel()
	found, err := g.screen.scanner.Scan(ctx, headText(r), o)
	if found != nil || err != nil {
		where := "the head of the request"
		if found != nil {
			where = g.placeInHead(ctx, r, o)
			e.Path = "" // may be what holds it
		}
		return g.screened(ctx, found, err, where, t, e)
	}
	if r.Body == nil || r.Body == http.NoBody {
		return nil
	}
	return g.screenBody(r, t, e, o)
}

// headText is all of a request's head that a client chooses, a line a field.
func headText(r *http.Request) []byte {
	var b bytes.Buffer
	b.WriteString(r.Method + " " + r.URL.RequestURI() + "\n")
	for name, values := range r.Header {
		for _, v := range values {
			b.WriteString(name + ": " + v + "\n")
		}
	}
	return b.Bytes()
}

// placeInHead tells where a finding is. A name is told only if it is none itself.
func (g *Gate) placeInHead(ctx context.Context, r *http.Request, o dlp.Options) string {
	in := func(text string) bool {
		f, err := g.screen.scanner.Scan(ctx, []byte(text), o)
		return f != nil || err != nil
	}
	if in(r.Method + " " + r.URL.RequestURI()) {
		return "the address"
	}
	for name, values := range r.Header {
		switch {
		case in(name):
			return "the name of a header"
		case slices.ContainsFunc(values, func(v string) bool { return in(name + ": " + v) }):
			return "header " + strings.ToLower(name)
		}
	}
	return "the headers"
}

// screenBody reads the whole body and looks through it.
func (g *Gate) screenBody(r *http.Request, t *tunnel, e *audit.Event, o dlp.Options) *Refusal {
	tooLarge := &dlp.ErrUnscannable{Reason: "it is larger than 32 MiB, which is all that is looked through"}
	if r.ContentLength > g.screen.most {
		return g.screened(r.Context(), nil, tooLarge, "the body", t, e)
	}
	b := &heldBody{screen: g.screen}
	text, err := b.fill(r.Body)
	if err != nil {
		b.Close()
		var bad *Refusal
		switch {
		case errors.As(err, &bad):
			return asRefusal(bad, t.host, t.port)
		case errors.Is(err, errTooLarge):
			return g.screened(r.Context(), nil, tooLarge, "the body", t, e)
		case connOf(r).bad.Load() != nil:
			return asRefusal(connOf(r).bad.Load(), t.host, t.port)
		case errors.Is(err, errKept):
			return failed("dlp_failed", t.host, t.port, "the body could not be kept until it was looked through")
		}
		return failed("client_gone", t.host, t.port, "the client went away")
	}
	// The clock of the scan begins when all of the body is there.
	ctx, cancel := context.WithTimeout(r.Context(), scanTimeout)
	defer cancel()
	o.Encodings = r.Header.Values("Content-Encoding")
	found, err := g.screen.scanner.Scan(ctx, text, o)
	b.unmap()
	if found != nil || err != nil {
		b.Close()
		return g.screened(ctx, found, err, "the body", t, e)
	}
	r.Body.Close()
	r.Body = b
	return nil
}

// screened turns the end of a scan into an answer. It never quotes what was
// found.
func (g *Gate) screened(ctx context.Context, found *dlp.Finding, err error, where string, t *tunnel, e *audit.Event) *Refusal {
	host := e.Host
	entry := `{ "host": "` + t.Rule.Host + t.Rule.CIDR + `", "allow": ["` + "%s" + `"] }`
	var unscannable *dlp.ErrUnscannable
	switch {
	case found != nil:
		e.Finding = found.Rule
		if name, own := strings.CutPrefix(found.Rule, dlp.OwnRule("")); own {
			return refused("dlp_blocked", host, t.port, where+" holds the value of secret "+name,
				"the gate puts a secret into its own header by itself; it goes nowhere else")
		}
		return refused("dlp_blocked", host, t.port, where+" holds what looks like a key (rule "+found.Rule+")",
			"take it out; if it may go there, add "+strings.Replace(entry, "%s", found.Rule, 1)+" to egress.dlp in the manifest")
	case errors.As(err, &unscannable):
		return refused("dlp_unscannable", host, t.port, where+" cannot be looked through for secrets: "+unscannable.Reason,
			"send less at a time, or in another encoding; if nothing that goes there needs to be looked through, add "+
				strings.Replace(entry, "%s", policy.EveryDLPRule, 1)+" to egress.dlp in the manifest")
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return refused("dlp_unscannable", host, t.port, where+" cannot be looked through for secrets in time", "send less at a time")
	}
	return failed("client_gone", host, t.port, "the client went away")
}

var (
	errTooLarge = errors.New("gate: body too large")
	errKept     = errors.New("gate: body cannot be kept")
)

// heldBody is a request's body that is kept here. A large one is in a file
// without a name, of which nothing is left when the gate ends.
type heldBody struct {
	screen *screener
	heap   []byte
	file   *os.File
	mapped []byte
	size   int64 // counted in screen.held
	at     int64
	once   sync.Once // transport and gate both close it
}

// fill reads all of a body and gives it for a look. While it waits for the guest
// it holds what has come, and little else.
func (b *heldBody) fill(body io.Reader) ([]byte, error) {
	for {
		n, err := b.more(body)
		b.size += int64(n)
		switch {
		case b.size > b.screen.most:
			b.size -= int64(n)
			return nil, errTooLarge
		case b.screen.held.Add(int64(n)) > maxHeld:
			return nil, &Refusal{Status: http.StatusServiceUnavailable, Code: "dlp_busy", Retry: 1,
				Reason: "too many requests wait to be looked through for secrets", Hint: "try again"}
		case err == io.EOF:
			return b.look()
		case err != nil:
			return nil, err
		}
	}
}

// more reads a piece of a body and keeps it.
func (b *heldBody) more(body io.Reader) (n int, err error) {
	if b.file == nil && len(b.heap) < keptInHeap {
		b.heap = slices.Grow(b.heap, 1<<10)
		n, err = body.Read(b.heap[len(b.heap):min(cap(b.heap), keptInHeap)])
		b.heap = b.heap[:len(b.heap)+n]
		return n, err
	}
	if b.file == nil {
		if b.file, err = nameless(); err == nil {
			_, err = b.file.Write(b.heap)
		}
		if err != nil {
			return 0, errors.Join(errKept, err)
		}
		b.heap = b.heap[: 0 : 16<<10] // to read into
	}
	n, err = body.Read(b.heap[:cap(b.heap)])
	if _, kerr := b.file.Write(b.heap[:n]); kerr != nil {
		return n, errors.Join(errKept, kerr)
	}
	return n, err
}

func (b *heldBody) look() ([]byte, error) {
	if b.file == nil {
		return b.heap, nil
	}
	b.heap = nil
	var err error
	b.mapped, err = unix.Mmap(int(b.file.Fd()), 0, int(b.size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(errKept, err)
	}
	return b.mapped, nil
}

// unmap ends the look. Afterwards the file is read: the transport may still hold
// the body when the request is over, and a closed file is an error to it where
// memory that is gone would be the end of the gate.
func (b *heldBody) unmap() {
	if b.mapped != nil {
		_ = unix.Munmap(b.mapped)
		b.mapped = nil
	}
}

func (b *heldBody) Read(p []byte) (n int, err error) {
	if b.file != nil {
		n, err = b.file.ReadAt(p, b.at)
	} else if n = copy(p, b.heap[min(b.at, int64(len(b.heap))):]); n == 0 && len(p) > 0 {
		err = io.EOF
	}
	b.at += int64(n)
	return n, err
}

func (b *heldBody) Close() (err error) {
	b.once.Do(func() {
		b.unmap()
		b.screen.held.Add(-b.size)
		if b.file != nil {
			err = b.file.Close()
		}
	})
	return err
}
