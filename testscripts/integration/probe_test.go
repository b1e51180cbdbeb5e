package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/pipelock/pipelocktest"
	"github.com/bottle-tools/bottle/testscripts/harness"
)

// verdicts runs bottle-probe as the world's user over what lies in files, and
// gives the lines by id. It fails the test where the exit status is not what the
// lines say.
func verdicts(t *testing.T, w *harness.World, args ...string) map[string]gjson.Result {
	t.Helper()
	// The laboratory's folder, which has to be gone afterwards.
	lab := filepath.Join(filepath.Dir(w.Dir), "lab")
	w.Write(filepath.Join(lab, ".keep"), "")
	log := filepath.Join(w.Home, "probe.log")
	cmd := append([]string{"TMPDIR=" + lab, "bottle-probe", "run", "--log", log}, args...)
	r := w.Long("env", cmd...)
	if strings.Contains(r.Stderr, "does not permit") {
		t.Skipf("SKIPPED: no laboratory on this host: %s", r.Stderr)
	}
	all := map[string]gjson.Result{}
	bad := 0
	for _, line := range strings.Split(strings.TrimSpace(r.Out), "\n") {
		v := gjson.Parse(line)
		all[v.Get("id").Str] = v
		if slices.Contains([]string{"leak", "fails", "void"}, v.Get("verdict").Str) {
			bad++
		}
	}
	if len(all) < 2 || r.Code != min(bad, 1) {
		t.Fatalf("exit %d, %d bad\n%s\n%s", r.Code, bad, r.Out, r.Stderr)
	}
	if left, _ := os.ReadDir(lab); len(left) != 1 {
		t.Errorf("left over in the laboratory's folder: %v", left)
	}
	if bad > 0 {
		raw, _ := os.ReadFile(log)
		t.Logf("what the sandbox said:\n%s", raw)
	}
	return all
}

// expect compares verdicts: what is not in but has to be one of wants.
func expect(t *testing.T, all map[string]gjson.Result, but map[string]string, wants ...string) {
	t.Helper()
	for id, v := range all {
		verdict := v.Get("verdict").Str
		want, special := but[id]
		if special && verdict != want || !special && !slices.Contains(wants, verdict) {
			t.Errorf("%s %s: %s (%s), want %s%q", id, v.Get("name").Str, verdict, v.Get("evidence").Str, want, wants)
		}
	}
	for id := range but {
		if _, ok := all[id]; !ok {
			t.Errorf("there is no %s", id)
		}
	}
}

// bottleManifest is what the bottle under test may do; canary-ca.pem is laid
// beside it by bottle-probe.
func bottleManifest(egress string) string {
	return `{"format_version":"1.0","bottles":{"dev":{"runtime":"gvisor","egress":{"roots":["canary-ca.pem"],` + egress + `}}},"agents":{"bash":{"bottle":"dev","command":["bash"]}}}`
}

const inspected = `"allow":["allowed.test",{"host":"plain.test","ports":[80],"protocol":"http"}],"inspect":["allowed.test"]`

var bottleSandbox = []string{"--allow", "allowed.test", "--deny", "denied.test", "--files", ".", "--inside", "/workspace", "--sandbox", "bottle run bash -- @PROBE"}

// open is what a run over inspected and plain HTTP rules does not decide.
func open(all map[string]gjson.Result) map[string]string {
	return map[string]string{
		"C05": "n/a", "D06": "n/a", // no wildcard
		"C08": "n/a", // a running bottle's
		"R02": "n/a", // no limit
		"R03": anyOf(all, "R03"), "N12": anyOf(all, "N12"),
	}
}

// TestProbeInspected: over inspected and plain HTTP rules nothing gets out of a
// bottle.
func TestProbeInspected(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Write("bottle.json", bottleManifest(`"proxy":"builtin",`+inspected))
		all := verdicts(t, w, append(bottleSandbox, "--allow-http", "plain.test")...)
		expect(t, all, open(all), "held", "works")
	})
}

// anyOf takes what a host without the means leaves undecided.
func anyOf(all map[string]gjson.Result, id string) string {
	if v := all[id].Get("verdict").Str; v == "held" || v == "n/a" {
		return v
	}
	return "held"
}

// TestProbeEndToEnd: over end-to-end TLS and a wildcard everything holds but what
// the document says that nobody can see.
func TestProbeEndToEnd(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Write("bottle.json", bottleManifest(`"proxy":"builtin","allow":["allowed.test","*.wild.test"]`))
		args := append(slices.Clone(bottleSandbox), "--allow", "*.wild.test", "--setup", "bottle-plan bash | bottle-egress >plan.json", "--document", "@WORKSPACE/plan.json")
		all := verdicts(t, w, args...)
		residual := map[string]string{"R02": "n/a", "R03": anyOf(all, "R03"), "N12": anyOf(all, "N12"), "C01": "n/a", "C06": "n/a", "C08": "n/a", "D06": "residual", "C05": "works"}
		for id, v := range all {
			switch name := v.Get("name").Str; {
			case slices.Contains([]string{"X10", "X29", "X30", "X31", "X32", "X42"}, id), strings.HasPrefix(id, "H") && id != "H12", strings.HasPrefix(name, "key-"), name == "git-push":
				residual[id] = "residual"
			case v.Get("evidence").Str == "no --allow-http was given":
				residual[id] = "n/a"
			}
		}
		residual["H12"] = "held"
		expect(t, all, residual, "held", "works")
	})
}

