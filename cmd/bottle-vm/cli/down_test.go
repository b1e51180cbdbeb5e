package cli

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

// TestDeniedSummary: what a run says at its end about what was denied, with what
// would allow it.
func TestDeniedSummary(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := audit.Open(path, audit.Options{Bottle: "t-01234567"})
	if err != nil {
		t.Fatal(err)
	}
	request := func(method, path string) audit.Event {
		return audit.Event{Event: audit.KindRequest, Verdict: audit.Deny, Code: "request_not_allowed", Host: "api.test", Port: 443,
			Method: method, Path: path, Reason: "not among the requests"}
	}
	events := []audit.Event{
		{Event: audit.KindConnect, Verdict: audit.Deny, Code: "not_in_allowlist", Host: "evil.test", Port: 443, Reason: "evil.test is not in the allowlist"},
		{Event: audit.KindConnect, Verdict: audit.Deny, Code: "not_in_allowlist", Host: "evil.test", Port: 443, Reason: "evil.test is not in the allowlist"},
		{Event: audit.KindConnect, Verdict: audit.Allow, Host: "api.test", Port: 443},
		{Event: audit.KindRequest, Verdict: audit.Deny, Code: "bad_host", Host: "::ffff:7f00:1", Port: 443, Reason: `"::ffff:7f00:1" is an IPv4 address in IPv6 form`},
		{Event: audit.KindRequest, Verdict: audit.Deny, Code: "bad_request", Reason: "the target is no address"},
		{Event: audit.KindChange, Verdict: audit.Deny, Code: "rule_added", Host: "changed.test"},
		{Event: audit.KindClose, Code: "guest_rejects_ca", Host: "api.test", Port: 443, Reason: "the client does not take it"},
		request("DELETE", "/repos/x"), request("DELETE", "/repos/x"), request("GET", "/a%2fb"), request("GET", "/\x1b[31m"),
	}
	for i := range 30 {
		events = append(events, request("PUT", fmt.Sprintf("/%02d", i)))
	}
	for _, e := range events {
		if err := l.Write(e); err != nil {
			t.Fatal(err)
		}
	}
	l.Close()
	hint := hintsOf(&plan.Bottle{Egress: plan.Policy{Rules: []plan.Rule{{Host: "api.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow",
		Class: "exact", Inspect: true, Requests: []string{"GET /"}, RequestsFrom: "here", From: "there"}}}})
	var lines []string
	for _, d := range denied(path) {
		d.hint = hint(d)
		lines = append(lines, d.String())
	}
	all := strings.Join(lines, "\n")
	for _, want := range []string{
		`bottle: denied evil.test:443, 2 times (not_in_allowlist): evil.test is not in the allowlist; add "evil.test" to egress.allow in the manifest`,
		`bottle: not reached: api.test:443 (guest_rejects_ca): the client does not take it; let it trust /opt/bottle/ca.pem, or take "api.test" out of egress.inspect in the manifest`,
		`bottle: denied [::ffff:7f00:1]:443 (bad_host): "::ffff:7f00:1" is an IPv4 address in IPv6 form`,
		`bottle: denied what names no host (bad_request): the target is no address`,
		`bottle: denied api.test:443, 2 times (request_not_allowed): not among the requests; add "DELETE /repos/x" to the requests of api.test in the manifest`,
		`bottle: denied api.test:443, 23 times (request_not_allowed): other requests, which bottle-vm logs --audit lists`,
	} {
		if !strings.Contains(all, want) {
			t.Errorf("no line %q", want)
		}
	}
	if len(lines) != 15 || strings.Contains(all, "\x1b") {
		t.Errorf("%d lines:\n%s", len(lines), all)
	}
}

// A guest that asks for a thousand hosts does not fill the terminal of its owner.
func TestReportIsBounded(t *testing.T) {
	var out strings.Builder
	none := func(denial) string { return "" }
	reportTo(&out, "t-01234567", make([]denial, maxReported), none)
	if n := strings.Count(out.String(), "\n"); n != maxReported {
		t.Errorf("%d lines", n)
	}
	out.Reset()
	reportTo(&out, "t-01234567", make([]denial, 1000), none)
	if s := out.String(); strings.Count(s, "\n") != maxReported+1 || !strings.HasSuffix(s, "bottle: 950 more denied, which bottle-egress log t-01234567 lists\n") {
		t.Error(s)
	}
}
