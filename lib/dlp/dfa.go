package dlp

import (
	"encoding/binary"
	"regexp/syntax"
	"slices"
	"unicode"
	"unicode/utf8"
)

// dfa tells if a regular expression matches at a given place, and no more. Go's
// regexp costs about a microsecond to say no, and most places that a keyword
// points to are a no: this costs a few nanoseconds a byte once it is warm. It
// makes the subset construction lazily, over classes of characters that the
// expression does not tell apart.
type dfa struct {
	prog    *syntax.Prog
	ascii   [utf8.RuneSelf]uint8
	bounds  []rune  // begins of the intervals of runes, from 0 on
	classes []uint8 // their classes
	sample  []rune  // one rune of each class; the last is -1, the end of the text
	byKey   map[string]int32
	states  []dfaState
	stack   []uint32
	seen    []uint32
	round   uint32
	used    int  // bytes, roughly
	shared  *int // bytes of all dfas of one scanner
}

// dfaState is where threads of the program stand before their empty-width
// conditions are decided: that takes the next rune.
type dfaState struct {
	pcs  []uint32
	prev rune // stands for the kind of the rune before: -1, 'a', ' ', '\n'
	next []int32
}

const (
	unknown int32 = iota
	dead
	matched
	firstState
)

// maxStateBytes bounds the memory of all dfas of a scanner. Beyond it each is
// built anew when it is next used.
const maxStateBytes = 16 << 20

func newDFA(re *syntax.Regexp, shared *int) (*dfa, error) {
	prog, err := syntax.Compile(re.Simplify())
	if err != nil {
		return nil, err
	}
	d := &dfa{prog: prog, seen: make([]uint32, len(prog.Inst)), shared: shared}
	d.classify()
	d.reset()
	return d, nil
}

func (d *dfa) reset() {
	*d.shared -= d.used
	d.used = 0
	d.byKey = make(map[string]int32)
	d.states = make([]dfaState, firstState, 16)
}

// classify finds the classes of runes.
func (d *dfa) classify() {
	edges := []rune{0, '\n', '\n' + 1, '0', '9' + 1, 'A', 'Z' + 1, '_', '_' + 1, 'a', 'z' + 1, utf8.RuneSelf}
	var consuming []*syntax.Inst
	for i := range d.prog.Inst {
		in := &d.prog.Inst[i]
		switch in.Op {
		case syntax.InstRune, syntax.InstRune1:
			consuming = append(consuming, in)
			if len(in.Rune) == 1 {
				r := in.Rune[0]
				edges = append(edges, r, r+1)
				for f := unicode.SimpleFold(r); f != r; f = unicode.SimpleFold(f) {
					edges = append(edges, f, f+1)
				}
				continue
			}
			for j := 0; j+1 < len(in.Rune); j += 2 {
				edges = append(edges, in.Rune[j], in.Rune[j+1]+1)
			}
		case syntax.InstRuneAny, syntax.InstRuneAnyNotNL:
			consuming = append(consuming, in)
		}
	}
	slices.Sort(edges)
	d.bounds = slices.Compact(edges)
	byMatch := make(map[string]uint8)
	for _, r := range d.bounds {
		key := []byte{byte(kind(r))}
		for _, in := range consuming {
			if in.MatchRune(r) {
				key = append(key, 1)
			} else {
				key = append(key, 0)
			}
		}
		c, ok := byMatch[string(key)]
		if !ok {
			c = uint8(len(d.sample)) // far below 256: the rules tell few characters apart
			byMatch[string(key)] = c
			d.sample = append(d.sample, r)
		}
		d.classes = append(d.classes, c)
	}
	d.sample = append(d.sample, -1)
	for c := range d.ascii {
		d.ascii[c] = d.class(rune(c))
	}
}

func (d *dfa) class(r rune) uint8 {
	i, exact := slices.BinarySearch(d.bounds, r)
	if !exact {
		i--
	}
	return d.classes[i]
}

// kind is what \b, ^ and $ can tell of a rune.
func kind(r rune) rune {
	switch {
	case r < 0:
		return -1
	case syntax.IsWordChar(r):
		return 'a'
	case r == '\n':
		return '\n'
	}
	return ' '
}

