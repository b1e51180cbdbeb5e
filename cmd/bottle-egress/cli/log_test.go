package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
)

// logOf writes a log of three lines, the last of which is hostile.
func logOf(t *testing.T, path string, opts audit.Options) *audit.Log {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	opts.Bottle = "dev-01234567"
	l, err := audit.Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	l.Start()
	l.Write(audit.Event{Event: audit.KindConnect, Verdict: audit.Allow, Host: "api.example.com", Port: 443, From: "bottle.json:7:3"})
	l.Write(audit.Event{Event: audit.KindRequest, Verdict: audit.Deny, Code: "not_in_allowlist", Host: "a\x1b[2J.example", Port: 80, Method: "GET", Path: "/"})
	return l
}

func runIn(t *testing.T, env map[string]string, stdin string, args ...string) (int, string, string) {
	t.Helper()
	var out, errs bytes.Buffer
	status := Run(t.Context(), &tool.Proc{Name: "bottle-egress", Args: args, Stdin: strings.NewReader(stdin),
		Stdout: &out, Stderr: &errs, Getenv: func(k string) string { return env[k] }, Now: time.Now})
	return status, out.String(), errs.String()
}

func TestLog(t *testing.T) {
	home := t.TempDir()
	env := map[string]string{"HOME": home, "XDG_STATE_HOME": filepath.Join(home, "state"), "XDG_RUNTIME_DIR": home}
	dir := filepath.Join(home, "state/bottle/audit")
	path := filepath.Join(dir, "dev-01234567.jsonl")
	logOf(t, path, audit.Options{}).Close()
	older := filepath.Join(dir, "dev-00000000.jsonl")
	logOf(t, older, audit.Options{}).Close()
	os.Chtimes(older, time.Time{}, time.Now().Add(-time.Hour))

	doc := string(must(plan.New(bottle(allow("api.example.com", 443, "tls")))).Line())
	doc = strings.TrimSuffix(doc, "}") + `,"vm":{"id":"dev-01234567"}}` + "\n"
	whole := string(must(os.ReadFile(path)))
	for _, args := range [][]string{{"log", path}, {"log", "dev-01234567"}, {"log", "dev"}, {"log"}} {
		if status, out, errs := runIn(t, env, doc, args...); status != 0 || out != whole {
			t.Errorf("%q: %d %q %s", args, status, out, errs)
		}
	}
	status, out, _ := runIn(t, env, "", "log", "--pretty", "dev")
	if status != 0 || strings.Count(out, "\n") != 4 || strings.Contains(out, "\x1b") ||
		!strings.Contains(out, "connect  allow    api.example.com:443              from bottle.json:7:3") ||
		!strings.Contains(out, `GET / not_in_allowlist`) {
		t.Errorf("%d\n%s", status, out)
	}
	for _, c := range []struct {
		args []string
		exit int
		want string
	}{
		{[]string{"log", "nobody"}, fault.NoInput, "no_audit_log"},
		{[]string{"log", "./nothing"}, fault.NoInput, "audit log"},
		{[]string{"log", "a", "b"}, fault.Usage, "one bottle or file"},
		{[]string{"log", "--verify", "--follow", "dev"}, fault.Usage, "together"},
		{[]string{"log", "--pin", "sha256:" + strings.Repeat("0a", 32), "dev"}, fault.Usage, "add --verify"},
		{[]string{"log", "--verify", "--pin", "", "dev"}, fault.Usage, "a digest is sha256:"},
		{[]string{"log", "--verify", "--pin", "null", "dev"}, fault.Usage, "a digest is sha256:"},
		{[]string{"log", "dev", "--verify"}, fault.Usage, "--verify"},
	} {
		if status, out, errs := runIn(t, env, "", c.args...); status != c.exit || out != "" || !strings.Contains(errs, strings.TrimPrefix(c.want, "no_audit_log")) {
			t.Errorf("%q: %d %q %s", c.args, status, out, errs)
		}
	}
}

// learn and replay find the log of a bottle by its name, as log does.
func TestLogsByName(t *testing.T) {
	home := t.TempDir()
	env := map[string]string{"HOME": home, "XDG_STATE_HOME": filepath.Join(home, "state"), "XDG_RUNTIME_DIR": home}
	path := filepath.Join(home, "state/bottle/audit", "dev-01234567.jsonl")
	logOf(t, path, audit.Options{}).Close()
	doc := string(must(plan.New(bottle(allow("api.example.com", 443, "tls")))).Line()) + "\n"
	for _, args := range [][]string{{"learn", "--name", "x"}, {"replay"}} {
		status, byPath, errs := runIn(t, env, doc, append(args, path)...)
		if status > fault.No || byPath == "" {
			t.Fatalf("%q: %d %q %s", args, status, byPath, errs)
		}
		want := status
		for _, name := range []string{"dev", "dev-01234567"} {
			if status, out, errs := runIn(t, env, doc, append(args, name)...); status != want || out != byPath {
				t.Errorf("%q %s: %d %q %s", args, name, status, out, errs)
			}
		}
		if status, out, errs := runIn(t, env, doc, append(args, "nobody")...); status != fault.NoInput || out != "" ||
			!strings.Contains(errs, `no bottle "nobody", and no audit log of one`) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%q: %d %q %s", args, status, out, errs)
		}
	}
}

