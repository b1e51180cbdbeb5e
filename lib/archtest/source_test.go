package archtest

import (
	"bytes"
	"errors"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// top is the folder with go.mod.
func top(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err == nil {
		_, err = os.Stat(filepath.Join(dir, "go.mod"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// files are the project's: those that git tracks, or would; all that are there
// where this is no checkout.
func files(t *testing.T) []string {
	t.Helper()
	root := top(t)
	cmd := exec.CommandContext(t.Context(), "git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	if out, err := cmd.Output(); err == nil {
		var all []string
		for _, name := range strings.Split(strings.TrimRight(string(out), "\x00"), "\x00") {
			if fi, err := os.Lstat(filepath.Join(root, name)); err == nil && fi.Mode().IsRegular() {
				all = append(all, name)
			}
		}
		return all
	}
	var all []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains([]string{".git", "bin", "node_modules"}, d.Name()) {
			return filepath.SkipDir
		}
		if d.Type().IsRegular() {
			rel, err := filepath.Rel(root, path)
			all = append(all, rel)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(top(t), name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return b
}

func TestFormatted(t *testing.T) {
	for _, name := range files(t) {
		if !strings.HasSuffix(name, ".go") {
			continue
		}
		src := read(t, name)
		want, err := format.Source(src)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !bytes.Equal(src, want) {
			t.Errorf("gofmt -w %s", name)
		}
	}
}

// unwanted stands in no file of the project. The words are put together here,
// so that this file is no exception.
var unwanted = []struct {
	re  *regexp.Regexp
	why string
}{
	{regexp.MustCompile(`(^|[^A-Za-z0-9_>.])/wo` + `rk/|/tmp/pipe` + `lock/|/root/(go|\.pyenv|\.cache)/`), "a path of one machine"},
	{regexp.MustCompile(`registry\.np` + `mjs|\bpypi\.o` + `rg|pythonho` + `sted\.org|proxy\.gol` + `ang\.org|sum\.gol` + `ang\.org|goproxy\.i` + `o\b|crat` + `es\.io`), "the host of a package registry: settings name it, the project does not"},
	{regexp.MustCompile(`\.\./sha` + `red/(design|facts)|sub` + `agent`), "nothing here points out of the project"},
	{regexp.MustCompile(`-----BEGIN (RSA |EC |OPENSSH )?PRIVATE K` + `EY-----\n[A-Za-z0-9+/]`), "a private key"},
}

func TestUnwantedText(t *testing.T) {
	for _, name := range files(t) {
		text := read(t, name)
		if bytes.IndexByte(text[:min(len(text), 8000)], 0) >= 0 {
			t.Errorf("%s is binary: nothing that a build makes is committed", name)
			continue
		}
		for _, u := range unwanted {
			if at := u.re.FindIndex(text); at != nil {
				t.Errorf("%s:%d: %q: %s", name, 1+bytes.Count(text[:at[0]], []byte("\n")), text[at[0]:at[1]], u.why)
			}
		}
	}
}

// TestPipelockYAMLIsPure: the file that writes the configuration is apart from
// the ones that run the program.
func TestPipelockYAMLIsPure(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(top(t), "lib/pipelock/yaml.go"), nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	for _, imp := range f.Imports {
		if p, _ := strconv.Unquote(imp.Path.Value); impure(p) {
			t.Errorf("lib/pipelock/yaml.go imports %s", p)
		}
	}
}

// TestPureTakesTheClock: a pure package is told the time.
func TestPureTakesTheClock(t *testing.T) {
	for _, p := range list(t) {
		if !slices.Contains(pure, p.name()) {
			continue
		}
		for _, f := range p.GoFiles {
			tree, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(tree, func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok {
					if x, ok := sel.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains([]string{"Now", "Since", "Until"}, sel.Sel.Name) {
						t.Errorf("%s/%s uses time.%s", p.name(), f, sel.Sel.Name)
					}
				}
				return true
			})
		}
	}
}
