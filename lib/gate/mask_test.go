package gate

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"math/rand/v2"
	"net/url"
	"strings"
	"testing"
)

// writings are ways to write a value down, and how to read it again.
var writings = map[string]struct {
	write func(string) string
	read  func(string) string
}{
	"as it is":       {func(s string) string { return s }, func(s string) string { return s }},
	"UTF-16, little": {func(s string) string { return each("%c\x00")(s)[:2*len(s)-1] }, unwide},
	"UTF-16, big":    {func(s string) string { return each("\x00%c")(s)[1:] }, unwide},
	"hex":            {func(s string) string { return hex.EncodeToString([]byte(s)) }, unhex},
	"HEX":            {func(s string) string { return strings.ToUpper(hex.EncodeToString([]byte(s))) }, unhex},
	"base64":         {func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }, unbase64},
	"base64 of user and password": {
		func(s string) string { return base64.StdEncoding.EncodeToString([]byte("user:" + s + "@")) }, unbase64},
	"base64 one further": {
		func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte("users:" + s + "?")) }, unbase64},
	"base64url":              {func(s string) string { return base64.URLEncoding.EncodeToString([]byte(s)) }, unbase64},
	"a query":                {url.QueryEscape, unquery},
	"a path":                 {url.PathEscape, unpath},
	"percent, all of it":     {each("%%%02X"), unpath},
	"percent, small letters": {each("%%%02x"), unpath},
	"percent, here and there": {func(s string) string {
		return each("%%%02x")(s[:1]) + s[1:4] + each("%%%02X")(s[4:6]) + s[6:]
	}, unpath},
	"percent twice":     {func(s string) string { return url.QueryEscape(each("%%%02X")(s)) }, func(s string) string { return unquery(unquery(s)) }},
	"base64 in a query": {func(s string) string { return url.QueryEscape(base64.StdEncoding.EncodeToString([]byte(s))) }, func(s string) string { return unbase64(unquery(s)) }},
	"JSON":              {func(s string) string { b, _ := json.Marshal(s); return string(b[1 : len(b)-1]) }, unjson},
	"JSON, all of it":   {each(`\u%04x`), unjson},
	"JSON, capitals":    {each(`\u%04X`), unjson},
	"JSON with escaped slashes": {func(s string) string {
		b, _ := json.Marshal(s)
		return strings.ReplaceAll(string(b[1:len(b)-1]), "/", `\/`)
	}, unjson},
	"JSON in JSON":              {func(s string) string { b, _ := json.Marshal(each(`\u%04x`)(s)); return string(b[1 : len(b)-1]) }, func(s string) string { return unjson(unjson(s)) }},
	"JSON in a query":           {func(s string) string { return url.QueryEscape(each(`\u%04x`)(s)) }, func(s string) string { return unjson(unquery(s)) }},
	"a script's string":         {each(`\x%02x`), func(s string) string { return unjson(strings.ReplaceAll(s, `\x`, `\u00`)) }},
	"HTML":                      {html.EscapeString, html.UnescapeString},
	"HTML, decimal":             {each("&#%d;"), html.UnescapeString},
	"HTML, hexadecimal":         {each("&#x%02x;"), html.UnescapeString},
	"HTML, with leading zeroes": {each("&#x%05X;"), html.UnescapeString},
	"a query of HTML's making":  {func(s string) string { return html.EscapeString(url.QueryEscape(s)) }, func(s string) string { return unquery(html.UnescapeString(s)) }},
}

func each(format string) func(string) string {
	return func(s string) string {
		var b strings.Builder
		for i := range len(s) {
			fmt.Fprintf(&b, format, s[i])
		}
		return b.String()
	}
}

func unwide(s string) string  { return strings.ReplaceAll(s, "\x00", "") }
func unhex(s string) string   { b, _ := hex.DecodeString(s); return string(b) }
func unpath(s string) string  { u, _ := url.PathUnescape(s); return u }
func unquery(s string) string { u, _ := url.QueryUnescape(s); return u }
func unjson(s string) string  { var u string; _ = json.Unmarshal([]byte(`"`+s+`"`), &u); return u }
func unbase64(s string) string {
	s = strings.TrimRight(s, "=")
	b, err := base64.RawStdEncoding.DecodeString(s)
	if err != nil {
		b, _ = base64.RawURLEncoding.DecodeString(s)
	}
	return string(b)
}

