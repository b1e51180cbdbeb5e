package dlp

import (
	"bytes"
	"unicode/utf16"
	"unicode/utf8"
)

// span is a part of a text, from up to but not including to.
type span struct{ from, to int }

// around is how much of the unchanged text beside a decoded part is looked at
// together with it.
const around = 512

// unescape takes the escapes out of t: backslashes as JSON, shells and
// programming languages write them, percent signs, entities of HTML and XML,
// U+0041, quoted-printable where asked to, and the two characters that case
// folding takes for ASCII letters: expressions follow it, and literals do not. It appends to out and returns
// it, with the parts of it that are near a change; none if nothing changed. What
// is no escape stays as it is.
func unescape(out, t []byte, quoted bool) ([]byte, []span) {
	if bytes.IndexByte(t, '\\') < 0 && bytes.IndexByte(t, '%') < 0 && bytes.IndexByte(t, '&') < 0 &&
		!quoted && !bytes.Contains(t, []byte("U+")) && !bytes.Contains(t, kelvin) && !bytes.Contains(t, longS) {
		return out, nil
	}
	var changed []span
	copied := 0
	for i := 0; i < len(t); {
		if !escapes[t[i]] {
			i++
			continue
		}
		b, n := escape(t[i:], quoted)
		if n == 0 {
			i++
			continue
		}
		out = append(append(out, t[copied:i]...), b...)
		i += n
		copied = i
		if last := len(changed) - 1; last >= 0 && len(out)-around <= changed[last].to {
			changed[last].to = len(out) + around
		} else {
			changed = append(changed, span{max(0, len(out)-around), len(out) + around})
		}
	}
	out = append(out, t[copied:]...)
	if last := len(changed) - 1; last >= 0 {
		changed[last].to = min(changed[last].to, len(out))
	}
	return out, changed
}

// escapes are the bytes that an escape begins with.
var escapes = [256]bool{'%': true, '\\': true, '&': true, '=': true, 'U': true, 0xe2: true, 0xc5: true}

var (
	kelvin = []byte("\u212a")
	longS  = []byte("\u017f")
)

// escape decodes what t begins with: n bytes that stand for b, or 0 for none.
func escape(t []byte, quoted bool) (b []byte, n int) {
	switch t[0] {
	case '%':
		if c, ok := hexByte(t, 1); ok {
			return single[c][:], 3
		}
	case '\\':
		return backslash(t)
	case '&':
		return entity(t)
	case '=':
		switch {
		case !quoted:
		case bytes.HasPrefix(t, []byte("=\r\n")):
			return nil, 3
		case bytes.HasPrefix(t, []byte("=\n")):
			return nil, 2
		default:
			if c, ok := hexByte(t, 1); ok {
				return single[c][:], 3
			}
		}
	case kelvin[0]:
		if bytes.HasPrefix(t, kelvin) {
			return single['k'][:], len(kelvin)
		}
	case longS[0]:
		if bytes.HasPrefix(t, longS) {
			return single['s'][:], len(longS)
		}
	case 'U':
		if len(t) > 1 && t[1] == '+' {
			if r, n := hexRune(t, 2, 4, 4); n > 0 {
				if n < len(t) && (t[n] == ' ' || t[n] == '\n' || t[n] == '\t') {
					n++
				}
				return utf8.AppendRune(nil, r), n
			}
		}
	}
	return nil, 0
}

// single holds each byte as a slice, so that decoding allocates nothing.
var single = func() (s [256][1]byte) {
	for i := range s {
		s[i][0] = byte(i)
	}
	return s
}()

func backslash(t []byte) ([]byte, int) {
	if len(t) < 2 {
		return nil, 0
	}
	one := func(c byte) ([]byte, int) { return single[c][:], 2 }
	switch c := t[1]; c {
	case '"', '\'', '`', '/', '\\':
		return one(c)
	case 'n':
		return one('\n')
	case 'r':
		return one('\r')
	case 't':
		return one('\t')
	case 'b':
		return one('\b')
	case 'f':
		return one('\f')
	case 'x', 'X':
		if v, ok := hexByte(t, 2); ok {
			return single[v][:], 4
		}
	case 'u', 'U':
		return unicodeEscape(t)
	case '0', '1', '2', '3':
		if len(t) >= 4 && isOctal(t[2]) && isOctal(t[3]) {
			return single[(c-'0')<<6|(t[2]-'0')<<3|(t[3]-'0')][:], 4
		}
	}
	return nil, 0
}

