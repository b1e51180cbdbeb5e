package policy

import (
	"slices"
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
)

func TestServices(t *testing.T) {
	allow := func(host, class, protocol string, ports ...int) plan.Rule {
		return plan.Rule{Host: host, Class: class, Protocol: protocol, Ports: ports, Verdict: "allow", From: "test"}
	}
	m, err := Compile([]plan.Rule{
		allow("a.example.com", "exact", "tls", 443),
		allow("a.example.com", "exact", "ssh", 22),
		allow("*.example.com", "wildcard", "tls", 443, 8443),
		allow("*.b.example.com", "wildcard", "http", 80),
		{CIDR: "192.0.2.7/32", Class: "private", Protocol: "tcp", Ports: []int{5432}, Verdict: "allow", From: "test"},
		{Host: "no.example.com", Class: "exact", Protocol: "any", Ports: []int{}, Verdict: "deny", From: "test"},
		{Host: "half.example.com", Class: "exact", Protocol: "any", Ports: []int{443}, Verdict: "deny", From: "test"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]struct {
		code string
		open []Service
	}{
		"a.example.com":       {Allowed, []Service{{22, "ssh"}, {443, "tls"}, {8443, "tls"}}},
		"A.Example.COM.":      {Allowed, []Service{{22, "ssh"}, {443, "tls"}, {8443, "tls"}}},
		"x.b.example.com":     {Allowed, []Service{{80, "http"}, {443, "tls"}, {8443, "tls"}}},
		"half.example.com":    {Allowed, []Service{{8443, "tls"}}},
		"no.example.com":      {DeniedByRule, nil},
		"example.com":         {NotInAllowlist, nil},
		"other.test":          {NotInAllowlist, nil},
		"192.0.2.7":           {BadHost, nil},
		"0x7f.1":              {BadHost, nil},
		"b\u00fccher.example": {BadHost, nil},
	} {
		open, d := m.Services(name)
		if !slices.Equal(open, want.open) || d.Code != want.code || d.Allow != (len(open) > 0) {
			t.Errorf("%s: %v, %+v; want %v, %s", name, open, d, want.open, want.code)
		}
	}
	o, err := NewOverlay(m, []plan.Rule{
		allow("a.example.com", "exact", "tls", 9443), allow("new.test", "exact", "tcp", 5432),
		{Host: "x.b.example.com", Class: "exact", Protocol: "any", Ports: []int{}, Verdict: "deny", From: "test"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]Service{
		"a.example.com": {{22, "ssh"}, {443, "tls"}, {8443, "tls"}, {9443, "tls"}}, "new.test": {{5432, "tcp"}},
		"x.b.example.com": nil, "other.test": nil,
	} {
		if open, d := o.Services(name); !slices.Equal(open, want) || d.Allow != (len(open) > 0) {
			t.Errorf("with added rules: %s: %v, %+v; want %v", name, open, d, want)
		}
	}
}
