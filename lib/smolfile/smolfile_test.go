package smolfile

import (
	"bufio"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// The releases that the recordings were made from.
var releases = []string{"1.9.1", "1.32.2"}

// recording gives one recorded call of smolvm: what it said, and the Smolfile.
func recording(t *testing.T, release, name string) (exit int, stderr, file string) {
	t.Helper()
	f, err := os.Open(filepath.Join("..", "..", "testscripts", "transcripts", "smolvm", release, "1-records.ndjson"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 16<<20)
	for s.Scan() {
		var call struct {
			Name, Stderr string
			Exit         int
			Files        map[string]string
		}
		if err := json.Unmarshal(s.Bytes(), &call); err != nil {
			t.Fatal(err)
		}
		if call.Name == name {
			for _, text := range call.Files {
				file = text
			}
			return call.Exit, call.Stderr, file
		}
	}
	t.Fatalf("no recording is called %s", name)
	return 0, "", ""
}

// legal is the list of fields that smolvm's strict parser itself names.
func legal(t *testing.T, release string) map[string]bool {
	t.Helper()
	_, stderr, _ := recording(t, release, "smolfile-unknown")
	_, list, ok := strings.Cut(stderr, "expected one of ")
	if !ok {
		t.Fatalf("the recording has no list of fields: %s", stderr)
	}
	fields := map[string]bool{}
	for _, m := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(list, -1) {
		fields[m[1]] = true
	}
	if len(fields) < 20 {
		t.Fatalf("only %d fields in the recording", len(fields))
	}
	return fields
}

func full() *plan.Bottle {
	return &plan.Bottle{
		Runtime:   plan.Runtime{Candidates: []plan.Candidate{{Engine: "smolvm"}, {Engine: "gvisor"}}},
		Env:       []plan.EnvVar{{Name: "LANG", Value: "C.UTF-8"}, {Name: "ODD", Value: "a \"b\"\n'c' \\ = é\t\x1b"}, {Name: "EMPTY", Value: ""}},
		Resources: plan.Resources{CPUs: 2, MemoryMiB: 4096, Pids: 512},
	}
}

// readable decodes a Smolfile, whose fields every release has to know.
func readable(t *testing.T, text []byte) (got map[string]any) {
	t.Helper()
	if _, err := toml.Decode(string(text), &got); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	for _, release := range releases {
		fields := legal(t, release)
		for name := range got {
			if !fields[name] {
				t.Errorf("smolvm %s knows no field %q", release, name)
			}
		}
	}
	return got
}

func TestFieldsAreThoseOfSmolvm(t *testing.T) {
	text, err := FromPlan(full()).TOML()
	if err != nil {
		t.Fatal(err)
	}
	got := readable(t, text)
	want := map[string]any{
		"net": false, "workdir": "/workspace", "cpus": int64(2), "memory": int64(4096),
		"env": []any{"LANG=C.UTF-8", "ODD=a \"b\"\n'c' \\ = é\t\x1b", "EMPTY="},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("parsed back (-want +got):\n%s", diff)
	}
}

// TestTypesAreThoseOfTheRecording compares with the Smolfile that smolvm took.
func TestTypesAreThoseOfTheRecording(t *testing.T) {
	var taken, ours map[string]any
	for _, release := range releases {
		exit, stderr, file := recording(t, release, "smolfile-ok")
		if exit != 0 {
			t.Fatalf("smolvm %s refused the Smolfile: %s", release, stderr)
		}
		if _, err := toml.Decode(file, &taken); err != nil {
			t.Fatal(err)
		}
	}
	text, err := FromPlan(full()).TOML()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := toml.Decode(string(text), &ours); err != nil {
		t.Fatal(err)
	}
	for name, v := range ours {
		other, ok := taken[name]
		if !ok {
			t.Errorf("no recording shows that smolvm takes %q", name)
			continue
		}
		if a, b := kind(v), kind(other); a != b {
			t.Errorf("%s is a %s, recorded as a %s", name, a, b)
		}
	}
}

func kind(v any) string {
	switch v.(type) {
	case string:
		return "string"
	case int64:
		return "integer"
	case bool:
		return "boolean"
	case []any:
		return "array"
	}
	return "table"
}

// What is of one host is there for the engine and in no document.
func TestHostsOwn(t *testing.T) {
	f := FromPlan(full())
	if f.Entrypoint != nil || f.Volumes != nil {
		t.Errorf("%+v", f)
	}
	f.Entrypoint = []string{"/opt/bottle/guest", "init", "/opt/bottle/config.json"}
	f.Volumes = []string{"/home/me/a \"b\"\n[network]:/workspace", "/x:/opt/bottle:ro"}
	text, err := f.TOML()
	if err != nil {
		t.Fatal(err)
	}
	got := readable(t, text)
	if diff := cmp.Diff([]any{f.Volumes[0], f.Volumes[1]}, got["volumes"]); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]any{"/opt/bottle/guest", "init", "/opt/bottle/config.json"}, got["entrypoint"]); diff != "" {
		t.Error(diff)
	}
}

