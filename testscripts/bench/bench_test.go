//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/manifest"
)

func TestSummary(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want stat
	}{
		{[]float64{3, 1, 2}, stat{2, 1, 3, 3}},
		{[]float64{4, 1, 3, 2}, stat{2.5, 1, 4, 4}},
		{[]float64{7}, stat{7, 7, 7, 1}},
	} {
		if got := summary(c.in); *got != c.want {
			t.Errorf("%v: %+v, want %+v", c.in, *got, c.want)
		}
	}
	if summary(nil) != nil {
		t.Error("a summary of nothing")
	}
}

func TestVerdicts(t *testing.T) {
	ten, thirty := []float64{10}, []float64{30}
	for _, c := range []struct {
		name         string
		ours, beside []float64
		limit        *limit
		want         string
	}{
		{"at the limit", ten, nil, medianAtMost("", 10), met},
		{"over it", thirty, nil, medianAtMost("", 29), missed},
		{"at least", thirty, nil, medianAtLeast("", 30), met},
		{"less", ten, nil, medianAtLeast("", 11), missed},
		{"adds", thirty, ten, addsAtMost("", 20), met},
		{"adds too much", thirty, ten, addsAtMost("", 19), missed},
		{"ratio", ten, thirty, ratioAtMost("", 0.5), met},
		{"ratio over", thirty, ten, ratioAtMost("", 2), missed},
		{"ratio at least", thirty, ten, ratioAtLeast("", 3), met},
		{"ratio under", thirty, ten, ratioAtLeast("", 3.1), missed},
		{"nothing measured", nil, ten, ratioAtMost("", 2), failed},
		{"no target", ten, nil, nil, info},
	} {
		if got := newRow(c.name, "ms", c.ours, "", c.beside, c.limit).Verdict; got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestTable(t *testing.T) {
	got := table([]row{
		newRow("a", "ms", []float64{30}, "raw", []float64{10}, ratioAtMost("<= 2", 2)),
		{Name: "b", Verdict: skipped, Why: "no peer"},
	})
	lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
	if len(lines) != 3 || !strings.Contains(lines[1], "MISSED: 3.00, wanted at most 2.00") || !strings.HasSuffix(lines[2], "SKIPPED: no peer") {
		t.Errorf("table:\n%s", got)
	}
}

func TestPairsTakeTurns(t *testing.T) {
	var order strings.Builder
	step := func(s string) func() error { return func() error { order.WriteString(s); return nil } }
	o, b, err := pairs(2, step("A"), step("B"), step("a"), step("b"))
	if err != nil || len(o) != 2 || len(b) != 2 || order.String() != "AaBbAaBbAaBb" {
		t.Errorf("%v %v %v, order %s", o, b, err, &order)
	}
	tidied := false
	boom := errors.New("boom")
	if _, _, err := pairs(2, func() error { return boom }, step(""), func() error { tidied = true; return nil }, nil); !errors.Is(err, boom) || !tidied {
		t.Errorf("error %v, tidied %v", err, tidied)
	}
}

func TestPipeline(t *testing.T) {
	w := &world{ctx: context.Background()}
	var out strings.Builder
	last := exec.Command("tr", "a-z", "A-Z")
	last.Stdout = &out
	if err := w.pipeline(exec.Command("echo", "hi"), exec.Command("cat"), last); err != nil || out.String() != "HI\n" {
		t.Errorf("%q, %v", &out, err)
	}
	err := w.pipeline(exec.Command("sh", "-c", "echo no >&2; exit 3"), exec.Command("cat"))
	if err == nil || !strings.Contains(err.Error(), "exit status 3: no") {
		t.Errorf("a failing stage: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := (&world{ctx: ctx}).pipeline(exec.Command("true")); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}

func TestRewrite(t *testing.T) {
	dir := t.TempDir()
	in := filepath.Join(dir, "config.json")
	if err := os.WriteFile(in, []byte(`{"process":{"args":["init"],"cwd":"/"},"root":{"path":"/mnt/rootfs"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := rewrite(in, filepath.Join(dir, "raw")); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "raw", "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"process":{"args":["/bin/sleep","100000"],"cwd":"/"},"root":{"path":"/mnt/rootfs"}}`; string(b) != want {
		t.Errorf("%s", b)
	}
}

func TestMemoryOfOneself(t *testing.T) {
	all, err := parents()
	if err != nil || all[os.Getpid()] != os.Getppid() {
		t.Errorf("parent %d, %v", all[os.Getpid()], err)
	}
	if mb, err := pss(os.Getpid()); err != nil || mb < 0.5 || mb > 1000 {
		t.Errorf("%v MB, %v", mb, err)
	}
}

// The long manifest has no entry twice, and is one that bottle-plan takes.
func TestLongManifest(t *testing.T) {
	const n = 1000
	raw := longManifest(n)
	if !json.Valid(raw) {
		t.Fatal("no JSON")
	}
	if _, err := manifest.Load(raw, "bottle.json", os.ReadFile); err != nil {
		t.Fatal(err)
	}
}

func TestOptions(t *testing.T) {
	for _, args := range [][]string{{"x"}, {"-rounds", "0"}, {"-only", "("}} {
		var said strings.Builder
		if code, err := run(context.Background(), args, &said, &said); code != 64 || err == nil {
			t.Errorf("%q: %d, %v", args, code, err)
		}
	}
	var said strings.Builder
	if code, err := run(context.Background(), []string{"-repo", t.TempDir()}, &said, &said); code != 1 || err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("without tools: %d, %v", code, err)
	}
}

func TestNoSuchSection(t *testing.T) {
	var said strings.Builder
	if code, err := run(t.Context(), []string{"-only", "no-such"}, &said, &said); code != 64 || err == nil || !strings.Contains(err.Error(), "stages, start") {
		t.Errorf("status %d, %v\n%s", code, err, said.String())
	}
}
