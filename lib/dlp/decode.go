package dlp

import (
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"hash/maphash"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// A text is looked at in windows, each with what may follow a match's begin.
const (
	window   = 256 << 10
	ahead    = maxMatch
	behind   = 64
	maxDepth = 6

	minRun    = 16  // characters of an encoded word
	maxPrefix = 512 // characters of a word in which base64 may begin
	bigRun    = 256 // from here on it is decoded though it does not look like text
	wrapped   = 40  // characters of a line, at least, that a run goes on behind
	beside    = 64  // bytes of the text beside a decoded word
	maxPacked = 10_000
	maxSeen   = 1 << 16
	maxZstd   = 8 << 20
	maxNested = 3 // content codings
)

// piece is a compressed part of a text that was found on the way.
type piece struct {
	kind string
	at   int
}

// run looks at the body.
func (p *pass) run() error {
	p.seen = make(map[uint64]bool)
	if encodings := codings(p.opts.Encodings); len(encodings) > 0 {
		// As it is, too: each coding has places for what is none of the text
		// (names and comments of gzip, frames of zstd that are skipped).
		p.coded = true
		if err := p.whole(); err != nil {
			return err
		}
		return p.encoded(encodings)
	}
	return p.whole()
}

// whole looks at the body as it is.
func (p *pass) whole() error {
	for from := 0; ; from += window {
		base, end := max(0, from-behind), min(len(p.body), from+window+ahead)
		t := p.body[base:end]
		all := end == len(p.body)
		to := min(from+window, len(p.body)) - base
		if all {
			to = len(t)
		}
		if err := p.level(t, []span{{from - base, to}}, all, 0, base); err != nil {
			return err
		}
		if all {
			return p.late()
		}
	}
}

// late tells of findings whose keyword came after them.
func (p *pass) late() error {
	for _, w := range p.waiting {
		if p.enabled(w.rule) {
			if err := p.tell(p.rules[w.rule].id, w.text); err != nil {
				return err
			}
		}
	}
	return nil
}

// codings takes Content-Encoding headers apart; identity is none.
func codings(values []string) (out []string) {
	for _, v := range values {
		for c := range strings.SplitSeq(v, ",") {
			if c = strings.ToLower(strings.TrimSpace(c)); c != "" && c != "identity" {
				out = append(out, c)
			}
		}
	}
	return out
}

// encoded looks at a body behind its content codings, of which the last was
// applied last. Here an error is no guess that was wrong: what the host may read
// in another way is refused.
func (p *pass) encoded(encodings []string) error {
	if len(encodings) > maxNested {
		return &ErrUnscannable{"it is encoded more than three times"}
	}
	var r io.Reader = bytes.NewReader(p.body)
	var streams []*bufio.Reader // of which nothing may be left
	for i := len(encodings) - 1; i >= 0; i-- {
		var err error
		switch encodings[i] {
		case "gzip", "x-gzip":
			r, err = gzip.NewReader(r)
		case "deflate":
			b := bufio.NewReader(r)
			streams = append(streams, b)
			r, err = inflater(b)
		case "zstd":
			var d *zstd.Decoder
			if d, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxZstd), zstd.WithDecoderLowmem(true)); err == nil {
				defer d.Close()
				r = d
			}
		default:
			return &ErrUnscannable{"its Content-Encoding is none that the gate reads (gzip, deflate, zstd)"}
		}
		if err != nil {
			return errEncoding
		}
	}
	err := p.stream(r, 1)
	var corrupt *readError
	if errors.As(err, &corrupt) {
		return errEncoding
	}
	if err != nil {
		return err
	}
	for _, b := range streams {
		if _, err := b.Peek(1); err != io.EOF {
			return errEncoding
		}
	}
	return p.late()
}

var errEncoding = &ErrUnscannable{"it is not what its Content-Encoding says"}

// inflater reads what HTTP calls deflate: zlib by the standard, and the bare
// stream by habit.
func inflater(b *bufio.Reader) (io.Reader, error) {
	if head, err := b.Peek(2); err == nil && head[0]&15 == 8 && binary.BigEndian.Uint16(head)%31 == 0 {
		return zlib.NewReader(b)
	}
	return flate.NewReader(b), nil
}

// readError is the trouble of a decoder, not a finding.
type readError struct{ error }

