package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

func contains(s, sub string) bool { return strings.Contains(s, sub) }

// TestExec shares one bottle for everything that exec has to pass through.
func TestExec(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(plain + `,"env":{"GREETING":"hello there","EMPTY":""}`)
		id := w.Up()
		on := func(name string, f func(t *testing.T, w *harness.World, id string)) {
			t.Run(name, func(t *testing.T) {
				inner := *w
				inner.T = t
				f(t, &inner, id)
			})
		}
		on("status", execStatus)
		on("streams", execStreams)
		on("signals", execSignals)
		on("timeout", execTimeout)
		on("environment", execEnvironment)
		on("big output", execBigOutput)
		on("closed stdout", execClosedStdout)
		on("own failures", execOwnFailures)
		on("terminal", execTerminal)
		on("cp", copyFiles)
		on("show", showVerbs)
		w.Down(id)
		if r := w.Do(nil, "bottle-vm", "down", id); r.Code != 0 || r.Out != "" {
			t.Errorf("down again: %+v", r)
		}
		if r := w.Exec(id, "true"); r.Code != 125 || !contains(r.Stderr, "no bottle") {
			t.Errorf("exec after down: %+v", r)
		}
	})
}

func execStatus(t *testing.T, w *harness.World, id string) {
	for _, code := range []int{0, 1, 3, 37, 124, 125, 127, 255} {
		if r := w.Exec(id, fmt.Sprintf("exit %d", code)); r.Code != code || r.Out+r.Stderr != "" {
			t.Errorf("exit %d: %+v", code, r)
		}
	}
	for _, sig := range []struct {
		name string
		code int
	}{{"TERM", 143}, {"KILL", 137}, {"HUP", 129}, {"USR1", 138}} {
		if r := w.Exec(id, "kill -"+sig.name+" $$; sleep 5"); r.Code != sig.code {
			t.Errorf("killed by %s: %+v, want %d", sig.name, r, sig.code)
		}
	}
	if r := w.Do(nil, "bottle-vm", "exec", id, "--", "no-such-program"); r.Code != 127 {
		t.Errorf("unknown program: %+v", r)
	}
	if r := w.Do(nil, "bottle-vm", "exec", id, "--", "/etc"); r.Code != 126 {
		t.Errorf("not executable: %+v", r)
	}
}

func execStreams(t *testing.T, w *harness.World, id string) {
	r := w.Do(strings.NewReader("from the host"), "bottle-vm", "exec", id, "--", "sh", "-c", "cat; echo to stderr >&2; exit 3")
	if r.Code != 3 || r.Out != "from the host" || r.Stderr != "to stderr\n" {
		t.Errorf("%+v", r)
	}
	// Arguments arrive as they are.
	args := []string{"a b", "", "$HOME", "*", "--", "-x", "é\n", `"q'`}
	r = w.Do(nil, "bottle-vm", append([]string{"exec", id, "--", "sh", "-c", `for a; do printf '<%s>' "$a"; done`, "sh"}, args...)...)
	if want := "<" + strings.Join(args, "><") + ">"; r.Out != want {
		t.Errorf("arguments: got %q, want %q", r.Out, want)
	}
	// Without an id the document is on stdin, and the command's stdin is empty.
	r = w.Sh("bottle-vm ls >/dev/null; printf '{\"format_version\":\"1.0\",\"vm\":{\"id\":\"" + id + "\"}}' | bottle-vm exec -- sh -c 'cat; echo end'")
	if r.Out != "end\n" || r.Code != 0 {
		t.Errorf("document on stdin: %+v", r)
	}
	// What the guest leaves in the background must not hold exec for ever.
	begun := time.Now()
	r = w.Exec(id, "sleep 600 >/dev/null 2>&1 & echo done")
	if r.Out != "done\n" || time.Since(begun) > harness.Limit {
		t.Errorf("background child: %+v after %s", r, time.Since(begun))
	}
}

