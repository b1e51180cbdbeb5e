package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/tool"
)

// run runs bottle-plan in dir with an environment of its own.
func run(t *testing.T, dir string, env map[string]string, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	t.Chdir(dir)
	var out, errs bytes.Buffer
	code = Run(context.Background(), &tool.Proc{
		Name: "bottle-plan", Args: args,
		Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errs,
		Getenv: func(k string) string { return env[k] }, Now: time.Now,
	})
	return code, out.String(), errs.String()
}

const two = `{"format_version":"1.0","bottles":{"dev":{}},"agents":{"b":{"bottle":"dev","command":["x"]},"a":{"bottle":"dev","command":["y"]}}}`

// folder makes a folder of files.
func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestStatuses(t *testing.T) {
	dir := folder(t, map[string]string{
		"bottle.json": two, "bad.json": `{"format_version":"1.0","bottles":{"dev":{"user":"admin","home":"x"}},"agents":{}}`,
		"root.json": `{"format_version":"1.0","bottles":{"dev":{"egress":{"roots":["./no.pem"]}}},"agents":{"a":{"bottle":"dev","command":["x"]}}}`,
		"home.json": `{"format_version":"1.0","bottles":{"dev":{"egress":{"roots":["~/ca.pem"]}}},"agents":{"a":{"bottle":"dev","command":["x"]}}}`,
		"fifo.json": `{"format_version":"1.0","bottles":{"dev":{"egress":{"roots":["fifo"]}}},"agents":{"a":{"bottle":"dev","command":["x"]}}}`,
		"h/ca.pem":  "-----BEGIN CERTIFICATE-----\n",
	})
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args  string
		stdin string
		code  int
		err   string // on stderr
		doc   string // code of the error document; "-" for none
	}{
		{args: "a"},
		{args: "a b"},
		{args: "--all"},
		{args: "--hash a"},
		{args: "-m - a", stdin: two},
		{args: "check"},
		{args: "check -m -", stdin: two},
		{args: "schema"},
		{args: "init"},
		{args: "--help"},
		{args: "init --help"},
		{args: "--version"},
		{args: "-m home.json", code: 0},
		{args: "", code: 64, err: "name one of a, b", doc: "which_agent"},
		{args: "c", code: 64, err: "its agents: a, b", doc: "unknown_agent"},
		{args: "chek", code: 64, err: "verbs: check", doc: "unknown_agent"},
		{args: "a a", code: 64, err: "named twice", doc: "usage"},
		{args: "a --hash", code: 64, err: "--hash a", doc: "-"},
		{args: "--all a", code: 64, err: "--all", doc: "-"},
		{args: "--hash --pretty a", code: 64, err: "--pretty", doc: "-"},
		{args: "--hash --hash a", code: 64, err: "twice", doc: "-"},
		{args: "--nope", code: 64, err: "nope", doc: "-"},
		{args: "check x", code: 64, err: "x", doc: "-"},
		{args: "schema x", code: 64, err: "x", doc: "-"},
		{args: "init x", code: 64, err: "x", doc: "-"},
		{args: "init --with cargo", code: 64, err: "npm, pip and go", doc: "-"},
		{args: "init --with go,go", code: 64, err: "twice", doc: "-"},
		{args: "-m nowhere.json", code: 66, err: "bottle-plan init", doc: "no_manifest"},
		{args: "-m .", code: 66, err: "folder", doc: "no_manifest"},
		{args: "check -m nowhere.json", code: 66, err: "nowhere.json", doc: "-"},
		{args: "--hash -m nowhere.json", code: 66, err: "nowhere.json", doc: "-"},
		{args: "-m root.json", code: 66, err: "no.pem", doc: "no_file"},
		{args: "-m fifo.json", code: 66, err: "not a regular file", doc: "unreadable_file"},
		{args: "-m bad.json", code: 65, err: "bad.json:1:50: bottles.dev.user: ", doc: "bad_value"},
		{args: "check -m bad.json", code: 65, err: "bottles.dev.home: ", doc: "-"},
		{args: "-m -", code: 65, err: "empty", doc: "empty_manifest"},
		{args: "-o nowhere/out a", code: 73, err: "nowhere/out", doc: "-"},
	} {
		name := tt.args
		if name == "" {
			name = "no arguments"
		}
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := run(t, dir, map[string]string{"HOME": filepath.Join(dir, "h")}, tt.stdin, strings.Fields(tt.args)...)
			if code != tt.code || !strings.Contains(stderr, tt.err) {
				t.Fatalf("exit %d, stderr %q; want %d saying %q", code, stderr, tt.code, tt.err)
			}
			switch {
			case tt.doc == "" && (stdout == "" || stderr != ""):
				t.Errorf("stdout %q, stderr %q", stdout, stderr)
			case tt.doc == "-" && stdout != "":
				t.Errorf("stdout %q", stdout)
			case tt.doc != "" && tt.doc != "-":
				var d struct {
					FormatVersion string `json:"format_version"`
					Error         struct {
						Stage, Code, Message string
						Exit                 int
					}
				}
				if err := json.Unmarshal([]byte(stdout), &d); err != nil || strings.Count(stdout, "\n") != 1 {
					t.Fatalf("%v: %s", err, stdout)
				}
				if d.FormatVersion != "1.0" || d.Error.Stage != "plan" || d.Error.Code != tt.doc || d.Error.Exit != tt.code || d.Error.Message == "" {
					t.Errorf("error document %s", stdout)
				}
			}
		})
	}
}

