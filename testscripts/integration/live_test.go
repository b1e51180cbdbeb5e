package integration

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/testscripts/harness"
)

// Hosts are opened and closed while a bottle runs, by its owner, and what is
// added outlives a gate.
func TestLiveRules(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		u := newUpstream(t, "planned.test", "new.test", "barred.test")
		w.Write("upstream.crt", u.ca)
		silent := silentServer(t)
		w.Manifest(fmt.Sprintf(`"runtime":"gvisor","egress":{"proxy":"builtin","roots":["upstream.crt"],
			"allow":[{"host":"planned.test","ports":[%d],"addresses":["127.0.0.1"]},
				{"host":"silent.test","ports":[%d],"protocol":"tcp","addresses":["127.0.0.1"]}],"deny":["barred.test"]}`, u.port, silent))
		id := w.Up()
		reach := func(host string) string {
			_, status, body := get(w, id, host, u.port, "/", "--cacert", "/workspace/upstream.crt")
			return status + " " + strings.TrimSpace(body)
		}
		allow := fmt.Sprintf("bottle-egress allow --bottle %s --addresses 127.0.0.1 ", id)
		if got := reach("new.test"); !contains(got, " 403") {
			t.Errorf("before: %s", got)
		}
		out := w.OK(allow + fmt.Sprintf("--for 1h --why 'a trial' new.test:%d", u.port))
		if g := gjson.Parse(out); g.Get("bottle").Str != id || g.Get("gate").Str != "up" || g.Get("rules.0.host").Str != "new.test" || g.Get("rules.0.by").Int() != int64(w.UID()) || g.Get("rules.0.until").Str == "" {
			t.Errorf("allow: %s", out)
		}
		if got := reach("new.test"); !contains(got, "served new.test/") {
			t.Errorf("allowed: %s", got)
		}
		// What the plan says stays: denied, and as it is.
		if r := w.Sh(allow + fmt.Sprintf("barred.test:%d", u.port)); r.Code != 1 || !contains(r.Stderr, "what the plan denies") {
			t.Errorf("a host that the plan denies: %+v", r)
		}
		if r := w.Sh(allow + fmt.Sprintf("planned.test:%d", u.port)); r.Code != 1 || !contains(r.Stderr, "allows planned.test") {
			t.Errorf("a host that the plan allows: %+v", r)
		}
		if s := w.OK("bottle-vm status " + id); gjson.Get(s, "live.0.host").Str != "new.test" || gjson.Get(s, "live.0.ends").Exists() {
			t.Errorf("status: %s", s)
		}

		// The next gate has the rules before it has a connection.
		gate := roleProcess(t, w, id, "gate")
		if err := syscall.Kill(gate, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, harness.Limit, func() string {
			if now := roleProcess(t, w, id, "gate"); now == gate || !contains(w.OK("bottle-vm status "+id), `"gate":"up"`) {
				return "no new gate"
			}
			return ""
		})
		if got := reach("new.test"); !contains(got, "served new.test/") {
			t.Errorf("at the next gate: %s", got)
		}

		// A tunnel that is open ends when its host is denied.
		tunnel := w.Cmd(t.Context(), "bottle-vm", "exec", id, "--", "bash", "-c",
			fmt.Sprintf(`exec 3<>/dev/tcp/127.0.0.1/3128; printf 'CONNECT silent.test:%d HTTP/1.1\r\n\r\n' >&3; cat <&3 >/dev/null`, silent))
		if err := tunnel.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- tunnel.Wait() }()
		harness.Eventually(t, harness.Limit, func() string {
			if !contains(w.OK("bottle-vm logs --audit "+id), "silent.test") {
				return "the tunnel is not there"
			}
			return ""
		})
		if out := w.OK("bottle-egress deny --bottle " + id + " silent.test planned.test"); gjson.Get(out, "cut").Int() != 1 {
			t.Errorf("deny: %s", out)
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the tunnel's client: %v", err)
			}
		case <-time.After(harness.Limit):
			t.Fatal("a tunnel to a host that was denied goes on")
		}
		if got := reach("planned.test"); !contains(got, " 403") {
			t.Errorf("denied: %s", got)
		}
		w.OK("bottle-egress revert --bottle " + id + " --all")
		if got := reach("planned.test"); !contains(got, "served planned.test/") {
			t.Errorf("reverted: %s", got)
		}
		if got := reach("new.test"); !contains(got, " 403") {
			t.Errorf("reverted: %s", got)
		}
		if got := w.OK("bottle-egress rules --bottle " + id); got != "" {
			t.Errorf("rules: %s", got)
		}
		if r := w.Sh("bottle-egress revert --bottle " + id + " new.test"); r.Code != 1 || !contains(r.Stderr, "no rule about new.test") {
			t.Errorf("again: %+v", r)
		}

		// An end holds without anybody's doing.
		w.OK(allow + fmt.Sprintf("--for 2s new.test:%d", u.port))
		harness.Eventually(t, harness.Limit, func() string {
			if got := reach("new.test"); !contains(got, " 403") {
				return got
			}
			return ""
		})
		harness.Eventually(t, harness.Limit, func() string {
			log := w.OK("bottle-vm logs --audit " + id)
			for _, want := range []string{"rule_added", "rule_reverted", "rule_expired", `"why"`, "a trial", `"by":` + strconv.Itoa(w.UID())} {
				if want != `"why"` && !contains(log, want) {
					return want + " is not in " + log
				}
			}
			return ""
		})

		// The bottle is its owner's alone.
		if w.Root() {
			return
		}
		if os.Geteuid() == 0 {
			refusedToRoot(t, w, id)
		}
		w.Down(id)
		if r := w.Sh("bottle-egress allow --bottle " + id + " x.test"); r.Code != 66 {
			t.Errorf("a bottle that is gone: %+v", r)
		}
	})
}

// silentServer takes connections and says nothing.
func silentServer(t *testing.T) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go io.Copy(io.Discard, c)
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// roleProcess gives the process of a bottle that its record names for a role.
func roleProcess(t *testing.T, w *harness.World, id, role string) int {
	t.Helper()
	rec := w.Read(w.State + "/bottle/bottles/" + id + "/record.json")
	pid := gjson.Get(rec, `processes.#(role=="`+role+`").pid`).Int()
	if pid == 0 {
		t.Fatalf("no %s in %s", role, rec)
	}
	return int(pid)
}

// refusedToRoot asks another user's keeper as root, who gets past the mode of
// any folder.
func refusedToRoot(t *testing.T, w *harness.World, id string) {
	t.Helper()
	run := gjson.Get(w.Read(w.State+"/bottle/bottles/"+id+"/record.json"), "run_dir").Str
	_, err := askAsMe(run)
	if err == nil || !contains(err.Error(), "belongs to uid") {
		t.Errorf("root asked a plain user's keeper: %v", err)
	}
}

func askAsMe(runDir string) (*control.Answer, error) {
	return control.Ask(runDir, control.Request{Do: "status"}, 5*time.Second)
}
