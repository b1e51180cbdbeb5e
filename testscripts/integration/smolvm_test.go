package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// script is a smolvm that keeps machines as files beside itself, and does what
// the file "act" there says, which a test writes. Its guest is a sleep that has
// the workspace open, as a real monitor has, and whose helper tells the keeper that
// it is ready.
const script = `#!/bin/sh
d=${0%/*}; echo "$*" >>"$d/calls"
name=; labels=; ws=; gate=; prev=
for a; do
	case "$prev" in
	--name) name=$a ;;
	--label) labels="$labels,\"${a%%=*}\":\"${a#*=}\"" ;;
	--mount-socket) gate=${a%%:*} ;;
	-s) ws=$(grep -o '"[^"]*:/workspace"' "$a"); ws=${ws#?}; ws=${ws%:/workspace?} ;;
	esac
	[ "$a" = -- ] && break
	prev=$a
done
m=$d/m/$name
is() { [ "$verb" = "$1" ]; }
notfound() { echo "Error: vm not found: $name" >&2; exit 1; }
verb=$2; [ "$1" = --version ] && verb=version
. "$d/act"
case "$verb" in
version) echo smolvm 1.9.1 ;;
create) mkdir -p "$d/m"; echo "$ws" >"$m.ws"; echo "$gate" >"$m.gate"; echo null >"$m.pid"; echo created >"$m.state"; date +%s >"$m.at"; echo "{${labels#,}}" >"$m" ;;
data-dir) [ -f "$m" ] || notfound; echo "$d/vms/$name" ;;
start)
	[ -f "$m" ] || notfound
	ws=$(cat "$m.ws"); [ -n "$ws" ] || ws=/ # a boot check has none
	sleep 1000 3<"$ws" >/dev/null 2>&1 & echo $! >"$m.pid"; echo running >"$m.state"
	gate=$(cat "$m.gate")
	[ -z "$gate" ] || [ -e "$d/mute" ] || python3 -c 'import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(99); s.send(b"{}\n")' "$gate" ;;
ls|status)
	[ $verb = status ] && { [ -f "$m" ] || notfound; set -- "$m"; } || { set -- "$d"/m/*-????????; echo '['; }
	sep=
	for f; do
		case "$f" in "$d"/m/*.*) continue ;; esac
		[ -f "$f" ] || continue
		echo "$sep{\"name\":\"${f##*/}\",\"state\":\"$(cat "$f.state")\",\"pid\":$(cat "$f.pid"),\"created_at\":$(cat "$f.at"),\"labels\":$(cat "$f")}"; sep=,
	done
	[ $verb = status ] || echo ']' ;;
delete)
	[ -f "$m" ] || notfound
	pid=$(cat "$m.pid"); [ "$pid" = null ] || kill -9 "$pid"
	rm -f "$m" "$m".*; rm -rf "$d/vms/$name" ;;
exec)
	[ -f "$m" ] || notfound ;;
*) echo "error: unrecognized subcommand" >&2; exit 2 ;;
esac
`

// fakeSmolvm is a world whose smolvm is the script.
type fakeSmolvm struct {
	*harness.World
	dir string
}

func newFakeSmolvm(t *testing.T) fakeSmolvm {
	t.Helper()
	w := harness.NewWorld(t)
	f := fakeSmolvm{w, filepath.Join(w.Home, "fake")}
	w.Write(filepath.Join(f.dir, "smolvm"), script)
	w.OK("chmod 755 " + f.dir + "/smolvm; mkdir ws; chmod 777 ws")
	f.act("")
	w.Env = append(w.Env, "BOTTLE_SMOLVM="+filepath.Join(f.dir, "smolvm"), "SMOLVM_VM_UID_DROP=off")
	rootfs(t, w)
	w.Manifest(`"runtime":"smolvm","image":"./img","workspace":{"path":"ws"}`)
	return f
}

// act is what smolvm does before what it would do; $verb is the subcommand.
func (f fakeSmolvm) act(body string) { f.Write(filepath.Join(f.dir, "act"), body+"\n") }

func (f fakeSmolvm) machines() string {
	return f.OK("cd " + f.dir + " && ls m 2>/dev/null | grep -v '[.]' || true")
}

