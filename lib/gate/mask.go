package gate

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"io"
	"net/http"
	"slices"
	"strings"
)

// finder looks for values in what passes by: as they are, in capital or small
// letters, in UTF-16, in hex, in base64 at any offset (a key that was encoded together with what stands before it), and
// any of these with single bytes escaped as URLs, JSON and HTML do it, or twice
// that.
//
// It does not see what is compressed, encrypted, cut into pieces or encoded in
// another way on purpose. That is why a secret goes to its own host alone.
type finder struct {
	patterns [][]byte // longest first
	lower    []string // the values, for names of headers, which change case on their way
	// wanted are the bytes for which an escape is decoded: those of patterns, and
	// those that begin another escape.
	wanted    [256]bool
	backslash bool // a pattern has one
}

// maxNesting is how often escapes are taken off: a key in JSON in a URL.
const maxNesting = 3

// maxExpansion is how much longer than the value its escaped form is expected to
// be, if it is escaped twice.
const maxExpansion = 36

// minEncoded is the shortest encoded form that is looked for. A shorter one
// turns up in any large download.
const minEncoded = 6

// newFinder returns nil if there is nothing to look for.
func newFinder(values []string) *finder {
	f := &finder{}
	for _, v := range values {
		if len(v) < minSecret {
			continue
		}
		f.patterns = append(f.patterns, []byte(v))
		if strings.Contains(v, " ") {
			f.patterns = append(f.patterns, []byte(strings.ReplaceAll(v, " ", "+")))
		}
		if len(v) >= minDecoded {
			// In other letters, which say as much of a key in hexadecimal and the
			// like, and in UTF-16 of either order.
			for _, p := range []string{strings.ToLower(v), strings.ToUpper(v), strings.Join(strings.Split(v, ""), "\x00")} {
				f.patterns = append(f.patterns, []byte(p))
			}
		}
		for _, p := range encoded(v) {
			if len(p) >= minEncoded {
				f.patterns = append(f.patterns, []byte(p))
			}
		}
		f.lower = append(f.lower, strings.ToLower(v))
	}
	if len(f.patterns) == 0 {
		return nil
	}
	slices.SortFunc(f.patterns, func(a, b []byte) int {
		if len(a) != len(b) {
			return len(b) - len(a)
		}
		return bytes.Compare(a, b)
	})
	f.patterns = slices.CompactFunc(f.patterns, bytes.Equal)
	for _, p := range f.patterns {
		for _, c := range p {
			f.wanted[c] = true
		}
	}
	f.backslash = f.wanted['\\']
	f.wanted['%'], f.wanted['\\'], f.wanted['&'] = true, true, true
	return f
}

// encoded gives hex and base64 of v. In base64 a byte's place among others
// decides how it is written; the characters that depend on v alone are given for
// each of the three places.
func encoded(v string) []string {
	low := hex.EncodeToString([]byte(v))
	out := []string{low, strings.ToUpper(low)}
	for before := range 3 {
		b := append(make([]byte, before), v...)
		first, last := (before*8+5)/6, len(b)*8/6
		for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			out = append(out, e.EncodeToString(b)[first:last])
		}
	}
	return out
}

// scan is one look at a text. It may be used again, for its memory.
type scan struct {
	*finder
	views [maxNesting]view
}

// view is a text with one more layer of escapes taken off. at[i] is where text[i]
// comes from in the original; it has one entry more, for the end.
type view struct {
	text []byte
	at   []int32
}

// find calls hit for the place of each value in b, until it returns false. hit
// may overwrite the place.
func (s *scan) find(b []byte, hit func(from, to int) bool) {
	if !s.search(b, nil, hit) {
		return
	}
	text, at := b, []int32(nil)
	for i := range s.views {
		v := &s.views[i]
		if changed, _ := s.unescape(v, text, at); !changed || !s.search(v.text, v.at, hit) {
			return
		}
		text, at = v.text, v.at
	}
}

func (f *finder) search(text []byte, at []int32, hit func(from, to int) bool) (more bool) {
	for _, p := range f.patterns {
		for i := 0; ; i += len(p) {
			n := bytes.Index(text[i:], p)
			if n < 0 {
				break
			}
			i += n
			from, to := i, i+len(p)
			if at != nil {
				from, to = int(at[from]), int(at[to])
			}
			if !hit(from, to) {
				return false
			}
		}
	}
	return true
}

