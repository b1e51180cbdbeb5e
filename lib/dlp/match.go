package dlp

import (
	"bytes"
	"context"
	"errors"
	"hash/maphash"
	"math"
	"slices"
)

// Bounds of one scan. Work is counted in bytes that one of the automata took, so
// that the same text is always judged in the same way, on a busy machine too.
const (
	maxMatch       = 16 << 10 // bytes of a match; a key of RSA 16384 has 13,000
	baseWork       = 32 << 20
	workPerByte    = 48
	workPerDerived = 8        // more for what was compressed
	baseDerived    = 32 << 20 // bytes of decoded text
	derivedPerByte = 32
	maxDerived     = 256 << 20
	lineSide       = 512 // bytes of a match's line on each side
	exprWork       = 256 // a byte of a regular expression, in bytes of an automaton
)

// engine is what all scans of a bottle share.
type engine struct {
	rules    []*rule
	keywords []string
	needs    [][]int32 // by rule: its keywords
	open     []int32   // rules of which nothing tells where to look
	patterns []pattern
	longest  int
	auto     *automaton
}

// pattern is what an occurrence means.
type pattern struct {
	text    string
	keyword int32   // -1: none
	rules   []int32 // matches of which may begin here
	near    []int32 // matches of which may be around here
	secret  *secretPattern
	special string // quoted-printable, gzip, zip
}

// Magic numbers and words that ask for a decoder.
const (
	markQuoted = "quoted-printable"
	markGzip   = "\x1f\x8b\x08"
	markZip    = "pk\x03\x04"
)

func newEngine(rules []*rule, secrets []secretPattern) *engine {
	e := &engine{rules: rules, needs: make([][]int32, len(rules))}
	byText := make(map[string]int)
	at := func(text string) *pattern {
		i, ok := byText[text]
		if !ok {
			i = len(e.patterns)
			byText[text] = i
			e.patterns = append(e.patterns, pattern{text: text, keyword: -1})
			e.longest = max(e.longest, len(text))
		}
		return &e.patterns[i]
	}
	for i, r := range rules {
		for _, k := range r.keywords {
			p := at(k)
			if p.keyword < 0 {
				p.keyword = int32(len(e.keywords))
				e.keywords = append(e.keywords, k)
			}
			e.needs[i] = append(e.needs[i], p.keyword)
			if r.near > 0 {
				p.near = append(p.near, int32(i))
			}
		}
		for _, a := range r.anchors {
			p := at(a)
			p.rules = append(p.rules, int32(i))
		}
		if r.anchors == nil && r.near == 0 {
			e.open = append(e.open, int32(i))
		}
	}
	for i := range secrets {
		// Two secrets of one value are told by the name of the first.
		if p := at(secrets[i].text); p.secret == nil || p.secret.alone && !secrets[i].alone {
			p.secret = &secrets[i]
		}
	}
	for _, m := range []string{markQuoted, markGzip, markZip} {
		at(m).special = m
	}
	texts := make([]string, len(e.patterns))
	for i, p := range e.patterns {
		texts[i] = p.text
	}
	e.auto = newAutomaton(texts)
	return e
}

// worker is what one scan at a time uses.
type worker struct {
	*engine
	dfas   []*dfa
	memory int                  // of dfas
	starts [][]int              // by rule: where a match begins
	hot    []int32              // rules with starts
	plain  [maxDepth + 1][]byte // texts without their escapes, by depth
	words  [maxDepth + 1][]byte // decoded words
	seed   maphash.Seed
}

func newWorker(e *engine) *worker {
	return &worker{engine: e, dfas: make([]*dfa, len(e.rules)), starts: make([][]int, len(e.rules)), seed: maphash.MakeSeed()}
}

// dfa of a rule; for an open rule it searches, for others it begins where it is
// asked to.
func (w *worker) dfa(i int32) *dfa {
	if w.dfas[i] == nil {
		r := w.rules[i]
		re := r.rest
		if r.anchors == nil {
			re = searching(re)
		}
		// The expression was compiled before, when the rules were read.
		w.dfas[i], _ = newDFA(re, &w.memory)
	}
	return w.dfas[i]
}

