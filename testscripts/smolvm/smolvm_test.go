//go:build linux

// Package smolvm is the suite of engine smolvm on the real thing: it runs inside
// of the rig (scripts/test-smolvm), where smolvm boots microVMs, and nowhere
// else. The test binary, the tools, an installed smolvm and an image lie in the
// folder that BOTTLE_RIG_JOB names.
package smolvm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/tidwall/gjson"
)

// callLimit is for an emulated machine on a busy host.
const callLimit = 15 * time.Minute

// world is one user's place in the rig.
type world struct {
	t    *testing.T
	dir  string
	cred *syscall.Credential
	env  []string
}

type result struct {
	code     int
	out, err string
}

// inRig skips outside of the rig, and says so.
func inRig(t *testing.T) string {
	t.Helper()
	job := os.Getenv("BOTTLE_RIG_JOB")
	if job == "" {
		t.Skip("SKIPPED: no microVM boots here; scripts/test-smolvm runs this inside of the rig")
	}
	return job
}

// newWorld makes a place for the named user, in memory: smolvm's disks are
// sparse files of 20 GiB, which not every file system takes.
func newWorld(t *testing.T, name string) *world {
	t.Helper()
	job := inRig(t)
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	dir, err := os.MkdirTemp("/tmp", "w.")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, cred: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	w.env = []string{
		"PATH=" + filepath.Join(job, "bin") + ":" + os.Getenv("PATH"), "HOME=" + dir, "LC_ALL=C.UTF-8",
		// smolvm unpacks itself once for each user; one home a user spares that.
		"XDG_CACHE_HOME=" + filepath.Join(os.TempDir(), "cache-"+name),
		"BOTTLE_SMOLVM=" + os.Getenv("BOTTLE_SMOLVM"),
	}
	if uid == 0 {
		w.env = append(w.env, "SMOLVM_VM_UID_DROP=off")
	}
	for _, d := range []string{dir, filepath.Join(os.TempDir(), "cache-"+name), filepath.Join(dir, "ws"), filepath.Join(dir, "img")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(d, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	w.ok("tar -C img -xf " + filepath.Join(job, "image.tar"))
	t.Cleanup(func() {
		if r := w.sh("bottle-vm down $(bottle-vm ls | jq -r .id); bottle-gc --check --min-age 0s; smolvm=$BOTTLE_SMOLVM; $smolvm machine ls --json | jq length"); r.code != 0 || !strings.HasSuffix(r.out, "0\n") {
			t.Errorf("something is left: %+v", r)
		}
		os.RemoveAll(dir)
	})
	return w
}

func (w *world) sh(script string) result { return w.within(callLimit, script) }

func (w *world) within(limit time.Duration, script string) result {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", script)
	cmd.Dir, cmd.Env = w.dir, w.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if cmd.ProcessState == nil {
		w.t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

func (w *world) ok(script string) string {
	w.t.Helper()
	r := w.sh(script)
	if r.code != 0 {
		w.t.Fatalf("%s: %+v", script, r)
	}
	return r.out
}

// manifest of one agent "sh" with a bottle on smolvm.
func (w *world) manifest(more string) {
	w.t.Helper()
	guest := "agent"
	if w.cred.Uid == 0 {
		guest = "root"
	}
	text := fmt.Sprintf(`{"format_version":"1.0","bottles":{"dev":{"runtime":"smolvm","image":"./img","user":%q,
		"workspace":{"path":"ws","mode":"rw"},"resources":{"cpus":1,"memory_mib":512}%s}},
		"agents":{"sh":{"bottle":"dev","command":["sh"]}}}`, guest, more)
	if err := os.WriteFile(filepath.Join(w.dir, "bottle.json"), []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) up(flags ...string) string {
	w.t.Helper()
	doc := w.ok("bottle-plan sh | bottle-egress | bottle-pack | bottle-vm up " + strings.Join(flags, " "))
	if got := gjson.Get(doc, "vm.runtime").Str; got != "smolvm" {
		w.t.Fatalf("it runs on %q", got)
	}
	return gjson.Get(doc, "vm.id").Str
}

func eachUser(t *testing.T, f func(*testing.T, *world)) {
	for _, name := range []string{"root", "user"} {
		t.Run(name, func(t *testing.T) { f(t, newWorld(t, name)) })
	}
}

// doctor knows by a boot that the engine works.
func TestDoctorBoots(t *testing.T) {
	w := newWorld(t, "user")
	out := w.sh("bottle-vm doctor --timeout 10m").out
	for line := range strings.Lines(out) {
		if gjson.Get(line, "check").Str == "engine smolvm" {
			if !gjson.Get(line, "ok").Bool() {
				t.Error(line)
			}
			return
		}
	}
	t.Errorf("no word about smolvm: %s", out)
}

// The life of a bottle: commands in all their forms, copies, the end.
func TestLife(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		w.manifest("")
		id := w.up()
		for _, c := range []struct {
			name, script string
			code         int
			out, err     string
		}{
			{"both streams", "bottle-vm exec ID -- sh -c 'echo out; echo err >&2'", 0, "out\n", "err\n"},
			{"stdin", "printf 'one\\ntwo\\n' | bottle-vm exec ID -- cat", 0, "one\ntwo\n", ""},
			{"a guest's 1", "bottle-vm exec ID -- sh -c 'echo Error: mine >&2; exit 1'", 1, "", "Error: mine\n"},
			{"3", "bottle-vm exec ID -- sh -c 'exit 3'", 3, "", ""},
			{"a guest's 124", "bottle-vm exec ID -- sh -c 'exit 124'", 124, "", ""},
			{"a guest's 125", "bottle-vm exec ID -- sh -c 'exit 125'", 125, "", ""},
			{"255", "bottle-vm exec ID -- sh -c 'exit 255'", 255, "", ""},
			{"killed", "bottle-vm exec ID -- sh -c 'kill -9 $$'", 137, "", ""},
			{"terminated", "bottle-vm exec ID -- sh -c 'kill -TERM $$'", 143, "", ""},
			{"folder and variable", "bottle-vm exec -w /tmp -e 'A=b c' ID -- sh -c 'pwd; echo \"$A\"'", 0, "/tmp\nb c\n", ""},
			{"workspace", "bottle-vm exec ID -- sh -c 'echo from the guest > f' && cat ws/f", 0, "from the guest\n", ""},
		} {
			r := w.sh(strings.ReplaceAll(c.script, "ID", id))
			if r.code != c.code || r.out != c.out || r.err != c.err {
				t.Errorf("%s: %+v", c.name, r)
			}
		}
		if r := w.sh("bottle-vm exec " + id + " -- nosuchcommand"); r.code != 127 {
			t.Errorf("no such command: %+v", r)
		}
		if r := w.sh("bottle-vm exec --timeout 3s " + id + " -- sleep 1000"); r.code != 124 {
			t.Errorf("timeout: %+v", r)
		}

		// A folder both ways; what leads out of it does not come along.
		w.ok("mkdir -p d/e && echo content > d/e/f && bottle-vm cp d " + id + ":/workspace/ && bottle-vm cp " + id + ":/workspace/d back")
		if got := w.ok("cat back/e/f back/d/e/f 2>/dev/null; cat ws/d/e/f"); !strings.Contains(got, "content\n") {
			t.Errorf("copied: %q", got)
		}
		if r := w.sh("ln -s /etc/passwd out && bottle-vm exec " + id + " -- ln -s /etc/passwd link && bottle-vm cp " + id + ":/workspace/link taken; cat taken"); strings.Contains(r.out, "root:") {
			t.Errorf("a link of the guest was followed: %+v", r)
		}

		t.Run("tty", func(t *testing.T) { w.terminal(t, id) })
		t.Run("unreachable", func(t *testing.T) { w.frozen(t, id) })
		t.Run("again", func(t *testing.T) { w.again(t, id) })
		w.ok("bottle-vm down " + id + " && bottle-vm down " + id)
	})
}

// terminal: a guest has a terminal in the size of ours, and hears of another one.
func (w *world) terminal(t *testing.T, id string) {
	cmd := exec.Command(filepath.Join(inRig(t), "bin", "bottle-vm"), "exec", "-t", id, "--", "sh", "-c", "tty; stty size; read x; stty size; echo got $x; exit 7")
	cmd.Dir, cmd.Env = w.dir, w.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred}
	term, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 99})
	if err != nil {
		t.Fatal(err)
	}
	defer term.Close()
	_ = term.SetDeadline(time.Now().Add(5 * time.Minute))
	var said bytes.Buffer
	await := func(part string) {
		t.Helper()
		for b := make([]byte, 4096); !strings.Contains(said.String(), part); {
			n, err := term.Read(b)
			said.Write(b[:n])
			if err != nil {
				t.Fatalf("no %q: %q, %v", part, said.String(), err)
			}
		}
	}
	await("33 99")
	if err := pty.Setsize(term, &pty.Winsize{Rows: 44, Cols: 111}); err != nil {
		t.Fatal(err)
	}
	// The size comes by a message of its own, which the line must not overtake.
	time.Sleep(3 * time.Second)
	fmt.Fprint(term, "a line\r")
	await("44 111")
	await("got a line")
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 7 {
		t.Errorf("status %v", err)
	}
	if strings.Contains(said.String(), "not a tty") {
		t.Errorf("no terminal: %q", said.String())
	}
}

