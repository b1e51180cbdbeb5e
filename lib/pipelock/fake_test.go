package pipelock

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The fake is this test binary, started through a small script, because Start
// leaves pipelock no environment by which it could be told what to play. It
// replays recordings of pipelock 2.3 where there are some, byte for byte, and
// otherwise speaks its protocol with the recorded texts.

const recordings = "../../testscripts/transcripts/pipelock"

// record is one line of a recording.
type record struct {
	Name   string   `json:"name"`
	Config string   `json:"config"`
	Argv   []string `json:"argv"`
	Exit   int      `json:"exit"`
	Stdout string   `json:"stdout"`
	Stderr string   `json:"stderr"`
	Log    string   `json:"log"`
}

func load(file string) ([]record, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []record
	for d := json.NewDecoder(f); ; {
		var r record
		switch err := d.Decode(&r); {
		case errors.Is(err, io.EOF):
			return all, nil
		case err != nil:
			return nil, err
		}
		all = append(all, r)
	}
}

func TestMain(m *testing.M) {
	if dir := os.Getenv("FAKE_PIPELOCK"); dir != "" {
		os.Exit(fake(dir, os.Getenv("FAKE_PLAY"), os.Args[1:]))
	}
	os.Exit(m.Run())
}

// fakeProgram makes an executable that plays one part.
func fakeProgram(t *testing.T, play string) *Program {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs(recordings)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "pipelock")
	run := "exec"
	if play == "wrapped" {
		run = "env" // the shell stays in between
	}
	script := fmt.Sprintf("#!/bin/sh\nunset PWD OLDPWD _\nFAKE_PIPELOCK='%s' FAKE_PLAY='%s' %s '%s' \"$@\"\nexit $?\n", dir, play, run, self)
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return &Program{Path: path}
}

func fake(dir, play string, argv []string) int {
	switch argv[0] {
	case "--version":
		return fakeVersion(play)
	case "check":
		return fakeCheck(dir, play, argv)
	case "run":
		return fakeRun(dir, play, argv[2])
	}
	fmt.Fprintln(os.Stderr, "fake: unexpected", argv)
	return 99
}

func fakeVersion(play string) int {
	switch play {
	case "hang":
		time.Sleep(time.Minute)
	case "version-fails":
		fmt.Fprintln(os.Stderr, "cannot start")
		return 3
	case "version-garbage":
		fmt.Print(strings.Repeat("not a lock \x1b[2J\xff", 100_000))
		return 0
	}
	fmt.Printf("pipelock version %s\n  build date: unknown\n", strings.TrimPrefix(play, "version-"))
	return 0
}

// fakeCheck answers with the recording of the same configuration.
func fakeCheck(dir, play string, argv []string) int {
	if play == "hang" {
		time.Sleep(time.Minute)
	}
	config, err := os.ReadFile(argv[2])
	if err != nil {
		return 99
	}
	all, err := load(filepath.Join(dir, "check.ndjson"))
	if err != nil {
		return 99
	}
	for _, r := range all {
		if r.Config == string(config) && len(r.Argv) == len(argv)+1 && r.Name == play {
			fmt.Fprint(os.Stderr, r.Stderr)
			fmt.Fprint(os.Stdout, r.Stdout)
			return r.Exit
		}
	}
	fmt.Fprintf(os.Stderr, "fake: no recording %s for this configuration and %q\n", play, argv)
	return 99
}

// fakeRun replays a run that ended by itself, or serves.
func fakeRun(dir, play, file string) int {
	all, err := load(filepath.Join(dir, "run.ndjson"))
	if err != nil {
		return 99
	}
	for _, r := range all {
		if r.Name == play {
			fmt.Fprint(os.Stderr, r.Stderr)
			fmt.Fprint(os.Stdout, r.Stdout)
			return r.Exit
		}
	}
	return (&fakeServer{dir: dir, play: play, file: file}).run()
}

type fakeServer struct {
	dir, play, file string
}

func (s *fakeServer) config() (config, string) {
	b, err := os.ReadFile(s.file)
	if err != nil {
		panic(err)
	}
	c, err := decode(b)
	if err != nil {
		panic(err)
	}
	return c, sha(b)
}

func (s *fakeServer) run() int {
	// Anything in the environment that the real one would scan shows up here.
	for _, kv := range os.Environ() {
		k, _, _ := strings.Cut(kv, "=")
		switch k {
		case "PATH", "HOME", "PWD", "FAKE_PIPELOCK", "FAKE_PLAY":
		default:
			fmt.Fprintf(os.Stderr, "fake: %s is in the environment\n", k)
			return 98
		}
	}
	c, hash := s.config()
	if s.play == "floods" {
		fmt.Fprintln(os.Stderr, strings.Repeat("x", 1<<20))
		fmt.Println(strings.Repeat("y", 1<<20))
	}
	fmt.Printf(`{"event":"startup","listen":%q,"mode":"strict","config_hash":%q}`+"\n", c.FetchProxy.Listen, hash)
	if s.play == "deaf" {
		time.Sleep(time.Minute)
	}
	l, err := net.Listen("tcp", c.FetchProxy.Listen)
	if err != nil {
		fmt.Fprintln(os.Stderr, "proxy error:", err)
		return 1
	}
	go http.Serve(l, http.HandlerFunc(s.answer))
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM)
	for sig := range signals {
		switch {
		case sig == syscall.SIGHUP:
			s.reload()
		case s.play != "stubborn":
			return 0
		}
	}
	return 0
}

func (s *fakeServer) answer(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method != http.MethodConnect && s.play == "dies":
		os.Exit(7)
	case r.Method != http.MethodConnect:
		fmt.Fprint(w, `{"status":"healthy"}`)
	case s.play == "open":
		w.WriteHeader(http.StatusOK)
	default:
		if s.play != "silent" {
			fmt.Printf(`{"level":"warn","event":"blocked","method":"CONNECT","target":%q,"scanner":"allowlist"}`+"\n", r.Host)
		}
		http.Error(w, "CONNECT blocked: domain not in allowlist", http.StatusForbidden)
	}
}

// reload answers with the recording that the play names, its digest replaced.
func (s *fakeServer) reload() {
	b, err := os.ReadFile(s.file)
	if err != nil {
		panic(err)
	}
	name, ok := strings.CutPrefix(s.play, "reload:")
	if !ok {
		return
	}
	all, err := load(filepath.Join(s.dir, "reload.ndjson"))
	if err != nil {
		panic(err)
	}
	for _, r := range all {
		if r.Name != name {
			continue
		}
		fmt.Fprint(os.Stderr, r.Stderr)
		for line := range strings.Lines(r.Log) {
			var m map[string]any
			if json.Unmarshal([]byte(line), &m) == nil && m["config_hash"] != nil {
				line = strings.Replace(line, m["config_hash"].(string), sha(b), 1)
			}
			os.Stdout.WriteString(strings.TrimRight(line, "\n") + "\n")
		}
	}
}

// lines of a file that Start made.
func readLog(t *testing.T, path string) []string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}
