package worktree

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestCopyAndDiff(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("git is not installed: the patch cannot be made")
	}
	src, dst, outside := t.TempDir(), filepath.Join(t.TempDir(), "copy"), t.TempDir()
	write(t, filepath.Join(outside, "secret"), "do not copy me\n")
	write(t, filepath.Join(src, "a.txt"), "one\n")
	write(t, filepath.Join(src, "dir", "run.sh"), "#!/bin/sh\n")
	write(t, filepath.Join(src, ".env"), "KEY=1\n")
	os.Chmod(filepath.Join(src, "dir", "run.sh"), 0o755)
	os.Symlink(filepath.Join(outside, "secret"), filepath.Join(src, "link"))
	syscall.Mkfifo(filepath.Join(src, "pipe"), 0o600)
	os.Mkdir(filepath.Join(src, "closed"), 0o755)
	write(t, filepath.Join(src, "closed", "f"), "x")
	os.Chmod(filepath.Join(src, "closed"), 0o555)
	t.Cleanup(func() { os.Chmod(filepath.Join(src, "closed"), 0o755); os.Chmod(filepath.Join(dst, "closed"), 0o755) })

	skip := func(rel string) bool { return rel == ".env" }
	if err := Copy(context.Background(), src, dst, skip); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(filepath.Join(dst, "link")); err != nil || target != filepath.Join(outside, "secret") {
		t.Errorf("link: %q, %v", target, err)
	}
	for _, gone := range []string{".env", "pipe"} {
		if _, err := os.Lstat(filepath.Join(dst, gone)); err == nil {
			t.Errorf("%s was copied", gone)
		}
	}
	if fi, err := os.Stat(filepath.Join(dst, "dir", "run.sh")); err != nil || fi.Mode().Perm() != 0o755 {
		t.Errorf("mode: %v, %v", fi, err)
	}
	os.Remove(filepath.Join(src, "pipe"))
	os.Remove(filepath.Join(src, ".env"))
	var none strings.Builder
	if changed, err := Diff(context.Background(), src, dst, &none); err != nil || changed || none.Len() > 0 {
		t.Errorf("a fresh copy differs: %v, %v, %s", changed, err, none.String())
	}

	write(t, filepath.Join(dst, "a.txt"), "two\n")
	write(t, filepath.Join(dst, "new.txt"), "hello\n")
	// What the guest plants must not be run on the host.
	write(t, filepath.Join(dst, ".gitattributes"), "*.txt diff=evil\n")
	write(t, filepath.Join(dst, ".git", "config"), "[diff \"evil\"]\n\ttextconv = touch "+filepath.Join(outside, "pwned")+"\n\tcommand = touch "+filepath.Join(outside, "pwned")+"\n")
	var patch strings.Builder
	if changed, err := Diff(context.Background(), src, dst, &patch); err != nil || !changed {
		t.Fatalf("changed %v, %v", changed, err)
	}
	for _, want := range []string{"-one", "+two", "b/new.txt", "+hello"} {
		if !strings.Contains(patch.String(), want) {
			t.Errorf("patch lacks %q:\n%s", want, patch.String())
		}
	}
	if _, err := os.Stat(filepath.Join(outside, "pwned")); err == nil {
		t.Error("the diff ran what the guest planted")
	}
	apply := exec.Command("git", "apply", "--check", "-")
	apply.Dir = src
	apply.Stdin = strings.NewReader(patch.String())
	if out, err := apply.CombinedOutput(); err != nil {
		t.Errorf("git apply: %v %s", err, out)
	}
}

// A patch that is written into the workspace says nothing about itself.
func TestDiffLeavesItsOwnFileOut(t *testing.T) {
	before, after := t.TempDir(), t.TempDir()
	for dir, text := range map[string]string{before: "one\n", after: "two\n"} {
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(filepath.Join(before, "change.patch"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	changed, err := Diff(t.Context(), before, after, f)
	if err != nil || !changed {
		t.Fatalf("%v, %v", changed, err)
	}
	patch, err := os.ReadFile(f.Name())
	if err != nil || !strings.Contains(string(patch), "+two") || strings.Contains(string(patch), "change.patch") {
		t.Errorf("%v:\n%s", err, patch)
	}
}
