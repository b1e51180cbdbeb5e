package state

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

func testRoot(t *testing.T) *Root {
	t.Helper()
	return &Root{Dir: filepath.Join(t.TempDir(), "bottle"), RunDir: filepath.Join(t.TempDir(), "run")}
}

func self(t *testing.T) plan.Process {
	t.Helper()
	p, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCreateFindRemove(t *testing.T) {
	r := testRoot(t)
	if all, err := r.List(); err != nil || len(all) != 0 {
		t.Fatalf("an empty registry: %v, %v", all, err)
	}
	b, rec, err := r.Create("claude", Record{Creator: self(t)})
	if err != nil {
		t.Fatal(err)
	}
	if name, ok := plan.SplitVMID(b.ID); !ok || name != "claude" {
		t.Errorf("id %q", b.ID)
	}
	for _, dir := range []string{b.Dir, rec.RunDir, r.Dir, r.RunDir} {
		if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", dir, fi, err)
		}
	}
	if !rec.Live() {
		t.Error("a bottle whose creator lives is not live")
	}
	for _, id := range []string{"claude", b.ID} {
		if found, err := r.Find(id); err != nil || found.ID != b.ID {
			t.Errorf("Find(%q): %v, %v", id, found, err)
		}
	}
	other, _, err := r.Create("claude", Record{Creator: self(t)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Find("claude"); fault.As(err).Code != "ambiguous_id" || !strings.Contains(fault.As(err).Hint, other.ID) {
		t.Errorf("two of a name: %v", err)
	}
	// A symlink in the folder is removed, not followed.
	outside := t.TempDir()
	os.WriteFile(filepath.Join(outside, "keep"), []byte("x"), 0o600)
	os.Symlink(outside, b.Path("link"))
	if err := b.Remove(rec); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(outside, "keep")); err != nil {
		t.Error("removal followed a symlink")
	}
	if _, err := os.Stat(rec.RunDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("runtime folder: %v", err)
	}
	if _, err := b.Load(); !errors.Is(err, ErrNotFound) {
		t.Errorf("Load after Remove: %v", err)
	}
	if err := b.Remove(rec); err != nil {
		t.Errorf("a second Remove: %v", err)
	}
}

func TestRunDirOutsideIsLeft(t *testing.T) {
	r := testRoot(t)
	b, rec, err := r.Create("a", Record{Creator: self(t)})
	if err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	rec.RunDir = outside
	if err := b.Remove(rec); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Error("Remove took a folder outside of the runtime folder")
	}
}

func TestRefusesFoldersOfOthers(t *testing.T) {
	r := testRoot(t)
	if err := os.MkdirAll(r.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	os.Chmod(r.Dir, 0o777)
	_, _, err := r.Create("a", Record{Creator: self(t)})
	if e := fault.As(err); e == nil || e.Exit != fault.NoPerm || e.Code != "bad_state_dir" {
		t.Errorf("a folder that others can write: %v", err)
	}
	if _, err := r.List(); fault.As(err) == nil {
		t.Error("List trusts a folder that others can write")
	}
}

func TestUnwritable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root writes everywhere: this case needs a plain user, and runs under one in the integration suite")
	}
	dir := t.TempDir()
	os.Chmod(dir, 0o500)
	r := &Root{Dir: filepath.Join(dir, "bottle"), RunDir: filepath.Join(t.TempDir(), "run")}
	if _, _, err := r.Create("a", Record{}); fault.As(err).Exit != fault.CantCreate {
		t.Errorf("got %v", err)
	}
}

func TestOtherUsersRecord(t *testing.T) {
	r := testRoot(t)
	b, rec, err := r.Create("a", Record{Creator: self(t)})
	if err != nil {
		t.Fatal(err)
	}
	rec.UID++
	if err := b.Save(rec); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Load(); fault.As(err).Code != "not_yours" {
		t.Errorf("got %v", err)
	}
}

func TestNoRecord(t *testing.T) {
	r := testRoot(t)
	b, _, err := r.Create("a", Record{Creator: self(t)})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "{", `{"id":"b-00000000"}`} {
		os.WriteFile(b.Path("record.json"), []byte(text), 0o600)
		if _, err := b.Load(); !errors.Is(err, ErrNoRecord) {
			t.Errorf("record %q: %v", text, err)
		}
	}
	os.Remove(b.Path("record.json"))
	if _, err := b.Load(); !errors.Is(err, ErrNoRecord) {
		t.Errorf("got %v", err)
	}
}

