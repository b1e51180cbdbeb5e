package integration

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

func TestRun(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.OK("bottle-plan init >bottle.json")
		for _, code := range []int{0, 3, 37, 125} {
			if r := w.Sh(fmt.Sprintf("bottle run bash -- sh -c 'echo hi; exit %d'", code)); r.Code != code || r.Out != "hi\n" || r.Stderr != "" {
				t.Errorf("exit %d: %+v", code, r)
			}
		}
		r := w.Sh("bottle run bash -- curl -sS -m 5 -o /dev/null https://denied.example.com/")
		if r.Code != 56 || !contains(r.Stderr, "denied denied.example.com:443") {
			t.Errorf("denied hosts are not told: %+v", r)
		}
		w.Gone()
		for line, code := range map[string]int{
			"bottle run nobody -- true": 125,
			"bottle run":                64,
			"bottle run bash true":      64,
			"bottle run bash --":        64,
			"bottle run -x bash":        64,
			"bottle":                    64,
			"bottle nonsense":           64,
			"bottle start":              64,
			"bottle start bash more":    64,
			"bottle shell":              64,
			"bottle stop":               64,
			"BOTTLE_MANIFEST=none.json bottle run bash -- true": 125,
			"BOTTLE_MANIFEST=none.json bottle start bash":       66,
			"BOTTLE_MANIFEST=none.json bottle plan":             66,
			"BOTTLE_RUNSC=/nonexistent bottle run bash -- true": 125,
			"XDG_STATE_HOME=/proc/1/x bottle run bash -- true":  125,
			"bottle exec nobody -- true":                        125,
			"bottle ls extra":                                   64,
		} {
			if r := w.Sh(line); r.Code != code || r.Stderr == "" {
				t.Errorf("%s: %+v, want %d", line, r, code)
			}
		}
		r = w.Sh("bottle --help")
		if r.Code != 0 || !contains(r.Out, "usage: bottle run") {
			t.Errorf("help: %+v", r)
		}
	})
}

// TestDriver is start, ls, exec, gc and stop.
func TestDriver(t *testing.T) {
	w := harness.NewWorld(t)
	w.Manifest(plain)
	id := gjson.Get(w.OK("bottle start bash"), "vm.id").Str
	has(t, "bottle ls", w.OK("bottle ls"), id)
	if got := w.OK("bottle exec bash -- echo works"); got != "works\n" {
		t.Errorf("exec: %q", got)
	}
	if got := w.OK("bottle gc"); got != "" {
		t.Errorf("gc of a live bottle: %s", got)
	}
	w.OK("bottle stop bash")
	w.OK("bottle stop bash")
	w.Gone()
}

// TestStream starts several documents of one stream, and two agents that work
// at once.
func TestStream(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Write("bottle.json", `{"format_version":"1.0","bottles":{"dev":{`+plain+`}, "bad":{`+plain+`,"workspace":{"path":"./missing"}}},
			"agents":{"one":{"bottle":"dev","command":["sh"]},"gone":{"bottle":"bad","command":["sh"]},"two":{"bottle":"dev","command":["sh"]}}}`)
		r := w.Sh("bottle-plan --all | bottle-egress | bottle-pack | bottle-vm up -o docs.jsonl")
		if r.Code != 66 || !contains(r.Stderr, "missing") {
			t.Errorf("up of three, one of them bad: %+v, want 66", r)
		}
		lines := strings.Split(strings.TrimSpace(w.Read("docs.jsonl")), "\n")
		if len(lines) != 3 || gjson.Get(lines[0], "error.code").Str != "no_workspace" || gjson.Get(lines[0], "error.stage").Str != "vm" ||
			gjson.Get(lines[1], "vm.id").Str == "" || gjson.Get(lines[2], "vm.id").Str == "" {
			t.Fatalf("documents: %q", lines)
		}
		// Both work at once, in one workspace: each on a file of its own, since
		// gVisor's O_APPEND is not atomic between two sandboxes.
		done := make(chan harness.Result, 2)
		for _, name := range []string{"one", "two"} {
			go func() {
				done <- w.Do(nil, "bottle-vm", "exec", name, "--", "sh", "-c", "for i in 1 2 3 4 5; do echo "+name+" >>log-"+name+"; sleep 0.05; done")
			}()
		}
		for range 2 {
			if r := <-done; r.Code != 0 {
				t.Errorf("%+v", r)
			}
		}
		want := strings.Repeat("one\n", 5) + strings.Repeat("two\n", 5)
		if log := w.Read("log-one") + w.Read("log-two"); log != want {
			t.Errorf("on the host: %q", log)
		}
		if r := w.Do(nil, "bottle-vm", "exec", "one", "--", "cat", "log-one", "log-two"); r.Out != want {
			t.Errorf("one does not see what the other wrote: %+v", r)
		}
		// A name that fits two bottles is no name.
		w.OK("bottle-plan one | bottle-vm up >/dev/null")
		if r := w.Sh("bottle-vm status one"); r.Code != 64 || !contains(r.Stderr, "one-") {
			t.Errorf("ambiguous: %+v", r)
		}
		w.OK("bottle-vm ls | jq -r 'select(.bottle==\"one\").id' | xargs bottle-vm down")
		// down takes the stream, its error document too.
		w.OK("bottle-vm down <docs.jsonl")
		w.OK("bottle-vm down <docs.jsonl")
		w.Gone()
	})
}

