package unit

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gate"
	"github.com/bottle-tools/bottle/lib/gitguard"
	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/trust"
)

func rules(n int) []plan.Rule {
	var all []plan.Rule
	for i := range n {
		all = append(all, plan.Rule{Host: "a.example.com", Ports: []int{i + 1}, Protocol: "tls", Verdict: "allow", Class: "exact"})
	}
	return all
}

func first(_ any, err error) error { return err }

// TestCodes brings about the errors that no command line leads to, or only by
// chance: each has its code, its exit status, and says what it is about.
func TestCodes(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("not a certificate"), 0o644); err != nil {
		t.Fatal(err)
	}
	in := func(p string) (string, error) { return filepath.Join(dir, p), nil }
	authority, err := ca.New("dev-01234567", []string{"a.example.com"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	closed := audit.New(discard{}, audit.Options{Bottle: "dev-01234567"})
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	trusting := &plan.Bottle{Manifest: plan.ManifestRef{Name: "bottle.json", SHA256: plan.SHA256(nil)}, Mounts: []plan.Mount{{Source: "/opt/x", Target: "/opt/x", Mode: "ro"}}}
	root := &state.Root{Dir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run")}
	deepDir := filepath.Join(dir, "ws")
	if err := os.MkdirAll(filepath.Join(deepDir, strings.Repeat("d/", 600)), 0o755); err != nil {
		t.Fatal(err)
	}
	var many strings.Builder
	for i := range 100 {
		fmt.Fprintf(&many, `"m%d":1,`, i)
	}
	for _, c := range []struct {
		code string
		exit int
		err  error
	}{
		{"bad_id", fault.Data, plan.CheckID("No Id")},
		{"bad_id", fault.Data, plan.CheckID("exec")},
		{"ca_without_hosts", fault.Bug, first(ca.New("x", nil, time.Now(), time.Hour))},
		{"inspect_address", fault.Data, first(ca.New("x", []string{"10.0.0.1"}, time.Now(), time.Hour))},
		{"ca_not_covered", fault.Bug, first(authority.Leaf("b.example.com"))},
		{"root_changed", fault.Data, first(ca.PlanRoots([]plan.Root{{Path: "file", SHA256: plan.SHA256([]byte("other"))}}, in))},
		{"no_root", fault.NoInput, first(ca.PlanRoots([]plan.Root{{Path: "none", SHA256: plan.SHA256(nil)}}, in))},
		{"bad_root", fault.Data, first(ca.PlanRoots([]plan.Root{{Path: "file", SHA256: plan.SHA256([]byte("not a certificate"))}}, in))},
		{"no_such_engine", fault.Host, first(engines.Find("docker"))},
		{"too_many_rules", fault.Data, first(policy.Compile(rules(policy.MaxPerHost + 1)))},
		{"egress_rule", fault.Data, first(pipelock.YAML(&plan.Bottle{Egress: plan.Policy{Rules: []plan.Rule{{Host: "*.com", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: "wildcard"}}}}))},
		{"no_system_roots", fault.Host, first(gate.New(gate.Config{Bottle: &plan.Bottle{
			Egress:  plan.Policy{Rules: rules(1)},
			Secrets: []plan.Secret{{Name: "K", From: "env:K", Inject: []plan.Injection{{Host: "a.example.com", Header: "x-key"}}}}}, Audit: closed, CA: authority}))},
		{"bad_injection", fault.Data, first(gate.New(gate.Config{Bottle: &plan.Bottle{
			Egress:  plan.Policy{Rules: rules(1)},
			Secrets: []plan.Secret{{Name: "K", From: "env:K", Inject: []plan.Injection{{Host: "a.example.com", Header: "two words"}}}}}, Audit: closed, CA: authority, RootsPEM: [][]byte{systemRoot(t)}}))},
		{"audit_closed", fault.IO, closed.Write(audit.Event{})},
		{"no_input", fault.NoInput, first(trust.Add(root, trust.Place{Base: filepath.Join(dir, "gone"), Home: dir}, trusting))},
		{"workspace_too_deep", fault.Host, first(gitguard.Plan(gitguard.Options{Workspace: deepDir}))},
		{"smolvm_usage", fault.Unavailable, &smolvm.Error{Kind: smolvm.ErrUsage}},
		{"smolvm_unsupported", fault.Host, &smolvm.Error{Kind: smolvm.ErrUnsupported}},
		{"smolvm_not_running", fault.Unavailable, &smolvm.Error{Kind: smolvm.ErrNotRunning}},
		{"smolvm_invalid_name", fault.Usage, &smolvm.Error{Kind: smolvm.ErrInvalidName}},
		{"smolvm_invalid_state", fault.Unavailable, &smolvm.Error{Kind: smolvm.ErrInvalidState}},
		{"smolvm_kvm", fault.Host, &smolvm.Error{Kind: smolvm.ErrKVM}},
		{"smolvm_not_ready", fault.Host, &smolvm.Error{Kind: smolvm.ErrNotReady}},
		{"smolvm_command", fault.Unavailable, &smolvm.Error{Kind: smolvm.ErrCommand}},
	} {
		f := fault.As(c.err)
		if f == nil || f.Code != c.code || f.Exit != c.exit || f.Error() == "" {
			t.Errorf("%s: %+v, want exit %d", c.code, f, c.exit)
		}
	}
	_, err = manifest.Load([]byte(`{"format_version":"1.0",`+many.String()+`"bottles":{}}`), "bottle.json", nil)
	problems, _ := err.(interface{ Unwrap() []error })
	if problems == nil {
		t.Fatalf("a hundred problems: %v", err)
	}
	all := problems.Unwrap()
	if f := fault.As(all[len(all)-1]); f.Code != "more_problems" || f.Exit != fault.Data {
		t.Errorf("a hundred problems: the last is %+v", f)
	}
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) Close() error                { return nil }

// systemRoot is any certificate: the gate wants one to trust.
func systemRoot(t *testing.T) []byte {
	t.Helper()
	a, err := ca.New("roots", []string{"example.com"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return a.CertPEM()
}
