package policy

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
)

// Presets open exact hosts only, and what they set is well formed.
func TestPresets(t *testing.T) {
	names := PresetNames()
	if !slices.IsSorted(names) || len(names) < 3 {
		t.Fatalf("presets: %v", names)
	}
	for _, name := range names {
		p, ok := PresetByName(name)
		if !ok || p.Name != name || p.Description == "" || len(p.Rules) == 0 {
			t.Fatalf("%s: %+v", name, p)
		}
		for _, r := range p.Rules {
			if e, err := Normalize(r.Host); err != nil || e.Host != r.Host || e.Class != ClassExact || r.Why == "" {
				t.Errorf("%s: %+v: %v", name, r, err)
			}
		}
		for _, v := range append(slices.Clone(p.Env), p.RootEnv...) {
			if !plan.ValidEnvName(v.Name) || v.Value == "" {
				t.Errorf("%s: %+v", name, v)
			}
		}
		for _, f := range p.Files {
			if strings.HasSuffix(f.Path, ".json") && !json.Valid([]byte(f.Content)) {
				t.Errorf("%s: %s is no JSON", name, f.Path)
			}
		}
	}
	for _, name := range []string{"", "Anthropic", "npm", "zzz"} {
		if _, ok := PresetByName(name); ok {
			t.Errorf("there is a preset %q", name)
		}
	}
}

// The key that Claude Code is told to accept is the one it is given.
func TestAnthropicPlaceholder(t *testing.T) {
	p, _ := PresetByName("anthropic")
	for _, v := range p.Env {
		if v.Name == "ANTHROPIC_API_KEY" && strings.Contains(p.Files[0].Content, `"`+v.Value+`"`) {
			return
		}
	}
	t.Error("the placeholder is not among the approved keys")
}

func TestResidualOfSecrets(t *testing.T) {
	secrets := []plan.Secret{{Name: "A", Inject: []plan.Injection{{Host: "b.example"}, {Host: "a.example"}}}, {Name: "B", Inject: []plan.Injection{{Host: "a.example"}}}}
	if got := ResidualOfSecrets(secrets); len(got) != 1 || !strings.HasPrefix(got[0], "a.example, b.example: answers are searched") {
		t.Errorf("%q", got)
	}
	if got := ResidualOfSecrets(nil); len(got) != 0 {
		t.Errorf("%q", got)
	}
}

func TestResidual(t *testing.T) {
	p := plan.Policy{Rules: []plan.Rule{
		rule(t, "a.example"), rule(t, "*.b.example"), rule(t, "http c.example@80"),
		rule(t, "ssh d.example@22"), rule(t, "tcp 10.0.0.1@5432"), rule(t, "!e.example"),
	}}
	inspected := rule(t, "f.example")
	inspected.Inspect = true
	limited := *requestRule(t, "GET /a")
	p.Rules = append(p.Rules, inspected, limited)
	got := Residual(p)
	for i, want := range []string{"a.example, *.b.example: TLS", "api.example.com: requests are held", "*.b.example: the labels", "c.example: plain HTTP", "d.example: SSH", "10.0.0.1/32: raw TCP", "10.0.0.1/32: reaches"} {
		if i >= len(got) || !strings.HasPrefix(got[i], want) {
			t.Errorf("residual[%d] of %q does not start with %q", i, got, want)
		}
	}
	all := strings.Join(got, "\n")
	if len(got) != 7 || strings.Contains(all, "e.example:") || strings.Contains(all, "f.example") {
		t.Errorf("residual: %s", all)
	}
	if r := Residual(plan.Policy{Rules: []plan.Rule{inspected}}); r == nil || len(r) != 0 {
		t.Errorf("an inspected host: %v", r)
	}
	many := plan.Policy{Rules: manyRules(100)}
	if r := Residual(many); !strings.Contains(r[0], "and 62 more: TLS") || !strings.Contains(r[1], "and 28 more: TLS is end to end and an address") {
		t.Errorf("many: %s\n%s", r[0], r[1])
	}
}

func TestRulesSHA256(t *testing.T) {
	a, b := rule(t, "a.example"), rule(t, "b.example")
	one, two := RulesSHA256([]plan.Rule{a, b}), RulesSHA256([]plan.Rule{b, a})
	if one == two || len(one) != len("sha256:")+64 {
		t.Errorf("%s %s", one, two)
	}
	if again := RulesSHA256([]plan.Rule{a, b}); again != one {
		t.Errorf("%s, before %s", again, one)
	}
	if RulesSHA256(nil) != RulesSHA256([]plan.Rule{}) {
		t.Error("no rules and empty rules differ")
	}
}