// pass is one scan.
type pass struct {
	*worker
	ctx      context.Context
	opts     Options
	found    func(Finding) bool
	body     []byte
	skip     int // of body: runs up to here are done
	keywords []bool
	waiting  []waiting // findings of rules whose keyword has not been seen yet
	quoted   bool
	coded    bool            // the body has content codings
	packed   int             // compressed pieces that were opened
	seen     map[uint64]bool // runs that were decoded
	work     int
	derive   int
	pieces   []piece
}

type waiting struct {
	rule int32
	text []byte
}

var errStop = errors.New("dlp: stop")

func (p *pass) spend(n int) error {
	if p.work -= n; p.work < 0 {
		return &ErrUnscannable{"looking through it takes too long"}
	}
	return nil
}

// match looks at what begins in t[from:to]; all says that nothing follows t.
func (p *pass) match(t []byte, from, to int, all bool) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	stop := min(len(t), to+p.longest-1)
	if err := p.spend(stop - from); err != nil {
		return err
	}
	var err error
	p.auto.each(t[from:stop], func(end int, ids []int32) bool {
		for _, id := range ids {
			x := &p.patterns[id]
			start := from + end - len(x.text)
			if start >= to {
				continue
			}
			if x.keyword >= 0 {
				p.keywords[x.keyword] = true
			}
			if x.secret != nil {
				if err = p.own(t, start, from+end, x.secret); err != nil {
					return false
				}
			}
			if x.special != "" {
				p.mark(x.special, start)
			}
			for _, r := range x.rules {
				yes, steps := p.dfa(r).match(t[:min(len(t), start+maxMatch)], start, all && start+maxMatch >= len(t))
				if p.work -= steps; p.work < 0 {
					err = p.spend(0)
					return false
				}
				if yes {
					p.begin(r, start)
				}
			}
			for _, r := range x.near {
				if err = p.look(r, t, start, all); err != nil {
					return false
				}
			}
		}
		return true
	})
	if err == nil {
		err = p.search(t, from, to, all)
	}
	if err == nil {
		err = p.settle(t, all)
	}
	for _, r := range p.hot {
		p.starts[r] = p.starts[r][:0]
	}
	p.hot = p.hot[:0]
	return err
}

func (p *pass) begin(r int32, at int) {
	if len(p.starts[r]) == 0 {
		p.hot = append(p.hot, r)
	}
	p.starts[r] = append(p.starts[r], at)
}

// enabled tells if one of a rule's keywords has been seen.
func (p *pass) enabled(r int32) bool {
	return slices.ContainsFunc(p.needs[r], func(k int32) bool { return p.keywords[k] })
}

// search runs the rules that no literal points to, if a keyword asks for them.
func (p *pass) search(t []byte, from, to int, all bool) error {
	for _, r := range p.open {
		if p.enabled(r) {
			hi := min(len(t), to+p.rules[r].longest+1)
			if err := p.find(r, t[:hi], from, to, all && hi == len(t)); err != nil {
				return err
			}
		}
	}
	return nil
}

// look searches for a match of a rule around a keyword.
func (p *pass) look(r int32, t []byte, at int, all bool) error {
	n := p.rules[r].near
	// A character more on each side keeps ^ and $ from seeing an end that is
	// none.
	lo, hi := max(0, at-n-1), min(len(t), at+n+1)
	return p.find(r, t[:hi], lo, at+1, all && hi == len(t))
}

// find judges all matches of a rule that begin in t[from:to].
func (p *pass) find(r int32, t []byte, from, to int, all bool) error {
	x := p.rules[r]
	for at := from; at < to; {
		yes, steps := p.dfa(r).match(t, at, all)
		if err := p.spend(steps); err != nil || !yes {
			return err
		}
		// A match is complete there, so that it cannot begin long before. The
		// character before it decides on word boundaries.
		end := at + steps
		lo, hi := max(0, at-1, end-x.longest-1), min(len(t), end+x.longest)
		if err := p.spend(exprWork * (hi - lo)); err != nil {
			return err
		}
		loc := x.whole().FindIndex(t[lo:hi])
		if loc == nil || lo+loc[1] <= at {
			at = end
			continue
		}
		start, stop := lo+loc[0], lo+loc[1]
		if start >= to {
			return nil
		}
		if stop < hi || all && hi == len(t) {
			if err := p.judge(r, t, start, stop); err != nil {
				return err
			}
		}
		at = stop
	}
	return nil
}

