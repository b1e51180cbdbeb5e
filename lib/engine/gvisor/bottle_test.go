//go:build linux

package gvisor

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fdpass"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/runsc"
)

// These tests boot real guests. They run as whoever runs them; as root they
// run once more as a plain user (TestAsPlainUser).

// plainUser has no name on most systems: nothing may depend on one.
const plainUser = 54321

// programs holds bottle-runsc and bottle-guest, readable by all.
var programs string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if programs = os.Getenv("BOTTLE_TEST_PROGRAMS"); programs == "" {
			dir, err := os.MkdirTemp("", "bottle-programs-")
			if err == nil {
				err = os.Chmod(dir, 0o755)
			}
			if err == nil {
				err = buildPrograms(dir)
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, "gvisor tests:", err)
				return 1
			}
			defer os.RemoveAll(dir)
			programs = dir
		}
		return m.Run()
	}())
}

func buildPrograms(dir string) error {
	build := func(dir, out, pkg string) error {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %v\n%s", out, err, b)
		}
		return nil
	}
	root, err := filepath.Abs("../../..")
	if err != nil {
		return err
	}
	if err := build(root, filepath.Join(dir, "bottle-guest"), "./cmd/bottle-guest"); err != nil {
		return err
	}
	made := filepath.Join(root, "bin", runsc.Name)
	if runsc.CheckStatic(made) != nil || !exists(made) {
		return build(filepath.Join(root, "tools", "runsc"), filepath.Join(dir, runsc.Name), ".")
	}
	b, err := os.ReadFile(made)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, runsc.Name), b, 0o755)
}

func exists(p string) bool { _, err := os.Stat(p); return err == nil }

func testEngine(t testing.TB) *Engine {
	t.Helper()
	e := New(func(name string) string {
		if name == runsc.Variable {
			return filepath.Join(programs, runsc.Name)
		}
		return ""
	}, "")
	if err := userNamespaces(os.ReadFile, os.Geteuid()); err != nil {
		t.Skipf("NOT TESTED, no guest can be started on this host: %v", err)
	}
	return e
}

// bottle is a running guest and its keeper.
type bottle struct {
	*Engine
	spec    *engine.Spec
	ref     engine.Ref
	started *engine.Started
}