// stream looks at what r gives, window by window.
func (p *pass) stream(r io.Reader, depth int) error {
	if depth > maxDepth {
		return nil
	}
	b := bufio.NewReaderSize(r, 4<<10)
	if head, _ := b.Peek(len(markGzip)); string(head) == markGzip {
		if z, err := gzip.NewReader(b); err == nil {
			return p.guessed(p.stream(z, depth+1))
		}
	}
	buf := make([]byte, behind+window+ahead)
	kept := 0
	for from := 0; ; {
		n, err := fill(b, buf[kept:])
		if p.derive -= n; p.derive < 0 {
			return &ErrUnscannable{"it expands without end"}
		}
		p.work += workPerDerived * n
		t := buf[:kept+n]
		all := err != nil
		to := len(t)
		if !all {
			to -= ahead
		}
		if err := p.level(t, []span{{from, to}}, all, depth, -1); err != nil {
			return err
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return &readError{err}
		}
		kept = copy(buf, t[to-behind:])
		from = behind
	}
}

// fill reads until b is full, and keeps the error apart that says how it ended.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

// guessed forgets that what looked like compressed data was none, or was cut
// off: all that came out of it has been looked at.
func (p *pass) guessed(err error) error {
	var corrupt *readError
	if errors.As(err, &corrupt) {
		return nil
	}
	return err
}

func (p *pass) mark(kind string, at int) {
	if kind == markQuoted {
		p.quoted = true
		return
	}
	p.pieces = append(p.pieces, piece{kind, at})
}

// level looks at parts of a text, and then at what is encoded in them. base is
// where t begins in the body, -1 if it is no part of it.
func (p *pass) level(t []byte, parts []span, all bool, depth, base int) error {
	p.pieces = p.pieces[:0]
	for _, s := range parts {
		if s.from < s.to {
			if err := p.match(t, s.from, s.to, all); err != nil {
				return err
			}
		}
	}
	if depth >= maxDepth || p.opts.Plain {
		return nil
	}
	if len(p.pieces) > 0 {
		// The slice is used again on the way down.
		if err := p.unpack(t, append([]piece(nil), p.pieces...), depth, base); err != nil {
			return err
		}
	}
	if err := p.narrow(t, all, depth); err != nil {
		return err
	}
	plain, changed := unescape(p.plain[depth][:0], t, p.quoted)
	if len(changed) > 0 {
		p.plain[depth] = plain
		if p.derive -= len(plain); p.derive < 0 {
			return &ErrUnscannable{"it expands without end"}
		}
		if err := p.level(plain, changed, all, depth+1, -1); err != nil {
			return err
		}
	}
	for _, s := range parts {
		if err := p.runs(t, s, all, depth, base); err != nil {
			return err
		}
	}
	return nil
}

// unpack opens gzip and zip data where they begin in t.
func (p *pass) unpack(t []byte, pieces []piece, depth, base int) error {
	for _, x := range pieces {
		data := t[x.at:]
		if p.coded && base >= 0 && base+x.at == 0 {
			continue // encoded does it, and more strictly
		}
		if base >= 0 {
			data = p.body[base+x.at:]
		}
		if x.kind == markZip && !bytes.HasPrefix(data, []byte("PK")) { // the automaton knows no case
			continue
		}
		if p.packed++; p.packed > maxPacked {
			return &ErrUnscannable{"it holds too many compressed parts"}
		}
		var r io.Reader
		switch x.kind {
		case markGzip:
			z, err := gzip.NewReader(bytes.NewReader(data))
			if err != nil {
				continue
			}
			z.Multistream(false)
			r = z
		case markZip:
			const deflated, head = 8, 30
			if len(data) < head || binary.LittleEndian.Uint16(data[8:]) != deflated {
				continue
			}
			skip := head + int(binary.LittleEndian.Uint16(data[26:])) + int(binary.LittleEndian.Uint16(data[28:]))
			if skip >= len(data) {
				continue
			}
			r = flate.NewReader(bytes.NewReader(data[skip:]))
		}
		if err := p.guessed(p.stream(r, depth+1)); err != nil {
			return err
		}
	}
	return nil
}

