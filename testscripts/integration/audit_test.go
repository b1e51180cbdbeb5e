package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// TestAuditLog: the log of a bottle is rotated, read and summed up over its
// files, whole over a gate that is killed, and a bottle whose gate cannot come
// back says so, has no way out, and recovers.
func TestAuditLog(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(`"runtime":"gvisor","egress":{"proxy":"builtin","allow":["allowed.test"]}`)
		w.Env = append(w.Env, "BOTTLE_AUDIT_MIB=1", "BOTTLE_AUDIT_FILES=5")
		if r := w.Sh("bottle-plan | bottle-vm up --audit-mib 0"); r.Code != 64 || !contains(r.Stderr, "--audit-mib") {
			t.Errorf("%+v", r)
		}
		w.OK("bottle-plan | bottle-vm up -o doc.json")
		id := gjson.Get(w.Read("doc.json"), "vm.id").Str
		path := gjson.Get(w.Read("doc.json"), "vm.gate.audit_log").Str

		const asked = 1500
		ask := func(n int) string {
			return w.Exec(id, fmt.Sprintf(`curl -sS -m 60 -o /dev/null -w '%%{http_code}\n' "http://denied.test/%s/[1-%d]" | sort | uniq -c`, strings.Repeat("p", 900), n)).Out
		}
		if got := strings.Fields(ask(asked)); len(got) != 2 || got[0] != fmt.Sprint(asked) || got[1] != "403" {
			t.Fatalf("%q", got)
		}
		if _, err := os.Stat(path + ".000001"); err != nil {
			t.Error(err)
		}
		lines := w.OK("bottle-vm logs --audit " + id)
		if n := strings.Count(lines, `"host":"denied.test"`); n != asked {
			t.Errorf("%d of %d decisions", n, asked)
		}
		if got := w.OK("bottle-egress log " + id); got != lines {
			t.Error("bottle-egress log prints something else than bottle-vm logs --audit")
		}
		verify := func() string {
			r := w.Sh("bottle-egress log --verify " + id)
			if r.Code != 0 || gjson.Get(r.Out, "verdict").Str != "whole" || gjson.Get(r.Out, "files").Int() < 2 {
				t.Errorf("verify: %+v", r)
			}
			return gjson.Get(r.Out, "head.sha256").Str
		}
		pin := verify()

		kill := func() {
			if err := syscall.Kill(gatePid(t, w), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		until := func(what, want string) {
			for began := time.Now(); !contains(w.OK("bottle-vm status "+id), want); time.Sleep(20 * time.Millisecond) {
				if time.Since(began) > harness.Limit {
					t.Fatalf("%s: %s", what, w.OK("bottle-vm status "+id))
				}
			}
		}
		// A log that others may write is not written to: no gate comes back.
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		kill()
		until("the gate is gone", `"gate":"down"`)
		r := w.Exec(id, "curl -sS -m 10 -i http://allowed.test/")
		if !contains(r.Out, "503 Service Unavailable") || !contains(r.Out, `"code":"gate_down"`) || !contains(r.Out, "Retry-After: 1") {
			t.Errorf("without a gate: %+v", r)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		until("the gate is back", `"gate":"up"`)
		if got := ask(1); !contains(got, "403") {
			t.Errorf("%q", got)
		}
		if r := w.Sh("bottle-egress log --verify --pin " + pin + " " + id); r.Code != 0 {
			t.Errorf("verify: %+v", r)
		}
		r = w.Sh("bottle-vm down --report " + id)
		if r.Code != 0 || !contains(r.Stderr, fmt.Sprintf("denied denied.test:80, %d times", asked+1)) {
			t.Errorf("%+v", r)
		}
		// It outlives the bottle, and has ended in order.
		if r := w.Sh("bottle-egress log --verify " + id); r.Code != 0 || !gjson.Get(r.Out, "ended").Bool() {
			t.Errorf("verify: %+v", r)
		}
	})
}

// TestFullDisk: with no room for its log a bottle's gate is shut, its owner and
// its guest are told so, and with room again it is open.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounting a small tmpfs needs root")
	}
	w := harness.NewWorld(t)
	w.Manifest(`"runtime":"gvisor","egress":{"proxy":"builtin","allow":["allowed.test"]}`)
	w.OK("bottle-plan | bottle-vm up -o doc.json; bottle-vm down <doc.json")
	dir := filepath.Dir(gjson.Get(w.Read("doc.json"), "vm.gate.audit_log").Str)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16k,mode=700"); err != nil {
		t.Skipf("SKIPPED: no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	w.OK("bottle-plan | bottle-vm up -o doc.json")
	id := gjson.Get(w.Read("doc.json"), "vm.id").Str
	r := w.Exec(id, `curl -sS -m 60 "http://denied.test/[1-100]"`)
	if !contains(r.Out, `"code":"not_in_allowlist"`) || !contains(r.Out, `"code":"audit_failed"`) {
		t.Errorf("%.2000s %s", r.Out, r.Stderr)
	}
	status := w.OK("bottle-vm status " + id)
	if gjson.Get(status, "gate").Str != "shut" || !contains(gjson.Get(status, "reason").Str, "no space left on device") {
		t.Errorf("%s", status)
	}
	if logs := w.OK("bottle-vm logs " + id); !contains(logs, "nothing leaves the bottle until the audit log can be written") {
		t.Errorf("%s", logs)
	}
	// Another bottle does not start without a log.
	if r := w.Sh("bottle-plan | bottle-vm up"); r.Code == 0 || !contains(r.Stderr, "audit log") {
		t.Errorf("%+v", r)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=1m,mode=700"); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); gjson.Get(w.OK("bottle-vm status "+id), "gate").Str != "up"; time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > harness.Limit {
			t.Fatal(w.OK("bottle-vm status " + id))
		}
	}
	if r := w.Exec(id, "curl -sS -m 60 http://denied.test/"); !contains(r.Out, `"code":"not_in_allowlist"`) {
		t.Errorf("%+v", r)
	}
	w.OK("bottle-vm down " + id)
	if r := w.Sh("bottle-egress log --verify " + id); r.Code != 0 || !gjson.Get(r.Out, "ended").Bool() {
		t.Errorf("%+v", r)
	}
}

