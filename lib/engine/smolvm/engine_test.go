package smolvm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/smolvm/smolvmtest"
)

const noDrop = "SMOLVM_VM_UID_DROP=off"

// specTag is of the state folder of the newest spec.
var specTag string

// newSpec gives a bottle that smolvm can hold.
func newSpec(t *testing.T) *engine.Spec {
	t.Helper()
	dir := t.TempDir()
	specTag = stateTag(dir)
	for _, d := range []string{"bottles/dev-0123abcd", "work", "rootfs/bin", "extra"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "rootfs/bin/tool"), []byte("original"), 0o755); err != nil {
		t.Fatal(err)
	}
	// Whoever runs the test: the guest's agent may write.
	if err := os.Chmod(filepath.Join(dir, "work"), 0o777); err != nil {
		t.Fatal(err)
	}
	helper := filepath.Join(dir, "bottle-guest")
	if err := os.WriteFile(helper, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return &engine.Spec{
		ID:  "dev-0123abcd",
		Dir: filepath.Join(dir, "bottles", "dev-0123abcd"), RunDir: dir,
		Bottle: &plan.Bottle{ID: "dev", User: "agent", Resources: plan.Resources{CPUs: 1, MemoryMiB: 512},
			Env:   []plan.EnvVar{{Name: "LANG", Value: "C.UTF-8"}},
			Files: []plan.File{{Path: ".agent.json", Content: "{}"}}},
		Workspace: filepath.Join(dir, "work"), Rootfs: filepath.Join(dir, "rootfs"),
		Binds:       []engine.Bind{{Source: filepath.Join(dir, "extra"), Target: "/opt/extra", ReadOnly: true}},
		GuestHelper: helper, CABundle: []byte("bundle"), CACert: []byte("cert\n"),
		Env:     []string{"PATH=/usr/bin:/bin", "HOME=/home/agent"},
		HostUID: os.Geteuid(), HostGID: os.Getegid(),
		GateSocket: filepath.Join(dir, "gate.sock"),
	}
}

// vmDir is smolvm's folder for the machine.
func vmDir(s *engine.Spec) string { return filepath.Join(s.RunDir, "vms", "0123") }

func refOf(s *engine.Spec) engine.Ref {
	return engine.Ref{ID: s.ID, Dir: s.Dir, RunDir: s.RunDir, Bottle: s.Bottle, Env: s.Env}
}

// record is one line of a transcript that a test makes for its own paths. The
// answers are the recorded ones.
type record struct {
	Argv   []string `json:"argv"`
	Exit   int      `json:"exit"`
	Stdout string   `json:"stdout"`
	Stderr string   `json:"stderr"`
}

func answer(exit int, stdout, stderr string, argv ...string) record {
	return record{append([]string{"smolvm"}, argv...), exit, stdout, stderr}
}

func version(v string) record { return answer(0, "smolvm "+v+"\n", "", "--version") }

func statusJSON(id, state string, pid int) string {
	p := "null"
	if pid > 0 {
		p = fmt.Sprint(pid)
	}
	return fmt.Sprintf(`{"name":%q,"state":%q,"pid":%s,"cpus":1,"labels":{"owner":"bottle","bottle-state":%q}}`, id, state, p, specTag)
}

// scripted gives an engine whose smolvm replays just these records.
func scripted(t *testing.T, recs ...record) (*Engine, *smolvmtest.Fake) {
	t.Helper()
	dir := t.TempDir()
	var b bytes.Buffer
	for _, r := range recs {
		line, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(append(line, '\n'))
	}
	if err := os.WriteFile(filepath.Join(dir, "t.ndjson"), b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	f := smolvmtest.NewFake(t, "", dir)
	return New(append(f.Env, noDrop, "BOTTLE_SMOLVM="+f.Bin)), f
}

func wantFault(t *testing.T, err error, exit int, code string, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %s", code)
		return
	}
	f := fault.As(err)
	if f.Exit != exit || f.Code != code || f.Hint == "" || strings.Contains(err.Error(), "\n") {
		t.Errorf("fault %d %s, want %d %s: %v (hint %q)", f.Exit, f.Code, exit, code, err, f.Hint)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error()+" "+f.Hint, p) {
			t.Errorf("%q is not in: %v (hint %q)", p, err, f.Hint)
		}
	}
}

