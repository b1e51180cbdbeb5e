package dlp

import (
	"archive/zip"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"context"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"mime/quotedprintable"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/klauspost/compress/zstd"

	"github.com/bottle-tools/bottle/lib/policy"
)

const (
	own   = "Tr0ub4dor&3/x+y=z \"q\""
	short = "hunter2"
	// A key that gitleaks' rule github-pat is about.
	pat = "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a"
)

func scan(t testing.TB, text []byte, o Options) string {
	t.Helper()
	s := New(map[string]string{"OWN": own, "SHORT": short}, NoisyRules)
	f, err := s.Scan(t.Context(), text, o)
	if err != nil {
		t.Fatalf("%.100q: %v", text, err)
	}
	if f == nil {
		return ""
	}
	return f.Rule
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, _ = w.Write(b)
	w.Close()
	return out.Bytes()
}

func each(s, format string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, format, s[i])
	}
	return b.String()
}

func wide16(s string, big bool) string {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		if big {
			b = append(b, byte(u>>8), byte(u))
		} else {
			b = append(b, byte(u), byte(u>>8))
		}
	}
	return string(b)
}

// lines breaks s as MIME does.
func lines(s string, n int, end string) string {
	var b strings.Builder
	for len(s) > n {
		b.WriteString(s[:n] + end)
		s = s[n:]
	}
	return b.String() + s
}

func quoted(s string) string {
	var b strings.Builder
	w := quotedprintable.NewWriter(&b)
	_, _ = io.WriteString(w, s)
	w.Close()
	return "Content-Transfer-Encoding: quoted-printable\r\n\r\n" + strings.ReplaceAll(b.String(), "_", "=5F")
}

func zipped(s string) string {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	f, _ := w.Create("x")
	_, _ = io.WriteString(f, s)
	w.Close()
	return b.String()
}

func asJSON(s string) string {
	b, _ := json.Marshal(map[string]string{"text": s})
	return string(b)
}