// TestLogTakenAway: a gate whose log is removed or cut ends, and the keeper, which
// knows how far it was, starts none that would begin another one.
func TestLogTakenAway(t *testing.T) {
	w := harness.NewWorld(t)
	w.Manifest(`"runtime":"gvisor","egress":{"proxy":"builtin","allow":["allowed.test"]}`)
	for name, do := range map[string]func(path string, pid int){
		"removed": func(path string, _ int) { os.Remove(path) },
		"cut, and the gate killed": func(path string, pid int) {
			raw, _ := os.ReadFile(path)
			if err := os.Truncate(path, int64(strings.IndexByte(string(raw), '\n')+1)); err != nil {
				t.Error(err)
			}
			syscall.Kill(pid, syscall.SIGKILL)
		},
	} {
		w.OK("bottle-plan | bottle-vm up -o doc.json")
		id, path := gjson.Get(w.Read("doc.json"), "vm.id").Str, gjson.Get(w.Read("doc.json"), "vm.gate.audit_log").Str
		ask := func() string { return w.Exec(id, "curl -sS -m 30 http://denied.test/").Out }
		if got := ask(); !contains(got, "not_in_allowlist") {
			t.Errorf("%s: %s", name, got)
		}
		time.Sleep(2500 * time.Millisecond) // until the line is on the disk, and the keeper told
		do(path, gatePid(t, w))
		var status string
		for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
			ask() // the gate notices with its next line
			if status = w.OK("bottle-vm status " + id); gjson.Get(status, "gate").Str == "down" && contains(status, "there will be no gate any more: audit log") {
				break
			}
			if time.Since(began) > harness.Limit {
				t.Fatalf("%s: %s", name, status)
			}
		}
		time.Sleep(700 * time.Millisecond) // longer than the keeper waits before it starts another
		if got := ask(); !contains(got, "gate_down") {
			t.Errorf("%s: %s", name, got)
		}
		if raw, err := os.ReadFile(path); err == nil && strings.Count(string(raw), "\n") > 1 {
			t.Errorf("%s: the log goes on:\n%s", name, raw)
		}
		w.OK("bottle-vm down " + id)
	}
}
