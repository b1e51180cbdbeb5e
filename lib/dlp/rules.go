package dlp

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"sync"

	"github.com/pelletier/go-toml/v2"
	"github.com/zricethezav/gitleaks/v8/config"
)

// rule is one of gitleaks' rules, made ready for a scan around literals.
type rule struct {
	id       string
	expr     string // as gitleaks has it
	group    int
	entropy  float64
	allow    []*allowlist
	keywords []string // one of them has to be in the text; lower case

	rest    *syntax.Regexp // the expression without its lead
	lead    int            // how far a match may reach to the left of rest
	anchors []string       // every match of rest begins with one; nil: unknown
	// certain is set where an anchor holds a keyword, so that no other look for
	// keywords is needed.
	certain bool
	// near is set where no literal begins the matches, yet each has a keyword in
	// it and no more than so many bytes.
	near    int
	longest int // bytes of a match of rest, at most

	whole  func() *regexp.Regexp // expr
	inside func() *regexp.Regexp // rest, anchored behind one character
	first  func() *regexp.Regexp // rest, anchored at the beginning of the text
}

// allowlist takes findings back.
type allowlist struct {
	target string // "": the secret; match; line
	expr   func() *regexp.Regexp
	stop   *automaton
	both   bool
}

// file is the part of gitleaks' configuration that matters for a text without a
// path and a commit.
type file struct {
	Allowlist allowSection
	Rules     []struct {
		ID          string
		Regex       string
		Path        string
		SecretGroup int `toml:"secretGroup"`
		Entropy     float64
		Keywords    []string
		Required    []any
		SkipReport  bool `toml:"skipReport"`
		Allowlists  []allowSection
	}
}

type allowSection struct {
	Condition   string
	RegexTarget string `toml:"regexTarget"`
	Regexes     []string
	StopWords   []string `toml:"stopwords"`
	Paths       []string
}

// rules are gitleaks' own, without those about the name of a file: a request's
// body has none. They are read at the first scan, and never where there is none.
var rules = sync.OnceValues(func() ([]*rule, error) { return parseRules(config.DefaultConfig) })

func parseRules(text string) ([]*rule, error) {
	var f file
	if err := toml.Unmarshal([]byte(text), &f); err != nil {
		return nil, fmt.Errorf("gitleaks' configuration: %w", err)
	}
	global := newAllowlist(f.Allowlist)
	var out []*rule
	for _, r := range f.Rules {
		if r.Path != "" {
			continue
		}
		if len(r.Required) > 0 || r.SkipReport || len(r.Keywords) == 0 {
			return nil, fmt.Errorf("gitleaks' rule %s is of a form that this version does not know", r.ID)
		}
		n := &rule{id: r.ID, expr: r.Regex, group: r.SecretGroup, entropy: r.Entropy}
		for _, k := range r.Keywords {
			n.keywords = append(n.keywords, strings.ToLower(k))
		}
		if global != nil {
			n.allow = append(n.allow, global)
		}
		for _, a := range r.Allowlists {
			if x := newAllowlist(a); x != nil {
				n.allow = append(n.allow, x)
			}
		}
		if err := n.prepare(); err != nil {
			return nil, fmt.Errorf("gitleaks' rule %s: %w", r.ID, err)
		}
		out = append(out, n)
	}
	return out, nil
}

// newAllowlist returns nil for one that cannot apply: without a path, a list
// that also asks for one never does.
func newAllowlist(s allowSection) *allowlist {
	both := s.Condition == "AND" || s.Condition == "&&"
	if both && len(s.Paths) > 0 || len(s.Regexes) == 0 && len(s.StopWords) == 0 {
		return nil
	}
	a := &allowlist{target: s.RegexTarget, both: both}
	if len(s.Regexes) > 0 {
		a.expr = lazily("(?:" + strings.Join(s.Regexes, "|") + ")")
	}
	if len(s.StopWords) > 0 {
		words := make([]string, len(s.StopWords))
		for i, w := range s.StopWords {
			words[i] = strings.ToLower(w)
		}
		a.stop = newAutomaton(words)
	}
	return a
}

func lazily(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}

func (r *rule) prepare() error {
	re, err := syntax.Parse(r.expr, syntax.Perl)
	if err != nil {
		return err
	}
	r.rest, r.lead = stripLead(re)
	r.anchors = anchors(r.rest)
	r.certain = len(r.anchors) > 0 && !slices.ContainsFunc(r.anchors, func(a string) bool {
		return !slices.ContainsFunc(r.keywords, func(k string) bool { return strings.Contains(a, k) })
	})
	r.longest = min(longest(r.rest), maxMatch)
	if r.anchors == nil && r.longest < maxMatch && holds(r.rest, r.keywords) {
		r.near, r.certain = r.longest, true
	}
	rest := "(?:" + r.rest.String() + ")"
	r.whole = lazily(r.expr)
	r.inside = lazily("^(?s:.)" + rest)
	r.first = lazily("^" + rest)
	return nil
}

var commitID = lazily(`^[0-9a-fA-F]{40}$`)

// vague tells if a finding says nothing here: for gitleaks every commit id is a
// key of Sourcegraph's if the word sourcegraph stands somewhere in the text, as
// it does in many lists of dependencies.
func (r *rule) vague(secret []byte) bool {
	return r.id == "sourcegraph-access-token" && commitID().Match(secret)
}

// allowed tells if a list takes a finding back.
func (r *rule) allowed(secret, match, line []byte) bool {
	for _, a := range r.allow {
		target := secret
		switch a.target {
		case "match":
			target = match
		case "line":
			target = line
		}
		byExpr := a.expr != nil && len(target) > 0 && a.expr().Match(target)
		if a.expr != nil && byExpr != a.both {
			if byExpr {
				return true
			}
			continue
		}
		byWord := false
		if a.stop != nil {
			a.stop.each(secret, func(int, []int32) bool {
				byWord = true
				return false
			})
		}
		if a.both && (a.expr == nil || byExpr) && (a.stop == nil || byWord) || !a.both && byWord {
			return true
		}
	}
	return false
}