// narrow takes the zero bytes out of what looks like UTF-16 or UTF-32.
func (p *pass) narrow(t []byte, all bool, depth int) error {
	if n := bytes.Count(t, []byte{0}); n < 8 || n < len(t)/8 {
		return nil
	}
	return p.derived(bytes.ReplaceAll(t, []byte{0}, nil), all, depth)
}

func (p *pass) derived(t []byte, all bool, depth int) error {
	if p.derive -= len(t); p.derive < 0 {
		return &ErrUnscannable{"it expands without end"}
	}
	return p.level(t, []span{{0, len(t)}}, all, depth+1, -1)
}

// Alphabets of encoded words.
const (
	inBase64 = 1 << iota
	inHex
	inLikely // characters of which one is in nearly all base64, and in few names
)

var alphabet = func() (a [256]byte) {
	for i := range a {
		c := byte(i)
		switch {
		case c >= '0' && c <= '9':
			a[i] = inBase64 | inHex | inLikely
		case c >= 'a' && c <= 'f', c >= 'A' && c <= 'F':
			a[i] = inBase64 | inHex
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
			a[i] = inBase64
		case c == '+', c == '/', c == '-', c == '_':
			a[i] = inBase64 | inLikely
		}
	}
	return a
}()

// runs decodes the words in a part of t that look like base64 or hexadecimal.
func (p *pass) runs(t []byte, s span, all bool, depth, base int) error {
	for i := s.from; i < s.to; {
		if alphabet[t[i]] == 0 {
			i++
			continue
		}
		if base >= 0 && base+i < p.skip {
			i = min(s.to, p.skip-base)
			continue
		}
		// A part may begin inside of a word: then nobody knows where a group of
		// characters begins.
		phases := 1
		if i == s.from && i > 0 && alphabet[t[i-1]] != 0 {
			phases = 4
		}
		end, kinds := word(t[:min(len(t), s.to+ahead)], i)
		switch {
		case base >= 0 && end == len(t) && !all:
			if err := p.long(base+i, depth); err != nil {
				return err
			}
		case end-i >= minRun:
			for k := range min(phases, end-i-minRun+1) {
				if err := p.decode(t, span{i + k, end}, kinds, all, depth); err != nil {
					return err
				}
			}
		}
		i = end
	}
	return nil
}

// word finds the end of the word that begins at i, over the ends of long lines,
// and which alphabets it keeps to (inHex), or has some of (inLikely).
func word(t []byte, i int) (end int, kinds byte) {
	hex, likely, lineStart := byte(inHex), byte(0), i
	for end = i; end < len(t); end++ {
		a := alphabet[t[end]]
		if a == 0 {
			next := end
			for next < len(t) && (t[next] == '\r' || t[next] == '\n') {
				next++
			}
			if next == end || next == len(t) || next-end > 2 || end-lineStart < wrapped || alphabet[t[next]] == 0 {
				break
			}
			end, lineStart = next, next
			a = alphabet[t[end]]
		}
		hex &= a
		likely |= a & inLikely
	}
	return end, hex | likely
}

// decode looks at a word behind its encoding, in place of it.
func (p *pass) decode(t []byte, s span, kinds byte, all bool, depth int) error {
	w := t[s.from:s.to]
	if kinds&inLikely == 0 {
		return nil
	}
	// Hexadecimal may be a part of the word, behind a dash.
	for i := 0; i+2*minRun <= len(w); i++ {
		n := 0
		for i+n < len(w) && (alphabet[w[i+n]]&inHex != 0 || kinds&inHex != 0) {
			n++
		}
		if n >= 2*minRun {
			if err := p.decoded(t, span{s.from + i, s.from + i + n}, w[i:i+n], appendHex, all, depth); err != nil {
				return err
			}
		}
		i += n
	}
	if err := p.decoded(t, s, w, appendBase64, all, depth); err != nil {
		return err
	}
	return p.behind(t, s, all, depth)
}