func TestAllIsSortedAndOneLineEach(t *testing.T) {
	dir := folder(t, map[string]string{"bottle.json": two})
	_, out, _ := run(t, dir, nil, "", "--all")
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != 2 || !strings.HasPrefix(lines[0], `{"format_version":"1.0","bottle":{"id":"a",`) || !strings.Contains(lines[1], `"id":"b"`) {
		t.Errorf("--all: %s", out)
	}
	_, out, _ = run(t, dir, nil, "", "--all", "--hash")
	if lines := strings.Fields(out); len(lines) != 4 || lines[1] != "a" || lines[3] != "b" || len(lines[0]) != 71 {
		t.Errorf("--all --hash: %s", out)
	}
}

func TestOutputFile(t *testing.T) {
	dir := folder(t, map[string]string{"bottle.json": two})
	_, want, _ := run(t, dir, nil, "", "a")
	code, stdout, stderr := run(t, dir, nil, "", "-o", "out", "a")
	got, err := os.ReadFile(filepath.Join(dir, "out"))
	if err != nil || code != 0 || stdout != "" || string(got) != want {
		t.Errorf("%d %v %s%s: %s", code, err, stdout, stderr, got)
	}
	if _, _, stderr := run(t, dir, nil, "", "-o", "nowhere/out", "a"); strings.Count(stderr, "error:") != 1 {
		t.Errorf("one failure, told more than once: %s", stderr)
	}
}

func TestEveryProblemIsTold(t *testing.T) {
	dir := folder(t, map[string]string{"bottle.json": `{"format_version":"1.0","bottles":{"dev":{"user":"x","home":"y","runtime":"z"}},"agents":{"a":{"bottle":"dev","command":["x"]}}}`})
	code, _, stderr := run(t, dir, nil, "", "check")
	if code != fault.Data || strings.Count(stderr, "bottle-plan: error: bottle.json:1:") != 3 {
		t.Errorf("%d %s", code, stderr)
	}
}

// The plan depends on the manifest and the files that it names, and on nothing
// else.
func TestHashIsTheSameEverywhere(t *testing.T) {
	_, start, _ := run(t, t.TempDir(), nil, "", "init")
	here := folder(t, map[string]string{"bottle.json": start})
	there := folder(t, map[string]string{"x/y/bottle.json": start, "x/y/.npmrc": "registry=https://evil.example\n", ".npmrc": "registry=https://npm.example\n"})
	_, a, _ := run(t, here, nil, "", "--hash")
	_, b, _ := run(t, there, map[string]string{"HOME": there, "GOPROXY": "https://go.example", "LANG": "tr_TR", "TZ": "Asia/Tokyo"}, "", "-m", "x/y/bottle.json", "--hash")
	if a == "" || a != b {
		t.Errorf("hash %q here, %q there", a, b)
	}
}