// base makes a folder that nobody else can enter, as a bottle's state is.
func base(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "b") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newSpec makes a bottle's folders; as root the workspace is a plain user's.
func newSpec(t testing.TB, id string) *engine.Spec {
	t.Helper()
	dir := base(t)
	s := &engine.Spec{ID: id, Bottle: &plan.Bottle{User: "agent"}, Dir: dir + "/state", RunDir: dir + "/run",
		Workspace: dir + "/ws", GuestHelper: filepath.Join(programs, "bottle-guest"),
		HostUID: os.Geteuid(), HostGID: os.Getegid(),
		Env: []string{"PATH=/usr/local/go/bin:/usr/local/bin:/usr/bin:/bin", "HOME=/home/agent", "LANG=C.UTF-8"}}
	for _, d := range []string{s.Dir, s.RunDir, s.Workspace} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if os.Geteuid() == 0 {
		s.HostUID, s.HostGID = plainUser, plainUser
		if err := os.Chown(s.Workspace, plainUser, plainUser); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// start boots s with take as its egress service, and checks at the end that
// nothing of it is left.
func start(t testing.TB, s *engine.Spec, take func(*os.File) error) *bottle {
	t.Helper()
	b := &bottle{Engine: testEngine(t), spec: s, ref: engine.Ref{ID: s.ID, Dir: s.Dir, RunDir: s.RunDir, Bottle: s.Bottle, Env: s.Env}}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if err := b.Prepare(ctx, s); err != nil {
		t.Fatal(err)
	}
	conn, far, err := fdpass.Pair()
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan string, 1)
	if take == nil {
		take = func(f *os.File) error { return f.Close() }
	}
	br := &guest.Broker{Conn: conn, Services: map[string]func(*os.File) error{guest.ServiceEgress: take},
		Ready: func() { ready <- "" }, Failed: func(why string) { ready <- why }}
	go br.Serve()
	s.Guest = far
	if s.Log == nil {
		logFile, err := os.OpenFile(s.Dir+"/log", os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer logFile.Close()
		s.Log = logFile
	}
	t.Cleanup(func() {
		clean, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := b.Delete(clean, b.ref); err != nil {
			t.Errorf("delete: %v", err)
		}
		conn.Close()
		nothingLeft(t, s)
	})
	if b.started, err = b.Start(ctx, s); err != nil {
		log, _ := os.ReadFile(s.Dir + "/log")
		t.Fatalf("start: %v\n%s", err, log)
	}
	ended := make(chan error, 1)
	go func() { ended <- b.started.Wait(ctx) }()
	select {
	case why := <-ready:
		if why != "" {
			t.Fatalf("guest: %s", why)
		}
	case err := <-ended:
		log, _ := os.ReadFile(s.Dir + "/log")
		t.Fatalf("the guest ended as it started: %v\n%s", err, log)
	case <-ctx.Done():
		t.Fatal("the guest was not ready in time")
	}
	return b
}

func nothingLeft(t testing.TB, s *engine.Spec) {
	t.Helper()
	if ps := processesOf(filepath.Join(s.RunDir, "r")); len(ps) > 0 {
		t.Errorf("processes left: %v", ps)
	}
	for _, p := range append(workDirs(s.ID, s.Dir, s.RunDir), filepath.Join(s.RunDir, "r"), filepath.Join(s.Dir, recordName)) {
		if exists(p) {
			t.Errorf("left: %s", p)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Error(err)
	}
	if strings.Contains(string(mounts), filepath.Dir(s.Dir)) {
		t.Error("a mount is left on the host")
	}
}

// run runs a command and gives its status and what it wrote.
func (b *bottle) run(t testing.TB, stdin string, argv ...string) (int, string, string) {
	t.Helper()
	return b.exec(t, engine.ExecRequest{Argv: argv}, stdin)
}

func (b *bottle) exec(t testing.TB, q engine.ExecRequest, stdin string) (int, string, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	defer cancel()
	var out, errOut bytes.Buffer
	var status int
	var err error
	collect(t, &q.Stdout, &out, func() {
		collect(t, &q.Stderr, &errOut, func() {
			if stdin != "" {
				r, w, perr := os.Pipe()
				if perr != nil {
					t.Fatal(perr)
				}
				defer r.Close()
				go func() { io.WriteString(w, stdin); w.Close() }()
				q.Stdin = r
			}
			status, err = b.Exec(ctx, b.ref, q)
		})
	})
	if err != nil {
		t.Fatalf("%q: %v", q.Argv, err)
	}
	return status, out.String(), errOut.String()
}

// collect sets *f to a pipe into buf while fn runs.
func collect(t testing.TB, f **os.File, buf *bytes.Buffer, fn func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { io.Copy(buf, r); r.Close(); close(done) }()
	*f = w
	fn()
	w.Close()
	<-done
}

// sh runs a shell line that has to succeed.
func (b *bottle) sh(t testing.TB, line string) string {
	t.Helper()
	status, out, errOut := b.run(t, "", "/bin/sh", "-c", line)
	if status != 0 {
		t.Fatalf("sh -c %q: status %d\n%s%s", line, status, out, errOut)
	}
	return out
}

func TestBottleExec(t *testing.T) {
	b := start(t, newSpec(t, "exec-00000001"), nil)
	for _, c := range []struct {
		name           string
		argv           []string
		stdin          string
		status         int
		stdout, stderr string
	}{
		{"true", []string{"true"}, "", 0, "", ""},
		{"status 1", []string{"false"}, "", 1, "", ""},
		{"status 3", []string{"sh", "-c", "exit 3"}, "", 3, "", ""},
		{"status 126 of its own", []string{"sh", "-c", "exit 126"}, "", 126, "", ""},
		{"status 128 of its own", []string{"sh", "-c", "exit 128"}, "", 128, "", ""},
		{"status 2 of its own", []string{"sh", "-c", "echo panic: no >&2; exit 2"}, "", 2, "", "panic: no\n"},
		{"status 255", []string{"sh", "-c", "exit 255"}, "", 255, "", ""},
		{"killed", []string{"sh", "-c", "kill -9 $$"}, "", 137, "", ""},
		{"terminated", []string{"sh", "-c", "kill -TERM $$"}, "", 143, "", ""},
		{"streams apart", []string{"sh", "-c", "echo out; echo err >&2"}, "", 0, "out\n", "err\n"},
		{"stdin", []string{"cat"}, "hello\n", 0, "hello\n", ""},
		{"no stdin", []string{"cat"}, "", 0, "", ""},
		{"not found", []string{"nosuchprogram"}, "", 127, "", "nosuchprogram: command not found\n"},
		{"no file", []string{"/no/such"}, "", 127, "", "/no/such: no such file (or its interpreter is missing)\n"},
		{"not executable", []string{"/etc/passwd"}, "", 126, "", "/etc/passwd: permission denied\n"},
		{"argument with everything", []string{"printf", "%s", "a b\n'\"$x\\"}, "", 0, "a b\n'\"$x\\", ""},
		{"background child holds stdout", []string{"sh", "-c", "sleep 60 & echo done"}, "", 0, "done\n", ""},
		{"working folder", []string{"pwd"}, "", 0, "/workspace\n", ""},
		{"user", []string{"id"}, "", 0, "uid=1000(agent) gid=1000(agent) groups=1000(agent)\n", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, out, errOut := b.run(t, c.stdin, c.argv...)
			if status != c.status || out != c.stdout || errOut != c.stderr {
				t.Errorf("got %d, %q, %q; want %d, %q, %q", status, out, errOut, c.status, c.stdout, c.stderr)
			}
		})
	}

	t.Run("big output, whole tail", func(t *testing.T) {
		_, out, _ := b.run(t, "", "sh", "-c", "head -c 20000000 /dev/zero | tr '\\0' x; echo END")
		if len(out) != 20000004 || !strings.HasSuffix(out, "xEND\n") {
			t.Errorf("got %d bytes", len(out))
		}
	})
	t.Run("big input", func(t *testing.T) {
		_, out, _ := b.run(t, strings.Repeat("y", 5000000), "wc", "-c")
		if strings.TrimSpace(out) != "5000000" {
			t.Errorf("got %q", out)
		}
	})
	t.Run("environment is explicit", func(t *testing.T) {
		_, out, _ := b.exec(t, engine.ExecRequest{Argv: []string{"env"}, Env: []string{"B=2", "LANG=x"}}, "")
		got := strings.Split(strings.TrimSpace(out), "\n")
		slices.Sort(got)
		want := []string{"B=2", "HOME=/home/agent", "LANG=x", "PATH=/usr/local/go/bin:/usr/local/bin:/usr/bin:/bin"}
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
	t.Run("root of the guest", func(t *testing.T) {
		_, out, _ := b.exec(t, engine.ExecRequest{Argv: []string{"id", "-u"}, User: "root"}, "")
		if out != "0\n" {
			t.Errorf("got %q", out)
		}
	})
	t.Run("missing folder", func(t *testing.T) {
		_, err := b.Exec(context.Background(), b.ref, engine.ExecRequest{Argv: []string{"true"}, Dir: "/no/dir"})
		if err == nil || !strings.Contains(err.Error(), "there is no folder /no/dir in the bottle") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("closed stdout", func(t *testing.T) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		defer w.Close()
		status, err := b.Exec(context.Background(), b.ref, engine.ExecRequest{Argv: []string{"yes"}, Stdout: w})
		// gVisor gives EPIPE without the signal for a descriptor of the host.
		if err != nil || status != 1 {
			t.Errorf("got %d, %v; want 1 (broken pipe)", status, err)
		}
	})
	t.Run("signals", func(t *testing.T) {
		sigs := make(chan os.Signal, 2)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		go func() {
			r.Read(make([]byte, 6)) // "ready\n"
			sigs <- syscall.SIGUSR1
			r.Read(make([]byte, 5))
			sigs <- syscall.SIGTERM
		}()
		status, err := b.Exec(context.Background(), b.ref, engine.ExecRequest{Stdout: w, Signals: sigs,
			Argv: []string{"python3", "-c", "import os,signal,time\nsignal.signal(signal.SIGUSR1, lambda *a: os.write(1, b'usr1\\n'))\nos.write(1, b'ready\\n')\nwhile True: time.sleep(0.05)"}})
		w.Close()
		if err != nil || status != 143 {
			t.Errorf("got %d, %v; want 143", status, err)
		}
	})
	t.Run("time limit", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		_, err := b.Exec(ctx, b.ref, engine.ExecRequest{Argv: []string{"sleep", "4321"}})
		if err != context.DeadlineExceeded {
			t.Errorf("got %v", err)
		}
		if out := b.sh(t, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"); strings.Contains(out, "sleep 4321") {
			t.Error("the command still runs")
		}
	})
}

func TestBottleTerminal(t *testing.T) {
	b := start(t, newSpec(t, "tty-00000001"), nil)
	master, slave := openTerminal(t, 33, 111)
	var out lockedBuffer
	go io.Copy(&out, master)
	done := make(chan int, 1)
	go func() {
		status, err := b.Exec(context.Background(), b.ref, engine.ExecRequest{
			Argv: []string{"/bin/bash", "--norc", "-i"}, Env: []string{"TERM=xterm", "PS1=$ "}, Stdin: slave, Stdout: slave, TTY: true})
		if err != nil {
			t.Error(err)
		}
		done <- status
	}()
	say := func(line, want string) {
		t.Helper()
		from := out.Len()
		io.WriteString(master, line)
		deadline := time.Now().Add(time.Minute)
		for !strings.Contains(out.From(from), want) {
			if time.Now().After(deadline) {
				t.Fatalf("after %q: no %q in %q", line, want, out.From(from))
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	say("test -t 0 && test -t 2 && stty size\r", "33 111")
	say("tty=$(ps -o tty= $$ 2>/dev/null); set -m; echo job control $-\r", "job control")
	// In the foreground: until then a key is the shell's.
	sleeps := func(what string) {
		t.Helper()
		for began := time.Now(); !strings.Contains(b.sh(t, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '; true"), what); {
			if time.Since(began) > time.Minute {
				t.Fatalf("%s does not run: %q", what, out.From(0))
			}
		}
	}
	say("sleep 100; echo interrupted $?\r", "\n")
	sleeps("sleep 100 ")
	say("\x03", "$")
	say("echo after; echo status-$((1+1))\r", "status-2")
	say("sleep 200\r", "\n")
	sleeps("sleep 200 ")
	say("\x1a", "Stopped")
	say("kill %1; wait; echo cleared-$((2+2))\r", "cleared-4")
	resize(t, master, 50, 90)
	// It travels by itself.
	say("until [ \"$(stty size)\" = '50 90' ]; do sleep 0.1; done; echo now-$(stty size)\r", "now-50 90")
	io.WriteString(master, "exit 5\r")
	select {
	case status := <-done:
		if status != 5 {
			t.Errorf("status %d, want 5", status)
		}
	case <-time.After(time.Minute):
		t.Fatalf("the shell did not end: %q", out.From(0))
	}
}

// echo is an egress service that answers with what it gets.
func echo(f *os.File) error {
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return err
	}
	go func() { defer c.Close(); io.Copy(c, c) }()
	return nil
}

func TestBottleNetwork(t *testing.T) {
	b := start(t, newSpec(t, "net-00000001"), echo)
	host, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	touched := make(chan struct{}, 10)
	go func() {
		for {
			c, err := host.Accept()
			if err != nil {
				return
			}
			touched <- struct{}{}
			c.Close()
		}
	}()
	port := host.Addr().(*net.TCPAddr).Port

	out := b.sh(t, `python3 - <<'E'
import socket
def out():
    s = socket.create_connection(("127.0.0.1", 3128), 5)
    s.sendall(b"x" * 1000000)
    s.shutdown(socket.SHUT_WR)
    n = 0
    while True:
        d = s.recv(65536)
        if not d: break
        n += len(d)
    return n
print("relay", out(), out(), out())
E`)
	if out != "relay 1000000 1000000 1000000\n" {
		t.Errorf("through the relay: %q", out)
	}
	denied := b.sh(t, fmt.Sprintf(`python3 - <<'E'
import socket
targets = [("127.0.0.1", %d), ("1.1.1.1", 443), ("169.254.169.254", 80), ("10.0.0.1", 22), ("::1", %d)]
for host, port in targets:
    try:
        socket.create_connection((host, port), 2); print("REACHED", host)
    except OSError as e: print("no", host)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try: s.sendto(b"x", ("8.8.8.8", 53)); print("SENT udp")
except OSError: print("no udp")
try: socket.getaddrinfo("example.com", 443); print("RESOLVED")
except OSError: print("no dns")
for kind in ((socket.AF_INET, socket.SOCK_RAW, 1), (socket.AF_PACKET, socket.SOCK_RAW, 0), (40, socket.SOCK_STREAM, 0)):
    try: socket.socket(*kind); print("SOCKET", kind)
    except OSError: print("no socket")
print(open("/proc/net/dev").read().count(":"), "device")
E`, port, port))
	for _, bad := range []string{"REACHED", "SENT", "RESOLVED", "SOCKET"} {
		if strings.Contains(denied, bad) {
			t.Errorf("a way out:\n%s", denied)
		}
	}
	if !strings.Contains(denied, "1 device") {
		t.Errorf("devices other than lo:\n%s", denied)
	}
	select {
	case <-touched:
		t.Error("the host's loopback was reached")
	default:
	}
}

func TestBottleIsolation(t *testing.T) {
	s := newSpec(t, "iso-00000001")
	unixSocket, err := net.Listen("unix", s.Workspace+"/sock")
	if err != nil {
		t.Fatal(err)
	}
	defer unixSocket.Close()
	os.Chmod(s.Workspace+"/sock", 0o777)
	if err := syscall.Mkfifo(s.Workspace+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	b := start(t, s, nil)
	out := b.sh(t, `
for f in /etc/shadow /etc/ssh /root/.ssh /home/*/.ssh /var/run/docker.sock /run/user /boot/* /work; do [ -e "$f" ] && echo "VISIBLE $f"; done
cat /proc/version /proc/cmdline /proc/mounts /proc/1/environ /proc/self/environ 2>/dev/null | tr '\0' '\n'
ls -la /proc/1/fd 2>&1
kill -9 1 2>&1
mkdir /workspace/made && touch /workspace/made/file && ls -ln /workspace | grep made
mount -t tmpfs x /mnt 2>&1
echo x > /etc/hosts.test 2>&1 || true
echo x > /usr/x 2>&1 || true
echo x > /opt/bottle/config.json 2>&1 || true
python3 -c "
import socket
s = socket.socket(socket.AF_UNIX)
try: s.connect('/workspace/sock'); print('CONNECTED')
except OSError as e: print('socket refused')
import os
try: os.open('/workspace/fifo', os.O_RDWR|os.O_NONBLOCK); print('OPENED FIFO')
except OSError as e: print('fifo refused')
try: os.mknod('/workspace/dev', 0o20666, os.makedev(1, 3)); print('MADE DEVICE')
except OSError: print('device refused')
"
grep -E '^(Cap|NoNew)' /proc/self/status
hostname
id -G`)
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"VISIBLE", "CONNECTED", "OPENED", "MADE DEVICE", strings.TrimSpace(string(kernel)), s.Dir, s.Workspace, "BOTTLE_TEST"} {
		if strings.Contains(out, bad) {
			t.Errorf("%q shows in the guest:\n%s", bad, out)
		}
	}
	for _, want := range []string{"socket refused", "fifo refused", "device refused", "Operation not permitted", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "\niso-00000001\n1000\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	for _, f := range []string{"made", "made/file"} {
		fi, err := os.Lstat(filepath.Join(s.Workspace, f))
		if err != nil {
			t.Fatal(err)
		}
		if st := fi.Sys().(*syscall.Stat_t); int(st.Uid) != s.HostUID || int(st.Gid) != s.HostGID {
			t.Errorf("%s belongs to %d:%d on the host, want %d:%d", f, st.Uid, st.Gid, s.HostUID, s.HostGID)
		}
	}
	if exists("/usr/x") {
		t.Fatal("the guest wrote to the host's /usr")
	}
	if args := hostArgs(t, s); strings.Contains(args, "PATH=") || strings.Contains(args, "LANG") {
		t.Errorf("environment in a command line: %s", args)
	}
}

// hostArgs gives the command lines of the sandbox's processes on the host.
func hostArgs(t *testing.T, s *engine.Spec) string {
	t.Helper()
	ps := processesOf(filepath.Join(s.RunDir, "r"))
	if len(ps) < 2 {
		t.Fatalf("sandbox and gofer not found: %v", ps)
	}
	var all []string
	for _, p := range ps {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, strings.ReplaceAll(string(b), "\x00", " "))
	}
	return strings.Join(all, "\n")
}