// execSignals sends signals to bottle-vm, which are the guest command's.
func execSignals(t *testing.T, w *harness.World, id string) {
	for _, c := range []struct {
		sig    syscall.Signal
		script string
		code   int
	}{
		{syscall.SIGTERM, "echo ready; exec sleep 20", 143},
		{syscall.SIGINT, "trap 'exit 7' INT; echo ready; while :; do sleep 0.1; done", 7},
		{syscall.SIGHUP, "echo ready; exec sleep 20", 129},
		{syscall.SIGUSR1, "trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done", 9},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), harness.Limit)
		cmd := w.Cmd(ctx, "bottle-vm", "exec", id, "--", "sh", "-c", c.script)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(c.sig); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait()
		cancel()
		if got := harness.Status(cmd.ProcessState); got != c.code {
			t.Errorf("%s: exit %d, want %d", c.sig, got, c.code)
		}
	}
}

func execTimeout(t *testing.T, w *harness.World, id string) {
	begun := time.Now()
	r := w.Do(nil, "bottle-vm", "exec", "--timeout", "300ms", id, "--", "sh", "-c", "echo begun; sleep 600")
	if r.Code != 124 || r.Out != "begun\n" {
		t.Errorf("%+v", r)
	}
	if took := time.Since(begun); took > harness.Limit {
		t.Errorf("took %s", took)
	}
	if r := w.Do(nil, "bottle-vm", "exec", "--timeout", "20s", id, "--", "sh", "-c", "exit 5"); r.Code != 5 {
		t.Errorf("in time: %+v", r)
	}
	if r := w.Exec(id, "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline 2>/dev/null; echo; done"); contains(r.Out, "sleep 30 \n") && contains(r.Out, "echo begun") {
		t.Errorf("the command runs on after its time:\n%s", r.Out)
	}
}

func execEnvironment(t *testing.T, w *harness.World, id string) {
	r := w.Exec(id, `echo "$GREETING|${EMPTY-unset}|$HOME|$(pwd)|$(id -un)"`)
	if r.Out != "hello there||/home/agent|/workspace|agent\n" {
		t.Errorf("%+v", r)
	}
	r = w.Do(nil, "bottle-vm", "exec", "-e", "GREETING=bye", "-e", "MORE=a=b c", "-w", "/tmp", id, "--", "sh", "-c", `echo "$GREETING|$MORE|$(pwd)"`)
	if r.Out != "bye|a=b c|/tmp\n" {
		t.Errorf("-e and -w: %+v", r)
	}
	// Nothing of the host's environment.
	w.Env = append(w.Env, "HOST_ONLY=top-secret-value")
	if r := w.Exec(id, "env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'"); contains(r.Out, "top-secret-value") || contains(r.Out, w.State) {
		t.Errorf("the host's environment is in the guest:\n%s", r.Out)
	}
}

// execBigOutput moves 40 MB each way and compares digests.
func execBigOutput(t *testing.T, w *harness.World, id string) {
	const size = 40 << 20
	if testing.Short() {
		t.Skip("SKIPPED: -short")
	}
	ctx, cancel := context.WithTimeout(t.Context(), harness.Limit)
	defer cancel()
	cmd := w.Cmd(ctx, "bottle-vm", "exec", id, "--", "sh", "-c", "tee /tmp/copy | cat; cat /tmp/copy >&2; rm /tmp/copy; exit 3")
	in := sha256.New()
	src := io.TeeReader(io.LimitReader(pattern{}, size), in)
	out, stderr := sha256.New(), sha256.New()
	var n counter
	cmd.Stdin = src
	cmd.Stdout, cmd.Stderr = io.MultiWriter(out, &n), stderr
	_ = cmd.Run()
	want := hex.EncodeToString(in.Sum(nil))
	if code := harness.Status(cmd.ProcessState); code != 3 || n != size {
		t.Errorf("exit %d after %d bytes", code, n)
	}
	for what, h := range map[string]string{"stdout": hex.EncodeToString(out.Sum(nil)), "stderr": hex.EncodeToString(stderr.Sum(nil))} {
		if h != want {
			t.Errorf("%s: bytes were lost or changed", what)
		}
	}
}

// pattern is an endless stream without a short period.
type pattern struct{}

func (pattern) Read(b []byte) (int, error) {
	x := uint32(len(b)) | 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return len(b), nil
}

type counter int

func (c *counter) Write(b []byte) (int, error) { *c += counter(len(b)); return len(b), nil }

func execClosedStdout(t *testing.T, w *harness.World, id string) {
	begun := time.Now()
	r := w.Sh("bottle-vm exec " + id + " -- yes | head -n 2")
	if r.Out != "y\ny\n" || time.Since(begun) > harness.Limit {
		t.Errorf("%+v after %s", r, time.Since(begun))
	}
}