// up gives what up answers.
func (f fakeSmolvm) up() harness.Result { return f.Sh("bottle-plan | bottle-vm up") }

// oneError expects one line on stderr, without control characters, of a sane
// length.
func oneError(t *testing.T, what string, r harness.Result) {
	t.Helper()
	line := strings.TrimSuffix(r.Stderr, "\n")
	if line == "" || len(line) > 8<<10 || strings.ContainsFunc(line, func(c rune) bool { return c < ' ' || c == 0x7f || 0x80 <= c && c < 0xa0 }) {
		t.Errorf("%s: not one clean line on stderr (%d bytes): %.600q", what, len(r.Stderr), r.Stderr)
	}
}

// TestSmolvmMisbehaves: whatever smolvm does, up ends with one error that has
// smolvm's own words in it, and nothing is left.
func TestSmolvmMisbehaves(t *testing.T) {
	f := newFakeSmolvm(t)
	for _, c := range []struct {
		name, act string
		exit      int
		code      string
		says      []string
	}{
		{"garbage for a version", `is version && { echo hello; echo noise >&2; exit 0; }`, 69, "smolvm_garbage", []string{"hello", "noise"}},
		{"an older world", `is version && { echo smolvm 1.7.9; exit; }`, 69, "smolvm_too_old", []string{"1.8.0"}},
		{"the Python package", `is version && { echo smolvm 0.0.36; exit; }`, 69, "smolvm_wrong_program", []string{"Python package"}},
		{"output without end", `is version && exec yes`, 69, "smolvm_garbage", []string{"more than 16 MiB"}},
		{"errors without end", `is create && exec yes >&2`, 69, "smolvm_garbage", []string{"more than 16 MiB"}},
		{"killed", `is create && kill -9 $$`, 69, "smolvm_failed", []string{"killed"}},
		{"an error with a terminal's words", `is create && { printf 'Error: \033[31mred\033[0m \033]0;title\007 \302\2332J broken\n' >&2; exit 1; }`, 69, "smolvm_failed", []string{"broken"}},
		{"a long error", `is create && { echo "Error: begin" >&2; i=0; while [ $i -lt 3000 ]; do echo "line $i of nonsense" >&2; i=$((i+1)); done; echo "the end" >&2; exit 1; }`, 69, "smolvm_failed", []string{"Error: begin", "the end"}},
		{"a flag that is gone", `is create && { echo "error: unexpected argument '--mount-socket' found" >&2; exit 2; }`, 69, "smolvm_", []string{"--mount-socket"}},
		{"its disk is full", `is start && { echo "Error: storage operation failed: No space left on device (os error 28)" >&2; exit 1; }`, 73, "smolvm_disk_full", []string{"No space left"}},
		{"no KVM", `is start && { echo "Error: agent operation failed: KvmOpen(Error(13))" >&2; exit 1; }`, 78, "smolvm_boot", []string{"KvmOpen(Error(13))"}},
		{"a folder that is none", `is data-dir && { echo nowhere; exit; }`, 69, "smolvm_garbage", []string{"nowhere"}},
		{"a folder that is too much", `is data-dir && { echo /; exit; }`, 74, "smolvm_data_dir", nil},
		{"status without end", `is status && [ -f "$m" ] && exec yes '{'`, 69, "smolvm_garbage", []string{"more than 16 MiB"}},
		{"another machine's status", `is status && [ -f "$m" ] && { echo '{"name":"x"}'; exit; }`, 69, "smolvm_garbage", nil},
		{"a guest that never answers", `is start && touch "$d/mute"; is exec && { rm -f "$d/mute"; echo "Error: agent operation failed: connect: machine is not running" >&2; exit 1; }`, 69, "smolvm_not_running", []string{"is not running"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.act(c.act)
			r := f.up()
			got := gjson.Get(r.Out, "error.code").Str
			if r.Code != c.exit || !strings.HasPrefix(got, c.code) {
				t.Errorf("exit %d, %s; want %d, %s\n%.2000s", r.Code, got, c.exit, c.code, r.Stderr)
			}
			oneError(t, c.name, harness.Result{Stderr: lastLine(r.Stderr)})
			has(t, "stderr", r.Stderr, c.says...)
			f.act("")
			// What could not be removed at once is an orphan that gc removes.
			f.OK("bottle-gc --apply --min-age 0s")
			if left := f.machines(); left != "" {
				t.Errorf("machines are left: %s", left)
			}
			f.Gone()
		})
	}
	for name, c := range map[string]struct{ prepare, code string }{
		"missing":        {"rm smolvm2 2>/dev/null; true", "smolvm_missing"},
		"not executable": {"echo '#!/bin/sh' >smolvm2; chmod 644 smolvm2", "smolvm_missing"},
		"a folder":       {"rm -f smolvm2; mkdir smolvm2", "smolvm_missing"},
		"no program":     {"rmdir smolvm2; printf '\\177ELF junk' >smolvm2; chmod 755 smolvm2", "smolvm_wrong_program"},
		"no interpreter": {"echo '#!/nonexistent/sh' >smolvm2; chmod 755 smolvm2", "smolvm_missing"},
	} {
		f.Sh("cd " + f.dir + "; rm -rf smolvm2; mkdir -p smolvm2; rmdir smolvm2;" + strings.ReplaceAll(c.prepare, "rmdir smolvm2; ", ""))
		r := f.Sh("bottle-plan | BOTTLE_SMOLVM=" + f.dir + "/smolvm2 bottle-vm up")
		if got := gjson.Get(r.Out, "error.code").Str; r.Code != 69 || got != c.code {
			t.Errorf("%s: %+v", name, r)
		}
		oneError(t, name, r)
	}
}