func isOctal(c byte) bool { return c >= '0' && c <= '7' }

func unicodeEscape(t []byte) ([]byte, int) {
	if len(t) > 2 && t[2] == '{' {
		r, n := hexRune(t, 3, 1, 6)
		if n > 0 && n < len(t) && t[n] == '}' {
			return utf8.AppendRune(nil, r), n + 1
		}
		return nil, 0
	}
	if t[1] == 'U' {
		if r, n := hexRune(t, 2, 8, 8); n > 0 {
			return utf8.AppendRune(nil, r), n
		}
	}
	r, n := hexRune(t, 2, 4, 4)
	if n == 0 {
		return nil, 0
	}
	if r < utf8.RuneSelf {
		return single[r][:], n
	}
	if utf16.IsSurrogate(r) && len(t) >= n+6 && t[n] == '\\' && t[n+1] == 'u' {
		if low, m := hexRune(t[n:], 2, 4, 4); m > 0 {
			return utf8.AppendRune(nil, utf16.DecodeRune(r, low)), n + m
		}
	}
	return utf8.AppendRune(nil, r), n
}

// entities are the named ones that stand for ASCII.
var entities = map[string]byte{
	"amp": '&', "lt": '<', "gt": '>', "quot": '"', "apos": '\'', "nbsp": ' ', "colon": ':', "equals": '=', "sol": '/',
	"bsol": '\\', "plus": '+', "lowbar": '_', "hyphen": '-', "dash": '-', "period": '.', "comma": ',', "commat": '@',
	"num": '#', "excl": '!', "dollar": '$', "percnt": '%', "semi": ';', "lpar": '(', "rpar": ')', "ast": '*',
	"lsqb": '[', "rsqb": ']', "lcub": '{', "rcub": '}', "verbar": '|', "quest": '?', "Hat": '^', "grave": '`',
	"Tab": '\t', "NewLine": '\n',
}

const maxEntity = 12

func entity(t []byte) ([]byte, int) {
	end := bytes.IndexByte(t[:min(len(t), maxEntity)], ';')
	if end < 2 {
		return nil, 0
	}
	name := t[1:end]
	if c, ok := entities[string(name)]; ok {
		return single[c][:], end + 1
	}
	if name[0] != '#' || len(name) < 2 {
		return nil, 0
	}
	var r rune
	if name[1] == 'x' || name[1] == 'X' {
		v, n := hexRune(name, 2, 1, 6)
		if n != len(name) {
			return nil, 0
		}
		r = v
	} else {
		for _, c := range name[1:] {
			if c < '0' || c > '9' {
				return nil, 0
			}
			r = r*10 + rune(c-'0')
		}
	}
	return utf8.AppendRune(nil, r), end + 1
}

// hexByte reads two hexadecimal digits.
func hexByte(t []byte, at int) (byte, bool) {
	if len(t) < at+2 {
		return 0, false
	}
	a, b := digit[t[at]], digit[t[at+1]]
	return a<<4 | b&15, a|b < 16
}

// hexRune reads from least to most digits at t[at:] and gives the place behind
// them; 0 if there are too few.
func hexRune(t []byte, at, least, most int) (r rune, end int) {
	for end = at; end < len(t) && end < at+most && digit[t[end]] < 16; end++ {
		r = r<<4 | rune(digit[t[end]])
	}
	if end < at+least {
		return 0, 0
	}
	return r, end
}

// digit is the value of a hexadecimal digit, 0xff for others.
var digit = func() (d [256]byte) {
	for i := range d {
		switch c := byte(i); {
		case c >= '0' && c <= '9':
			d[i] = c - '0'
		case c >= 'a' && c <= 'f':
			d[i] = c - 'a' + 10
		case c >= 'A' && c <= 'F':
			d[i] = c - 'A' + 10
		default:
			d[i] = 0xff
		}
	}
	return d
}()
