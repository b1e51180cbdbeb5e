package guest

import (
	"fmt"
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
)

func TestAddresses(t *testing.T) {
	rule := func(verdict, cidr, protocol string, ports ...int) plan.Rule {
		return plan.Rule{CIDR: cidr, Ports: ports, Protocol: protocol, Verdict: verdict}
	}
	got := Addresses([]plan.Rule{
		rule("allow", "100.64.0.7/32", "tcp", 5432), rule("allow", "100.64.0.7/32", "ssh", 22),
		rule("deny", "100.64.0.8/32", "any"), {Host: "a.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow"},
		rule("allow", "10.0.0.0/8", "tls", 443),
		// What means the guest itself, and blocks that a guest cannot stand for.
		rule("allow", "127.0.0.1/32", "http", 11434), rule("allow", "::1/128", "http", 11434), rule("allow", "0.0.0.0/0", "tls", 443),
		rule("allow", "2001:db8::/64", "tls", 443), rule("allow", "2001:db8::7/128", "tls", 443),
	})
	want := "[{100.64.0.7/32 [{22 ssh} {5432 tcp}]} {10.0.0.0/8 [{443 tls}]} {2001:db8::7/128 [{443 tls}]}]"
	if fmt.Sprint(got) != want {
		t.Errorf("%v, want %s", got, want)
	}
	var many []plan.Rule
	for i := range 2 * MaxAddresses {
		many = append(many, rule("allow", fmt.Sprintf("198.51.%d.%d/32", i/250, i%250), "tls", 443))
	}
	if n := len(Addresses(many)); n != MaxAddresses {
		t.Errorf("%d blocks", n)
	}
}
