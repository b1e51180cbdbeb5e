package verify

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/drift"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/state"
)

// fixture is a bottle with pipelock as it should be, but for its processes:
// there are none.
func fixture(t *testing.T) *Bottle {
	t.Helper()
	top := t.TempDir()
	at := func(p string) string { return filepath.Join(top, p) }
	for _, d := range []string{"run", "run/r", "state", "state/pipelock", "state/pipelock/conf"} {
		if err := os.Mkdir(at(d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	b := &plan.Bottle{ID: "a", Agent: "a", Manifest: plan.ManifestRef{Name: "bottle.json", SHA256: plan.SHA256(nil)},
		Runtime: plan.Runtime{Requested: "gvisor", Candidates: []plan.Candidate{{Engine: "gvisor", Why: "test"}}},
		Image:   plan.Image{Kind: "host"}, User: "agent", Home: "discard", Workspace: plan.Workspace{Path: ".", Mode: "rw"},
		Egress: plan.Policy{Proxy: "pipelock", Roots: []plan.Root{}, Rules: []plan.Rule{
			{Host: "a.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: "exact", From: "bottle.json:1:1"}}}}
	e, err := pipelock.Derive(b)
	if err != nil {
		t.Fatal(err)
	}
	d, err := plan.New(b)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := plan.Digest(b)
	if err != nil {
		t.Fatal(err)
	}
	const id = "a-01234567"
	x := &Bottle{
		Proc: drift.Proc(at("proc")), Dir: at("state"), Doc: d, Plan: b, Egress: e, Programs: "/opt/bin",
		VM:      &plan.VM{ID: id, Runtime: "gvisor", Proxy: plan.ProxyRef{Name: "pipelock"}},
		Record:  &state.Record{ID: id, RunDir: at("run"), PlanSHA256: digest},
		Sockets: []string{at("run/r/runsc.sock")},
	}
	run, sha := runFile(t, e.Pipelock.YAML, x)
	for name, text := range map[string]string{
		"run/keeper.sock": "", "state/record.json": "", "state/document.json": "", "state/lock": "",
		"state/keeper.log": "", "state/engine.log": "", "state/pipelock/conf/pipelock.yaml": run,
	} {
		if err := os.WriteFile(at(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	x.Sockets = nil // nobody listens here
	x.Answer = &control.Answer{Gate: "up", Proxy: "up", Report: &control.Report{
		GateRules: e.RulesSHA256, GateLive: policy.RulesSHA256(nil), ProxyConfig: sha, Document: plan.SHA256(d.Line())}}
	return x
}

func mustPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func runFile(t *testing.T, yaml string, x *Bottle) (run, sha string) {
	t.Helper()
	o, err := pipelock.CheckRun([]byte(yaml), []byte(yaml), filepath.Join(x.Dir, "pipelock", "kill"), x.VM.ID)
	if err == nil {
		t.Fatal("a policy is a run file")
	}
	o.Listen, o.MetricsListen = mustPort("127.0.0.1:1"), mustPort("127.0.0.1:2")
	raw, sum, err := pipelock.RunYAML([]byte(yaml), o)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw), "sha256:" + sum
}

// notRunning is what the fixture lacks.
var notRunning = []string{"drift keeper", "drift gate", "drift proxy", "unknown keeper: children"}

func TestCheck(t *testing.T) {
	added := live.Rule{Rule: plan.Rule{Host: "b.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: "exact"}, By: 7, Since: "now"}
	for _, tt := range []struct {
		name   string
		change func(*Bottle)
		want   []string
	}{
		{"as planned", func(*Bottle) {}, nil},
		{"another policy in the document", func(b *Bottle) { b.Plan.Egress.Rules[0].Host = "c.test" },
			[]string{"drift document: digest of bottle", "drift document: egress", "drift gate: rules", "drift proxy: configuration"}},
		{"another document", func(b *Bottle) { b.Answer.Report.Document = "x" }, []string{"drift document: digest of the whole"}},
		{"another bottle's document", func(b *Bottle) { b.VM.ID = "b-01234567" }, []string{"drift document: vm.id", "drift proxy: configuration"}},
		{"a gate with other rules", func(b *Bottle) { b.Answer.Report.GateRules = "x" }, []string{"drift gate: rules"}},
		{"a gate with other live rules", func(b *Bottle) { b.Answer.Report.GateLive = "x" }, []string{"drift gate: rules that were added"}},
		{"a live rule of which pipelock does not know", func(b *Bottle) {
			b.Answer.Live = []live.Rule{added}
			b.Answer.Report.GateLive = policy.RulesSHA256(live.Plain(b.Answer.Live))
		}, []string{"live gate: allow b.test port 443", "drift proxy: configuration"}},
		{"no gate", func(b *Bottle) { b.Answer.Gate = "down" }, []string{"drift gate"}},
		{"no proxy", func(b *Bottle) { b.Answer.Proxy = "down" }, []string{"drift proxy"}},
		{"a file that pipelock does not run with", func(b *Bottle) { b.Answer.Report.ProxyConfig = "x" }, []string{"drift proxy: digest"}},
		{"no file", func(b *Bottle) { os.Remove(filepath.Join(b.Dir, "pipelock/conf/pipelock.yaml")) },
			[]string{"unknown mode of", "unknown proxy: configuration"}},
		{"the kill switch", func(b *Bottle) { os.WriteFile(filepath.Join(b.Dir, "pipelock/kill"), nil, 0o600) }, []string{"drift proxy: kill switch"}},
		{"a keeper that does not answer", func(b *Bottle) { b.Answer, b.AnswerErr = nil, errors.New("no") },
			[]string{"unknown gate: rules", "unknown proxy: configuration", "unknown keeper: document"}},
		{"a keeper that does not report", func(b *Bottle) { b.Answer.Report = nil }, []string{"unknown gate: rules"}},
		{"a socket more", func(b *Bottle) { os.WriteFile(filepath.Join(b.Record.RunDir, "x.sock"), nil, 0o600) }, []string{"drift runtime folder"}},
		{"a socket less", func(b *Bottle) { b.Sockets = []string{"/run/none.sock"} }, []string{"drift runtime folder"}},
		{"readable state", func(b *Bottle) { os.Chmod(filepath.Join(b.Dir, "document.json"), 0o644) }, []string{"drift mode of"}},
	} {
		b := fixture(t)
		tt.change(b)
		f := &drift.Findings{Bottle: b.Record.ID}
		b.Check(f)
		var got []string
		for _, x := range f.List {
			got = append(got, x.Kind+" "+x.What)
		}
		for _, skip := range notRunning { // each once
			if i := slices.Index(got, skip); i >= 0 {
				got = slices.Delete(got, i, i+1)
			} else {
				t.Errorf("%s: %q is missing", tt.name, skip)
			}
		}
		if !slices.EqualFunc(got, tt.want, strings.HasPrefix) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// TestSidecar: a plan with addons is not as planned without a mitmdump, and one
// that the plan does not have is seen.
func TestSidecar(t *testing.T) {
	x := fixture(t)
	x.Plan.Egress.Mitmdump = &plan.Mitmdump{Addons: []plan.Addon{{Path: "a.py", SHA256: plan.SHA256(nil)}}}
	f := &drift.Findings{Bottle: "t"}
	x.sidecar(f, x.aside())
	if len(f.List) != 1 || f.List[0].Kind != drift.Unknown {
		t.Errorf("a keeper that does not tell: %+v", f.List)
	}
	x.Answer.Report.Sidecar = &control.Sidecar{Program: "/opt/mitmdump", Listen: "127.0.0.1:3", Back: "127.0.0.1:4"}
	f = &drift.Findings{Bottle: "t"}
	x.sidecar(f, x.aside())
	for _, what := range []string{"sidecar", "document: vm.sidecar", "sidecar: configuration"} {
		if !slices.ContainsFunc(f.List, func(g drift.Finding) bool { return g.Kind == drift.Drift && strings.HasPrefix(g.What, what) }) {
			t.Errorf("nothing of %q in %+v", what, f.List)
		}
	}
	x = fixture(t)
	x.VM.Sidecar = &plan.SidecarRef{Name: "mitmdump"}
	f = &drift.Findings{Bottle: "t"}
	x.sidecar(f, x.aside())
	if len(f.List) != 1 || f.List[0].Found != "mitmdump" {
		t.Errorf("one that is not planned: %+v", f.List)
	}
}
