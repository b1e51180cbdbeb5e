package tool

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

type result struct {
	code           int
	stdout, stderr string
}

// run drives a small command: a filter with a verb, flags of every kind.
func run(t *testing.T, stdin string, env map[string]string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	p := &Proc{
		Name: "tool", Args: args, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errs,
		Getenv: func(k string) string { return env[k] }, Now: time.Now,
	}
	fs := p.Flags("tool")
	o := p.OutputFlags(fs)
	verb := p.Flags("tool verb")
	dir := verb.String("dir", "", "a `FOLDER`")
	apply := verb.Bool("apply", false, "act")
	var list List
	verb.Var(&list, "e", "repeatable")
	age := Duration(0)
	verb.Var(&age, "min-age", "`D`")
	p.Ambient(verb, "dir", "min-age")
	code := p.Run(context.Background(), &Command{
		Name: "tool", ShortUsage: "tool", ShortHelp: "a tool", FlagSet: fs,
		Subcommands: []*Command{{
			Name: "verb", ShortUsage: "tool verb", ShortHelp: "a verb", FlagSet: verb,
			Exec: func(_ context.Context, args []string) error {
				if err := CheckArgs(args); err != nil {
					return err
				}
				json.NewEncoder(&out).Encode([]any{*dir, *apply, list, time.Duration(age).String(), args})
				return nil
			},
		}, {
			Name: "fail", ShortUsage: "tool fail", ShortHelp: "fail",
			Exec: func(context.Context, []string) error {
				return errors.Join(
					fault.New(fault.Data, "one", "first\nproblem \x1b[31m").WithHint("do this"),
					fault.New(fault.Data, "two", "second"))
			},
		}, {
			Name: "bug", ShortUsage: "tool bug", ShortHelp: "bug",
			Exec: func(context.Context, []string) error { return errors.New("oops") },
		}},
		Exec: func(ctx context.Context, args []string) error {
			if err := NoArgs(args); err != nil {
				return err
			}
			return p.Filter(ctx, "stage", o, func(_ context.Context, d *plan.Doc) error {
				if d.Has("x-fail") {
					return fault.New(fault.Host, "unfit", "cannot")
				}
				return d.Set("pack", plan.Pack{Kind: "host", Digest: "host"})
			})
		},
	})
	return result{code, out.String(), errs.String()}
}

const good = `{"format_version":"1.0","x-a":1}`

