package dlp

import (
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
)

// Lengths of a secret's value, in bytes.
const (
	// MinSecret is the shortest value that is looked for: shorter ones are
	// everywhere. Below wholeSecret it has to stand by itself.
	MinSecret   = 4
	wholeSecret = 8
	// Of a longer value the middle is looked for.
	maxSecret = 72
)

// secretPattern is one spelling of one secret, in lower case.
type secretPattern struct {
	text  string
	name  string
	alone bool // only between characters that are no part of a word
}

// secretPatterns gives the spellings of all values in which no decoder is
// needed to find them, whatever stands before and after them. A value that is
// written with escapes is found in the text without its escapes.
func secretPatterns(values map[string]string) []secretPattern {
	var out []secretPattern
	for _, name := range slices.Sorted(maps.Keys(values)) {
		v := strings.TrimSpace(values[name])
		if len(v) > maxSecret {
			at := (len(v) - maxSecret) / 2
			v = v[at : at+maxSecret]
		}
		switch {
		case len(v) < MinSecret:
			continue
		case len(v) < wholeSecret:
			out = append(out, secretPattern{strings.ToLower(v), name, true})
			continue
		}
		spellings := []string{v, strings.ReplaceAll(v, " ", "+"), hex.EncodeToString([]byte(v)), wide(v)}
		for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			spellings = append(spellings, aligned(v, 6, 3, enc.EncodeToString)...)
		}
		for _, enc := range []*base32.Encoding{base32.StdEncoding, base32.HexEncoding} {
			spellings = append(spellings, aligned(v, 5, 5, enc.WithPadding(base32.NoPadding).EncodeToString)...)
		}
		for i, s := range spellings {
			spellings[i] = lowered(s)
		}
		slices.Sort(spellings)
		for _, s := range slices.Compact(spellings) {
			out = append(out, secretPattern{s, name, false})
		}
	}
	return out
}

// lowered folds ASCII alone: other bytes have to stay as they are.
func lowered(s string) string {
	b := []byte(s)
	for i, c := range b {
		b[i] = lower(c)
	}
	return string(b)
}

// aligned gives the characters of an encoded v that are the same whatever stands
// around it, for each number of bytes before it in its group.
func aligned(v string, bits, group int, encode func([]byte) string) []string {
	var out []string
	for before := range group {
		s := encode(append(make([]byte, before), v...))
		from := (before*8 + bits - 1) / bits
		to := (before + len(v)) * 8 / bits
		out = append(out, s[from:to])
	}
	return out
}

// wide is v in UTF-16 of either order, as far as both have it in common.
func wide(v string) string {
	return strings.Join(strings.Split(v, ""), "\x00")
}
