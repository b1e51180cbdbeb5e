package fault

import "strings"

// Control tells what has no place in a line of text: C0, DEL, C1, line and
// paragraph separators, and the characters that reorder what is around them.
func Control(r rune) bool {
	return r < 0x20 || 0x7f <= r && r < 0xa0 || 0x202a <= r && r <= 0x202e || 0x2066 <= r && r <= 0x2069 || separates(r)
}

func separates(r rune) bool { return r == 0x2028 || r == 0x2029 }

// Line makes one line of s, for a message, a log or a terminal. Texts quote
// names that a guest, a cloned repository or another program chose: they must
// not write lines of their own, nor move a cursor. White space becomes blanks,
// other control characters "?", bytes that are not UTF-8 U+FFFD; blanks at the
// end go.
func Line(s string) string {
	return strings.TrimRight(strings.Map(func(r rune) rune {
		switch {
		case '\t' <= r && r <= '\r' || separates(r):
			return ' '
		case Control(r):
			return '?'
		}
		return r
	}, s), " ")
}
