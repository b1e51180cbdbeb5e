package integration

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

func TestWorkspaceReadWrite(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Write("kept.txt", "old\n")
		w.Write(".env", "TOKEN=hidden\n")
		w.Write("sub/deploy.key", "hidden\n")
		w.Write("sub/my.secret", "hidden by pattern\n")
		ro := w.Write(filepath.Join(w.Home, "data", "ro", "f"), "read me\n")
		rw := w.Write(filepath.Join(w.Home, "data", "rw", "f"), "change me\n")
		w.Manifest(plain + `,"hide":["*.secret"],"mounts":[{"source":"~/data/ro","target":"/opt/data"},{"source":"~/data/rw","target":"/srv/rw","mode":"rw"}]`)
		w.OK("bottle-vm trust")
		id := w.Up()
		r := w.Exec(id, `echo new >made.txt; echo changed >kept.txt; mkdir d && ln -s made.txt d/l; chmod 600 made.txt; rm -f bottle.json; echo x >>bottle.json; cat /opt/data/f; echo no >/opt/data/f; echo yes >/srv/rw/f; exit 3`)
		if r.Code != 3 || !contains(r.Out, "read me") {
			t.Errorf("%+v", r)
		}
		if got := w.Read("made.txt") + w.Read("kept.txt"); got != "new\nchanged\n" {
			t.Errorf("workspace: %q", got)
		}
		if w.Read(ro) != "read me\n" || w.Read(rw) != "yes\n" {
			t.Errorf("mounts: ro %q rw %q", w.Read(ro), w.Read(rw))
		}
		if !contains(w.Read("bottle.json"), `"format_version"`) || strings.HasSuffix(w.Read("bottle.json"), "x\n") {
			t.Error("the guest changed the manifest")
		}
		fi, err := os.Stat(filepath.Join(w.Dir, "made.txt"))
		if err != nil || fi.Mode().Perm() != 0o600 || ownerOf(t, filepath.Join(w.Dir, "made.txt")) != w.UID() {
			t.Errorf("made.txt: %v %v, owner %d", fi, err, ownerOf(t, filepath.Join(w.Dir, "made.txt")))
		}
		// Hidden: what was there, what appears later, and renaming does not bring
		// it out.
		w.Write("later.pem", "hidden later\n")
		harness.Eventually(t, harness.Limit, func() string {
			if r := w.Exec(id, "cat later.pem"); contains(r.Out, "hidden") {
				return "a file of a hidden name that appeared later can be read"
			}
			return ""
		})
		r = w.Exec(id, `cat .env sub/deploy.key sub/my.secret; mv .env seen; cp -r . /tmp/all; rm -f /tmp/all/later.pem; grep -rl --exclude=later.pem hidden /workspace /tmp/all`)
		if contains(r.Out, "hidden") || r.Code == 0 {
			t.Errorf("hidden files can be read: %+v", r)
		}
		if w.Read(".env") != "TOKEN=hidden\n" || w.Read("sub/my.secret") != "hidden by pattern\n" {
			t.Error("a hidden file was changed")
		}
		// The host's own files.
		r = w.Exec(id, "ls -d "+w.Dir+" "+w.State+" "+w.Home+"; cat /etc/shadow; ls -A /root")
		if r.Out != "" {
			t.Errorf("host files are visible: %+v", r)
		}
		w.Down(id)
		entries, err := os.ReadDir(w.Dir)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if want := ".env bottle.json d kept.txt later.pem made.txt sub"; err != nil || strings.Join(names, " ") != want {
			t.Errorf("workspace after down: %q, %v; want %q", names, err, want)
		}
	})
}

func TestWorkspaceReadOnly(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Write("f", "as it was\n")
		w.Manifest(plain + `,"workspace":{"mode":"ro"}`)
		id := w.Up()
		if r := w.Exec(id, "cat f; echo x >f; echo y >g; rm f; mkdir d"); r.Code == 0 || r.Out != "as it was\n" {
			t.Errorf("%+v", r)
		}
		if w.Read("f") != "as it was\n" {
			t.Error("the guest changed a read-only workspace")
		}
		if _, err := os.Lstat(filepath.Join(w.Dir, "g")); err == nil {
			t.Error("the guest wrote into a read-only workspace")
		}
	})
}

func TestWorkspaceScratch(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Write("changed.txt", "one\ntwo\n")
		w.Write("removed.txt", "gone\n")
		w.Write("run.sh", "#!/bin/sh\n")
		w.Manifest(plain + `,"workspace":{"mode":"scratch"}`)
		w.OK("git init -q . && git add . && git -c user.name=a -c user.email=a@b commit -qm one")
		id := w.Up()
		if r := w.Sh("bottle-vm diff " + id); r.Code != 0 || r.Out != "" {
			t.Errorf("diff of nothing: %+v", r)
		}
		if r := w.Exec(id, `echo three >>changed.txt; rm removed.txt; printf 'a\000b' >"bin ary"; chmod +x run.sh; ln -s changed.txt link; mkdir -p "d é"; echo deep >"d é/f"`); r.Code != 0 {
			t.Errorf("%+v", r)
		}
		if w.Read("changed.txt") != "one\ntwo\n" || w.Read("removed.txt") != "gone\n" {
			t.Error("a scratch workspace changed the real one")
		}
		r := w.Sh("bottle-vm diff " + id + " >change.patch")
		if r.Code != 1 {
			t.Errorf("diff: %+v, want 1", r)
		}
		w.OK("git apply change.patch")
		if w.Read("changed.txt") != "one\ntwo\nthree\n" || w.Read("bin ary") != "a\x00b" || w.Read("d é/f") != "deep\n" {
			t.Errorf("the patch did not bring all changes: %q", w.OK("git status --short"))
		}
		if _, err := os.Lstat(filepath.Join(w.Dir, "removed.txt")); err == nil {
			t.Error("removed.txt is still there")
		}
		if fi, err := os.Stat(filepath.Join(w.Dir, "run.sh")); err != nil || fi.Mode().Perm()&0o100 == 0 {
			t.Errorf("run.sh: %v, %v", fi, err)
		}
		if to, err := os.Readlink(filepath.Join(w.Dir, "link")); err != nil || to != "changed.txt" {
			t.Errorf("link: %q, %v", to, err)
		}
	})
}

