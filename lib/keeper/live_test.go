package keeper

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/cmd/bottle-egress/cli"
	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
)

// This binary is the gate, too, when a keeper starts it as one.
func TestMain(m *testing.M) {
	if slices.Equal(os.Args[1:], []string{"serve", "--keeper"}) {
		tool.Main("bottle-egress", cli.Run)
	}
	if play := os.Getenv("FAKE_PIPELOCK"); play != "" {
		os.Exit(fakePipelock(play, os.Args[1:]))
	}
	os.Exit(m.Run())
}

// gated is a keeper with a gate, and no guest.
func gated(t testing.TB, rules ...plan.Rule) *keeper { return proxied(t, "", rules...) }

// proxied is a keeper with a gate and, where program is not "", with that
// pipelock behind it.
func proxied(t testing.TB, program string, rules ...plan.Rule) *keeper {
	t.Helper()
	top, err := os.MkdirTemp("", "bk-") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	me, err := state.Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	root := &state.Root{Dir: filepath.Join(top, "state"), RunDir: filepath.Join(top, "run")}
	folder, rec, err := root.Create("a", state.Record{Creator: me})
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(top, "log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	b := &plan.Bottle{ID: "a", Agent: "a", Manifest: plan.ManifestRef{Name: "bottle.json", SHA256: plan.SHA256(nil)},
		Runtime: plan.Runtime{Requested: "gvisor", Candidates: []plan.Candidate{{Engine: "gvisor", Why: "test"}}},
		Image:   plan.Image{Kind: "host"}, User: "agent", Home: "discard", Workspace: plan.Workspace{Path: ".", Mode: "rw"},
		Egress: plan.Policy{Proxy: "builtin", Rules: rules, Roots: []plan.Root{}}, Command: []string{"true"}}
	k := &keeper{log: log, now: time.Now, phase: state.Ready, root: root, bottle: folder, rec: rec, plan: b,
		cfg: Config{ID: folder.ID, EgressExe: self, Base: top}, proxy: &proxyKeeper{}, guard: noGuard(), ended: make(chan struct{})}
	k.live = &liveRules{k: k, clock: live.Now}
	if k.doc, err = plan.New(b); err != nil {
		t.Fatal(err)
	}
	if program != "" {
		e, err := pipelock.Derive(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := k.doc.Set("egress", e); err != nil {
			t.Fatal(err)
		}
		k.cfg.Pipelock = program
		if k.proxy, err = startProxy(t.Context(), k); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { k.proxy.stop() })
	}
	if k.gate, err = startGate(k); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		k.mu.Lock()
		k.phase = stopped
		k.mu.Unlock()
		if err := k.gate.stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			said, _ := os.ReadFile(log.Name())
			t.Logf("log:\n%s", said)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := k.gate.awaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return k
}

func allowing(host string, port int) plan.Rule {
	return plan.Rule{Host: host, Ports: []int{port}, Protocol: "tls", Verdict: "allow", Class: "exact"}
}

func denying(host string) plan.Rule {
	return plan.Rule{Host: host, Ports: []int{}, Protocol: "any", Verdict: "deny", Class: "exact"}
}

func added(rules ...plan.Rule) control.Change { return control.Change{Add: rules} }

// code of the fault that a change ends with.
func (k *keeper) try(c control.Change) string {
	_, _, err := k.live.change(c, 7)
	if f := fault.As(err); f != nil {
		return f.Code
	}
	return ""
}

func digest(rules []live.Rule) string { return policy.RulesSHA256(live.Plain(rules)) }

func (k *keeper) gateHas(t testing.TB, want ...string) {
	t.Helper()
	list := k.live.list()
	var got []string
	for _, r := range list {
		got = append(got, r.Verdict+" "+r.Host)
	}
	if !slices.Equal(got, want) {
		t.Errorf("the keeper has %q, want %q", got, want)
	}
	a, err := k.live.report()
	if err != nil || a.LiveSHA256 != digest(list) || a.RulesSHA256 != policy.RulesSHA256(k.plan.Egress.Rules) {
		t.Errorf("the gate has other rules: %+v %v", a, err)
	}
}

