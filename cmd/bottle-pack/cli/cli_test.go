package cli

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
)

const manifest = `{"format_version":"1.0"}`

// project is a folder with a manifest and an image, and a cache beside it.
type project struct {
	t     *testing.T
	dir   string
	cache string
	env   map[string]string
}

func newProject(t *testing.T) *project {
	t.Helper()
	top := t.TempDir()
	p := &project{t: t, dir: filepath.Join(top, "project"), cache: filepath.Join(top, "cache"), env: map[string]string{}}
	if err := os.Mkdir(p.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p.write("bottle.json", manifest)
	layer := tarOf(t, "bin/sh", "shell")
	config := fmt.Sprintf(`{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, runtime.GOARCH, sha256.Sum256([]byte(layer)))
	p.write("image.tar", tarOf(t, "layer.tar", layer, "config.json", config, "manifest.json", `[{"Config":"config.json","Layers":["layer.tar"]}]`))
	return p
}

func (p *project) write(name, content string) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), []byte(content), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

func tarOf(t *testing.T, pairs ...string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(pairs); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: pairs[i], Mode: 0o755, Size: int64(len(pairs[i+1]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, pairs[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func (p *project) run(stdin string, args ...string) (status int, stdout, stderr string) {
	p.t.Helper()
	var out, errs bytes.Buffer
	proc := &tool.Proc{
		Name: "bottle-pack", Args: args, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errs,
		Getenv: func(k string) string { return p.env[k] }, Now: time.Now,
	}
	status = Run(context.Background(), proc)
	return status, out.String(), errs.String()
}

func bottle(kind, source string, engines ...string) *plan.Bottle {
	b := &plan.Bottle{
		ID: "dev", Agent: "dev", Manifest: plan.ManifestRef{Name: "bottle.json", SHA256: plan.SHA256([]byte(manifest))},
		Runtime: plan.Runtime{Requested: "auto"}, Image: plan.Image{Kind: kind, Source: source},
		User: "agent", Home: "discard", Workspace: plan.Workspace{Path: ".", Mode: "rw"},
		Mounts: []plan.Mount{}, Hide: []string{}, Env: []plan.EnvVar{{Name: "LANG", Value: "C.UTF-8"}}, Files: []plan.File{},
		Resources: plan.Resources{CPUs: 2}, Egress: plan.Policy{Proxy: "auto", Rules: []plan.Rule{}, Roots: []plan.Root{}},
		Secrets: []plan.Secret{}, Command: []string{"sh"},
	}
	for _, e := range engines {
		b.Runtime.Candidates = append(b.Runtime.Candidates, plan.Candidate{Engine: e, Why: "test"})
	}
	return b
}

func document(t *testing.T, b *plan.Bottle) string {
	t.Helper()
	d, err := plan.New(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(d.Line()) + "\n"
}

func section(t *testing.T, line string) plan.Pack {
	t.Helper()
	d, err := plan.Parse([]byte(strings.TrimSuffix(line, "\n")))
	if err != nil {
		t.Fatalf("%v in %s", err, line)
	}
	s, err := d.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return *s
}

func TestFilter(t *testing.T) {
	p := newProject(t)
	doc := document(t, bottle("path", "image.tar", "smolvm", "gvisor"))
	args := []string{"--dir", p.dir, "--cache", p.cache}
	status, out, errs := p.run(doc, args...)
	if status != 0 || errs != "" {
		t.Fatalf("status %d, stderr %q", status, errs)
	}
	got := section(t, out)
	if got.Kind != "docker-archive" || got.SizeBytes != 5 || got.Cached || !strings.HasPrefix(got.Digest, "sha256:") || !strings.Contains(got.Smolfile, "net = false\n") {
		t.Errorf("pack = %+v", got)
	}
	if !strings.HasPrefix(out, strings.TrimSuffix(doc, "}\n")) {
		t.Errorf("what came in was changed:\n%s%s", doc, out)
	}
	if strings.Contains(out, p.dir) || strings.Contains(out, p.cache) {
		t.Errorf("a path of this machine is in the document: %s", out)
	}
	// Packed again, its own section is replaced and the rest stands.
	status, again, _ := p.run(strings.Replace(out, `"size_bytes":5`, `"size_bytes":6`, 1), args...)
	if s := section(t, again); status != 0 || !s.Cached || s.SizeBytes != 5 || s.Digest != got.Digest {
		t.Errorf("status %d, pack = %+v", status, s)
	}
	// The archive is for plans that nothing else can serve.
	archives := func() int {
		names, _ := os.ReadDir(filepath.Join(p.cache, "archives"))
		return len(names)
	}
	if archives() != 0 {
		t.Error("an archive was made for a plan that gvisor may run")
	}
	status, _, errs = p.run(document(t, bottle("path", "image.tar", "smolvm")), args...)
	if status != 0 || archives() != 1 {
		t.Errorf("status %d, %d archives, stderr %q", status, archives(), errs)
	}
	status, out, _ = p.run(document(t, bottle("path", "image.tar", "gvisor")), args...)
	if s := section(t, out); status != 0 || s.Smolfile != "" {
		t.Errorf("status %d, pack = %+v", status, s)
	}
}

func TestHostNeedsNothing(t *testing.T) {
	p := newProject(t) // no HOME, no cache, no manifest's folder
	status, out, errs := p.run(document(t, bottle("host", "", "gvisor")))
	if s := section(t, out); status != 0 || errs != "" || s != (plan.Pack{Digest: "host", Kind: "host"}) {
		t.Errorf("status %d, stderr %q, pack %+v", status, errs, s)
	}
	status, _, errs = p.run(document(t, bottle("host", "", "smolvm")))
	if status != fault.Host || !strings.Contains(errs, "image host") {
		t.Errorf("host image on smolvm alone: status %d, stderr %q", status, errs)
	}
}

func TestCacheFolder(t *testing.T) {
	p := newProject(t)
	doc := document(t, bottle("path", "image.tar", "gvisor"))
	p.env["XDG_CACHE_HOME"] = filepath.Join(filepath.Dir(p.dir), "xdg")
	if status, _, errs := p.run(doc, "--dir", p.dir); status != 0 {
		t.Fatal(errs)
	}
	if _, err := os.Stat(filepath.Join(p.env["XDG_CACHE_HOME"], "bottle", "images", "locks")); err != nil {
		t.Error(err)
	}
	p.env["BOTTLE_CACHE"] = p.cache
	if status, out, errs := p.run(doc, "--dir", p.dir); status != 0 || section(t, out).Cached {
		t.Errorf("BOTTLE_CACHE was not used: %s%s", out, errs)
	}
}

func TestErrors(t *testing.T) {
	p := newProject(t)
	p.write("other.json", "changed")
	p.write("junk.tar", "junk")
	if err := os.WriteFile(filepath.Join(filepath.Dir(p.dir), "bottle.json"), []byte("another"), 0o644); err != nil {
		t.Fatal(err)
	}
	b := func(change func(*plan.Bottle)) string {
		b := bottle("path", "image.tar", "gvisor")
		change(b)
		return document(t, b)
	}
	same := func(*plan.Bottle) {}
	tests := []struct {
		name  string
		stdin string
		args  []string
		exit  int
		code  string // "" where no document comes out
	}{
		{"another manifest", b(same), []string{"--dir", filepath.Dir(p.dir)}, fault.Data, "manifest_changed"},
		{"no manifest", b(same), []string{"--dir", "/"}, fault.NoInput, "no_manifest"},
		{"no folder", b(same), []string{"--dir", "/no/such"}, fault.NoInput, "no_manifest_dir"},
		{"manifest from stdin", b(func(b *plan.Bottle) { b.Manifest.Name = "-" }), nil, fault.Usage, "usage"},
		{"missing image", b(func(b *plan.Bottle) { b.Image.Source = "no.tar" }), []string{"--dir", p.dir}, fault.NoInput, "image_missing"},
		{"junk", b(func(b *plan.Bottle) { b.Image.Source = "junk.tar" }), []string{"--dir", p.dir}, fault.Data, "image_corrupt"},
		{"bad reference", b(func(b *plan.Bottle) { b.Image = plan.Image{Kind: "reference", Source: "A B"} }), nil, fault.Data, "image_reference"},
		{"smolvm's limits", b(func(b *plan.Bottle) { b.Runtime.Candidates[0].Engine = "smolvm"; b.Resources.CPUs = 300 }), []string{"--dir", p.dir}, fault.Host, "smolfile_limit"},
		{"no document", "", nil, fault.Data, ""},
		{"no JSON", "x\n", nil, fault.Data, ""},
		{"no bottle", `{"format_version":"1.0"}` + "\n", nil, fault.Data, ""},
		{"unknown verb", "", []string{"list"}, fault.Usage, ""},
		{"flag behind an argument", "", []string{"ls", "x", "--cache", "/x"}, fault.Usage, ""},
		{"unknown flag", "", []string{"--nope"}, fault.Usage, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			status, out, errs := p.run(tt.stdin, append([]string{"--cache", p.cache}, tt.args...)...)
			if status != tt.exit {
				t.Errorf("status %d, want %d; stderr %q", status, tt.exit, errs)
			}
			if !strings.HasPrefix(errs, "bottle-pack: error: ") || strings.Count(errs, "\n") != 1 {
				t.Errorf("stderr is %q", errs)
			}
			if tt.code == "" {
				return
			}
			var doc struct {
				Bottle plan.Bottle
				Error  plan.Failure
			}
			if err := json.Unmarshal([]byte(out), &doc); err != nil {
				t.Fatalf("%v in %q", err, out)
			}
			if doc.Error.Code != tt.code || doc.Error.Exit != tt.exit || doc.Error.Stage != "pack" || doc.Error.Hint == "" || doc.Bottle.ID != "dev" {
				t.Errorf("error = %+v in %s", doc.Error, out)
			}
		})
	}
}

func TestSeveralDocuments(t *testing.T) {
	p := newProject(t)
	bad := bottle("path", "no.tar", "gvisor")
	in := document(t, bottle("path", "image.tar", "gvisor")) + document(t, bad) + document(t, bottle("host", "", "gvisor"))
	status, out, _ := p.run(in, "--dir", p.dir, "--cache", p.cache)
	lines := strings.SplitAfter(strings.TrimSuffix(out, "\n"), "\n")
	if status != fault.NoInput || len(lines) != 3 {
		t.Fatalf("status %d, %d lines: %s", status, len(lines), out)
	}
	if section(t, lines[0]).Kind != "docker-archive" || !strings.Contains(lines[1], `"image_missing"`) || section(t, lines[2]).Kind != "host" {
		t.Error(out)
	}
}

func TestLs(t *testing.T) {
	p := newProject(t)
	if status, out, errs := p.run("", "ls", "--cache", p.cache); status != 0 || out != "" || errs != "" {
		t.Errorf("ls of no cache: %d %q %q", status, out, errs)
	}
	if _, err := os.Stat(p.cache); err == nil {
		t.Error("ls made a cache")
	}
	p.run(document(t, bottle("path", "image.tar", "gvisor")), "--dir", p.dir, "--cache", p.cache)
	status, out, errs := p.run("", "ls", "--cache", p.cache)
	var got row
	if err := json.Unmarshal([]byte(out), &got); err != nil || status != 0 || errs != "" || strings.Count(out, "\n") != 1 {
		t.Fatalf("%d %q %q %v", status, out, errs, err)
	}
	if got.Kind != "docker-archive" || got.Source != "image.tar" || got.SizeBytes != 5 || got.Entries != 2 || !strings.HasPrefix(got.Rootfs, p.cache) {
		t.Errorf("%+v", got)
	}
	for _, when := range []string{got.CreatedAt, got.LastUsedAt} {
		if _, err := time.Parse(time.RFC3339, when); err != nil {
			t.Error(err)
		}
	}
	if err := os.Chmod(p.cache, 0o777); err != nil {
		t.Fatal(err)
	}
	if status, _, errs := p.run("", "ls", "--cache", p.cache); status != fault.NoPerm || !strings.Contains(errs, "can be written by others") {
		t.Errorf("ls of an open cache: %d %q", status, errs)
	}
}