// behind decodes base64 that begins inside of a word, behind a slash or a dash
// as in a path. What begins a multiple of four characters behind another start
// is in that one's text.
func (p *pass) behind(t []byte, s span, all bool, depth int) error {
	var head [12]byte
	var tried [4]bool
	tried[0] = true
	if w := t[s.from:s.to]; len(w) < bigRun {
		tried[0] = printable(appendBase64(head[:0], w[:minRun]))
	}
	for i := s.from; i+minRun < s.to && i < s.from+maxPrefix; i++ {
		switch t[i] {
		case '/', '-', '_', '+':
		case '\r', '\n':
			return nil // further on, places are not counted in characters
		default:
			continue
		}
		at := i + 1
		if phase := (at - s.from) % 4; !tried[phase] && printable(appendBase64(head[:0], t[at:at+minRun])) {
			tried[phase] = true
			if err := p.decoded(t, span{at, s.to}, t[at:s.to], appendBase64, all, depth); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *pass) decoded(t []byte, s span, w []byte, enc func(dst, src []byte) []byte, all bool, depth int) error {
	var head [12]byte
	start := enc(head[:0], w[:minRun])
	readable := printable(start)
	if !readable && len(w) < bigRun && !bytes.HasPrefix(start, []byte(markGzip)) && !bytes.HasPrefix(start, []byte("PK\x03\x04")) {
		return nil
	}
	key := maphash.Bytes(p.seed, w)
	if p.seen[key] {
		return nil
	}
	if len(p.seen) < maxSeen {
		p.seen[key] = true
	}
	if p.derive -= len(w); p.derive < 0 {
		return &ErrUnscannable{"it expands without end"}
	}
	if !readable {
		out := enc(p.words[depth][:0], w)
		p.words[depth] = out
		return p.level(out, []span{{0, len(out)}}, all && s.to == len(t), depth+1, -1)
	}
	after := s.to
	for after < len(t) && t[after] == '=' {
		after++
	}
	from, to := max(0, s.from-beside), min(len(t), after+beside)
	out := append(p.words[depth][:0], t[from:s.from]...)
	out = append(enc(out, w), t[after:to]...)
	p.words[depth] = out
	return p.level(out, []span{{min(1, from), len(out)}}, all && to == len(t), depth+1, -1)
}

func printable(b []byte) bool {
	for _, c := range b {
		if c < '\t' || c >= 0x7f {
			return false
		}
	}
	return true
}

// appendHex skips the ends of lines, and an odd digit at the end.
func appendHex(dst, src []byte) []byte {
	var high byte
	half := false
	for _, c := range src {
		switch d := digit[c]; {
		case d > 15:
		case half:
			dst, half = append(dst, high<<4|d), false
		default:
			high, half = d, true
		}
	}
	return dst
}

// sextet is the value of a character of base64 in either alphabet.
var sextet = func() (s [256]byte) {
	for i := range s {
		s[i] = 0xff
	}
	for v, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/") {
		s[c] = byte(v)
	}
	s['-'], s['_'] = 62, 63
	return s
}()

// appendBase64 takes both alphabets, without padding, over the ends of lines.
func appendBase64(dst, src []byte) []byte {
	var bits uint32
	n := 0
	for _, c := range src {
		v := sextet[c]
		if v == 0xff {
			continue
		}
		bits = bits<<6 | uint32(v)
		if n += 6; n >= 8 {
			n -= 8
			dst = append(dst, byte(bits>>n))
		}
	}
	return dst
}

// long decodes a word of the body that is longer than a window, as far as it
// goes.
func (p *pass) long(from, depth int) error {
	end, kinds := word(p.body, from)
	p.skip = end
	w := p.body[from:end]
	if err := p.spend(len(w)); err != nil {
		return err
	}
	if kinds&inHex != 0 {
		if err := p.guessed(p.stream(&wordReader{w, appendHex, nil}, depth+1)); err != nil {
			return err
		}
	}
	return p.guessed(p.stream(&wordReader{w, appendBase64, nil}, depth+1))
}

// wordReader decodes a long word piece by piece.
type wordReader struct {
	src []byte
	enc func(dst, src []byte) []byte
	out []byte
}

func (r *wordReader) Read(b []byte) (int, error) {
	for len(r.out) == 0 {
		if len(r.src) == 0 {
			return 0, io.EOF
		}
		n, took := 0, 0
		// Whole groups of both encodings, whatever ends of lines are between.
		for took < len(r.src) && (n < 32<<10 || n%4 != 0) {
			if alphabet[r.src[took]] != 0 {
				n++
			}
			took++
		}
		r.out = r.enc(r.out[:0], r.src[:took])
		r.src = r.src[took:]
	}
	n := copy(b, r.out)
	r.out = r.out[n:]
	return n, nil
}