// TestSmolvmWarmAuto: --warm is for smolvm, so with runtime auto the refusal says
// why smolvm cannot, and not only that gVisor does not either.
func TestSmolvmWarmAuto(t *testing.T) {
	f := newFakeSmolvm(t)
	f.Manifest(`"runtime":"auto","image":"./img","workspace":{"path":"ws"}`)
	for _, c := range []struct{ name, smolvm, act, code, says string }{
		{"a version that was not measured", f.dir + "/smolvm", `is version && { echo smolvm 1.12.0; exit; }`, "warm_version|warm_user", "a copy|this is 1.12.0"},
		{"no guest boots", f.dir + "/smolvm", `is start && { echo "Error: agent operation failed: KvmOpen(Error(13))" >&2; exit 1; }`, "warm_slower", "KvmOpen"},
		{"no smolvm", "/nonexistent", "", "warm_slower", "not smolvm: "},
	} {
		f.act(c.act)
		r := f.Sh("bottle-plan | BOTTLE_SMOLVM=" + c.smolvm + " bottle-vm up --warm")
		if got := gjson.Get(r.Out, "error.code").Str; r.Code != 78 || got == "" || !strings.Contains("|"+c.code+"|", "|"+got+"|") {
			t.Errorf("%s: exit %d, %s, want 78, %s\n%.2000s", c.name, r.Code, got, c.code, r.Stderr)
		}
		oneError(t, c.name, r)
		if !slices.ContainsFunc(strings.Split(c.says, "|"), func(s string) bool { return strings.Contains(r.Stderr, s) }) {
			t.Errorf("%s: it does not say %q: %s", c.name, c.says, r.Stderr)
		}
	}
	f.Gone()
}

// TestSmolvmHangs: a call that never ends is ended, with its children, and the
// memory of who waits for it stays small.
func TestSmolvmHangs(t *testing.T) {
	f := newFakeSmolvm(t)
	f.act(`is version && { sleep 1001 & wait; }`)
	begun := time.Now()
	r := f.up()
	if took := time.Since(begun); r.Code != 69 || gjson.Get(r.Out, "error.code").Str != "smolvm_timeout" || took > 50*time.Second {
		t.Errorf("after %s: %+v", took, r)
	}
	oneError(t, "hang", r)
	if out := f.Sh("pgrep -x -f 'sleep 1001'").Out; out != "" {
		t.Errorf("its child is left: %s", out)
	}
	// doctor's own limit is shorter than smolvm's calls may be.
	f.act(`is start && { sleep 1002 & wait; }`)
	r = f.Sh("bottle-vm doctor --timeout 3s")
	for line := range strings.Lines(r.Out) {
		if gjson.Get(line, "check").Str != "engine smolvm" {
			continue
		}
		if d := gjson.Get(line, "detail").Str; gjson.Get(line, "ok").Bool() || !strings.Contains(d, "did not answer in time") || strings.Contains(line, "bug in the bottle tools") {
			t.Errorf("doctor: %s", line)
		}
	}
	if out := f.Sh("pgrep -x -f 'sleep 1002'").Out; out != "" || f.machines() != "" {
		t.Errorf("left: %s %s", out, f.machines())
	}
	f.act(`is version && exec yes`)
	cmd := f.Cmd(t.Context(), "bottle-gc")
	_ = cmd.Run()
	if ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); !ok || ru.Maxrss > 300<<10 {
		t.Errorf("bottle-gc takes %d KiB for a smolvm that prints without end", ru.Maxrss)
	}
	f.act("")
}