func TestStop(t *testing.T) {
	w := harness.NewWorld(t)
	w.Write("f", "one\n")
	w.Manifest(plain + `,"workspace":{"mode":"scratch"}`)
	id := w.Up()
	w.Exec(id, "echo two >>f")
	w.OK("bottle-vm stop " + id)
	if r := w.Exec(id, "true"); r.Code != 125 || r.Stderr == "" {
		t.Errorf("exec after stop: %+v", r)
	}
	has(t, "ls after stop", w.OK("bottle-vm ls"), id, `"phase":"stopped"`)
	has(t, "status after stop", w.OK("bottle-vm status "+id), `"phase":"stopped"`, `"gate":"down"`)
	if r := w.Sh("bottle-vm diff " + id); r.Code != 1 || !contains(r.Out, "+two") {
		t.Errorf("diff after stop: %+v", r)
	}
	w.OK("bottle-vm logs " + id)
	if got := w.OK("bottle-gc"); got != "" {
		t.Errorf("a stopped bottle is no orphan: %s", got)
	}
	w.Down(id)
	w.Gone()
}

// TestClosedStdout: a bottle whose document nobody can read is taken back.
func TestClosedStdout(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(plain)
		r := w.Sh("bottle-plan | bottle-vm up >/dev/full")
		if r.Code != 74 || !contains(r.Stderr, "no space left") { // write_failed
			t.Errorf("/dev/full: %+v, want 74", r)
		}
		w.Gone()
		r = w.Sh("(bottle-plan | bottle-vm up; echo $? >&2) | true")
		if strings.TrimSpace(lastLine(r.Stderr)) != "74" {
			t.Errorf("closed pipe: %+v, want 74", r)
		}
		w.Gone()
		if r := w.Sh("bottle-plan | bottle-vm up -o no/such/folder/doc.json"); r.Code != 73 {
			t.Errorf("-o into nowhere: %+v, want 73", r)
		}
		w.Gone()
	})
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// TestKeeperDies: gc names what is left with its evidence, and clears it.
func TestKeeperDies(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(plain)
		w.OK("bottle-plan | bottle-vm up -o doc.json")
		doc := w.Read("doc.json")
		id, pid := gjson.Get(doc, "vm.id").Str, int(gjson.Get(doc, "vm.keeper.pid").Int())
		other := w.Up() // one that lives on
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, harness.Limit, func() string {
			if r := w.Sh("bottle-gc --check"); r.Code != 1 {
				return fmt.Sprintf("gc --check: %+v, want 1", r)
			}
			return ""
		})
		has(t, "ls", w.OK("bottle-vm ls"), `"phase":"orphan"`, `"phase":"ready"`)
		list := w.OK("bottle-gc")
		for _, line := range strings.Split(strings.TrimSpace(list), "\n") {
			if gjson.Get(line, "id").Str != id || len(gjson.Get(line, "evidence").Array()) == 0 || gjson.Get(line, "action").Str == "" {
				t.Errorf("orphan: %s", line)
			}
		}
		has(t, "gc", list, `"kind":"folder"`, strconv.Itoa(pid))
		if r := w.Exec(id, "true"); r.Code != 125 {
			t.Errorf("exec in an orphan: %+v", r)
		}
		if r := w.Sh("bottle-gc --apply"); r.Code != 0 || r.Out+r.Stderr != "" {
			t.Errorf("gc --apply: %+v", r)
		}
		if r := w.Sh("bottle-gc --check"); r.Code != 0 || r.Out != "" {
			t.Errorf("second gc: %+v", r)
		}
		if r := w.Exec(other, "echo alive"); r.Out != "alive\n" {
			t.Errorf("gc touched a live bottle: %+v", r)
		}
		w.Down(other)
		w.Gone()
	})
}