func TestFlags(t *testing.T) {
	for _, tt := range []struct {
		name string
		env  map[string]string
		args []string
		code int
		out  string // stdout, or a part of stderr where code is not 0
	}{
		{"plain", nil, []string{"verb", "-dir", "d", "--apply", "a"}, 0, `["d",true,null,"0s",["a"]]`},
		{"repeatable", nil, []string{"verb", "-e", "A=1", "-e", "B=2"}, 0, `["",false,["A=1","B=2"],"0s",[]]`},
		{"given twice", nil, []string{"verb", "--dir", "a", "--dir", "b"}, 64, "given twice"},
		{"bool given twice", nil, []string{"verb", "--apply", "--apply"}, 64, "given twice"},
		{"from the environment", map[string]string{"BOTTLE_DIR": "e"}, []string{"verb"}, 0, `["e",false,null,"0s",[]]`},
		{"the flag wins", map[string]string{"BOTTLE_DIR": "e"}, []string{"verb", "--dir", "f"}, 0, `["f",false,null,"0s",[]]`},
		{"an act is no ambient flag", map[string]string{"BOTTLE_APPLY": "true"}, []string{"verb"}, 0, `["",false,null,"0s",[]]`},
		{"bad value in the environment", map[string]string{"BOTTLE_MIN_AGE": "x"}, []string{"verb"}, 64, "BOTTLE_MIN_AGE"},
		{"days", nil, []string{"verb", "--min-age", "2d"}, 0, `["",false,null,"48h0m0s",[]]`},
		{"more days than there are", nil, []string{"verb", "--min-age", "999999d"}, 64, `"999999d" is no number of days`},
		{"flag behind an argument", nil, []string{"verb", "a", "--apply"}, 64, "flags come first: --apply a"},
		{"unknown flag", nil, []string{"verb", "--nope"}, 64, "no such flag: --nope; see tool verb --help"},
		{"flag before the verb", nil, []string{"--pretty", "verb"}, 64, "--pretty stands before the verb verb; flags come behind it; see tool verb --help"},
		{"leftover argument", nil, []string{"nope"}, 64, `unexpected argument "nope"`},
		{"help", nil, []string{"verb", "--help"}, 0, "usage: tool verb"},
		{"version", nil, []string{"--version"}, 0, "tool devel"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := run(t, "", tt.env, tt.args...)
			where := r.stdout
			if tt.code != 0 {
				where = r.stderr
				if r.stdout != "" || strings.Count(r.stderr, "\n") != 1 || !strings.HasPrefix(r.stderr, "tool: error: ") {
					t.Errorf("want one error line on stderr alone: %q, %q", r.stdout, r.stderr)
				}
			}
			if r.code != tt.code || !strings.Contains(where, tt.out) {
				t.Errorf("code %d, %q; want %d, %q", r.code, where, tt.code, tt.out)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	if r := run(t, "", nil, "fail"); r.code != 65 || r.stderr != "tool: error: first problem ?[31m; do this\ntool: error: second\n" {
		t.Errorf("%d %q", r.code, r.stderr)
	}
	if r := run(t, "", nil, "bug"); r.code != 70 || !strings.Contains(r.stderr, "report it") {
		t.Errorf("%d %q", r.code, r.stderr)
	}
}

func TestFilter(t *testing.T) {
	failed := `{"format_version":"1.0","error":{"stage":"plan","code":"no_manifest","exit":66,"message":"m"}}`
	r := run(t, good+"\n"+failed+"\n"+`{"format_version":"1.0","x-fail":1}`+"\n", nil)
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	if r.code != 78 || len(lines) != 3 {
		t.Fatalf("code %d: %q %q", r.code, r.stdout, r.stderr)
	}
	if want := `{"format_version":"1.0","pack":{"digest":"host","kind":"host","size_bytes":0,"cached":false},"x-a":1}`; lines[0] != want {
		t.Errorf("good: %s", lines[0])
	}
	if lines[1] != failed {
		t.Errorf("a failed document was not forwarded as it is: %s", lines[1])
	}
	if want := `{"format_version":"1.0","x-fail":1,"error":{"stage":"stage","code":"unfit","exit":78,"message":"cannot"}}`; lines[2] != want {
		t.Errorf("bad: %s", lines[2])
	}
	if r := run(t, "", nil); r.code != 65 || !strings.Contains(r.stdout, `"code":"empty_input"`) {
		t.Errorf("empty stdin: %d %q", r.code, r.stdout)
	}
	if r := run(t, failed, nil); r.code != 66 || r.stderr != "" {
		t.Errorf("forwarding: %d %q", r.code, r.stderr)
	}
}

func TestOutputFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "out.json")
	if r := run(t, good, nil, "-o", file); r.code != 0 || r.stdout != "" {
		t.Fatalf("%+v", r)
	}
	if b, err := os.ReadFile(file); err != nil || !strings.HasSuffix(string(b), "\"x-a\":1}\n") {
		t.Errorf("%s, %v", b, err)
	}
	if r := run(t, good, nil, "-o", filepath.Join(file, "x")); r.code != 73 {
		t.Errorf("a folder that is none: %+v", r)
	}
	names, _ := filepath.Glob(filepath.Join(filepath.Dir(file), "*"))
	hidden, _ := filepath.Glob(filepath.Join(filepath.Dir(file), ".*"))
	if len(names)+len(hidden) != 1 {
		t.Errorf("left behind: %v %v", names, hidden)
	}
	if r := run(t, good, nil, "--pretty"); !strings.Contains(r.stdout, "\n  \"pack\"") {
		t.Errorf("%s", r.stdout)
	}
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestUnwritableStdoutUndoes(t *testing.T) {
	var errs bytes.Buffer
	p := &Proc{Name: "tool", Stdin: strings.NewReader(good), Stdout: brokenPipe{}, Stderr: &errs, Getenv: func(string) string { return "" }}
	undone := false
	err := p.Filter(context.Background(), "stage", p.StdoutOutput(),
		func(context.Context, *plan.Doc) error { return nil }, Undo(func(*plan.Doc) { undone = true }))
	if p.Report(err) != fault.IO || !undone {
		t.Errorf("%v, undone %v", err, undone)
	}
}

func TestAmbientNeedsTheFlag(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	p := &Proc{}
	p.Ambient(p.Flags("x"), "nope")
}

func TestNoCore(t *testing.T) {
	noCore()
	out, err := exec.Command("/bin/sh", "-c", "ulimit -c; ulimit -H -c").Output()
	if err != nil || string(out) != "0\n0\n" {
		t.Errorf("a process that was started has core limits %q, %v", out, err)
	}
}

// What narrows a command is not taken away by an empty value.
func TestFlagsThatCheck(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0a", 32)
	for _, bad := range []string{"", "null", "sha256:", digest + "0", digest[:len(digest)-2], strings.ToUpper(digest), digest[len("sha256:"):]} {
		if d := Digest("before"); d.Set(bad) == nil || d != "before" {
			t.Errorf("digest %q: %q", bad, d)
		}
	}
	var d Digest
	if err := d.Set(digest); err != nil || d.String() != digest {
		t.Error(d, err)
	}
	var f Filled
	if f.Set("") == nil || f.Set("x") != nil || f.String() != "x" {
		t.Error(f)
	}
}
