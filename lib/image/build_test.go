package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// ent is one entry of an archive built for a test.
type ent struct {
	name string
	typ  byte // 0: a file, or a folder if the name ends in /
	body string
	link string
	mode int64 // 0: 0644, or 0755 for a folder
}

func (e ent) header() *tar.Header {
	h := &tar.Header{Name: e.name, Typeflag: e.typ, Linkname: e.link, Mode: e.mode, ModTime: time.Unix(1_600_000_000, 0), Format: tar.FormatPAX}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
		if strings.HasSuffix(e.name, "/") {
			h.Typeflag = tar.TypeDir
		}
	}
	if h.Typeflag == tar.TypeReg {
		h.Size = int64(len(e.body))
	}
	if h.Mode == 0 {
		h.Mode = 0o644
		if h.Typeflag == tar.TypeDir {
			h.Mode = 0o755
		}
	}
	return h
}

func tarOf(t testing.TB, ents ...ent) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range ents {
		h := e.header()
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("entry %q: %v", e.name, err)
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte(e.body)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func configOf(t testing.TB, arch string, layers ...[]byte) []byte {
	t.Helper()
	ids := []string{}
	for _, l := range layers {
		ids = append(ids, digestOf(l))
	}
	data, err := json.Marshal(map[string]any{
		"architecture": arch, "os": "linux", "config": map[string]any{},
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids},
	})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// dockerTar builds a docker-archive in the order docker save has: layers
// first, manifest.json last.
func dockerTar(t testing.TB, layers ...[]byte) []byte {
	t.Helper()
	config := configOf(t, runtime.GOARCH, layers...)
	return dockerTarOf(t, config, layers...)
}

func dockerTarOf(t testing.TB, config []byte, layers ...[]byte) []byte {
	t.Helper()
	var ents []ent
	names := []string{}
	for i, l := range layers {
		name := string(rune('a'+i)) + "/layer.tar"
		names = append(names, name)
		ents = append(ents, ent{name: name, body: string(l)})
	}
	manifest, err := json.Marshal([]any{map[string]any{"Config": "config.json", "RepoTags": []string{"t:1"}, "Layers": names}})
	if err != nil {
		t.Fatal(err)
	}
	ents = append(ents, ent{name: "config.json", body: string(config)}, ent{name: "manifest.json", body: string(manifest)})
	return tarOf(t, ents...)
}

// layoutFiles builds an OCI layout of gzipped layers as a set of files.
func layoutFiles(t testing.TB, layers ...[]byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	put := func(mediaType string, data []byte) map[string]any {
		d := digestOf(data)
		files["blobs/sha256/"+strings.TrimPrefix(d, "sha256:")] = data
		return map[string]any{"mediaType": mediaType, "digest": d, "size": len(data)}
	}
	config := put("application/vnd.oci.image.config.v1+json", configOf(t, runtime.GOARCH, layers...))
	list := []any{}
	for _, l := range layers {
		list = append(list, put("application/vnd.oci.image.layer.v1.tar+gzip", gz(t, l)))
	}
	manifest, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": list})
	top := put("application/vnd.oci.image.manifest.v1+json", manifest)
	files["index.json"], _ = json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{top}})
	return files
}

func writeFiles(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func tarFiles(t testing.TB, files map[string][]byte) []byte {
	t.Helper()
	var ents []ent
	for name, data := range files {
		ents = append(ents, ent{name: name, body: string(data)})
	}
	sort.Slice(ents, func(i, j int) bool { return ents[i].name < ents[j].name })
	return tarOf(t, ents...)
}

// bench is a manifest's folder with a cache beside it.
type bench struct {
	t    testing.TB
	base string
	opts Options
}

func newBench(t testing.TB) *bench {
	t.Helper()
	dir := t.TempDir()
	base := filepath.Join(dir, "project")
	if err := os.Mkdir(base, 0o755); err != nil {
		t.Fatal(err)
	}
	return &bench{t: t, base: base, opts: Options{CacheDir: filepath.Join(dir, "cache")}}
}

// put writes a source file.
func (b *bench) put(name string, data []byte) plan.Image {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.base, name), data, 0o644); err != nil {
		b.t.Fatal(err)
	}
	return path_(name)
}

func path_(name string) plan.Image { return plan.Image{Kind: "path", Source: name} }

func (b *bench) pack(src plan.Image) (plan.Pack, string, error) {
	return Pack(context.Background(), src, b.base, b.opts)
}

func (b *bench) mustPack(src plan.Image) (plan.Pack, string) {
	b.t.Helper()
	p, rootfs, err := b.pack(src)
	if err != nil {
		b.t.Fatalf("Pack(%v): %v", src, err)
	}
	return p, rootfs
}

// layers packs a docker-archive of these layers.
func (b *bench) layers(layers ...[]byte) (plan.Pack, string, error) {
	b.t.Helper()
	return b.pack(b.put("image.tar", dockerTar(b.t, layers...)))
}

// wantFault checks an error's exit status and code, and that it tells what to do.
func wantFault(t testing.TB, err error, exit int, code string) {
	t.Helper()
	var f *fault.Error
	if !errors.As(err, &f) {
		t.Fatalf("error %v is no fault; want %s (%d)", err, code, exit)
	}
	if f.Exit != exit || f.Code != code {
		t.Fatalf("error %q is %s (%d); want %s (%d)", f, f.Code, f.Exit, code, exit)
	}
	if f.Hint == "" {
		t.Errorf("error %q does not say what to do", f)
	}
}

// tree lists a folder: "path" for files with their content, "path/" for
// folders, "path -> target" for symlinks. Mountpoints are left out.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	skip := map[string]bool{"home": true, "opt": true, "var": true}
	for _, p := range append(append([]string{}, standardDirs...), standardFiles...) {
		skip[p] = true
	}
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, p)
		if err != nil || rel == "." || skip[rel] {
			return err
		}
		switch {
		case d.IsDir():
			out[rel+"/"] = ""
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			out[rel+" -> "+target] = ""
		default:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			out[rel] = string(data)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func noTemps(t testing.TB, cacheDir string) {
	t.Helper()
	names, err := readNames(cacheDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if strings.HasPrefix(n, tmpPrefix) {
			t.Errorf("%s was left in the cache", n)
		}
	}
}