func TestInit(t *testing.T) {
	home := folder(t, map[string]string{
		".npmrc":                   "# comment\nregistry=https://user:hunter2@NPM.intra.example:8443/path/\n//npm.intra.example/:_authToken=hunter3\n@acme:registry = https://acme.example/\n@http:registry=http://plain.example\n@var:registry=https://${HOST}/\n",
		".config/pip/pip.conf":     "[global]\nindex-url = https://pip.intra.example/simple\nextra-index-url =\n    https://more.example/simple\n    https://pip.intra.example/other\nproxy = https://not-an-index.example\n",
		".config/go/env":           "GOPROXY=https://go.intra.example|https://*.bad.example,direct\nGOFLAGS=-mod=mod\n",
		"project/.npmrc":           "registry=https://evil.example/\n",
		"project/pip.conf":         "[global]\nindex-url=https://evil.example/\n",
		"empty/.config/go/env":     "GOFLAGS=x\n",
		"empty/.npmrc/not-a-file":  "",
		"project/.config/pip/conf": "",
	})
	project := filepath.Join(home, "project")
	code, out, stderr := run(t, project, map[string]string{"HOME": home, "PIP_EXTRA_INDEX_URL": "https://env.example https://more.example"}, "", "init", "--with", "npm,pip,go")
	if code != 0 {
		t.Fatalf("%d %s", code, stderr)
	}
	for _, want := range []string{
		`{ "host": "npm.intra.example", "ports": [8443], "why": "npm, from ~/.npmrc" },`,
		`{ "host": "acme.example", "why": "npm, from ~/.npmrc" },`,
		`{ "host": "pip.intra.example", "why": "pip, from ~/.config/pip/pip.conf" },`,
		`{ "host": "more.example", "why": "pip, from ~/.config/pip/pip.conf" },`,
		`{ "host": "env.example", "why": "pip, from PIP_EXTRA_INDEX_URL" },`,
		`{ "host": "go.intra.example", "why": "go, from ~/.config/go/env" },`,
	} {
		if strings.Count(out, want) != 1 {
			t.Errorf("%s is missing in\n%s", want, out)
		}
	}
	for _, never := range []string{"evil.example", "hunter", "user:", "plain.example", "not-an-index", "bad.example"} {
		if strings.Contains(out, never) {
			t.Errorf("%s is in\n%s", never, out)
		}
	}
	if strings.Contains(stderr, "hunter") || !strings.Contains(stderr, "not https") || !strings.Contains(stderr, "direct") || !strings.Contains(stderr, "variable") {
		t.Errorf("stderr: %s", stderr)
	}
	if code, got, stderr := run(t, project, nil, out, "-m", "-"); code != 0 || !strings.Contains(got, `"host":"npm.intra.example"`) {
		t.Errorf("the manifest is not good: %d %s", code, stderr)
	}

	code, out, stderr = run(t, project, map[string]string{"HOME": filepath.Join(home, "empty")}, "", "init", "--with", "go,npm")
	if code != 0 || out != starter || strings.Count(stderr, "no host was found") != 2 || !strings.Contains(stderr, "go env -w GOPROXY") {
		t.Errorf("nothing set: %d %s", code, stderr)
	}
	if _, out, _ := run(t, project, map[string]string{"HOME": home, "GOPROXY": "https://first.example,off"}, "", "init", "--with", "go"); !strings.Contains(out, "first.example") || strings.Contains(out, "go.intra.example") {
		t.Error("GOPROXY does not go before the file")
	}
}

// The starter is what newcomers run: no wildcard, nothing in the clear, and an
// allowlist that is not empty.
func TestStarter(t *testing.T) {
	if strings.Count(starter, allowMark) != 1 {
		t.Fatal("the place for hosts is not there once")
	}
	_, out, _ := run(t, t.TempDir(), nil, starter, "-m", "-")
	var d struct {
		Bottle struct {
			Image   struct{ Kind string }
			Command []string
			Egress  struct {
				Rules []struct{ Verdict, Class, Protocol string }
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		t.Fatal(err)
	}
	if d.Bottle.Image.Kind != "host" || d.Bottle.Command[0] != "bash" || len(d.Bottle.Egress.Rules) == 0 {
		t.Errorf("%+v", d)
	}
	for _, r := range d.Bottle.Egress.Rules {
		if r.Verdict != "allow" || r.Class != "exact" || r.Protocol != "tls" {
			t.Errorf("%+v", r)
		}
	}
	// What is commented out is good as well, once the comments go.
	comment := regexp.MustCompile(`(?m)^( *)// ( *("[a-zA-Z_]+": |"api\.|\{ "host"|\}))`)
	uncommented := comment.ReplaceAllString(starter, "$1$2")
	if n := strings.Count(starter, "//") - strings.Count(uncommented, "//"); n < 8 {
		t.Errorf("only %d lines were uncommented", n)
	}
	code, out, stderr := run(t, t.TempDir(), nil, uncommented, "check", "-m", "-")
	if code != 0 || !strings.Contains(out, "bash, claude") {
		t.Errorf("uncommented: %s%s", out, stderr)
	}
}

// A FIFO in the manifest's place must not hold the tool up; a pipe that the
// caller hands over is read.
func TestManifestThatIsNoFile(t *testing.T) {
	dir := folder(t, nil)
	if err := syscall.Mkfifo(filepath.Join(dir, "bottle.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := run(t, dir, nil, "", "a"); code != fault.NoInput || !strings.Contains(stderr, "not a regular file") {
		t.Errorf("%d %q", code, stderr)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.WriteString(two); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if code, stdout, stderr := run(t, dir, nil, "", "-m", fmt.Sprintf("/dev/fd/%d", r.Fd()), "a"); code != 0 || stdout == "" {
		t.Errorf("%d %q %q", code, stdout, stderr)
	}
}
