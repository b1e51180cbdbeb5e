package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

func someLayers(t testing.TB) [][]byte {
	return [][]byte{
		tarOf(t, ent{name: "bin/sh", body: "shell", mode: 0o755}, ent{name: "gone", body: "x"}),
		tarOf(t, ent{name: ".wh.gone"}, ent{name: "etc/issue", body: "hello"}),
	}
}

var someTree = map[string]string{"bin/": "", "bin/sh": "shell", "etc/issue": "hello"}

func TestHost(t *testing.T) {
	p, rootfs, err := Pack(context.Background(), plan.Image{Kind: "host"}, "", Options{})
	if err != nil || rootfs != "" || p != (plan.Pack{Digest: "host", Kind: "host"}) {
		t.Errorf("Pack(host) = %+v, %q, %v", p, rootfs, err)
	}
}

// TestOneDigest packs one image through every channel.
func TestOneDigest(t *testing.T) {
	layers := someLayers(t)
	b := newBench(t)
	files := layoutFiles(t, layers...)
	writeFiles(t, filepath.Join(b.base, "layout"), files)
	plain := dockerTar(t, layers...)
	dotted := map[string][]byte{}
	for name, data := range files {
		dotted["./"+name] = data
	}
	tests := []struct {
		src  plan.Image
		kind string
	}{
		{b.put("docker.tar", plain), KindDocker},
		{b.put("docker.tar.gz", gz(t, plain)), KindDocker},
		{b.put("odd name", dockerTar(t, layers...)), KindDocker},
		{path_("layout"), KindOCI},
		{path_("./layout/"), KindOCI},
		{b.put("layout.tar", tarFiles(t, files)), KindOCI},
		{b.put("layout.tgz", gz(t, tarFiles(t, dotted))), KindOCI},
		{b.put("gzlayers.tar", dockerTarOf(t, configOf(t, runtime.GOARCH, layers...), gz(t, layers[0]), layers[1])), KindDocker},
		{path_(filepath.Join(b.base, "docker.tar")), KindDocker},
	}
	if err := os.Symlink("docker.tar", filepath.Join(b.base, "link")); err != nil {
		t.Fatal(err)
	}
	tests = append(tests, struct {
		src  plan.Image
		kind string
	}{path_("link"), KindDocker})
	want := digestOf(configOf(t, runtime.GOARCH, layers...))
	for i, tt := range tests {
		for _, fresh := range []bool{false, true} {
			c := *b
			if fresh {
				c.opts.CacheDir = filepath.Join(t.TempDir(), "cache")
			}
			p, rootfs := c.mustPack(tt.src)
			if p.Digest != want || p.Kind != tt.kind || p.SizeBytes != 10 || p.Cached != (!fresh && i > 0) {
				t.Errorf("%s (fresh %v): %+v", tt.src.Source, fresh, p)
			}
			if diff := cmp.Diff(someTree, tree(t, rootfs)); diff != "" {
				t.Errorf("%s: %s", tt.src.Source, diff)
			}
			if got, err := Rootfs(c.opts.CacheDir, p.Digest); err != nil || got != rootfs {
				t.Errorf("Rootfs = %q, %v", got, err)
			}
			noTemps(t, c.opts.CacheDir)
		}
	}
	if all, err := List(b.opts.CacheDir); err != nil || len(all) != 1 || all[0].Digest != want || all[0].Entries != 6 {
		t.Errorf("List = %+v, %v", all, err)
	}
}

