//go:build linux

package runsc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

var update = flag.Bool("update", false, "write the golden files")

func TestNewSpecGolden(t *testing.T) {
	s := NewSpec(Container{
		Hostname: "dev-0badcafe", Rootfs: "/state/rootfs", Args: []string{"/opt/bottle/guest", "init"},
		Env: []string{"PATH=/usr/bin:/bin"}, User: User{1000, 1000}, Capabilities: []string{"CAP_SETUID"},
		UIDs: []IDMapping{{1000, 1001, 1}}, GIDs: []IDMapping{{1000, 1001, 1}},
		Binds: []Bind{{Source: "/usr", Target: "/usr", ReadOnly: true}, {Source: "/home/me/project", Target: "/workspace"},
			{Source: "/media/stick", Target: "/opt/stick", ReadOnly: true, NoExec: true}},
		OpenFiles: 65536, InternalCgroups: true, WorkingDirectory: "/",
	})
	got, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	golden := filepath.Join("testdata", "config.golden.json")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("differs from %s (go test -update writes it):\n%s", golden, got)
	}
	for _, n := range s.Linux.Namespaces {
		if n.Type == "network" {
			t.Error("a network namespace entry: the guest could get a device")
		}
	}
}

func TestNewProcessHasNoCapability(t *testing.T) {
	b := Encode(NewProcess(User{1000, 1000}, []string{"true"}, nil, "/", nil, false))
	// A missing set would mean the capabilities of the first process.
	for _, want := range []string{`"capabilities":{}`, `"noNewPrivileges":true`, `"env":[]`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %s in %s", want, b)
		}
	}
}

// script makes a program that stands in for runsc.
func script(t *testing.T, body string) Runsc {
	t.Helper()
	dir := t.TempDir()
	p := filepath.Join(dir, Name)
	if err := os.WriteFile(p, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return Runsc{Path: p, Root: filepath.Join(dir, "root")}
}

// Commands, variables and the caller's environment stay out of argv and of
// runsc's own environment.
func TestExecHidesTheCommand(t *testing.T) {
	t.Setenv("HOST_SECRET", "hunter2")
	dir := t.TempDir()
	r := script(t, `PATH=/usr/bin:/bin; printf '%s\n' "$@" > `+dir+`/argv; env > `+dir+`/env; cat /proc/self/fd/3 > `+dir+`/process; cat > /dev/null; echo out; echo err >&4; exit 7`)
	out, err := os.Create(dir + "/out")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	errOut, err := os.Create(dir + "/err")
	if err != nil {
		t.Fatal(err)
	}
	defer errOut.Close()
	started := false
	status, err := r.Exec(context.Background(), ExecOptions{ID: "x-1", Stdout: out, Stderr: errOut, PIDFile: "/run/p",
		Process: NewProcess(User{}, []string{"cmd", "TOPSECRET"}, []string{"K=TOPSECRET"}, "/w", nil, false),
		Started: func(*os.Process) { started = true }})
	if err != nil || status != 7 || !started {
		t.Fatalf("status %d, started %v, %v", status, started, err)
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	want := append(r.flags(), "exec", "--process=/proc/self/fd/3", "--pass-fd=4:2", "--internal-pid-file=/run/p", "x-1")
	if got := strings.Split(strings.TrimSpace(read("argv")), "\n"); !slices.Equal(got, want) {
		t.Errorf("argv %q\nwant %q", got, want)
	}
	if strings.Contains(read("env"), "hunter2") {
		t.Error("the caller's environment is handed on")
	}
	if !strings.Contains(read("process"), `"args":["cmd","TOPSECRET"],"env":["K=TOPSECRET"]`) {
		t.Errorf("process: %s", read("process"))
	}
	if read("out") != "out\n" || read("err") != "err\n" {
		t.Errorf("streams: %q, %q", read("out"), read("err"))
	}
}

func TestExecTellsFailuresApart(t *testing.T) {
	for _, c := range []struct {
		name, body string
		status     int
		text       string // "" : no error
	}{
		{"the command's 128", "exit 128", 128, ""},
		{"the command's 2", "exit 2", 2, ""},
		{"the command's 1", "echo warning >&2; exit 1", 1, ""},
		{"runsc's own", "echo 'executing processes: no such file' >&2; exit 128", 0, "executing processes: no such file"},
		{"a panic", "echo 'panic: boom' >&2; exit 2", 0, "panic: boom"},
		{"killed", "kill -9 $$", 0, "signal: killed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := script(t, c.body+"\n")
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			status, err := r.Exec(context.Background(), ExecOptions{ID: "x", Stdout: null, Stderr: null, Process: &Process{}})
			if c.text == "" {
				if err != nil || status != c.status {
					t.Errorf("got %d, %v", status, err)
				}
				return
			}
			var own *Error
			if !errors.As(err, &own) || own.Verb != "exec" || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %d, %v", status, err)
			}
		})
	}
}

