//go:build linux

package smolvm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
)

// newWarmSpec is newSpec for a copy. Its gate's folder is one of its own.
func newWarmSpec(t *testing.T) *engine.Spec {
	t.Helper()
	s := newSpec(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := filepath.Join(s.RunDir, "run", "0123abcd")
	if err := os.MkdirAll(run, 0o700); err != nil {
		t.Fatal(err)
	}
	s.Warm = &engine.Warm{Dir: filepath.Join(s.RunDir, "warm"), Image: "sha256:1"}
	s.Self = exe
	s.RunDir, s.GateSocket = run, filepath.Join(run, "gate.sock")
	return s
}

func baseFor(t *testing.T, s *engine.Spec, v smolvm.Version) *Base {
	t.Helper()
	vs, err := volumes(s)
	if err != nil {
		t.Fatal(err)
	}
	b, err := baseOf(&smolvm.Client{Bin: "/x/smolvm", Version: v}, s, vs)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Bottles share a machine when, and only when, all that it is made of is the
// same. What tells them apart is no part of it.
func TestBaseKey(t *testing.T) {
	s := newWarmSpec(t)
	key := baseFor(t, s, smolvm.SinceFork).Name
	if !strings.HasPrefix(key, basePrefix) {
		t.Error(key)
	}
	change := func(f func(*engine.Spec)) string {
		o, w, b := *s, *s.Warm, *s.Bottle
		o.Warm, o.Bottle = &w, &b
		f(&o)
		return baseFor(t, &o, smolvm.SinceFork).Name
	}
	for name, f := range map[string]func(*engine.Spec){
		"id":        func(o *engine.Spec) { o.ID = "dev-00000002"; o.Dir = filepath.Join(filepath.Dir(o.Dir), o.ID) },
		"CA":        func(o *engine.Spec) { o.CACert = []byte("another") },
		"workspace": func(o *engine.Spec) { o.Workspace = filepath.Dir(o.Workspace) },
		"user":      func(o *engine.Spec) { o.Bottle.User = "root" },
	} {
		if change(f) != key {
			t.Errorf("another %s takes another machine", name)
		}
	}
	for name, f := range map[string]func(*engine.Spec){
		"image":        func(o *engine.Spec) { o.Warm.Image = "sha256:2" },
		"processors":   func(o *engine.Spec) { o.Bottle.Resources.CPUs = 2 },
		"memory":       func(o *engine.Spec) { o.Bottle.Resources.MemoryMiB = 1024 },
		"mode":         func(o *engine.Spec) { o.ReadOnly = true },
		"mount":        func(o *engine.Spec) { o.Binds = nil },
		"state folder": func(o *engine.Spec) { o.Warm.Dir = filepath.Join(t.TempDir(), "warm") },
		"helper":       func(o *engine.Spec) { o.GuestHelper = "/bin/sh" },
	} {
		if change(f) == key {
			t.Errorf("with another %s it is the same machine", name)
		}
	}
	if baseFor(t, s, smolvm.Version{1, 32, 2}).Name == key {
		t.Error("with another smolvm it is the same machine")
	}
}

func TestWarmRefusals(t *testing.T) {
	s := newWarmSpec(t)
	vs, err := volumes(s)
	if err != nil {
		t.Fatal(err)
	}
	wantFault(t, checkWarm(&smolvm.Client{Bin: "/x/smolvm", Version: smolvm.SinceFork}, s, vs, 1000), fault.Host, "warm_user", "only root", "1.32.2")
	if err := checkWarm(&smolvm.Client{Bin: "/x/smolvm", Version: smolvm.SinceBranch}, s, vs, 1000); err != nil {
		t.Errorf("as a plain user with branch: %v", err)
	}
	if os.Geteuid() != 0 {
		e, _ := scripted(t, version("1.9.1"))
		wantFault(t, e.Prepare(t.Context(), s), fault.Host, "warm_user")
		return
	}
	old, _ := scripted(t, version("1.9.0"))
	wantFault(t, old.Prepare(t.Context(), s), fault.Host, "warm_version", "1.9.0", "1.9.1", "--warm")
	// Nobody has seen a bottle in a copy of these.
	for _, v := range []string{"1.10.0", "1.32.1"} {
		newer, _ := scripted(t, version(v))
		wantFault(t, newer.Prepare(t.Context(), s), fault.Host, "warm_version", v, "1.9", "1.32.2", "--warm")
	}
	branches, _ := scripted(t, version("1.32.2"))
	if err := branches.Prepare(t.Context(), s); err != nil {
		t.Error(err)
	}
	e, _ := scripted(t, version("1.9.1"))
	if err := e.Prepare(t.Context(), s); err != nil {
		t.Error(err)
	}

	if err := os.MkdirAll(filepath.Join(s.Rootfs, "etc/ssh"), 0o755); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(s.Rootfs, "etc/ssh/ssh_host_ed25519_key")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantFault(t, e.Prepare(t.Context(), s), fault.Host, "warm_image", "ssh_host_ed25519_key")
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}

	c, err := e.client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := baseOf(c, s, vs)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct {
		cold, warm int64
		ok         bool
	}{{100, 0, true}, {100, 99, true}, {100, 100, false}, {100, 300, false}} {
		b.ColdMS, b.WarmMS = m.cold, m.warm
		if err := b.save(); err != nil {
			t.Fatal(err)
		}
		err := e.Prepare(t.Context(), s)
		if m.ok && err != nil {
			t.Errorf("%+v: %v", m, err)
		}
		if !m.ok {
			wantFault(t, err, fault.Host, "warm_slower", fmt.Sprintf("took %d ms here and booting it 100 ms", m.warm))
		}
	}
}

// A machine is prepared that knows no bottle, and the bottle is a copy of it.
func TestWarmStart(t *testing.T) {
	s := newWarmSpec(t)
	vs, err := volumes(s)
	if err != nil {
		t.Fatal(err)
	}
	records := func(b *Base, prepared, copied int) []record {
		create := []string{"machine", "create", "--name", b.Name, "--cpus", "1", "--mem", "512",
			"--label", "owner=bottle", "--label", "bottle-state=" + tagOf(s.Dir), "--image", b.dir + "/smolvm/rootfs/"}
		for i, v := range vs {
			create = append(create, "-v", smolvm.Volume{Host: b.slot(i), Guest: v.Guest, ReadOnly: v.ReadOnly}.String())
		}
		create = append(create, "--mount-socket", b.Slots+"/gate/gate.sock:/run/bottle/gate.sock", "--", "/opt/bottle/guest", "park")
		return []record{
			version("1.9.1"),
			answer(1, "", unknown, "machine", "status", "--name", b.Name, "--json"),
			answer(1, "", unknown, "machine", "data-dir", "--name", b.Name),
			answer(0, created, "", create...),
			answer(0, filepath.Join(filepath.Dir(s.Warm.Dir), "vms", "base")+"\n", "", "machine", "data-dir", "--name", b.Name),
			answer(0, "", starting, "machine", "start", "--name", b.Name),
			answer(0, "Stopped machine: x\n", "", "machine", "stop", "--name", b.Name),
			answer(0, "", starting, "machine", "start", "--name", b.Name, "--forkable"),
			answer(0, "", "", "machine", "exec", "--name", b.Name, "--", "/opt/bottle/guest", "parked"),
			answer(0, statusJSON(b.Name, "running", prepared), "", "machine", "status", "--name", b.Name, "--json"),
			answer(0, "Machine running\n", "Freezing\n", "machine", "fork", "--golden", b.Name, "--name", s.ID),
			answer(0, filepath.Join(filepath.Dir(s.Warm.Dir), "vms", "copy")+"\n", "", "machine", "data-dir", "--name", s.ID),
			answer(0, statusJSON(s.ID, "running", copied), "", "machine", "status", "--name", s.ID, "--json"),
			answer(0, "", "", "machine", "exec", "--name", s.ID, "-i", "--", "/run/bottle-run/guest", "adopt"),
		}
	}
	// The machine's name is of the program's path too, so the answers come after it.
	e, f := scripted(t)
	b := baseAt(t, s, f.Bin, vs)
	prepared, copied := monitorFor(t), monitorFor(t, s.Workspace, s.Binds[0].Source)
	rewrite(t, f.Env, records(b, prepared.Pid, copied.Pid))

	s.Reports = telling(t, guest.Report{Inodes: inodesOf(t, s.Workspace, s.Binds[0].Source)})
	st, err := e.Start(t.Context(), s)
	if os.Geteuid() != 0 {
		wantFault(t, err, fault.Host, "warm_user")
		return
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, f.Calls(t))
	}
	if st.Warm != b.Name || BaseOf(s.Dir, s.ID) != b.Name {
		t.Errorf("%q, %q, want %q", st.Warm, BaseOf(s.Dir, s.ID), b.Name)
	}
	if cfg, err := os.ReadFile(filepath.Join(guestDir(s.Dir), "config.json")); err != nil || !strings.Contains(string(cfg), s.ID) {
		t.Errorf("what the copy is to become: %s, %v", cfg, err)
	}
	for _, call := range strings.Split(f.Calls(t), "\n") {
		if strings.Contains(call, b.Name) && !strings.Contains(call, `"fork"`) &&
			(strings.Contains(call, s.ID) || strings.Contains(call, s.Workspace) || strings.Contains(call, s.RunDir+"/")) {
			t.Errorf("the prepared machine is told of a bottle: %s", call)
		}
	}
	kept, err := Bases(s.Warm.Dir)
	if err != nil || len(kept) != 1 || kept[0].Name != b.Name || !kept[0].Alive() || kept[0].Locked() || kept[0].ColdMS == 0 && kept[0].WarmMS == 0 {
		t.Errorf("%+v, %v", kept, err)
	}
	if _, err := os.Stat(b.slot(0) + "/config.json"); err == nil {
		t.Error("the bottle's own files are at the machine's places, for all to see")
	}
	if link, err := os.Readlink(filepath.Join(b.Slots, "base")); err != nil || link != b.dir {
		t.Errorf("%q, %v", link, err)
	}
}

