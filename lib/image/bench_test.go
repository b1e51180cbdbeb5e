package image

import (
	"archive/tar"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Removing thousands of files slows down what ext4 makes for a while after;
// TMPDIR=/dev/shm shows the code rather than the disk.

// benchLayer is shaped like a distribution: some thousand small files, a few
// large ones, links.
func benchLayer(b *testing.B, files int) []byte {
	var ents []ent
	small, large := strings.Repeat("0123456789abcdef", 256), strings.Repeat("x", 1<<20)
	for i := range files {
		dir := fmt.Sprintf("usr/share/d%03d/", i/40)
		if i%40 == 0 {
			ents = append(ents, ent{name: dir})
		}
		switch body := small; {
		case i%10 == 3:
			ents = append(ents, ent{name: fmt.Sprintf("%sl%d", dir, i), typ: tar.TypeSymlink, link: "../x"})
		case i%200 == 5:
			body = large
			fallthrough
		default:
			ents = append(ents, ent{name: fmt.Sprintf("%sf%d", dir, i), body: body, mode: 0o755})
		}
	}
	return tarOf(b, ents...)
}

func BenchmarkUnpack(b *testing.B) {
	for _, zipped := range []bool{false, true} {
		b.Run(fmt.Sprintf("gzip=%v", zipped), func(b *testing.B) {
			w := newBench(b)
			layer := benchLayer(b, 4000)
			stored := layer
			if zipped {
				stored = gz(b, layer)
			}
			src := w.put("i.tar", dockerTarOf(b, configOf(b, "", layer), stored))
			b.SetBytes(int64(len(layer)))
			for b.Loop() {
				p, _ := w.mustPack(src)
				b.StopTimer()
				if err := Remove(context.Background(), w.opts.CacheDir, p.Digest); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

func BenchmarkCacheHit(b *testing.B) {
	w := newBench(b)
	layer := benchLayer(b, 4000)
	w.put("i.tar", dockerTarOf(b, configOf(b, "", layer), layer))
	w.put("i.tar.gz", gz(b, dockerTarOf(b, configOf(b, "", layer), layer)))
	_, rootfs := w.mustPack(path_("i.tar"))
	if err := os.Rename(rootfs, filepath.Join(w.base, "root")); err != nil {
		b.Fatal(err)
	}
	w.opts.Now = later
	for _, src := range []string{"i.tar", "i.tar.gz", "root"} {
		w.mustPack(path_(src))
		b.Run(src, func(b *testing.B) {
			for b.Loop() {
				if p, _ := w.mustPack(path_(src)); !p.Cached {
					b.Fatal("not a hit")
				}
			}
		})
	}
}

func BenchmarkView(b *testing.B) {
	w := newBench(b)
	_, rootfs, err := w.layers(benchLayer(b, 4000))
	if err != nil {
		b.Fatal(err)
	}
	for _, m := range []Mountpoint{{"/workspace", true}, {"/opt/other", true}} {
		b.Run(m.Path, func(b *testing.B) {
			for b.Loop() {
				dir := b.TempDir()
				if _, err := View(rootfs, []Mountpoint{m}, dir); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := removeAll(dir); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