// TestUpKilled kills up at several moments; gc clears what there is.
func TestUpKilled(t *testing.T) {
	delays := []time.Duration{5, 20, 50, 90, 140, 200, 300}
	if testing.Short() {
		delays = []time.Duration{50, 140}
	}
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(plain + `,"workspace":{"mode":"scratch"}`)
		w.OK("bottle-plan >plan.json")
		for _, d := range delays {
			d *= time.Millisecond
			ctx, cancel := context.WithTimeout(t.Context(), harness.Limit)
			cmd := w.Cmd(ctx, "bottle-vm", "up", "-o", "doc.json")
			in, err := os.Open(filepath.Join(w.Dir, "plan.json"))
			if err != nil {
				t.Fatal(err)
			}
			cmd.Stdin = in
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(d)
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			in.Close()
			cancel()
			// Either the keeper noticed and took it back, or it was ready, or gc
			// clears it. Nothing else.
			harness.Eventually(t, harness.Limit, func() string {
				if r := w.Sh("bottle-gc --apply --min-age 0s"); r.Code != 0 {
					return fmt.Sprintf("killed after %s: gc --apply: %+v", d, r)
				}
				out := w.OK("bottle-vm ls")
				for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
					if line != "" && gjson.Get(line, "phase").Str == "ready" {
						// Its keeper may take it back at the same time.
						if r := w.Do(nil, "bottle-vm", "down", gjson.Get(line, "id").Str); r.Code != 0 {
							return fmt.Sprintf("killed after %s: down: %+v", d, r)
						}
						return "down"
					}
				}
				if left := append(w.Processes(), w.Mounts()...); out != "" || len(left) > 0 {
					return fmt.Sprintf("killed after %s: left over: %s %q", d, out, left)
				}
				return ""
			})
			w.Gone()
		}
	})
}

// TestUpInterrupted: Ctrl-C during up leaves nothing, without gc.
func TestUpInterrupted(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(plain)
		w.OK("bottle-plan >plan.json")
		for _, d := range []time.Duration{20, 80, 150} {
			// With up's own status: timeout's 124 does not tell whether it came too late.
			// Up that has handed its document on may be told to end as well, since it
			// looks for the next one: what a document tells of is there, and nothing else.
			r := w.Sh(fmt.Sprintf("timeout --foreground --preserve-status -s INT %.3f bottle-vm up <plan.json >doc.json", (d * time.Millisecond).Seconds()))
			if r.Code != 0 && r.Code != 130 {
				t.Errorf("interrupted after %s: %+v", d*time.Millisecond, r)
			}
			if r.Code != 0 && w.Read("doc.json") == "" {
				w.Gone()
				continue
			}
			w.OK("bottle-vm down <doc.json")
		}
	})
}

// TestOwnerGone: a bottle ends with the process it was tied to.
func TestOwnerGone(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(plain)
		w.OK(`sleep 30 >/dev/null 2>&1 & p=$!; bottle-plan | bottle-vm up --owner $p >doc.json; bottle-vm exec -- true <doc.json || exit; kill $p`)
		harness.Eventually(t, harness.Limit, func() string {
			if left := w.Processes(); len(left) > 0 {
				return strings.Join(left, "\n")
			}
			return ""
		})
		w.OK("bottle-gc --apply")
		w.Gone()
		if r := w.Sh("bottle-plan | bottle-vm up --owner 4194304"); r.Code != 64 {
			t.Errorf("owner that is not there: %+v", r)
		}
	})
}