func TestAvailable(t *testing.T) {
	for v, code := range map[string]string{
		"1.9.1": "", "1.8.0": "", "1.32.2": "", "3.0.0": "",
		"1.6.3": "smolvm_too_old", "1.6.4": "smolvm_too_old", "1.7.4": "smolvm_too_old", "1.7.7": "smolvm_too_old", "1.0.1": "smolvm_too_old", "0.0.36": "smolvm_wrong_program",
	} {
		e, _ := scripted(t, version(v))
		err := e.Available(t.Context())
		if code == "" {
			if err != nil {
				t.Errorf("%s: %v", v, err)
			}
			continue
		}
		wantFault(t, err, fault.Unavailable, code, "smolmachines")
		if code == "smolvm_too_old" {
			wantFault(t, err, fault.Unavailable, code, "is smolvm "+v, "1.8.0 or newer", "bottle-vm doctor --install smolvm", smolvm.NewestTested.String())
		}
		if v == "1.6.4" && !strings.Contains(err.Error(), "hang") {
			t.Errorf("%v", err)
		}
		if v == "1.6.3" && !strings.Contains(err.Error(), "1.8.0") {
			t.Errorf("the version to install is not named: %v", err)
		}
	}
	e, _ := scripted(t, version("1.9.1"))
	if v, err := e.Version(t.Context()); v != "1.9.1" || err != nil {
		t.Errorf("Version: %q, %v", v, err)
	}
	none := New([]string{"PATH=/nonexistent", "HOME=/nonexistent"})
	wantFault(t, none.Available(t.Context()), fault.Unavailable, "smolvm_missing", "bottle-vm doctor --install smolvm")
	if _, err := none.Alive(t.Context(), engine.Ref{ID: "x"}); !errors.Is(err, smolvm.ErrMissing) {
		t.Errorf("Alive: %v", err)
	}
	if e := New(nil); e.Name() != "smolvm" || e.Transport() != engine.Socket {
		t.Error("name or transport")
	}
}

func TestRootIsRefused(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("NOT RUN: smolvm changes its user on Linux only")
	}
	wantFault(t, New(nil).checkUser(0), fault.Host, "smolvm_root", "SMOLVM_VM_UID_DROP=off")
	for _, err := range []error{New([]string{noDrop}).checkUser(0), New(nil).checkUser(1000)} {
		if err != nil {
			t.Error(err)
		}
	}
}