// match tells if the expression matches a beginning of text[at:], and how many
// bytes it took to know. If text is not all there is, a match that would need
// its end is none.
func (d *dfa) match(text []byte, at int, all bool) (yes bool, steps int) {
	prev := rune(-1)
	if at > 0 {
		prev = rune(text[at-1]) // a byte of a longer rune is no word character, as the rune is
	}
	if *d.shared > maxStateBytes && d.used > 0 {
		d.reset()
	}
	s := d.state([]uint32{uint32(d.prog.Start)}, kind(prev))
	i := at
	for {
		c, n := uint8(len(d.sample)-1), 1
		if i >= len(text) && !all {
			return false, i - at
		}
		if i < len(text) {
			if b := text[i]; b < utf8.RuneSelf {
				c = d.ascii[b]
			} else {
				var r rune
				r, n = utf8.DecodeRune(text[i:])
				c = d.class(r)
			}
		}
		next := d.states[s].next[c]
		if next == unknown {
			next = d.step(s, c)
		}
		switch {
		case next == matched:
			return true, i - at + 1
		case next == dead || i >= len(text):
			return false, i - at + 1
		}
		s, i = next, i+n
	}
}

// state gives the number of a state, made if there is none.
func (d *dfa) state(pcs []uint32, prev rune) int32 {
	key := make([]byte, 0, 4+4*len(pcs))
	key = binary.LittleEndian.AppendUint32(key, uint32(prev))
	for _, pc := range pcs {
		key = binary.LittleEndian.AppendUint32(key, pc)
	}
	if s, ok := d.byKey[string(key)]; ok {
		return s
	}
	s := int32(len(d.states))
	d.byKey[string(key)] = s
	d.states = append(d.states, dfaState{slices.Clone(pcs), prev, make([]int32, len(d.sample))})
	size := 128 + 2*len(key) + 4*len(d.sample)
	d.used += size
	*d.shared += size
	return s
}

// step computes the transition of a state by a class.
func (d *dfa) step(s int32, c uint8) int32 {
	r := d.sample[c]
	from := d.states[s]
	to, ok := d.closure(from.pcs, syntax.EmptyOpContext(from.prev, r), r)
	next := dead
	switch {
	case ok:
		next = matched
	case len(to) > 0:
		next = d.state(to, kind(r))
	}
	d.states[s].next[c] = next
	return next
}

// closure follows what takes no character, and gives the sorted places behind
// the instructions that take r, or true where a match is complete.
func (d *dfa) closure(pcs []uint32, flags syntax.EmptyOp, r rune) (to []uint32, match bool) {
	d.round++
	d.stack = append(d.stack[:0], pcs...)
	for len(d.stack) > 0 {
		pc := d.stack[len(d.stack)-1]
		d.stack = d.stack[:len(d.stack)-1]
		if d.seen[pc] == d.round {
			continue
		}
		d.seen[pc] = d.round
		switch in := &d.prog.Inst[pc]; in.Op {
		case syntax.InstMatch:
			return nil, true
		case syntax.InstAlt, syntax.InstAltMatch:
			d.stack = append(d.stack, in.Out, in.Arg)
		case syntax.InstCapture, syntax.InstNop:
			d.stack = append(d.stack, in.Out)
		case syntax.InstEmptyWidth:
			if syntax.EmptyOp(in.Arg)&^flags == 0 {
				d.stack = append(d.stack, in.Out)
			}
		case syntax.InstRune, syntax.InstRune1, syntax.InstRuneAny, syntax.InstRuneAnyNotNL:
			if r >= 0 && in.MatchRune(r) {
				to = append(to, in.Out)
			}
		}
	}
	slices.Sort(to)
	return slices.Compact(to), false
}

// searching is re behind anything.
func searching(re *syntax.Regexp) *syntax.Regexp {
	before := &syntax.Regexp{Op: syntax.OpStar, Flags: syntax.NonGreedy, Sub: []*syntax.Regexp{{Op: syntax.OpAnyChar}}}
	return &syntax.Regexp{Op: syntax.OpConcat, Sub: []*syntax.Regexp{before, re}}
}
