// Package archtest holds the rules of the house as tests: who may import whom,
// which package runs which outside program, that every error code is tested,
// and what may not stand in any file. docs/architecture.md gives the reasons.
package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/bottle-tools/bottle/"

// pkg is what go list tells of a package of ours.
type pkg struct {
	ImportPath string
	Dir        string
	GoFiles    []string
	Imports    []string
}

func (p pkg) name() string { return strings.TrimPrefix(p.ImportPath, module) }

// list gives our packages, without their tests.
func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Dir,GoFiles,Imports", "./...")
	cmd.Dir = top(t)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var all []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 20 {
		t.Fatalf("go list found %d packages", len(all))
	}
	return all
}

// mains may import more than their own cli and lib/tool.
var mains = map[string][]string{
	"cmd/bottle-keeper": {"lib/keeper", "lib/fault"},
}

// pure packages decide and describe: what they are told is all they know.
var pure = []string{"lib/plan", "lib/manifest", "lib/policy", "lib/plandiff", "lib/orphan", "lib/smolfile", "lib/fault"}

// runners are the packages that start a process, and which.
var runners = map[string]string{
	"lib/engine/gvisor":        "nothing itself: it hands exec.Cmd's streams and errors to lib/runsc",
	"lib/engine/smolvm/runner": "smolvm's boot helper",
	"lib/gateproc":             "bottle-egress, as a bottle's gate",
	"lib/keeper":               "bottle-keeper",
	"lib/mountns":              "bottle-keeper itself, among mounts",
	"lib/pipelock":             "pipelock",
	"lib/probe":                "the sandbox under test, the host's git over what it left, and bottle-probe in its roles",
	"lib/runsc":                "runsc",
	"lib/secret":               "the command: sources of a manifest",
	"lib/sign":                 "ssh-keygen",
	"lib/child":                "pipelock and mitmdump while they run, each for its package (children)",
	"lib/smolvm":               "smolvm",
	"lib/smolvm/wheel":         "pip, to fetch smolvm",
	"lib/worktree":             "git, for diff",
	// for tests
	"lib/pipelock/pipelocktest": "the test itself, in namespaces",
	"lib/sidecar/sidecartest":   "pip, for the real mitmdump",
}

// children are the packages whose programs lib/child runs.
var children = []string{"lib/pipelock", "lib/sidecar"}

// formats are third-party libraries of which one package makes use.
var formats = map[string]string{
	"github.com/tailscale/hujson":             "lib/manifest",
	"go.yaml.in/yaml/v3":                      "lib/pipelock",
	"github.com/BurntSushi/toml":              "lib/smolfile",
	"github.com/elazarl/goproxy":              "lib/gate",
	"github.com/zricethezav/gitleaks/":        "lib/dlp",
	"github.com/pelletier/go-toml/":           "lib/dlp", // for gitleaks' rules; its configuration brings it along
	"github.com/klauspost/compress":           "lib/dlp",
	"github.com/google/go-containerregistry/": "lib/image",
	"github.com/peterbourgon/ff/v3":           "lib/tool",
	"golang.org/x/net/idna":                   "lib/policy",
	"golang.org/x/net/dns/":                   "lib/guest/helper",
	"github.com/creack/pty":                   "lib/engine/gvisor",
}

func TestImports(t *testing.T) {
	for _, p := range list(t) {
		for _, imp := range p.Imports {
			if why := forbidden(p.name(), imp); why != "" {
				t.Errorf("%s imports %s: %s", p.name(), strings.TrimPrefix(imp, module), why)
			}
		}
	}
}

func forbidden(name, imp string) string {
	own, isOwn := strings.CutPrefix(imp, module)
	kind, rest, _ := strings.Cut(name, "/")
	if kind == "testscripts" || strings.HasSuffix(name, "test") { // lib/x/xtest serves tests alone
		return foreignToTests(name, imp)
	}
	if !isOwn {
		return foreign(name, imp)
	}
	if strings.HasPrefix(own, "testscripts/") {
		return "the product does not use its tests"
	}
	if own == "lib/child" && !slices.Contains(children, name) {
		return "each outside program has one adapter; if this is a new one, add it to children"
	}
	switch {
	case kind == "lib" && strings.HasPrefix(own, "cmd/"):
		return "lib never imports cmd"
	case kind == "cmd" && strings.HasSuffix(rest, "/cli"):
		if strings.HasPrefix(own, "cmd/") {
			return "a command's body imports lib/ only, never another command"
		}
	case kind == "cmd":
		if own != name+"/cli" && own != "lib/tool" && !slices.Contains(mains[name], own) {
			return "a main is a name and an exit: its own cli and lib/tool"
		}
	}
	return ""
}