func TestPrepareRefuses(t *testing.T) {
	touch := func(t *testing.T, p string) string {
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	mkdir := func(t *testing.T, p string) string {
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	bind := func(src, dst string, ro bool) []engine.Bind {
		return []engine.Bind{{Source: src, Target: dst, ReadOnly: ro}}
	}
	tests := []struct {
		name, code string
		change     func(*testing.T, *engine.Spec)
	}{
		{"as it is", "", func(*testing.T, *engine.Spec) {}},
		{"image host", "smolvm_image", func(_ *testing.T, s *engine.Spec) { s.Rootfs = "" }},
		{"no socket yet", "", func(_ *testing.T, s *engine.Spec) { s.GateSocket = "" }},
		{"pids", "smolvm_pids", func(_ *testing.T, s *engine.Spec) { s.Bottle.Resources.Pids = 10 }},
		{"a workspace of root's", rootOnly("smolvm_root_workspace"), func(_ *testing.T, s *engine.Spec) { os.Chmod(s.Workspace, 0o755) }},
		{"a workspace of root's, read-only", "", func(_ *testing.T, s *engine.Spec) { os.Chmod(s.Workspace, 0o755); s.ReadOnly = true }},
		{"other owner", "smolvm_host_uid", func(_ *testing.T, s *engine.Spec) { s.HostUID++ }},
		{"socket path too long", "smolvm_socket", func(_ *testing.T, s *engine.Spec) { s.GateSocket = "/" + strings.Repeat("a", 107) }},
		{"socket path with colon", "smolvm_socket", func(_ *testing.T, s *engine.Spec) { s.GateSocket = "/a:b" }},
		{"relative socket path", "smolvm_socket", func(_ *testing.T, s *engine.Spec) { s.GateSocket = "gate.sock" }},
		{"file", "smolvm_file_mount", func(t *testing.T, s *engine.Spec) {
			s.Binds = bind(touch(t, filepath.Join(s.RunDir, "f")), "/etc/f", true)
		}},
		{"pinned git path", "smolvm_nested_mount", func(t *testing.T, s *engine.Spec) {
			s.Binds = bind(mkdir(t, s.Workspace+"/.git/hooks"), "/workspace/.git/hooks", true)
		}},
		{"pinned git path of a workspace that is read-only anyway", "", func(t *testing.T, s *engine.Spec) {
			s.ReadOnly = true
			s.Binds = bind(mkdir(t, s.Workspace+"/.git/hooks"), "/workspace/.git/hooks", true)
		}},
		{"hidden file", "smolvm_nested_mount", func(t *testing.T, s *engine.Spec) {
			touch(t, s.Workspace+"/.env")
			s.Binds = bind(touch(t, filepath.Join(s.RunDir, "empty")), "/workspace/.env", true)
		}},
		{"hidden file of a read-only workspace", "smolvm_nested_mount", func(t *testing.T, s *engine.Spec) {
			s.ReadOnly = true
			touch(t, s.Workspace+"/.env")
			s.Binds = bind(touch(t, filepath.Join(s.RunDir, "empty")), "/workspace/.env", true)
		}},
		{"over the whole workspace", "smolvm_nested_mount", func(_ *testing.T, s *engine.Spec) {
			s.Binds = bind(s.RunDir, "/workspace", true)
		}},
		{"over the folder above", "smolvm_nested_mount", func(_ *testing.T, s *engine.Spec) { s.Binds = bind(s.RunDir, "/opt", false) }},
		{"over an empty folder", "smolvm_nested_mount", func(t *testing.T, s *engine.Spec) {
			mkdir(t, s.Workspace+"/data")
			s.Binds = bind(s.RunDir, "/workspace/data", false)
		}},
		{"over an empty folder of a read-only workspace", "", func(t *testing.T, s *engine.Spec) {
			s.ReadOnly = true
			mkdir(t, s.Workspace+"/data")
			s.Binds = bind(s.RunDir, "/workspace/data", false)
		}},
		{"where a mountpoint would have to be made", "smolvm_nested_mount", func(_ *testing.T, s *engine.Spec) {
			s.Binds = bind(s.RunDir, "/workspace/new", false)
		}},
		{"in a kept home", "", func(t *testing.T, s *engine.Spec) {
			s.Home = mkdir(t, s.RunDir+"/home")
			s.Binds = bind(mkdir(t, s.RunDir+"/cfg"), "/home/agent/.config", true)
		}},
		{"a name that only looks nested", "", func(_ *testing.T, s *engine.Spec) {
			s.Binds = bind(s.RunDir, "/workspaces", true)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e, _ := scripted(t, version("1.9.1"))
			s := newSpec(t)
			tt.change(t, s)
			err := e.Prepare(t.Context(), s)
			if tt.code != "" {
				wantFault(t, err, fault.Host, tt.code)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// createArgv is what Start has to ask for; nothing secret and no variable in it.
func createArgv(s *engine.Spec) []string {
	return []string{"machine", "create", "--name", s.ID, "--label", "owner=bottle", "--label", "bottle-state=" + tagOf(s.Dir),
		"--image", s.Dir + "/smolvm/rootfs/", "-s", s.Dir + "/smolvm/Smolfile",
		"--mount-socket", s.GateSocket + ":/run/bottle/gate.sock"}
}

// awaits is how the guest is asked whether it is ready, and which folders it has.
func awaits(id string, flags ...string) []string {
	argv := append([]string{"machine", "exec", "--name", id}, flags...)
	argv = append(argv, "--", "/opt/bottle/guest", "await", "127.0.0.1:3128", "/run/bottle/gate.sock")
	if runtime.GOOS == "linux" {
		argv = append(argv, "/workspace", "/opt/extra")
	}
	return argv
}

func wantSmolfile(s *engine.Spec) string {
	return fmt.Sprintf(`entrypoint = ["/opt/bottle/guest", "init", "/opt/bottle/config.json"]
env = ["LANG=C.UTF-8"]
workdir = "/workspace"
cpus = 1
memory = 512
net = false
volumes = ["%s/smolvm/guest:/opt/bottle:ro", "%s:/workspace", "%s:/opt/extra:ro"]
`, s.Dir, s.Workspace, s.Binds[0].Source)
}

const (
	created  = "Created machine: x\n"
	starting = "Starting machine 'x'...\n"
	notReady = starting + "Error: agent operation failed: start machine: agent operation failed: monitor agent: boot process exited (code 0) before the agent was ready\n"
	notFound = "Error: vm not found: x\n"
	unknown  = "Error: config operation failed: machine status: machine 'x' not found\n"
	notUp    = "Error: agent operation failed: connect: machine 'x' is not running. Use 'smolvm machine start --name x' first.\n"
)

func TestStart(t *testing.T) {
	s := newSpec(t)
	guestProc := monitorFor(t, s.Workspace, s.Binds[0].Source)
	recorded := ""
	s.Record = func(role string, pid int) error { recorded = fmt.Sprint(role, " ", pid); return nil }
	e, f := scripted(t, version("1.9.1"),
		answer(0, created, "", createArgv(s)...),
		answer(0, vmDir(s)+"\n", "", "machine", "data-dir", "--name", s.ID),
		// One start in three fails, the second works.
		answer(1, "", notReady, "machine", "start", "--name", s.ID),
		answer(0, "Machine 'x' running (PID: 1)\n", starting, "machine", "start", "--name", s.ID),
		answer(0, statusJSON(s.ID, "unreachable", guestProc.Pid), "", "machine", "status", "--name", s.ID, "--json"),
		// Slow to answer: "not running" is not believed at once.
		answer(1, "", notUp, awaits(s.ID)...),
		answer(0, "", "", awaits(s.ID)...),
	)
	st, err := e.Start(t.Context(), s)
	if err != nil {
		t.Fatalf("%v\n%s", err, f.Calls(t))
	}
	if want := fmt.Sprint("smolvm ", guestProc.Pid); recorded != want {
		t.Errorf("recorded %q, want %q", recorded, want)
	}
	if st.Enforcement != (plan.Enforcement{Memory: "engine", CPUs: "engine", Pids: "none"}) {
		t.Errorf("%+v", st.Enforcement)
	}
	checkStaged(t, s)
	// What a guest could write to is not the image that other bottles share.
	if err := os.WriteFile(s.Dir+"/smolvm/rootfs/bin/tool", []byte("changed"), 0o644); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(s.Rootfs + "/bin/tool"); err != nil || string(b) != "original" {
		t.Errorf("the shared image was changed: %q, %v", b, err)
	}
	if alive, err := e.Alive(t.Context(), refOf(s)); !alive || err != nil {
		t.Errorf("a slow machine counts as dead: %v, %v", alive, err)
	}
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := st.Wait(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait: %v", err)
	}
	_ = guestProc.Kill()
	if err := st.Wait(t.Context()); err != nil {
		t.Errorf("Wait: %v", err)
	}
}

// monitorFor plays a monitor, with folders open.
func monitorFor(t *testing.T, paths ...string) *os.Process {
	t.Helper()
	c := exec.Command("sleep", "60")
	c.ExtraFiles = openAll(t, paths...)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	return c.Process
}

func openAll(t *testing.T, paths ...string) (files []*os.File) {
	t.Helper()
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
	return files
}

func checkStaged(t *testing.T, s *engine.Spec) {
	t.Helper()
	var cfg guest.Config
	b, err := os.ReadFile(s.Dir + "/smolvm/guest/config.json")
	if err != nil || json.Unmarshal(b, &cfg) != nil {
		t.Fatal(err)
	}
	agent := os.Geteuid() // who runs it, but for root
	if agent == 0 {
		agent = 1000
	}
	if cfg.Transport != guest.TransportUnix || len(cfg.Relays) != 1 || cfg.Relays[0].Socket != "/run/bottle/gate.sock" || cfg.Relays[0].Listen != "127.0.0.1:3128" ||
		cfg.User.UID != agent || cfg.CABundle != "/opt/bottle/ca-bundle.pem" || cfg.CACert != "cert\n" || len(cfg.Files) != 1 ||
		cfg.Copy != "/run/bottle-run/guest" || !slices.Equal(cfg.Folders, []string{"/workspace", "/opt/extra"}) {
		t.Errorf("config: %s", b)
	}
	if fi, err := os.Stat(s.Dir + "/smolvm/guest/guest"); err != nil || fi.Mode().Perm()&0o111 == 0 {
		t.Errorf("helper: %v", err)
	}
	if b, err := os.ReadFile(s.Dir + "/smolvm/Smolfile"); err != nil || string(b) != wantSmolfile(s) {
		t.Errorf("Smolfile, %v:\n%s", err, b)
	}
	if b, err := os.ReadFile(machineFile(s.Dir)); err != nil || !strings.Contains(string(b), vmDir(s)) || !strings.Contains(string(b), `"helper":"/run/bottle-run/guest"`) {
		t.Errorf("machine.json: %s, %v", b, err)
	}
}

// A start that fails leaves neither machine nor files.
func TestStartFails(t *testing.T) {
	s := newSpec(t)
	e, f := scripted(t, version("1.9.1"),
		answer(0, created, "", createArgv(s)...),
		answer(0, vmDir(s)+"\n", "", "machine", "data-dir", "--name", s.ID),
		answer(1, "", notReady, "machine", "start", "--name", s.ID),
		answer(0, statusJSON(s.ID, "created", 0), "", "machine", "status", "--name", s.ID, "--json"),
		answer(0, "Deleted machine: x\n", "", "machine", "delete", "--name", s.ID, "-f"),
		answer(0, "[]\n", "", "machine", "ls", "--json"),
	)
	_, err := e.Start(t.Context(), s)
	wantFault(t, err, fault.Host, "smolvm_boot", "gvisor", "before the agent was ready")
	calls := f.Calls(t)
	if strings.Count(calls, `"start"`) != 2 || !strings.Contains(calls, `"delete"`) || strings.Contains(calls, `"record":"","exit":97`) {
		t.Errorf("calls:\n%s", calls)
	}
	if _, err := os.Stat(ownDir(s.Dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("files are left: %v", err)
	}
}

// A newer smolvm that gave up a flag: the bottle is refused, the flag named, and a
// version that has it.
func TestNewerWithoutANeededFlag(t *testing.T) {
	s := newSpec(t)
	asJSON := append(createArgv(s), "--error-format", "json")
	gone := "error: unexpected argument '--mount-socket' found\n\nUsage: smolvm machine create [OPTIONS] --name <NAME> [-- <COMMAND>...]\n"
	missing := `{"error":{"code":"NOT_FOUND","message":"vm not found: dev-0123abcd"}}` + "\n"
	e, _ := scripted(t, version("2.7.0"),
		answer(2, "", gone, asJSON...),
		answer(1, "", missing, "machine", "data-dir", "--name", s.ID, "--error-format", "json"),
		answer(1, "", missing, "machine", "status", "--name", s.ID, "--json", "--error-format", "json"))
	_, err := e.Start(t.Context(), s)
	wantFault(t, err, fault.Unavailable, "smolvm_usage", "smolvm 2.7.0, which does not know --mount-socket", "bottle-vm doctor --install smolvm", smolvm.NewestTested.String())
	if _, err := os.Stat(filepath.Join(s.Dir, "smolvm")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is left: %v", err)
	}
}

// A guest that is never ready is not tried twice: that would be a minute.
func TestNeverReadyIsNotRetried(t *testing.T) {
	s := newSpec(t)
	e, f := scripted(t, version("1.9.1"),
		answer(0, created, "", createArgv(s)...),
		answer(0, vmDir(s)+"\n", "", "machine", "data-dir", "--name", s.ID),
		answer(1, "", starting+"Error: agent operation failed: wait for ready: agent did not become ready within 30 seconds\n", "machine", "start", "--name", s.ID),
		answer(1, "", unknown, "machine", "status", "--name", s.ID, "--json"),
	)
	_, err := e.Start(t.Context(), s)
	wantFault(t, err, fault.Host, "smolvm_boot", "did not become ready")
	if strings.Count(f.Calls(t), `"start"`) != 1 {
		t.Errorf("calls:\n%s", f.Calls(t))
	}
}

// A guest that ran and was late is started again, a few times; smolvm 1.9.1 waits
// half a minute, which a slow host takes.
func TestLateGuestIsStartedAgain(t *testing.T) {
	late := starting + "Error: agent operation failed: wait for ready: agent did not become ready within 30 seconds\n"
	for _, tt := range []struct {
		name      string
		failures  int
		code      string
		wantStart int
	}{
		{"the second time it is ready", 1, "", 2},
		{"the last time it is ready", bootTries - 1, "", bootTries},
		{"it never is", bootTries, "smolvm_slow", bootTries},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSpec(t)
			monitor := monitorFor(t, s.Workspace, s.Binds[0].Source)
			data := vmDir(s)
			if err := os.MkdirAll(data, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(data, "agent-console.log"), []byte("agent starting\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			recs := []record{version("1.9.1"), answer(0, created, "", createArgv(s)...),
				answer(0, data+"\n", "", "machine", "data-dir", "--name", s.ID)}
			for range tt.failures {
				recs = append(recs, answer(1, "", late, "machine", "start", "--name", s.ID))
			}
			recs = append(recs, answer(0, "", starting, "machine", "start", "--name", s.ID),
				answer(0, statusJSON(s.ID, "running", monitor.Pid), "", "machine", "status", "--name", s.ID, "--json"),
				answer(0, "", "", awaits(s.ID)...),
				answer(0, "Deleted machine: x\n", "", "machine", "delete", "--name", s.ID, "-f"),
				answer(0, "[]\n", "", "machine", "ls", "--json"))
			e, f := scripted(t, recs...)
			_, err := e.Start(t.Context(), s)
			if tt.code != "" {
				wantFault(t, err, fault.Host, tt.code, "did not become ready")
			} else if err != nil {
				t.Error(err)
			}
			if got := strings.Count(f.Calls(t), `"machine","start"`); got != tt.wantStart {
				t.Errorf("%d starts, want %d:\n%s", got, tt.wantStart, f.Calls(t))
			}
		})
	}
}

// A helper that could not set the guest up is a failed start.
func TestHelperFails(t *testing.T) {
	s := newSpec(t)
	e, f := scripted(t, version("1.9.1"),
		answer(0, created, "", createArgv(s)...),
		answer(0, vmDir(s)+"\n", "", "machine", "data-dir", "--name", s.ID),
		answer(0, "", starting, "machine", "start", "--name", s.ID),
		answer(0, statusJSON(s.ID, "running", 0), "", "machine", "status", "--name", s.ID, "--json"),
		answer(125, "", "bottle-guest: error: the helper is not ready\n", awaits(s.ID)...),
		answer(0, "Deleted machine: x\n", "", "machine", "delete", "--name", s.ID, "-f"),
		answer(0, "[]\n", "", "machine", "ls", "--json"),
	)
	_, err := e.Start(t.Context(), s)
	wantFault(t, err, fault.Unavailable, "guest_failed", "not ready")
	if !strings.Contains(f.Calls(t), `"delete"`) {
		t.Errorf("calls:\n%s", f.Calls(t))
	}
}

// telling gives what a keeper hears of the guest, again and again: what it told
// before the start that counts is forgotten.
func telling(t *testing.T, r guest.Report) <-chan guest.Report {
	t.Helper()
	reports, ctx := make(chan guest.Report), t.Context()
	go func() {
		for {
			select {
			case reports <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	return reports
}

func inodesOf(t *testing.T, folders ...string) []uint64 {
	t.Helper()
	all, err := guest.Inodes(folders)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// What the helper tells by the gate's socket counts, and a guest that tells
// nothing is asked by a command.
func TestReports(t *testing.T) {
	defer func(d time.Duration) { reportLimit = d }(reportLimit)
	reportLimit = 100 * time.Millisecond
	for _, tt := range []struct {
		name    string
		reports func(*engine.Spec) <-chan guest.Report
		asked   bool
		code    string
		says    []string
	}{
		{"ready", func(s *engine.Spec) <-chan guest.Report {
			return telling(t, guest.Report{Inodes: inodesOf(t, s.Workspace, s.Binds[0].Source)})
		}, false, "", nil},
		{"failed", func(*engine.Spec) <-chan guest.Report { return telling(t, guest.Report{Failed: "no /etc/passwd"}) },
			false, "guest_failed", []string{"no /etc/passwd"}},
		{"silent", func(*engine.Spec) <-chan guest.Report { return make(chan guest.Report) }, true, "gate_socket_missing", []string{"1.9.1"}},
		{"a guest that was started before", func(*engine.Spec) <-chan guest.Report {
			old := make(chan guest.Report, 1)
			old <- guest.Report{}
			return old
		}, true, "gate_socket_missing", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSpec(t)
			reports := tt.reports(s)
			s.Reports, s.Forget = reports, func() {
				select {
				case <-reports:
				default:
				}
			}
			monitor := monitorFor(t, s.Workspace, s.Binds[0].Source)
			e, f := scripted(t, version("1.9.1"),
				answer(0, created, "", createArgv(s)...),
				answer(0, vmDir(s)+"\n", "", "machine", "data-dir", "--name", s.ID),
				answer(0, "", starting, "machine", "start", "--name", s.ID),
				answer(0, statusJSON(s.ID, "running", monitor.Pid), "", "machine", "status", "--name", s.ID, "--json"),
				answer(123, "", "bottle-guest: error: the gate's socket\n", awaits(s.ID)...),
				answer(0, "Deleted machine: x\n", "", "machine", "delete", "--name", s.ID, "-f"),
				answer(0, "[]\n", "", "machine", "ls", "--json"))
			_, err := e.Start(t.Context(), s)
			if tt.code != "" {
				wantFault(t, err, fault.Unavailable, tt.code, tt.says...)
			} else if err != nil {
				t.Error(err)
			}
			if asked := strings.Contains(f.Calls(t), `"await"`); asked != tt.asked {
				t.Errorf("asked: %v\n%s", asked, f.Calls(t))
			}
		})
	}
}

// A socket that smolvm was asked for and that is not in the guest is a failed
// start, and a refusal that says so.
func TestSocketIsMissing(t *testing.T) {
	s := newSpec(t)
	e, f := scripted(t, version("1.9.1"),
		answer(0, created, "", createArgv(s)...),
		answer(0, vmDir(s)+"\n", "", "machine", "data-dir", "--name", s.ID),
		answer(0, "", starting, "machine", "start", "--name", s.ID),
		answer(0, statusJSON(s.ID, "running", 0), "", "machine", "status", "--name", s.ID, "--json"),
		answer(123, "", "bottle-guest: error: the gate's socket: dial unix /run/bottle/gate.sock: connect: no such file or directory\n",
			awaits(s.ID)...),
		answer(0, "Deleted machine: x\n", "", "machine", "delete", "--name", s.ID, "-f"),
		answer(0, "[]\n", "", "machine", "ls", "--json"),
	)
	_, err := e.Start(t.Context(), s)
	wantFault(t, err, fault.Unavailable, "gate_socket_missing", "no such file or directory", "1.9.1", "--mount-socket", "gvisor")
	if !strings.Contains(f.Calls(t), `"delete"`) {
		t.Errorf("calls:\n%s", f.Calls(t))
	}
}

func TestHelperIsMissing(t *testing.T) {
	e, _ := scripted(t, version("1.9.1"))
	s := newSpec(t)
	s.GuestHelper += ".none"
	wantFault(t, e.Prepare(t.Context(), s), fault.Unavailable, "helper_missing")
}

// A machine of that name that is there already is not deleted.
func TestStartDoesNotTouchAnotherMachine(t *testing.T) {
	s := newSpec(t)
	e, f := scripted(t, version("1.9.1"),
		answer(1, "", "Error: config operation failed: create machine: machine 'x' already exists or is being created\n", createArgv(s)...))
	_, err := e.Start(t.Context(), s)
	wantFault(t, err, fault.CantCreate, "smolvm_exists")
	if strings.Contains(f.Calls(t), `"delete"`) {
		t.Errorf("calls:\n%s", f.Calls(t))
	}
}

func TestDelete(t *testing.T) {
	ctx := t.Context()
	status := []string{"machine", "status", "--name", "dev-0123abcd", "--json"}
	dataDir := []string{"machine", "data-dir", "--name", "dev-0123abcd"}
	prepared := func(t *testing.T) *engine.Spec {
		s := newSpec(t)
		if err := stage(s, nil); err != nil {
			t.Fatal(err)
		}
		return s
	}
	t.Run("nothing was ever made", func(t *testing.T) {
		e := New([]string{"PATH=/nonexistent"})
		if err := e.Delete(ctx, refOf(newSpec(t))); err != nil {
			t.Error(err)
		}
	})
	t.Run("smolvm knows nothing", func(t *testing.T) {
		s := prepared(t)
		e, _ := scripted(t, version("1.9.1"), answer(1, "", unknown, status...), answer(1, "", notFound, dataDir...))
		for range 2 {
			if err := e.Delete(ctx, refOf(s)); err != nil {
				t.Error(err)
			}
		}
		if _, err := os.Stat(ownDir(s.Dir)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("files are left: %v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		s := prepared(t)
		e, _ := scripted(t, version("1.9.1"), answer(1, "", notFound, dataDir...),
			answer(0, statusJSON(s.ID, "running", 0), "", status...),
			answer(0, "Stopping machine 'x'...\nCancelled\n", "", "machine", "delete", "--name", s.ID, "-f"),
			answer(0, "["+statusJSON(s.ID, "stopped", 0)+"]", "", "machine", "ls", "--json"))
		wantFault(t, e.Delete(ctx, refOf(s)), fault.Unavailable, "smolvm_not_deleted", "Cancelled")
		if _, err := os.Stat(ownDir(s.Dir)); err != nil {
			t.Errorf("what a second try needs is gone: %v", err)
		}
	})
	t.Run("a machine of somebody else", func(t *testing.T) {
		s := prepared(t)
		e, f := scripted(t, version("1.9.1"), answer(1, "", notFound, dataDir...),
			answer(0, `{"name":"dev-0123abcd","state":"running","labels":{}}`, "", status...))
		wantFault(t, e.Delete(ctx, refOf(s)), fault.NoPerm, "smolvm_foreign_machine")
		if strings.Contains(f.Calls(t), `"delete"`) {
			t.Error("it was deleted")
		}
	})
}

// smolvm loses sight of a monitor whose start was cut off; Delete does not.
func TestDeleteEndsLostMonitors(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("NOT RUN: it makes processes with an argv of its own, which is for Linux")
	}
	s := newSpec(t)
	if err := stage(s, nil); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(t.TempDir(), "vms", "0123")
	// A shell that runs a script named _boot-vm has a monitor's argv.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "_boot-vm"), []byte("sleep 60 & wait\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	start := func(config string) *exec.Cmd {
		c := exec.Command("sh", "_boot-vm", config)
		c.Dir = dir
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
		return c
	}
	monitor := start(data + "/boot-config.json")
	other := start(data + "4/boot-config.json")
	rec, err := json.Marshal(machineRecord{Name: s.ID, DataDir: data})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(machineFile(s.Dir), rec, 0o600); err != nil {
		t.Fatal(err)
	}
	e, _ := scripted(t, version("1.9.1"),
		answer(1, "", unknown, "machine", "status", "--name", s.ID, "--json"),
		answer(1, "", notFound, "machine", "data-dir", "--name", s.ID))
	if err := e.Delete(t.Context(), refOf(s)); err != nil {
		t.Fatal(err)
	}
	if exists(monitor.Process.Pid) {
		t.Error("the lost monitor still runs")
	}
	if !exists(other.Process.Pid) {
		t.Error("another machine's monitor was killed")
	}
}

func TestAlive(t *testing.T) {
	self := os.Getpid()
	const nobody = 4194304 // beyond every pid
	for _, tt := range []struct {
		state string
		pid   int
		want  bool
	}{
		{"running", self, true}, {"running", nobody, false}, {"running", 0, true}, {"unreachable", self, true}, {"unreachable", nobody, false},
		{"created", 0, false}, {"stopped", 0, false}, {"failed", 0, false}, {"paused", self, true}, {"dreaming", 0, false},
	} {
		e, _ := scripted(t, version("1.9.1"), answer(0, statusJSON("a", tt.state, tt.pid), "", "machine", "status", "--name", "a", "--json"))
		if got, err := e.Alive(t.Context(), engine.Ref{ID: "a"}); got != tt.want || err != nil {
			t.Errorf("%s, pid %d: %v, %v", tt.state, tt.pid, got, err)
		}
	}
	e, _ := scripted(t, version("1.9.1"), answer(1, "", unknown, "machine", "status", "--name", "a", "--json"))
	if got, err := e.Alive(t.Context(), engine.Ref{ID: "a"}); got || err != nil {
		t.Errorf("unknown: %v, %v", got, err)
	}
}

func TestBootHints(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("NOT RUN: hints about /dev/kvm are for Linux")
	}
	kvm, ready := &smolvm.Error{Kind: smolvm.ErrKVM}, &smolvm.Error{Kind: smolvm.ErrNotReady}
	for _, tt := range []struct {
		err  *smolvm.Error
		euid int
		mode os.FileMode
		off  bool
		want string
	}{
		{ready, 1000, 0, false, "no /dev/kvm"},
		{ready, 0, 0o600, false, "SMOLVM_VM_UID_DROP=off"},
		{ready, 0, 0o666, false, "kvm_pvm"},
		{kvm, 1000, 0o660, false, "KvmOpen(Error(13))"},
		{ready, 1000, 0o660, false, "kvm_pvm"},
		{ready, 0, 0o600, true, "kvm_pvm"},
		{&smolvm.Error{Kind: smolvm.ErrTimeout}, 1000, 0o666, false, "still be unpacking"},
	} {
		if got := bootHint(tt.err, tt.euid, tt.mode, tt.off); !strings.Contains(got, tt.want) {
			t.Errorf("%+v: %s", tt, got)
		}
	}
	if err := errors.New("x"); explainBoot(err, func(string) string { return "" }, true) != err {
		t.Error("an unrelated error was changed")
	}
}

// smolvm gets nothing of the caller's environment that it does not need.
func TestProgramEnv(t *testing.T) {
	got := New([]string{"HOME=/h", "ANTHROPIC_API_KEY=secret", "BOTTLE_TOKEN=secret", "LC_TOKEN=secret", "XDG_CACHE_HOME=/c", "SMOLVM_MACHINE_NAME=x",
		"SMOLVM_LIB_DIR=/l", "SMOLVM_DOCKER_SOCKET=1", "SMOLVM_SECCOMP=off", "LD_PRELOAD=/e", "junk"}).env
	if want := []string{"HOME=/h", "XDG_CACHE_HOME=/c", "SMOLVM_LIB_DIR=/l", "SMOLVM_DISABLE_SHARED_EXTRACT=1"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// Where nothing boots, Check says so and what to do, and leaves nothing. Root
// with smolvm's change of user and a /dev/kvm of mode 0600, or a user who may not
// open it, is the quick form of that.
func TestRealCheck(t *testing.T) {
	for _, v := range []string{"1.9.1", "1.32.2"} {
		t.Run(v, func(t *testing.T) {
			if v != "1.9.1" && os.Getenv("BOTTLE_CANARIES") != "1" {
				t.Skipf("NOT RUN without BOTTLE_CANARIES=1: the first start of %s unpacks its disks for 20 s", v)
			}
			bin := smolvmtest.Real(t, v)
			e := New([]string{"HOME=" + t.TempDir(), "PATH=/usr/bin:/bin", "BOTTLE_SMOLVM=" + bin})
			err := e.Check(t.Context(), t.TempDir())
			t.Logf("Check: %v", err)
			if err != nil {
				wantFault(t, err, fault.Host, "smolvm_boot", "gvisor", "smolvm machine start")
			}
			c, cerr := e.client(t.Context())
			if cerr != nil {
				t.Fatal(cerr)
			}
			if list, err := c.MachineLs(t.Context()); err != nil || len(list) != 0 {
				t.Errorf("left over: %v, %v", list, err)
			}
		})
	}
}

// The real programs take what Start asks of them.
func TestRealCreate(t *testing.T) {
	for _, v := range []string{"1.9.1", "1.32.2"} {
		t.Run(v, func(t *testing.T) {
			bin := smolvmtest.Real(t, v)
			e := New([]string{"HOME=" + t.TempDir(), "PATH=/usr/bin:/bin", "BOTTLE_SMOLVM=" + bin, noDrop})
			c, err := e.client(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			s := newSpec(t)
			if err := e.Prepare(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			if err := stage(s, nil); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(rootfsDir(s.Dir), 0o755); err != nil {
				t.Fatal(err)
			}
			vs, err := volumes(s)
			if err != nil {
				t.Fatal(err)
			}
			spec, err := createSpec(s, vs)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.MachineCreate(t.Context(), s.ID, spec); err != nil {
				t.Fatal(err)
			}
			if err := remember(t.Context(), c, s.ID, s.Dir, nil); err != nil {
				t.Fatal(err)
			}
			m, err := c.MachineStatus(t.Context(), s.ID)
			if err != nil || !isOurs(m, tagOf(s.Dir)) || m.Network || m.CPUs != 1 || m.MemoryMiB != 512 || m.Mounts != 3 {
				t.Errorf("%+v, %v", m, err)
			}
			if alive, err := e.Alive(t.Context(), refOf(s)); alive || err != nil {
				t.Errorf("alive: %v, %v", alive, err)
			}
			if _, err := e.Exec(t.Context(), refOf(s), engine.ExecRequest{Argv: []string{"true"}}); !errors.Is(err, smolvm.ErrNotRunning) {
				t.Errorf("exec: %v", err)
			}
			for range 2 {
				if err := e.Delete(t.Context(), refOf(s)); err != nil {
					t.Errorf("delete: %v", err)
				}
			}
		})
	}
}

// A start that is cut off leaves a monitor that smolvm no longer knows of; this
// ends it.
func TestRealCutOffStartLeavesNothing(t *testing.T) {
	if _, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		t.Skipf("NOT RUN: no start hangs where /dev/kvm cannot be opened: %v", err)
	}
	home := t.TempDir()
	e := New([]string{"HOME=" + home, "PATH=/usr/bin:/bin", "BOTTLE_SMOLVM=" + smolvmtest.Real(t, "1.9.1"), noDrop})
	c, err := e.client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := newSpec(t)
	if err := stage(s, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.MachineCreate(t.Context(), s.ID, smolvm.CreateSpec{CPUs: 1, MemMiB: 256, Labels: ownLabels(tagOf(s.Dir))}); err != nil {
		t.Fatal(err)
	}
	if err := remember(t.Context(), c, s.ID, s.Dir, nil); err != nil {
		t.Fatal(err)
	}
	ctx, cut := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.MachineStart(ctx, s.ID) }()
	for monitorsBelow(home) == 0 {
		select {
		case err := <-ended:
			t.Skipf("NOT RUN: the start ended before it could be cut off: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	cut()
	if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("start: %v", err)
	}
	if monitorsBelow(home) == 0 {
		t.Log("this smolvm ends its monitor by itself")
	}
	data, err := c.MachineDataDir(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := closeDataDir(s.ID, s.Dir); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat(data); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("smolvm's folder is open to others: %v, %v", fi, err)
	}
	if err := e.Delete(t.Context(), refOf(s)); err != nil {
		t.Error(err)
	}
	if n := monitorsBelow(home); n != 0 {
		t.Errorf("%d monitors are left", n)
	}
}

func monitorsBelow(dir string) int {
	n := 0
	for _, pid := range processes() {
		if argv := argvOf(pid); len(argv) > 2 && argv[1] == "_boot-vm" && strings.HasPrefix(argv[2], dir+"/") && exists(pid) {
			n++
		}
	}
	return n
}

// rootOnly is a refusal that only root meets.
func rootOnly(code string) string {
	if os.Geteuid() != 0 {
		return ""
	}
	return code
}
