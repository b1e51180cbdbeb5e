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

// The alphabet of FuzzLayers: names and targets that are worth combining.
var (
	fuzzNames = []string{
		"a", "b", "a/b", "a/b/c", "s", "s/f", "s/a", "../outside/f", "/a", "/.", "a/..", "etc", "etc/hosts", "home", "opt/bottle",
		".wh.a", ".wh.s", "s/.wh.f", "a/.wh.b", ".wh..wh..opq", "a/.wh..wh..opq", "s/.wh..wh..opq", ".wh...", "a/.wh.b/c", "tmp", "run/x",
	}
	fuzzTargets = []string{
		"a", "b", "s", "a/b", "..", "../..", "../outside", "../../outside", "../../outside/f", "/", "/a", "/s", "s/..", "a/../..", ".", "no/..", "/outside/f", "",
	}
	fuzzTypes = []byte{tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeChar, tar.TypeFifo}
)

// script reads three bytes an entry; a first byte of 255 starts the next layer.
func script(data []byte) (layers [][]ent) {
	layers = [][]ent{nil}
	for ; len(data) >= 3; data = data[3:] {
		if data[0] == 255 {
			layers = append(layers, nil)
			continue
		}
		e := ent{
			typ:  fuzzTypes[int(data[0])%len(fuzzTypes)],
			name: fuzzNames[int(data[1])%len(fuzzNames)],
			link: fuzzTargets[int(data[2])%len(fuzzTargets)],
			mode: int64(data[2])<<4 | int64(data[0])&7,
			body: string(data[:3]),
		}
		layers[len(layers)-1] = append(layers[len(layers)-1], e)
	}
	return layers
}

// FuzzLayers unpacks hostile layers over each other, and checks that nothing
// outside of the folder has changed, that nothing special is inside of it, and
// that every refusal is a fault.
func FuzzLayers(f *testing.F) {
	f.Add([]byte{0, 2, 0, 2, 4, 0, 0, 5, 0})                       // a file through a symlink
	f.Add([]byte{0, 7, 0})                                         // dot dot
	f.Add([]byte{2, 4, 7, 0, 5, 0, 0, 17, 0})                      // out through a symlink
	f.Add([]byte{3, 0, 8, 255, 0, 0, 0, 20, 0})                    // a hard link out, an opaque folder
	f.Add([]byte{4, 0, 0, 5, 1, 0, 0, 2, 255})                     // devices
	f.Add([]byte{0, 3, 0, 255, 0, 0, 0, 15, 0, 1, 0, 0, 0, 18, 0}) // whiteouts
	f.Add([]byte{2, 11, 5, 2, 12, 8, 2, 13, 12, 2, 14, 4})         // mountpoints
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 120 {
			t.Skip("long scripts find nothing that short ones do not")
		}
		top := t.TempDir()
		outside, dir := filepath.Join(top, "outside"), filepath.Join(top, "inside", "rootfs")
		if err := errorsJoin(os.Mkdir(outside, 0o755), os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(outside, "f"), []byte("alive"), 0o644)); err != nil {
			t.Fatal(err)
		}
		err := unpackAll(t, dir, script(data))
		var refusal *fault.Error
		if err != nil && !errors.As(err, &refusal) {
			t.Errorf("refused by %T %v", err, err)
		}
		checkOutside(t, top)
		checkInside(t, dir)
	})
}

func unpackAll(t *testing.T, dir string, layers [][]ent) error {
	p := newProgress(Options{Now: func() time.Time { return time.Time{} }}, "")
	x, err := newExtractor(context.Background(), dir, Limits{Bytes: 1 << 20, Entries: 1000}, false, p)
	if err != nil {
		return err
	}
	defer x.close()
	for _, l := range layers {
		x.begin()
		if err := x.tar(bytes.NewReader(tarOf(t, l...))); err != nil {
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
