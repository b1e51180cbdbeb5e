package smolvm

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
)

// Whether a start has to unpack is told by the files, as 1.32.2 leaves them; the
// real program is asked in the suite of the rig.
func TestUnpacks(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("SKIPPED: where the cache folder lies differs here")
	}
	home, pkg, elsewhere := t.TempDir(), t.TempDir(), t.TempDir()
	touch := func(path string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	touch(filepath.Join(pkg, "smolvm"))
	link := filepath.Join(t.TempDir(), "smolvm")
	if err := os.Symlink(filepath.Join(pkg, "smolvm"), link); err != nil {
		t.Fatal(err)
	}
	c := &Client{Bin: link, Env: []string{"HOME=" + home}}
	want := func(unpacks bool) {
		t.Helper()
		if c.Unpacks() != unpacks {
			t.Errorf("unpacks: %v", !unpacks)
		}
		if limit := BootTimeout; unpacks {
			limit += UnpackTimeout
			if c.startTimeout() != limit {
				t.Errorf("limit %v", c.startTimeout())
			}
		}
	}
	want(false) // 1.9.1 has no such files
	touch(filepath.Join(pkg, "storage-template.ext4.zst"))
	touch(filepath.Join(pkg, "overlay-template.ext4.zst"))
	want(true)
	touch(filepath.Join(pkg, "storage-template.partial"))
	want(true)
	touch(filepath.Join(pkg, "storage-template.ext4"))
	want(true)
	touch(filepath.Join(pkg, "overlay-template.ext4"))
	want(false)
	os.Remove(filepath.Join(pkg, "overlay-template.ext4"))
	touch(filepath.Join(home, ".cache/smolvm/overlay-template.ext4"))
	want(false)
	c.Env = []string{"HOME=" + home, "XDG_CACHE_HOME=" + elsewhere}
	want(true)
	touch(filepath.Join(elsewhere, "smolvm/overlay-template.ext4"))
	want(false)
	c.BootTimeout = time.Second
	if c.startTimeout() != time.Second {
		t.Errorf("limit %v", c.startTimeout())
	}
}