// TestRunCtrlC presses Ctrl-C during bottle run, before and while the command
// runs.
func TestRunCtrlC(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(plain)
		p := newTerm(t, w, 24, 80, "bottle", "run", "bash", "--", "sh", "-c", "echo begun; sleep 30; echo never")
		p.expect("begun")
		time.Sleep(300 * time.Millisecond) // a person's
		p.send("\x03")
		if code := p.wait(); code != 130 || contains(p.output(), "never") {
			t.Errorf("exit %d, terminal %q", code, p.output())
		}
		w.Gone()
		for _, d := range []time.Duration{30, 120, 220} {
			p := newTerm(t, w, 24, 80, "bottle", "run", "bash", "--", "sleep", "30")
			time.Sleep(d * time.Millisecond)
			p.send("\x03")
			if code := p.wait(); code != 130 && code != 125 {
				t.Errorf("Ctrl-C after %d ms: exit %d, terminal %q", d, code, p.output())
			}
			w.Gone()
		}
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP} {
			begun := time.Now()
			p := newTerm(t, w, 24, 80, "bottle", "run", "bash", "--", "sh", "-c", "echo begun; exec sleep "+map[syscall.Signal]string{syscall.SIGTERM: "600", syscall.SIGHUP: "1"}[sig])
			p.expect("begun")
			_ = p.cmd.Process.Signal(sig)
			if code := p.wait(); code != 128+int(sig) || time.Since(begun) > harness.Limit {
				t.Errorf("%s: exit %d after %s", sig, code, time.Since(begun))
			}
			// TERM ends the driver at once; the keeper sees its owner gone.
			harness.Eventually(t, harness.Limit, func() string { return w.OK("bottle-vm ls") })
			w.Gone()
		}
	})
}

// TestEngineTrouble: an engine that is missing, is no engine, or dies.
func TestEngineTrouble(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(plain)
		fake := func(script string) string {
			path := w.Write("engine.sh", "#!/bin/sh\n"+script+"\n")
			if err := os.Chmod(path, 0o755); err != nil {
				t.Fatal(err)
			}
			return path
		}
		runsc := filepath.Join(w.Bin, "bottle-runsc")
		for _, c := range []struct{ name, engine, script, code string }{
			{"missing", "/nonexistent", "", "engine_missing"},
			{"no engine", "", "exit 0", "engine_died"},
			{"dies at once", "", "exit 1", "engine_unfit"},
			{"dies by a signal", "", "kill -9 $$", "engine_unfit"},
			{"dies while it makes the sandbox", "", `case " $* " in *" create "*|*" run "*|*" start "*) (sleep 0.1; kill -9 $$) & ;; esac; exec ` + runsc + ` "$@"`, "engine_failed engine_died"},
		} {
			if c.engine == "" {
				c.engine = fake(c.script)
			}
			r := w.Sh("bottle-plan | BOTTLE_RUNSC=" + c.engine + " bottle-vm up")
			code := gjson.Get(r.Out, "error.code").Str
			if r.Code == 0 && c.name == "dies while it makes the sandbox" {
				w.OK("bottle-vm ls | jq -r .id | xargs bottle-vm down") // it was quicker
			} else if r.Code != 69 || gjson.Get(r.Out, "error.exit").Int() != 69 || code == "" || !contains(c.code, code) || !strings.HasPrefix(r.Stderr, "bottle-vm: error: ") {
				t.Errorf("%s: %+v, want 69 %s", c.name, r, c.code)
			}
			w.Gone()
		}
		// With no engine at all, all that were tried are told.
		w.Manifest(`"runtime":"auto"`)
		r := w.Sh("bottle-plan | PATH=" + w.Bin + ":/usr/bin:/bin BOTTLE_SMOLVM=/nonexistent BOTTLE_RUNSC=/nonexistent bottle-vm up")
		if r.Code != 69 || gjson.Get(r.Out, "error.code").Str != "no_engine" || !contains(r.Stderr, "smolvm: ") || !contains(r.Stderr, "gvisor: ") {
			t.Errorf("no engine at all: %+v", r)
		}
		w.Manifest(plain)
		// Beside the tools it is found; without its helpers up refuses.
		if err := os.Remove(filepath.Join(w.Dir, "engine.sh")); err != nil {
			t.Error(err)
		}
		bare := filepath.Join(filepath.Dir(w.State), "bare")
		w.Write(filepath.Join(bare, "x"), "")
		w.OK("cp $(command -v bottle-vm) " + bare + "/ && bottle-plan >plan.json")
		r = w.Do(nil, "bottle-keeper")
		if r.Code != 65 || !contains(r.Stderr, "no config") { // no_config
			t.Errorf("bottle-keeper by hand: %+v", r)
		}
		if r := w.Sh(bare + "/bottle-vm up <plan.json"); r.Code != 69 || gjson.Get(r.Out, "error.code").Str != "tool_missing" {
			t.Errorf("bottle-vm alone: %+v", r)
		}
	})
}

