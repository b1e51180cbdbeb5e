// Package smolvmcalls is what smolvm is asked for its recordings: a table of
// calls, made in order against any smolvm, and what of the answers is kept.
//
// The recordings in testscripts/transcripts/smolvm/VERSION are made by it, are
// replayed by testscripts/fakesmolvm, and are compared with what a smolvm answers
// now by the canaries. A call whose answer is another at each run (process ids,
// times, rates) is made the same by Steady before it is kept, so that recording
// the same version again changes no file.
package smolvmcalls

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/smolvm"
)

// The files of a version, in the order in which they are replayed.
const (
	RecordsFile = "1-records.ndjson" // what needs no guest
	GuestFile   = "2-guest.ndjson"   // what needs one
	HelpFile    = "3-help.ndjson"
)

// Call is one call of smolvm. In its texts, W stands for the recorder's folder.
type Call struct {
	Name  string
	Argv  []string // without the program
	Stdin string
	Files map[string]string // written below W before the call

	// Slow calls need a guest that answers. One that does not yet is waited for:
	// what smolvm says then is chance. So is an answer without Says, a regular
	// expression. Redo is done before each further try.
	Slow bool
	Says string
	Redo [][]string
	// Leave is a regular expression for what is left out of the answer, because it
	// is said only when the guest answered soon.
	Leave string
	// Works ends the recording if the call does not end with 0: nothing that
	// comes after it would mean anything.
	Works bool
}

// Record is a call with its answer, a line of a transcript.
type Record struct {
	Name    string            `json:"name"`
	Version string            `json:"smolvm"`
	Argv    []string          `json:"argv"`
	Stdin   string            `json:"stdin,omitempty"`
	Files   map[string]string `json:"files,omitempty"`
	Exit    int               `json:"exit"`
	Stdout  string            `json:"stdout"`
	Stderr  string            `json:"stderr"`
}

// W and Home are what the recorder's own folders are called in the recordings.
const (
	Home = "/home/me"
	W    = Home + "/w"
)

// Recorder makes the calls. Dir is an empty folder, on a file system with sparse
// files; everything is below it, the smolvm's state too.
type Recorder struct {
	Bin     string
	Dir     string
	Version smolvm.Version
	Log     io.Writer // a line for each call
}

const (
	callLimit = 30 * time.Minute // emulated, on a busy host, a first start that unpacks
	slowTries = 30
	slowPause = 2 * time.Second
)