// contains tells if a value stands in text.
func (f *finder) contains(text string) (found bool) {
	s := scan{finder: f}
	s.find([]byte(text), func(int, int) bool { found = true; return false })
	return found
}

// mask overwrites values with asterisks, one for each byte, so that lengths stay
// true.
func (s *scan) mask(b []byte) (found bool) {
	s.find(b, func(from, to int) bool {
		for i := range b[from:to] {
			b[from+i] = '*'
		}
		found = true
		return true
	})
	return found
}

// masked is text without values; f may be nil.
func (f *finder) masked(text string) string {
	if f == nil {
		return text
	}
	b := []byte(text)
	(&scan{finder: f}).mask(b)
	return string(b)
}

// held is how many of b's last bytes may be the beginning of a value, so that
// they have to wait for what follows.
func (s *scan) held(b []byte) int {
	b = b[max(0, len(b)-maxExpansion*len(s.patterns[0])):]
	text, at := b, []int32(nil)
	hold := len(b)
	for i := 0; ; i++ {
		from := s.prefix(text)
		changed, open := false, len(text)
		if i < maxNesting {
			changed, open = s.unescape(&s.views[i], text, at)
		}
		if open < len(text) {
			from = min(from, s.prefix(text[:open]))
		}
		if at != nil {
			from = int(at[from])
		}
		hold = min(hold, from)
		if !changed {
			return len(b) - hold
		}
		// What is cut off is left out of the deeper views: there it would stand
		// in the way as text.
		v := &s.views[i]
		text, at = v.text[:len(v.text)-(len(text)-open)], v.at
	}
}

// prefix is where the longest end of text begins that is the beginning of a
// pattern, and not a whole one.
func (f *finder) prefix(text []byte) int {
	most := 0
	for _, p := range f.patterns {
		for n := min(len(p)-1, len(text)); n > most; n-- {
			// The first byte sorts nearly all of them out.
			if text[len(text)-n] == p[0] && bytes.HasPrefix(p, text[len(text)-n:]) {
				most = n
				break
			}
		}
	}
	return len(text) - most
}

// unescape makes v the text without its outer escapes. open is where an escape
// begins that the end of text cuts off, len(text) if there is none. Escapes for
// bytes that no value has stay as they are.
func (f *finder) unescape(v *view, text []byte, at []int32) (changed bool, open int) {
	done := 0 // what has been copied to v
	for i := 0; i < len(text); {
		c := text[i]
		if c != '%' && c != '\\' && c != '&' {
			i++
			continue
		}
		b, n := escape(text[i:])
		if n > 0 && b == '\\' && !f.backslash {
			n = f.meaningful(text[i:], n)
		}
		switch {
		case n < 0:
			if changed {
				v.copy(text, at, done, len(text))
				v.end(text, at)
			}
			return changed, i
		case n == 0 || !f.wanted[b]:
			i++
		default:
			if !changed {
				changed = true
				v.text, v.at = v.text[:0], v.at[:0]
			}
			v.copy(text, at, done, i)
			v.text, v.at = append(v.text, b), append(v.at, origin32(at, i))
			i += n
			done = i
		}
	}
	if changed {
		v.copy(text, at, done, len(text))
		v.end(text, at)
	}
	return changed, len(text)
}

// meaningful tells if an escaped backslash of n bytes matters: it is all over
// JSON, and each one that is decoded costs another look. It does if it begins an
// escape itself.
func (f *finder) meaningful(b []byte, n int) int {
	if n == len(b) {
		return -1
	}
	if c := b[n]; c == 'u' || c == 'x' || c == '\\' || f.wanted[c] && selfEscaped(c) {
		return n
	}
	return 0
}