type gone struct{}

func (gone) Write([]byte) (int, error) { return 0, syscall.EPIPE }

// A reader that has seen enough, such as head, is told nothing.
func TestLogReaderGone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	logOf(t, path, audit.Options{}).Close()
	for _, args := range [][]string{{"log", path}, {"log", "--pretty", path}} {
		var errs bytes.Buffer
		status := Run(t.Context(), &tool.Proc{Name: "bottle-egress", Args: args, Stdin: strings.NewReader(""), Stdout: gone{}, Stderr: &errs,
			Getenv: func(string) string { return "" }, Now: time.Now})
		if status != fault.IO || errs.Len() != 0 {
			t.Errorf("%q: %d %s", args, status, &errs)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestLogVerify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	logOf(t, path, audit.Options{}).Close()
	status, out, errs := run("", "log", "--verify", path)
	var got struct {
		Verdict string
		Lines   int
		Head    audit.Head
		Break   *audit.Break
	}
	if json.Unmarshal([]byte(out), &got); status != 0 || got.Verdict != "whole" || got.Lines != 3 || got.Break != nil || errs != "" {
		t.Fatalf("%d %s %s", status, out, errs)
	}
	if status, _, _ := run("", "log", "--verify", "--pin", got.Head.SHA256, path); status != 0 {
		t.Error(status)
	}
	lines := strings.SplitAfter(string(must(os.ReadFile(path))), "\n")
	os.WriteFile(path, []byte(lines[0]+lines[1]), 0o600)
	if status, _, errs := run("", "log", "--verify", "--pin", got.Head.SHA256, path); status != fault.No || !strings.Contains(errs, "was cut") {
		t.Errorf("%d %s", status, errs)
	}
	os.WriteFile(path, []byte(strings.Join(lines[:1], "")+strings.Replace(lines[1], "api", "apl", 1)+lines[2]), 0o600)
	for _, args := range [][]string{{"log", "--verify", path}, {"log", "--verify", "--pretty", path}} {
		status, out, errs := run("", args...)
		if status != fault.No || !strings.Contains(out, "broken") || !strings.Contains(errs, path+":3: the line before it was changed") {
			t.Errorf("%d %s %s", status, out, errs)
		}
	}
	// What is no event does not get between the lines.
	os.WriteFile(path, []byte(lines[0]+"\x1b[2Jx\n"+lines[1]), 0o600)
	if status, out, errs := run("", "log", path); status != 0 || out != lines[0]+lines[1] || !strings.Contains(errs, path+`:2: 5 bytes that are no event: \x1b[2Jx`) {
		t.Errorf("%d %q %q", status, out, errs)
	}
}

// log --follow goes over the rotation, and ends with the bottle.
func TestLogFollow(t *testing.T) {
	home := t.TempDir()
	env := map[string]string{"HOME": home, "XDG_STATE_HOME": filepath.Join(home, "state"), "XDG_RUNTIME_DIR": home}
	path := filepath.Join(home, "state/bottle/audit/dev-01234567.jsonl")
	there := filepath.Join(home, "state/bottle/bottles/dev-01234567")
	os.MkdirAll(there, 0o700)
	l := logOf(t, path, audit.Options{MaxBytes: audit.MinMaxBytes, Keep: 20})
	out := new(lockedBuffer)
	done := make(chan int, 1)
	go func() {
		done <- Run(context.Background(), &tool.Proc{Name: "bottle-egress", Args: []string{"log", "--follow", "dev-01234567"},
			Stdin: strings.NewReader(""), Stdout: out, Stderr: out, Getenv: func(k string) string { return env[k] }, Now: time.Now})
	}()
	for range 500 {
		if strings.Contains(out.String(), `"seq":3`) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	for range 500 {
		l.Write(audit.Event{Event: audit.KindConnect, Verdict: audit.Deny, Host: strings.Repeat("x", 200)})
	}
	l.Close()
	os.Remove(there)
	if status := <-done; status != 0 {
		t.Error(status)
	}
	files := must(audit.Files(path))
	var want string
	for _, f := range files {
		want += string(must(os.ReadFile(f)))
	}
	if len(files) < 3 || out.String() != want {
		t.Errorf("%d files, %d bytes of %d", len(files), len(out.String()), len(want))
	}
}