// TestImagesOfOthers packs what another implementation wrote.
func TestImagesOfOthers(t *testing.T) {
	b := newBench(t)
	img := buildImage(t, someLayers(t)...)
	ref := name.MustParseReference("example.com/a:1")
	if err := tarball.WriteToFile(filepath.Join(b.base, "crane.tar"), ref, img); err != nil {
		t.Fatal(err)
	}
	lay, err := layout.Write(filepath.Join(b.base, "layout"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := lay.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	want, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	for _, src := range []string{"crane.tar", "layout"} {
		p, rootfs := b.mustPack(path_(src))
		if p.Digest != want.String() {
			t.Errorf("%s: digest %s, want %s", src, p.Digest, want)
		}
		if diff := cmp.Diff(someTree, tree(t, rootfs)); diff != "" {
			t.Error(diff)
		}
	}
}

func buildImage(t testing.TB, layers ...[]byte) v1.Image {
	t.Helper()
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		img, err = mutate.AppendLayers(img, fileLayer(t, l))
		if err != nil {
			t.Fatal(err)
		}
	}
	return img
}

type rawLayer struct{ data []byte }

func (l rawLayer) DiffID() (v1.Hash, error)               { return v1.NewHash(digestOf(l.data)) }
func (l rawLayer) Uncompressed() (rc readCloser, e error) { return nopCloser(l.data), nil }
func (l rawLayer) MediaType() (types.MediaType, error)    { return types.DockerLayer, nil }

func TestBadSources(t *testing.T) {
	layers := someLayers(t)
	good := dockerTar(t, layers...)
	tests := []struct {
		name string
		data []byte
		exit int
		code string
	}{
		{"empty", nil, fault.Data, "image_corrupt"},
		{"text", []byte(strings.Repeat("not an image\n", 100)), fault.Data, "image_corrupt"},
		{"truncated in the last file", good[:len(good)-1536+20], fault.Data, "image_corrupt"},
		{"truncated in the middle", good[:len(good)/2], fault.Data, "image_corrupt"},
		{"truncated gzip", gz(t, good)[:200], fault.Data, "image_corrupt"},
		{"gzip of nothing", gz(t, nil), fault.Data, "image_corrupt"},
		{"gzip with a bad checksum", flip(gz(t, good), -6), fault.Data, "image_corrupt"},
		{"zstd", []byte("\x28\xb5\x2f\xfd...."), fault.Data, "image_unknown"},
		{"xz", []byte("\xfd7zXZ\x00..."), fault.Data, "image_unknown"},
		{"bzip2", []byte("BZh9....."), fault.Data, "image_unknown"},
		{"docker export", layers[0], fault.Data, "image_unknown"},
		{"tar of nothing known", tarOf(t, ent{name: "x", body: "y"}), fault.Data, "image_unknown"},
		{"manifest.json is a folder", tarOf(t, ent{name: "manifest.json/"}), fault.Data, "image_corrupt"},
		{"manifest.json is no JSON", tarOf(t, ent{name: "manifest.json", body: "{"}), fault.Data, "image_corrupt"},
		{"manifest.json links to itself", tarOf(t, ent{name: "manifest.json", typ: tar.TypeSymlink, link: "manifest.json"}), fault.Data, "image_corrupt"},
		{"no images", tarOf(t, ent{name: "manifest.json", body: "[]"}), fault.Data, "image_ambiguous"},
		{"two images", tarOf(t, ent{name: "manifest.json", body: `[{"Config":"a"},{"Config":"b"}]`}), fault.Data, "image_ambiguous"},
		{"no config", tarOf(t, ent{name: "manifest.json", body: `[{"Config":"c.json","Layers":[]}]`}), fault.Data, "image_corrupt"},
		{"config outside", tarOf(t, ent{name: "manifest.json", body: `[{"Config":"../../../../etc/passwd","Layers":[]}]`}), fault.Data, "image_corrupt"},
		{"layer outside", outsideLayer(t), fault.Data, "image_corrupt"},
		{"config is no JSON", tarOf(t, ent{name: "manifest.json", body: `[{"Config":"c","Layers":[]}]`}, ent{name: "c", body: "x"}), fault.Data, "image_corrupt"},
		{"fewer layers than digests", dockerTarOf(t, configOf(t, runtime.GOARCH, layers...), layers[0]), fault.Data, "image_corrupt"},
		{"layers in the wrong order", dockerTarOf(t, configOf(t, runtime.GOARCH, layers...), layers[1], layers[0]), fault.Data, "image_corrupt"},
		{"layer with another content", dockerTarOf(t, configOf(t, runtime.GOARCH, layers[0]), tarOf(t, ent{name: "bin/sh", body: "evil!", mode: 0o755})), fault.Data, "image_corrupt"},
		{"layer that is no archive", dockerTarOf(t, configOf(t, runtime.GOARCH, []byte("xyz")), []byte("xyz")), fault.Data, "image_corrupt"},
		{"layer truncated, digest as truncated", dockerTarOf(t, configOf(t, runtime.GOARCH, layers[0][:514]), layers[0][:514]), fault.Data, "image_corrupt"},
		{"layer truncated gzip", dockerTarOf(t, configOf(t, runtime.GOARCH, layers[0]), gz(t, layers[0])[:60]), fault.Data, "image_corrupt"},
		{"sha512 layers", dockerTarOf(t, []byte(`{"os":"linux","rootfs":{"type":"layers","diff_ids":["sha512:`+strings.Repeat("a", 128)+`"]}}`), layers[0]), fault.Data, "image_corrupt"},
		{"other architecture", dockerTarOf(t, configOf(t, "s390x", layers[0]), layers[0]), fault.Host, "image_platform"},
		{"huge manifest", tarOf(t, ent{name: "manifest.json", body: strings.Repeat(" ", maxJSON+1)}), fault.Data, "image_too_big"},
		{"index without images", tarOf(t, ent{name: "index.json", body: `{"schemaVersion":2,"manifests":[]}`}), fault.Data, "image_corrupt"},
		{"index that is no JSON", tarOf(t, ent{name: "index.json", body: `nope`}), fault.Data, "image_corrupt"},
		{"index to a missing manifest", tarOf(t, ent{name: "index.json", body: indexJSON(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":2,"digest":"sha256:` + strings.Repeat("a", 64) + `"}`)}), fault.Data, "image_corrupt"},
		{"index to a bad digest", tarOf(t, ent{name: "index.json", body: indexJSON(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":2,"digest":"sha256:../../../../etc/passwd"}`)}), fault.Data, "image_corrupt"},
		{"manifest with another content", tamperedLayout(t, layers), fault.Data, "image_corrupt"},
		{"other platform in an index", tarOf(t, ent{name: "index.json", body: indexJSON(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":2,"digest":"sha256:` + strings.Repeat("a", 64) + `","platform":{"os":"linux","architecture":"s390x"}}`)}), fault.Host, "image_platform"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			_, _, err := b.pack(b.put("image", tt.data))
			wantFault(t, err, tt.exit, tt.code)
			noTemps(t, b.opts.CacheDir)
			if all, err := List(b.opts.CacheDir); err != nil || len(all) != 0 {
				t.Errorf("the cache holds %v, %v", all, err)
			}
		})
	}
}

func flip(data []byte, at int) []byte {
	out := bytes.Clone(data)
	out[(len(out)+at)%len(out)] ^= 0xff
	return out
}

func indexJSON(manifests string) string {
	return `{"schemaVersion":2,"manifests":[` + manifests + `]}`
}

func outsideLayer(t *testing.T) []byte {
	config := string(configOf(t, runtime.GOARCH, []byte("x")))
	return tarOf(t, ent{name: "manifest.json", body: `[{"Config":"c","Layers":["../../../../../etc/passwd"]}]`}, ent{name: "c", body: config})
}

func tamperedLayout(t *testing.T, layers [][]byte) []byte {
	files := layoutFiles(t, layers...)
	for name, data := range files {
		if bytes.Contains(data, []byte(`"layers":[`)) && strings.HasPrefix(name, "blobs/") {
			files[name] = append(data, ' ')
		}
	}
	return tarFiles(t, files)
}

func TestPickPlatform(t *testing.T) {
	b := newBench(t)
	c := &cache{opts: Options{Platform: "linux/arm64"}.withDefaults()}
	d := func(digest string, p *v1.Platform, mt types.MediaType) v1.Descriptor {
		return v1.Descriptor{MediaType: mt, Platform: p, Digest: v1.Hash{Algorithm: "sha256", Hex: strings.Repeat(digest, 64)}}
	}
	arm, amd := &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, &v1.Platform{OS: "linux", Architecture: "amd64"}
	unknown := &v1.Platform{OS: "unknown", Architecture: "unknown"}
	attest := d("e", unknown, types.OCIManifestSchema1)
	attest.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	got, err := c.pick(&v1.IndexManifest{Manifests: []v1.Descriptor{d("a", amd, types.OCIManifestSchema1), d("b", arm, types.DockerManifestSchema2), attest, d("f", nil, "application/x-other")}})
	if err != nil || got.Digest.Hex[0] != 'b' {
		t.Errorf("picked %v, %v", got.Digest, err)
	}
	_, err = c.pick(&v1.IndexManifest{Manifests: []v1.Descriptor{d("a", nil, types.OCIManifestSchema1), d("b", nil, types.OCIManifestSchema1)}})
	wantFault(t, err, fault.Data, "image_ambiguous")
	_, err = c.pick(&v1.IndexManifest{Manifests: []v1.Descriptor{d("a", amd, types.OCIManifestSchema1)}})
	wantFault(t, err, fault.Host, "image_platform")
	b.opts.Platform = "nonsense"
	_, _, err = b.layers(someLayers(t)...)
	wantFault(t, err, fault.Usage, "usage")
}

func TestMissingAndOddPaths(t *testing.T) {
	b := newBench(t)
	if err := unix.Mkfifo(filepath.Join(b.base, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("loop", filepath.Join(b.base, "loop")); err != nil {
		t.Fatal(err)
	}
	writeFiles(t, b.base, map[string][]byte{"empty/x": nil, "file": []byte("x")})
	tests := []struct {
		src  string
		exit int
		code string
	}{
		{"missing.tar", fault.NoInput, "image_missing"},
		{"file/below", fault.NoInput, "image_missing"},
		{"loop", fault.NoInput, "image_missing"},
		{"~/x", fault.NoInput, "image_missing"}, // no HOME
		{"~root/x", fault.Data, "image_reference"},
		{"fifo", fault.Data, "image_unknown"},
		{"/dev/null", fault.Data, "image_unknown"},
		{"empty", fault.Data, "image_unknown"},
		{"/", fault.Data, "image_unknown"},
	}
	for _, tt := range tests {
		_, _, err := b.pack(path_(tt.src))
		wantFault(t, err, tt.exit, tt.code)
	}
	b.opts.Home = b.base
	b.put("home.tar", dockerTar(t, someLayers(t)...))
	b.mustPack(path_("~/home.tar"))
	b.opts.CacheDir = "relative"
	_, _, err := b.pack(path_("home.tar"))
	wantFault(t, err, fault.Usage, "cache_relative")
}

func TestUnreadable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Log("root reads everything; TestAsPlainUser runs this test as another user")
		return
	}
	b := newBench(t)
	b.put("i.tar", dockerTar(t, someLayers(t)...))
	writeFiles(t, filepath.Join(b.base, "root"), map[string][]byte{"bin/sh": nil, "etc/shadow": nil})
	for _, p := range []string{"i.tar", "root/etc/shadow"} {
		if err := os.Chmod(filepath.Join(b.base, p), 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, src := range []string{"i.tar", "root"} {
		_, _, err := b.pack(path_(src))
		wantFault(t, err, fault.NoPerm, "image_denied")
	}
	noTemps(t, b.opts.CacheDir)
}

// --- folders

func makeRootfs(t testing.TB, dir string) {
	t.Helper()
	writeFiles(t, dir, map[string][]byte{"bin/sh": []byte("shell"), "etc/issue": []byte("hello"), "usr/lib/x": []byte("lib"), "latin-\xe9": []byte("1")})
	for name, target := range map[string]string{"lib": "usr/lib", "abs": "/etc/passwd", "out": "../../../etc/passwd"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "bin/sh"), filepath.Join(dir, "bin/bash")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "bin/sh"), 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
}

func TestFolder(t *testing.T) {
	b := newBench(t)
	makeRootfs(t, filepath.Join(b.base, "root"))
	p, rootfs := b.mustPack(path_("root"))
	if p.Kind != KindRootfs || p.Cached || p.SizeBytes != 5+5+3+1 {
		t.Errorf("%+v", p)
	}
	want := map[string]string{
		"bin/": "", "bin/sh": "shell", "bin/bash": "shell", "etc/issue": "hello", "usr/": "", "usr/lib/": "", "usr/lib/x": "lib",
		"latin-\xe9": "1", "lib -> usr/lib": "", "abs -> /etc/passwd": "", "out -> ../../../etc/passwd": "",
	}
	if diff := cmp.Diff(want, tree(t, rootfs)); diff != "" {
		t.Error(diff)
	}
	if fi, err := os.Stat(filepath.Join(rootfs, "bin/sh")); err != nil || fi.Mode() != 0o755 {
		t.Errorf("bin/sh is %v, %v", fi.Mode(), err)
	}
	noTemps(t, b.opts.CacheDir)

	// Another copy, made later, owned by somebody else perhaps: the same digest.
	other := newBench(t)
	makeRootfs(t, filepath.Join(other.base, "root"))
	q, _ := other.mustPack(path_("root"))
	if q.Digest != p.Digest {
		t.Errorf("digests differ: %s, %s", p.Digest, q.Digest)
	}
}

func TestFolderDigestCoversEverything(t *testing.T) {
	base := newBench(t)
	makeRootfs(t, filepath.Join(base.base, "root"))
	p, _ := base.mustPack(path_("root"))
	at := func(dir, name string) string { return filepath.Join(dir, "root", name) }
	changes := map[string]func(dir string) error{
		"content":     func(d string) error { return os.WriteFile(at(d, "etc/issue"), []byte("hellO"), 0o644) },
		"mode":        func(d string) error { return os.Chmod(at(d, "etc/issue"), 0o600) },
		"folder mode": func(d string) error { return os.Chmod(at(d, "etc"), 0o700) },
		"sticky":      func(d string) error { return os.Chmod(at(d, "etc"), 0o755|os.ModeSticky) },
		"name":        func(d string) error { return os.Rename(at(d, "etc/issue"), at(d, "etc/issuf")) },
		"new file":    func(d string) error { return os.WriteFile(at(d, "new"), nil, 0o644) },
		"new folder":  func(d string) error { return os.Mkdir(at(d, "new"), 0o755) },
		"removed":     func(d string) error { return os.Remove(at(d, "etc/issue")) },
		"link target": func(d string) error { os.Remove(at(d, "lib")); return os.Symlink("usr/lib/", at(d, "lib")) },
		"link to a file": func(d string) error {
			os.Remove(at(d, "lib"))
			return os.WriteFile(at(d, "lib"), []byte("usr/lib"), 0o644)
		},
		"moved": func(d string) error { return os.Rename(at(d, "usr/lib/x"), at(d, "usr/x")) },
	}
	seen := map[string]string{p.Digest: "nothing"}
	for name, change := range changes {
		b := newBench(t)
		makeRootfs(t, filepath.Join(b.base, "root"))
		if err := change(b.base); err != nil {
			t.Fatal(err)
		}
		q, _ := b.mustPack(path_("root"))
		if was, ok := seen[q.Digest]; ok {
			t.Errorf("changing %s and changing %s give the same digest", name, was)
		}
		seen[q.Digest] = name
	}
}

func TestFolderThatHoldsTheCache(t *testing.T) {
	b := newBench(t)
	makeRootfs(t, filepath.Join(b.base, "root"))
	b.opts.CacheDir = filepath.Join(b.base, "root", "var", "cache")
	_, _, err := b.pack(path_("root"))
	wantFault(t, err, fault.Data, "image_unknown")
}

// TestFolderWithMounts takes the one folder with a mount in it that every Linux
// has.
func TestFolderWithMounts(t *testing.T) {
	root, err := os.OpenRoot("/dev")
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	a, errA := os.Stat("/dev")
	b, errB := os.Stat("/dev/pts")
	if errA != nil || errB != nil || deviceOf(a) == deviceOf(b) {
		t.Skip("no file system is mounted at /dev/pts here, so there is no mount to find")
	}
	_, err = stampTree(context.Background(), root, Options{}.withDefaults())
	wantFault(t, err, fault.Data, "image_mounted")
}

func TestFolderLimits(t *testing.T) {
	b := newBench(t)
	makeRootfs(t, filepath.Join(b.base, "root"))
	for _, l := range []Limits{{Entries: 5}, {Bytes: 10}} {
		b.opts.Limits = l
		_, _, err := b.pack(path_("root"))
		wantFault(t, err, fault.Data, "image_too_big")
	}
	noTemps(t, b.opts.CacheDir)
}

// --- cache

// later is a clock by which every source is old enough to be remembered.
func later() time.Time { return time.Now().Add(settled + time.Second) }

func TestUnchangedSourcesAreNotReadAgain(t *testing.T) {
	b := newBench(t)
	src := b.put("i.tar.gz", gz(t, dockerTar(t, someLayers(t)...)))
	makeRootfs(t, filepath.Join(b.base, "root"))
	b.opts.Now = later
	p, _ := b.mustPack(src)
	q, _ := b.mustPack(path_("root"))
	if n, _ := readNames(filepath.Join(b.opts.CacheDir, "index")); len(n) != 2 {
		t.Fatalf("index holds %v", n)
	}
	// What is remembered is believed: with another digest there, that is given.
	swap := func(from, to string) {
		t.Helper()
		dir := filepath.Join(b.opts.CacheDir, "index")
		names, _ := readNames(dir)
		for _, n := range names {
			data, err := os.ReadFile(filepath.Join(dir, n))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, n), bytes.ReplaceAll(data, []byte(from), []byte(to)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	swap(p.Digest, q.Digest)
	if got, _ := b.mustPack(src); got.Digest != q.Digest || !got.Cached {
		t.Errorf("the index was not used: %+v", got)
	}
	// A change of any kind makes it worthless.
	now := time.Now()
	if err := os.Chtimes(filepath.Join(b.base, "i.tar.gz"), now, now.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got, _ := b.mustPack(src); got.Digest != p.Digest || !got.Cached {
		t.Errorf("a changed file was not read again: %+v", got)
	}
	if err := os.WriteFile(filepath.Join(b.base, "root/etc/issue"), []byte("HELLO"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, _ := b.mustPack(path_("root")); got.Digest == q.Digest || got.Cached {
		t.Errorf("a changed folder was not read again: %+v", got)
	}
	// Garbage in the index is no index.
	dir := filepath.Join(b.opts.CacheDir, "index")
	names, _ := readNames(dir)
	for _, n := range names {
		if err := os.WriteFile(filepath.Join(dir, n), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.mustPack(src)
}

func TestFreshSourcesAreNotRemembered(t *testing.T) {
	b := newBench(t)
	b.mustPack(b.put("i.tar", dockerTar(t, someLayers(t)...)))
	if n, _ := readNames(filepath.Join(b.opts.CacheDir, "index")); len(n) != 0 {
		t.Errorf("a file written just now was remembered: %v", n)
	}
}

func TestIncompleteEntriesDoNotCount(t *testing.T) {
	damage := map[string]func(dir string) error{
		"no marker":    func(d string) error { return os.Remove(filepath.Join(d, markerName)) },
		"empty marker": func(d string) error { return os.WriteFile(filepath.Join(d, markerName), nil, 0o600) },
		"other layout": func(d string) error { return os.WriteFile(filepath.Join(d, markerName), []byte(`{"layout":0}`), 0o600) },
		"no rootfs":    func(d string) error { return os.RemoveAll(filepath.Join(d, rootfsName)) },
		"rootfs a file": func(d string) error {
			return errorsJoin(os.RemoveAll(filepath.Join(d, rootfsName)), os.WriteFile(filepath.Join(d, rootfsName), nil, 0o600))
		},
		"rootfs a link": func(d string) error {
			return errorsJoin(os.RemoveAll(filepath.Join(d, rootfsName)), os.Symlink("/", filepath.Join(d, rootfsName)))
		},
	}
	for name, harm := range damage {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			src := b.put("i.tar", dockerTar(t, someLayers(t)...))
			p, rootfs := b.mustPack(src)
			if err := harm(filepath.Dir(rootfs)); err != nil {
				t.Fatal(err)
			}
			if _, err := Rootfs(b.opts.CacheDir, p.Digest); err == nil {
				t.Error("Rootfs gives a damaged entry")
			} else {
				wantFault(t, err, fault.NoInput, "image_missing")
			}
			if all, _ := List(b.opts.CacheDir); len(all) != 0 {
				t.Errorf("List gives a damaged entry: %v", all)
			}
			q, rootfs := b.mustPack(src)
			if q.Cached {
				t.Error("a damaged entry was used")
			}
			if diff := cmp.Diff(someTree, tree(t, rootfs)); diff != "" {
				t.Error(diff)
			}
			noTemps(t, b.opts.CacheDir)
		})
	}
}

func errorsJoin(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func TestUnsafeCacheFolders(t *testing.T) {
	src := dockerTar(t, someLayers(t)...)
	tests := map[string]struct {
		make func(b *bench) error
		exit int
		code string
	}{
		"writable by others": {func(b *bench) error {
			return errorsJoin(os.Mkdir(b.opts.CacheDir, 0o700), os.Chmod(b.opts.CacheDir, 0o777))
		}, fault.NoPerm, "cache_unsafe"},
		"writable by the group": {func(b *bench) error {
			return errorsJoin(os.Mkdir(b.opts.CacheDir, 0o700), os.Chmod(b.opts.CacheDir, 0o770))
		}, fault.NoPerm, "cache_unsafe"},
		"sticky but writable": {func(b *bench) error {
			return errorsJoin(os.Mkdir(b.opts.CacheDir, 0o700), os.Chmod(b.opts.CacheDir, 0o777|os.ModeSticky))
		}, fault.NoPerm, "cache_unsafe"},
		"below a folder that others can write": {func(b *bench) error {
			d := filepath.Dir(b.opts.CacheDir)
			b.opts.CacheDir = filepath.Join(d, "open", "cache")
			return errorsJoin(os.Mkdir(filepath.Join(d, "open"), 0o700), os.Chmod(filepath.Join(d, "open"), 0o777))
		}, fault.NoPerm, "cache_unsafe"},
		"symlink to an unsafe one": {func(b *bench) error {
			d := filepath.Dir(b.opts.CacheDir)
			return errorsJoin(os.Mkdir(filepath.Join(d, "open"), 0o700), os.Chmod(filepath.Join(d, "open"), 0o777), os.Symlink("open", b.opts.CacheDir))
		}, fault.NoPerm, "cache_unsafe"},
		"a file": {func(b *bench) error { return os.WriteFile(b.opts.CacheDir, nil, 0o600) }, fault.CantCreate, "cache_unwritable"},
		"below a file": {func(b *bench) error {
			f := b.opts.CacheDir
			b.opts.CacheDir = filepath.Join(f, "x")
			return os.WriteFile(f, nil, 0o600)
		}, fault.CantCreate, "cache_unwritable"},
		"another user's": {func(b *bench) error {
			if os.Geteuid() == 0 {
				return errorsJoin(os.Mkdir(b.opts.CacheDir, 0o755), os.Chown(b.opts.CacheDir, 65534, 65534))
			}
			b.opts.CacheDir = "/usr"
			return nil
		}, fault.NoPerm, "cache_unsafe"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			img := b.put("i.tar", src)
			if err := tt.make(b); err != nil {
				t.Fatal(err)
			}
			_, _, err := b.pack(img)
			wantFault(t, err, tt.exit, tt.code)
			if tt.code == "cache_unsafe" && name != "below a folder that others can write" {
				_, err = List(b.opts.CacheDir)
				wantFault(t, err, tt.exit, tt.code)
			}
		})
	}
}

func TestCacheModes(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	for _, umask := range []int{0, 0o077} {
		syscall.Umask(0o022) // the test's own folders must not be open
		b := newBench(t)
		syscall.Umask(umask)
		b.opts.CacheDir = filepath.Join(b.opts.CacheDir, "deep", "images")
		_, rootfs := b.mustPack(b.put("i.tar", dockerTar(t, someLayers(t)...)))
		want := os.FileMode(0o700)
		if os.Geteuid() == 0 {
			want = 0o711
		}
		for _, p := range []string{b.opts.CacheDir, filepath.Dir(b.opts.CacheDir), filepath.Dir(rootfs)} {
			if fi, err := os.Stat(p); err != nil || fi.Mode().Perm() != want {
				t.Errorf("umask %o: %s is %v, want %v", umask, p, fi.Mode(), want)
			}
		}
		for _, p := range []string{rootfs, filepath.Join(rootfs, "bin/sh"), filepath.Join(rootfs, "bin"), filepath.Join(rootfs, "workspace")} {
			if fi, err := os.Stat(p); err != nil || fi.Mode().Perm() != 0o755 {
				t.Errorf("umask %o: %s is %v, want 0755", umask, p, fi.Mode())
			}
		}
	}
}

// TestConcurrentPacks packs one image many times at once, in one process and
// with two names for the same image.
func TestConcurrentPacks(t *testing.T) {
	b := newBench(t)
	layers := someLayers(t)
	srcs := []plan.Image{b.put("a.tar", dockerTar(t, layers...)), b.put("b.tar.gz", gz(t, tarFiles(t, layoutFiles(t, layers...))))}
	makeRootfs(t, filepath.Join(b.base, "root"))
	var fresh, freshFolder atomic.Int32
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			src := append(srcs, path_("root"))[i%3]
			p, rootfs, err := b.pack(src)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := os.Stat(filepath.Join(rootfs, "etc/issue")); err != nil {
				t.Error(err)
			}
			switch {
			case p.Cached:
			case p.Kind == KindRootfs:
				freshFolder.Add(1)
			default:
				fresh.Add(1)
			}
		})
	}
	wg.Wait()
	if fresh.Load() != 1 || freshFolder.Load() != 1 {
		t.Errorf("unpacked %d and copied %d times", fresh.Load(), freshFolder.Load())
	}
	noTemps(t, b.opts.CacheDir)
}

// TestCancel cancels at several points: the clock is asked at every step.
func TestCancel(t *testing.T) {
	var ents []ent
	for i := range 60 {
		ents = append(ents, ent{name: fmt.Sprintf("d%d/f%d", i%7, i), body: "x"})
	}
	layer := tarOf(t, ents...)
	for _, steps := range []int{0, 1, 5, 50, 100} {
		b := newBench(t)
		b.put("i.tar", dockerTar(t, layer))
		b.put("i.tar.gz", gz(t, dockerTar(t, layer)))
		makeRootfs(t, filepath.Join(b.base, "root"))
		for _, src := range []string{"i.tar", "i.tar.gz", "root"} {
			if src == "root" && steps > 15 {
				continue // it is done by then
			}
			ctx, cancel := context.WithCancel(context.Background())
			n, opts := 0, b.opts
			opts.Now = func() time.Time {
				if n++; n > steps {
					cancel()
				}
				return time.Now()
			}
			if steps == 0 {
				cancel()
			}
			_, _, err := Pack(ctx, path_(src), b.base, opts)
			cancel()
			wantFault(t, err, fault.TempFail, "interrupted")
			noTemps(t, b.opts.CacheDir)
			if all, err := List(b.opts.CacheDir); err != nil || len(all) != 0 {
				t.Errorf("the cache holds %v, %v", all, err)
			}
		}
		b.mustPack(path_("i.tar.gz"))
		b.mustPack(path_("root"))
	}
}

// TestKilled kills a process in the middle of unpacking; the next one that has
// to unpack clears away what it left.
func TestKilled(t *testing.T) {
	if os.Getenv("IMAGE_TEST_KILLED") != "" {
		c, err := openCache(Options{CacheDir: os.Getenv("IMAGE_TEST_KILLED")}.withDefaults())
		if err == nil {
			_, _, err = c.ensure(context.Background(), "sha256:"+strings.Repeat("0", 64), func(dir string) (Entry, error) {
				if err := os.WriteFile(filepath.Join(dir, "half"), nil, 0o600); err != nil {
					return Entry{}, err
				}
				fmt.Println("unpacking")
				for { // select {} would be a deadlock, and the end
					time.Sleep(time.Hour)
				}
			})
		}
		t.Fatal(err)
	}
	b := newBench(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
	cmd.Env = append(os.Environ(), "IMAGE_TEST_KILLED="+b.opts.CacheDir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	temps := func() (n int) {
		names, _ := readNames(b.opts.CacheDir)
		for _, name := range names {
			if strings.HasPrefix(name, tmpPrefix) {
				n++
			}
		}
		return n
	}
	// While it lives its work is left alone, and is in nobody's way.
	b.mustPack(b.put("i.tar", dockerTar(t, someLayers(t)...)))
	if stale, err := Stale(b.opts.CacheDir); err != nil || len(stale) != 0 || temps() != 1 {
		t.Errorf("work in progress counts as stale: %v, %v (%d)", stale, err, temps())
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if stale, err := Stale(b.opts.CacheDir); err != nil || len(stale) != 1 {
		t.Errorf("Stale = %v, %v", stale, err)
	}
	b.mustPack(b.put("j.tar", dockerTar(t, someLayers(t)[0])))
	noTemps(t, b.opts.CacheDir)
	if stale, err := Stale(b.opts.CacheDir); err != nil || len(stale) != 0 {
		t.Errorf("Stale = %v, %v", stale, err)
	}
}

func TestRemoveAndSweep(t *testing.T) {
	b := newBench(t)
	p, rootfs := b.mustPack(b.put("i.tar", dockerTar(t, someLayers(t)...)))
	if _, err := Archive(context.Background(), path_("i.tar"), b.base, b.opts); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(rootfs, "bin"), 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Remove(context.Background(), b.opts.CacheDir, p.Digest); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Dir(rootfs)); err == nil {
		t.Error("the entry is still there")
	}
	if n, _ := readNames(filepath.Join(b.opts.CacheDir, "archives")); len(n) != 0 {
		t.Errorf("archives left: %v", n)
	}
	wantFault(t, Remove(context.Background(), b.opts.CacheDir, "sha256:../.."), fault.Data, "image_digest")
	if err := os.Mkdir(filepath.Join(b.opts.CacheDir, tmpPrefix+"dead"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(b.opts.CacheDir); err != nil {
		t.Fatal(err)
	}
	noTemps(t, b.opts.CacheDir)
	missing := filepath.Join(b.base, "no-cache")
	if err := Sweep(missing); err != nil {
		t.Error(err)
	}
	if all, err := List(missing); err != nil || all != nil {
		t.Errorf("List of no cache = %v, %v", all, err)
	}
	if _, err := os.Stat(missing); err == nil {
		t.Error("looking made a cache")
	}
	_, err := Rootfs(missing, p.Digest)
	wantFault(t, err, fault.NoInput, "image_missing")
	if got, err := Rootfs(missing, "host"); got != "" || err != nil {
		t.Errorf("Rootfs(host) = %q, %v", got, err)
	}
}

func TestDefaultDir(t *testing.T) {
	env := func(m map[string]string) func(string) string { return func(k string) string { return m[k] } }
	for _, tt := range []struct {
		env  map[string]string
		uid  int
		home string
		want string
	}{
		{map[string]string{"XDG_CACHE_HOME": "/c"}, 0, "/root", "/c/bottle/images"},
		{map[string]string{"XDG_CACHE_HOME": "relative"}, 1000, "/home/u", "/home/u/.cache/bottle/images"},
		{nil, 0, "/root", "/var/cache/bottle/images"},
		{nil, 1000, "/home/u", "/home/u/.cache/bottle/images"},
	} {
		if got, err := DefaultDir(env(tt.env), tt.uid, tt.home); err != nil || got != tt.want {
			t.Errorf("DefaultDir(%v, %d, %s) = %s, %v; want %s", tt.env, tt.uid, tt.home, got, err, tt.want)
		}
	}
	_, err := DefaultDir(env(nil), 1000, "")
	wantFault(t, err, fault.CantCreate, "cache_unknown")
}

func TestProgress(t *testing.T) {
	b := newBench(t)
	var out bytes.Buffer
	b.opts.Progress = &out
	b.mustPack(b.put("i.tar", dockerTar(t, someLayers(t)...)))
	if out.Len() != 0 {
		t.Errorf("quick work is not quiet: %s", out.String())
	}
	now := time.Unix(0, 0)
	b.opts.Now = func() time.Time { now = now.Add(400 * time.Millisecond); return now }
	b.mustPack(b.put("j.tar", dockerTar(t, someLayers(t)[1])))
	if !strings.Contains(out.String(), "unpacking j.tar: 3 entries, 0 MiB") {
		t.Errorf("slow work says %q", out.String())
	}
}

// --- registry

func TestRegistry(t *testing.T) {
	var requests atomic.Int32
	var broken atomic.Int32
	reg := registry.New(registry.Logger(quiet()))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if status := broken.Load(); status != 0 && r.URL.Path != "/v2/" {
			w.WriteHeader(int(status))
			return
		}
		reg.ServeHTTP(w, r)
	}))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	img := buildImage(t, someLayers(t)...)
	tag, err := name.ParseReference(host + "/a/b:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
	manifest, _ := img.Digest()
	config, _ := img.ConfigName()
	reference := func(s string) plan.Image { return plan.Image{Kind: "reference", Source: host + s} }
	pinned := reference("/a/b@" + manifest.String())

	b := newBench(t)
	for i, src := range []plan.Image{reference("/a/b:1"), pinned, pinned} {
		p, rootfs := b.mustPack(src)
		if p.Kind != KindReference || p.Digest != config.String() || p.Cached != (i > 0) {
			t.Errorf("%v: %+v", src, p)
		}
		if diff := cmp.Diff(someTree, tree(t, rootfs)); diff != "" {
			t.Error(diff)
		}
	}
	before := requests.Load()
	b.mustPack(pinned)
	if n := requests.Load() - before; n != 0 {
		t.Errorf("a pinned image that is in the cache took %d requests", n)
	}
	b.mustPack(reference("/a/b:1"))
	if requests.Load() == before {
		t.Error("a tag was not asked for again")
	}

	t.Run("index", func(t *testing.T) {
		other, err := mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: "s390x"})
		if err != nil {
			t.Fatal(err)
		}
		idx := mutate.AppendManifests(empty.Index,
			mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
			mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}})
		multi, _ := name.ParseReference(host + "/multi:1")
		if err := remote.WriteIndex(multi, idx); err != nil {
			t.Fatal(err)
		}
		if p, _ := b.mustPack(reference("/multi:1")); p.Digest != config.String() {
			t.Errorf("%+v", p)
		}
		c := *b
		c.opts.Platform = "linux/riscv64"
		_, _, err = c.pack(reference("/multi:1"))
		wantFault(t, err, fault.Host, "image_platform")
	})
	t.Run("archive", func(t *testing.T) {
		path, err := Archive(context.Background(), pinned, b.base, b.opts)
		if err != nil {
			t.Fatal(err)
		}
		checkArchive(t, path, config.String())
	})
	t.Run("errors", func(t *testing.T) {
		_, _, err := b.pack(reference("/no/such:1"))
		wantFault(t, err, fault.NoInput, "image_missing")
		_, _, err = b.pack(reference("/a/b@sha256:" + strings.Repeat("1", 64)))
		wantFault(t, err, fault.NoInput, "image_missing")
		_, _, err = b.pack(plan.Image{Kind: "reference", Source: "UPPER CASE"})
		wantFault(t, err, fault.Data, "image_reference")
		broken.Store(http.StatusForbidden)
		_, _, err = b.pack(reference("/a/b:1"))
		wantFault(t, err, fault.NoPerm, "image_denied")
		broken.Store(http.StatusNotImplemented)
		_, _, err = b.pack(reference("/a/b:1"))
		wantFault(t, err, fault.Unavailable, "image_unavailable")
		broken.Store(0)
	})
	t.Run("foreign layers", func(t *testing.T) {
		foreign, err := mutate.Append(empty.Image, mutate.Addendum{
			Layer: fileLayer(t, someLayers(t)[0]), MediaType: types.DockerForeignLayer, URLs: []string{srv.URL + "/secret"},
		})
		if err != nil {
			t.Fatal(err)
		}
		ref, _ := name.ParseReference(host + "/foreign:1")
		if err := remote.Write(ref, foreign, remote.WithNondistributable); err != nil {
			t.Fatal(err)
		}
		_, _, err = b.pack(reference("/foreign:1"))
		wantFault(t, err, fault.Data, "image_unsafe")
	})
	t.Run("gone", func(t *testing.T) {
		srv.Close()
		b.mustPack(pinned)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		_, _, err := Pack(ctx, reference("/a/b:1"), b.base, b.opts)
		wantFault(t, err, fault.Unavailable, "image_unavailable")
		noTemps(t, b.opts.CacheDir)
	})
}

func fileLayer(t testing.TB, data []byte) v1.Layer {
	t.Helper()
	l, err := partial.UncompressedToLayer(rawLayer{data})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// --- archives for smolvm

// checkArchive reads an archive the way smolvm does, and by another
// implementation.
func checkArchive(t *testing.T, path, digest string) v1.Image {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tr := tar.NewReader(f)
	h, err := tr.Next()
	if err != nil || h.Name != "manifest.json" {
		t.Fatalf("the first member is %v, %v", h, err)
	}
	var m []dockerManifest
	if err := json.NewDecoder(tr).Decode(&m); err != nil || len(m) != 1 {
		t.Fatalf("manifest.json: %v, %v", m, err)
	}
	img, err := tarball.ImageFromPath(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := img.ConfigName(); err != nil || digest != "" && got.String() != digest {
		t.Errorf("config is %s, %v; want %s", got, err, digest)
	}
	return img
}

func TestArchive(t *testing.T) {
	b := newBench(t)
	layers := append(someLayers(t), someLayers(t)[1]) // one layer twice
	src := b.put("i.tar.gz", gz(t, dockerTar(t, layers...)))
	path, err := Archive(context.Background(), src, b.base, b.opts)
	if err != nil {
		t.Fatal(err)
	}
	p, rootfs := b.mustPack(src)
	checkArchive(t, path, p.Digest)

	// Packed again it is the same image, and the bytes depend on it alone.
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other := newBench(t)
	q, again, err := Pack(context.Background(), path_(path), other.base, other.opts)
	if err != nil || q.Digest != p.Digest {
		t.Fatalf("%+v, %v", q, err)
	}
	if diff := cmp.Diff(tree(t, rootfs), tree(t, again)); diff != "" {
		t.Error(diff)
	}
	path2, err := Archive(context.Background(), path_(path), other.base, other.opts)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := os.ReadFile(path2); err != nil || !bytes.Equal(first, second) {
		t.Errorf("archives of one image differ (%v)", err)
	}
	fi, _ := os.Stat(path)
	if _, err := Archive(context.Background(), src, b.base, b.opts); err != nil {
		t.Fatal(err)
	}
	if fi2, _ := os.Stat(path); !os.SameFile(fi, fi2) {
		t.Error("an archive that was there was made again")
	}
	noTemps(t, b.opts.CacheDir)
}

func TestArchiveOfFolder(t *testing.T) {
	b := newBench(t)
	makeRootfs(t, filepath.Join(b.base, "root"))
	path, err := Archive(context.Background(), path_("root"), b.base, b.opts)
	if err != nil {
		t.Fatal(err)
	}
	checkArchive(t, path, "")
	_, folder := b.mustPack(path_("root"))
	_, unpacked := b.mustPack(path_(path))
	if diff := cmp.Diff(tree(t, folder), tree(t, unpacked)); diff != "" {
		t.Error(diff)
	}
	_, err = Archive(context.Background(), plan.Image{Kind: "host"}, b.base, b.opts)
	wantFault(t, err, fault.Host, "image_host")
	_, err = Archive(context.Background(), path_("no"), b.base, b.opts)
	wantFault(t, err, fault.NoInput, "image_missing")
}

// TestAsPlainUser runs the tests of this package as a user without rights.
func TestAsPlainUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("these tests already run as a plain user")
		return
	}
	if testing.Short() {
		t.Skip("-short: the tests were not run a second time as a plain user")
	}
	dir, err := os.MkdirTemp("/tmp", "image-plain-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	exe := filepath.Join(dir, "image.test")
	data, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(dir, "tmp")
	if err := errorsJoin(os.Chmod(dir, 0o755), os.WriteFile(exe, data, 0o755), os.Mkdir(tmp, 0o700), os.Chown(tmp, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.short")
	cmd.Dir = tmp
	cmd.Env = []string{"TMPDIR=" + tmp, "PATH=/usr/bin:/bin", "HOME=" + tmp}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("as uid 65534: %v\n%s", err, out)
	}
}
