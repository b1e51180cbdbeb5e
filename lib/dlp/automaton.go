package dlp

// automaton finds all of many short patterns in one pass over a text, whatever
// the case of ASCII letters (Aho and Corasick, Efficient string matching, CACM
// 18(6), 1975). Its table is dense: one load a byte.
type automaton struct {
	class [256]uint8
	width uint32   // classes
	next  []uint32 // state*width + class: the next state, hit set if it ends a pattern
	ends  [][]int32
}

const hit = 1 << 31

// newAutomaton takes lower-case patterns of one byte or more. What it reports
// are indices into patterns.
func newAutomaton(patterns []string) *automaton {
	a := &automaton{width: 1}
	for _, p := range patterns {
		for i := range len(p) {
			if c := lower(p[i]); a.class[c] == 0 {
				a.class[c] = uint8(a.width)
				a.width++
			}
		}
	}
	for c := 'A'; c <= 'Z'; c++ {
		a.class[c] = a.class[lower(byte(c))]
	}
	a.add() // the root
	for id, p := range patterns {
		at := uint32(0)
		for i := range len(p) {
			slot := at*a.width + uint32(a.class[p[i]])
			if a.next[slot] == 0 {
				a.next[slot] = a.add()
			}
			at = a.next[slot]
		}
		a.ends[at] = append(a.ends[at], int32(id))
	}
	a.link()
	return a
}

// add makes a state. No edge leads back to the root while the trie grows, so
// that 0 stands for "none" there, and afterwards for the root itself.
func (a *automaton) add() uint32 {
	a.next = append(a.next, make([]uint32, a.width)...)
	a.ends = append(a.ends, nil)
	return uint32(len(a.ends) - 1)
}

// link turns the trie into the automaton, breadth first.
func (a *automaton) link() {
	fail := make([]uint32, len(a.ends))
	queue := []uint32{0}
	for len(queue) > 0 {
		at := queue[0]
		queue = queue[1:]
		for c := range a.width {
			slot := at*a.width + c
			to := a.next[slot]
			back := uint32(0)
			if at != 0 {
				back = a.next[fail[at]*a.width+c]
			}
			if to == 0 {
				a.next[slot] = back
				continue
			}
			fail[to] = back
			a.ends[to] = append(a.ends[to], a.ends[back]...)
			queue = append(queue, to)
		}
	}
	for i, to := range a.next {
		if len(a.ends[to]) > 0 {
			a.next[i] = to | hit
		}
	}
}

// each calls found with the end of every occurrence in text and with the
// patterns that end there, longest first, until it returns false.
func (a *automaton) each(text []byte, found func(end int, patterns []int32) bool) {
	at := uint32(0)
	for i, c := range text {
		at = a.next[at*a.width+uint32(a.class[c])]
		if at&hit != 0 {
			at &^= hit
			if !found(i+1, a.ends[at]) {
				return
			}
		}
	}
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}
