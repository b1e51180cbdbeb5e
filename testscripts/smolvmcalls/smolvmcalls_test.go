package smolvmcalls

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/smolvm/smolvmtest"
	"github.com/bottle-tools/bottle/lib/smolvm/wheel"
)

func TestMain(m *testing.M) { smolvmtest.Main(m) }

const transcripts = "../transcripts/smolvm"

// The transcripts are what this table makes: each version has every call of it,
// in its order, with its arguments, and every pinned version is recorded.
func TestTranscriptsAreOfThisTable(t *testing.T) {
	versions, err := Recorded(transcripts)
	if err != nil {
		t.Fatal(err)
	}
	for _, pinned := range wheel.Versions() {
		if !slices.ContainsFunc(versions, func(v smolvm.Version) bool { return v.String() == pinned }) {
			t.Errorf("smolvm %s is pinned and not recorded: scripts/record-smolvm %s", pinned, pinned)
		}
	}
	for _, v := range versions {
		for file, calls := range map[string][]Call{RecordsFile: Records(v), GuestFile: Guest(v)} {
			recs, err := Read(filepath.Join(transcripts, v.String(), file))
			if err != nil {
				t.Error(err)
				continue
			}
			if len(recs) != len(calls) {
				t.Errorf("%s %s: %d records of %d calls: record it again", v, file, len(recs), len(calls))
				continue
			}
			for i, c := range calls {
				r := recs[i]
				if r.Name != c.Name || !slices.Equal(r.Argv[1:], c.Argv) || r.Stdin != c.Stdin || r.Version != v.String() {
					t.Errorf("%s %s: %s is recorded as %+v: record it again", v, file, c.Name, r)
				}
				if Steady(r.Stdout) != r.Stdout || Steady(r.Stderr) != r.Stderr {
					t.Errorf("%s %s: %s: an answer that is another each time: %q %q", v, file, c.Name, r.Stdout, r.Stderr)
				}
			}
		}
		help, err := Read(filepath.Join(transcripts, v.String(), HelpFile))
		if err != nil || len(help) < 20 {
			t.Errorf("%s: %d help texts, %v", v, len(help), err)
		}
	}
}

// A recording that is written and read again is the same, byte for byte.
func TestWriteIsStable(t *testing.T) {
	file := filepath.Join(transcripts, wheel.Newest, RecordsFile)
	recs, err := Read(file)
	if err != nil {
		t.Fatal(err)
	}
	again := filepath.Join(t.TempDir(), "x", "again.ndjson")
	if err := Write(again, recs); err != nil {
		t.Fatal(err)
	}
	a, _ := os.ReadFile(file)
	b, err := os.ReadFile(again)
	if err != nil || !bytes.Equal(a, b) {
		t.Errorf("%v: %d bytes became %d", err, len(a), len(b))
	}
}