// monitor gives the pid of the guest's monitor, as smolvm tells it.
func (w *world) monitor(t *testing.T, id string) int {
	t.Helper()
	out := w.ok("$BOTTLE_SMOLVM machine ls --json")
	pid := int(gjson.Get(out, `#(name=="`+id+`").pid`).Int())
	if pid <= 0 {
		t.Fatalf("no monitor: %s", out)
	}
	return pid
}

// frozen: a guest that does not answer for a while, which smolvm calls unreachable
// (and would kill and boot again, were it told to start it), is waited for.
func (w *world) frozen(t *testing.T, id string) {
	w.ok("bottle-vm exec " + id + " -- sh -c 'sleep 100000 & echo $! >/tmp/alive'")
	pid := w.monitor(t, id)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(pid, syscall.SIGCONT)
	if got := w.ok("$BOTTLE_SMOLVM machine status --name " + id + " --json"); gjson.Get(got, "pid").Int() != int64(pid) {
		t.Errorf("smolvm lost it: %s", got)
	} else {
		t.Logf("smolvm calls it %q", gjson.Get(got, "state").Str)
	}
	if got := w.ok("bottle-vm ls"); gjson.Get(got, "phase").Str != "ready" {
		t.Errorf("a frozen guest is taken for a dead one: %s", got)
	}
	if out := w.ok("bottle-gc"); out != "" {
		t.Errorf("a frozen guest is taken for an orphan: %s", out)
	}
	thawed := time.AfterFunc(4*time.Second, func() { syscall.Kill(pid, syscall.SIGCONT) })
	defer thawed.Stop()
	if r := w.sh("bottle-vm exec " + id + " -- sh -c 'kill -0 $(cat /tmp/alive) && echo the same guest'"); r.out != "the same guest\n" || r.code != 0 {
		t.Errorf("a command of a guest that was frozen as it began: %+v", r)
	}
	if now := w.monitor(t, id); now != pid {
		t.Errorf("it was booted again: %d, then %d", pid, now)
	}
}

