//go:build linux

package smolvm

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"
)

// greets answers "hi" at an address of the host, and gives the port. Each visit is
// told to hits, which may be nil.
func greets(t *testing.T, addr string, hits chan<- string) int {
	t.Helper()
	l, err := net.Listen("tcp", addr)
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
			if hits != nil {
				hits <- l.Addr().String()
			}
			go func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(30 * time.Second))
				_, _ = c.Read(make([]byte, 4096))
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nhi\n")
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// get asks for a URL from inside of a bottle: what came, or the gate's status.
func (w *world) get(id, url string) string {
	w.t.Helper()
	r := w.sh("bottle-vm exec " + id + " -- wget -q -T 60 -O- " + url)
	switch {
	case r.code == 0:
		return r.out
	case strings.Contains(r.err, "403"):
		return "403"
	}
	return fmt.Sprintf("%+v", r)
}

// rules are those that were added to a running bottle.
func (w *world) rules(id string) string {
	w.t.Helper()
	return w.ok("bottle-egress rules --bottle " + id + ` | jq -r '.verdict + " " + .host'`)
}

// Stopped and started again, a bottle is no wider than it was: a deny that was
// added stays, an allow does not. Nothing can be asked of it meanwhile. It can be
// removed while it starts, and a home that is kept outlives it.
func TestAgain(t *testing.T) {
	w := newWorld(t, "user")
	port := greets(t, "127.0.0.1:0", nil)
	host := func(name string) string {
		return fmt.Sprintf(`{"host":%q,"ports":[%d],"protocol":"http","addresses":["127.0.0.1"]}`, name, port)
	}
	url := func(name string) string { return fmt.Sprintf("http://%s:%d/", name, port) }
	w.manifest(`,"home":"keep","egress":{"allow":[` + host("web.test") + `,` + host("other.test") + `]}`)
	id := w.up()
	if got := w.get(id, url("web.test")); got != "hi\n" {
		t.Fatalf("the control: %s", got)
	}
	w.ok("bottle-egress deny --bottle " + id + " web.test && bottle-egress allow --bottle " + id + " --for 2h added.test")
	if got := w.get(id, url("web.test")); got != "403" {
		t.Errorf("denied live: %s", got)
	}
	if got := w.rules(id); got != "deny web.test\nallow added.test\n" && got != "allow added.test\ndeny web.test\n" {
		t.Errorf("rules: %q", got)
	}
	w.ok("bottle-vm exec " + id + " -- sh -c 'echo of the home >$HOME/mine'")

	w.ok("bottle-vm stop " + id)
	for _, verb := range []string{"deny --bottle " + id + " other.test", "allow --bottle " + id + " --for 1h added.test", "rules --bottle " + id} {
		if r := w.sh("bottle-egress " + verb); r.code != 69 || !strings.Contains(r.err, "is not running") || strings.Count(r.err, "\n") != 1 {
			t.Errorf("%s of a stopped bottle: %+v", verb, r)
		}
	}
	w.ok("bottle-vm start " + id)
	for name, want := range map[string]string{"web.test": "403", "other.test": "hi\n", "added.test": "403"} {
		if got := w.get(id, url(name)); got != want {
			t.Errorf("%s, started again: %s, want %s", name, got, want)
		}
	}
	if got := w.rules(id); got != "deny web.test\n" {
		t.Errorf("rules, started again: %q", got)
	}
	if got := w.ok("bottle-vm exec " + id + " -- sh -c 'cat $HOME/mine'"); got != "of the home\n" {
		t.Errorf("the home, started again: %q", got)
	}
	if out := w.ok("bottle-egress log --verify " + id); gjson.Get(out, "verdict").Str != "whole" {
		t.Errorf("the audit log: %s", out)
	}

	// Removed while its guest boots.
	w.ok("bottle-vm stop " + id)
	_, end := w.begin("exec bottle-vm start " + id)
	awaited(t, 2*time.Minute, "boot", func() string { return one(w.processesOf("_boot-vm")) })
	w.ok("bottle-vm down " + id)
	if r := end(); r.code != 69 || !strings.Contains(r.err, "was removed while it was being started") || strings.Count(r.err, "\n") != 1 {
		t.Errorf("a start whose bottle was removed: %+v", r)
	}
	if got := strings.TrimSpace(w.ok("bottle-vm ls; $BOTTLE_SMOLVM machine ls --json | jq length")); got != "0" {
		t.Errorf("left: %s", got)
	}
	if left := append(w.processesOf("_boot-vm"), w.processesOf("bottle-keeper")...); len(left) != 0 {
		t.Errorf("processes are left: %v", left)
	}

	// The next bottle of the agent has its home, and none of the rules.
	id = w.up()
	if got := w.ok("bottle-vm exec " + id + " -- sh -c 'cat $HOME/mine'"); got != "of the home\n" {
		t.Errorf("the kept home: %q", got)
	}
	if got := w.get(id, url("web.test")); got != "hi\n" {
		t.Errorf("web.test in a new bottle: %s", got)
	}
}