// TestSmolvmMachineGone: somebody deletes the machine of a running bottle. Each
// verb says so or does its work, and down leaves nothing.
func TestSmolvmMachineGone(t *testing.T) {
	f := newFakeSmolvm(t)
	id := f.Up()
	if r := f.Exec(id, "true"); r.Code != 0 {
		t.Fatalf("exec of a bottle that runs: %+v", r)
	}
	// It is gone for smolvm, and the keeper has not noticed: the guest runs on.
	f.OK("cd " + f.dir + "/m && rm -f " + id)
	for verb, c := range map[string]struct {
		script string
		exit   int
	}{
		"exec":   {"bottle-vm exec " + id + " -- true", 125},
		"cp out": {"bottle-vm cp " + id + ":/workspace/x y", 69},
		"cp in":  {"bottle-vm cp bottle.json " + id + ":/workspace/", 69},
	} {
		r := f.Sh(c.script)
		if r.Code != c.exit || !strings.Contains(r.Stderr, "no such machine") {
			t.Errorf("%s: %+v", verb, r)
		}
		// smolvm's own line comes first: what the guest writes comes the same way.
		oneError(t, verb, harness.Result{Stderr: lastLine(r.Stderr)})
	}
	if r := f.Sh("bottle-vm status " + id); r.Code != 0 || gjson.Get(r.Out, "phase").Str != "ready" {
		t.Errorf("status while the guest runs: %+v", r)
	}
	// Now the guest ends too.
	f.OK("kill -9 $(cat " + f.dir + "/m/" + id + ".pid)")
	harness.Eventually(t, 10*time.Second, func() string {
		if p := gjson.Get(f.OK("bottle-vm status "+id), "phase").Str; p != "stopped" {
			return "phase " + p
		}
		return ""
	})
	if r := f.Sh("bottle-vm exec " + id + " -- true"); r.Code != 125 || !strings.Contains(r.Stderr, "not running") {
		t.Errorf("exec: %+v", r)
	}
	if r := f.Sh("bottle-vm stop " + id); r.Code != 0 {
		t.Errorf("stop: %+v", r)
	}
	if r := f.Sh("bottle-gc --check"); r.Code != 0 || r.Out != "" {
		t.Errorf("gc: %+v", r)
	}
	f.Down(id)
	f.Gone()
}

// TestSmolvmDownFails: a machine that smolvm does not delete keeps its record,
// and gc tries again.
func TestSmolvmDownFails(t *testing.T) {
	f := newFakeSmolvm(t)
	for name, c := range map[string]struct {
		act  string
		says string
	}{
		"cancelled": {`is delete && { echo Cancelled; exit 0; }`, "Cancelled"},
		"refused":   {`is delete && { echo "Error: storage: busy" >&2; exit 1; }`, "storage: busy"},
		"garbage":   {`is status && { echo '{"state":'; exit; }`, "not the JSON"},
	} {
		f.act("")
		id := f.Up()
		pid := strings.TrimSpace(f.OK("cat " + f.dir + "/m/" + id + ".pid"))
		// The keeper is the one who ends it, so it is killed first.
		f.OK("kill -9 $(jq .keeper.pid " + f.State + "/bottle/bottles/" + id + "/record.json)")
		f.act(c.act)
		r := f.Sh("bottle-vm down " + id)
		if r.Code != 69 || !strings.Contains(r.Stderr, c.says) || !strings.Contains(r.Stderr, id) {
			t.Errorf("%s: %+v", name, r)
		}
		if f.Sh("ps -o stat= -p "+pid+" | grep -v Z").Code == 0 {
			t.Errorf("%s: the guest runs on", name)
		}
		if r := f.Sh("bottle-gc"); !strings.Contains(r.Out, id) {
			t.Errorf("%s: gc does not know of it: %+v", name, r)
		}
		f.act("")
		if r := f.Sh("bottle-gc --apply"); r.Code != 0 || r.Stderr != "" {
			t.Errorf("%s: gc --apply: %+v", name, r)
		}
		if left := f.machines(); left != "" {
			t.Errorf("%s: left: %s", name, left)
		}
		f.Gone()
	}
}

