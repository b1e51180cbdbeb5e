package policy

import (
	"slices"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

func TestDLPAllow(t *testing.T) {
	if !slices.IsSorted(DLPRules()) || !slices.Contains(DLPRules(), "private-key") {
		t.Errorf("%v", DLPRules())
	}
	rule := func(from string, ids ...string) plan.Rule {
		return plan.Rule{Host: "a.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: "exact", From: "f", DLPAllow: ids, DLPAllowFrom: from}
	}
	for _, c := range []struct {
		rule plan.Rule
		code string
	}{
		{rule("here", "jwt"), ""}, {rule("here", "*"), ""}, {rule("here", "github-pat", "jwt"), ""}, {rule(""), ""},
		{rule("here", "jtw"), "unknown_dlp_rule"}, {rule("here", "secret:KEY"), "unknown_dlp_rule"},
		{rule("", "jwt"), "bad_rule"}, {rule("here"), "bad_rule"}, {rule("here", "jwt", "github-pat"), "bad_rule"}, {rule("here", "jwt", "jwt"), "bad_rule"},
		{plan.Rule{Host: "a.test", Ports: []int{}, Protocol: "any", Verdict: "deny", Class: "exact", From: "f", DLPAllow: []string{"jwt"}, DLPAllowFrom: "x"}, "bad_rule"},
	} {
		code := ""
		if _, err := Compile([]plan.Rule{c.rule}); err != nil {
			code = fault.As(err).Code
		}
		if code != c.code {
			t.Errorf("%+v: %q, want %q", c.rule, code, c.code)
		}
	}
}
