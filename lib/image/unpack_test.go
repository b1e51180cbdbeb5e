package image

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bottle-tools/bottle/lib/fault"
)

func TestLayers(t *testing.T) {
	type layers [][]ent
	tests := []struct {
		name   string
		layers layers
		want   map[string]string
	}{
		{"files, folders, links", layers{{
			{name: "./usr/"}, {name: "usr/bin/"}, {name: "usr/bin/sh", body: "shell", mode: 0o755},
			{name: "bin", typ: tar.TypeSymlink, link: "usr/bin"},
			{name: "usr/bin/dash", typ: tar.TypeLink, link: "usr/bin/sh"},
		}}, map[string]string{"usr/": "", "usr/bin/": "", "usr/bin/sh": "shell", "usr/bin/dash": "shell", "bin -> usr/bin": ""}},
		{"parents that no entry names", layers{{{name: "a/b/c", body: "x"}}},
			map[string]string{"a/": "", "a/b/": "", "a/b/c": "x"}},
		{"a leading slash is the image's root", layers{{{name: "/a", body: "x"}, {name: "//b//c", body: "y"}}},
			map[string]string{"a": "x", "b/": "", "b/c": "y"}},
		{"upper file replaces lower", layers{{{name: "a", body: "old"}}, {{name: "a", body: "new"}}},
			map[string]string{"a": "new"}},
		{"duplicate entries: the last wins", layers{{{name: "a", body: "1"}, {name: "a", body: "2"}}},
			map[string]string{"a": "2"}},
		{"file replaces folder", layers{{{name: "a/"}, {name: "a/b", body: "x"}}, {{name: "a", body: "f"}}},
			map[string]string{"a": "f"}},
		{"folder replaces file", layers{{{name: "a", body: "f"}}, {{name: "a/"}, {name: "a/b", body: "x"}}},
			map[string]string{"a/": "", "a/b": "x"}},
		{"folder over folder keeps what is in it", layers{{{name: "a/"}, {name: "a/b", body: "x"}}, {{name: "a/", mode: 0o700}, {name: "a/c", body: "y"}}},
			map[string]string{"a/": "", "a/b": "x", "a/c": "y"}},
		{"folder replaces symlink", layers{{{name: "b/"}, {name: "a", typ: tar.TypeSymlink, link: "b"}}, {{name: "a/"}, {name: "a/c", body: "x"}}},
			map[string]string{"a/": "", "a/c": "x", "b/": ""}},
		{"through a symlink inside", layers{{{name: "usr/lib/"}, {name: "lib", typ: tar.TypeSymlink, link: "usr/lib"}}, {{name: "lib/x", body: "x"}}},
			map[string]string{"usr/": "", "usr/lib/": "", "lib -> usr/lib": "", "usr/lib/x": "x"}},
		{"through an absolute symlink, which starts at the image's root", layers{{{name: "real/"}, {name: "d/"}, {name: "d/l", typ: tar.TypeSymlink, link: "/real"}}, {{name: "d/l/x", body: "x"}}},
			map[string]string{"real/": "", "d/": "", "d/l -> /real": "", "real/x": "x"}},
		{"replacing a hard link leaves the other name alone", layers{{{name: "a", body: "1"}, {name: "b", typ: tar.TypeLink, link: "a"}}, {{name: "b", body: "2"}}},
			map[string]string{"a": "1", "b": "2"}},
		{"hard link to a lower layer", layers{{{name: "a", body: "1"}}, {{name: "b", typ: tar.TypeLink, link: "/a"}}},
			map[string]string{"a": "1", "b": "1"}},
		{"hard link to itself", layers{{{name: "a", body: "1"}, {name: "a", typ: tar.TypeLink, link: "a"}}},
			map[string]string{"a": "1"}},
		{"hard link to a symlink is the symlink", layers{{{name: "s", typ: tar.TypeSymlink, link: "/etc/shadow"}, {name: "h", typ: tar.TypeLink, link: "s"}}},
			map[string]string{"s -> /etc/shadow": "", "h -> /etc/shadow": ""}},
		{"file replaces symlink and does not follow it", layers{{{name: "t", body: "kept"}, {name: "s", typ: tar.TypeSymlink, link: "t"}}, {{name: "s", body: "new"}}},
			map[string]string{"t": "kept", "s": "new"}},

		{"whiteout", layers{{{name: "a", body: "1"}, {name: "b", body: "2"}}, {{name: ".wh.a"}}},
			map[string]string{"b": "2"}},
		{"whiteout of a folder", layers{{{name: "d/e/f", body: "1"}}, {{name: ".wh.d"}}}, map[string]string{}},
		{"whiteout of a symlink leaves its target", layers{{{name: "t/"}, {name: "t/f", body: "1"}, {name: "s", typ: tar.TypeSymlink, link: "t"}}, {{name: ".wh.s"}}},
			map[string]string{"t/": "", "t/f": "1"}},
		{"whiteout of nothing", layers{{{name: "a", body: "1"}}, {{name: ".wh.b"}, {name: "x/.wh.y"}, {name: "a/.wh.y"}}}, map[string]string{"a": "1"}},
		{"whiteout before the new file", layers{{{name: "a", body: "old"}}, {{name: ".wh.a"}, {name: "a", body: "new"}}}, map[string]string{"a": "new"}},
		{"whiteout after the new file", layers{{{name: "a", body: "old"}}, {{name: "a", body: "new"}, {name: ".wh.a"}}}, map[string]string{"a": "new"}},
		{"whiteout after the new folder", layers{{{name: "d/old", body: "1"}}, {{name: "d/"}, {name: "d/new", body: "2"}, {name: ".wh.d"}}},
			map[string]string{"d/": "", "d/new": "2"}},
		{"opaque first", layers{{{name: "d/old", body: "1"}, {name: "d/sub/x", body: "1"}}, {{name: "d/"}, {name: "d/.wh..wh..opq"}, {name: "d/new", body: "2"}}},
			map[string]string{"d/": "", "d/new": "2"}},
		{"opaque last", layers{{{name: "d/old", body: "1"}, {name: "d/sub/x", body: "1"}}, {{name: "d/"}, {name: "d/new", body: "2"}, {name: "d/sub/y", body: "3"}, {name: "d/.wh..wh..opq"}}},
			map[string]string{"d/": "", "d/new": "2", "d/sub/": "", "d/sub/y": "3"}},
		{"opaque root", layers{{{name: "a", body: "1"}}, {{name: ".wh..wh..opq"}, {name: "b", body: "2"}}}, map[string]string{"b": "2"}},
		{"opaque through a symlink", layers{{{name: "real/old", body: "1"}, {name: "l", typ: tar.TypeSymlink, link: "real"}}, {{name: "l/.wh..wh..opq"}}},
			map[string]string{"real/": "", "l -> real": ""}},
		{"whiteout of the layer below does not reach above", layers{{{name: "a", body: "1"}}, {{name: ".wh.a"}}, {{name: "a", body: "3"}}}, map[string]string{"a": "3"}},
		{"whiteout of a file then a folder of that name", layers{{{name: "a", body: "1"}}, {{name: ".wh.a"}, {name: "a/"}, {name: "a/b", body: "2"}}},
			map[string]string{"a/": "", "a/b": "2"}},
		{"aufs' own names", layers{{{name: "a", body: "1"}, {name: ".wh..wh.aufs"}, {name: ".wh..wh.plnk/"}, {name: ".wh..wh.plnk/7.8", body: "x"}}}, map[string]string{"a": "1"}},

		{"devices are left out", layers{{{name: "dev/null", typ: tar.TypeChar}, {name: "sda", typ: tar.TypeBlock}, {name: "fifo", typ: tar.TypeFifo}, {name: "a", body: "1"}}},
			map[string]string{"a": "1"}},
		{"a device replaces a file", layers{{{name: "a", body: "1"}}, {{name: "a", typ: tar.TypeChar}}}, map[string]string{}},
		{"hard link to a device", layers{{{name: "null", typ: tar.TypeChar}, {name: "zero", typ: tar.TypeLink, link: "null"}}}, map[string]string{}},
		{"empty layer", layers{{}, {{name: "a", body: "1"}}}, map[string]string{"a": "1"}},
		{"odd names", layers{{{name: "a b\n", body: "1"}, {name: "-rf", body: "2"}, {name: "\xff", body: "3"}, {name: "...", body: "4"}, {name: "whx.wh.", body: "5"}}},
			map[string]string{"a b\n": "1", "-rf": "2", "\xff": "3", "...": "4", "whx.wh.": "5"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			var layers [][]byte
			for _, l := range tt.layers {
				layers = append(layers, tarOf(t, l...))
			}
			p, rootfs, err := b.layers(layers...)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, tree(t, rootfs)); diff != "" {
				t.Errorf("root file system (-want +got):\n%s", diff)
			}
			var size int64
			seen := map[fileID]bool{}
			for name := range tt.want {
				fi, err := os.Lstat(filepath.Join(rootfs, name))
				if err != nil || !fi.Mode().IsRegular() {
					continue
				}
				if id, many := idOf(fi); !many || !seen[id] {
					seen[id] = many
					size += int64(len(tt.want[name]))
				}
			}
			if p.SizeBytes != size {
				t.Errorf("size_bytes = %d, want %d", p.SizeBytes, size)
			}
		})
	}
}

