// Package docs runs what the documentation shows: manifests are loaded,
// documents pass the gate, shell blocks are run with real bottles.
//
// The fence tells what a block is:
//
//	```json, ```jsonc  a manifest, a document, a gate's refusal, or members of a
//	                   manifest's bottle (what does not start with a brace)
//	```sh              a script that works as it stands, in an empty folder
//	```sh norun        one that needs what a test has not
//	```console, ```text, ```mermaid   for the eye
//
// A block that is none of these fails the test.
package docs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/tailscale/hujson"
	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/testscripts/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const top = "../.."

type block struct {
	file string
	line int
	info string // what stands behind the fence
	text string
}

func (b block) String() string { return fmt.Sprintf("%s:%d", b.file, b.line) }

// blocks are the fenced blocks of every page. A fence that is never closed is an
// error.
func blocks(t *testing.T) []block {
	t.Helper()
	var pages []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md", "examples/*.md", "examples/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(top, pattern))
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, found...)
	}
	var all []block
	for _, page := range pages {
		raw, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		name, err := filepath.Rel(top, page)
		if err != nil {
			t.Fatal(err)
		}
		var open *block
		for i, line := range strings.Split(string(raw), "\n") {
			info, fence := strings.CutPrefix(strings.TrimSpace(line), "```")
			switch {
			case fence && open == nil:
				open = &block{file: name, line: i + 1, info: strings.TrimSpace(info)}
			case fence && info == "":
				all = append(all, *open)
				open = nil
			case open != nil:
				open.text += line + "\n"
			}
		}
		if open != nil {
			t.Errorf("%s: the block is not closed", open)
		}
	}
	if len(all) < 5 {
		t.Fatalf("%d blocks were found in %q", len(all), pages)
	}
	return all
}

func TestBlocks(t *testing.T) {
	for _, b := range blocks(t) {
		t.Run(b.String(), func(t *testing.T) {
			switch b.info {
			case "json", "jsonc":
				checkJSON(t, b)
			case "sh":
				runScript(t, b)
			case "sh norun", "console", "text", "mermaid":
			default:
				t.Errorf("a block of kind %q: write json, jsonc, sh, sh norun, console, text or mermaid behind the fence", b.info)
			}
		})
	}
}

func checkJSON(t *testing.T, b block) {
	t.Helper()
	text := strings.TrimSpace(b.text)
	if !strings.HasPrefix(text, "{") {
		// Members of a bottle. PORT stands for a number that a program chose.
		members := regexp.MustCompile(`\bPORT\b`).ReplaceAllString(text, "4711")
		load(t, `{"format_version":"1.0","bottles":{"dev":{`+members+`}},"agents":{"a":{"bottle":"dev","command":["a"]}}}`)
		return
	}
	std, err := hujson.Standardize([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if b.info == "json" && !gjson.Valid(text) {
		t.Error("comments or trailing commas: that is jsonc")
	}
	switch doc := gjson.ParseBytes(std); {
	case doc.Get("bottles").Exists():
		load(t, text)
	case doc.Get("format_version").Exists():
		checkDocuments(t, text)
	case doc.Get("error.code").Exists() && doc.Get("error.host").Exists() && doc.Get("error.reason").Exists(): // a gate's refusal
	case doc.Get("evidence").Exists() || doc.Get("verdict").Exists() || doc.Get("phase").Exists(): // a line of gc, the audit log, ls
	default:
		t.Errorf("neither a manifest, a document nor a line that a tool prints: %.200s", text)
	}
}

func load(t *testing.T, text string) {
	t.Helper()
	read := func(string) ([]byte, error) { return []byte("-----BEGIN CERTIFICATE-----\n"), nil }
	m, err := manifest.Load([]byte(text), "bottle.json", read)
	if err != nil {
		t.Fatal(err)
	}
	for _, agent := range m.Agents() {
		if _, err := m.Plan(agent); err != nil {
			t.Error(err)
		}
	}
}

// checkDocuments takes one document over several lines, or several on a line
// each.
func checkDocuments(t *testing.T, text string) {
	t.Helper()
	if err := plan.Gate([]byte(text)); err == nil {
		return
	}
	for _, line := range bytes.Split([]byte(text), []byte("\n")) {
		if err := plan.Gate(line); err != nil {
			t.Errorf("%v: %s", err, line)
		}
	}
}

func runScript(t *testing.T, b block) {
	t.Helper()
	w := harness.NewWorld(t)
	if r := w.Do(strings.NewReader(b.text), "sh", "-eu"); r.Code != 0 {
		t.Errorf("exit %d\n%s\nstdout: %s\nstderr: %s", r.Code, b.text, r.Out, r.Stderr)
	}
}

// TestExamples: every manifest that people would start from is one.
func TestExamples(t *testing.T) {
	found, err := filepath.Glob(filepath.Join(top, "examples", "*", "bottle.json"))
	if err != nil || len(found) < 4 {
		t.Fatalf("%q, %v", found, err)
	}
	w := harness.NewWorld(t)
	for _, path := range found {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		w.Write("bottle.json", string(raw))
		w.OK("bottle-plan check")
		if out := w.OK("bottle-plan --all | bottle-egress | jq -r .bottle.id"); out == "" {
			t.Errorf("%s plans nothing", path)
		}
	}
}

// TestLinks: a page that is linked to is there.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#\s]+)(#[^)]*)?\)`)
	pages, err := filepath.Glob(filepath.Join(top, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	own, err := filepath.Glob(filepath.Join(top, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range append(pages, own...) {
		raw, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(raw), -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(page), m[1])); err != nil {
				t.Errorf("%s links to %s, which is not there", page, m[1])
			}
		}
	}
}

// TestCodesOfSmolvm: each code that engine smolvm, its wrapper and a start again
// give a failure stands in exit-codes.md with its exit status.
func TestCodesOfSmolvm(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(top, "docs/exit-codes.md"))
	if err != nil {
		t.Fatal(err)
	}
	statuses := map[string]string{"CantCreate": "73", "Data": "65", "Host": "78", "IO": "74", "NoPerm": "77", "TempFail": "75", "Unavailable": "69", "Usage": "64"}
	said := map[string]string{} // code, and the row's statuses
	for _, row := range regexp.MustCompile(`(?m)^\| (`+"`[^|]*`"+`[^|]*) \| ([0-9, ]*) \|`).FindAllStringSubmatch(string(page), -1) {
		for _, code := range regexp.MustCompile("`([a-z_0-9]+)`").FindAllStringSubmatch(row[1], -1) {
			said[code[1]] += " " + row[2]
		}
	}
	var files []string
	for _, pattern := range []string{"lib/smolvm/*.go", "lib/smolvm/wheel/*.go", "lib/smolfile/*.go", "lib/engine/smolvm/*.go", "lib/keeper/again.go"} {
		found, err := filepath.Glob(filepath.Join(top, pattern))
		if err != nil || len(found) == 0 {
			t.Fatalf("%s: %v", pattern, err)
		}
		files = append(files, found...)
	}
	thrown := regexp.MustCompile(`(?:fault\.New\(fault\.(\w+), |Exit: fault\.(\w+), Code: |refuse\()"((?:smol|warm_|gate_|no_disk|not_stopped)\w*)"`)
	seen := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range thrown.FindAllStringSubmatch(string(src), -1) {
			seen++
			want := statuses[m[1]+m[2]]
			if m[1]+m[2] == "" {
				want = statuses["Host"] // what refuse gives
			}
			if got, ok := said[m[3]]; !ok {
				t.Errorf("%s: exit-codes.md does not have %s (%s)", file, m[3], want)
			} else if want == "" || !strings.Contains(got, want) {
				t.Errorf("%s: exit-codes.md has %s for %s, which is %s", file, got, m[3], want)
			}
		}
	}
	if seen < 40 {
		t.Errorf("only %d codes were found in the source", seen)
	}
}