// encodings are what a program may do with a text before it sends it.
var encodings = map[string]func(string) string{
	"as it is":         func(s string) string { return s },
	"in a word":        func(s string) string { return "x=" + s + ";" },
	"JSON":             asJSON,
	"JSON in JSON":     func(s string) string { return asJSON(asJSON(s)) },
	"unicode escapes":  func(s string) string { return each(s, `\u%04x`) },
	"unicode braces":   func(s string) string { return each(s, `\u{%x}`) },
	"shell escapes":    func(s string) string { return each(s, `\x%02x`) },
	"octal escapes":    func(s string) string { return each(s, `\%03o`) },
	"code points":      func(s string) string { return each(s, "U+%04X ") },
	"query":            url.QueryEscape,
	"path":             url.PathEscape,
	"percent":          func(s string) string { return each(s, "%%%02X") },
	"percent twice":    func(s string) string { return url.QueryEscape(each(s, "%%%02X")) },
	"HTML":             html.EscapeString,
	"decimal entities": func(s string) string { return each(s, "&#%d;") },
	"hex entities":     func(s string) string { return each(s, "&#x%X;") },
	"base64":           func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) },
	"base64url":        func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) },
	"base64 behind 1":  func(s string) string { return base64.StdEncoding.EncodeToString([]byte("x" + s + "yz")) },
	"base64 behind 2":  func(s string) string { return base64.StdEncoding.EncodeToString([]byte("xy" + s + "z")) },
	"base64 twice": func(s string) string {
		b := base64.StdEncoding
		return b.EncodeToString([]byte(b.EncodeToString([]byte(s))))
	},
	"base64 in lines": func(s string) string {
		return lines(base64.StdEncoding.EncodeToString([]byte(strings.Repeat("line ", 30)+s)), 76, "\r\n")
	},
	"base64 lines JSON": func(s string) string {
		return asJSON(lines(base64.StdEncoding.EncodeToString([]byte(strings.Repeat("line ", 30)+s)), 76, "\n"))
	},
	"basic credentials": func(s string) string {
		return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("me:"+s))
	},
	"hex":           func(s string) string { return hex.EncodeToString([]byte(s)) },
	"hex in a word": func(s string) string { return "x-" + hex.EncodeToString([]byte(s)) + "-y" },
	"folded letters": func(s string) string {
		return strings.ReplaceAll(strings.ReplaceAll(s, "k", "\u212a"), "s", "\u017f")
	},
	"HEX":       func(s string) string { return strings.ToUpper(hex.EncodeToString([]byte(s))) },
	"UTF-16":    func(s string) string { return wide16(s, false) },
	"UTF-16 BE": func(s string) string { return wide16(s, true) },
	"UTF-16 in base64": func(s string) string {
		return base64.StdEncoding.EncodeToString([]byte(wide16(s+strings.Repeat(" and more text", 20), false)))
	},
	"quoted-printable": quoted,
	"gzip in a part": func(s string) string {
		return "--b\r\nContent-Type: application/gzip\r\n\r\n" + string(gzipped([]byte(s))) + "\r\n--b--\r\n"
	},
	"gzip in base64": func(s string) string {
		return base64.StdEncoding.EncodeToString(gzipped([]byte(strings.Repeat(s+"\n", 3))))
	},
	"gzip, base64, JSON": func(s string) string {
		return asJSON("x " + base64.StdEncoding.EncodeToString(gzipped([]byte(asJSON(s)))) + " y")
	},
	"zip":                    zipped,
	"zip in base64":          func(s string) string { return base64.StdEncoding.EncodeToString([]byte(zipped(s))) },
	"base64 in a path, /":    func(s string) string { return "GET /" + base64.RawURLEncoding.EncodeToString([]byte(s)) + " HTTP" },
	"base64 in a path, /a/":  func(s string) string { return "GET /a/" + base64.RawURLEncoding.EncodeToString([]byte(s)) + " HTTP" },
	"base64 in a path, /ab/": func(s string) string { return "GET /ab/" + base64.RawURLEncoding.EncodeToString([]byte(s)) + " HTTP" },
	"base64 in a path, /v1/up-load/": func(s string) string {
		return "GET /v1/up-load/" + base64.RawURLEncoding.EncodeToString([]byte(s)) + " HTTP"
	},
	"base64 in a path, /files/x_": func(s string) string {
		return "GET /files/x_" + base64.RawURLEncoding.EncodeToString([]byte(s)) + " HTTP"
	},
	"percent then base64": func(s string) string { return each(base64.StdEncoding.EncodeToString([]byte(s)), "%%%02x") },
}

func TestEncodings(t *testing.T) {
	for name, encode := range encodings {
		t.Run(name, func(t *testing.T) {
			text := encode(own)
			if got := scan(t, []byte(text), Options{}); got != "secret:OWN" {
				t.Errorf("the bottle's own secret in %.200q: %q", text, got)
			}
			text = encode("token " + pat + " end")
			if got := scan(t, []byte(text), Options{}); got != "github-pat" {
				t.Errorf("a key in %.200q: %q", text, got)
			}
			if got := scan(t, []byte(encode("nothing of value, 0123456789 times")), Options{}); got != "" {
				t.Errorf("%s: %s in a harmless text", name, got)
			}
		})
	}
}