func TestMinimal(t *testing.T) {
	text, err := FromPlan(&plan.Bottle{}).TOML()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(text), "workdir = \"/workspace\"\nnet = false\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestRefused(t *testing.T) {
	env := func(name, value string) File { return File{Env: []plan.EnvVar{{Name: name, Value: value}}} }
	tests := []struct {
		name string
		file File
		exit int
		code string
	}{
		{"too many cpus", File{CPUs: 256}, fault.Host, "smolfile_limit"},
		{"negative cpus", File{CPUs: -1}, fault.Host, "smolfile_limit"},
		{"too much memory", File{MemoryMiB: 1 << 32}, fault.Host, "smolfile_limit"},
		{"name without a name", env("", "x"), fault.Data, "smolfile_env"},
		{"name with =", env("A=B", "x"), fault.Data, "smolfile_env"},
		{"name with NUL", env("A\x00", "x"), fault.Data, "smolfile_env"},
		{"value with NUL", env("A", "x\x00y"), fault.Data, "smolfile_env"},
		{"a path that is no UTF-8", File{Volumes: []string{"/a\xff:/workspace"}}, fault.Host, "smolfile_text"},
		{"a path with NUL", File{Entrypoint: []string{"/a\x00"}}, fault.Host, "smolfile_text"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tt.file.TOML()
			var f *fault.Error
			if !errors.As(err, &f) || f.Exit != tt.exit || f.Code != tt.code || f.Hint == "" {
				t.Errorf("got %#v, want %s (%d)", err, tt.code, tt.exit)
			}
		})
	}
}

func TestSection(t *testing.T) {
	b := full()
	text, err := Section(b)
	if err != nil || !strings.Contains(text, "net = false\n") {
		t.Errorf("Section = %q, %v", text, err)
	}
	b.Runtime.Candidates = b.Runtime.Candidates[1:]
	if text, err := Section(b); text != "" || err != nil {
		t.Errorf("Section without smolvm = %q, %v", text, err)
	}
}

func FuzzTOML(f *testing.F) {
	f.Add("A", "b", 1, 512)
	f.Add("A", "\"\"\"\n[network]\nallow_hosts = [\"x\"]", 0, 0)
	f.Fuzz(func(t *testing.T, name, value string, cpus, memory int) {
		text, err := File{Env: []plan.EnvVar{{Name: name, Value: value}}, CPUs: cpus, MemoryMiB: memory}.TOML()
		if err != nil {
			return
		}
		var got struct {
			Env     []string
			CPUs    int
			Memory  int
			Net     *bool
			Workdir string
		}
		meta, err := toml.Decode(string(text), &got)
		if err != nil {
			// Documents are UTF-8 before they come here; TOML has no other text.
			if strings.ToValidUTF8(name+value, "") != name+value {
				return
			}
			t.Fatalf("%v in %q", err, text)
		}
		if len(meta.Undecoded()) > 0 {
			t.Fatalf("a value became the fields %v", meta.Undecoded())
		}
		if got.Net == nil || *got.Net || len(got.Env) != 1 || got.CPUs != cpus || got.Memory != memory {
			t.Fatalf("%q is read as %+v", text, got)
		}
		if strings.ToValidUTF8(name+value, "") == name+value && got.Env[0] != name+"="+value {
			t.Fatalf("env %q is read as %q", name+"="+value, got.Env[0])
		}
	})
}
