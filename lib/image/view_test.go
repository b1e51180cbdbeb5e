package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bottle-tools/bottle/lib/fault"
)

type readCloser = io.ReadCloser

func nopCloser(data []byte) io.ReadCloser { return io.NopCloser(bytes.NewReader(data)) }

func quiet() *log.Logger { return log.New(io.Discard, "", 0) }

// snapshot is everything about a tree that a bottle can see and that sharing
// must not change.
func snapshot(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%v %d %d", fi.Mode(), fi.Size(), fi.ModTime().UnixNano())
		if fi.Mode().IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %x", sha256.Sum256(data))
		}
		out[p] = line
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestStandardMountpoints(t *testing.T) {
	hostile := []ent{
		{name: "workspace", typ: tar.TypeSymlink, link: "/etc"},
		{name: "tmp", typ: tar.TypeSymlink, link: "../../../../tmp"},
		{name: "run", typ: tar.TypeSymlink, link: "/no/such"},
		{name: "opt", typ: tar.TypeSymlink, link: "usr/opt"},
		{name: "usr/opt/x", body: "1"},
		{name: "home", typ: tar.TypeSymlink, link: "/var/home"}, // dangling
		{name: "usr/lib/resolv.conf", body: "nameserver 192.0.2.1\n"},
		{name: "etc/resolv.conf", typ: tar.TypeSymlink, link: "../usr/lib/resolv.conf"},
		{name: "etc/hosts", typ: tar.TypeSymlink, link: "/run/systemd/hosts"},
		{name: "etc/hostname", typ: tar.TypeSymlink, link: "../../../../../../etc/hostname"},
		{name: "etc/passwd", typ: tar.TypeSymlink, link: "passwd"},
		{name: "etc/group", body: "kept"},
	}
	b := newBench(t)
	_, rootfs, err := b.layers(tarOf(t, hostile...))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range standardDirs {
		if fi, err := os.Lstat(filepath.Join(rootfs, p)); err != nil || !fi.IsDir() {
			t.Errorf("%s: %v, %v", p, fi, err)
		}
	}
	want := map[string]string{"etc/resolv.conf": "nameserver 192.0.2.1\n", "etc/hosts": "", "etc/hostname": "", "etc/passwd": "", "etc/group": "kept"}
	for p, content := range want {
		fi, err := os.Lstat(filepath.Join(rootfs, p))
		if err != nil || !fi.Mode().IsRegular() {
			t.Errorf("%s: %v, %v", p, fi, err)
			continue
		}
		if data, err := os.ReadFile(filepath.Join(rootfs, p)); err != nil || string(data) != content {
			t.Errorf("%s holds %q, %v; want %q", p, data, err, content)
		}
	}
	if target, err := os.Readlink(filepath.Join(rootfs, "opt")); err != nil || target != "usr/opt" {
		t.Errorf("opt was replaced though it leads to a folder: %q, %v", target, err)
	}
	if fi, err := os.Lstat(filepath.Join(rootfs, "usr/opt/bottle")); err != nil || !fi.IsDir() {
		t.Errorf("usr/opt/bottle: %v, %v", fi, err)
	}
}

func viewRootfs(t testing.TB) (b *bench, rootfs string) {
	b = newBench(t)
	_, rootfs, err := b.layers(tarOf(t,
		ent{name: "usr/bin/sh", body: "shell", mode: 0o755}, ent{name: "bin", typ: tar.TypeSymlink, link: "usr/bin"},
		ent{name: "data/", mode: 0o1777}, ent{name: "abs", typ: tar.TypeSymlink, link: "/usr"}, ent{name: "dangling", typ: tar.TypeSymlink, link: "/nowhere"},
		ent{name: "out", typ: tar.TypeSymlink, link: "../../../.."}, ent{name: "up", typ: tar.TypeSymlink, link: "usr/bin/.."}))
	if err != nil {
		t.Fatal(err)
	}
	return b, rootfs
}

func TestViewIsTheSharedOneWhenNothingIsMissing(t *testing.T) {
	_, rootfs := viewRootfs(t)
	dir := t.TempDir()
	got, err := View(rootfs, []Mountpoint{
		{"/workspace", true}, {"/opt/bottle", true}, {"/etc/resolv.conf", false}, {"/data", true}, {"/bin", true},
		{"/bin/sh", false}, {"/abs/bin/sh", false}, {"/abs", true}, {"/up", true}, {"/up/bin", true}, {"/usr//bin/./sh", false},
	}, dir)
	if err != nil || got != rootfs {
		t.Errorf("View = %q, %v", got, err)
	}
	if names, _ := readNames(dir); len(names) != 0 {
		t.Errorf("View made %v", names)
	}
}

