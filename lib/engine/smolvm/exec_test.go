//go:build linux

package smolvm

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engine/smolvm/runner"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/mountns"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/smolvm/smolvmtest"
	"github.com/bottle-tools/bottle/lib/tarfs"
)

// The test binary plays three parts: itself; the replayer (as "smolvm"); and,
// with BOTTLE_TEST_GUEST set, a smolvm without a guest that runs what exec asks
// for on this machine, through the real runner.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == mountns.Verb {
		os.Exit(mountns.Main(os.Args[2:], os.Stderr))
	}
	switch filepath.Base(os.Args[0]) {
	case "smolvm":
		if dir := os.Getenv("BOTTLE_TEST_GUEST"); dir != "" {
			os.Exit(localSmolvm(dir, os.Args[1:]))
		}
	case "guest":
		os.Exit(localGuest(os.Args[1:]))
	}
	smolvmtest.Main(m)
}

// localSmolvm answers as smolvm 1.9.1 does; dir is the bottle's state folder.
func localSmolvm(dir string, args []string) int {
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err == nil {
		_, _ = io.WriteString(log, strings.Join(args, " ")+"\n")
		log.Close()
	}
	if slices.Equal(args, []string{"--version"}) {
		_, _ = os.Stdout.WriteString("smolvm 1.9.1\n")
		return 0
	}
	i := slices.Index(args, "--")
	if i < 0 || args[1] != "exec" {
		return 97
	}
	if _, err := os.Stat(filepath.Join(dir, "hangs")); err == nil {
		if slices.Contains(args[i:], "run") {
			time.Sleep(10 * time.Minute)
		}
		_, _ = os.Stderr.WriteString(notUp)
		return 1
	}
	_, silent := os.Stat(filepath.Join(dir, "silent")) // to signals, for good
	if down := filepath.Join(dir, "down"); os.Remove(down) == nil || silent == nil && slices.Contains(args[i:], "signal") {
		_, _ = os.Stderr.WriteString(notUp)
		return 1
	}
	if !slices.Contains(args[:i], "-i") { // then there is no stdin
		null, err := os.Open(os.DevNull)
		if err != nil {
			return 97
		}
		os.Stdin = null
	}
	useLocalHelper(dir, args[i+2:])
	r := runner.Runner{Requests: filepath.Join(guestDir(dir), requestsDir), States: filepath.Join(dir, "states")}
	status, ok := r.Main(args[i+2:], os.Stdout, os.Stderr)
	if !ok {
		return 97
	}
	return status
}

// useLocalHelper makes a request for the guest's helper one for this binary.
func useLocalHelper(dir string, verb []string) {
	if len(verb) != 2 || verb[0] != "run" {
		return
	}
	file := filepath.Join(guestDir(dir), requestsDir, verb[1]+".json")
	b, err := os.ReadFile(file)
	if err != nil {
		return
	}
	local, err := json.Marshal(filepath.Join(dir, "guest"))
	if err == nil {
		b = bytes.Replace(b, []byte(`["`+engine.GuestHelper+`"`), append([]byte("["), local...), 1)
		_ = os.WriteFile(file, b, 0o600)
	}
}

// localGuest is the helper's copying.
func localGuest(args []string) int {
	var err error
	switch args[0] {
	case "tar-out":
		err = tarfs.Out(args[1], os.Stdout, os.Stderr)
	case "tar-in":
		err = tarfs.In(args[1], os.Stdin)
	}
	if err != nil {
		_, _ = os.Stderr.WriteString(err.Error())
		return fault.IO
	}
	return 0
}

// local gives an engine whose guest is this machine.
func local(t *testing.T) (*Engine, engine.Ref, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("NOT RUN: the runner changes its user, which needs root")
	}
	s := newSpec(t)
	// The agent (uid 1000) has to get at the test's folders.
	for d := s.RunDir; len(d) > len(os.TempDir()); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := stage(s, nil); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(s.RunDir, "smolvm")
	if err := os.Symlink(self, bin); err != nil {
		t.Fatal(err)
	}
	e := New([]string{"PATH=/usr/bin:/bin", noDrop, "BOTTLE_SMOLVM=" + bin})
	e.env = append(e.env, "BOTTLE_TEST_GUEST="+s.Dir)
	return e, refOf(s), s.RunDir
}