func (k *keeper) audit(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(k.root.Audit(k.cfg.ID))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestLiveChanges(t *testing.T) {
	planned := allowing("planned.test", 443)
	planned.From = "bottle.json:1:1"
	barred := denying("barred.test")
	barred.From = "bottle.json:2:1"
	k := gated(t, planned, barred)
	k.gateHas(t)
	if code := k.try(added(allowing("a.test", 443), allowing("b.test", 8443))); code != "" {
		t.Fatal(code)
	}
	k.gateHas(t, "allow a.test", "allow b.test")
	inspected, two := allowing("c.test", 443), allowing("c.test", 443)
	inspected.Inspect, two.Ports = true, []int{443, 444}
	shouted := allowing("C.test", 443)
	var many []plan.Rule
	for i := range live.MaxRules {
		many = append(many, denying(fmt.Sprintf("n%d.test", i)))
	}
	for _, tt := range []struct {
		what string
		c    control.Change
		code string
	}{
		{"planned", added(allowing("planned.test", 443)), "already_allowed"},
		{"denied by the plan", added(allowing("x.test", 443), allowing("barred.test", 443)), "denied_by_rule"},
		{"inspected", added(inspected), "bad_rule"},
		{"two ports", added(two), "bad_rule"},
		{"no port", added(func() plan.Rule { r := allowing("c.test", 443); r.Ports = nil; return r }()), "bad_rule"},
		{"not normal", added(shouted), "bad_rule"},
		{"every host", added(func() plan.Rule { r := allowing("*.test", 443); r.Class = "wildcard"; return r }()), "too_broad"},
		{"too long", control.Change{Add: []plan.Rule{allowing("c.test", 443)}, For: live.MaxFor + 1}, "bad_rule"},
		{"backwards", control.Change{Add: []plan.Rule{allowing("c.test", 443)}, For: -1}, "bad_rule"},
		{"both", control.Change{Add: []plan.Rule{allowing("c.test", 443)}, All: true}, "bad_rule"},
		{"too many", added(many...), "too_many_rules"},
		{"nothing to take back", control.Change{Revert: []control.Target{{Host: "a.test"}, {Host: "c.test"}}}, "no_such_rule"},
		{"another port", control.Change{Revert: []control.Target{{Host: "a.test", Port: 8443}}}, "no_such_rule"},
	} {
		if code := k.try(tt.c); code != tt.code {
			t.Errorf("%s: %q, want %q", tt.what, code, tt.code)
		}
		k.gateHas(t, "allow a.test", "allow b.test") // all or nothing
	}
	// The same again replaces what was there; a deny closes the way for an allow.
	if code := k.try(control.Change{Add: []plan.Rule{allowing("a.test", 443)}, For: time.Hour}); code != "" {
		t.Error(code)
	}
	k.gateHas(t, "allow b.test", "allow a.test")
	if code := k.try(added(denying("planned.test"))); code != "" {
		t.Error(code)
	}
	if code := k.try(added(allowing("planned.test", 8443))); code != "denied_by_rule" {
		t.Error(code)
	}
	if code := k.try(control.Change{Revert: []control.Target{{Host: "b.test", Port: 8443}, {Host: "planned.test"}}}); code != "" {
		t.Error(code)
	}
	k.gateHas(t, "allow a.test")
	if code := k.try(control.Change{All: true}); code != "" {
		t.Error(code)
	}
	k.gateHas(t)
	log := k.audit(t)
	for what, n := range map[string]int{"rule_added": 3, "rule_replaced": 1, "rule_reverted": 3} {
		if got := strings.Count(log, what); got != n {
			t.Errorf("%d lines of %s, want %d, in\n%s", got, what, n, log)
		}
	}
}

// A gate that dies or hangs is replaced by one that has the rules; what was
// changed while there was none is in the log as well.
func TestLiveRulesOutliveGates(t *testing.T) {
	k := gated(t)
	if code := k.try(added(allowing("before.test", 443))); code != "" {
		t.Fatal(code)
	}
	first := k.gate.get()
	k.gate.restart() // the gate is gone before this returns
	if code := k.try(added(allowing("between.test", 443), denying("shut.test"))); code != "" {
		t.Fatal(code)
	}
	for range 6000 {
		if p := k.gate.get(); p != nil && p != first {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	k.gateHas(t, "allow before.test", "allow between.test", "deny shut.test")
	if log := k.audit(t); strings.Count(log, "between.test") != 1 || strings.Count(log, "before.test") != 1 {
		t.Error(log)
	}
}

// What ends while nobody asks is taken out, and written down.
func TestLiveRuleExpires(t *testing.T) {
	k := gated(t)
	if code := k.try(control.Change{Add: []plan.Rule{allowing("a.test", 443)}, For: 50 * time.Millisecond}); code != "" {
		t.Fatal(code)
	}
	for i := 0; !strings.Contains(k.audit(t), "rule_expired"); i++ {
		if i == 6000 {
			t.Fatal(k.audit(t))
		}
		time.Sleep(10 * time.Millisecond)
	}
	k.gateHas(t)
}

// A bottle that has stopped takes no rules.
func TestLiveChangeOfStopped(t *testing.T) {
	k := gated(t)
	k.mu.Lock()
	k.phase = stopped
	k.mu.Unlock()
	if code := k.try(added(allowing("a.test", 443))); code != "not_running" {
		t.Error(code)
	}
}

// The kernel tells who is at the other end.
func TestPeerUID(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if uid, err := peerUID(s); err != nil || uid != os.Geteuid() {
		t.Errorf("%d %v", uid, err)
	}
}

// From the request at the keeper's socket to the answer: the rule is in force at
// the gate, and its line in the log.
func BenchmarkLiveChange(b *testing.B) {
	k := gated(b)
	l, err := k.control()
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	rule := added(allowing("a.test", 443))
	b.ResetTimer()
	for range b.N {
		if _, err := control.Ask(k.rec.RunDir, control.Request{Do: "change", Change: &rule}, time.Minute); err != nil {
			b.Fatal(err)
		}
	}
}