// TestHostile checks that what tries to get out is refused, that nothing
// outside is touched, and that nothing stays in the cache.
func TestHostile(t *testing.T) {
	deep := strings.Repeat("d/", 100_000)
	tests := []struct {
		name string
		ents []ent
		code string
	}{
		{"dot dot", []ent{{name: "../canary", body: "x"}}, "image_unsafe"},
		{"dot dot inside", []ent{{name: "a/"}, {name: "a/../../canary", body: "x"}}, "image_unsafe"},
		{"dot dot that stays inside is refused too", []ent{{name: "a/../b", body: "x"}}, "image_unsafe"},
		{"absolute dot dot", []ent{{name: "/../canary", body: "x"}}, "image_unsafe"},
		{"folder dot dot", []ent{{name: "../"}}, "image_unsafe"},
		{"symlink out, then a file through it", []ent{{name: "s", typ: tar.TypeSymlink, link: "../.."}, {name: "s/canary", body: "x"}}, "image_unsafe"},
		{"two symlinks out", []ent{{name: "d/"}, {name: "d/s", typ: tar.TypeSymlink, link: ".."}, {name: "t", typ: tar.TypeSymlink, link: "d/s/.."}, {name: "t/canary", body: "x"}}, "image_unsafe"},
		{"dangling symlink, then dot dot", []ent{{name: "s", typ: tar.TypeSymlink, link: "no/../../canary"}, {name: "s/x", body: "x"}}, "image_unsafe"},
		{"symlink loop", []ent{{name: "s", typ: tar.TypeSymlink, link: "s"}, {name: "s/x", body: "x"}}, "image_corrupt"},
		{"hard link out", []ent{{name: "h", typ: tar.TypeLink, link: "../canary"}}, "image_unsafe"},
		{"hard link out through a symlink", []ent{{name: "s", typ: tar.TypeSymlink, link: "../.."}, {name: "h", typ: tar.TypeLink, link: "s/canary"}}, "image_unsafe"},
		{"hard link to nothing", []ent{{name: "h", typ: tar.TypeLink, link: "no"}}, "image_corrupt"},
		{"hard link to a host path", []ent{{name: "h", typ: tar.TypeLink, link: "/etc/passwd"}}, "image_corrupt"},
		{"hard link to a folder", []ent{{name: "d/"}, {name: "h", typ: tar.TypeLink, link: "d"}}, "image_corrupt"},
		{"hard link to the root", []ent{{name: "h", typ: tar.TypeLink, link: "."}}, "image_corrupt"},
		{"hard link that replaces the folder of its target", []ent{{name: "d/f", body: "x"}, {name: "d", typ: tar.TypeLink, link: "d/f"}}, "image_corrupt"},
		{"whiteout of dot dot", []ent{{name: "a/"}, {name: "a/.wh..."}}, "image_unsafe"},
		{"whiteout of dot", []ent{{name: "a/"}, {name: "a/.wh.."}}, "image_unsafe"},
		{"whiteout of nothing", []ent{{name: ".wh."}}, "image_unsafe"},
		{"whiteout through a symlink out", []ent{{name: "s", typ: tar.TypeSymlink, link: "../.."}, {name: "s/.wh.canary"}}, "image_unsafe"},
		{"opaque through a symlink out", []ent{{name: "s", typ: tar.TypeSymlink, link: "../../.."}, {name: "s/.wh..wh..opq"}}, "image_unsafe"},
		{"entry in a whiteout", []ent{{name: ".wh.a/b", body: "x"}}, "image_corrupt"},
		{"root folder as a symlink", []ent{{name: "./", typ: tar.TypeSymlink, link: "/etc"}}, "image_unsafe"},
		{"root folder as a file", []ent{{name: "/.", body: "x"}}, "image_unsafe"},
		{"below a file", []ent{{name: "a", body: "x"}, {name: "a/b", body: "y"}}, "image_corrupt"},
		{"100,000 folders deep", []ent{{name: deep}}, "image_unsafe"},
		{"a name of 256 bytes", []ent{{name: strings.Repeat("n", 256), body: "x"}}, "image_unsafe"},
		{"unknown type", []ent{{name: "a", typ: 'Z'}}, "image_corrupt"},
		{"file where a mountpoint has to be", []ent{{name: "opt", body: "x"}}, "image_unknown"},
		{"folder where a file has to be", []ent{{name: "etc/hosts/"}}, "image_unknown"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			// Where ../canary, s/canary and the like would end up.
			var canaries []string
			if err := os.MkdirAll(b.opts.CacheDir, 0o700); err != nil {
				t.Fatal(err)
			}
			for _, d := range []string{b.opts.CacheDir, filepath.Dir(b.opts.CacheDir), b.base} {
				p := filepath.Join(d, "canary")
				canaries = append(canaries, p)
				if err := os.WriteFile(p, []byte("alive"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			_, _, err := b.layers(tarOf(t, tt.ents...))
			wantFault(t, err, fault.Data, tt.code)
			for _, p := range canaries {
				if data, err := os.ReadFile(p); err != nil || string(data) != "alive" {
					t.Errorf("%s is %q, %v", p, data, err)
				}
				if fi, err := os.Stat(p); err == nil {
					if _, many := idOf(fi); many {
						t.Errorf("%s has a second name", p)
					}
				}
			}
			if e, err := List(b.opts.CacheDir); err != nil || len(e) != 0 {
				t.Errorf("cache holds %v, %v", e, err)
			}
			noTemps(t, b.opts.CacheDir)
		})
	}
}

func TestSymlinksOutAreHarmlessByThemselves(t *testing.T) {
	b := newBench(t)
	_, rootfs, err := b.layers(tarOf(t, ent{name: "up", typ: tar.TypeSymlink, link: "../../../../etc/passwd"}, ent{name: "abs", typ: tar.TypeSymlink, link: "/etc/passwd"}))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"up -> ../../../../etc/passwd": "", "abs -> /etc/passwd": ""}
	if diff := cmp.Diff(want, tree(t, rootfs)); diff != "" {
		t.Error(diff)
	}
}

func TestGuestMode(t *testing.T) {
	const dir = os.ModeDir
	tests := []struct {
		in      os.FileMode
		private os.FileMode
		shared  os.FileMode
	}{
		{0o644, 0o644, 0o644},
		{0o755 | os.ModeSetuid | os.ModeSetgid, 0o755, 0o755},
		{0o000, 0o600, 0o644},
		{0o111, 0o711, 0o755},
		{0o640, 0o640, 0o644},
		{0o700, 0o700, 0o755},
		{0o666, 0o666, 0o644},
		{dir, 0o700, 0o755},
		{dir | 0o1777 | os.ModeSticky, 0o777 | os.ModeSticky, 0o755 | os.ModeSticky},
		{dir | 0o750 | os.ModeSetgid, 0o750, 0o755},
	}
	for _, tt := range tests {
		for _, shared := range []bool{false, true} {
			want := tt.private
			if shared {
				want = tt.shared
			}
			if got := guestMode(tt.in, shared); got != want {
				t.Errorf("guestMode(%v, shared %v) = %v, want %v", tt.in, shared, got, want)
			}
		}
	}
}

func TestModesOnDisk(t *testing.T) {
	b := newBench(t)
	_, rootfs, err := b.layers(tarOf(t,
		ent{name: "su", body: "x", mode: 0o6755}, ent{name: "d/", mode: 0o2000}, ent{name: "d/f", body: "y", mode: 0o001},
		ent{name: "./", mode: 0o777}))
	if err != nil {
		t.Fatal(err)
	}
	private := map[string]os.FileMode{"su": 0o755, "d": os.ModeDir | 0o700, "d/f": 0o601, "": os.ModeDir | 0o755}
	shared := map[string]os.FileMode{"su": 0o755, "d": os.ModeDir | 0o755, "d/f": 0o645, "": os.ModeDir | 0o755}
	modes := private
	if os.Geteuid() == 0 {
		modes = shared
	}
	for name, want := range modes {
		fi, err := os.Lstat(filepath.Join(rootfs, name))
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode() != want {
			t.Errorf("%q has mode %v, want %v", name, fi.Mode(), want)
		}
	}
	if fi, err := os.Stat(filepath.Join(rootfs, "su")); err != nil || fi.ModTime().Unix() != 1_600_000_000 {
		t.Errorf("time of a file was not kept: %v, %v", fi.ModTime(), err)
	}
	if fi, err := os.Stat(filepath.Join(rootfs, "d")); err != nil || fi.ModTime().Unix() != 1_600_000_000 {
		t.Errorf("time of a folder was not kept: %v, %v", fi.ModTime(), err)
	}
}

func TestLimits(t *testing.T) {
	many := make([]ent, 20)
	for i := range many {
		many[i] = ent{name: fmt.Sprintf("f%02d", i), body: "0123456789"}
	}
	zeros := []byte(strings.Repeat("\x00", 8<<20)) // a layer that is all padding
	tests := []struct {
		name   string
		limits Limits
		layers [][]byte
		ok     bool
	}{
		{"within", Limits{Bytes: 200, Entries: 20}, [][]byte{tarOf(t, many...)}, true},
		{"entries", Limits{Bytes: 1 << 20, Entries: 19}, [][]byte{tarOf(t, many...)}, false},
		{"entries over two layers", Limits{Bytes: 1 << 20, Entries: 39}, [][]byte{tarOf(t, many...), tarOf(t, many...)}, false},
		{"bytes", Limits{Bytes: 199, Entries: 100}, [][]byte{tarOf(t, many...)}, false},
		{"bytes over two layers", Limits{Bytes: 399, Entries: 100}, [][]byte{tarOf(t, many...), tarOf(t, many...)}, false},
		{"folders that no entry names", Limits{Bytes: 1 << 20, Entries: 100}, [][]byte{tarOf(t, ent{name: strings.Repeat("d/", 100) + "f"})}, false},
		{"padding", Limits{Bytes: 1 << 20, Entries: 100}, [][]byte{zeros}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			b.opts.Limits = tt.limits
			_, _, err := b.layers(tt.layers...)
			if tt.ok {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantFault(t, err, fault.Data, "image_too_big")
			noTemps(t, b.opts.CacheDir)
		})
	}
}