// TestSmolvmForeignMachines: gc ends the machines of lost bottles of this state
// folder, and nothing that only looks like them.
func TestSmolvmForeignMachines(t *testing.T) {
	f := newFakeSmolvm(t)
	id := f.Up()
	labels := strings.TrimSpace(f.OK("cat " + f.dir + "/m/" + id))
	f.Down(id)
	if !gjson.Valid(labels) || gjson.Get(labels, "owner").Str != "bottle" || len(gjson.Get(labels, "bottle-state").Str) != 16 {
		t.Fatalf("labels: %s", labels)
	}
	put := func(name, labels, state, at string) {
		m := filepath.Join(f.dir, "m", name)
		f.Write(m, labels)
		f.Write(m+".state", state)
		f.Write(m+".at", at)
		f.Write(m+".pid", "null")
	}
	put("dev-00000001", labels, "running", "1000")
	put("dev-00000002", labels, "in a state that nobody knows", "1000")
	put("dev-00000003", labels, "stopped", `"never"`)
	put("dev-00000004", `{"owner":"bottle"}`, "running", "1000")
	put("dev-00000005", `{"owner":"bottle","bottle-state":"0123456789abcdef"}`, "running", "1000")
	put("dev-00000006", `{}`, "running", "1000")
	put("dev-00000007", `null`, "running", "null")
	put("not-ours", labels, "running", "1000") // no name of a bottle's
	list := f.Sh("bottle-gc")
	if list.Code != 0 || strings.Count(list.Out, "\n") != 3 {
		t.Errorf("%+v", list)
	}
	for _, n := range []string{"1", "2", "3"} {
		has(t, "gc", list.Out, `"id":"dev-0000000`+n+`"`)
	}
	// Between list and delete two become others': one of another state folder, one
	// that was made anew.
	f.act(`is ls && { cat >"$d/act" <<'E'
E
	sh "$0" "$@"; echo '{"owner":"bottle"}' >"$d/m/dev-00000001"; echo 2000 >"$d/m/dev-00000002.at"; exit; }`)
	if r := f.Sh("bottle-gc --apply"); r.Code != 0 || r.Stderr != "" {
		t.Errorf("%+v", r)
	}
	if got, want := strings.Fields(f.machines()), "[dev-00000001 dev-00000002 dev-00000004 dev-00000005 dev-00000006 dev-00000007 not-ours]"; fmt.Sprint(got) != want {
		t.Errorf("left: %v, want %s", got, want)
	}
	// A list that cannot be read does not keep gc from the rest, and is told.
	f.act(`is ls && { echo '[{"name":null,"state":7}]'; exit; }`)
	if r := f.Sh("bottle-gc --apply"); r.Code != 69 || !strings.Contains(r.Stderr, "a machine without a name") {
		t.Errorf("%+v", r)
	}
	f.act("")
	f.OK("rm -rf " + f.dir + "/m")
	// A bottle's machine that was replaced by another's is not ended with the bottle.
	id = f.Up()
	f.OK("echo '{\"owner\":\"bottle\"}' >" + f.dir + "/m/" + id)
	if r := f.Sh("bottle-vm down " + id); r.Code != 77 && r.Code != 0 || f.machines() == "" {
		t.Errorf("%+v, machines %q", r, f.machines())
	}
	f.OK("echo '" + labels + "' >" + f.dir + "/m/" + id + "; bottle-gc --apply")
	f.Gone()
}