// foreignToTests: what tests share may use everything but another program's
// adapter's place.
func foreignToTests(name, imp string) string {
	if _, ok := runners[name]; imp == "os/exec" && !ok && !strings.HasPrefix(name, "testscripts/") {
		return "add it to runners"
	}
	return ""
}

func foreign(name, imp string) string {
	for prefix, owner := range formats {
		if (imp == prefix || strings.HasPrefix(imp, strings.TrimSuffix(prefix, "/")+"/")) && name != owner {
			return owner + " is the one package for it"
		}
	}
	if _, ok := runners[name]; imp == "os/exec" && !ok {
		return "each outside program has one adapter; if this is a new one, add it to runners"
	}
	if slices.Contains(pure, name) && impure(imp) {
		return "this package is pure: no process, no network, no files"
	}
	return ""
}

func impure(imp string) bool {
	return imp == "net" || strings.HasPrefix(imp, "net/") && imp != "net/netip" && imp != "net/url" ||
		imp == "os" || strings.HasPrefix(imp, "os/") || imp == "syscall" || imp == "golang.org/x/sys/unix"
}

// TestPureAllTheWay: what a pure package of ours imports of ours is pure too.
func TestPureAllTheWay(t *testing.T) {
	byName := map[string]pkg{}
	for _, p := range list(t) {
		byName[p.name()] = p
	}
	for _, name := range pure {
		if _, ok := byName[name]; !ok {
			t.Errorf("%s is gone; strike it off the list", name)
		}
		seen := map[string]bool{}
		var walk func(string)
		walk = func(n string) {
			if seen[n] {
				return
			}
			seen[n] = true
			for _, imp := range byName[n].Imports {
				if impure(imp) {
					t.Errorf("%s reaches %s by way of %s", name, imp, n)
				}
				if own, ok := strings.CutPrefix(imp, module); ok {
					walk(own)
				}
			}
		}
		walk(name)
	}
}

// TestLists: an entry that nobody needs any more hides the next mistake.
func TestLists(t *testing.T) {
	uses := map[string][]string{}
	for _, p := range list(t) {
		uses[p.name()] = p.Imports
		switch path.Base(p.name()) {
		case "util", "utils", "common", "helpers", "misc", "shared":
			t.Errorf("%s: a package is called after what it does", p.name())
		}
	}
	for name := range runners {
		if !slices.Contains(uses[name], "os/exec") {
			t.Errorf("%s does not import os/exec; strike it off runners", name)
		}
	}
	for prefix, owner := range formats {
		if !slices.ContainsFunc(uses[owner], func(imp string) bool { return strings.HasPrefix(imp, prefix) }) {
			t.Errorf("%s does not import %s; strike it off formats", owner, prefix)
		}
	}
}

// TestRulesInTheGateAlone: what looks for secrets is large, and only the gate
// has a use for it.
func TestRulesInTheGateAlone(t *testing.T) {
	byName := map[string]pkg{}
	for _, p := range list(t) {
		byName[p.name()] = p
	}
	for name := range byName {
		if !strings.HasPrefix(name, "cmd/") || strings.HasSuffix(name, "/cli") {
			continue
		}
		seen := map[string]bool{}
		var walk func(string)
		walk = func(n string) {
			if seen[n] {
				return
			}
			seen[n] = true
			for _, imp := range byName[n].Imports {
				if own, ok := strings.CutPrefix(imp, module); ok {
					walk(own)
				}
			}
		}
		walk(name)
		if seen["lib/dlp"] && name != "cmd/bottle-egress" {
			t.Errorf("%s links lib/dlp", name)
		}
	}
}
