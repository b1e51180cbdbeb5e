package smolvm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
)

// again scripts a machine that was created and runs, is stopped, and is started
// again unless end says otherwise.
func again(t *testing.T, change func(*engine.Spec)) (s *engine.Spec, calls func() string, restart func() error) {
	t.Helper()
	s = newSpec(t)
	folders := []string{s.Workspace, s.Binds[0].Source}
	first, second := monitorFor(t, folders...), monitorFor(t, folders...)
	status := []string{"machine", "status", "--name", s.ID, "--json"}
	start := answer(0, "Machine 'x' running (PID: 1)\n", starting, "machine", "start", "--name", s.ID)
	ready := answer(0, "", "", awaits(s.ID)...)
	e, f := scripted(t, version("1.9.1"),
		answer(0, created, "", createArgv(s)...),
		answer(0, vmDir(s)+"\n", "", "machine", "data-dir", "--name", s.ID),
		start, ready,
		answer(0, statusJSON(s.ID, "running", first.Pid), "", status...),
		answer(0, statusJSON(s.ID, "running", first.Pid), "", status...),
		answer(0, "", "", "machine", "exec", "--name", s.ID, "--", "/opt/bottle/guest", "sync"),
		answer(0, "Stopped machine: x\n", "", "machine", "stop", "--name", s.ID),
		answer(0, statusJSON(s.ID, "stopped", 0), "", status...),
		start,
		answer(0, statusJSON(s.ID, "running", second.Pid), "", status...),
		ready,
	)
	if _, err := e.Start(t.Context(), s); err != nil {
		t.Fatalf("%v\n%s", err, f.Calls(t))
	}
	left := filepath.Join(guestDir(s.Dir), requestsDir, "0123.json")
	if err := os.WriteFile(left, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(rootfsDir(s.Dir), "bin/new"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	go func() { // as smolvm ends it
		for !strings.Contains(f.Calls(t), `"sync"`) {
			time.Sleep(time.Millisecond)
		}
		_ = first.Kill()
		_, _ = first.Wait()
	}()
	if err := e.Stop(t.Context(), refOf(s)); err != nil {
		t.Fatalf("%v\n%s", err, f.Calls(t))
	}
	if change != nil {
		change(s)
	}
	return s, func() string { return f.Calls(t) }, func() error {
		recorded := ""
		s.Record = func(role string, pid int) error { recorded = fmt.Sprint(role, " ", pid); return nil }
		s.CACert = []byte("another")
		_, err := e.Restart(t.Context(), s)
		if err != nil {
			return err
		}
		if want := fmt.Sprint("smolvm ", second.Pid); recorded != want {
			t.Errorf("recorded %q, want %q", recorded, want)
		}
		if _, err := os.Stat(left); err == nil {
			t.Error("a request of the run before is left")
		}
		if b, err := os.ReadFile(filepath.Join(guestDir(s.Dir), "ca.pem")); err != nil || string(b) != "another" {
			t.Errorf("the guest has the certificate of the run before: %q, %v", b, err)
		}
		if _, err := os.Stat(filepath.Join(rootfsDir(s.Dir), "bin/new")); err != nil {
			t.Errorf("what the guest did to its image is gone: %v", err)
		}
		return nil
	}
}

// A stopped machine is started again; nothing of it is made anew but what the
// keeper gives it.
func TestRestart(t *testing.T) {
	_, calls, restart := again(t, nil)
	if err := restart(); err != nil {
		t.Fatalf("%v\n%s", err, calls())
	}
	if got := calls(); strings.Count(got, `"create"`) != 1 || strings.Index(got, `"sync"`) > strings.Index(got, `"stop"`) || strings.Contains(got, `"delete"`) || strings.Count(got, `"start"`) != 2 {
		t.Errorf("calls:\n%s", got)
	}
}

// What the guest is shown of the host is what it was shown before, or nothing is
// started.
func TestRestartRefuses(t *testing.T) {
	for _, tt := range []struct {
		name, code string
		change     func(*engine.Spec)
	}{
		{"a link in place of the workspace", "smolvm_changed", func(s *engine.Spec) {
			_ = os.Rename(s.Workspace, s.Workspace+".away")
			_ = os.Symlink(s.Workspace+".away", s.Workspace)
		}},
		{"a mounted folder that is gone", "smolvm_changed", func(s *engine.Spec) { s.Binds = nil }},
		{"a mount more", "smolvm_changed", func(s *engine.Spec) {
			s.Binds = append(s.Binds, engine.Bind{Source: s.RunDir, Target: "/more", ReadOnly: true})
		}},
		{"a mount that is writable now", "smolvm_changed", func(s *engine.Spec) { s.Binds[0].ReadOnly = false }},
		{"no record of what it was given", "smolvm_record", func(s *engine.Spec) { _ = os.Remove(machineFile(s.Dir)) }},
		{"another socket", "smolvm_changed", func(s *engine.Spec) { s.GateSocket += "2" }},
		{"a workspace that has something to guard now", "smolvm_nested_mount", func(s *engine.Spec) {
			hooks := filepath.Join(s.Workspace, ".git/hooks")
			_ = os.MkdirAll(hooks, 0o755)
			s.Binds = append(s.Binds, engine.Bind{Source: hooks, Target: "/workspace/.git/hooks", ReadOnly: true})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, calls, restart := again(t, tt.change)
			exit := fault.Host
			if tt.code == "smolvm_record" {
				exit = fault.IO
			}
			wantFault(t, restart(), exit, tt.code)
			if got := calls(); strings.Count(got, `"start"`) != 1 {
				t.Errorf("it was started:\n%s", got)
			}
		})
	}
}

// A machine that runs, however slowly it answers, is not started: smolvm would
// kill it and boot it again.
func TestRestartOfARunningMachine(t *testing.T) {
	s := newSpec(t)
	if err := stage(s, nil); err != nil {
		t.Fatal(err)
	}
	status := []string{"machine", "status", "--name", s.ID, "--json"}
	e, f := scripted(t, version("1.9.1"), answer(0, statusJSON(s.ID, "unreachable", os.Getpid()), "", status...))
	wantFault(t, func() error { _, err := e.Restart(t.Context(), s); return err }(), fault.TempFail, "still_running")
	e, _ = scripted(t, version("1.9.1"), answer(1, "", unknown, status...))
	wantFault(t, func() error { _, err := e.Restart(t.Context(), s); return err }(), fault.Unavailable, "smolvm_not_found")
	e, _ = scripted(t, version("1.9.1"), answer(0, `{"name":"dev-0123abcd","state":"stopped","labels":{}}`, "", status...))
	wantFault(t, func() error { _, err := e.Restart(t.Context(), s); return err }(), fault.NoPerm, "smolvm_foreign_machine")
	if strings.Contains(f.Calls(t), `"start"`) {
		t.Error("it was started")
	}
}

// Stop is idempotent, touches no machine of others, and ends what smolvm does not.
func TestStop(t *testing.T) {
	s := newSpec(t)
	if err := New([]string{"PATH=/nonexistent"}).Stop(t.Context(), refOf(s)); err != nil {
		t.Errorf("a machine that never was: %v", err)
	}
	if err := stage(s, nil); err != nil {
		t.Fatal(err)
	}
	status := []string{"machine", "status", "--name", s.ID, "--json"}
	dataDir := answer(0, vmDir(s)+"\n", "", "machine", "data-dir", "--name", s.ID)
	e, _ := scripted(t, version("1.9.1"), answer(1, "", unknown, status...))
	if err := e.Stop(t.Context(), refOf(s)); err != nil {
		t.Errorf("a machine that is gone: %v", err)
	}
	e, _ = scripted(t, version("1.9.1"), answer(0, statusJSON(s.ID, "stopped", 0), "", status...), dataDir,
		answer(0, "Machine 'x' is not running (state: stopped)\n", "", "machine", "stop", "--name", s.ID))
	for range 2 {
		if err := e.Stop(t.Context(), refOf(s)); err != nil {
			t.Errorf("a machine that is stopped: %v", err)
		}
	}
	e, f := scripted(t, version("1.9.1"), answer(0, `{"name":"dev-0123abcd","state":"running","labels":{}}`, "", status...))
	wantFault(t, e.Stop(t.Context(), refOf(s)), fault.NoPerm, "smolvm_foreign_machine")
	if strings.Contains(f.Calls(t), `"stop"`) {
		t.Error("it was stopped")
	}
	e, _ = scripted(t, version("1.9.1"), answer(0, statusJSON(s.ID, "running", os.Getpid()), "", status...), dataDir,
		answer(1, "", "Error: agent operation failed: stop: it did not\n", "machine", "stop", "--name", s.ID))
	if err := e.Stop(t.Context(), refOf(s)); err == nil {
		t.Error("a machine that runs on counts as stopped")
	}
}
