// Package gitleaks holds lib/dlp against gitleaks' own detector: the same
// findings in the same text, and nothing missed that gitleaks finds behind an
// encoding.
package gitleaks

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp/syntax"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/zricethezav/gitleaks/v8/cmd/generate/config/utils"
	"github.com/zricethezav/gitleaks/v8/config"
	"github.com/zricethezav/gitleaks/v8/detect"

	"github.com/bottle-tools/bottle/lib/dlp"
)

var detector = sync.OnceValue(func() *detect.Detector {
	d, err := detect.NewDetectorDefaultConfig()
	if err != nil {
		panic(err)
	}
	// A comment of the guest's own must not switch anything off.
	d.IgnoreGitleaksAllow = true
	return d
})

type finding struct{ rule, secret string }

func (f finding) String() string { return f.rule + " " + fmt.Sprintf("%.60q", f.secret) }

// theirs are gitleaks' findings, decoded to a depth.
func theirs(text string, depth int) []finding {
	d := detector()
	d.MaxDecodeDepth = depth
	var out []finding
	for _, f := range d.DetectString(text) {
		out = append(out, finding{f.RuleID, f.Secret})
	}
	return sorted(out)
}

var scanner = dlp.New(nil, nil)

func ours(t testing.TB, text string, plain bool) []finding {
	t.Helper()
	var out []finding
	err := scanner.Each(context.Background(), []byte(text), dlp.Options{Plain: plain}, func(f dlp.Finding) bool {
		out = append(out, finding{f.Rule, string(f.Text)})
		return true
	})
	if err != nil {
		t.Fatalf("%.200q: %v", text, err)
	}
	return sorted(out)
}

func sorted(fs []finding) []finding {
	slices.SortFunc(fs, func(a, b finding) int { return strings.Compare(a.String()+a.secret, b.String()+b.secret) })
	return slices.Compact(fs)
}

// withoutCovered leaves generic findings out of what another rule has found,
// which gitleaks does in its report, line by line: here for the whole text.
func withoutCovered(fs []finding) []finding {
	return slices.DeleteFunc(slices.Clone(fs), func(f finding) bool {
		return strings.Contains(f.rule, "generic") && slices.ContainsFunc(fs, func(g finding) bool {
			return !strings.Contains(g.rule, "generic") && strings.Contains(g.secret, f.secret)
		})
	})
}

func compare(t *testing.T, what, text string) {
	t.Helper()
	a, b := withoutCovered(theirs(text, 0)), withoutCovered(ours(t, text, true))
	missed, more := minus(a, b), minus(b, a)
	if longest(text) > 1000 {
		// One rule looks for excuses anywhere on the line, which lib/dlp does not
		// where a line has no end.
		more = slices.DeleteFunc(more, func(f finding) bool { return f.rule == "generic-api-key" })
	}
	if len(missed)+len(more) > 0 {
		t.Errorf("%s: gitleaks alone finds\n\t%v\nand lib/dlp alone\n\t%v", what, missed, more)
	}
}

// longest is the length of the longest line.
func longest(text string) (n int) {
	for l := range strings.Lines(text) {
		n = max(n, len(l))
	}
	return n
}

func minus(a, b []finding) (out []finding) {
	for _, f := range a {
		if !slices.Contains(b, f) {
			out = append(out, f)
		}
	}
	return out
}

// positives are texts made after a rule's expression, in the surroundings that
// gitleaks' own tests put them in.
func positives(t *testing.T, r config.Rule) []string {
	if r.Regex == nil {
		return nil
	}
	var out []string
	re, rng := parse(t, r.Regex.String()), rand.New(rand.NewPCG(1, 2))
	for range 40 {
		s := generate(rng, re)
		keyword := ""
		if len(r.Keywords) > 0 {
			keyword = r.Keywords[0]
		}
		out = append(out, s, keyword+" = '"+s+"'\n", "x\n"+s+"\n"+keyword)
	}
	return out
}

// generate makes a match of an expression, of ASCII and of random choices that
// are the same in each run.
func generate(rng *rand.Rand, re *syntax.Regexp) string {
	switch re.Op {
	case syntax.OpLiteral:
		s := string(re.Rune)
		if re.Flags&syntax.FoldCase != 0 && rng.IntN(2) == 0 {
			s = strings.ToLower(s)
		}
		return s
	case syntax.OpCharClass:
		var set []rune
		for i := 0; i+1 < len(re.Rune); i += 2 {
			for r := max(re.Rune[i], 0x20); r <= min(re.Rune[i+1], 0x7e); r++ {
				set = append(set, r)
			}
		}
		if len(set) == 0 {
			return "\n"
		}
		return string(set[rng.IntN(len(set))])
	case syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		return string(rune(0x20 + rng.IntN(0x5f)))
	case syntax.OpStar:
		return repeat(rng, re.Sub[0], 0, 20)
	case syntax.OpPlus:
		return repeat(rng, re.Sub[0], 1, 20)
	case syntax.OpQuest:
		return repeat(rng, re.Sub[0], 0, 1)
	case syntax.OpRepeat:
		most := re.Max
		if most < 0 {
			most = re.Min + 20
		}
		return repeat(rng, re.Sub[0], re.Min, most)
	case syntax.OpAlternate:
		return generate(rng, re.Sub[rng.IntN(len(re.Sub))])
	case syntax.OpConcat, syntax.OpCapture:
		var b strings.Builder
		for _, s := range re.Sub {
			b.WriteString(generate(rng, s))
		}
		return b.String()
	}
	return "" // conditions that take no character
}

