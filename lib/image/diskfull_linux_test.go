package image

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// TestDiskFull unpacks into a file system that is too small, in a mount
// namespace of its own.
func TestDiskFull(t *testing.T) {
	if os.Getenv("IMAGE_TEST_FULL") == "" {
		if os.Geteuid() != 0 {
			t.Skip("only root can mount a small file system to fill")
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestDiskFull$")
		cmd.Env = append(os.Environ(), "IMAGE_TEST_FULL=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	b := newBench(t)
	if err := os.Mkdir(b.opts.CacheDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("small", b.opts.CacheDir, "tmpfs", 0, "size=512k,mode=700"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(b.opts.CacheDir, unix.MNT_DETACH)
	big := tarOf(t, ent{name: "bin/big", body: strings.Repeat("x", 1<<20)})
	b.put("big.tar", dockerTar(t, big))
	b.put("big.tar.gz", gz(t, dockerTar(t, big)))
	writeFiles(t, b.base, map[string][]byte{"root/bin/big": []byte(strings.Repeat("x", 1<<20))})
	for _, src := range []string{"big.tar", "big.tar.gz", "root"} {
		_, _, err := b.pack(path_(src))
		wantFault(t, err, fault.IO, "disk_full")
		noTemps(t, b.opts.CacheDir)
	}
	b.mustPack(b.put("small.tar", dockerTar(t, someLayers(t)...)))
}