// TestFiltersAreCompiled: the seccomp programs of a bottle's sandbox and of its
// file server are those that were compiled with bottle-runsc, in all its modes.
func TestFiltersAreCompiled(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(plain)
		w.OK("mkdir log")
		engine := w.Write("engine.sh", "#!/bin/sh\nexec "+filepath.Join(w.Bin, "bottle-runsc")+` --debug --debug-log=`+filepath.Join(w.Dir, "log")+`/ "$@"`+"\n")
		w.OK("chmod 755 engine.sh")
		id := strings.TrimSpace(w.OK("bottle-plan | BOTTLE_RUNSC=" + engine + " bottle-vm up --print-id"))
		for _, part := range []string{"boot", "gofer"} {
			logs, err := filepath.Glob(filepath.Join(w.Dir, "log", "*."+part+".txt"))
			if err != nil || len(logs) != 1 {
				t.Fatalf("logs of %s: %v, %v", part, logs, err)
			}
			text := w.Read(logs[0])
			if !strings.Contains(text, "Loaded precompiled seccomp instructions") || strings.Contains(text, "No precompiled program found") {
				t.Errorf("%s: its program was compiled at its start", part)
			}
			for line := range strings.Lines(text) {
				if strings.Contains(line, "Remapped stdio FDs") {
					t.Log(strings.TrimSpace(line)) // how long it took: docs/benchmarks.md
				}
			}
		}
		w.OK("bottle-vm exec " + id + " -- true && bottle-vm down " + id + " && rm -r log engine.sh")
		w.Gone()
	})
}

// TestSmolvmTrouble: runtime smolvm without a smolvm, with a program that is
// none, and with one that answers as recorded and knows no bottle of ours.
func TestSmolvmTrouble(t *testing.T) {
	fake := filepath.Join(t.TempDir(), "smolvm")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", fake, "../fakesmolvm/smolvm")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	transcripts, err := filepath.Abs("../transcripts/smolvm")
	if err != nil {
		t.Fatal(err)
	}
	w := harness.NewWorld(t)
	w.Env = append(w.Env, "BOTTLE_TRANSCRIPTS="+transcripts, "BOTTLE_TRANSCRIPT_VERSION=1.9.1",
		"BOTTLE_TRANSCRIPT_STATE="+filepath.Join(w.Home, "replay"))
	w.Manifest(`"runtime":"smolvm"`)
	for smolvm, code := range map[string]string{"/nonexistent": "smolvm_missing", "/bin/true": "smolvm_", fake: "smolvm_"} {
		r := w.Sh("bottle-plan | BOTTLE_SMOLVM=" + smolvm + " bottle-vm up")
		if got := gjson.Get(r.Out, "error.code").Str; r.Code != 69 && r.Code != 78 || !strings.HasPrefix(got, code) || r.Stderr == "" {
			t.Errorf("%s: %+v, want 69 or 78 and %s", smolvm, r, code)
		}
		w.Gone()
	}
}