// again: stop ends the guest, start boots it with its disk, and nothing else that
// it shows of the host, nor another way out.
func (w *world) again(t *testing.T, id string) {
	w.ok("bottle-vm exec " + id + " -- sh -c 'echo kept >$HOME/kept; echo gone >/dev/shm/gone'")
	boot := w.ok("bottle-vm exec " + id + " -- cat /proc/sys/kernel/random/boot_id")
	w.ok("bottle-vm stop " + id)
	if got := gjson.Get(w.ok("bottle-vm status "+id), "phase").Str; got != "stopped" {
		t.Errorf("phase %q", got)
	}
	if r := w.sh("bottle-vm exec " + id + " -- true"); r.code != 125 {
		t.Errorf("exec of a stopped bottle: %+v", r)
	}
	if out := w.ok("bottle-gc"); out != "" {
		t.Errorf("a stopped bottle is taken for an orphan: %s", out)
	}

	// A folder in whose place there is a link would be shown.
	w.ok("mv ws elsewhere && ln -s elsewhere ws")
	if r := w.sh("bottle-vm start " + id); r.code != 78 || !strings.Contains(r.err, "what the guest was given of the host has changed") {
		t.Errorf("a workspace that leads elsewhere: %+v", r)
	}
	if got := gjson.Get(w.ok("bottle-vm status "+id), "phase").Str; got != "stopped" {
		t.Errorf("phase %q", got)
	}
	w.ok("rm ws && mv elsewhere ws")

	doc := w.ok("bottle-vm start " + id)
	if gjson.Get(doc, "vm.id").Str != id || gjson.Get(doc, "vm.runtime").Str != "smolvm" {
		t.Errorf("document: %s", doc)
	}
	if got := gjson.Get(w.ok("bottle-vm status "+id), "phase").Str; got != "ready" {
		t.Errorf("phase %q", got)
	}
	if r := w.sh("bottle-vm start " + id); r.code != 75 {
		t.Errorf("start of a bottle that runs: %+v", r)
	}
	if got := w.ok("bottle-vm exec " + id + " -- sh -c 'cat $HOME/kept; cat /dev/shm/gone 2>/dev/null; cat f'"); got != "kept\nfrom the guest\n" {
		t.Errorf("disk and workspace: %q", got)
	}
	if w.ok("bottle-vm exec "+id+" -- cat /proc/sys/kernel/random/boot_id") == boot {
		t.Error("it is the same boot")
	}
	// The gate is there, and its log one chain.
	if r := w.sh("bottle-vm exec " + id + " -- wget -T 20 -O- http://denied.test/"); !strings.Contains(r.err, "403") {
		t.Errorf("no gate: %+v", r)
	}
	if out := w.ok("bottle-egress log --verify " + id); gjson.Get(out, "verdict").Str != "whole" {
		t.Errorf("the audit log: %s", out)
	}
	if r := w.sh("bottle-vm verify " + id); r.code == 1 {
		t.Errorf("verify: %+v", r)
	}
}