func execOwnFailures(t *testing.T, w *harness.World, id string) {
	for _, c := range []struct{ line, stderr string }{
		{"bottle-vm exec " + id + " --", "no command"},
		{"bottle-vm exec " + id, "no command"},
		{"bottle-vm exec " + id + " true", "behind --"},
		{"bottle-vm exec " + id + " -t -- true", "flags come first"},
		{"bottle-vm exec -e 1A=b " + id + " -- true", "NAME=VALUE"},
		{"bottle-vm exec -e NOVALUE " + id + " -- true", "NAME=VALUE"},
		{"bottle-vm exec -w relative " + id + " -- true", "absolute"},               // bad_dir
		{"bottle-vm exec -w /no/such/folder " + id + " -- true", "/no/such/folder"}, // no_dir
		{"bottle-vm exec -t " + id + " -- true </dev/null", "-t needs a terminal"},
		{"bottle-vm exec nobody -- true", "no bottle"},
		{"bottle-vm exec nobody-01234567 -- true", "no bottle"},
		{"bottle-vm exec ../x -- true", "no bottle"},
		{"bottle-vm exec -- true </dev/null", "empty input"},
		{"echo '{' | bottle-vm exec -- true", "ends in the middle"},
		{"echo '[}' | bottle-vm exec -- true", "not a JSON object"},
		{`printf '{"format_version":"1.0","error":{"stage":"plan","code":"no_manifest","exit":66,"message":"there is none"}}\n' | bottle-vm exec -- true`, "there is none"},
		{`printf '{"format_version":"1.0","vm":{"id":"a-01234567"}}\n{"format_version":"1.0","vm":{"id":"a-01234567"}}\n' | bottle-vm exec -- true`, "more than one document"}, // many_documents
	} {
		r := w.Sh(c.line)
		if r.Code != 125 || r.Out != "" || !contains(r.Stderr, c.stderr) || strings.Count(r.Stderr, "\n") != 1 {
			t.Errorf("%s: %+v, want 125 and %q", c.line, r, c.stderr)
		}
	}
	if r := w.Sh("bottle-vm exec --no-such-flag " + id + " -- true"); r.Code != 125 {
		t.Errorf("unknown flag: %+v", r)
	}
}

// term is a program behind a pseudo-terminal.
type term struct {
	t    *testing.T
	f    *os.File
	cmd  *exec.Cmd
	mu   sync.Mutex
	seen bytes.Buffer
	done chan struct{}
}

