package cli

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// An argument becomes the rule that a manifest's entry would, and what a
// manifest refuses is refused with the same code.
func TestLiveRuleOf(t *testing.T) {
	for _, tt := range []struct {
		verdict, arg     string
		flags            liveFlags
		target, protocol string
		ports            []int
		code             string
	}{
		{"allow", "a.example", liveFlags{}, "a.example", "tls", []int{443}, ""},
		{"allow", "A.Example.", liveFlags{}, "a.example", "tls", []int{443}, ""},
		{"allow", "*.a.example:8443", liveFlags{}, "*.a.example", "tls", []int{8443}, ""},
		{"allow", "a.example", liveFlags{protocol: "ssh"}, "a.example", "ssh", []int{22}, ""},
		{"allow", "a.example", liveFlags{protocol: "http"}, "a.example", "http", []int{80}, ""},
		{"allow", "a.example:5432", liveFlags{protocol: "tcp"}, "a.example", "tcp", []int{5432}, ""},
		{"allow", "10.1.0.0/16:22", liveFlags{protocol: "ssh"}, "10.1.0.0/16", "ssh", []int{22}, ""},
		{"allow", "[2606:4700::/32]:8443", liveFlags{}, "2606:4700::/32", "tls", []int{8443}, ""},
		{"allow", "2606:4700::1111", liveFlags{}, "2606:4700::1111/128", "tls", []int{443}, ""},
		{"allow", "local.example:11434", liveFlags{protocol: "http", addresses: "127.0.0.2,127.0.0.1"}, "local.example", "http", []int{11434}, ""},
		{"deny", "a.example", liveFlags{}, "a.example", "any", []int{}, ""},
		{"deny", "*.com:443", liveFlags{}, "*.com", "any", []int{443}, ""},
		{"deny", "0.0.0.0/0", liveFlags{}, "0.0.0.0/0", "any", []int{}, ""},

		{"allow", "*", liveFlags{}, "", "", nil, "too_broad"},
		{"allow", "*.com", liveFlags{}, "", "", nil, "too_broad"},
		{"allow", "0.0.0.0/0", liveFlags{}, "", "", nil, "too_broad"},
		{"allow", "169.254.169.254", liveFlags{}, "", "", nil, "metadata_address"},
		{"allow", "m.example", liveFlags{addresses: "169.254.169.254"}, "", "", nil, "metadata_address"},
		{"allow", "m.example", liveFlags{addresses: "nowhere"}, "", "", nil, "bad_address"},
		{"allow", "10.0.0.1", liveFlags{addresses: "10.0.0.1"}, "", "", nil, "usage"},
		{"allow", "https://a.example/x", liveFlags{}, "", "", nil, "bad_host"},
		{"allow", "127.1", liveFlags{}, "", "", nil, "bad_host"},
		{"allow", "localhost:8080", liveFlags{}, "", "", nil, "bad_host"},
		{"allow", "a.example:ssh", liveFlags{}, "", "", nil, "bad_host"},
		{"allow", "a.example:70000", liveFlags{}, "", "", nil, "bad_port"},
		{"allow", "a.example:99999999999999999999", liveFlags{}, "", "", nil, "bad_port"},
		{"allow", "a.example", liveFlags{protocol: "tcp"}, "", "", nil, "usage"},
		{"allow", "a.example", liveFlags{protocol: "udp"}, "", "", nil, "usage"},
		{"deny", "*", liveFlags{}, "", "", nil, "too_broad"},
	} {
		if tt.flags.protocol == "" {
			tt.flags.protocol = "tls" // the flag's default
		}
		r, err := tt.flags.rule(tt.verdict, tt.arg)
		if f := fault.As(err); f != nil {
			if f.Code != tt.code || f.Hint == "" {
				t.Errorf("%s %s: %v (%s, %q), want %q", tt.verdict, tt.arg, err, f.Code, f.Hint, tt.code)
			}
			continue
		}
		if tt.code != "" || r.Host+r.CIDR != tt.target || r.Protocol != tt.protocol || !slices.Equal(r.Ports, tt.ports) || r.Verdict != tt.verdict {
			t.Errorf("%s %s: %+v, want code %q", tt.verdict, tt.arg, r, tt.code)
		}
		if tt.flags.addresses != "" && !reflect.DeepEqual(r.Addresses, []string{"127.0.0.1", "127.0.0.2"}) {
			t.Errorf("%s: %v", tt.arg, r.Addresses)
		}
		compiled := r
		compiled.From = "x"
		if _, err := policy.Compile([]plan.Rule{compiled}); err != nil {
			t.Errorf("%s %s: the gate takes it not: %v", tt.verdict, tt.arg, err)
		}
	}
}

// An hour that comes out as nothing is not for ever, and addresses that come out
// as nothing are not every address.
func TestLiveFlags(t *testing.T) {
	for _, bad := range [][]string{
		{"--for", "0s"}, {"--for", "0"}, {"--for", ""}, {"--for", "-1h"}, {"--for", "1"}, {"--for", "400d"}, {"--for", "106751d"},
		{"--addresses", ""},
	} {
		args := append(append([]string{"allow", "--bottle", "dev"}, bad...), "a.example")
		if status, out, errs := run("", args...); status != fault.Usage || out != "" || !strings.Contains(errs, "for flag "+bad[0]) {
			t.Errorf("%q: %d %q %s", bad, status, out, errs)
		}
	}
	var l lifetime
	for _, good := range []string{"1ns", "90s", "2d", "366d"} {
		if err := l.Set(good); err != nil || l.Duration <= 0 {
			t.Errorf("%s: %v", good, err)
		}
	}
}