// The own values are also found where no decoder follows: in base32, and after
// letters have changed their case.
func TestOwnSecret(t *testing.T) {
	for name, text := range map[string]string{
		"lower case":                strings.ToLower(own),
		"base32":                    base32.StdEncoding.EncodeToString([]byte("a" + own + "b")),
		"base32hex":                 strings.ToLower(base32.HexEncoding.EncodeToString([]byte("abc" + own))),
		"base64 lower, as in names": strings.ToLower(base64.RawURLEncoding.EncodeToString([]byte("ab" + own + "c"))),
	} {
		if got := scan(t, []byte("xx"+text), Options{}); got != "secret:OWN" {
			t.Errorf("%s: %q: %q", name, text, got)
		}
	}
	for text, want := range map[string]string{
		"my hunter2!": "secret:SHORT", "HUNTER2": "secret:SHORT", "x-hunter2-y": "secret:SHORT", "%68unter2": "secret:SHORT",
		"hunter24": "", "thunter2": "", "hunter_2": "",
	} {
		if got := scan(t, []byte(text), Options{}); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	// Characters that case folding takes for letters: the long s, the Kelvin sign.
	folding := New(map[string]string{"K": "skeleton-key"}, NoisyRules)
	for _, text := range []string{"\u017fkeleton-\u212aey", "a discord\u017f " + strings.ReplaceAll("sk_live_0123456789abcdefABCD", "k", "\u212a") + " b"} {
		if f, err := folding.Scan(t.Context(), []byte(text), Options{}); err != nil || f == nil {
			t.Errorf("%q: %v %v", text, f, err)
		}
	}
	long := ""
	for i := range 250 {
		long += fmt.Sprintf("%04x", i*i)
	}
	s := New(map[string]string{"LONG": long, "TINY": "abc", "EMPTY": ""}, nil)
	for text, want := range map[string]bool{long: true, long[200:800]: true, long[:100]: false, "abc": false} {
		if f, err := s.Scan(t.Context(), []byte(text), Options{}); err != nil || (f != nil && f.Rule == OwnRule("LONG")) != want {
			t.Errorf("%.20q…: %v %v", text, f, err)
		}
	}
}

// A window, or the beginning of one, is no place to hide.
func TestWindows(t *testing.T) {
	filler := []byte(strings.Repeat("the quick brown fox\n", 3*window/20))
	b64 := []byte(base64.StdEncoding.EncodeToString([]byte(pat + " and some text")))
	for _, what := range [][]byte{[]byte(own), []byte(" " + pat + " "), append([]byte(" "), b64...)} {
		for _, at := range []int{window - 1000, window - len(what), window - len(what)/2, window - 1, window, window + 1, window + ahead - 10, 2*window - 7, 2*window + ahead} {
			text := slices.Concat(filler[:at], what, filler[at:])
			if got := scan(t, text, Options{}); got == "" {
				t.Errorf("nothing is found at %d", at)
			}
			if got := scan(t, gzipped(text), Options{Encodings: []string{"gzip"}}); got == "" {
				t.Errorf("nothing is found at %d behind gzip", at)
			}
		}
	}
	// An upload in base64 that begins anywhere in a window and ends in another.
	body := base64.StdEncoding.EncodeToString(slices.Concat(sources(t, 150<<10), []byte(" "+pat+" "), sources(t, 1000)))
	for _, at := range []int{window - 170<<10, window - 100<<10, window - 20<<10, window - 300, window + 10<<10} {
		for shift := range 4 {
			text := []byte(string(filler[:at+shift]) + `"` + body + `"` + string(filler))
			if got := scan(t, text, Options{}); got != "github-pat" {
				t.Errorf("%q in base64 from %d on", got, at+shift)
			}
			if got := scan(t, gzipped(text), Options{Encodings: []string{"gzip"}}); got != "github-pat" {
				t.Errorf("%q in base64 from %d on, behind gzip", got, at+shift)
			}
		}
	}
	// An upload in base64, longer than a window, compressed and not.
	noise := sources(t, 900<<10)
	for at := range 5 {
		text := slices.Concat(noise[:at*150<<10], []byte(" "+pat+" "), noise[at*150<<10:])
		for _, b := range [][]byte{text, gzipped(text)} {
			body = asJSON("x" + strings.Repeat(" ", at+1) + base64.StdEncoding.EncodeToString(b))
			if got := scan(t, []byte(body), Options{}); got != "github-pat" {
				t.Errorf("%d: %q in %d bytes of base64", at, got, len(body))
			}
		}
		if got := scan(t, []byte(hex.EncodeToString(text)), Options{}); got != "github-pat" {
			t.Errorf("%d: %q in hex", at, got)
		}
	}
}

func TestContentEncoding(t *testing.T) {
	deflated := func(b []byte) []byte {
		var out bytes.Buffer
		w, _ := flate.NewWriter(&out, 9)
		_, _ = w.Write(b)
		w.Close()
		return out.Bytes()
	}
	zlibbed := func(b []byte) []byte {
		var out bytes.Buffer
		w := zlib.NewWriter(&out)
		_, _ = w.Write(b)
		w.Close()
		return out.Bytes()
	}
	zstded := func(b []byte) []byte {
		e, _ := zstd.NewWriter(nil)
		return e.EncodeAll(b, nil)
	}
	commented := func(s string) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		w.Comment = s
		io.WriteString(w, "nothing")
		w.Close()
		return b.Bytes()
	}
	text := []byte(asJSON("a text with " + pat + " in it"))
	for _, c := range []struct {
		names []string
		body  []byte
	}{
		{[]string{"identity"}, text},
		{[]string{"gzip"}, gzipped(text)},
		{[]string{"X-GZIP"}, gzipped(text)},
		{[]string{"deflate"}, zlibbed(text)},
		{[]string{"deflate"}, deflated(text)},
		{[]string{"zstd"}, zstded(text)},
		{[]string{"gzip, zstd"}, zstded(gzipped(text))},
		{[]string{"gzip", "gzip"}, gzipped(gzipped(text))},
		{[]string{"gzip"}, append(gzipped([]byte("nothing")), gzipped(text)...)},
		// Beside the text, where a coding has room for more.
		{[]string{"gzip"}, commented(pat)},
		{[]string{"gzip"}, commented(base64.StdEncoding.EncodeToString([]byte("it is " + pat)))},
		{[]string{"zstd"}, append([]byte{0x50, 0x2a, 0x4d, 0x18, byte(len(pat)), 0, 0, 0}, pat+string(zstded([]byte("nothing")))...)},
		{[]string{"deflate"}, append(zlibbed([]byte("nothing")), pat...)},
	} {
		if got := scan(t, c.body, Options{Encodings: c.names}); got != "github-pat" {
			t.Errorf("%v: %q", c.names, got)
		}
	}
	harmless := []byte("no key at all")
	for _, c := range []struct {
		names []string
		body  []byte
	}{
		{[]string{"br"}, harmless}, {[]string{"gzip, aes128gcm"}, gzipped(harmless)}, {[]string{"gzip"}, harmless},
		{[]string{"gzip"}, gzipped(harmless)[:20]}, {[]string{"zstd"}, harmless}, {[]string{"deflate"}, []byte{0xff, 0xff}},
		{[]string{"gzip"}, append(gzipped(harmless), "tail"...)},
		{[]string{"deflate"}, append(zlibbed(harmless), "tail"...)}, {[]string{"deflate"}, append(deflated(harmless), "tail"...)}, {[]string{"gzip,gzip,gzip,gzip"}, harmless},
	} {
		_, err := New(nil, nil).Scan(t.Context(), c.body, Options{Encodings: c.names})
		if _, ok := errors.AsType[*ErrUnscannable](err); !ok {
			t.Errorf("%v, %q: %v", c.names, c.body, err)
		}
	}
}

