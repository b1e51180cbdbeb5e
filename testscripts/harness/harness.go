// Package harness runs the go-cmdtest suites of testscripts/. Every tool name
// is a command that gives its whole line to "sh -c": real pipes, real
// processes, real exit statuses.
//
// In a .ct file stdout comes first as it is, then stderr, each line behind
// "2> ". The folder is the classification: unit needs no bottle, integration
// starts some, canaries asks pinned programs from outside.
package harness

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmdtest"

	egress "github.com/bottle-tools/bottle/cmd/bottle-egress/cli"
	gc "github.com/bottle-tools/bottle/cmd/bottle-gc/cli"
	pack "github.com/bottle-tools/bottle/cmd/bottle-pack/cli"
	planner "github.com/bottle-tools/bottle/cmd/bottle-plan/cli"
	prober "github.com/bottle-tools/bottle/cmd/bottle-probe/cli"
	vm "github.com/bottle-tools/bottle/cmd/bottle-vm/cli"
	"github.com/bottle-tools/bottle/lib/tool"
)

var bodies = map[string]func(context.Context, *tool.Proc) int{
	"bottle-plan":   planner.Run,
	"bottle-egress": egress.Run,
	"bottle-pack":   pack.Run,
	"bottle-vm":     vm.Run,
	"bottle-gc":     gc.Run,
	"bottle-probe":  prober.Run,
}

// commands that a line may start with, beside the tools and the scripts in
// testscripts/testdata/bin.
var shells = []string{"sh", "bottle", "printf", "env", "test", "jq", "grep", "cmp", "ln"}

var update = flag.Bool("update", false, "write what the commands answer into the .ct files")

// Main is TestMain's body: under a tool's name the test binary is that tool, so
// that suites need no build and their coverage is one.
func Main(m *testing.M) {
	name := filepath.Base(os.Args[0])
	if body, ok := bodies[name]; ok {
		tool.Main(name, body)
	}
	code := m.Run()
	uninstall()
	os.Exit(code)
}

// Suite is one folder of .ct files.
type Suite struct {
	Dir string
	// Bin is a folder with the tools, first on PATH. Empty: links to this test
	// binary.
	Bin string
	// Env is added to the environment of each file.
	Env []string
}

// Run runs the suite. A folder without a file is an error: cmdtest would pass.
func (s Suite) Run(t *testing.T) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.Dir, "*.ct"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no .ct file in %s (%v)", s.Dir, err)
	}
	ts, err := cmdtest.Read(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	ts.DisableLogging = true
	bin := s.Bin
	if bin == "" {
		bin = Links(t)
	}
	var names []string
	for name := range bodies {
		names = append(names, name)
	}
	data := filepath.Join(repo(t), "testscripts", "testdata")
	builders, err := filepath.Glob(filepath.Join(data, "bin", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range builders {
		names = append(names, filepath.Base(b))
	}
	run := shortDir(t)
	for _, name := range append(names, shells...) {
		ts.Commands[name] = func(args []string, input string) ([]byte, error) {
			line := strings.Join(append([]string{name}, args...), " ")
			if input != "" {
				line += " < " + input
			}
			return shell(line)
		}
	}
	// setenv of one file leaks into the next: each starts from the same.
	base := os.Environ()
	t.Cleanup(func() { restore(base) })
	ts.Setup = func(root string) error {
		restore(nil)
		for _, kv := range append([]string{
			"PATH=" + bin + ":" + filepath.Join(data, "bin") + ":" + pathOf(base), "HOME=" + filepath.Join(root, "home"), "ROOTDIR=" + root,
			"XDG_STATE_HOME=" + filepath.Join(root, "state"), "XDG_CACHE_HOME=" + filepath.Join(root, "cache"),
			"XDG_RUNTIME_DIR=" + run, "TESTDATA=" + data,
			"LC_ALL=C", "TMPDIR=" + os.TempDir(),
		}, s.Env...) {
			k, v, _ := strings.Cut(kv, "=")
			if err := os.Setenv(k, v); err != nil {
				return err
			}
		}
		return os.Mkdir(filepath.Join(root, "home"), 0o700)
	}
	ts.Run(t, *update)
}

// shortDir is a folder for sockets: their paths have 108 bytes at most.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "br-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func restore(environ []string) {
	os.Clearenv()
	for _, kv := range environ {
		k, v, _ := strings.Cut(kv, "=")
		os.Setenv(k, v)
	}
}

func pathOf(environ []string) string {
	for _, kv := range environ {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			return v
		}
	}
	return "/usr/bin:/bin"
}

// Links makes a folder in which every tool is a link to this test binary.
func Links(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name := range bodies {
		if err := os.Symlink(self, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func shell(line string) ([]byte, error) {
	cmd := exec.Command("sh", "-c", line)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	out := normalise(stdout.String())
	for _, l := range strings.Split(strings.TrimRight(stderr.String(), "\n"), "\n") {
		if l != "" {
			out += "2> " + normalise(l)
		}
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return []byte(out), &cmdtest.ExitCodeErr{Msg: line, Code: exit.ExitCode()}
	}
	return []byte(out), err
}

var (
	vmID = regexp.MustCompile(`\b([a-z0-9][a-z0-9-]{0,39})-[0-9a-f]{8}\b`)
	tmp  = regexp.MustCompile(`/tmp/[A-Za-z0-9_.-]+/[0-9]+`)
)

// normalise takes what differs from run to run out of an answer. The root
// folder must not start a line: cmdtest would read it back as a command.
func normalise(s string) string {
	if root := os.Getenv("ROOTDIR"); root != "" {
		s = strings.ReplaceAll(s, root, "<root>")
	}
	for _, name := range []string{"XDG_RUNTIME_DIR", "TESTDATA"} {
		if dir := os.Getenv(name); dir != "" {
			s = strings.ReplaceAll(s, dir, "<"+strings.ToLower(name)+">")
		}
	}
	s = vmID.ReplaceAllString(s, "$1-<id>")
	s = tmp.ReplaceAllString(s, "<tmp>")
	if s != "" && !strings.HasSuffix(s, "\n") {
		s += "\n"
	}
	return s
}

// Bin gives the folder that make build fills. Without it the test fails: to
// skip would be to pass.
func Bin(t testing.TB) string {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join(repo(t), "bin"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bottle-vm", "bottle-keeper", "bottle-egress", "bottle-guest", "bottle-runsc"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Fatalf("%v: run make build first", err)
		}
	}
	return dir
}

// repo is the folder with go.mod above the test.
func repo(t testing.TB) string {
	dir, err := os.Getwd()
	for err == nil {
		if _, e := os.Stat(filepath.Join(dir, "go.mod")); e == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			err = fmt.Errorf("no go.mod above the test")
		}
		dir = filepath.Dir(dir)
	}
	t.Fatal(err)
	return ""
}
