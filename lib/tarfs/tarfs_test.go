package tarfs

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRoundTrip(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	for name, content := range map[string]string{"t/a": "A", "t/d/b": strings.Repeat("b", 100000), "t/empty": ""} {
		p := filepath.Join(src, name)
		os.MkdirAll(filepath.Dir(p), 0o755)
		if err := os.WriteFile(p, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	os.Chmod(src+"/t/a", 0o755)
	os.Symlink("d/b", src+"/t/link")
	unix.Mkfifo(src+"/t/fifo", 0o644)
	var out, said bytes.Buffer
	if err := Out(src+"/t", &out, &said); err != nil {
		t.Fatal(err)
	}
	if said.String() != "t/fifo: left out: not a file, folder or link\n" {
		t.Errorf("said %q", said.String())
	}
	if err := In(dst+"/new/dir", &out); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(dst + "/new/dir/t/link"); err != nil || len(b) != 100000 {
		t.Errorf("through the link: %d bytes, %v", len(b), err)
	}
	if fi, err := os.Stat(dst + "/new/dir/t/a"); err != nil || fi.Mode() != 0o755 {
		t.Errorf("%v, %v", fi, err)
	}
	out.Reset()
	if err := Out(src+"/t/a", &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	h, err := tar.NewReader(&out).Next()
	if err != nil || h.Name != "a" || h.Uid != 0 || h.Uname != "" {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestInHostile(t *testing.T) {
	outside := t.TempDir()
	entry := func(h tar.Header, content string) []byte {
		var b bytes.Buffer
		tw := tar.NewWriter(&b)
		h.Size, h.Mode = int64(len(content)), 0o644
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(tw, content)
		tw.Close()
		return b.Bytes()
	}
	for name, stream := range map[string][]byte{
		"dotdot":        entry(tar.Header{Name: "../x", Typeflag: tar.TypeReg}, "x"),
		"absolute":      entry(tar.Header{Name: outside + "/x", Typeflag: tar.TypeReg}, "x"),
		"through link":  entry(tar.Header{Name: "planted/x", Typeflag: tar.TypeReg}, "x"),
		"link out":      entry(tar.Header{Name: "l", Linkname: "../..", Typeflag: tar.TypeSymlink}, ""),
		"link absolute": entry(tar.Header{Name: "l", Linkname: "/etc", Typeflag: tar.TypeSymlink}, ""),
		"hard link":     entry(tar.Header{Name: "l", Linkname: "/etc/passwd", Typeflag: tar.TypeLink}, ""),
		"device":        entry(tar.Header{Name: "d", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, ""),
		"fifo":          entry(tar.Header{Name: "f", Typeflag: tar.TypeFifo}, ""),
		"cut":           entry(tar.Header{Name: "f", Typeflag: tar.TypeReg}, strings.Repeat("x", 5000))[:1000],
		"junk":          []byte(strings.Repeat("junk", 300)),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Symlink(outside, dir+"/planted"); err != nil {
				t.Fatal(err)
			}
			if err := In(dir, bytes.NewReader(stream)); err == nil {
				t.Error("accepted")
			}
			if es, err := os.ReadDir(outside); err != nil || len(es) != 0 {
				t.Errorf("written outside: %v, %v", es, err)
			}
		})
	}
}

// A file of the same name as a link that was planted replaces the link.
func TestInReplacesLink(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()+"/target"
	if err := os.Symlink(outside, dir+"/f"); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	tw.WriteHeader(&tar.Header{Name: "f", Typeflag: tar.TypeReg, Size: 1, Mode: 0o644})
	io.WriteString(tw, "x")
	tw.Close()
	if err := In(dir, &b); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(dir + "/f"); err != nil || !fi.Mode().IsRegular() {
		t.Errorf("%v, %v", fi, err)
	}
	if _, err := os.Stat(outside); err == nil {
		t.Error("written through the link")
	}
}

func FuzzIn(f *testing.F) {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	tw.WriteHeader(&tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Size: 1, Mode: 0o644})
	io.WriteString(tw, "x")
	tw.WriteHeader(&tar.Header{Name: "a/l", Typeflag: tar.TypeSymlink, Linkname: "b"})
	tw.Close()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, stream []byte) {
		parent := t.TempDir()
		_ = In(parent+"/in", bytes.NewReader(stream))
		es, err := os.ReadDir(parent)
		if err != nil || len(es) != 1 {
			t.Fatalf("outside of the folder: %v, %v", es, err)
		}
		filepath.WalkDir(parent+"/in", func(p string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() && !d.Type().IsRegular() && d.Type() != os.ModeSymlink {
				t.Fatalf("made a %v", d.Type())
			}
			return nil
		})
	})
}
