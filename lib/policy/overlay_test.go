package policy

import (
	"net/netip"
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
)

func overlay(t *testing.T, base, live []string) *Overlay {
	t.Helper()
	m, err := Compile(rulesOf(t, base))
	if err != nil {
		t.Fatal(err)
	}
	o, err := NewOverlay(m, rulesOf(t, live))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func rulesOf(t *testing.T, list []string) []plan.Rule {
	t.Helper()
	out := []plan.Rule{}
	for _, s := range list {
		out = append(out, rule(t, s))
	}
	return out
}

func TestOverlay(t *testing.T) {
	o := overlay(t,
		[]string{"a.example", "*.wide.example", "!bad.wide.example", "tcp pinned.example@22", "10.1.0.0/16", "!10.1.1.0/24"},
		[]string{"new.example", "a.example@8443", "tcp bad.wide.example@99", "tcp x.wide.example@443", "!shut.wide.example", "!10.1.2.0/24", "!new2.example", "new2.example", "8.8.8.8"})
	for _, tt := range []struct {
		host string
		port int
		code string
		live bool
	}{
		{"a.example", 443, Allowed, false},
		{"a.example", 8443, Allowed, true},
		{"a.example", 22, PortNotAllowed, false},
		{"new.example", 443, Allowed, true},
		{"new.example", 22, PortNotAllowed, true},
		{"other.example", 443, NotInAllowlist, false},
		{"bad.wide.example", 443, DeniedByRule, false},
		{"bad.wide.example", 99, DeniedByRule, false}, // the plan's deny wins over an added allow
		{"shut.wide.example", 443, DeniedByRule, true},
		{"ok.wide.example", 443, Allowed, false},
		{"x.wide.example", 443, Allowed, false}, // the plan's rule, with its protocol
		{"new2.example", 443, DeniedByRule, true},
		{"10.1.3.1", 443, Allowed, false},
		{"10.1.2.1", 443, DeniedByRule, true},
		{"10.1.1.1", 443, DeniedByRule, false},
		{"8.8.8.8", 443, Allowed, true},
		{"127.1", 443, BadHost, false},
		{"a.example", 0, BadPort, false},
	} {
		d := o.Decide(tt.host, tt.port)
		if d.Code != tt.code || d.Live != tt.live || d.Allow != (tt.code == Allowed) {
			t.Errorf("%s:%d: %+v", tt.host, tt.port, d)
		}
	}
	if d := o.Decide("x.wide.example", 443); d.Rule.Protocol != "tls" {
		t.Errorf("%+v", d.Rule)
	}
	for ip, want := range map[string]string{"10.1.1.1": DeniedByRule, "10.1.2.1": DeniedByRule, "10.1.3.1": "private_address", "9.9.9.9": "", "64:ff9b::a01:201": DeniedByRule} {
		if got := codeOf(o.CheckAddr(&plan.Rule{Host: "a.example"}, netip.MustParseAddr(ip), 443, nil)); got != want {
			t.Errorf("CheckAddr(%s) = %q, want %q", ip, got, want)
		}
	}
}

// Without added rules the answers are those of the plan, word for word.
func TestOverlayOfNothing(t *testing.T) {
	base := []string{"a.example", "*.b.example", "!c.b.example", "10.0.0.0/8"}
	m, err := Compile(rulesOf(t, base))
	if err != nil {
		t.Fatal(err)
	}
	o, fill := overlay(t, base, nil), overlay(t, base, []string{"!zzz.example"})
	for _, host := range []string{"a.example", "x.b.example", "b.example", "c.b.example", "10.2.3.4", "no.example", "::ffff:1.2.3.4"} {
		for _, port := range []int{443, 22} {
			want := m.DecideAs(host, port, "http")
			for _, got := range []Decision{o.DecideAs(host, port, "http"), fill.DecideAs(host, port, "http")} {
				got.Rule, want.Rule = nil, nil
				if got != want {
					t.Errorf("%s:%d: %+v, want %+v", host, port, got, want)
				}
			}
		}
	}
}

func TestAdmit(t *testing.T) {
	o := overlay(t,
		[]string{"a.example", "*.wide.example", "!*.bad.example", "!one.example", "!10.1.0.0/16", "10.2.0.0/16"},
		[]string{"!shut.example", "new.example"})
	for entry, want := range map[string]string{
		"fresh.example":           "",
		"*.fresh.example":         "",
		"new.example":             "", // replaces the one that was added before
		"a.example@8443":          "",
		"a.example":               "already_allowed",
		"tcp a.example@443":       "conflicting_rules",
		"x.wide.example":          "already_allowed",
		"*.x.wide.example":        "already_allowed",
		"http x.wide.example@443": "conflicting_rules",
		"wide.example":            "",
		"one.example":             DeniedByRule,
		"x.bad.example":           DeniedByRule,
		"*.y.bad.example":         DeniedByRule,
		"*.bad.example":           DeniedByRule,
		"bad.example":             "",
		"shut.example":            DeniedByRule,
		"10.1.2.0/24":             DeniedByRule,
		"10.1.0.9":                DeniedByRule,
		"10.2.0.9":                "already_allowed",
		"tcp 10.2.3.0/24@443":     "conflicting_rules",
		"10.0.0.0/14":             "", // more than what is denied or allowed of it
	} {
		r := rule(t, entry)
		if got := codeOf(o.Admit(&r)); got != want {
			t.Errorf("Admit(%s) = %q, want %q", entry, got, want)
		}
	}
	pinned := rule(t, "pinned.example")
	pinned.Addresses = []string{"10.1.0.9"}
	if got := codeOf(o.Admit(&pinned)); got != DeniedByRule {
		t.Errorf("an address that is denied: %q", got)
	}
}