func TestSteady(t *testing.T) {
	for in, want := range map[string]string{
		"Machine 'a' running (PID: 4711)\n":                            "Machine 'a' running (PID: <PID>)\n",
		"unreachable (PID 12 alive":                                    "unreachable (PID: <PID> alive",
		"\rUp a: 1 B / 2 B (1.5 MB/s)\rUp a: 2 B / 2 B (143 B/s)\nx\n": "Up a: 2 B / 2 B (0 B/s)\nx\n",
		"first\n\rPulling...\rPulling... done\n":                       "first\nPulling... done\n",
		`{"pid": 12, "created_at": 1795447910}`:                        `{"pid": <PID>, "created_at": 1700000000}`,
		`{"pid": null}`:                                                `{"pid": null}`,
		"at 2026-11-23T15:53:25.123Z vm-48cfdad1 vm-a":                 "at 2023-11-14T22:13:20Z vm-00000000 vm-a",
		"nothing": "nothing",
	} {
		if got := Steady(in); got != want || Steady(got) != got {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func rec(name string, exit int, stdout, stderr string) Record {
	return Record{Name: name, Argv: []string{"smolvm", name}, Exit: exit, Stdout: stdout, Stderr: stderr}
}

func TestCompare(t *testing.T) {
	recorded := []Record{
		rec("same", 0, `{"pid": <PID>}`, "x"),
		rec("exit", 0, "", ""),
		rec("json", 0, `[{"name": "a", "pid": <PID>, "state": "created", "old": 1, "labels": {}}]`, ""),
		rec("help", 0, "  --name\n  --gone\n", ""),
		rec("order", 0, "a\nb\n", ""),
		rec("err", 1, "", `{"error":{"code":"NOT_FOUND","message":"vm not found: x"}}`),
		rec("left", 0, "", ""),
	}
	now := []Record{
		rec("same", 0, `{"pid": <PID>}`, "x"),
		rec("exit", 1, "", "Error: no\n"),
		rec("json", 0, `[{"name": "a", "pid": <PID>, "state": "made", "labels": {"k": "v"}, "new": [1]}]`, ""),
		rec("help", 0, "  --name\n  --fresh\n", ""),
		rec("order", 0, "b\na\n", ""),
		rec("err", 1, "", `{"error":{"code":"NO_MACHINE","message":"vm not found: x"}}`),
		rec("added", 2, "", ""),
	}
	var got []string
	for _, d := range Compare(recorded, now) {
		got = append(got, strings.Join([]string{d.Command, d.Field, d.Recorded, d.Now}, "|"))
	}
	want := []string{
		"exit: smolvm exit|exit|0|1",
		"exit: smolvm exit|stderr||Error: no",
		`json: smolvm json|stdout.0.state|"created"|"made"`,
		"json: smolvm json|stdout.0.old|1|(not there)",
		`json: smolvm json|stdout.0.labels|{}|(not there)`,
		`json: smolvm json|stdout.0.labels.k|(not there)|"v"`,
		"json: smolvm json|stdout.0.new.0|(not there)|1",
		"help: smolvm help|stdout|--gone|--fresh",
		`order: smolvm order|stdout|"a\nb\n"|"b\na\n"`,
		`err: smolvm err|stderr.error.code|"NOT_FOUND"|"NO_MACHINE"`,
		"added: smolvm added||not there|exit 2",
		"left: smolvm left||exit 0|not there",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if d := Compare(recorded, recorded); len(d) != 0 {
		t.Errorf("the same differs: %v", d)
	}
}

func TestAgainst(t *testing.T) {
	a, b := smolvm.Version{1, 9, 1}, smolvm.Version{1, 32, 2}
	for v, want := range map[smolvm.Version]smolvm.Version{{1, 9, 1}: a, {1, 20, 0}: a, {1, 32, 2}: b, {2, 0, 0}: b} {
		if got, ok := Against([]smolvm.Version{a, b}, v); !ok || got != want {
			t.Errorf("%s: %s, %v", v, got, ok)
		}
	}
	if got, ok := Against([]smolvm.Version{a, b}, smolvm.Version{1, 9, 0}); ok {
		t.Errorf("an older one: %s", got)
	}
}

// The recorder, on a smolvm that replays what was recorded: it makes every call,
// and keeps what was said.
func TestRecorderOnTheReplayer(t *testing.T) {
	dir, err := filepath.Abs(transcripts)
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range wheel.Versions() {
		f := smolvmtest.NewFake(t, version, dir)
		// The recorder gives its smolvm an environment of its own.
		bin := filepath.Join(t.TempDir(), "smolvm")
		script := "#!/bin/sh\nexport " + strings.Join(quoted(f.Env), " ") + "\n" +
			`n=$#; while [ $n -gt 0 ]; do a=$(printf '%s' "$1" | sed "s|$HOME|/home/me|g"); shift; set -- "$@" "$a"; n=$((n-1)); done` + "\nexec " + f.Bin + ` "$@"` + "\n"
		if err := os.WriteFile(bin, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		r, err := Open(t.Context(), bin, t.TempDir(), io.Discard)
		if err != nil || r.Version.String() != version {
			t.Fatalf("Open: %v, %v", r, err)
		}
		got, err := r.Run(t.Context(), Records(r.Version)[1:]) // Open asked for the version
		if err != nil {
			t.Fatal(err)
		}
		want, err := Read(filepath.Join(transcripts, version, RecordsFile))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range Compare(want[1:], got) {
			t.Errorf("%s: %s", version, d)
		}
	}
}

func quoted(env []string) []string {
	var out []string
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		out = append(out, name+"='"+value+"'")
	}
	return out
}

// Answers of a guest that is not there yet are waited for, and a start that fails
// for good ends the recording.
func TestSlowGuests(t *testing.T) {
	dir := t.TempDir()
	bin := filepath.Join(dir, "smolvm")
	body := `case "$*" in
--version) echo "smolvm 1.9.1";;
redo) echo redo >>` + dir + `/log;;
wait) echo wait >>` + dir + `/log; if [ "$(grep -c wait ` + dir + `/log)" -lt 2 ]; then echo "Machine is unreachable (PID 1)"; else echo there; fi;;
fail) echo "Error: KvmOpen" >&2; exit 1;;
esac`
	if err := os.WriteFile(bin, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	r, err := Open(t.Context(), bin, t.TempDir(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	recs, err := r.Run(t.Context(), []Call{{Name: "a", Argv: []string{"wait"}, Slow: true, Redo: [][]string{{"redo"}}}})
	if err != nil || len(recs) != 1 || recs[0].Stdout != "there\n" {
		t.Errorf("%+v, %v", recs, err)
	}
	if log, _ := os.ReadFile(dir + "/log"); string(log) != "wait\nredo\nwait\n" {
		t.Errorf("%q", log)
	}
	if _, err := r.Run(t.Context(), []Call{{Name: "a", Argv: []string{"fail"}, Works: true}}); err == nil || !strings.Contains(err.Error(), "KvmOpen") {
		t.Errorf("%v", err)
	}
	if _, err := r.Run(t.Context(), []Call{{Name: "a"}, {Name: "a"}}); err == nil {
		t.Error("two calls of one name")
	}
}

func TestDial(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	stop, err := serve(socket)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	Dial(&out, []string{"unix=" + socket, "tcp=127.0.0.1:" + HostPort, "unix=" + socket + "x"})
	stop()
	Dial(&out, []string{"tcp=127.0.0.1:" + HostPort})
	want := "unix=" + socket + ": the host answers\ntcp=127.0.0.1:" + HostPort + ": the host answers\nunix=" + socket + "x: no connection\ntcp=127.0.0.1:" + HostPort + ": no connection\n"
	if out.String() != want {
		t.Errorf("%s, want %s", &out, want)
	}
}

// What the real program answers today is what was recorded.
func TestRealAgreesWithRecordings(t *testing.T) {
	versions, err := Recorded(transcripts)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range versions {
		t.Run(v.String(), func(t *testing.T) {
			now, err := Ask(t.Context(), smolvmtest.Real(t, v.String()), t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			recorded, err := ReadAnswers(transcripts, v)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range Compare(recorded, now.Records) {
				t.Errorf("%s", d)
			}
			if t.Failed() {
				t.Errorf("record it again: scripts/record-smolvm %s", v)
			}
		})
	}
}

// Releases differ, and what does is found: the canary can fail.
func TestReleasesDiffer(t *testing.T) {
	versions, err := Recorded(transcripts)
	if err != nil || len(versions) < 2 {
		t.Fatalf("%v, %v", versions, err)
	}
	old, err := ReadAnswers(transcripts, versions[0])
	if err != nil {
		t.Fatal(err)
	}
	newest, err := ReadAnswers(transcripts, versions[len(versions)-1])
	if err != nil {
		t.Fatal(err)
	}
	said := ""
	for _, d := range Compare(old, newest) {
		said += d.String() + "\n"
	}
	for _, want := range []string{"stdout.0.branchable\n  recorded: (not there)", "--state-dir", "delete-unasked: smolvm machine delete --name vm-a: exit\n  recorded: 0\n  now:      1", "help-machine-fork: smolvm machine fork --help: recorded: exit 0; now: not there"} {
		if !strings.Contains(said, want) {
			t.Errorf("%q is not in\n%.4000s", want, said)
		}
	}
}