// settle finds out which match each start of a rule is the beginning of, from
// left to right and without overlaps, as FindAll does.
func (p *pass) settle(t []byte, all bool) error {
	for _, i := range p.hot {
		r := p.rules[i]
		slices.Sort(p.starts[i])
		last := 0
		for _, start := range p.starts[i] {
			if start < last {
				continue
			}
			re, lo := r.first(), 0
			if start > 0 {
				re, lo = r.inside(), start-1
			}
			hi := min(len(t), start+maxMatch)
			loc := re.FindIndex(t[lo:hi])
			if loc == nil {
				if err := p.spend(exprWork * 256); err != nil {
					return err
				}
				continue
			}
			end := lo + loc[1]
			if err := p.spend(exprWork * (end - start + 20)); err != nil {
				return err
			}
			if end == hi && !(all && hi == len(t)) {
				continue
			}
			begin := start
			for begin > max(last, start-r.lead) && isName(t[begin-1]) {
				begin--
			}
			last = end
			if err := p.judge(i, t, begin, end); err != nil {
				return err
			}
		}
	}
	return nil
}

// judge takes a match of a rule's expression through what gitleaks asks of it.
func (p *pass) judge(i int32, t []byte, start, end int) error {
	r := p.rules[i]
	match := bytes.Trim(t[start:end], "\n")
	secret := match
	if groups := r.whole().FindSubmatch(match); len(groups) >= 2 {
		if r.group > 0 {
			secret = groups[r.group]
		} else {
			for _, g := range groups[1:] {
				if len(g) > 0 {
					secret = g
					break
				}
			}
		}
	}
	if r.entropy != 0 && entropy(secret) <= r.entropy {
		return nil
	}
	if r.allowed(secret, match, line(t, start, end)) || !p.opts.Plain && r.vague(secret) {
		return nil
	}
	if r.certain || p.enabled(i) {
		return p.tell(r.id, secret)
	}
	const most = 1000
	if len(p.waiting) == most {
		return &ErrUnscannable{"it holds too many things that may be keys"}
	}
	p.waiting = append(p.waiting, waiting{i, bytes.Clone(secret)})
	return nil
}

func (p *pass) tell(rule string, text []byte) error {
	if p.opts.Allow != nil && p.opts.Allow(rule) {
		return nil
	}
	if !p.found(Finding{rule, bytes.Clone(text)}) {
		return errStop
	}
	return nil
}

// own tells of one of the bottle's secrets.
func (p *pass) own(t []byte, start, end int, s *secretPattern) error {
	if s.alone && (start > 0 && wordByte(t[start-1]) || end < len(t) && wordByte(t[end])) {
		return nil
	}
	return p.tell(OwnRule(s.name), t[start:end])
}

func wordByte(c byte) bool { return isName(c) && c != '.' && c != '-' || c >= 0x80 }

// line is the line around a match, or as much of it as may tell something.
func line(t []byte, start, end int) []byte {
	from, to := max(0, start-lineSide), min(len(t), end+lineSide)
	if i := bytes.LastIndexByte(t[from:start], '\n'); i >= 0 {
		from += i
	}
	if i := bytes.IndexByte(t[end:to], '\n'); i >= 0 {
		to = end + i
	}
	return t[from:to]
}

// entropy is Shannon's, in bits a character, as gitleaks computes it: the
// characters are counted as runes, and the length in bytes.
func entropy(s []byte) (bits float64) {
	counts := make(map[rune]int)
	for _, r := range string(s) {
		counts[r]++
	}
	for _, n := range counts {
		f := float64(n) / float64(len(s))
		bits -= f * math.Log2(f)
	}
	return bits
}