func TestLock(t *testing.T) {
	r := testRoot(t)
	b, _, err := r.Create("a", Record{Creator: self(t)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := b.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Lock(); fault.As(err).Exit != fault.TempFail {
		t.Errorf("a second lock: %v", err)
	}
	l.Close()
	if l, err = b.Lock(); err != nil {
		t.Errorf("after release: %v", err)
	}
	l.Close()
}

func TestIdentity(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id, err := Identify(cmd.Process.Pid)
	if err != nil || !Alive(id) {
		t.Fatalf("%v, %v", id, err)
	}
	for name, wrong := range map[string]plan.Process{
		"another start time": {PID: id.PID, StartTime: id.StartTime + 1, BootID: id.BootID},
		"another boot":       {PID: id.PID, StartTime: id.StartTime, BootID: "x"},
		"nobody":             {},
	} {
		if Alive(wrong) {
			t.Errorf("%s counts as alive", name)
		}
		if err := Kill(wrong, 0); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !Alive(id) {
		t.Fatal("a wrong identity killed the process")
	}
	done := make(chan error, 1)
	go func() { done <- Kill(id, time.Second) }()
	cmd.Wait()
	if err := <-done; err != nil || Alive(id) {
		t.Errorf("Kill: %v, alive %v", err, Alive(id))
	}
	if err := Kill(id, time.Second); err != nil {
		t.Errorf("a second Kill: %v", err)
	}
}

func TestZombieIsDead(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id, _ := Identify(cmd.Process.Pid)
	cmd.Process.Kill()
	if !Await(id, 5*time.Second) {
		t.Error("the zombie of a killed process counts as alive")
	}
	cmd.Wait()
}

func TestOpen(t *testing.T) {
	env := func(kv ...string) func(string) string {
		return func(k string) string {
			for i := 0; i < len(kv); i += 2 {
				if kv[i] == k {
					return kv[i+1]
				}
			}
			return ""
		}
	}
	if _, err := Open(env()); fault.As(err).Code != "no_home" {
		t.Errorf("nothing set: %v", err)
	}
	if _, err := Open(env("XDG_STATE_HOME", "relative")); fault.As(err).Exit != fault.Usage {
		t.Errorf("relative: %v", err)
	}
	r, err := Open(env("HOME", "/h"))
	if err != nil || r.Dir != "/h/.local/state/bottle" || !strings.HasPrefix(r.RunDir, "/tmp/bottle-") {
		t.Errorf("%+v, %v", r, err)
	}
	run := t.TempDir()
	os.Chmod(run, 0o700)
	if len(run) < 60 {
		if r, _ = Open(env("HOME", "/h", "XDG_RUNTIME_DIR", run)); r.RunDir != filepath.Join(run, "bottle") {
			t.Errorf("runtime folder %s", r.RunDir)
		}
	}
	os.Chmod(run, 0o777)
	if r, _ = Open(env("HOME", "/h", "XDG_RUNTIME_DIR", run)); r.RunDir == filepath.Join(run, "bottle") {
		t.Error("a runtime folder that others can write is used")
	}
}

func TestTidyAudit(t *testing.T) {
	r := testRoot(t)
	if err := r.MakeAudit(); err != nil {
		t.Fatal(err)
	}
	const quiet = `{"event":"start"}` + "\n" + `{"event":"stop"}` + "\n"
	os.WriteFile(r.Audit("a-00000000"), []byte(quiet), 0o600)
	os.WriteFile(r.Audit("b-00000000"), []byte(quiet+`{"event":"connect","verdict":"deny"}`+"\n"), 0o600)
	os.WriteFile(r.Audit("d-00000000"), []byte(quiet), 0o600)
	os.WriteFile(r.Audit("d-00000000")+".000001", []byte(`{"event":"connect","verdict":"deny"}`+"\n"), 0o600)
	os.WriteFile(r.Audit("e-00000000"), []byte(quiet+`{"ti`), 0o600)
	for _, id := range []string{"a-00000000", "b-00000000", "c-00000000", "d-00000000", "e-00000000"} {
		if err := r.TidyAudit(id); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(r.Audit("a-00000000")); err == nil {
		t.Error("a log without a decision was kept")
	}
	for _, id := range []string{"b-00000000", "d-00000000", "e-00000000"} {
		if _, err := os.Stat(r.Audit(id)); err != nil {
			t.Errorf("%s: a log with more in it was removed", id)
		}
	}
}
