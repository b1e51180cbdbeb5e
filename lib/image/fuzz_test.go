package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

// FuzzLayers unpacks two hostile layers over each other, and checks that
// nothing outside of the folder has changed, that nothing special is inside of
// it, and that every refusal is a fault.
func FuzzLayers(f *testing.F) {
	for _, l := range [][]ent{
		{{name: "a/b", body: "x"}, {name: "s", typ: tar.TypeSymlink, link: "a"}, {name: "s/c", body: "y"}},
		{{name: "../x", body: "x"}},
		{{name: "s", typ: tar.TypeSymlink, link: "../../outside"}, {name: "s/f", body: "x"}, {name: "s/.wh.f"}},
		{{name: "h", typ: tar.TypeLink, link: "../outside/f"}, {name: "a/.wh..wh..opq"}},
		{{name: "d", typ: tar.TypeChar}, {name: "p", typ: tar.TypeFifo}, {name: "su", mode: 0o7777, body: "x"}},
		{{name: "a/.wh.b"}, {name: ".wh.a"}, {name: "a/"}},
		{{name: "etc", typ: tar.TypeSymlink, link: "/../../../../etc"}, {name: "etc/hosts", typ: tar.TypeSymlink, link: "../../outside/f"}},
		{{name: "opt/bottle", typ: tar.TypeSymlink, link: "/home/agent"}, {name: "home", typ: tar.TypeSymlink, link: "opt/.."}},
	} {
		data := tarOf(f, l...)
		f.Add(data, data)
	}
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		if len(lower)+len(upper) > 1<<20 {
			t.Skip()
		}
		top := t.TempDir()
		outside, dir := filepath.Join(top, "outside"), filepath.Join(top, "inside", "rootfs")
		if err := errorsJoin(os.Mkdir(outside, 0o755), os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(outside, "f"), []byte("alive"), 0o644)); err != nil {
			t.Fatal(err)
		}
		err := unpackBoth(dir, lower, upper)
		var refusal *fault.Error
		var pe *fs.PathError
		if err != nil && !errors.As(err, &refusal) && !errors.As(err, &pe) {
			t.Errorf("refused by %T %v", err, err)
		}
		checkOutside(t, top)
		checkInside(t, dir)
	})
}

func unpackBoth(dir string, layers ...[]byte) error {
	p := newProgress(Options{Now: func() time.Time { return time.Time{} }}, "")
	x, err := newExtractor(context.Background(), dir, Limits{Bytes: 1 << 20, Entries: 1000}, false, p)
	if err != nil {
		return err
	}
	defer x.close()
	for _, l := range layers {
		x.placed = map[string]struct{}{}
		if err := x.tar(&layerReader{x: x, r: bytes.NewReader(l)}); err != nil {
			return err
		}
	}
	return x.finish()
}

func checkOutside(t *testing.T, top string) {
	t.Helper()
	for dir, want := range map[string]string{top: "[inside outside]", filepath.Join(top, "inside"): "[rootfs]", filepath.Join(top, "outside"): "[f]"} {
		names, err := readNames(dir)
		if err != nil {
			t.Fatal(err)
		}
		if got := "[" + strings.Join(names, " ") + "]"; got != want {
			t.Errorf("%s holds %s, want %s", dir, got, want)
		}
	}
	fi, err := os.Lstat(filepath.Join(top, "outside", "f"))
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(top, "outside", "f"))
	if _, many := idOf(fi); many || err != nil || string(data) != "alive" || fi.Mode() != 0o644 {
		t.Errorf("the file outside is %v %q, %v", fi.Mode(), data, err)
	}
}

func checkInside(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		switch m := fi.Mode(); {
		case m&fs.ModeSymlink != 0:
		case m.Type() != 0 && !m.IsDir(), m&(fs.ModeSetuid|fs.ModeSetgid) != 0, m&0o600 != 0o600:
			t.Errorf("%s is %v", p, m)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