func newTerm(t *testing.T, w *harness.World, rows, cols uint16, name string, args ...string) *term {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), harness.Limit)
	t.Cleanup(cancel)
	cmd := w.Cmd(ctx, name, args...)
	f, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: rows, Cols: cols})
	if err != nil {
		t.Fatal(err)
	}
	p := &term{t: t, f: f, cmd: cmd, done: make(chan struct{})}
	t.Cleanup(func() { f.Close() })
	go func() {
		defer close(p.done)
		buf := make([]byte, 4096)
		for {
			n, err := f.Read(buf)
			p.mu.Lock()
			p.seen.Write(buf[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return p
}

func (p *term) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.String()
}

func (p *term) expect(want string) {
	p.t.Helper()
	harness.Eventually(p.t, harness.Limit, func() string {
		if !contains(p.output(), want) {
			return fmt.Sprintf("no %q on the terminal: %q", want, p.output())
		}
		return ""
	})
	if p.t.Failed() {
		p.t.FailNow()
	}
}

func (p *term) send(s string) {
	p.t.Helper()
	if _, err := p.f.WriteString(s); err != nil {
		p.t.Fatal(err)
	}
}

func (p *term) wait() int {
	_ = p.cmd.Wait()
	return harness.Status(p.cmd.ProcessState)
}

func execTerminal(t *testing.T, w *harness.World, id string) {
	p := newTerm(t, w, 33, 101, "bottle-vm", "exec", "-t", id, "--", "sh", "-c",
		"test -t 0 && test -t 1 && stty size; echo TERM=$TERM; until stty size | grep '44 77'; do sleep 0.1; done; read line; echo got-$line; sleep 30; echo never-$?")
	p.expect("33 101")
	p.expect("TERM=xterm")
	if err := pty.Setsize(p.f, &pty.Winsize{Rows: 44, Cols: 77}); err != nil {
		t.Fatal(err)
	}
	p.expect("44 77") // it travels by itself
	p.send("word\n")
	p.expect("got-word")
	p.send("\x03") // Ctrl-C
	if code := p.wait(); code != 130 {
		t.Errorf("Ctrl-C: exit %d, want 130; terminal: %q", code, p.output())
	}
	if contains(p.output(), "never-") {
		t.Errorf("Ctrl-C did not reach the command: %q", p.output())
	}
	p = newTerm(t, w, 24, 80, "bottle-vm", "exec", "-t", id, "--", "sh", "-c", "echo ready; cat; echo eof; exit 9")
	p.expect("ready")
	p.send("line\n\x04") // Ctrl-D
	p.expect("eof")
	if code := p.wait(); code != 9 {
		t.Errorf("exit %d, want 9", code)
	}
}

func copyFiles(t *testing.T, w *harness.World, id string) {
	w.Write("note.txt", "from the host\n")
	w.Write("tree/sub/file", "deep\n")
	for _, c := range []struct {
		line string
		code int
		err  string
	}{
		{"bottle-vm cp note.txt " + id + ":/tmp/copied", 0, ""},
		{"bottle-vm cp tree " + id + ":/tmp/", 0, ""},
		{"bottle-vm cp " + id + ":/tmp/tree out", 0, ""},
		{"bottle-vm cp " + id + ":/tmp/copied .", 0, ""},
		{"bottle-vm cp '' " + id + ":/tmp/", 0, ""},
		{"bottle-vm cp note.txt other.txt", 64, "exactly one"},
		{"bottle-vm cp note.txt", 64, "two paths"},
		{"bottle-vm cp no-such-file " + id + ":/tmp/", 66, "no-such-file"},
		{"bottle-vm cp " + id + ":/tmp/nothing-here here", 66, "nothing-here"},
		{"bottle-vm cp " + id + ":/tmp/copied no-folder/x", 66, "no-folder"}, // no_folder
		{"bottle-vm cp note.txt nobody:/tmp/", 66, "no bottle"},
	} {
		r := w.Sh(c.line)
		if r.Code != c.code || r.Out != "" || !contains(r.Stderr, c.err) {
			t.Errorf("%s: %+v, want %d %q", c.line, r, c.code, c.err)
		}
	}
	if r := w.Exec(id, "cat /tmp/copied /tmp/tree/sub/file"); r.Out != "from the host\ndeep\n" {
		t.Errorf("in: %+v", r)
	}
	if got := w.Read("copied") + w.Read("out/sub/file"); got != "from the host\ndeep\n" {
		t.Errorf("out: %q", got)
	}
	// A link that the guest made must not lead the host elsewhere.
	w.Exec(id, "mkdir /tmp/trap; ln -s /etc /tmp/trap/etc; ln -s ../../../etc/passwd /tmp/trap/up")
	r := w.Sh("bottle-vm cp " + id + ":/tmp/trap trapped; cat trapped/etc/passwd trapped/up")
	if r.Out != "" {
		t.Errorf("a guest's link led to the host: %+v", r)
	}
}

func showVerbs(t *testing.T, w *harness.World, id string) {
	has(t, "ls", w.OK("bottle-vm ls"), `"id":"`+id+`"`, `"phase":"ready"`, `"runtime":"gvisor"`)
	has(t, "ls --pretty", w.OK("bottle-vm ls --pretty"), "ID", id, "ready")
	has(t, "status", w.OK("bottle-vm status bash"), `"gate":"up"`, `"proxy":"none"`, `"audit_log":"`)
	has(t, "status of a document", w.OK(`printf '{"format_version":"1.0","vm":{"id":"`+id+`"}}' | bottle-vm status`), id)
	w.OK("bottle-vm logs " + id)
	w.OK("bottle-vm logs --audit " + id)
	for line, code := range map[string]int{
		"bottle-vm logs":                    64,
		"bottle-vm diff " + id:              64, // not_scratch
		"bottle-vm diff":                    64,
		"bottle-vm status nobody":           66,
		"bottle-vm logs nobody":             66,
		"bottle-vm stop nobody":             66,
		"bottle-vm status " + id + " " + id: 64,
	} {
		if r := w.Sh(line + " </dev/null"); r.Code != code || r.Stderr == "" {
			t.Errorf("%s: %+v, want %d", line, r, code)
		}
	}
}
