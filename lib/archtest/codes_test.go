package archtest

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// untested codes, each with the reason why no test can bring it about.
var untested = map[string]string{
	// An operation on a file, descriptor or mount fails that has just worked:
	// only a broken disk or a full kernel does that.
	"aside_failed":       "renaming within one file system fails",
	"audit_log_denied":   "a file in a folder of our own cannot be opened",
	"ca_failed":          "crypto/rand or crypto/x509 fails",
	"copy_failed":        "a copy is broken off by the disk",
	"cover_failed":       "a bind mount fails in a namespace of our own",
	"diff_failed":        "git diff fails on two folders that were just read",
	"engine_delete":      "the engine's own folder cannot be removed",
	"engine_record":      "the engine's own file cannot be written",
	"gate_socket_failed": "accept fails on a listening socket",
	"lock_failed":        "flock fails for another reason than being held",
	"read_failed":        "the registry's disk fails",
	"remove_failed":      "a folder of our own cannot be removed",
	"still_mounted":      "a mount below a bottle's folder that we may not undo",
	"watch_failed":       "reading from inotify fails",
	// The moment is too short to hit on purpose.
	"image_changed": "an image changes while it is read",
	"lab_failed":    "the laboratory's own process dies",
	"keeper_failed": "bottle-keeper cannot be started though it is there",
	"keeper_gone":   "the keeper dies between two lines of its answer",
	"gate_failed":   "the gate cannot be started though it is there",
	"stop_failed":   "the engine cannot end a sandbox",
	"no_document":   "ready is recorded, and the document is gone",
	// What only the keeper or up can ask for, and never does.
	"bad_user":           "a plan is validated before an engine sees it",
	"no_command":         "exec refuses an empty command before an engine sees it",
	"no_pipelock_policy": "up chooses pipelock only with a policy for it",
	"host_uid":           "up gives a plain user's own ids",
	"run_dir_long":       "the registry gives runtime folders that are short enough",
	// Hosts that this one is not.
	"no_canaries":        "a host without a loopback interface",
	"no_inotify":         "a kernel without inotify",
	"no_lab_folder":      "a host whose temporary folder is full",
	"no_mount_namespace": "a host that forbids mount namespaces to root",
	"no_proc":            "a host without /proc",
	"no_self":            "a host without /proc/self/exe",
	"no_staging":         "a host where no tmpfs can be mounted",
	"no_terminal":        "a host without pseudo-terminals",
	"no_user_namespaces": "a host that forbids user namespaces",
	"no_git":             "a host without git",
	"workspace_too_big":  "a million files take longer to make than all other tests",
	"smolvm_no_pid":      "a running machine without a pid",
	"bad_record":         "a record of a major version that does not exist yet",
}

var codeForm = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)

// codes collects the error codes of the product, each with one place where it
// is made: fault.New(exit, "code", …), Code: "code", and the local shorthands
// that take a place and a code.
func codes(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, name := range files(t) {
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") ||
			!strings.HasPrefix(name, "lib/") && !strings.HasPrefix(name, "cmd/") {
			continue
		}
		set := token.NewFileSet()
		tree, err := parser.ParseFile(set, filepath.Join(top(t), name), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		add := func(e ast.Expr) {
			lit, ok := e.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING {
				return
			}
			if code, err := strconv.Unquote(lit.Value); err == nil && code != "" {
				if !codeForm.MatchString(code) {
					t.Errorf("%s: code %q is not snake_case", set.Position(lit.Pos()), code)
				}
				found[code] = set.Position(lit.Pos()).String()
			}
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if arg := codeArgument(n); arg >= 0 && arg < len(n.Args) {
					add(n.Args[arg])
				}
			case *ast.KeyValueExpr:
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Code" {
					add(n.Value)
				}
			}
			return true
		})
	}
	return found
}

// codeArgument tells which argument of a call is an error code.
func codeArgument(call *ast.CallExpr) int {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return -1
	}
	x, _ := sel.X.(*ast.Ident)
	switch {
	case x != nil && x.Name == "fault" && sel.Sel.Name == "New":
		return 1
	case sel.Sel.Name == "bad": // lib/manifest: place, code, …
		return 1
	case sel.Sel.Name == "refuse": // lib/plan: code, …
		return 0
	}
	return -1
}

// TestCodesAreTested: every code stands in a test, or in what a test compares
// with.
func TestCodesAreTested(t *testing.T) {
	var text bytes.Buffer
	for _, name := range files(t) {
		tests := strings.HasSuffix(name, "_test.go") && !strings.HasPrefix(name, "lib/archtest/") ||
			strings.HasSuffix(name, ".ct") || strings.Contains(name, "/testdata/")
		if tests {
			text.Write(read(t, name))
			text.WriteByte('\n')
		}
	}
	words := map[string]bool{}
	for _, w := range regexp.MustCompile(`[a-z][a-z0-9_]*`).FindAllString(text.String(), -1) {
		words[w] = true
	}
	all := codes(t)
	if len(all) < 100 {
		t.Fatalf("%d codes were found: the search is broken", len(all))
	}
	for _, code := range slices.Sorted(maps.Keys(all)) {
		switch _, excused := untested[code]; {
		case words[code] && excused:
			t.Errorf("%s is tested; strike it off the list", code)
		case !words[code] && !excused:
			t.Errorf("%s: no test has the code %q", strings.TrimPrefix(all[code], top(t)+"/"), code)
		}
	}
	for code := range untested {
		if _, ok := all[code]; !ok {
			t.Errorf("there is no code %q any more; strike it off the list", code)
		}
	}
}

// TestStatusesAreDocumented: docs/exit-codes.md has every exit status that is used.
func TestStatusesAreDocumented(t *testing.T) {
	doc := string(read(t, "docs/exit-codes.md"))
	if doc == "" {
		t.Fatal("docs/exit-codes.md is missing")
	}
	for _, status := range []int{0, 1, 3, 64, 65, 66, 69, 70, 73, 74, 75, 77, 78, 124, 125} {
		if !regexp.MustCompile(`\b` + strconv.Itoa(status) + `\b`).MatchString(doc) {
			t.Errorf("docs/exit-codes.md does not tell of %d", status)
		}
	}
}