// Two at once know nothing of each other. Their names are as long as names can be.
func TestTwo(t *testing.T) {
	w := newWorld(t, "user")
	w.manifest("")
	long := strings.Repeat("a", 40)
	a, b := w.up("--name "+long), w.up("--name "+long)
	for _, id := range []string{a, b} {
		if !strings.HasPrefix(id, long+"-") || w.monitor(t, id) == 0 {
			t.Errorf("the name of %s", id)
		}
	}
	if w.ok("bottle-vm exec "+a+" -- hostname") == w.ok("bottle-vm exec "+b+" -- hostname") {
		t.Error("they have one name")
	}
	w.ok("bottle-vm down " + a)
	w.ok("bottle-vm exec " + b + " -- true")
}

// The jail: one way out, and the gate at its end. The first two probes are those
// that claude_bottle planned.
func TestJail(t *testing.T) {
	w := newWorld(t, "user")
	hits := make(chan string, 100)
	listen := func(addr string) int { return greets(t, addr, hits) }
	allowed, other := listen("127.0.0.1:0"), listen("127.0.0.1:0")
	w.manifest(fmt.Sprintf(`,"egress":{"allow":[{"host":"web.test","ports":[%d],"protocol":"http","addresses":["127.0.0.1"]}]}`, allowed))
	id := w.up()
	reached := func() (got []string) {
		for {
			select {
			case a := <-hits:
				got = append(got, a)
			case <-time.After(time.Second):
				return got
			}
		}
	}
	wget := func(env, url string) {
		w.sh("bottle-vm exec " + id + " -- sh -c '" + env + " wget -q -T 5 -O- " + url + "'")
	}

	t.Run("control", func(t *testing.T) {
		wget("", fmt.Sprintf("http://web.test:%d/", allowed))
		if got := reached(); len(got) != 1 {
			t.Fatalf("what is allowed was not reached: %v", got)
		}
	})
	t.Run("localhost-reach", func(t *testing.T) {
		for _, p := range []int{allowed, other} {
			for _, h := range []string{"127.0.0.1", "localhost", "10.0.2.15", "100.96.0.1", "host.smolvm.internal", "[::1]"} {
				wget("unset http_proxy HTTP_PROXY;", fmt.Sprintf("http://%s:%d/", h, p))
				wget("", fmt.Sprintf("http://%s:%d/", h, p))
			}
		}
		if got := reached(); len(got) != 0 {
			t.Errorf("host ports answered: %v", got)
		}
	})
	t.Run("egress-port-bypass", func(t *testing.T) {
		wget("", fmt.Sprintf("http://web.test:%d/", other))
		wget("unset http_proxy HTTP_PROXY;", fmt.Sprintf("http://web.test:%d/", other))
		if got := reached(); len(got) != 0 {
			t.Errorf("another port of an allowed host answered: %v", got)
		}
	})
	// What smolvm leaves open to everybody (agent.sock, mode 0777: guest root) lies
	// in folders that are not.
	t.Run("other-users", func(t *testing.T) {
		data := strings.TrimSpace(w.ok("$BOTTLE_SMOLVM machine data-dir --name " + id))
		record := w.ok("cat $(bottle-vm status " + id + " | jq -r .state_dir)/record.json")
		sockets := 0
		for _, dir := range []string{data, gjson.Get(record, "run_dir").Str} {
			err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
				if err != nil || e.Type() != os.ModeSocket {
					return err
				}
				sockets++
				t.Logf("%s", path)
				cmd := exec.Command("/usr/bin/test", "-e", path)
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
				if cmd.Run() == nil {
					t.Errorf("other users can reach %s", path)
				}
				return nil
			})
			if err != nil || dir == "" {
				t.Errorf("%q: %v", dir, err)
			}
		}
		if sockets < 3 { // agent.sock, gate.sock, keeper.sock at least
			t.Errorf("%d sockets only: it did not look where they are", sockets)
		}
	})
	t.Run("devices", func(t *testing.T) {
		if got := w.ok("bottle-vm exec " + id + " -- sh -c 'cat /proc/net/route; ls /sys/class/net'"); strings.Contains(got, "eth") {
			t.Errorf("the guest has a network device: %s", got)
		}
	})
}

