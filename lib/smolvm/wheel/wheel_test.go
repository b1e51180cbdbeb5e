package wheel

import (
	"archive/zip"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
)

func wantFault(t *testing.T, err error, exit int, code string) {
	t.Helper()
	if f := fault.As(err); f == nil || f.Exit != exit || f.Code != code || f.Hint == "" {
		t.Errorf("%v, wanted %d %s with a hint", err, exit, code)
	}
}

func TestRefuses(t *testing.T) {
	if len(Versions()) == 0 {
		_, err := Install(t.Context(), t.TempDir(), Newest)
		wantFault(t, err, fault.Host, "smolvm_platform")
		t.Skipf("SKIPPED: no smolvm for %s/%s is pinned", runtime.GOOS, runtime.GOARCH)
	}
	dir := t.TempDir()
	_, err := Install(t.Context(), dir, "1.2")
	wantFault(t, err, fault.Usage, "usage")

	t.Setenv("PATH", dir) // no python3
	_, err = Install(t.Context(), dir, Newest)
	wantFault(t, err, fault.Unavailable, "smolvm_fetch")

	// A pip that brings another file than the pinned one.
	pip := "#!/bin/sh\nfor a; do [ \"$last\" = --dest ] && echo other >\"$a/smolmachines.whl\"; last=$a; done\n"
	if err := os.WriteFile(filepath.Join(dir, "python3"), []byte(pip), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err = Install(t.Context(), dir, Newest)
	wantFault(t, err, fault.Data, "smolvm_digest")

	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 { // the lock and python3
		t.Errorf("%v %v is left", left, err)
	}
}

// A platform that has no wheel: every other version and platform is refused alike.
func TestPlatform(t *testing.T) {
	saved := pins
	defer func() { pins = saved }()
	pins = nil
	_, err := Install(t.Context(), t.TempDir(), Newest)
	wantFault(t, err, fault.Host, "smolvm_platform")
}

func TestUnzipStaysInside(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "w.whl")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	z := zip.NewWriter(f)
	for _, name := range []string{"smol/../../out", "smol/smol-vmm"} {
		if _, err := z.Create(name); err != nil {
			t.Fatal(err)
		}
	}
	z.Close()
	f.Close()
	if err := unzip(file, filepath.Join(dir, "a")); err == nil {
		t.Error("a name that leads out was unpacked")
	}
	if _, err := os.Lstat(filepath.Join(dir, "out")); err == nil {
		t.Error("it is outside")
	}
}