func TestView(t *testing.T) {
	_, rootfs := viewRootfs(t)
	before := snapshot(t, rootfs)
	dir := t.TempDir()
	view, err := View(rootfs, []Mountpoint{
		{"/opt/claude", true}, {"/srv/a/b/c", true}, {"/etc/app.conf", false}, {"/bin/tool", false}, {"/abs/share/x", true},
		{"/dangling/x", true}, {"/out/y", true}, {"/workspace", true},
	}, dir)
	if err != nil {
		t.Fatal(err)
	}
	if view != filepath.Join(dir, "rootfs") {
		t.Errorf("view is %s", view)
	}
	for p, isDir := range map[string]bool{
		"opt/claude": true, "srv/a/b/c": true, "etc/app.conf": false, "usr/bin/tool": false, "usr/share/x": true,
		"dangling/x": true, "out/y": true, "workspace": true, "data": true, "usr/bin/sh": false,
	} {
		fi, err := os.Lstat(filepath.Join(view, p))
		if err != nil || fi.IsDir() != isDir {
			t.Errorf("%s: %v, %v", p, fi, err)
		}
	}
	// What it has in common is the same.
	for p, line := range before {
		rel, _ := filepath.Rel(rootfs, p)
		switch rel {
		case ".", "opt", "etc", "usr", "usr/bin", "dangling", "out":
			continue // mountpoints were made here
		}
		fi, err := os.Lstat(filepath.Join(view, rel))
		if err != nil {
			t.Error(err)
			continue
		}
		if got := fmt.Sprintf("%v %d", fi.Mode(), fi.Size()); line[:len(got)] != got {
			t.Errorf("%s is %s, was %s", rel, got, line)
		}
	}
	if diff := cmp.Diff(before, snapshot(t, rootfs)); diff != "" {
		t.Errorf("the shared root file system changed:\n%s", diff)
	}
	a, _ := os.Stat(filepath.Join(rootfs, "usr/bin/sh"))
	b, _ := os.Stat(filepath.Join(view, "usr/bin/sh"))
	if !os.SameFile(a, b) {
		t.Error("files were copied, not linked")
	}
	if err := removeAll(view); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, snapshot(t, rootfs)); diff != "" {
		t.Errorf("removing a view changed the shared root file system:\n%s", diff)
	}
}

func TestViewRefusals(t *testing.T) {
	_, rootfs := viewRootfs(t)
	for _, m := range []Mountpoint{
		{"relative", true}, {"", true}, {"/", true}, {"/a/../b", true}, {"/..", true}, {"/a\x00b", true},
		{"/usr/bin/sh", true}, {"/usr", false}, {"/bin", false},
	} {
		dir := t.TempDir()
		_, err := View(rootfs, []Mountpoint{m}, dir)
		wantFault(t, err, fault.Data, "mount_target")
		if names, _ := readNames(dir); len(names) != 0 {
			t.Errorf("%v left %v", m, names)
		}
	}
	_, err := View(filepath.Join(rootfs, "no"), []Mountpoint{{"/x", true}}, t.TempDir())
	wantFault(t, err, fault.NoInput, "image_missing")
	_, err = View(rootfs, []Mountpoint{{"/usr/bin/sh/x", true}}, t.TempDir())
	wantFault(t, err, fault.Data, "image_unknown")
}

// TestViewOnAnotherFileSystem copies what cannot be linked.
func TestViewOnAnotherFileSystem(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "view-")
	if err != nil {
		t.Skipf("no second file system to try: %v", err)
	}
	defer os.RemoveAll(dir)
	_, rootfs := viewRootfs(t)
	view, err := View(rootfs, []Mountpoint{{"/opt/x", true}}, dir)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(view, "usr/bin/sh")); err != nil || string(data) != "shell" {
		t.Errorf("%q, %v", data, err)
	}
	a, _ := os.Stat(filepath.Join(rootfs, "usr/bin/sh"))
	b, _ := os.Stat(filepath.Join(view, "usr/bin/sh"))
	if a.Mode() != b.Mode() || !a.ModTime().Equal(b.ModTime()) {
		t.Errorf("copy is %v %v, was %v %v", b.Mode(), b.ModTime(), a.Mode(), a.ModTime())
	}
}
