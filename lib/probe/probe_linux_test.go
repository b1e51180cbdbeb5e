package probe

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// TestMain: the battery starts its own program in other roles, which here is the
// test.
func TestMain(m *testing.M) {
	if status, ok := Role(os.Args[1:], os.Stdin, os.Stdout, os.Stderr); ok {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

func options(sandbox string) Options {
	return Options{Allow: "allowed.test", Wildcard: "allowed.test", AllowHTTP: "allowed.test", Deny: "denied.test", Sandbox: sandbox, Timeout: 2 * time.Minute}
}

// battery runs it, or skips where this host has no laboratory.
func battery(t *testing.T, o Options) map[string]Result {
	t.Helper()
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	all := map[string]Result{}
	var stderr bytes.Buffer
	err := Run(t.Context(), o, &stderr, func(r Result) error {
		all[r.ID] = r
		return nil
	})
	if strings.Contains(stderr.String(), "does not permit") || err != nil && (fault.As(err).Code == "no_lab" || fault.As(err).Code == "not_static") {
		t.Skipf("SKIPPED: no laboratory on this host: %v %s", err, stderr.String())
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	if left, _ := os.ReadDir(tmp); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	return all
}

// TestNoSandbox: every probe can fail. Without a sandbox all of them leak, but
// for those that are about a proxy, which is not there.
func TestNoSandbox(t *testing.T) {
	// The shell stands for a sandbox that can be killed (R04).
	o := options(`sh -c "@PROBE; true"`)
	o.Files, o.Pids = t.TempDir(), 20
	if err := os.WriteFile(filepath.Join(o.Files, manifestName), []byte("{}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	results := battery(t, o)
	// What only root may do, and what this host may not have.
	root := []string{"N11", "N14", "N15", "N16", "N17", "S17", "S18"}
	host := []string{"N12", "R03", "S09", "S10", "G01", "G02", "G03", "G04", "G05", "G06", "G07", "G08", "G09", "G10", "G11", "G12", "G13", "S21"}
	for _, p := range catalog {
		r := results[p.ID]
		want := Leak
		switch {
		case p.proxied || p.ID == "D09" || p.ID == "C08":
			want = NA
		case p.control:
			want = Works
		}
		switch {
		case r.Verdict == want:
		case os.Geteuid() != 0 && slices.Contains(root, p.ID) && r.Verdict == Held:
		case slices.Contains(host, p.ID) && (r.Verdict == NA || p.ID == "N12" && r.Verdict == Held):
			t.Logf("%s: %s %s", p.ID, r.Verdict, r.Evidence)
		default:
			t.Errorf("%s %s: %s (%s), want %s", p.ID, p.Name, r.Verdict, r.Evidence, want)
		}
	}
	if len(results) != len(catalog) {
		t.Errorf("%d results, %d probes", len(results), len(catalog))
	}
}

// TestPlain: a workspace without a repository and files to hide leaves out what
// takes one, and says so. What brings its own repository can still leak.
func TestPlain(t *testing.T) {
	o := options("@PROBE")
	o.Plain, o.Only = true, []string{"S06", "S09", "G04", "G09", "G10", "G13"}
	results := battery(t, o)
	for id, want := range map[string]Verdict{"C03": Works, "S06": NA, "S09": NA, "G04": NA, "G09": Leak, "G10": Leak, "G13": Leak} {
		got := results[id]
		if got.Verdict == NA && got.Evidence == "the host has no git" {
			t.Skip("SKIPPED: the host has no git, so that nothing is planted for it")
		}
		if got.Verdict != want || want == NA && !strings.Contains(got.Evidence, "which --plain leaves out") {
			t.Errorf("%s: %+v, want %s", id, got, want)
		}
	}
}

// TestShutUp: a sandbox that runs nothing proves nothing, and says so.
func TestShutUp(t *testing.T) {
	var stderr bytes.Buffer
	t.Setenv("TMPDIR", t.TempDir())
	err := Run(t.Context(), options(": @PROBE; echo no such sandbox >&2"), &stderr, func(r Result) error {
		t.Errorf("a result: %+v", r)
		return nil
	})
	if strings.Contains(stderr.String(), "does not permit") {
		t.Skipf("SKIPPED: no laboratory on this host: %s", stderr.String())
	}
	if r, ok := err.(Reported); !ok || int(r) != fault.Unavailable || !strings.Contains(stderr.String(), "the client did not run in the sandbox: no such sandbox") {
		t.Errorf("bad_sandbox: %v %s", err, stderr.String())
	}
}

// TestVoid: without its control a probe that holds proves nothing. Here the
// sandbox has no network at all, so that no request gets anywhere.
func TestVoid(t *testing.T) {
	o := options("unshare -n @PROBE")
	if os.Geteuid() != 0 {
		o.Sandbox = "unshare -Un @PROBE"
	}
	o.Only = []string{"host-fronting", "http2-clear", "direct-tcp", "S08"}
	results := battery(t, o)
	for id, want := range map[string]Verdict{"C01": Fails, "C02": Fails, "C06": Fails, "C07": Fails, "X10": Void, "X41": Void, "N01": Held, "S08": Leak} {
		if got := results[id]; got.Verdict != want {
			t.Errorf("%s: %+v, want %s", id, got, want)
		}
	}
	if len(results) != 8 {
		t.Errorf("--only gave %d results: %v", len(results), results)
	}
}

// TestSetupFails and what it says.
func TestSetupFails(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	for code, change := range map[string]func(*Options){
		"setup_failed":     func(o *Options) { o.Setup = "echo nope >&2; false" },
		"no_document_file": func(o *Options) { o.Document = "@WORKSPACE/none.json" },
	} {
		o := options("@PROBE")
		o.Only = []string{"C03"}
		change(&o)
		var stderr bytes.Buffer
		err := Run(t.Context(), o, &stderr, func(Result) error { return nil })
		if strings.Contains(stderr.String(), "does not permit") {
			t.Skipf("SKIPPED: no laboratory on this host: %s", stderr.String())
		}
		if r, ok := err.(Reported); !ok || int(r) != fault.NoInput {
			t.Errorf("%s: %v %s", code, err, stderr.String())
		}
	}
}

// TestInterrupt: Ctrl-C ends the sandbox, too, and leaves nothing.
func TestInterrupt(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	var stderr bytes.Buffer
	began := time.Now()
	err := Run(ctx, options("sleep 1000; @PROBE"), &stderr, func(Result) error { return nil })
	if strings.Contains(stderr.String(), "does not permit") {
		t.Skipf("SKIPPED: no laboratory on this host: %s", stderr.String())
	}
	if f := fault.As(err); f.Code != "interrupted" || f.Exit != 130 || time.Since(began) > 30*time.Second {
		t.Errorf("%v after %s\n%s", err, time.Since(began), stderr.String())
	}
	if left, _ := os.ReadDir(tmp); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestCatalogue(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range catalog {
		if seen[p.ID] || seen[p.Name] || p.ID == "" || p.Name == "" || p.Title == "" || p.try == nil {
			t.Errorf("%+v", p.Info)
		}
		seen[p.ID], seen[p.Name] = true, true
		if n := find(p.Needs); p.Needs != "" && (n == nil || !n.control) {
			t.Errorf("%s needs %q", p.ID, p.Needs)
		}
		if p.residual != "" && p.leak != nil {
			t.Errorf("%s: what is excused has to be a sighting", p.ID)
		}
	}
	for _, id := range aboutProxies {
		if find(id) == nil {
			t.Errorf("aboutProxies: there is no %s", id)
		}
	}
	for _, name := range []string{"localhost-reach", "egress-port-bypass"} {
		if !seen[name] {
			t.Errorf("no probe is called %s", name)
		}
	}
	ids, unknown := Choose([]string{"x10"})
	if !slices.Equal(ids, []string{"C02", "C07", "X10"}) || unknown != "" {
		t.Errorf("%q %q", ids, unknown)
	}
	if _, unknown := Choose([]string{"X10", "nope"}); unknown != "nope" {
		t.Errorf("%q", unknown)
	}
	if len(List()) != len(catalog) {
		t.Error("the list is not the catalogue")
	}
}

// TestResidual: what is excused is what the policy's own texts name, no more.
func TestResidual(t *testing.T) {
	ip := netip.MustParseAddr("52.1.2.10")
	rules := plan.Policy{Rules: []plan.Rule{
		{Host: "allowed.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: policy.ClassExact},
		{Host: "*.wild.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: policy.ClassWildcard},
		{Host: "plain.test", Ports: []int{80}, Protocol: "http", Verdict: "allow", Class: policy.ClassExact},
	}}
	l := &lab{o: Options{Allow: "allowed.test", Wildcard: "wild.test", AllowHTTP: "plain.test", Residual: policy.Residual(rules)}, zone: &zone{AllowIP: ip}}
	inside := event{Server: "tls", Dst: "52.1.2.10:443", SNI: "allowed.test"}
	change := func(f func(*event)) event { e := inside; f(&e); return e }
	for _, c := range []struct {
		id   string
		e    event
		want bool
	}{
		{"X10", inside, true},
		{"X30", change(func(e *event) { e.Server = "http2" }), true},
		{"X30", change(func(e *event) { e.Server, e.SNI = "http2", "" }), false}, // in the clear
		{"X10", change(func(e *event) { e.SNI = "denied.test" }), false},
		{"X10", change(func(e *event) { e.Dst = "52.1.2.20:443" }), false},
		{"E01", change(func(e *event) { e.Server, e.Dst, e.SNI = "tcp", "52.1.2.10:80", "" }), false},
		{"D06", event{Server: "dns", Dst: "[::]:53", Host: "x.wild.test"}, true},
		{"D06", event{Server: "tls", Dst: "52.1.2.20:443"}, false},
		{"X02", inside, false}, // nothing excuses a denied host
	} {
		if got := l.excused(&chosen{probe: find(c.id)}, c.e); got != c.want {
			t.Errorf("%s %+v: %v", c.id, c.e, got)
		}
	}
	l.o.Residual = policy.Residual(plan.Policy{Rules: []plan.Rule{{Host: "allowed.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: policy.ClassExact, Inspect: true}}})
	if l.excused(&chosen{probe: find("X10")}, inside) {
		t.Error("an inspected host is excused")
	}
}

func TestZone(t *testing.T) {
	z := &zone{Allow: "allowed.test", Wildcard: "wild.test", Deny: "denied.test", AllowIP: netip.MustParseAddr("52.1.2.10"),
		DenyIP: netip.MustParseAddr("52.1.2.20"), DenyIP6: netip.MustParseAddr("2a0d::20"), HostIP: netip.MustParseAddr("51.1.2.2")}
	for _, c := range []struct {
		mode, name string
		want       string
	}{
		{dnsPublic, "allowed.test", "52.1.2.10"}, {dnsPublic, "x.wild.test", "52.1.2.10"}, {dnsPublic, "wild.test", "52.1.2.20"},
		{dnsLoopback, "allowed.test", "127.0.0.1"}, {dnsLoopback, "denied.test", "52.1.2.20"}, {dnsOwn, "allowed.test", "51.1.2.2"},
		{dnsMixed, "allowed.test", "52.1.2.10 127.0.0.1"}, {dnsMapped, "allowed.test", ""},
	} {
		z.set(c.mode)
		var got []string
		for _, ip := range z.answer(c.name, typeA) {
			got = append(got, ip.String())
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s %s: %q", c.mode, c.name, got)
		}
	}
	answer, name := z.reply(query("Allowed.Test", typeAAAA))
	if name != "allowed.test" || len(answer) < 40 || answer[7] != 1 {
		t.Errorf("%q %x", name, answer)
	}
	for _, bad := range [][]byte{nil, make([]byte, 11), append(query("a", typeA)[:14], 0xc0), answer} {
		if a, _ := z.reply(bad); a != nil {
			t.Errorf("%x was answered", bad)
		}
	}
}

func TestReadResidual(t *testing.T) {
	if _, err := ReadResidual(strings.NewReader(`{"format_version":"1.0"}`)); fault.As(err).Code != "no_egress" {
		t.Error(err)
	}
	doc := `{"format_version":"1.0","egress":{"rules_sha256":"sha256:` + strings.Repeat("0", 64) + `","residual":["a: b"]}}`
	if got, err := ReadResidual(strings.NewReader(doc)); err != nil || !slices.Equal(got, []string{"a: b"}) {
		t.Errorf("%q %v", got, err)
	}
}

func TestClientArgument(t *testing.T) {
	for _, args := range [][]string{nil, {"not base64!"}, {"e30", "e30"}, {"W10"}} {
		if err := client(args, &bytes.Buffer{}); err == nil || fault.As(err).Exit != fault.Usage {
			t.Errorf("%q: %v", args, err)
		}
	}
	raw, err := json.Marshal(spec{})
	if err != nil || bytes.Contains(raw, []byte(bait)) {
		t.Errorf("%s %v", raw, err)
	}
}

func TestProof(t *testing.T) {
	if _, ok := (&proof{Cert: []byte("x")}).holds("t"); ok {
		t.Error("no certificate at all proves something")
	}
	m, err := newMaterial("x.test")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := (&proof{Cert: m.Cert, Signature: []byte("x")}).holds("t"); ok {
		t.Error("any signature will do")
	}
}

func TestBeside(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := beside("bottle-vm"); fault.As(err).Code != "no_bottle_vm" || fault.As(err).Exit != fault.Unavailable {
		t.Error(err)
	}
	own := filepath.Join(os.Getenv("PATH"), "bottle-vm")
	if err := os.WriteFile(own, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := beside("bottle-vm"); got != own || err != nil {
		t.Errorf("%q %v", got, err)
	}
}