// TestMaskWritings: a value is found in any usual writing, wherever the stream
// is cut, and nothing else is touched.
func TestMaskWritings(t *testing.T) {
	for _, value := range []string{secretValue, `p&ss "w<o>rd'\n/z`, "AKIAIOSFODNN7EXAMPLE", strings.Repeat("x", 40), "ghp_0123456789abcdefghijklmnopqrstuvwxyz"} {
		f := newFinder([]string{value})
		for name, w := range writings {
			written := w.write(value)
			if back := w.read(written); !strings.Contains(back, value) {
				t.Fatalf("%s: this test's own writing %q reads as %q", name, written, back)
			}
			in := `data: {"k":"` + written + "\"}\n\n"
			for step := 1; step <= len(in); step += 1 + step/4 {
				r := newMaskReader(&stepReader{s: in, step: step}, f)
				b, err := io.ReadAll(r)
				if err != nil {
					t.Fatal(err)
				}
				out := string(b)
				middle, ok := strings.CutPrefix(out, `data: {"k":"`)
				middle, ok2 := strings.CutSuffix(middle, "\"}\n\n")
				if !ok || !ok2 || len(middle) != len(written) || !r.found {
					t.Errorf("%s of %q by %d: %q, found: %v", name, value, step, out, r.found)
					break
				}
				// Base64 shares a character with its neighbours at either end.
				if left := strings.Trim(middle, "*="); strings.Contains(name, "base64") && strings.Count(middle, "*") < len(written)*3/5 || !strings.Contains(name, "base64") && left != "" {
					t.Errorf("%s of %q by %d: %q of %q is left", name, value, step, left, written)
					break
				}
			}
		}
	}
}

// TestMaskOtherLetters: a server that changes the letters of a key does not give
// it away.
func TestMaskOtherLetters(t *testing.T) {
	for _, value := range []string{"0123456789abcdef", "0123456789ABCDEF", "AbCdEf0123"} {
		s := scan{finder: newFinder([]string{value})}
		for _, change := range []func(string) string{strings.ToLower, strings.ToUpper} {
			b := []byte("no key " + change(value) + ".")
			if !s.mask(b) || string(b) != "no key "+strings.Repeat("*", len(value))+"." {
				t.Errorf("%s: %s", value, b)
			}
		}
	}
}

// TestMaskLeavesTheRest: what is no value passes byte for byte, whatever escapes
// it holds and however it is cut.
func TestMaskLeavesTheRest(t *testing.T) {
	f := newFinder([]string{secretValue, "another-value"})
	pieces := []string{"%", "%2", "%73", "\\", `\u`, `\u00`, `\u0073`, `\\`, `\"`, "&", "&#", "&#1", "&#115;", "&amp;", "&am", "s", "sk-real", "sk-", "another", "x", "\n", " ", "\x00", "ü"}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var b strings.Builder
		for range rnd.IntN(30) {
			b.WriteString(pieces[rnd.IntN(len(pieces))])
		}
		in := b.String()
		r := newMaskReader(&stepReader{s: in, step: 1 + rnd.IntN(9)}, f)
		if out, err := io.ReadAll(r); err != nil || string(out) != in || r.found {
			t.Fatalf("%q became %q (found: %v, %v)", in, out, r.found, err)
		}
	}
}

// TestMaskDoesNotWait: an event goes out when it is sent, also where it holds
// what could begin a value.
func TestMaskDoesNotWait(t *testing.T) {
	s := scan{finder: newFinder([]string{secretValue})}
	for _, event := range []string{
		"data: {\"delta\":\"sk-real-\"}\n\n", "data: s\n\n", "data: 100%\n\n", "data: \\u0073k\r\n\r\n", "event: x\ndata: &#115\n\n", "{\"a\":\"c2st\"}\n", ": ping\n\n",
	} {
		if n := s.held([]byte(event)); n != 0 {
			t.Errorf("%q waits with %d bytes", event, n)
		}
	}
	for text, want := range map[string]int{
		"x sk-rea": 6, `x \u0073k`: 7, `x \u0073k%2`: 9, "x %7": 2, `x \`: 1, "x &#11": 4, "x c2st": 4, "x %2573": 5, "x %257": 4, secretValue: 0,
	} {
		if n := s.held([]byte(text)); n != want {
			t.Errorf("%q waits with %d bytes, want %d", text, n, want)
		}
	}
}

// FuzzMask: no cut of a stream gives away what another one hides.
func FuzzMask(f *testing.F) {
	for _, w := range writings {
		f.Add("a"+w.write(secretValue)+"b", 3)
	}
	finder := newFinder([]string{secretValue})
	f.Fuzz(func(t *testing.T, in string, step int) {
		if step < 1 || step > 1<<16 {
			return
		}
		whole, err1 := io.ReadAll(newMaskReader(&stepReader{s: in, step: 1 << 20}, finder))
		cut, err2 := io.ReadAll(newMaskReader(&stepReader{s: in, step: step}, finder))
		if err1 != nil || err2 != nil || len(whole) != len(in) || len(cut) != len(in) {
			t.Fatalf("%v %v %d %d", err1, err2, len(whole), len(cut))
		}
		for _, out := range []string{string(whole), string(cut)} {
			if finder.contains(out) && !strings.Contains(in, "*") {
				t.Fatalf("%q is left of %q", out, in)
			}
		}
	})
}
