package cli

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// A manifest is a file: a FIFO in its place would hold the tools up for ever.
func TestReadRegular(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{filepath.Join(dir, "fifo"): "", filepath.Join(dir, "file"): "x", "/dev/zero": "", dir: ""} {
		raw, err := readRegular(path)
		if string(raw) != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", path, raw, err)
		}
	}
}
