package dlp

import (
	"regexp/syntax"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds of the search for the literals that an expression begins with.
const (
	maxAnchors   = 64
	minAnchor    = 2
	enoughAnchor = 12
)

// stripLead takes the lazy run of name characters off that many rules begin
// with ([\w.-]{0,50}?), and tells how long it may be. It only widens the match
// to the left: where the rest matches is the same with it and without, since it
// is as short as it can be and may be empty.
func stripLead(re *syntax.Regexp) (rest *syntax.Regexp, lead int) {
	switch re.Op {
	case syntax.OpRepeat:
		if re.Min == 0 && re.Max > 0 && re.Flags&syntax.NonGreedy != 0 && isNameClass(re.Sub[0]) {
			return &syntax.Regexp{Op: syntax.OpEmptyMatch}, re.Max
		}
	case syntax.OpConcat:
		first, lead := stripLead(re.Sub[0])
		if lead == 0 {
			return re, 0
		}
		subs := slices.Clone(re.Sub)
		subs[0] = first
		c := &syntax.Regexp{Op: syntax.OpConcat, Flags: re.Flags, Sub: subs}
		if first.Op == syntax.OpEmptyMatch {
			c.Sub = subs[1:]
		}
		rest, more := stripLead(c)
		return rest, lead + more
	case syntax.OpAlternate:
		subs := slices.Clone(re.Sub)
		for i, s := range subs {
			var l int
			subs[i], l = stripLead(s)
			lead = max(lead, l)
		}
		if lead > 0 {
			return &syntax.Regexp{Op: syntax.OpAlternate, Flags: re.Flags, Sub: subs}, lead
		}
	}
	return re, 0
}

func isNameClass(re *syntax.Regexp) bool {
	if re.Op != syntax.OpCharClass {
		return false
	}
	for c := rune(0); c < unicode.MaxASCII; c++ {
		in := false
		for i := 0; i+1 < len(re.Rune); i += 2 {
			in = in || re.Rune[i] <= c && c <= re.Rune[i+1]
		}
		if in != isName(byte(c)) {
			return false
		}
	}
	return true
}

func isName(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '.' || c == '-'
}

// anchors are lower-case literals of which one begins every match of re; nil if
// there are none that are long enough.
func anchors(re *syntax.Regexp) []string {
	set, _ := begins(re)
	if len(set) == 0 || len(set) > maxAnchors {
		return nil
	}
	slices.Sort(set)
	var out []string
	for _, s := range set {
		if len(s) < minAnchor {
			return nil
		}
		// Sorted, what a literal is a prefix of comes behind it.
		if len(out) == 0 || !strings.HasPrefix(s, out[len(out)-1]) {
			out = append(out, s)
		}
	}
	return out
}

// begins gives what matches of re begin with, and if each is a whole match. An
// empty literal stands for "anything".
func begins(re *syntax.Regexp) (set []string, whole bool) {
	switch re.Op {
	case syntax.OpEmptyMatch, syntax.OpBeginLine, syntax.OpEndLine, syntax.OpBeginText, syntax.OpEndText,
		syntax.OpWordBoundary, syntax.OpNoWordBoundary:
		return []string{""}, true
	case syntax.OpLiteral:
		for _, r := range re.Rune {
			if r >= 0x80 {
				return []string{""}, false
			}
		}
		return []string{strings.ToLower(string(re.Rune))}, true
	case syntax.OpCharClass:
		return classBegins(re)
	case syntax.OpCapture:
		return begins(re.Sub[0])
	case syntax.OpQuest:
		set, whole = begins(re.Sub[0])
		return append(set, ""), whole
	case syntax.OpPlus:
		set, _ = begins(re.Sub[0])
		return set, false
	case syntax.OpRepeat:
		if re.Min == 0 {
			return []string{""}, false
		}
		set, whole = begins(re.Sub[0])
		return set, whole && re.Min == 1 && re.Max == 1
	case syntax.OpAlternate:
		whole = true
		for _, s := range re.Sub {
			more, w := begins(s)
			set, whole = append(set, more...), whole && w
		}
		return set, whole
	case syntax.OpConcat:
		set = []string{""}
		for _, s := range re.Sub {
			more, w := begins(s)
			if len(set)*len(more) > maxAnchors {
				return set, false
			}
			set = product(set, more)
			if !w || len(slices.MinFunc(set, func(a, b string) int { return len(a) - len(b) })) >= enoughAnchor {
				return set, false
			}
		}
		return set, true
	}
	return []string{""}, false
}

// classBegins takes a small class apart. Runes beyond ASCII are there by case
// folding (the Kelvin sign, the long s): the scan folds those in the text.
func classBegins(re *syntax.Regexp) ([]string, bool) {
	var set []string
	for i := 0; i+1 < len(re.Rune); i += 2 {
		for r := re.Rune[i]; r <= re.Rune[i+1]; r++ {
			if r >= 0x80 {
				if re.Rune[i+1]-re.Rune[i] > 2 {
					return []string{""}, false
				}
				continue
			}
			if s := string(lower(byte(r))); !slices.Contains(set, s) {
				set = append(set, s)
			}
			if len(set) > 8 {
				return []string{""}, false
			}
		}
	}
	return set, len(set) > 0
}

func product(a, b []string) []string {
	out := make([]string, 0, len(a)*len(b))
	for _, x := range a {
		for _, y := range b {
			out = append(out, x+y)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// endless is the length of what has no bound.
const endless = 1 << 20

// longest is an upper bound of the length of a match in bytes.
func longest(re *syntax.Regexp) int {
	n := 0
	switch re.Op {
	case syntax.OpLiteral:
		return utf8.UTFMax * len(re.Rune)
	case syntax.OpCharClass, syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		return utf8.UTFMax
	case syntax.OpCapture, syntax.OpQuest:
		return longest(re.Sub[0])
	case syntax.OpStar, syntax.OpPlus:
		return endless
	case syntax.OpRepeat:
		if re.Max < 0 {
			return endless
		}
		return min(endless, re.Max*longest(re.Sub[0]))
	case syntax.OpAlternate:
		for _, s := range re.Sub {
			n = max(n, longest(s))
		}
	case syntax.OpConcat:
		for _, s := range re.Sub {
			n = min(endless, n+longest(s))
		}
	}
	return n
}

// holds tells if every match of re has one of the words in it.
func holds(re *syntax.Regexp, words []string) bool {
	switch re.Op {
	case syntax.OpLiteral:
		text := strings.ToLower(string(re.Rune))
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(text, w) })
	case syntax.OpCapture, syntax.OpPlus:
		return holds(re.Sub[0], words)
	case syntax.OpRepeat:
		return re.Min > 0 && holds(re.Sub[0], words)
	case syntax.OpConcat:
		return slices.ContainsFunc(re.Sub, func(s *syntax.Regexp) bool { return holds(s, words) })
	case syntax.OpAlternate:
		return !slices.ContainsFunc(re.Sub, func(s *syntax.Regexp) bool { return !holds(s, words) })
	}
	return false
}