// TestProbeUnnamed: without the document, what it would excuse is a leak.
func TestProbeUnnamed(t *testing.T) {
	w := harness.NewWorld(t)
	w.Write("bottle.json", bottleManifest(`"proxy":"builtin","allow":["allowed.test"]`))
	all := verdicts(t, w, append(bottleSandbox, "--only", "host-fronting,connect-denied")...)
	expect(t, all, map[string]string{"C02": "works", "C07": "works", "X02": "held", "X10": "leak"})
}

// TestProbeFlood: a bottle's limit of processes holds.
func TestProbeFlood(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		m := bottleManifest(`"proxy":"builtin","allow":["allowed.test"]`)
		w.Write("bottle.json", strings.Replace(m, `"runtime"`, `"resources":{"pids":60},"runtime"`, 1))
		all := verdicts(t, w, append(bottleSandbox, "--only", "flood", "--pids", "60")...)
		expect(t, all, map[string]string{"C03": "works", "R02": "held"})
	})
}

// TestProbePipelock: the same with pipelock behind the gate.
func TestProbePipelock(t *testing.T) {
	program := pipelocktest.Path(t)
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Env = append(w.Env, "BOTTLE_PIPELOCK="+program)
		w.Write("bottle.json", bottleManifest(`"proxy":"pipelock",`+inspected))
		all := verdicts(t, w, append(bottleSandbox, "--allow-http", "plain.test")...)
		expect(t, all, open(all), "held", "works")
	})
}

// TestProbeBwrap: another sandbox, whose holes are known.
func TestProbeBwrap(t *testing.T) {
	w := harness.NewWorld(t)
	if r := w.Sh("bwrap --ro-bind / / --unshare-net true"); r.Code != 0 {
		t.Skipf("SKIPPED: bwrap does not work here: %s", r.Stderr)
	}
	all := verdicts(t, w, "--allow", "allowed.test", "--deny", "denied.test", "--only", "direct-tcp,udp,dns-libc,abstract-socket,docker-socket,environment,git-hook,control-workspace",
		"--sandbox", "bwrap --unshare-all --die-with-parent --ro-bind / / --bind @WORKSPACE @WORKSPACE --proc /proc --dev /dev @PROBE")
	expect(t, all, map[string]string{"S02": "leak", "S03": "leak", "S09": "leak", "C03": "works"}, "held")
}

// TestProbeLive: beside a running bottle, with nothing left in it afterwards.
func TestProbeLive(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(`"runtime":"gvisor","egress":{"allow":["allowed.test"]}`)
		id := w.Up()
		before := w.Exec(id, "ls -a /tmp /workspace").Out
		r := w.Long("bottle-probe", id)
		all := map[string]gjson.Result{}
		for _, line := range strings.Split(strings.TrimSpace(r.Out), "\n") {
			all[gjson.Get(line, "id").Str] = gjson.Parse(line)
		}
		if r.Code != 0 || r.Stderr != "" || len(all) < 100 {
			t.Fatalf("%+v", r)
		}
		for _, id := range []string{"N03", "L01", "X24", "X25", "S01", "S02", "S07", "S12", "S15"} {
			if all[id].Get("verdict").Str != "held" {
				t.Errorf("%s", all[id].Raw)
			}
		}
		if all["C08"].Get("verdict").Str != "works" || all["X10"].Get("verdict").Str != "n/a" {
			t.Errorf("%s\n%s", all["C08"].Raw, all["X10"].Raw)
		}
		if after := w.Exec(id, "ls -a /tmp /workspace").Out; after != before {
			t.Errorf("left in the bottle: %s, was %s", after, before)
		}
		// One whose keeper is dead cannot be asked: no_client.
		doc := w.Read(filepath.Join(w.State, "bottle", "bottles", id, "document.json"))
		pid := int(gjson.Get(doc, "vm.keeper.pid").Int())
		if pid == 0 {
			t.Fatalf("no keeper in %s", doc)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if r := w.Do(nil, "bottle-probe", id); r.Code != 69 || !contains(r.Stderr, "the client does not run in the bottle") {
			t.Errorf("no_client: %+v", r)
		}
		w.OK("bottle-gc --apply --min-age 0s")
		if r := w.Do(nil, "bottle-probe", "nobody"); r.Code != 66 || !contains(r.Stderr, `no bottle "nobody"`) {
			t.Errorf("%+v", r)
		}
	})
}