func TestCallsAreBounded(t *testing.T) {
	r := script(t, "exec sleep 100\n")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	err := r.Delete(ctx, "x")
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	r = script(t, "PATH=/usr/bin:/bin; head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1\n")
	if err := r.Kill(context.Background(), "x", 5, 15); err == nil || len(err.Error()) > 2*maxText {
		t.Error("a flood of messages is kept whole, or success")
	}
}

func TestStats(t *testing.T) {
	r := script(t, `echo '{"type":"stats","id":"aa","data":{"memory":{"usage":{"limit":0,"usage":2244608}},"pids":{"current":3}}}'`)
	st, err := r.Stats(context.Background(), "aa")
	if err != nil || st != (Stats{2244608, 3}) {
		t.Errorf("%+v, %v", st, err)
	}
	if _, err := script(t, "echo garbage").Stats(context.Background(), "aa"); err == nil {
		t.Error("garbage was taken for numbers")
	}
}

func TestRunReportsItsLog(t *testing.T) {
	r := script(t, `echo '{"msg":"no user namespaces","level":"error","time":"x"}' > /proc/self/fd/4; exit 128`)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	pid := 0
	err = r.Run(context.Background(), RunOptions{ID: "x", Bundle: "/b", Output: null, Started: func(p int) error { pid = p; return nil }})
	if err == nil || err.Error() != "runsc run: no user namespaces" || pid == 0 {
		t.Errorf("pid %d, %v", pid, err)
	}
	refused := errors.New("cannot record")
	if err := r.Run(context.Background(), RunOptions{ID: "x", Output: null, Started: func(int) error { return refused }}); !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	beside, onPath, other := filepath.Join(dir, "bin"), filepath.Join(dir, "path"), filepath.Join(dir, "my-runsc")
	program := func(p string) {
		t.Helper()
		os.MkdirAll(filepath.Dir(p), 0o755)
		if err := os.WriteFile(p, []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	program(onPath + "/" + Name)
	program(onPath + "/runsc")
	program(other)
	find := func(env map[string]string, exe string) (string, error) {
		return Find(func(n string) string { return env[n] }, exe)
	}
	if p, err := find(map[string]string{"PATH": "relative:" + onPath}, beside+"/bottle-vm"); err != nil || p != onPath+"/"+Name {
		t.Errorf("on PATH: %q, %v", p, err)
	}
	program(beside + "/" + Name)
	if p, err := find(map[string]string{"PATH": onPath}, beside+"/bottle-vm"); err != nil || p != beside+"/"+Name {
		t.Errorf("beside: %q, %v", p, err)
	}
	if p, err := find(map[string]string{"PATH": onPath, Variable: other}, beside+"/bottle-vm"); err != nil || p != other {
		t.Errorf("by the variable: %q, %v", p, err)
	}
	for name, env := range map[string]map[string]string{"nowhere": {"PATH": dir}, "variable names nothing": {Variable: dir + "/none", "PATH": onPath}, "variable names a folder": {Variable: dir}} {
		_, err := find(env, "")
		if f := fault.As(err); f == nil || f.Exit != fault.Unavailable || f.Code != "engine_missing" || f.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
