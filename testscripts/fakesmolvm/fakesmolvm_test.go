package fakesmolvm

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const recordings = "../transcripts/smolvm"

// call replays args and gives status, stdout and stderr.
func call(t *testing.T, env map[string]string, stdin string, args ...string) (int, string, string) {
	t.Helper()
	var out, errs bytes.Buffer
	code := Run(args, func(k string) string { return env[k] }, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, body := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestReplaysTheRecordings(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	env := map[string]string{"BOTTLE_TRANSCRIPTS": recordings, "BOTTLE_TRANSCRIPT_LOG": log, "BOTTLE_TRANSCRIPT_VERSION": "1.9.1"}
	if code, out, _ := call(t, env, "", "--version"); code != 0 || out != "smolvm 1.9.1\n" {
		t.Errorf("%d %q", code, out)
	}
	if code, out, errs := call(t, env, "", "machine", "exec", "--name", "vm-a", "--", "sh", "-c", "echo out; echo err >&2; exit 4"); code != 4 || out != "out\n" || errs != "err\n" {
		t.Errorf("%d %q %q", code, out, errs)
	}
	if code, _, _ := call(t, env, "abc", "machine", "exec", "--name", "vm-a", "-i", "--", "sh", "-c", "cat; exit 7"); code != 7 {
		t.Errorf("stdin: %d", code)
	}
	if code, _, errs := call(t, env, "other", "machine", "exec", "--name", "vm-a", "-i", "--", "sh", "-c", "cat; exit 7"); code != Unexpected || !strings.Contains(errs, "stdin") {
		t.Errorf("another stdin: %d %q", code, errs)
	}
	for _, args := range [][]string{{"machine", "frobnicate"}, {}, {"--version", ""}, {"machine", "exec", "--name", "vm-a", "--", "sh", "-c", "exit  3"}} {
		if code, out, errs := call(t, env, "", args...); code != Unexpected || out != "" || !strings.Contains(errs, "unexpected call") {
			t.Errorf("%q: %d %q %q", args, code, out, errs)
		}
	}
	data, err := os.ReadFile(log)
	if err != nil || strings.Count(string(data), "\n") != 8 || !strings.Contains(string(data), `{"argv":["smolvm","machine","frobnicate"],"record":"","exit":97}`) ||
		!strings.Contains(string(data), `"record":"version","exit":0}`) {
		t.Errorf("%v\n%s", err, data)
	}
}

func TestSameArgvInOrder(t *testing.T) {
	env := map[string]string{"BOTTLE_TRANSCRIPTS": recordings, "BOTTLE_TRANSCRIPT_VERSION": "1.9.1"}
	ls := []string{"machine", "ls", "--json"}
	if code, _, errs := call(t, env, "", ls...); code != Unexpected || !strings.Contains(errs, "BOTTLE_TRANSCRIPT_STATE") {
		t.Errorf("ambiguous: %d %q", code, errs)
	}
	env["BOTTLE_TRANSCRIPT_STATE"] = filepath.Join(t.TempDir(), "state")
	_, first, _ := call(t, env, "", ls...)
	_, second, _ := call(t, env, "", ls...)
	call(t, env, "", ls...)
	_, third, _ := call(t, env, "", ls...)
	if first != "[]\n" || !strings.Contains(second, `"created"`) || !strings.Contains(third, `"pid": 4194304`) {
		t.Errorf("%q %.40q %.40q", first, second, third)
	}
	env["BOTTLE_TRANSCRIPT_VERSION"] = "1.32.2"
	env["BOTTLE_TRANSCRIPT_STATE"] = filepath.Join(t.TempDir(), "state")
	call(t, env, "", ls...)
	if _, out, _ := call(t, env, "", ls...); !strings.Contains(out, "branchable") {
		t.Errorf("%.60q", out)
	}
	for range 10 {
		call(t, env, "", ls...)
	}
	for range 3 { // the last one for ever
		if code, out, _ := call(t, env, "", ls...); code != 0 || !strings.Contains(out, "branchable") {
			t.Errorf("%d %.60q", code, out)
		}
	}
	if err := os.WriteFile(env["BOTTLE_TRANSCRIPT_STATE"], []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, _ := call(t, env, "", ls...); code != Unexpected {
		t.Error("a broken state file was accepted")
	}
}

func TestFiles(t *testing.T) {
	dir := folder(t, map[string]string{
		"a.json":        `[{"name":"one","argv":["smolvm","one"],"exit":3,"stdout":"1"},{"name":"x","argv":["pipelock","one"],"exit":9}]`,
		"sub/b.ndjson":  `{"argv":["/usr/bin/smolvm","two"],"exit":0,"stdout":"2"}` + "\n" + `{"argv":["smolvm","two","3"],"exit":0}` + "\n",
		"c.json":        `{"argv":["smolvm","three"],"exit":0}`,
		"d.txt":         "not read",
		"e.ndjson":      "",
		"config.ndjson": `{"config":"another kind of record"}`,
	})
	env := map[string]string{"BOTTLE_TRANSCRIPTS": dir}
	for arg, want := range map[string]int{"one": 3, "two": 0, "three": 0, "four": Unexpected} {
		if code, _, errs := call(t, env, "", arg); code != want {
			t.Errorf("%s: %d %s", arg, code, errs)
		}
	}
	for name, files := range map[string]map[string]string{
		"not JSON":   {"a.ndjson": "{"},
		"no exit":    {"a.ndjson": `{"name":"x","argv":["smolvm","y"]}`},
		"wrong type": {"a.json": `[{"argv":"smolvm","exit":0}]`},
		"no files":   {"a.txt": ""},
	} {
		env := map[string]string{"BOTTLE_TRANSCRIPTS": folder(t, files)}
		if code, _, errs := call(t, env, "", "y"); code != Unexpected || errs == "" {
			t.Errorf("%s: %d %q", name, code, errs)
		}
	}
	for name, env := range map[string]map[string]string{"unset": {}, "no such folder": {"BOTTLE_TRANSCRIPTS": dir + "/none"}} {
		if code, _, errs := call(t, env, "", "one"); code != Unexpected || errs == "" {
			t.Errorf("%s: %d %q", name, code, errs)
		}
	}
}