// TestSmolvmKilledMidway: keeper and up are killed while smolvm starts a machine;
// gc ends the call as well as the machine. A boot check's machine is left alone
// while its maker waits.
func TestSmolvmKilledMidway(t *testing.T) {
	f := newFakeSmolvm(t)
	f.act(`is start && { touch "$d/starting"; sleep 1003; echo late >"$d/late"; }`)
	starting := func() {
		harness.Eventually(t, 20*time.Second, func() string {
			if os.Remove(filepath.Join(f.dir, "starting")) != nil {
				return "smolvm was not asked to start"
			}
			return ""
		})
	}
	starters := func() []string { return strings.Fields(f.Sh("pgrep -f '[/]smolvm machine start'").Out) }

	cmd := f.Cmd(t.Context(), "sh", "-c", "bottle-plan | exec bottle-vm up")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	starting()
	keeper := strings.TrimSpace(f.OK("jq .keeper.pid " + f.State + "/bottle/bottles/*/record.json"))
	// up stands still first: it would clear up after a keeper that has died.
	f.OK("pkill -STOP -P " + strconv.Itoa(cmd.Process.Pid) + "; kill -9 " + keeper + "; pkill -9 -P " + strconv.Itoa(cmd.Process.Pid) + "; kill -9 " + strconv.Itoa(cmd.Process.Pid) + "; true")
	_ = cmd.Wait()
	harness.Eventually(t, 5*time.Second, func() string {
		if r := f.Sh("bottle-gc --check --min-age 0s"); r.Code != 1 {
			return fmt.Sprintf("no orphan: %+v", r)
		}
		return ""
	})
	if n := len(starters()); n != 1 || f.machines() == "" {
		t.Errorf("%d starts in flight, machines %q", n, f.machines())
	}
	if r := f.Sh("bottle-gc --apply --min-age 0s"); r.Code != 0 || r.Stderr != "" {
		t.Errorf("%+v", r)
	}
	if n := starters(); len(n) != 0 || f.machines() != "" {
		t.Errorf("left: %v, %q", n, f.machines())
	}
	f.Gone()

	doctor := f.Cmd(t.Context(), "bottle-vm", "doctor")
	if err := doctor.Start(); err != nil {
		t.Fatal(err)
	}
	starting()
	if r := f.Sh("bottle-gc --check --min-age 0s"); r.Code != 0 {
		t.Errorf("a boot check that goes on: %+v", r)
	}
	_ = doctor.Process.Kill()
	_ = doctor.Wait()
	if r := f.Sh("bottle-gc --check --min-age 0s"); r.Code != 1 || gjson.Get(r.Out, "kind").Str != "machine" || !strings.Contains(r.Out, "what made it, pid "+strconv.Itoa(doctor.Process.Pid)) {
		t.Errorf("a boot check that was killed: %+v", r)
	}
	if r := f.Sh("bottle-gc --apply --min-age 0s"); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	if n := starters(); len(n) != 0 || f.machines() != "" {
		t.Errorf("left: %v, %q", n, f.machines())
	}
	f.act("")
	f.Gone()
}

// TestSmolvmInReach: a PATH that leads through the workspace, as an activated
// virtual environment's does, leads no command to what a guest has put there.
func TestSmolvmInReach(t *testing.T) {
	f := newFakeSmolvm(t)
	id := f.Up()
	f.Write("ws/bin/smolvm", "#!/bin/sh\ntouch "+f.Home+"/ran\necho smolvm 1.9.1\n")
	f.OK("chmod 755 ws/bin/smolvm")
	f.Sh("mkdir -p elsewhere; ln -s " + f.Dir + "/ws/bin/smolvm elsewhere/smolvm")
	refused := func(script string, exit int) {
		t.Helper()
		r := f.Sh("unset BOTTLE_SMOLVM; PATH=" + f.Dir + "/ws/bin:$PATH; " + script)
		if r.Code != exit || !strings.Contains(r.Stderr+r.Out, "where a guest or a repository could change") {
			t.Errorf("%s: %+v", script, r)
		}
		if _, err := os.Stat(filepath.Join(f.Home, "ran")); err == nil {
			t.Errorf("%s: it ran", script)
			_ = os.Remove(filepath.Join(f.Home, "ran"))
		}
	}
	refused("bottle-vm exec "+id+" -- true", 125)
	refused("bottle-vm cp bottle.json "+id+":/tmp/", 77)
	refused("bottle-gc", 77)
	refused("bottle-vm doctor", 0)
	refused("bottle-plan | bottle-vm up", 77)
	refused("BOTTLE_SMOLVM="+f.Dir+"/elsewhere/smolvm bottle-gc", 77)
	f.Down(id)
	// Before the first bottle is there, too.
	refused("bottle-plan | bottle-vm up", 77)
	f.Gone()
}