// baseAt is the base that the engine with this program makes.
func baseAt(t *testing.T, s *engine.Spec, bin string, vs []smolvm.Volume) *Base {
	t.Helper()
	b, err := baseOf(&smolvm.Client{Bin: bin, Version: smolvm.SinceFork}, s, vs)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// rewrite replaces what a scripted smolvm answers.
func rewrite(t *testing.T, env []string, recs []record) {
	t.Helper()
	var out []byte
	for _, r := range recs {
		line, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		out = append(append(out, line...), '\n')
	}
	for _, e := range env {
		if dir, ok := strings.CutPrefix(e, "BOTTLE_TRANSCRIPTS="); ok {
			if err := os.WriteFile(filepath.Join(dir, "t.ndjson"), out, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// gc removes what is not in use, and leaves what is.
func TestRemoveBase(t *testing.T) {
	s := newWarmSpec(t)
	e, f := scripted(t)
	vs, err := volumes(s)
	if err != nil {
		t.Fatal(err)
	}
	b := baseAt(t, s, f.Bin, vs)
	rewrite(t, f.Env, []record{version("1.9.1"),
		answer(0, statusJSON(b.Name, "running", 1), "", "machine", "status", "--name", b.Name, "--json"),
		answer(1, "", unknown, "machine", "data-dir", "--name", b.Name),
		answer(0, "Deleted machine: x\n", "", "machine", "delete", "--name", b.Name, "-f"),
		answer(0, "[]", "", "machine", "ls", "--json"),
	})
	if err := os.MkdirAll(b.rootfs(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := b.makeSlots(2); err != nil {
		t.Fatal(err)
	}
	b.UsedAt = time.Now()
	if b.Monitor, err = state.Identify(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	if err := b.save(); err != nil {
		t.Fatal(err)
	}
	lock, err := b.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !b.Locked() {
		t.Error("it is locked, and does not say so")
	}
	if err := e.RemoveBase(t.Context(), b.dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(b.rootfs()); err != nil || strings.Contains(f.Calls(t), `"delete"`) {
		t.Errorf("it was removed while it was in use: %v", err)
	}
	lock.Close()
	// A bottle has become a copy of it since gc looked.
	copied := filepath.Join(filepath.Dir(s.Warm.Dir), "bottles", "dev-00000009")
	if err := os.MkdirAll(ownDir(copied), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := (machineRecord{Name: "dev-00000009", Base: b.Name}).save(copied); err != nil {
		t.Fatal(err)
	}
	if err := e.RemoveBase(t.Context(), b.dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(b.rootfs()); err != nil || strings.Contains(f.Calls(t), `"delete"`) {
		t.Errorf("it was removed from under its copy: %v", err)
	}
	if err := os.RemoveAll(copied); err != nil {
		t.Fatal(err)
	}
	if err := e.RemoveBase(t.Context(), b.dir); err != nil {
		t.Error(err)
	}
	for _, p := range []string{b.dir, b.Slots} {
		if _, err := os.Lstat(p); err == nil {
			t.Errorf("%s is left", p)
		}
	}
	if !strings.Contains(f.Calls(t), `"delete"`) {
		t.Error("the machine was not deleted")
	}
	if err := e.RemoveBase(t.Context(), b.dir); err != nil {
		t.Errorf("once more: %v", err)
	}
}

// A machine that smolvm does not tell of, or that died, is not made anew while
// bottles are copies of it: what they run from is its.
func TestBaseUnderItsCopies(t *testing.T) {
	for name, tt := range map[string]struct {
		alive       bool
		says, wants string
	}{
		"smolvm fails":            {true, "Error: database is locked\n", "database is locked"},
		"smolvm knows it no more": {true, notFound, "dev-00000009 are copies of it"},
		"it died":                 {false, "", "dev-00000009 are copies of it"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newWarmSpec(t)
			e, f := scripted(t)
			vs, err := volumes(s)
			if err != nil {
				t.Fatal(err)
			}
			b := baseAt(t, s, f.Bin, vs)
			rewrite(t, f.Env, []record{version("1.9.1"), answer(1, "", tt.says, "machine", "fork", "--golden", b.Name, "--name", s.ID)})
			copied := filepath.Join(filepath.Dir(s.Warm.Dir), "bottles", "dev-00000009")
			for _, d := range []string{b.rootfs(), ownDir(copied)} {
				if err := os.MkdirAll(d, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			if b.Monitor, err = state.Identify(os.Getpid()); err != nil {
				t.Fatal(err)
			}
			if !tt.alive {
				b.Monitor.StartTime++
			}
			if err := errors.Join(b.save(), (machineRecord{Name: "dev-00000009", Base: b.Name}).save(copied)); err != nil {
				t.Fatal(err)
			}
			c, err := e.client(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = e.warmUp(t.Context(), c, s)
			if err == nil || !strings.Contains(err.Error(), tt.wants) {
				t.Errorf("%v", err)
			}
			if _, err := os.Stat(b.rootfs()); err != nil {
				t.Errorf("the image of the copy: %v", err)
			}
		})
	}
}

// smolvm would boot a copy with the places of its base, outside of the namespace
// in which they are the bottle's own.
func TestCopyIsNotStartedAgain(t *testing.T) {
	s := newSpec(t)
	if err := os.MkdirAll(ownDir(s.Dir), 0o700); err != nil {
		t.Fatal(err)
	}
	vs, err := volumes(s)
	if err != nil {
		t.Fatal(err)
	}
	rec := machineRecord{Name: s.ID, DataDir: vmDir(s), Shown: shownBy(vs, s.GateSocket)}
	for base, refused := range map[string]bool{"": false, basePrefix + "0123456789ab": true} {
		rec.Base = base
		if err := rec.save(s.Dir); err != nil {
			t.Fatal(err)
		}
		e, _ := scripted(t, version("1.9.1"), answer(0, statusJSON(s.ID, "stopped", 0), "", "machine", "status", "--name", s.ID, "--json"))
		c, err := e.client(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = restartable(t.Context(), c, s, vs)
		if !refused && err != nil {
			t.Error(err)
		}
		if refused {
			wantFault(t, err, fault.Host, "warm_again", "cannot be started again")
		}
	}
}