// Open makes the folders and asks for the version.
func Open(ctx context.Context, bin, dir string, log io.Writer) (*Recorder, error) {
	r := &Recorder{Bin: bin, Dir: dir, Log: log}
	for _, d := range []string{"home/w/dir", "home/w/src", "home/w/rootfs/bin"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	for name, text := range map[string]string{"f1": "up-content\n", "big": strings.Repeat("0123456789abcde\n", 3<<15)} {
		if err := os.WriteFile(r.real(filepath.Join(W, name)), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	c, err := smolvm.Open(ctx, bin, r.env())
	if err != nil {
		return nil, err
	}
	r.Version = c.Version
	return r, nil
}

func (r *Recorder) home() string { return filepath.Join(r.Dir, "home") }

// env is all that smolvm gets: what it answers must not depend on who records.
func (r *Recorder) env() []string {
	env := []string{"HOME=" + r.home(), "PATH=/usr/bin:/bin", "LC_ALL=C.UTF-8"}
	if os.Geteuid() == 0 {
		env = append(env, "SMOLVM_VM_UID_DROP=off")
	}
	return env
}

// real puts the recorder's own folder in place of the recordings'.
func (r *Recorder) real(s string) string { return strings.ReplaceAll(s, Home, r.home()) }

// Run makes the calls in order.
func (r *Recorder) Run(ctx context.Context, calls []Call) ([]Record, error) {
	seen := map[string]bool{}
	var out []Record
	for _, c := range calls {
		if seen[c.Name] {
			return nil, fmt.Errorf("two calls are named %s", c.Name)
		}
		seen[c.Name] = true
		rec, err := r.record(ctx, c)
		if err != nil {
			return nil, err
		}
		out = append(out, rec)
	}
	return out, nil
}

func (r *Recorder) record(ctx context.Context, c Call) (Record, error) {
	for name, text := range c.Files {
		if err := os.WriteFile(r.real(filepath.Join(W, name)), []byte(text), 0o644); err != nil {
			return Record{}, err
		}
	}
	for try := 1; ; try++ {
		start := time.Now()
		rec, err := r.call(ctx, c)
		if err != nil {
			return rec, fmt.Errorf("%s: %w", c.Name, err)
		}
		fmt.Fprintf(r.Log, "%s %s: %d, %.1f s\n", r.Version, c.Name, rec.Exit, time.Since(start).Seconds())
		if c.Leave != "" {
			leave := regexp.MustCompile(c.Leave)
			rec.Stdout, rec.Stderr = leave.ReplaceAllString(rec.Stdout, ""), leave.ReplaceAllString(rec.Stderr, "")
		}
		if !settled(c, rec) && try < slowTries {
			fmt.Fprintf(r.Log, "  not settled: %q %q\n", rec.Stdout, rec.Stderr)
			for _, argv := range c.Redo {
				if _, err := r.call(ctx, Call{Argv: argv}); err != nil {
					return rec, fmt.Errorf("%s: %w", c.Name, err)
				}
			}
			if err := sleep(ctx, slowPause); err != nil {
				return rec, err
			}
			continue
		}
		if c.Works && rec.Exit != 0 || !settled(c, rec) {
			return rec, fmt.Errorf("%s: %q ended with %d: %s%s", c.Name, rec.Argv, rec.Exit, rec.Stdout, rec.Stderr)
		}
		return rec, nil
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

var chance = regexp.MustCompile(`unreachable|is not running|not running yet|before the agent was ready|did not become ready`)

// settled tells whether an answer is more than that the guest is not there yet.
func settled(c Call, rec Record) bool {
	said := rec.Stdout + rec.Stderr
	if c.Slow && chance.MatchString(said) {
		return false
	}
	return c.Says == "" || regexp.MustCompile(c.Says).MatchString(said)
}

// call makes one call and keeps the steady part of its answer.
func (r *Recorder) call(ctx context.Context, c Call) (Record, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	args := []string{}
	for _, a := range c.Argv {
		args = append(args, r.real(a))
	}
	cmd := exec.CommandContext(ctx, r.Bin, args...)
	cmd.Dir, cmd.Env, cmd.Stdin = r.real(W), r.env(), strings.NewReader(c.Stdin)
	if c.Stdin == "" {
		cmd.Stdin = nil // /dev/null, as the wrapper has it
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second // a guest's monitor may keep the pipes
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); ctx.Err() != nil || cmd.ProcessState == nil || cmd.ProcessState.ExitCode() < 0 {
		return Record{}, fmt.Errorf("%q did not come to an end: %w: %s", c.Argv, errors.Join(err, ctx.Err()), stderr.String())
	}
	return Record{
		Name: c.Name, Version: r.Version.String(), Argv: append([]string{"smolvm"}, c.Argv...), Stdin: c.Stdin, Files: c.Files,
		Exit: cmd.ProcessState.ExitCode(), Stdout: r.steady(stdout.String()), Stderr: r.steady(stderr.String()),
	}, nil
}

func (r *Recorder) steady(s string) string {
	return Steady(strings.ReplaceAll(s, r.home(), Home))
}

var unsteady = []struct {
	what *regexp.Regexp
	with string
}{
	// A progress line: what stands at its end.
	{regexp.MustCompile(`[^\n]*\r([^\r\n]+)`), "$1"},
	{regexp.MustCompile(`\d+(\.\d+)? [KMG]?B/s`), "0 B/s"},
	{regexp.MustCompile(`(?m)^  preparing the workload .*\n`), ""},
	{regexp.MustCompile(`memory: [\d.]+ GiB of ([\d.]+) GiB used \(\d+%\), [\d.]+ GiB`), "memory: 0.00 GiB of $1 GiB used (0%), $1 GiB"},
	{regexp.MustCompile(`PID:? \d+`), "PID: <PID>"},
	{regexp.MustCompile(`"pid": \d+`), `"pid": <PID>`},
	{regexp.MustCompile(`"created_at": \d+`), `"created_at": 1700000000`},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`), "2023-11-14T22:13:20Z"},
	{regexp.MustCompile(`\bvm-[0-9a-f]{8}\b`), "vm-00000000"},
	// Registries that examples of the help name: the project names none.
	{regexp.MustCompile(`\bpypi` + `\.org\b`), "registry.example"},
	{regexp.MustCompile(`\bghcr` + `\.io\b`), "registry.example"},
	{regexp.MustCompile(`\blocal:[0-9a-f]{64}\b`), "local:" + strings.Repeat("0", 64)},
}

// Steady puts fixed values in place of those that are others at every call. The
// replayer gives <PID> back as a number.
func Steady(s string) string {
	for _, u := range unsteady {
		s = u.what.ReplaceAllString(s, u.with)
	}
	return s
}

// Records makes the calls that need no guest, and Help asks every subcommand for
// its help.
func (r *Recorder) Records(ctx context.Context) ([]Record, error) {
	recs, err := r.Run(ctx, Records(r.Version))
	return recs, errors.Join(err, r.clear(ctx))
}

// Guest makes the calls that need a guest. image is the tar of a root file
// system, self a program that answers "dial" (package main of record).
func (r *Recorder) Guest(ctx context.Context, image, self string) ([]Record, error) {
	tools := r.real(W + "/tools")
	if err := os.MkdirAll(tools, 0o755); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(filepath.Join(tools, "record"), data, 0o755)
	}
	if err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "tar", "-C", r.real(W+"/rootfs"), "-xf", image).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("unpacking %s: %w: %s", image, err, out)
	}
	stop, err := serve(r.real(W + "/gate.sock"))
	if err != nil {
		return nil, err
	}
	defer stop()
	recs, err := r.Run(ctx, Guest(r.Version))
	return recs, errors.Join(err, r.clear(ctx))
}

// clear removes the machines that a table left.
func (r *Recorder) clear(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	c := &smolvm.Client{Bin: r.Bin, Env: r.env(), Version: r.Version}
	list, err := c.MachineLs(ctx)
	for _, m := range list {
		err = errors.Join(err, c.MachineDelete(ctx, m.Name))
	}
	return err
}

var subcommand = regexp.MustCompile(`(?m)^  ([a-z][a-z-]*)(  |$)`)

// Help asks for the help of every subcommand that smolvm itself names.
func (r *Recorder) Help(ctx context.Context) ([]Record, error) {
	calls := []Call{{Name: "help", Argv: []string{"--help"}}}
	for _, group := range []string{"machine", "pack"} {
		calls = append(calls, Call{Name: "help-" + group, Argv: []string{group, "--help"}})
		rec, err := r.call(ctx, Call{Argv: []string{group, "--help"}})
		if err != nil {
			return nil, err
		}
		_, list, ok := strings.Cut(rec.Stdout, "Commands:\n")
		list, _, _ = strings.Cut(list, "\n\n")
		subs := subcommand.FindAllStringSubmatch(list, -1)
		if !ok || len(subs) < 3 {
			return nil, fmt.Errorf("%s --help names no commands: %q", group, rec.Stdout)
		}
		for _, sub := range subs {
			if sub[1] != "help" {
				calls = append(calls, Call{Name: "help-" + group + "-" + sub[1], Argv: []string{group, sub[1], "--help"}})
			}
		}
	}
	slices.SortFunc(calls, func(a, b Call) int { return strings.Compare(a.Name, b.Name) })
	return r.Run(ctx, calls)
}

// Write writes a transcript.
func Write(file string, recs []Record) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	for _, r := range recs {
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, b.Bytes(), 0o644)
}

// Read reads a transcript that Write wrote.
func Read(file string) ([]Record, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var recs []Record
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	for {
		var r Record
		err := dec.Decode(&r)
		if errors.Is(err, io.EOF) {
			return recs, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: record %d: %w", file, len(recs)+1, err)
		}
		recs = append(recs, r)
	}
}

// Recorded gives the versions below a folder of transcripts, oldest first.
func Recorded(dir string) ([]smolvm.Version, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var vs []smolvm.Version
	for _, e := range entries {
		v, err := smolvm.ParseVersion("smolvm " + e.Name())
		if err != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, e.Name(), RecordsFile)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		vs = append(vs, v)
	}
	slices.SortFunc(vs, func(a, b smolvm.Version) int {
		if a.Less(b) {
			return -1
		}
		return 1
	})
	return vs, nil
}

// Against gives the version whose recordings a smolvm of version v is compared
// with: its own, or the newest that is older.
func Against(recorded []smolvm.Version, v smolvm.Version) (smolvm.Version, bool) {
	for _, r := range slices.Backward(recorded) {
		if !v.Less(r) {
			return r, true
		}
	}
	return smolvm.Version{}, false
}

// Difference is a field of an answer that is not as it was recorded.
type Difference struct {
	Command, Field, Recorded, Now string
}

func (d Difference) String() string {
	if d.Field == "" {
		return fmt.Sprintf("%s: recorded: %s; now: %s", d.Command, d.Recorded, d.Now)
	}
	return fmt.Sprintf("%s: %s\n  recorded: %s\n  now:      %s", d.Command, d.Field, d.Recorded, d.Now)
}

// Compare tells what of the answers has changed. Texts are told line by line,
// JSON member by member.
func Compare(recorded, now []Record) []Difference {
	var out []Difference
	then := map[string]Record{}
	for _, r := range recorded {
		then[r.Name] = r
	}
	for _, n := range now {
		cmd := n.Name + ": " + strings.Join(n.Argv, " ")
		r, ok := then[n.Name]
		if !ok {
			out = append(out, Difference{Command: cmd, Recorded: "not there", Now: fmt.Sprintf("exit %d", n.Exit)})
			continue
		}
		delete(then, n.Name)
		add := func(field, recorded, now string) {
			if recorded != now {
				out = append(out, Difference{cmd, field, recorded, now})
			}
		}
		add("argv", strings.Join(r.Argv, " "), strings.Join(n.Argv, " "))
		add("exit", fmt.Sprint(r.Exit), fmt.Sprint(n.Exit))
		compareText("stdout", r.Stdout, n.Stdout, add)
		compareText("stderr", r.Stderr, n.Stderr, add)
	}
	for _, r := range recorded {
		if _, left := then[r.Name]; left {
			out = append(out, Difference{Command: r.Name + ": " + strings.Join(r.Argv, " "), Recorded: fmt.Sprintf("exit %d", r.Exit), Now: "not there"})
		}
	}
	return out
}

func compareText(stream, then, now string, add func(field, recorded, now string)) {
	if then == now {
		return
	}
	if a, b := members(stream, then), members(stream, now); a != nil && b != nil {
		compareLists(a, b, add)
		return
	}
	// Lines that only one of the two has: help texts gain some with each release.
	a, b := lines(then), lines(now)
	only := func(x, y []string) string {
		var out []string
		for _, l := range x {
			if !slices.Contains(y, l) {
				out = append(out, l)
			}
		}
		return strings.Join(out, "\n            ")
	}
	oa, ob := only(a, b), only(b, a)
	if oa == ob {
		oa, ob = fmt.Sprintf("%q", then), fmt.Sprintf("%q", now)
	}
	add(stream, oa, ob)
}

func lines(s string) []string {
	var out []string
	for l := range strings.Lines(s) {
		if l = strings.TrimSpace(l); l != "" {
			out = append(out, l)
		}
	}
	return out
}

// members flattens JSON to "stdout.0.state" and the like, or gives nil.
func members(name, text string) [][2]string {
	text = strings.ReplaceAll(text, "<PID>", "1")
	t := strings.TrimSpace(text)
	if !strings.HasPrefix(t, "{") && !strings.HasPrefix(t, "[") || !gjson.Valid(t) {
		return nil
	}
	out := [][2]string{}
	var walk func(name string, v gjson.Result)
	walk = func(name string, v gjson.Result) {
		if !v.IsArray() && !v.IsObject() || v.Raw == "[]" || v.Raw == "{}" {
			out = append(out, [2]string{name, v.Raw})
			return
		}
		i := 0
		v.ForEach(func(k, item gjson.Result) bool {
			at := k.String()
			if v.IsArray() {
				at = fmt.Sprint(i)
			}
			i++
			walk(name+"."+at, item)
			return true
		})
	}
	walk(name, gjson.Parse(t))
	return out
}

func compareLists(a, b [][2]string, add func(field, recorded, now string)) {
	const none = "(not there)"
	get := func(list [][2]string, name string) string {
		for _, m := range list {
			if m[0] == name {
				return m[1]
			}
		}
		return none
	}
	for _, m := range a {
		add(m[0], m[1], get(b, m[0]))
	}
	for _, m := range b {
		if get(a, m[0]) == none {
			add(m[0], none, m[1])
		}
	}
}

// Answers are what a smolvm says to all that needs no guest.
type Answers struct {
	Version smolvm.Version
	Records []Record
}

// Ask asks the smolvm bin all that needs no guest. dir is an empty folder.
func Ask(ctx context.Context, bin, dir string) (Answers, error) {
	r, err := Open(ctx, bin, dir, io.Discard)
	if err != nil {
		return Answers{}, err
	}
	recs, err := r.Records(ctx)
	if err != nil {
		return Answers{}, err
	}
	help, err := r.Help(ctx)
	return Answers{r.Version, append(recs, help...)}, err
}

// ReadAnswers reads what Ask would have been told by a recorded version.
func ReadAnswers(dir string, v smolvm.Version) ([]Record, error) {
	recs, err := Read(filepath.Join(dir, v.String(), RecordsFile))
	if err != nil {
		return nil, err
	}
	help, err := Read(filepath.Join(dir, v.String(), HelpFile))
	return append(recs, help...), err
}