// TestSmolvmSecrets: no secret and no variable of a command is in what smolvm is
// given, in the bottle's state or in the logs.
func TestSmolvmSecrets(t *testing.T) {
	f := newFakeSmolvm(t)
	f.act(`env >>"$d/env"`)
	f.Manifest(`"runtime":"smolvm","image":"./img","workspace":{"path":"ws"},"egress":{"allow":["api.example.com"]},
		"secrets":{"KEY":{"from":"env:BOTTLE_KEY","inject":[{"host":"api.example.com","header":"x-api-key"}]}}`)
	f.Env = append(f.Env, "BOTTLE_KEY=sekret-one-0123456789", "SMOLVM_DOCKER_SOCKET=sekret-two", "LC_KEY=sekret-two")
	f.OK("bottle-vm trust")
	id := f.Up()
	if r := f.Sh("bottle-vm exec -e A=sekret-three " + id + " -- sh -c 'echo sekret-four'"); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	found := exec.Command("grep", "-rl", "sekret", f.dir, f.State, f.Run)
	if out, _ := found.Output(); len(out) != 0 {
		t.Errorf("in these files is a secret, or what a command was given:\n%s", out)
	}
	f.act("")
	f.Down(id)
}

// TestSmolvmFullState: the disk of the bottles' state is full, after more and
// more of a bottle was written. No step of up may call that a bug, and what is
// left is cleared.
func TestSmolvmFullState(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: only root mounts a small disk")
	}
	f := newFakeSmolvm(t)
	seen := map[string]bool{}
	for _, kib := range []int{4, 8, 16, 24, 32, 48, 64, 128, 512, 2048, 4096, 6144, 8192, 10240} {
		if err := syscall.Mount("small", f.State, "tmpfs", 0, fmt.Sprintf("size=%dk,mode=700", kib)); err != nil {
			t.Skipf("SKIPPED: no small disk: %v", err)
		}
		r := f.up()
		code := gjson.Get(r.Out, "error.code").Str
		seen[code] = true
		t.Logf("%d KiB: exit %d %s: %.300s", kib, r.Code, code, r.Stderr)
		if r.Code != 0 {
			if r.Code != 73 && r.Code != 74 {
				t.Errorf("%d KiB: exit %d, %s: %.1000s", kib, r.Code, code, r.Stderr)
			}
			oneError(t, fmt.Sprint(kib, " KiB"), harness.Result{Stderr: lastLine(r.Stderr)})
			has(t, fmt.Sprint(kib, " KiB"), strings.ToLower(r.Stderr), "no space left")
			if strings.Contains(r.Stderr, "scratch") {
				t.Errorf("%d KiB: it tells of a workspace: %s", kib, r.Stderr)
			}
		} else {
			f.Down(gjson.Get(r.Out, "vm.id").Str)
		}
		f.OK("bottle-gc --apply --min-age 0s")
		if left := f.machines(); left != "" {
			t.Errorf("%d KiB: machines are left: %s", kib, left)
		}
		if left := f.OK("bottle-vm ls; ls " + f.State + "/bottle/bottles 2>/dev/null || true"); left != "" {
			t.Errorf("%d KiB: left: %s", kib, left)
		}
		if err := syscall.Unmount(f.State, 0); err != nil {
			t.Errorf("%d KiB: %v", kib, err)
			_ = syscall.Unmount(f.State, syscall.MNT_DETACH)
		}
		if r.Code == 0 {
			break
		}
	}
	if len(seen) < 2 {
		t.Errorf("only one step was tried: %v", seen)
	}
	f.Gone()
}