func repeat(rng *rand.Rand, re *syntax.Regexp, least, most int) string {
	var b strings.Builder
	for range least + rng.IntN(most-least+1) {
		b.WriteString(generate(rng, re))
	}
	return b.String()
}

func parse(t testing.TB, expr string) *syntax.Regexp {
	re, err := syntax.Parse(expr, syntax.Perl)
	if err != nil {
		t.Fatal(err)
	}
	return re
}

// TestRules: for each rule, texts that it is about.
func TestRules(t *testing.T) {
	all, found := 0, 0
	for _, id := range slices.Sorted(keys(detector().Config.Rules)) {
		r := detector().Config.Rules[id]
		if r.Path != nil {
			continue
		}
		all++
		hit := false
		for _, text := range positives(t, r) {
			compare(t, id, text)
			for _, f := range theirs(text, 0) {
				hit = hit || f.rule == id
			}
			if t.Failed() {
				t.FailNow()
			}
		}
		if hit {
			found++
		} else {
			t.Logf("no text could be made that gitleaks finds %s in", id)
		}
	}
	t.Logf("%d of %d rules", found, all)
	if found < all*9/10 {
		t.Errorf("only %d of %d rules were exercised", found, all)
	}
}

func keys[M ~map[K]V, K comparable, V any](m M) func(func(K) bool) {
	return func(yield func(K) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// TestSamples: assignments in twenty notations, as gitleaks generates them.
func TestSamples(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for _, name := range []string{"adafruit", "api", "client_secret", "discord", "sentry", "jira", "okta", "facebook", "twitter", "lob", "new-relic", "Linear", "HEROKU", "sonar_login", "snyk_api_key"} {
		for _, secret := range []string{utils.AlphaNumeric("32"), utils.Hex("32"), utils.Hex("40"), utils.AlphaNumericExtended("40"), utils.Hex("64"), utils.AlphaNumeric("20"), utils.Numeric("18"), utils.Hex8_4_4_4_12()} {
			value := generate(rng, parse(t, secret))
			for _, text := range utils.GenerateSampleSecrets(name, value) {
				compare(t, name, text)
			}
		}
	}
}

// fragment is how much gitleaks itself looks at in one piece.
const fragment = 100_000

// TestSources: gitleaks' own sources, which hold its examples, and Go's.
func TestSources(t *testing.T) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/zricethezav/gitleaks/v8").Output()
	if err != nil {
		t.Fatal(err)
	}
	files, total, hits := 0, 0, 0
	for root, most := range map[string]int{strings.TrimSpace(string(out)): 12 << 20, filepath.Join(runtime.GOROOT(), "src", "crypto"): 4 << 20, filepath.Join(runtime.GOROOT(), "src", "net"): 4 << 20} {
		size := 0
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if size += len(b); size > most {
				return fs.SkipAll
			}
			for i := 0; i < len(b); i += fragment {
				text := string(b[i:min(len(b), i+fragment)])
				compare(t, filepath.Base(path), text)
				quoted, _ := json.Marshal(text)
				compare(t, filepath.Base(path)+" as JSON", string(quoted))
				hits += len(theirs(text, 0))
			}
			files, total = files+1, total+len(b)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d files, %d bytes, %d findings", files, total, hits)
	if files < 300 || hits < 300 {
		t.Errorf("%d files with %d findings are too few to tell anything", files, hits)
	}
}

// TestDecoded: whatever gitleaks finds behind its decoders, lib/dlp finds.
func TestDecoded(t *testing.T) {
	texts := []string{}
	for _, id := range []string{"github-pat", "aws-access-token", "slack-bot-token", "stripe-access-token", "generic-api-key", "private-key", "jwt"} {
		r := detector().Config.Rules[id]
		for _, s := range positives(t, r)[:60] {
			if strings.ContainsFunc(s, func(r rune) bool { return r > 0x7e }) {
				continue
			}
			texts = append(texts, s,
				"a="+base64.StdEncoding.EncodeToString([]byte(s)), "b: "+base64.RawURLEncoding.EncodeToString([]byte(s)),
				hex.EncodeToString([]byte(s)), url.QueryEscape(s), "x="+percent(s), escaped(s), points(s),
				base64.StdEncoding.EncodeToString([]byte(base64.StdEncoding.EncodeToString([]byte(s)))),
				percent(base64.StdEncoding.EncodeToString([]byte(s))), hex.EncodeToString([]byte(escaped(s))))
		}
	}
	found := 0
	for _, text := range texts {
		a, b := theirs(text, 5), ours(t, text, false)
		found += len(a)
		for _, f := range a {
			if !slices.ContainsFunc(b, func(g finding) bool { return g.rule == f.rule }) {
				t.Errorf("gitleaks finds %v in %.300q, and lib/dlp %v", f, text, b)
			}
		}
	}
	t.Logf("%d findings in %d texts", found, len(texts))
	if found < len(texts) {
		t.Errorf("only %d findings in %d texts", found, len(texts))
	}
}

func percent(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, "%%%02x", s[i])
	}
	return b.String()
}

func escaped(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, `\u%04x`, s[i])
	}
	return b.String()
}

func points(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, "U+%04X ", s[i])
	}
	return b.String()
}
