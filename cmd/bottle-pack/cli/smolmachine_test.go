package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
)

// packing makes a smolvm that answers as 1.32.2 did when it made a pack (how it
// says so is recorded; a pack is more than a recording holds), and gives its log.
func (p *project) packing(help, packCreate string) (log string) {
	t := p.t
	t.Helper()
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	bin := filepath.Join(dir, "smolvm")
	script := "#!/bin/sh\necho \"$*\" >>" + log + `
case $* in
--version) echo smolvm 1.32.2 ;;
"pack create --help") echo "` + help + `" ;;
"pack create --image "*" -o "*" --staging-dir "*)
	image=$4 out=$6
	[ -f "$image/bin/sh" ] || { echo "Error: no such image: $image" >&2; exit 1; }
	` + packCreate + ` ;;
*) echo "unexpected: $*" >&2; exit 97 ;;
esac
`
	if err := os.WriteFile(bin, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	p.env["BOTTLE_SMOLVM"], p.env["SMOLVM_VM_UID_DROP"] = bin, "off"
	return log
}

const localHelp = "or an unpacked rootfs directory (./rootfs/)"

func packs(t *testing.T, log string) int {
	t.Helper()
	data, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(data), "pack create --image ")
}

func (p *project) derived() []string {
	names, _ := filepath.Glob(filepath.Join(p.cache, "derived", "*"))
	return names
}

func TestSmolmachine(t *testing.T) {
	p := newProject(t)
	log := p.packing(localHelp, `echo stub >"$out"; echo packed >"$out.smolmachine"`)
	args := []string{"--dir", p.dir, "--cache", p.cache}
	doc := document(t, bottle("path", "image.tar", "smolvm", "gvisor"))
	// Nobody asked for one.
	if status, _, errs := p.run(doc, args...); status != 0 || len(p.derived()) != 0 {
		t.Fatalf("%d, %s, %v", status, errs, p.derived())
	}
	_, plain, _ := p.run(doc, args...)
	args = append([]string{"--smolmachine"}, args...)
	for range 2 {
		status, out, errs := p.run(doc, args...)
		if status != 0 || errs != "" || out != plain {
			t.Fatalf("status %d, stderr %q, a document that depends on it:\n%s%s", status, errs, out, plain)
		}
	}
	made := p.derived()
	if len(made) != 1 || packs(t, log) != 1 {
		t.Fatalf("made %d times: %v", packs(t, log), made)
	}
	name := filepath.Base(made[0])
	if digest := strings.Replace(section(t, plain).Digest, ":", "-", 1); !strings.HasPrefix(name, digest+".smolvm-1.32.2-") || !strings.HasSuffix(name, ".smolmachine") {
		t.Errorf("name %s", name)
	}
	if data, err := os.ReadFile(made[0]); err != nil || string(data) != "packed\n" {
		t.Errorf("%q, %v", data, err)
	}
	_, out, _ := p.run("", "ls", "--cache", p.cache)
	var r row
	if err := json.Unmarshal([]byte(out), &r); err != nil || len(r.Derived) != 1 || r.Derived[0] != made[0] {
		t.Errorf("ls: %+v, %v", r, err)
	}
	// Not for plans that smolvm does not run.
	for _, b := range []string{document(t, bottle("path", "image.tar", "gvisor")), document(t, bottle("host", "", "smolvm", "gvisor"))} {
		if status, _, errs := p.run(b, args...); status != 0 {
			t.Errorf("%d, %s", status, errs)
		}
	}
	if packs(t, log) != 1 {
		t.Error("made for another engine")
	}
}

func TestSmolmachineFails(t *testing.T) {
	doc := func(t *testing.T) string { return document(t, bottle("path", "image.tar", "smolvm")) }
	for _, tt := range []struct {
		name, help, script string
		exit               int
		code, says         string
	}{
		{"a version that cannot", "Container image to pack (e.g., alpine:latest)", "exit 97", fault.Host, "smolvm_pack", "1.32.2"},
		{"smolvm fails", localHelp, `echo half >"$out.smolmachine"; echo "Error: agent operation failed: it broke" >&2; exit 1`, fault.Unavailable, "smolvm_failed", "it broke"},
		{"disk full", localHelp, `echo half >"$out.smolmachine"; echo "Error: write pack: No space left on device (os error 28)" >&2; exit 1`, fault.CantCreate, "smolvm_disk_full", "os error 28"},
		{"killed", localHelp, `echo half >"$out.smolmachine"; kill -9 $$`, fault.Unavailable, "smolvm_failed", "killed"},
		{"it says ok and makes nothing", localHelp, `exit 0`, fault.IO, "image_io", "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newProject(t)
			p.packing(tt.help, tt.script)
			status, out, errs := p.run(doc(t), "--smolmachine", "--dir", p.dir, "--cache", p.cache)
			if status != tt.exit || !strings.Contains(out, `"code":"`+tt.code+`"`) || !strings.Contains(errs, tt.says) || strings.Count(errs, "\n") != 1 {
				t.Errorf("status %d\n%s%s", status, errs, out)
			}
			if left := p.derived(); len(left) != 0 {
				t.Errorf("half a pack: %v", left)
			}
			if left, _ := filepath.Glob(filepath.Join(p.cache, "tmp-*")); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}
