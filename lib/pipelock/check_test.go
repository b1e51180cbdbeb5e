package pipelock

import (
	"net/netip"
	"strings"
	"testing"
)

// A run file is what follows from its policy, whatever ports it has, or it is
// said what is not.
func TestCheckRun(t *testing.T) {
	policy := mustYAML(t, tls("a.example"), tls("b.example"), deny("bad.example"))
	run, _, err := RunYAML(policy, RunOptions{
		Listen: netip.MustParseAddrPort("127.0.0.1:1"), MetricsListen: netip.MustParseAddrPort("127.0.0.1:2"),
		Sentinel: "/b/kill", InstanceID: "dev-01234567", Own: []netip.Addr{netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("10.0.0.1")},
	})
	if err != nil {
		t.Fatal(err)
	}
	edit := func(from, to string) []byte {
		t.Helper()
		if !strings.Contains(string(run), from) {
			t.Fatalf("no %q in\n%s", from, run)
		}
		return []byte(strings.Replace(string(run), from, to, 1))
	}
	for _, tt := range []struct {
		name string
		run  []byte
		want string // "" is as planned
	}{
		{"as planned", run, ""},
		{"another port", edit("127.0.0.1:1", "127.0.0.1:9"), ""},
		{"a host more", edit("  - a.example\n", "  - a.example\n  - evil.example\n"), "api_allowlist has evil.example"},
		{"a host less", edit("  - b.example\n", ""), "api_allowlist lacks b.example"},
		{"nothing blocked", edit("      - bad.example\n", ""), "blocklist"},
		{"an internal range less", edit("  - 10.0.0.0/8\n", ""), "10.0.0.0/8"},
		{"not enforced", edit("enforce: true", "enforce: false"), "enforce false"},
		{"no SNI", edit("sni_verification: true", "sni_verification: false"), "forward_proxy"},
		{"no bodies", edit("action: block", "action: warn"), "request_body_scanning"},
		{"another switch", edit("/b/kill", "/tmp/kill"), "another way"},
		{"another instance", edit("dev-01234567", "x"), "another way"},
		{"open to others", edit("127.0.0.1:1", "0.0.0.0:1"), "loopback"},
		{"an unknown key", append(edit("mode: strict", "mode: strict"), []byte("trusted_domains: [x]\n")...), "trusted_domains"},
		{"a comment", append([]byte("# hello\n"), run...), "another way"},
	} {
		_, err := CheckRun(tt.run, policy, "/b/kill", "dev-01234567")
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	listen, metrics, err := Ports(run)
	if listen != "127.0.0.1:1" || metrics != "127.0.0.1:2" || err != nil {
		t.Errorf("%s %s %v", listen, metrics, err)
	}
}