func TestStateFolder(t *testing.T) {
	w := harness.PlainWorld(t)
	if w.Root() {
		t.Skip("SKIPPED: root can write everywhere")
	}
	w.Manifest(plain)
	for _, c := range []struct {
		dir, code string
		exit      int
	}{
		{"/proc/1/nothing", "cannot_create", 73},
		{"/tmp/" + strings.Repeat("x", 300), "cannot_create", 73},
		{"/usr/no-such-folder", "cannot_create", 73},
		{filepath.Join(w.Home, "open"), "bad_state_dir", 77},
		{w.Dir, "holds_state", 65},
		{"relative", "usage", 64},
	} {
		if strings.HasSuffix(c.dir, "open") {
			if err := os.MkdirAll(filepath.Join(c.dir, "bottle"), 0o777); err != nil {
				t.Fatal(err)
			}
			for _, d := range []string{c.dir, filepath.Join(c.dir, "bottle")} {
				if err := os.Chmod(d, 0o777); err != nil {
					t.Fatal(err)
				}
				if err := os.Chown(d, w.UID(), -1); err != nil {
					t.Fatal(err)
				}
			}
		}
		r := w.Sh("bottle-plan | XDG_STATE_HOME=" + c.dir + " bottle-vm up")
		if r.Code != c.exit || gjson.Get(r.Out, "error.code").Str != c.code {
			t.Errorf("%s: %+v, want %d %s", c.dir, r, c.exit, c.code)
		}
	}
	os.RemoveAll(filepath.Join(w.Dir, "bottle"))
}

// TestForeignRecords: what another user wrote is neither shown nor touched.
func TestForeignRecords(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: not root, so no file of another user can be made")
	}
	w := harness.NewWorld(t)
	w.Manifest(plain)
	id := w.Up()
	dir := filepath.Join(w.State, "bottle", "bottles", id)
	w.OK("cp -r " + dir + " " + filepath.Join(w.State, "bottle", "bottles", "theirs-01234567"))
	theirs := filepath.Join(w.State, "bottle", "bottles", "theirs-01234567")
	err := filepath.WalkDir(theirs, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = os.Lchown(path, 65534, 65534)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if r := w.Sh("bottle-gc --min-age 0s; bottle-gc --apply --min-age 0s"); r.Out != "" {
		t.Errorf("gc: %+v", r)
	}
	for _, line := range []string{"bottle-vm down theirs-01234567", "bottle-vm down theirs", "bottle-vm stop theirs-01234567", "bottle-vm exec theirs-01234567 -- true"} {
		w.Sh(line)
	}
	if _, err := os.Stat(filepath.Join(theirs, "record.json")); err != nil {
		t.Errorf("another user's record was touched: %v", err)
	}
	if r := w.Exec(id, "echo alive"); r.Out != "alive\n" {
		t.Errorf("a forged record hit a live bottle: %+v", r)
	}
	if err := os.RemoveAll(theirs); err != nil {
		t.Error(err)
	}
	w.Down(id)
}

// gVisor keeps no disk of a guest that was stopped: start says so, and the bottle
// stays as it is.
func TestStartWithoutDisk(t *testing.T) {
	w := harness.NewWorld(t)
	w.Manifest(`"runtime":"gvisor"`)
	id := w.Up()
	if r := w.Sh("bottle-vm start " + id); r.Code != 78 || !strings.Contains(r.Stderr, "keeps no disk") {
		t.Errorf("start of a bottle that runs: %+v", r)
	}
	w.OK("bottle-vm exec " + id + " -- true")
	w.OK("bottle-vm stop " + id)
	for range 2 {
		if r := w.Sh("bottle-vm start " + id); r.Code != 78 || !strings.Contains(r.Stderr, "keeps no disk") {
			t.Errorf("start of a stopped bottle: %+v", r)
		}
	}
	if got := w.OK("bottle-vm status " + id); !strings.Contains(got, `"phase":"stopped"`) {
		t.Errorf("status: %s", got)
	}
	if r := w.Sh("bottle-vm start nosuchbottle"); r.Code != 66 {
		t.Errorf("start of nothing: %+v", r)
	}
	w.Down(id)
	w.Gone()
}