// The image is one for all bottles: root of a guest's kernel, who has smolvm's
// file server of it to himself, changes nothing, and the host sees no copy.
func TestImageIsShared(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		w.manifest("")
		id := w.up()
		cache := w.ok("bottle-pack ls | jq -r .rootfs | head -1")
		cache = strings.TrimSpace(cache)
		before := w.ok("cd " + cache + " && find . -ls | sha256sum")
		r := w.sh("$BOTTLE_SMOLVM machine exec --name " + id + ` -- sh -c '
			mkdir -p /m && mount -t virtiofs smolvm_layers /m && echo mounted && test -e /m/bin/busybox
			touch /m/new /m/bin/new; echo changed >/m/etc/passwd; rm -f /m/bin/busybox; chmod 777 /m/etc
			mount -o remount,rw /m; touch /m/etc/new
			echo own >/etc/passwd && cat /etc/passwd'`)
		if r.out != "mounted\nown\n" || strings.Count(r.err, "Read-only file system") != 6 {
			t.Errorf("%+v", r)
		}
		if after := w.ok("cd " + cache + " && find . -ls | sha256sum"); after != before {
			t.Errorf("the image was changed: %s", w.ok("find "+cache+" -newer bottle.json"))
		}
		place := w.ok("bottle-vm status " + id + " | jq -r .state_dir")
		if left := w.ok("find " + strings.TrimSpace(place) + "/smolvm/rootfs -mindepth 1 | head -3"); left != "" {
			t.Errorf("it is a copy: %s", left)
		}
		w.ok("bottle-vm exec " + id + " -- true && bottle-vm down " + id)
	})
}
