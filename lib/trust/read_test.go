package trust

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

func TestBase(t *testing.T) {
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(top, "p")
	write(t, filepath.Join(dir, "bottle.json"), "m")
	write(t, filepath.Join(top, "bottle.json"), "another")
	link(t, "p", filepath.Join(top, "linked"))
	for _, name := range []string{"fifo", "folder", "linked-fifo"} {
		if err := os.MkdirAll(filepath.Join(top, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(top, "folder/bottle.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(top, "fifo/bottle.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	link(t, "../fifo/bottle.json", filepath.Join(top, "linked-fifo/bottle.json"))
	write(t, filepath.Join(top, "big/bottle.json"), "")
	if err := os.Truncate(filepath.Join(top, "big/bottle.json"), 1<<40); err != nil {
		t.Fatal(err)
	}

	planned := plan.ManifestRef{Name: "bottle.json", SHA256: plan.SHA256([]byte("m"))}
	for _, d := range []string{dir, filepath.Join(top, "linked"), dir + "/../p/"} {
		if got, err := Base(d, planned); err != nil || got != dir {
			t.Errorf("%s: %q, %v", d, got, err)
		}
	}
	t.Chdir(dir)
	if got, err := Base("", planned); err != nil || got != dir {
		t.Errorf("the working folder: %q, %v", got, err)
	}
	stdin := plan.ManifestRef{Name: "-", SHA256: planned.SHA256}
	if got, err := Base(top, stdin); err != nil || got != top {
		t.Errorf("a manifest from stdin: %q, %v", got, err)
	}
	for _, tc := range []struct {
		name, dir string
		ref       plan.ManifestRef
		exit      int
		code, say string
	}{
		{"stdin and no folder", "", stdin, fault.Usage, "usage", "folder is not known"},
		{"no folder", filepath.Join(top, "none"), planned, fault.NoInput, "no_manifest_dir", "--dir"},
		{"no manifest", top + "/..", planned, fault.NoInput, "no_manifest", "no such file"},
		{"another manifest", top, planned, fault.Data, "manifest_changed", "is not the manifest that was planned"},
		{"a folder of that name", filepath.Join(top, "folder"), planned, fault.NoInput, "no_manifest", "not a regular file"},
		{"a fifo", filepath.Join(top, "fifo"), planned, fault.NoInput, "no_manifest", "not a regular file"},
		{"a link to a fifo", filepath.Join(top, "linked-fifo"), planned, fault.NoInput, "no_manifest", "not a regular file"},
		{"no end", filepath.Join(top, "big"), planned, fault.NoInput, "no_manifest", "larger than 32 MiB"},
	} {
		_, err := Base(tc.dir, tc.ref)
		if f := fault.As(err); err == nil || f.Exit != tc.exit || f.Code != tc.code || !strings.Contains(f.Error(), tc.say) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}