// elsewhere is an address that looks public, and is the rig's own while somebody
// serves there. pipelock has to have looked before that which are the host's own.
const elsewhere = "93.184.216.34"

// The same with pipelock behind the gate: a new one is there after a start, with
// the rules that stay.
func TestAgainPipelock(t *testing.T) {
	inRig(t)
	program := os.Getenv("BOTTLE_PIPELOCK")
	if program == "" {
		t.Skip("SKIPPED: BOTTLE_PIPELOCK is not set, so no bottle with the real pipelock is started again")
	}
	w := newWorld(t, "user")
	w.env = append(w.env, "BOTTLE_PIPELOCK="+program)
	run := func(script string) {
		t.Helper()
		if out, err := exec.Command("/bin/sh", "-c", script).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", script, err, out)
		}
	}
	run("cp /etc/hosts /tmp/hosts.before; echo '" + elsewhere + " web.test other.test' >>/etc/hosts")
	t.Cleanup(func() {
		run("cat /tmp/hosts.before >/etc/hosts; ip addr del " + elsewhere + "/32 dev lo 2>/dev/null || :")
	})
	greets(t, ":80", nil)
	serving := func(verb string) { run("ip addr " + verb + " " + elsewhere + "/32 dev lo") }
	pipelocked := func(doc string) (id string) {
		t.Helper()
		if got := gjson.Get(doc, "vm.proxy.name").Str; got != "pipelock" {
			t.Fatalf("the proxy is %q: %s", got, doc)
		}
		id = gjson.Get(doc, "vm.id").Str
		awaited(t, 2*time.Minute, "pipelock", func() string {
			if strings.Contains(w.ok("bottle-vm status "+id), `"proxy":"up"`) {
				return "up"
			}
			return ""
		})
		return id
	}
	w.manifest(`,"egress":{"proxy":"pipelock","allow":[{"host":"web.test","ports":[80],"protocol":"http"},{"host":"other.test","ports":[80],"protocol":"http"}]}`)
	id := pipelocked(w.ok("bottle-plan sh | bottle-egress | bottle-pack | bottle-vm up"))
	serving("add")
	for _, name := range []string{"web.test", "other.test"} {
		if got := w.get(id, "http://"+name+"/"); got != "hi\n" {
			t.Fatalf("the control, %s: %s", name, got)
		}
	}
	w.ok("bottle-egress deny --bottle " + id + " other.test")
	w.ok("bottle-vm stop " + id)
	serving("del")
	if left := w.processesOf(program); len(left) != 0 {
		t.Errorf("a stopped bottle has a pipelock: %v", left)
	}
	pipelocked(w.ok("bottle-vm start " + id))
	if len(w.processesOf(program)) == 0 {
		t.Error("started again, and no pipelock runs")
	}
	serving("add")
	for name, want := range map[string]string{"web.test": "hi\n", "other.test": "403", "denied.test": "403"} {
		if got := w.get(id, "http://"+name+"/"); got != want {
			t.Errorf("%s, started again: %s, want %s", name, got, want)
		}
	}
	w.ok("bottle-vm down " + id)
	if left := w.processesOf(program); len(left) != 0 {
		t.Errorf("pipelock is left: %v", left)
	}
}
