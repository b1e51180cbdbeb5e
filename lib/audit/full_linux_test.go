package audit

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
)

// A file system without room for the log, for real.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("SKIPPED: no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	path := filepath.Join(dir, "audit.jsonl")
	l := open(t, path, Options{MaxBytes: MinMaxBytes, Keep: 100}) // full in the middle of a rotation, too
	var n int
	var err error
	for ; n < 10_000; n++ {
		if err = l.Write(allowed(strings.Repeat("h", n%250))); err != nil {
			break
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(n, err)
	}
	if retry, err := l.Recover(); !retry || err == nil {
		t.Fatalf("%v %v", retry, err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	if retry, err := l.Recover(); retry || err != nil {
		t.Fatalf("%v %v", retry, err)
	}
	if err := l.Write(allowed("after.example")); err != nil {
		t.Fatal(err)
	}
	l.Close()
	es, _ := logged(t, path)
	got := 0
	for _, e := range es {
		if e.Verdict == Allow {
			got++
		}
	}
	if got != n+1 {
		t.Errorf("%d decisions were allowed, %d are in the log", n+1, got)
	}
	// Full before a gate begins: there is none.
	fill := filepath.Join(dir, "fill")
	f := must(os.Create(fill))
	io.Copy(f, zeroes{})
	f.Close()
	l, err = Open(filepath.Join(dir, "other.jsonl"), Options{})
	if err == nil {
		err = l.Start()
		l.Close()
	}
	if f := fault.As(err); err == nil || f.Exit != fault.IO && f.Exit != fault.CantCreate {
		t.Errorf("%v", err)
	}
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { clear(p); return len(p), nil }
