//go:build linux

package smolvm

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/smolvm"
)

// What is known of a program's version holds for that program alone, as it was.
func TestKnownVersion(t *testing.T) {
	dir := t.TempDir()
	bin := filepath.Join(dir, "smolvm")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	e := NewFrom(lookup([]string{"XDG_STATE_HOME=" + filepath.Join(dir, "state"), "HOME=" + dir}))
	newer := smolvm.Version{1, 99, 0} // as nothing here answers
	knows := func() bool {
		t.Helper()
		c, err := e.open(t.Context(), bin)
		return err == nil && c.Version == newer
	}
	note := func() { e.asked = known{identity(bin), newer}; e.note() } // as if it had said so
	// A copy of true(1): a program, and it answers nothing.
	install := func() {
		t.Helper()
		if err := copyFile("/bin/true", bin, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	install()
	if _, err := os.Stat(filepath.Join(dir, "state")); knows() || err == nil {
		t.Error("known before it was noted, or asking leaves something")
	}
	note()
	if !knows() {
		t.Error("not known")
	}
	if err := os.Chtimes(bin, time.Time{}, time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if knows() {
		t.Error("known after a change")
	}
	note()
	if err := os.Remove(bin); err != nil {
		t.Fatal(err)
	}
	install()
	if knows() {
		t.Error("another file counts as the same")
	}
	note()
	if err := os.WriteFile(filepath.Join(dir, "state", "bottle", knownFile), []byte(`{"program":"`), 0o600); err != nil {
		t.Fatal(err)
	}
	if knows() {
		t.Error("a torn file counts")
	}
	// What may start another program, whose version changes without it.
	other := filepath.Join(dir, "bin", "smolvm")
	for name, make := range map[string]func() error{
		"script":              func() error { return os.WriteFile(other, []byte("#!/bin/sh\n"), 0o755) },
		"manager of programs": func() error { return os.Symlink(self, other) },
		"folder":              func() error { return os.Mkdir(other, 0o755) },
		"nothing":             func() error { return nil },
	} {
		if err := errors.Join(os.RemoveAll(filepath.Dir(other)), os.Mkdir(filepath.Dir(other), 0o755), make()); err != nil {
			t.Fatal(err)
		}
		if id := identity(other); id != "" {
			t.Errorf("%s: %q", name, id)
		}
	}
}
