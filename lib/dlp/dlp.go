// Package dlp looks for secrets in what leaves a bottle: for the bottle's own
// values in every usual encoding, and for what looks like a key by the rules of
// gitleaks (github.com/gitleaks/gitleaks, read from its module).
//
// One pass over the text finds all keywords of all rules and all spellings of
// all own values. Only where a keyword stands is a rule looked at, first by a
// lazily built automaton that says no at a few nanoseconds a byte, and only then
// by the rule's regular expression. Then the text is decoded in the usual ways
// (backslash, percent and entity escapes, quoted-printable, base64, hexadecimal,
// UTF-16, gzip, zip), as deep as maxDepth, and what is new is looked at again.
//
// Findings are those of gitleaks' own detector, but for a few that docs/dlp.md
// names; tools/gitleaks holds the two against each other.
package dlp

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
)

// NoisyRules fire on ordinary source code so often that they say nothing about
// a request (docs/dlp.md has the numbers). They are off.
var NoisyRules = []string{"generic-api-key"}

// Finding is what must not leave.
type Finding struct {
	// Rule is the id of gitleaks' rule, or "secret:" and the name of the
	// bottle's own secret.
	Rule string
	// Text is what was found. It is for tests, and goes nowhere else.
	Text []byte
}

// ErrUnscannable tells that a text cannot be judged: it is encoded in a way that
// is not known, expands without end, or takes too long. It holds the reason.
type ErrUnscannable struct{ Reason string }

func (e *ErrUnscannable) Error() string { return e.Reason }

// Scanner looks for one bottle's secrets and for gitleaks' rules. It costs next
// to nothing before its first scan. It may be used by many goroutines; as many
// scan at a time as there are processors, at most maxWorkers.
type Scanner struct {
	secrets []secretPattern
	off     []string
	once    sync.Once
	err     error
	engine  *engine
	workers chan *worker
}

// maxWorkers bounds the memory and the CPU of scans that run at one time.
const maxWorkers = 4

// New makes a scanner for the values of secrets by name, without the rules off.
func New(secrets map[string]string, off []string) *Scanner {
	s := &Scanner{secrets: secretPatterns(secrets), off: off}
	n := min(runtime.GOMAXPROCS(0), maxWorkers)
	s.workers = make(chan *worker, n)
	for range n {
		s.workers <- nil
	}
	return s
}

// Options of one scan.
type Options struct {
	// Allow tells which rules do not count; nil: all do.
	Allow func(rule string) bool
	// Encodings are those of the Content-Encoding header, in its order.
	Encodings []string
	// Plain looks at the text as it stands and decodes nothing: what gitleaks
	// does by default, and what is compared with it.
	Plain bool
}

// Scan looks at a text and returns the first finding, or nil. The error is an
// *ErrUnscannable, or ctx's.
func (s *Scanner) Scan(ctx context.Context, text []byte, o Options) (*Finding, error) {
	var first *Finding
	err := s.Each(ctx, text, o, func(f Finding) bool {
		first = &f
		return false
	})
	return first, err
}

// Each calls found with every finding until it returns false. What is found in
// several encodings or places may be told once or more often.
func (s *Scanner) Each(ctx context.Context, text []byte, o Options, found func(Finding) bool) error {
	var w *worker
	select {
	case w = <-s.workers:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { s.workers <- w }()
	if s.once.Do(s.load); s.err != nil {
		return &ErrUnscannable{s.err.Error()}
	}
	if w == nil {
		w = newWorker(s.engine)
	}
	p := &pass{worker: w, ctx: ctx, opts: o, found: found, body: text,
		keywords: make([]bool, len(s.engine.keywords)),
		work:     baseWork + workPerByte*len(text), derive: min(maxDerived, baseDerived+derivedPerByte*len(text))}
	err := p.run()
	if errors.Is(err, errStop) {
		err = nil
	}
	return err
}

func (s *Scanner) load() {
	all, err := rules()
	if err != nil {
		s.err = err
		return
	}
	all = slices.DeleteFunc(slices.Clone(all), func(r *rule) bool { return slices.Contains(s.off, r.id) })
	s.engine = newEngine(all, s.secrets)
}

// RuleIDs are the names of all rules, sorted.
func RuleIDs() ([]string, error) {
	all, err := rules()
	ids := make([]string, len(all))
	for i, r := range all {
		ids[i] = r.id
	}
	slices.Sort(ids)
	return ids, err
}

// OwnRule is the rule's name for a bottle's own secret.
func OwnRule(name string) string { return "secret:" + name }