// What expands without end is refused, in bounded time and memory.
func TestBombs(t *testing.T) {
	bomb := func(n int) []byte {
		var out bytes.Buffer
		w := gzip.NewWriter(&out)
		zeros := make([]byte, 1<<20)
		for range n {
			_, _ = w.Write(zeros)
		}
		w.Close()
		return out.Bytes()
	}
	once := bomb(200)
	var many bytes.Buffer
	for range 300 {
		many.Write(bomb(1))
	}
	for name, c := range map[string]struct {
		body      []byte
		encodings []string
	}{
		"gzip":      {once, []string{"gzip"}},
		"in a part": {once, nil},
		"in base64": {[]byte(base64.StdEncoding.EncodeToString(once)), nil},
		"nested":    {gzipped(once), []string{"gzip"}},
		"many":      {many.Bytes(), nil},
	} {
		_, err := New(nil, nil).Scan(t.Context(), c.body, Options{Encodings: c.encodings})
		if _, ok := errors.AsType[*ErrUnscannable](err); !ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Work is counted, so that a text that is made to be slow is refused and not
// looked at for minutes.
func TestSlow(t *testing.T) {
	for name, text := range map[string]string{
		"curl":      strings.Repeat("curl ", 500_000),
		"no secret": strings.Repeat(`discord_key = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" `, 100_000),
	} {
		_, err := New(nil, nil).Scan(t.Context(), []byte(text), Options{})
		if _, ok := errors.AsType[*ErrUnscannable](err); !ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(nil, nil).Scan(ctx, []byte("x"), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a scan that nobody waits for: %v", err)
	}
}

func TestAllow(t *testing.T) {
	text := []byte(pat + " and " + own)
	for _, c := range []struct{ allow, want string }{
		{"github-pat", "secret:OWN"}, {"secret:OWN", "github-pat"},
	} {
		if got := scan(t, text, Options{Allow: func(r string) bool { return r == c.allow }}); got != c.want {
			t.Errorf("%q allowed: %q, want %q", c.allow, got, c.want)
		}
	}
}

// Manifests are checked by a list of names that stands elsewhere.
func TestRuleNames(t *testing.T) {
	ids, err := RuleIDs()
	if err != nil || !slices.Equal(ids, policy.DLPRules()) {
		t.Errorf("lib/policy has other names of rules than gitleaks (%v): %v", err, ids)
	}
	for _, id := range NoisyRules {
		if !slices.Contains(ids, id) {
			t.Errorf("there is no rule %s", id)
		}
	}
}

// Scans at one time do not mix.
func TestParallel(t *testing.T) {
	s := New(map[string]string{"OWN": own}, NoisyRules)
	src := conversation(t, sources(t, 200<<10))
	for i := range 8 {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			want := []string{"", "github-pat", "secret:OWN"}[i%3]
			text := slices.Concat(src, []byte([]string{"", " " + pat + " ", own}[i%3]))
			f, err := s.Scan(t.Context(), text, Options{Allow: func(r string) bool { return r != "github-pat" && r != "secret:OWN" }})
			if err != nil || (f != nil) != (want != "") || f != nil && f.Rule != want {
				t.Errorf("%v %v, want %q", f, err, want)
			}
		})
	}
}

func FuzzScan(f *testing.F) {
	for _, encode := range encodings {
		f.Add([]byte(encode(own+" "+pat)), "")
	}
	f.Add(gzipped([]byte(pat)), "gzip")
	f.Add(gzipped(gzipped([]byte(strings.Repeat("a", 1000)))), "gzip, deflate")
	s := New(map[string]string{"OWN": own}, nil)
	f.Fuzz(func(t *testing.T, text []byte, encoding string) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		was := bytes.Clone(text)
		err := s.Each(ctx, text, Options{Encodings: []string{encoding}}, func(Finding) bool { return true })
		if errors.Is(err, context.DeadlineExceeded) {
			t.Fatal("a scan that takes 20 seconds")
		}
		if !bytes.Equal(text, was) {
			t.Fatal("a scan changes what it looks at")
		}
		// Whatever stands before and after it, a key of its own line is found.
		if encoding == "" && err == nil && len(text) < 4096 {
			found := false
			err := s.Each(ctx, slices.Concat(text, []byte("\n"+own+"\n"), text), Options{}, func(f Finding) bool {
				found = found || f.Rule == "secret:OWN"
				return true
			})
			if err == nil && !found {
				t.Fatal("the own secret is missed")
			}
		}
	})
}

// TestCompressible: a log compresses twenty times and more, and is no bomb.
func TestCompressible(t *testing.T) {
	var b bytes.Buffer
	for i := range 300_000 {
		fmt.Fprintf(&b, `{"time":"2026-11-25T12:%02d:%02d","level":"info","msg":"request served","status":200,"path":"/a/b/c"}`+"\n", i/60%60, i%60)
	}
	fmt.Fprintln(&b, pat)
	packed := gzipped(b.Bytes())
	if ratio := b.Len() / len(packed); ratio < 15 {
		t.Fatalf("compresses %d times only", ratio)
	}
	if got := scan(t, packed, Options{Encodings: []string{"gzip"}}); got != "github-pat" {
		t.Errorf("%q", got)
	}
}