func TestHomeKeptAndDiscarded(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		for _, c := range []struct{ mode, want string }{{"keep", "from the first\n"}, {"discard", ""}} {
			w.Manifest(plain + `,"home":"` + c.mode + `"`)
			first := w.Up()
			if r := w.Exec(first, "echo from the first >~/note; mkdir ~/.cache2"); r.Code != 0 {
				t.Errorf("%s: %+v", c.mode, r)
			}
			w.Down(first)
			second := w.Up()
			if r := w.Exec(second, "cat ~/note 2>/dev/null"); r.Out != c.want {
				t.Errorf("home %s: %+v, want %q", c.mode, r, c.want)
			}
			w.Down(second)
		}
	})
}

// rootfs makes a root file system of one static program: this project's guest
// helper would do, but a shell is more of an image. Busybox where there is one,
// otherwise a program that is built here.
func rootfs(t *testing.T, w *harness.World) string {
	t.Helper()
	dir := filepath.Join(w.Dir, "img")
	w.Write("img/etc/marker", "of the image\n")
	w.Write("img/usr/share/f", "x\n")
	for _, d := range []string{"bin", "tmp", "proc", "dev", "sys"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	src := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(src, []byte(`package main
import ("fmt";"os")
func main() {
	for _, f := range os.Args[1:] { b, err := os.ReadFile(f); if err != nil { fmt.Println(err); os.Exit(3) }; os.Stdout.Write(b) }
	if err := os.WriteFile("/written", []byte("x"), 0o644); err == nil { fmt.Println("wrote /") }
}`), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "bin", "show"), src)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	return dir
}

func TestImages(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		dir := rootfs(t, w)
		archive := filepath.Join(w.Dir, "img.tar")
		dockerArchive(t, dir, archive)
		for _, image := range []string{"./img", "./img.tar"} {
			w.Manifest(plain + `,"image":"` + image + `"`)
			var digest, cached []string
			for range 2 {
				if r := w.Sh("bottle-plan | bottle-pack | bottle-vm up -o doc.json"); r.Code != 0 {
					t.Fatalf("%s: %+v", image, r)
				}
				doc := w.Read("doc.json")
				digest = append(digest, gjson.Get(doc, "pack.digest").Str)
				cached = append(cached, gjson.Get(doc, "pack.cached").Raw)
				id := gjson.Get(doc, "vm.id").Str
				r := w.Do(nil, "bottle-vm", "exec", id, "--", "/bin/show", "/etc/marker")
				if r.Code != 0 || !contains(r.Out, "of the image\n") {
					t.Errorf("%s: %+v", image, r)
				}
				if r := w.Do(nil, "bottle-vm", "exec", id, "--", "/bin/show", "/workspace/bottle.json"); r.Code != 0 {
					t.Errorf("%s: no workspace: %+v", image, r)
				}
				w.Down(id)
			}
			if digest[0] != digest[1] || !strings.HasPrefix(digest[0], "sha256:") || cached[1] != "true" {
				t.Errorf("%s: digests %q, cached %q", image, digest, cached)
			}
			if _, err := os.Lstat(filepath.Join(dir, "written")); err == nil {
				t.Errorf("%s: a guest wrote into the image", image)
			}
		}
		has(t, "bottle-pack ls", w.OK("bottle-pack ls"), `"kind":"rootfs"`, `"kind":"docker-archive"`)
	})
}

// dockerArchive writes what "docker save" does: manifest.json, a config, a layer.
func dockerArchive(t *testing.T, dir, to string) {
	t.Helper()
	var layer bytes.Buffer
	lw := tar.NewWriter(&layer)
	if err := lw.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	lw.Close()
	sum := sha(layer.Bytes())
	config, _ := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux", "config": map[string]any{},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + sum}}})
	index, _ := json.Marshal([]map[string]any{{"Config": "config.json", "RepoTags": []string{"test:latest"}, "Layers": []string{"layer.tar"}}})
	f, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Chmod(0o644); err != nil {
		t.Fatal(err)
	}
	tw := tar.NewWriter(f)
	for _, e := range []struct {
		name string
		body []byte
	}{{"config.json", config}, {"layer.tar", layer.Bytes()}, {"manifest.json", index}} {
		if err := tw.WriteHeader(&tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.body))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(tw, bytes.NewReader(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
}
