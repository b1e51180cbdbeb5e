package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
)

// world is a state folder of its own, on a host without smolvm.
type world struct {
	t   *testing.T
	top string
}

func newWorld(t *testing.T) world {
	top := t.TempDir()
	if err := os.Chmod(top, 0o700); err != nil {
		t.Fatal(err)
	}
	return world{t, top}
}

func (w world) getenv(name string) string {
	switch name {
	case "HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR":
		return w.top
	}
	return ""
}

func (w world) run(args ...string) (stdout, stderr string, status int) {
	w.t.Helper()
	var out, errs bytes.Buffer
	status = Run(context.Background(), &tool.Proc{Name: "bottle-gc", Args: args, Stdin: strings.NewReader(""),
		Stdout: &out, Stderr: &errs, Getenv: w.getenv, Now: time.Now})
	return out.String(), errs.String(), status
}

func (w world) root() *state.Root {
	w.t.Helper()
	root, err := state.Open(w.getenv)
	if err != nil {
		w.t.Fatal(err)
	}
	return root
}

// orphan is a bottle of before the last boot.
func (w world) orphan() *state.Bottle {
	w.t.Helper()
	old := plan.Process{PID: 1, StartTime: 1, BootID: "before"}
	b, rec, err := w.root().Create("dev", state.Record{CreatedAt: time.Now(), Creator: old, Keeper: &old})
	if err != nil {
		w.t.Fatal(err)
	}
	rec.Phase = state.Ready
	if err := b.Save(rec); err != nil {
		w.t.Fatal(err)
	}
	return b
}

func TestNothing(t *testing.T) {
	w := newWorld(t)
	for _, args := range [][]string{{}, {"--check"}, {"--apply"}, {"--apply", "-v"}} {
		if out, errs, status := w.run(args...); out+errs != "" || status != 0 {
			t.Errorf("%v: %q %q %d", args, out, errs, status)
		}
	}
	if left, _ := os.ReadDir(w.top); len(left) != 0 {
		t.Errorf("looking made %v", left)
	}
}

func TestListCheckApply(t *testing.T) {
	w := newWorld(t)
	b := w.orphan()
	list, errs, status := w.run()
	if errs != "" || status != 0 {
		t.Fatalf("%q %d", errs, status)
	}
	lines := strings.Split(strings.TrimSuffix(list, "\n"), "\n")
	if len(lines) != 2 {
		t.Fatalf("%q", list)
	}
	for i, kind := range []string{"socket", "folder"} {
		var o struct {
			Format   string   `json:"format_version"`
			Kind     string   `json:"kind"`
			ID       string   `json:"id"`
			Path     string   `json:"path"`
			Evidence []string `json:"evidence"`
			Action   string   `json:"action"`
		}
		if err := json.Unmarshal([]byte(lines[i]), &o); err != nil || o.Format != "1.0" || o.Kind != kind || o.ID != b.ID || o.Path == "" ||
			o.Action != "remove" || !strings.Contains(o.Evidence[0], "from before the last boot") {
			t.Errorf("%s (%v)", lines[i], err)
		}
	}
	if out, _, status := w.run("--check"); out != list || status != fault.No {
		t.Errorf("--check: %q %d", out, status)
	}
	if out, errs, status := w.run("--apply", "-v"); out != list || errs != "" || status != 0 {
		t.Errorf("--apply -v: %q %q %d", out, errs, status)
	}
	if out, errs, status := w.run("--check"); out+errs != "" || status != 0 {
		t.Errorf("a second time: %q %q %d", out, errs, status)
	}
	w.orphan()
	if out, errs, status := w.run("--apply"); out+errs != "" || status != 0 {
		t.Errorf("--apply is not quiet: %q %q %d", out, errs, status)
	}
}

func TestMinAge(t *testing.T) {
	w := newWorld(t)
	b := w.orphan()
	if err := os.Remove(b.Path("record.json")); err != nil {
		t.Fatal(err)
	}
	if out, _, status := w.run("--check"); out != "" || status != 0 {
		t.Errorf("a bottle being born: %q %d", out, status)
	}
	if out, _, status := w.run("--check", "--min-age", "0s"); out == "" || status != fault.No {
		t.Errorf("%q %d", out, status)
	}
}

func TestGoesOnPastErrors(t *testing.T) {
	w := newWorld(t)
	bad, good := w.orphan(), w.orphan()
	raw, err := os.ReadFile(bad.Path("record.json"))
	if err != nil {
		t.Fatal(err)
	}
	raw = bytes.Replace(raw, []byte(`"format_version":"1.0"`), []byte(`"format_version":"9.0"`), 1)
	if err := os.WriteFile(bad.Path("record.json"), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, status := w.run("--apply")
	if out != "" || status != fault.Data || !strings.Contains(errs, bad.ID) || strings.Count(errs, "\n") != 1 {
		t.Errorf("%q %q %d", out, errs, status)
	}
	if _, err := os.Lstat(good.Dir); err == nil {
		t.Error("one that it cannot judge kept it from another")
	}
	if _, err := os.Lstat(bad.Dir); err != nil {
		t.Error("what it cannot judge was removed")
	}
}

func TestUsage(t *testing.T) {
	w := newWorld(t)
	for _, args := range [][]string{
		{"dev"}, {"dev", "--apply"}, {"--apply", "--check"}, {"-v"}, {"--min-age", "-1m"}, {"--min-age", "soon"}, {"--apply", "--apply"}, {"--nope"},
	} {
		if out, errs, status := w.run(args...); out != "" || status != fault.Usage || !strings.HasPrefix(errs, "bottle-gc: error: ") {
			t.Errorf("%v: %q %q %d", args, out, errs, status)
		}
	}
	if err := os.Mkdir(filepath.Join(w.top, "bottle"), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(w.top, "bottle"), 0o777); err != nil {
		t.Fatal(err)
	}
	if _, errs, status := w.run(); status != fault.NoPerm || !strings.Contains(errs, "can be written by others") {
		t.Errorf("%q %d", errs, status)
	}
}

func TestBrokenSmolvm(t *testing.T) {
	w := newWorld(t)
	getenv := func(name string) string {
		if name == "BOTTLE_SMOLVM" {
			return "/nonexistent/smolvm"
		}
		return w.getenv(name)
	}
	b := w.orphan()
	var out, errs bytes.Buffer
	status := Run(context.Background(), &tool.Proc{Name: "bottle-gc", Args: []string{"--apply"}, Stdin: strings.NewReader(""),
		Stdout: &out, Stderr: &errs, Getenv: getenv, Now: time.Now})
	if status != fault.Unavailable || !strings.Contains(errs.String(), "BOTTLE_SMOLVM") {
		t.Errorf("%q %d", errs.String(), status)
	}
	if _, err := os.Lstat(b.Dir); err == nil {
		t.Error("a smolvm that is not there kept it from the rest")
	}
}