// selfEscaped tells if a backslash before c stands for c itself: letters and digits
// have other meanings.
func selfEscaped(c byte) bool {
	return !(c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z')
}

func origin32(at []int32, i int) int32 {
	if at == nil {
		return int32(i)
	}
	return at[i]
}

func (v *view) copy(text []byte, at []int32, from, to int) {
	v.text = append(v.text, text[from:to]...)
	if at != nil {
		v.at = append(v.at, at[from:to]...)
		return
	}
	for i := from; i < to; i++ {
		v.at = append(v.at, int32(i))
	}
}

func (v *view) end(text []byte, at []int32) { v.at = append(v.at, origin32(at, len(text))) }

// escape reads the escape that b begins with, and gives the byte it stands for
// and its length: 0 if there is none, -1 if b ends before that is clear.
func escape(b []byte) (c byte, n int) {
	switch {
	case b[0] == '%':
		return hexEscape(b, 1, 2)
	case b[0] == '&':
		return entity(b)
	case len(b) == 1:
		return 0, -1
	}
	switch b[1] {
	case 'u':
		return hexEscape(b, 2, 4)
	case 'x':
		return hexEscape(b, 2, 2)
	}
	if !selfEscaped(b[1]) {
		return 0, 0 // a line feed or the like, which no value has
	}
	return b[1], 2
}

// hexEscape reads digits from b[at:]. More than two are a character, of which
// those of ASCII are a byte.
func hexEscape(b []byte, at, digits int) (byte, int) {
	v := 0
	for i := at; i < at+digits; i++ {
		switch {
		case i == len(b):
			return 0, -1
		case !isHex(b[i]):
			return 0, 0
		}
		v = v<<4 | hexDigit(b[i])
	}
	if v > 0xff || digits > 2 && v > 0x7f {
		return 0, 0
	}
	return byte(v), at + digits
}

func hexDigit(c byte) int {
	switch {
	case c >= 'a':
		return int(c-'a') + 10
	case c >= 'A':
		return int(c-'A') + 10
	}
	return int(c - '0')
}

// entities are the names that encoders of HTML write.
var entities = []struct {
	name string
	c    byte
}{{"amp;", '&'}, {"lt;", '<'}, {"gt;", '>'}, {"quot;", '"'}, {"apos;", '\''}}

// entity reads a character reference of HTML.
func entity(b []byte) (byte, int) {
	rest := b[1:]
	if len(rest) == 0 {
		return 0, -1
	}
	if rest[0] != '#' {
		for _, e := range entities {
			switch {
			case bytes.HasPrefix(rest, []byte(e.name)):
				return e.c, 1 + len(e.name)
			case strings.HasPrefix(e.name, string(rest)):
				return 0, -1
			}
		}
		return 0, 0
	}
	base, at := 10, 2
	if len(b) > 2 && (b[2] == 'x' || b[2] == 'X') {
		base, at = 16, 3
	}
	v := 0
	for i := at; i < at+8; i++ {
		switch {
		case i >= len(b):
			return 0, -1
		case b[i] == ';' && i > at && v <= 0x7f:
			return byte(v), i + 1
		case base == 16 && !isHex(b[i]), base == 10 && (b[i] < '0' || b[i] > '9'):
			return 0, 0
		}
		v = min(v*base+hexDigit(b[i]), 0x80)
	}
	return 0, 0
}

// maskHeader masks values, and drops a header whose name holds one.
func (f *finder) maskHeader(h http.Header) (found bool) {
	s := scan{finder: f}
	for name, values := range h {
		low := strings.ToLower(name)
		if slices.ContainsFunc(f.lower, func(v string) bool { return strings.Contains(low, v) }) {
			delete(h, name)
			found = true
			continue
		}
		for i, v := range values {
			if b := []byte(v); s.mask(b) {
				values[i] = string(b)
				found = true
			}
		}
	}
	return found
}

// maskReader masks a stream. It holds back no more than what could be the
// beginning of a value, so that events arrive when they are sent.
type maskReader struct {
	src   io.Reader
	scan  scan
	buf   []byte
	ready int // bytes of buf that may go out
	err   error
	found bool
}

func newMaskReader(src io.Reader, f *finder) *maskReader {
	return &maskReader{src: src, scan: scan{finder: f}}
}

func (r *maskReader) Read(p []byte) (int, error) {
	for r.ready == 0 && r.err == nil {
		at := len(r.buf)
		r.buf = slices.Grow(r.buf, len(p))[:at+len(p)]
		n, err := r.src.Read(r.buf[at:])
		r.buf = r.buf[:at+n]
		r.err = err
		r.found = r.scan.mask(r.buf) || r.found
		r.ready = len(r.buf)
		if err == nil {
			r.ready -= r.scan.held(r.buf)
		}
	}
	if r.ready == 0 {
		return 0, r.err
	}
	n := copy(p, r.buf[:r.ready])
	r.buf = r.buf[:copy(r.buf, r.buf[n:])]
	r.ready -= n
	return n, nil
}