// Commands, and what is asked about them, are run by the copy of the helper that the
// record names, and in a bottle that was started without one by the host's.
func TestExecByTheCopy(t *testing.T) {
	e, r, _ := local(t)
	logged := func() (helpers []string) {
		t.Helper()
		log := filepath.Join(r.Dir, "log")
		b, err := os.ReadFile(log)
		if err != nil || os.Remove(log) != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if _, argv, ok := strings.Cut(line, " -- "); ok {
				helpers = append(helpers, strings.Join(strings.Fields(argv)[:2], " "))
			}
		}
		return helpers
	}
	// That could be smolvm's own failure, so that it is asked for.
	fails := engine.ExecRequest{Argv: []string{"sh", "-c", "echo Error: no >&2; exit 1"}, Dir: "/"}
	for _, path := range []string{"/run/bottle-run/guest", ""} {
		if err := (machineRecord{Name: r.ID, Helper: path}).save(r.Dir); err != nil {
			t.Fatal(err)
		}
		if code, _, stderr := run(t, e, r, fails); code != 1 {
			t.Errorf("%d, %s", code, stderr)
		}
		h := cmp.Or(path, engine.GuestHelper)
		if got, want := logged(), []string{h + " run", h + " ran"}; !slices.Equal(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// run executes argv and gives status, stdout and stderr.
func run(t *testing.T, e *Engine, r engine.Ref, q engine.ExecRequest) (int, string, string) {
	t.Helper()
	files := make([]*os.File, 2)
	for i := range files {
		f, err := os.CreateTemp(t.TempDir(), "out")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i] = f
	}
	q.Stdout, q.Stderr = files[0], files[1]
	if q.Dir == "" {
		q.Dir = "/"
	}
	status, err := e.Exec(t.Context(), r, q)
	if err != nil {
		t.Errorf("%q: %v", q.Argv, err)
	}
	var text [2]string
	for i, f := range files {
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		text[i] = string(b)
	}
	return status, text[0], text[1]
}

func TestExecStatuses(t *testing.T) {
	e, r, _ := local(t)
	for _, tt := range []struct {
		want int
		argv []string
	}{
		{0, []string{"true"}}, {1, []string{"false"}}, {2, []string{"sh", "-c", "exit 2"}}, {3, []string{"sh", "-c", "exit 3"}},
		{124, []string{"sh", "-c", "exit 124"}}, {255, []string{"sh", "-c", "exit 255"}}, {127, []string{"/no/such/command"}}, {127, []string{"nosuchcommand"}},
		{126, []string{"/etc/passwd"}}, {137, []string{"sh", "-c", "kill -9 $$"}}, {143, []string{"sh", "-c", "kill -TERM $$"}},
		// A guest that says what smolvm says is believed to have run.
		{1, []string{"sh", "-c", "echo \"Error: agent operation failed: connect: machine 'x' is not running\" >&2; exit 1"}},
		{2, []string{"sh", "-c", "echo 'error: unexpected argument' >&2; exit 2"}},
	} {
		if got, _, errs := run(t, e, r, engine.ExecRequest{Argv: tt.argv}); got != tt.want {
			t.Errorf("%q: %d, want %d (%s)", tt.argv, got, tt.want, errs)
		}
	}
	if left, err := os.ReadDir(filepath.Join(guestDir(r.Dir), requestsDir)); err != nil || len(left) != 0 {
		t.Errorf("requests are left: %v, %v", left, err)
	}
}

func TestExecStreamsEnvUserDir(t *testing.T) {
	e, r, dir := local(t)
	in := filepath.Join(dir, "in")
	if err := os.WriteFile(in, []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	stdin, err := os.Open(in)
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	r.Env = append(r.Env, "LANG=C", "A=bottle")
	status, out, errs := run(t, e, r, engine.ExecRequest{
		Argv: []string{"sh", "-c", "cat; echo; pwd; id -u; id -g; id -G; echo $A $B; grep -c . /proc/self/environ; grep NoNewPrivs /proc/self/status; echo bad >&2; exit 7"},
		Env:  []string{"B=s3cret value", "A=command"}, Dir: dir, Stdin: stdin,
	})
	want := "from the host\n" + dir + "\n1000\n1000\n1000\ncommand s3cret value\n"
	if status != 7 || !strings.HasPrefix(out, want) || !strings.Contains(out, "NoNewPrivs:\t1") || errs != "bad\n" {
		t.Errorf("%d\n%q\n%q", status, out, errs)
	}
	if _, out, _ = run(t, e, r, engine.ExecRequest{Argv: []string{"env"}}); slices.ContainsFunc(strings.Fields(out), func(s string) bool {
		return strings.HasPrefix(s, "BOTTLE_") || strings.HasPrefix(s, "SMOLVM_")
	}) {
		t.Errorf("the runner's own environment got through:\n%s", out)
	}
	if _, out, _ = run(t, e, r, engine.ExecRequest{Argv: []string{"id", "-u"}, User: "root"}); out != "0\n" {
		t.Errorf("root: %q", out)
	}
	if _, out, _ = run(t, e, r, engine.ExecRequest{Argv: []string{"cat"}}); out != "" {
		t.Errorf("stdin without a file: %q", out)
	}
	log, err := os.ReadFile(filepath.Join(r.Dir, "log"))
	if err != nil || strings.Contains(string(log), "s3cret") || strings.Contains(string(log), "/bin") || !strings.Contains(string(log), "machine exec --name dev-0123abcd -w / -i -- /opt/bottle/guest run ") {
		t.Errorf("argv: %v\n%s", err, log)
	}
}

func TestExecSignals(t *testing.T) {
	e, r, dir := local(t)
	ready := filepath.Join(dir, "ready")
	if err := os.MkdirAll(ready, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(ready, 0o777); err != nil {
		t.Fatal(err)
	}
	signals := make(chan os.Signal, 2)
	go func() {
		for range 3000 {
			if _, err := os.Stat(ready + "/yes"); err == nil {
				signals <- syscall.SIGUSR1
				signals <- syscall.SIGTERM
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	status, out, _ := run(t, e, r, engine.ExecRequest{
		Argv:    []string{"sh", "-c", "trap 'echo usr1' USR1; trap 'echo term; exit 9' TERM; touch " + ready + "/yes; while :; do sleep 0.05; done"},
		Signals: signals,
	})
	if status != 9 || out != "usr1\nterm\n" {
		t.Errorf("%d %q", status, out)
	}
}

// A guest that answers nothing any more takes no signal either; whoever sent it
// gets away all the same, and so does the smolvm that waits for the guest.
func TestExecOfASilentGuest(t *testing.T) {
	e, r, dir := local(t)
	pidFile := filepath.Join(dir, "pids")
	if err := os.WriteFile(pidFile, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(pidFile, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.Dir, "silent"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	signals := make(chan os.Signal, 1)
	go func() {
		for range 3000 {
			if b, err := os.ReadFile(pidFile); err == nil && len(b) > 0 {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		signals <- syscall.SIGINT
	}()
	ended := make(chan error, 1)
	go func() {
		_, err := e.Exec(t.Context(), r, engine.ExecRequest{Argv: []string{"sh", "-c", "echo $$ > " + pidFile + "; exec sleep 600"}, Dir: "/", Signals: signals})
		ended <- err
	}()
	select {
	case err := <-ended:
		wantFault(t, err, fault.Unavailable, "guest_silent", "does not answer", "is not running", "bottle-vm down")
	case <-time.After(time.Minute):
		t.Error("it hangs")
	}
}

// A smolvm that hangs before the command has begun is given up, though commands
// have no time limit; one whose guest answers is not.
func TestExecThatNeverBegins(t *testing.T) {
	e, r, _ := local(t)
	watch := beginWatch
	beginWatch = 100 * time.Millisecond
	defer func() { beginWatch = watch }()
	if status, err := e.Exec(t.Context(), r, engine.ExecRequest{Argv: []string{"sleep", "2"}, Dir: "/"}); status != 0 || err != nil {
		t.Errorf("a guest that answers: %d, %v", status, err)
	}
	if err := os.WriteFile(filepath.Join(r.Dir, "hangs"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := e.Exec(t.Context(), r, engine.ExecRequest{Argv: []string{"true"}, Dir: "/"})
		ended <- err
	}()
	select {
	case err := <-ended:
		wantFault(t, err, fault.Unavailable, "guest_silent", "does not answer")
	case <-time.After(time.Minute):
		t.Error("it hangs")
	}
}

// A caller that gives up ends the guest's command.
func TestExecCancelled(t *testing.T) {
	e, r, dir := local(t)
	pidFile := filepath.Join(dir, "pids")
	if err := os.WriteFile(pidFile, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(pidFile, 0o666); err != nil {
		t.Fatal(err)
	}
	var b []byte
	for limit := time.Second; len(b) == 0 && limit < 2*time.Minute; limit *= 2 { // until this machine is fast enough to start it
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		_, err := e.Exec(ctx, r, engine.ExecRequest{Argv: []string{"sh", "-c", "echo $$ > " + pidFile + "; exec sleep 600"}, Dir: "/"})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if b, err = os.ReadFile(pidFile); err != nil {
			t.Fatal(err)
		}
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	for range 3000 {
		if !exists(pid) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Error("the command still runs")
}

// With a terminal the command has one too, smolvm stays in the foreground, and
// sizes are the same.
func TestExecOnATerminal(t *testing.T) {
	e, r, _ := local(t)
	ptm, pts, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer ptm.Close()
	defer pts.Close()
	if err := pty.Setsize(ptm, &pty.Winsize{Rows: 33, Cols: 101}); err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	go func() {
		var b bytes.Buffer
		buf := make([]byte, 1024)
		for !strings.Contains(b.String(), "<end>") {
			n, err := ptm.Read(buf)
			b.Write(buf[:n])
			if err != nil {
				break
			}
		}
		got <- b.String()
	}()
	if _, err := ptm.WriteString("typed\n"); err != nil {
		t.Fatal(err)
	}
	status, err := e.Exec(t.Context(), r, engine.ExecRequest{Argv: []string{"sh", "-c", "stty size; read x; echo got $x; test -t 0 && test -t 1 && echo '<end>'; exit 5"},
		Dir: "/", Stdin: pts, Stdout: pts, Stderr: pts, TTY: true})
	if status != 5 || err != nil {
		t.Errorf("%d, %v", status, err)
	}
	select {
	case s := <-got:
		if !strings.Contains(s, "33 101") || !strings.Contains(s, "got typed") {
			t.Errorf("%q", s)
		}
	case <-time.After(time.Minute):
		t.Error("no output")
	}
	log, err := os.ReadFile(filepath.Join(r.Dir, "log"))
	if err != nil || !strings.Contains(string(log), " -i -t -- ") {
		t.Errorf("%v\n%s", err, log)
	}
}

// "not running" for a machine that runs is a slow guest: it is asked again.
func TestExecOnASlowGuest(t *testing.T) {
	e, r, _ := local(t)
	if err := os.WriteFile(filepath.Join(r.Dir, "down"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Here status cannot be had, so it is believed.
	if _, err := e.Exec(t.Context(), r, engine.ExecRequest{Argv: []string{"true"}, Dir: "/"}); !errors.Is(err, smolvm.ErrNotRunning) {
		t.Errorf("%v", err)
	}
	gone := r
	gone.Dir = t.TempDir()
	_, err := e.Exec(t.Context(), gone, engine.ExecRequest{Argv: []string{"true"}})
	wantFault(t, err, fault.Unavailable, "not_running")
}

func TestCopy(t *testing.T) {
	e, r, dir := local(t)
	// The agent runs it, so it is a copy where the agent may look.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := copyFile(self, filepath.Join(r.Dir, "guest"), 0o755); err != nil {
		t.Fatal(err)
	}

	tree := filepath.Join(dir, "tree")
	if err := os.MkdirAll(tree+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tree+"/sub/f", bytes.Repeat([]byte("x"), 3<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if err := e.CopyOut(t.Context(), r, tree, &buf); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(dir, "to")
	if err := os.MkdirAll(to, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(to, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := e.CopyIn(t.Context(), r, to, bytes.NewReader(buf.Bytes())); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(to + "/tree/sub/f"); err != nil || fi.Size() != 3<<20 || fi.Sys().(*syscall.Stat_t).Uid != 1000 {
		t.Errorf("%v, %v", fi, err)
	}
	wantFault(t, e.CopyOut(t.Context(), r, dir+"/none", io.Discard), fault.IO, "guest_copy")
	full := errors.New("disk full")
	if err := e.CopyOut(t.Context(), r, tree, failing{full}); !errors.Is(err, full) {
		t.Errorf("a writer that fails: %v", err)
	}
	if err := e.CopyIn(t.Context(), r, to, io.MultiReader(bytes.NewReader(buf.Bytes()[:600]), broken{full})); !errors.Is(err, full) {
		t.Errorf("a reader that fails: %v", err)
	}
	// A guest that gives up is not waited for through a source that never ends.
	rd, wr := io.Pipe()
	defer wr.Close()
	go func() {
		tw := tar.NewWriter(wr)
		_ = tw.WriteHeader(&tar.Header{Name: "../escape", Typeflag: tar.TypeReg})
		_ = tw.Flush()
	}()
	done := make(chan error, 1)
	go func() { done <- e.CopyIn(t.Context(), r, to, rd) }()
	select {
	case err := <-done:
		wantFault(t, err, fault.IO, "guest_copy", "leaves the folder")
	case <-time.After(time.Minute):
		t.Error("CopyIn hangs")
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

type broken struct{ err error }

func (b broken) Read([]byte) (int, error) { return 0, b.err }

func TestMergeEnv(t *testing.T) {
	got := mergeEnv([]string{"A=1", "B=2"}, []string{"C=3", "A=4"})
	if want := []string{"A=4", "B=2", "C=3"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if b, err := json.Marshal(mergeEnv(nil, nil)); err != nil || string(b) != "[]" {
		t.Errorf("%s, %v", b, err)
	}
}
