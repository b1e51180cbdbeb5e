package smolvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/smolvm/smolvmtest"
	"github.com/bottle-tools/bottle/lib/smolvm/wheel"
	"github.com/bottle-tools/bottle/testscripts/fakesmolvm"
)

func TestMain(m *testing.M) { smolvmtest.Main(m) }

const transcripts = "../../testscripts/transcripts/smolvm"

// replay gives a client of the recorded smolvm.
func replay(t *testing.T, version string) (*Client, *smolvmtest.Fake) {
	t.Helper()
	v, err := ParseVersion("smolvm " + version)
	if err != nil {
		t.Fatal(err)
	}
	f := smolvmtest.NewFake(t, version, transcripts)
	return &Client{Bin: f.Bin, Env: f.Env, Version: v}, f
}

// script gives a client of a shell script that pretends to be smolvm 1.9.1.
func script(t *testing.T, body string) *Client {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "smolvm")
	if err := os.WriteFile(bin, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return &Client{Bin: bin, Version: Version{1, 9, 1}}
}

// echo gives a client that records its arguments, one a line, in the file.
func echo(t *testing.T, v Version, stdout string) (*Client, func() []string) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "argv")
	c := script(t, `for a in "$@"; do printf '%s\n' "$a"; done > `+log+"\nprintf '%s' '"+stdout+"'")
	c.Version = v
	return c, func() []string {
		data, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	}
}

func TestArgvShapeOfEverySubcommand(t *testing.T) {
	ctx := t.Context()
	var (
		seed   = Version{0, 9, 0}
		flag   = Version{1, 9, 1}
		newest = Version{1, 32, 2}
	)
	full := CreateSpec{
		CPUs: 1, MemMiB: 512, Labels: []Label{{"owner", "bottle"}}, Image: "/images/img.tar",
		Volumes: []Volume{{"/h", "/workspace", false}, {"/r", "/opt/bottle", true}},
		Sockets: []Socket{{"/run/px/proxy.sock", "/run/bottle/gate.sock"}},
		Command: []string{"/opt/bottle/guest", "-x"},
	}
	tests := []struct {
		name string
		v    Version
		out  string // what smolvm prints
		call func(*Client) error
		want string
	}{
		{"version", flag, "smolvm 1.9.1", func(c *Client) error { _, err := c.DetectVersion(ctx); return err }, "--version"},
		{"create seed", seed, "", func(c *Client) error { return c.MachineCreate(ctx, "a", CreateSpec{CPUs: 1, MemMiB: 2}) }, "machine create a --cpus 1 --mem 2"},
		{"create", flag, "", func(c *Client) error { return c.MachineCreate(ctx, "a", CreateSpec{}) }, "machine create --name a"},
		{"create full", flag, "", func(c *Client) error { return c.MachineCreate(ctx, "a", full) },
			"machine create --name a --cpus 1 --mem 512 --label owner=bottle --image /images/img.tar -v /h:/workspace -v /r:/opt/bottle:ro --mount-socket /run/px/proxy.sock:/run/bottle/gate.sock -- /opt/bottle/guest -x"},
		{"create newest", newest, "", func(c *Client) error { return c.MachineCreate(ctx, "a", CreateSpec{Command: []string{"x"}}) }, "machine create --name a --error-format json -- x"},
		{"create from", flag, "", func(c *Client) error { return c.MachineCreate(ctx, "x", CreateSpec{From: "none.smolmachine"}) }, "machine create --name x --from none.smolmachine"},
		{"create smolfile", flag, "", func(c *Client) error { return c.MachineCreate(ctx, "x", CreateSpec{Smolfile: "ok.toml"}) }, "machine create --name x -s ok.toml"},
		{"create dash", flag, "", func(c *Client) error { return c.MachineCreate(ctx, "-x", CreateSpec{}) }, "machine create --name=-x"},
		{"start seed", seed, "", func(c *Client) error { return c.MachineStart(ctx, "a") }, "machine start --name a"},
		{"start", flag, "", func(c *Client) error { return c.MachineStart(ctx, "a") }, "machine start --name a"},
		{"start newest", newest, "", func(c *Client) error { return c.MachineStart(ctx, "a") }, "machine start --name a --error-format json"},
		{"start forkable", flag, "", func(c *Client) error { return c.MachineStartForkable(ctx, "a") }, "machine start --name a --forkable"},
		{"start forkable newest", newest, "", func(c *Client) error { return c.MachineStartForkable(ctx, "a") }, "machine start --name a --forkable --error-format json"},
		{"fork", flag, "", func(c *Client) error { return c.MachineFork(ctx, "a", "b", nil) }, "machine fork --golden a --name b"},
		{"branch", newest, "", func(c *Client) error { return c.MachineFork(ctx, "a", "b", nil) },
			"machine branch --from a --name b --no-wait-ready --freeze-source --error-format json"},
		{"stop", flag, "", func(c *Client) error { return c.MachineStop(ctx, "a") }, "machine stop --name a"},
		{"ls", newest, "[]", func(c *Client) error { _, err := c.MachineLs(ctx); return err }, "machine ls --json"},
		{"status", flag, `{"name":"a"}`, func(c *Client) error { _, err := c.MachineStatus(ctx, "a"); return err }, "machine status --name a --json"},
		{"data-dir", flag, "/d", func(c *Client) error { _, err := c.MachineDataDir(ctx, "a"); return err }, "machine data-dir --name a"},
		{"cp up", flag, "", func(c *Client) error { return c.MachineCp(ctx, "/f", "a:/g") }, "machine cp /f a:/g"},
		{"cp down", flag, "", func(c *Client) error { return c.MachineCp(ctx, "a:/g", "/f") }, "machine cp a:/g /f"},
		{"cp dash", flag, "", func(c *Client) error { return c.MachineCp(ctx, "-f", "a:/g") }, "machine cp -- -f a:/g"},
		{"cp newest", newest, "", func(c *Client) error { return c.MachineCp(ctx, "/f", "a:/g") }, "machine cp --error-format json /f a:/g"},
		{"exec", flag, "", func(c *Client) error {
			_, err := c.MachineExec(ctx, "a", ExecOptions{}, "sh", "-c", "exit 3")
			return err
		}, "machine exec --name a -- sh -c exit 3"},
		{"exec seed", seed, "", func(c *Client) error { _, err := c.MachineExec(ctx, "a", ExecOptions{}, "true"); return err }, "machine exec --name a -- true"},
		{"exec stream", flag, "", func(c *Client) error {
			_, err := c.MachineExec(ctx, "a", ExecOptions{Stream: true}, "true")
			return err
		}, "machine exec --stream --name a -- true"},
		{"exec flags", flag, "", func(c *Client) error {
			_, err := c.MachineExec(ctx, "a", ExecOptions{Timeout: 4100 * time.Millisecond, Dir: "/etc", Stdin: strings.NewReader(""), TTY: true}, "-e", "--")
			return err
		}, "machine exec --name a --timeout 5s -w /etc -i -t -- -e --"},
		{"exec newest", newest, "", func(c *Client) error { _, err := c.MachineExec(ctx, "nope", ExecOptions{}, "true"); return err }, "machine exec --name nope --error-format json -- true"},
		{"exec attached", flag, "", func(c *Client) error {
			_, err := c.MachineExecAttached(ctx, "a", Attached{TTY: true}, "sh")
			return err
		}, "machine exec --name a -i -t -- sh"},
		{"exec user", newest, "", func(c *Client) error {
			_, err := c.MachineExec(ctx, "a", ExecOptions{User: "1000:1000"}, "id")
			return err
		}, "machine exec --name a --user 1000:1000 --error-format json -- id"},
		{"exec unknown newer", Version{2, 0, 0}, "", func(c *Client) error {
			_, err := c.MachineExec(ctx, "a", ExecOptions{}, "true")
			return err
		}, "machine exec --name a -- true"},
		{"create credential", newest, "", func(c *Client) error {
			return c.MachineCreate(ctx, "a", CreateSpec{Credentials: []Credential{{"TOKEN", "TOKEN", []string{"api.example.com", "b.example.com"}}}})
		}, "machine create --name a --credential TOKEN=TOKEN@api.example.com,b.example.com --error-format json"},
		{"create state-dir", newest, "", func(c *Client) error {
			c.StateDir = "/s"
			return c.MachineCreate(ctx, "a", CreateSpec{Command: []string{"x"}})
		}, "machine create --name a --error-format json --state-dir /s -- x"},
		{"ls state-dir", newest, "[]", func(c *Client) error { c.StateDir = "/s"; _, err := c.MachineLs(ctx); return err }, "machine ls --json --state-dir /s"},
		{"cp state-dir", newest, "", func(c *Client) error { c.StateDir = "/s"; return c.MachineCp(ctx, "/f", "a:/g") }, "machine cp --error-format json --state-dir /s /f a:/g"},
		{"exec state-dir", Version{2, 0, 0}, "", func(c *Client) error {
			c.StateDir = "/s"
			_, err := c.MachineExec(ctx, "a", ExecOptions{}, "true")
			return err
		}, "machine exec --name a --state-dir /s -- true"},
		{"pack image", flag, "", func(c *Client) error { return c.PackCreate(ctx, PackSpec{Image: "/i.tar", Output: "/p"}) }, "pack create --image /i.tar -o /p"},
		{"pack vm", flag, "", func(c *Client) error { return c.PackCreate(ctx, PackSpec{FromVM: "a", Output: "/p"}) }, "pack create --from-vm a -o /p"},
		{"help", flag, "", func(c *Client) error { _, err := c.Help(ctx, "machine", "cp"); return err }, "machine cp --help"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, argv := echo(t, tt.v, tt.out)
			if err := tt.call(c); err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(argv(), " "); got != tt.want {
				t.Errorf("argv\n got %s\nwant %s", got, tt.want)
			}
		})
	}
	// delete makes two calls; the second would hide the first in a plain log.
	for v, want := range map[Version]string{
		seed: "machine delete a -f", flag: "machine delete --name a -f", newest: "machine delete --name a -f --error-format json",
	} {
		log := filepath.Join(t.TempDir(), "log")
		c := script(t, `echo "$*" >> `+log+"\necho '[]'")
		c.Version = v
		if err := c.MachineDelete(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(log); string(got) != want+"\nmachine ls --json\n" {
			t.Errorf("%s: %q", v, got)
		}
	}
}

// replays runs a test on the recordings of each release.
func replays(t *testing.T, f func(t *testing.T, c *Client, fake *smolvmtest.Fake)) {
	for _, v := range realVersions {
		t.Run(v, func(t *testing.T) {
			c, fake := replay(t, v)
			f(t, c, fake)
			if strings.Contains(fake.Calls(t), `"record":""`) {
				t.Errorf("calls without a recording:\n%s", fake.Calls(t))
			}
		})
	}
}

// The calls of the recordings, made through the wrapper: the replayer fails on
// any argv that was not recorded, so this ties the wrapper to the real program.
func TestRecordedLifecycle(t *testing.T) {
	replays(t, func(t *testing.T, c *Client, f *smolvmtest.Fake) {
		ctx := t.Context()
		c2, err := Open(ctx, f.Bin, f.Env)
		if err != nil || c2.Version != c.Version {
			t.Fatalf("Open: %v, %v", c2, err)
		}
		if err := c.MachineCreate(ctx, "vm-a", CreateSpec{CPUs: 1, MemMiB: 512, Labels: []Label{{"owner", "bottle"}}}); err != nil {
			t.Error(err)
		}
		if err := c.MachineCreate(ctx, "vm-a", CreateSpec{CPUs: 1, MemMiB: 512}); !errors.Is(err, ErrAlreadyExists) {
			t.Errorf("duplicate: %v", err)
		}
		if m, err := c.MachineStatus(ctx, "vm-a"); err != nil || m.State != "created" || m.MemoryMiB != 512 || m.Labels["owner"] != "bottle" || m.PID != 0 {
			t.Errorf("status: %+v, %v", m, err)
		}
		if _, err := c.MachineExec(ctx, "vm-a", ExecOptions{}, "true"); !errors.Is(err, ErrNotRunning) {
			t.Errorf("exec on created: %v", err)
		}
		if pid, err := c.MachineStartIn(ctx, "vm-a", nil); err != nil || pid < 1 {
			t.Errorf("start tells pid %d, %v", pid, err)
		}
		if err := c.MachineStart(ctx, "vm-a"); err != nil {
			t.Error(err)
		}
		if m, err := c.MachineStatus(ctx, "vm-a"); err != nil || m.State != "running" || m.PID == 0 {
			t.Errorf("status of a running machine: %+v, %v", m, err)
		}
		if err := c.MachineStop(ctx, "vm-a"); err != nil { // of one that was not started
			t.Error(err)
		}
		if err := c.MachineStop(ctx, "vm-a"); err != nil {
			t.Error(err)
		}
		if m, err := c.MachineStatus(ctx, "vm-a"); err != nil || m.State != "stopped" || m.PID != 0 {
			t.Errorf("status of a stopped machine: %+v, %v", m, err)
		}
		if _, err := c.MachineExec(ctx, "vm-a", ExecOptions{}, "ls"); !errors.Is(err, ErrNotRunning) {
			t.Errorf("exec on stopped: %v", err)
		}
		if d, err := c.MachineDataDir(ctx, "vm-a"); err != nil || !strings.HasPrefix(d, "/home/me/.cache/smolvm/vms/") {
			t.Errorf("data-dir: %q, %v", d, err)
		}
		for name, want := range map[string]error{"bad name!": ErrInvalidName, "../x": ErrInvalidName, "": ErrInvalidName, "-x": ErrInvalidName, "Vm_A.1": ErrInvalidName, strings.Repeat("a", 130): ErrInvalidName} {
			if err := c.MachineCreate(ctx, name, CreateSpec{}); !errors.Is(err, want) {
				t.Errorf("create %q: %v", name, err)
			}
		}
		if err := c.MachineCreate(ctx, "vm-f", CreateSpec{
			CPUs: 2, MemMiB: 300, Labels: []Label{{"owner", "bottle"}, {"k", "a=b c"}}, Image: "/home/me/w/rootfs/",
			Volumes: []Volume{{"/home/me/w", "/workspace", false}, {"/home/me/w/dir", "/opt/bottle", true}},
			Sockets: []Socket{{"/home/me/w/gate.sock", "/run/bottle/gate.sock"}}, Command: []string{"/opt/bottle/guest", "init", "/opt/bottle/config.json"},
		}); err != nil {
			t.Error(err)
		}
		if m, err := c.MachineStatus(ctx, "vm-f"); err != nil || m.CPUs != 2 || m.MemoryMiB != 300 || m.Labels["k"] != "a=b c" || m.Network || !strings.Contains(m.Image, "rootfs") {
			t.Errorf("status of a whole machine: %+v, %v", m, err)
		}
		if err := c.PackCreate(ctx, PackSpec{FromVM: "nope", Output: "p3"}); !errors.Is(err, ErrNotFound) {
			t.Errorf("pack: %v", err)
		}
	})
}

func TestRecordedRefusals(t *testing.T) {
	replays(t, func(t *testing.T, c *Client, _ *smolvmtest.Fake) {
		ctx := t.Context()
		for _, tt := range []struct {
			spec CreateSpec
			kind error
			text string
		}{
			{CreateSpec{Volumes: []Volume{{"/home/me/w/f1", "/x", false}}}, ErrFailed, "must be a directory"},
			// Its code is NOT_FOUND; it is no machine that is missing.
			{CreateSpec{Volumes: []Volume{{"/home/me/w/none", "/x", false}}}, ErrFailed, "mount source not found"},
			{CreateSpec{Image: "./none.tar"}, ErrFailed, "No such file"},
			{CreateSpec{From: "none.smolmachine"}, ErrFailed, "file not found"},
		} {
			if err := c.MachineCreate(ctx, "x", tt.spec); !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%+v: %v", tt.spec, err)
			}
		}
		// Only the newer one makes a machine that it cannot start.
		err := c.MachineCreate(ctx, "x", CreateSpec{Image: "alpine"})
		if c.Version == NewestTested && err != nil || c.Version != NewestTested && (!errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "no network")) {
			t.Errorf("registry image without a network: %v", err)
		}
	})
	old, _ := replay(t, "1.9.1")
	if err := old.MachineStart(t.Context(), "t1"); !errors.Is(err, ErrBootExited) {
		t.Errorf("start that failed: %v", err)
	}
}

func TestStartedPID(t *testing.T) {
	for out, want := range map[string]int{
		"Machine 'a' running (PID: 12)\n": 12, "Machine 'a' already running (PID: 12)\n": 12, "": 0, "Machine 'a' running\n": 0,
		"Machine 'a' running (PID: )\n": 0, "Machine 'a' running (PID: -3)\n": 0, "Machine 'a' running (PID: 12": 0, "Machine 'a' running (PID: 1x)\n": 0,
	} {
		if got := startedPID(out); got != want {
			t.Errorf("%q: %d, want %d", out, got, want)
		}
	}
}

func TestNonZeroIsAnErrorExceptForExec(t *testing.T) {
	replays(t, func(t *testing.T, c *Client, _ *smolvmtest.Fake) {
		ctx := t.Context()
		for name, call := range map[string]func() error{
			"start":  func() error { return c.MachineStart(ctx, "nope") },
			"stop":   func() error { return c.MachineStop(ctx, "nope") },
			"delete": func() error { return c.MachineDelete(ctx, "nope") },
			"status": func() error { _, err := c.MachineStatus(ctx, "nope"); return err },
			"dir":    func() error { _, err := c.MachineDataDir(ctx, "nope"); return err },
			"exec":   func() error { _, err := c.MachineExec(ctx, "nope", ExecOptions{Dir: "/"}, "true"); return err },
			"cp":     func() error { return c.MachineCp(ctx, "/etc/hostname", "nope:/tmp/x") },
		} {
			err := call()
			var e *Error
			if !errors.Is(err, ErrNotFound) || !errors.As(err, &e) || e.Exit != 1 || !strings.Contains(e.Stderr, "nope") {
				t.Errorf("%s: %v", name, err)
			}
			if f := fault.As(err); f.Exit != fault.Unavailable || f.Code != "smolvm_not_found" {
				t.Errorf("%s: fault %d %s", name, f.Exit, f.Code)
			}
		}
		for _, tt := range []struct {
			code int
			argv []string
		}{
			{3, []string{"sh", "-c", "exit 3"}}, {255, []string{"sh", "-c", "exit 255"}}, {137, []string{"sh", "-c", "kill -9 $$"}}, {143, []string{"sh", "-c", "kill -15 $$"}},
			{1, []string{"sh", "-c", "echo guest-says >&2; exit 1"}}, {4, []string{"sh", "-c", "echo out; echo err >&2; exit 4"}},
		} {
			r, err := c.MachineExec(ctx, "vm-a", ExecOptions{}, tt.argv...)
			if err != nil || r.Code != tt.code {
				t.Errorf("%q: %d, %v", tt.argv, r.Code, err)
			}
		}
	})
}

func TestExecPassthrough(t *testing.T) {
	replays(t, func(t *testing.T, c *Client, _ *smolvmtest.Fake) {
		ctx := t.Context()
		for _, stream := range []bool{false, true} {
			r, err := c.MachineExec(ctx, "vm-a", ExecOptions{Stream: stream}, "sh", "-c", "echo out; echo err >&2; exit 4")
			if err != nil || r.Code != 4 || string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" {
				t.Errorf("%+v, %v", r, err)
			}
		}
		r, err := c.MachineExec(ctx, "vm-a", ExecOptions{Stdin: strings.NewReader("abc")}, "sh", "-c", "cat; exit 7")
		if err != nil || r.Code != 7 || string(r.Stdout) != "abc" {
			t.Errorf("stdin: %+v, %v", r, err)
		}
		r, err = c.MachineExec(ctx, "vm-a", ExecOptions{Timeout: 5 * time.Second}, "sleep", "60")
		if err != nil || r.Code != 124 {
			t.Errorf("timeout: %+v, %v", r, err)
		}
		r, err = c.MachineExec(ctx, "vm-a", ExecOptions{Dir: "/etc"}, "sh", "-c", "pwd; id")
		if err != nil || r.Code != 0 || !strings.HasPrefix(string(r.Stdout), "/etc\nuid=0(root)") {
			t.Errorf("dir: %+v, %v", r, err)
		}
		if _, err = c.MachineExec(ctx, "vm-a", ExecOptions{}, "/no/such/cmd"); !errors.Is(err, ErrCommand) {
			t.Errorf("no such command: %v", err)
		}
		// What it cannot run is passed on raw, and smolvm itself says so.
		if _, err = c.MachineExec(ctx, "vm-a", ExecOptions{}, "/etc/passwd"); !errors.Is(err, ErrCommand) {
			t.Errorf("not executable: %v", err)
		}
	})
}

func TestExecAttached(t *testing.T) {
	replays(t, func(t *testing.T, c *Client, _ *smolvmtest.Fake) {
		ctx := t.Context()
		in, out := filepath.Join(t.TempDir(), "in"), filepath.Join(t.TempDir(), "out")
		if err := os.WriteFile(in, []byte("abc"), 0o600); err != nil {
			t.Fatal(err)
		}
		stdin, err := os.Open(in)
		if err != nil {
			t.Fatal(err)
		}
		defer stdin.Close()
		stdout, err := os.Create(out)
		if err != nil {
			t.Fatal(err)
		}
		defer stdout.Close()
		pid := 0
		code, err := c.MachineExecAttached(ctx, "vm-a", Attached{Stdin: stdin, Stdout: stdout, Started: func(p int) { pid = p }}, "sh", "-c", "cat; exit 7")
		if got, _ := os.ReadFile(out); err != nil || code != 7 || string(got) != "abc" || pid == 0 {
			t.Errorf("%d, %v, %q, pid %d", code, err, got, pid)
		}
	})
}

// A guest that prints smolvm's own words and ends with 1 must not pass for a
// failure of smolvm when there is a proof that it ran.
func TestForgedFailureIsToldApart(t *testing.T) {
	ctx := t.Context()
	c := script(t, `echo "Error: agent operation failed: connect: machine 'x' is not running" >&2; exit 1`)
	errFile, err := os.Create(filepath.Join(t.TempDir(), "err"))
	if err != nil {
		t.Fatal(err)
	}
	defer errFile.Close()
	if _, err := c.MachineExecAttached(ctx, "x", Attached{Stderr: errFile}, "true"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("without a proof: %v", err)
	}
	if code, err := c.MachineExecAttached(ctx, "x", Attached{Ran: func(context.Context) (int, bool) { return 1, true }}, "true"); code != 1 || err != nil {
		t.Errorf("with a proof: %d, %v", code, err)
	}
	if _, err := c.MachineExecAttached(ctx, "x", Attached{Ran: func(context.Context) (int, bool) { return 0, false }}, "true"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("disproved: %v", err)
	}
	if got, _ := os.ReadFile(errFile.Name()); !strings.HasPrefix(string(got), "Error: agent") {
		t.Errorf("stderr was not passed on: %q", got)
	}
	plain := script(t, `echo "no match" >&2; exit 1`)
	asked := false
	code, err := plain.MachineExecAttached(ctx, "x", Attached{Ran: func(context.Context) (int, bool) { asked = true; return 0, true }}, "grep")
	if code != 1 || err != nil || asked {
		t.Errorf("a guest's own exit 1: %d, %v, asked %v", code, err, asked)
	}
}

// A smolvm that is killed leaves the terminal raw and the input non-blocking.
func TestKilledExecRestoresTheTerminal(t *testing.T) {
	ptm, pts, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer ptm.Close()
	defer pts.Close()
	fd := int(pts.Fd())
	before, err := unix.IoctlGetTermios(fd, ioctlGetTermios)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := script(t, "stty raw -echo; touch "+dir+"/raw; exec sleep 60")
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for range 3000 {
			if _, err := os.Stat(dir + "/raw"); err == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	if _, err := c.MachineExecAttached(ctx, "a", Attached{Stdin: pts, Stdout: pts, TTY: true}, "sh"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	after, err := unix.IoctlGetTermios(fd, ioctlGetTermios)
	if err != nil || after.Lflag != before.Lflag || after.Iflag != before.Iflag {
		t.Errorf("%v: lflag %x, was %x", err, after.Lflag, before.Lflag)
	}
}

func TestEmptyPathCpIsANoOp(t *testing.T) {
	c, f := replay(t, "1.9.1")
	for _, p := range [][2]string{{"", "vm-a:/x"}, {"/x", ""}, {"vm-a:", "/x"}, {"/x", "vm-a:"}, {"", ""}} {
		if err := c.MachineCp(t.Context(), p[0], p[1]); err != nil {
			t.Errorf("%q: %v", p, err)
		}
	}
	if f.Calls(t) != "" {
		t.Errorf("smolvm was called: %s", f.Calls(t))
	}
	// A host path with a colon in it is not an empty guest path.
	if emptyPath("/a:") || emptyPath("./b:") || !emptyPath("vm:") {
		t.Error("emptyPath")
	}
}

func TestCpErrors(t *testing.T) {
	replays(t, func(t *testing.T, c *Client, _ *smolvmtest.Fake) {
		ctx := t.Context()
		if err := c.MachineCp(ctx, "/home/me/w/f1", "vm-a:/newdir/deep/f1"); err != nil {
			t.Error(err)
		}
		for src, dst := range map[string]string{"/home/me/w/dir": "vm-a:/workspace/dir", "vm-a:/etc": "/home/me/w/etcdir", "/a": "/b"} {
			if err := c.MachineCp(ctx, src, dst); !errors.Is(err, ErrFailed) {
				t.Errorf("cp %s %s: %v", src, dst, err)
			}
		}
		// The newer one's JSON stands behind its progress, on one line.
		err := c.MachineCp(ctx, "vm-a:/workspace/f1", "/home/me/w/dir/")
		var e *Error
		if !errors.As(err, &e) || e.Kind != ErrFailed || !strings.Contains(e.Stderr, "Is a directory") || (e.Code == "SMOLVM_ERROR") == c.Version.Less(sinceErrorFormat) {
			t.Errorf("cp to a folder: %+v", e)
		}
	})
}

func TestHelpAnswers(t *testing.T) {
	for _, v := range []string{"1.9.1", "1.32.2"} {
		c, _ := replay(t, v)
		text, err := c.Help(t.Context())
		if err != nil || !strings.Contains(text, "Usage: smolvm") {
			t.Errorf("%s: %v, %.60q", v, err, text)
		}
		if text, err = c.Help(t.Context(), "machine", "exec"); err != nil || !strings.Contains(text, "--tty") {
			t.Errorf("%s: machine exec: %v, %.60q", v, err, text)
		}
	}
}

func TestLsJSONIsAList(t *testing.T) {
	replays(t, func(t *testing.T, c *Client, _ *smolvmtest.Fake) {
		ctx := t.Context()
		list, err := c.MachineLs(ctx)
		if err != nil || list == nil || len(list) != 0 {
			t.Errorf("empty: %v, %v", list, err)
		}
		for _, state := range []string{"created", "created", "running", "stopped"} {
			list, err = c.MachineLs(ctx)
			if err != nil || len(list) != 1 || list[0].Name != "vm-a" || list[0].State != state || (list[0].PID > 0) != (state == "running") {
				t.Errorf("%s: %+v, %v", state, list, err)
			}
		}
		if list, err = c.MachineLs(ctx); err != nil || len(list) != 0 {
			t.Errorf("deleted: %v, %v", list, err)
		}
		if list, err = c.MachineLs(ctx); err != nil || len(list) != 1 || list[0].Name != "vm-i" || list[0].Network {
			t.Errorf("image: %+v, %v", list, err)
		}
	})
}

func TestLenientDecode(t *testing.T) {
	for out, want := range map[string]error{
		`[{"name":"a","state":"hibernating","pid":"x","cpus":-1,"memory_mib":1e300,"labels":["?"],"new":{}}]`: nil,
		`[{"state":"running"}]`: ErrGarbage,
		`[{"name":7}]`:          ErrGarbage,
		`{"name":"a"}`:          ErrGarbage,
		`[{"name":"a"}`:         ErrGarbage,
		`null`:                  ErrGarbage,
		``:                      ErrGarbage,
		`No machines found`:     ErrGarbage,
	} {
		c := script(t, "cat <<'X'\n"+out+"\nX")
		list, err := c.MachineLs(t.Context())
		if !errors.Is(err, want) {
			t.Errorf("%s: %v", out, err)
		}
		if want == nil && (len(list) != 1 || list[0].State != "hibernating" || list[0].PID != 0 || list[0].CPUs != 0 || list[0].MemoryMiB != 0) {
			t.Errorf("%s: %+v", out, list)
		}
	}
	c := script(t, `echo '{"name":"b"}'`)
	if _, err := c.MachineStatus(t.Context(), "a"); !errors.Is(err, ErrGarbage) {
		t.Errorf("status of another machine: %v", err)
	}
}

// "Cancelled" with exit 0 is a failure.
func TestDeleteIsVerified(t *testing.T) {
	c := script(t, `case "$2" in delete) echo "Stopping machine 'vm-a'..."; echo Cancelled;; ls) echo '[{"name":"vm-a"}]';; esac`)
	err := c.MachineDelete(t.Context(), "vm-a")
	if !errors.Is(err, ErrNotDeleted) || !strings.Contains(err.Error(), "Cancelled") {
		t.Errorf("%v", err)
	}
	rc, _ := replay(t, "1.32.2")
	if err := rc.MachineCreate(t.Context(), "a", CreateSpec{CPUs: 1, MemMiB: 256}); !strings.Contains(err.Error(), "unexpected call") {
		t.Errorf("the replayer let an unrecorded argv pass: %v", err)
	}
}

func TestErrorFormatJSON(t *testing.T) {
	c, _ := replay(t, "1.32.2")
	_, err := c.MachineExec(t.Context(), "nope", ExecOptions{Dir: "/"}, "true")
	var e *Error
	if !errors.As(err, &e) || e.Kind != ErrNotFound || e.Code != "NOT_FOUND" || e.Stderr != "vm not found: nope" {
		t.Errorf("%+v", err)
	}
	err = c.MachineCreate(t.Context(), "vm-a", CreateSpec{CPUs: 1, MemMiB: 512})
	if !errors.As(err, &e) || e.Kind != ErrAlreadyExists || e.Code != "CONFIG_ERROR" {
		t.Errorf("%+v", err)
	}
}

func TestDialects(t *testing.T) {
	ctx := t.Context()
	c := &Client{Bin: "/nonexistent", Version: Version{0, 1, 9}}
	if _, err := c.MachineLs(ctx); !errors.Is(err, ErrUnsupported) {
		t.Errorf("0.1.9: %v", err)
	}
	if err := c.MachineStart(ctx, "a"); !errors.Is(err, ErrUnsupported) || fault.As(err).Exit != fault.Host {
		t.Errorf("0.1.9: %v", err)
	}
	c.Version = Version{0, 5, 1}
	if err := c.MachineCp(ctx, "/a", "b:/c"); !errors.Is(err, ErrUnsupported) {
		t.Errorf("cp: %v", err)
	}
	c.Version = Version{1, 0, 1}
	for _, name := range []string{"-f", ""} {
		if err := c.MachineDelete(ctx, name); !errors.Is(err, ErrInvalidName) {
			t.Errorf("positional %q: %v", name, err)
		}
	}
	c.Version = Version{1, 6, 3}
	if err := c.MachineCreate(ctx, "a", CreateSpec{Sockets: []Socket{{"/a", "/b"}}}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "1.6.4") {
		t.Errorf("mount-socket: %v", err)
	}
	c.Version = Version{1, 7, 9}
	if err := c.MachineCreate(ctx, "a", CreateSpec{Labels: []Label{{"a", "b"}}}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("label: %v", err)
	}
	c.Version = Version{1, 14, 3}
	if _, err := c.MachineExec(ctx, "a", ExecOptions{User: "1000"}, "id"); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "1.15.0") {
		t.Errorf("--user: %v", err)
	}
	c.Version = Version{1, 25, 1}
	if err := c.MachineCreate(ctx, "a", CreateSpec{Credentials: []Credential{{"A", "A", []string{"h"}}}}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "1.25.2") {
		t.Errorf("--credential: %v", err)
	}
	// Without --state-dir no call may act on smolvm's own state in its place.
	c.Version, c.StateDir = Version{1, 28, 1}, "/s"
	_, lsErr := c.MachineLs(ctx)
	_, execErr := c.MachineExec(ctx, "a", ExecOptions{}, "true")
	_, attachedErr := c.MachineExecAttached(ctx, "a", Attached{}, "true")
	for what, err := range map[string]error{"ls": lsErr, "exec": execErr, "attached": attachedErr,
		"create": c.MachineCreate(ctx, "a", CreateSpec{}), "delete": c.MachineDelete(ctx, "a"), "cp": c.MachineCp(ctx, "/a", "b:/c")} {
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "--state-dir needs smolvm 1.31.0, this is 1.28.1") {
			t.Errorf("%s: %v", what, err)
		}
	}
	c.StateDir = ""
	c.Version = Version{1, 9, 1}
	if err := c.MachineCreate(ctx, "a", CreateSpec{Sockets: []Socket{{"/a:b", "/b"}}}); err == nil || !strings.Contains(err.Error(), "colon") {
		t.Errorf("colon: %v", err)
	}
	// The other dialect at 1.9.1 is refused by smolvm itself: clap, exit 2.
	old, _ := replay(t, "1.9.1")
	old.Version = Version{1, 0, 1}
	if err := old.MachineCreate(ctx, "vm-pos", CreateSpec{}); !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), "unexpected argument") {
		t.Errorf("%v", err)
	}
}

// A release that nobody has seen works as long as it knows the flags that are
// needed; else the error names the flag, and a release that has it.
func TestUnknownNewerVersions(t *testing.T) {
	ctx := t.Context()
	refuse := func(flag string) string {
		return `case "$*" in --version) echo "smolvm 2.7.0"; exit;; *"` + flag + `"*) printf "error: unexpected argument '` + flag + `' found\n\nUsage: smolvm machine create\n" >&2; exit 2;; esac
if [ "$2" = ls ]; then echo '[]'; fi`
	}
	full := CreateSpec{Labels: []Label{{"owner", "bottle"}}, Sockets: []Socket{{"/a", "/b"}}, Command: []string{"x"}}
	for flag, call := range map[string]func(*Client) error{
		"--mount-socket": func(c *Client) error { return c.MachineCreate(ctx, "a", full) },
		"--label":        func(c *Client) error { return c.MachineCreate(ctx, "a", full) },
		"--name":         func(c *Client) error { return c.MachineStart(ctx, "a") },
		"-f":             func(c *Client) error { return c.MachineDelete(ctx, "a") },
		"-i":             func(c *Client) error { _, err := c.MachineExecAttached(ctx, "a", Attached{}, "true"); return err },
		"-w":             func(c *Client) error { _, err := c.MachineExec(ctx, "a", ExecOptions{Dir: "/"}, "true"); return err },
	} {
		bin := script(t, refuse(flag)).Bin
		c, err := Open(ctx, bin, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = call(c)
		f := fault.As(err)
		if !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), "is smolvm 2.7.0, which does not know "+flag) || f.Exit != fault.Unavailable || !strings.Contains(f.Hint, wheel.Newest) {
			t.Errorf("%s: %v (hint %q)", flag, err, f.Hint)
		}
	}
	// Errors as JSON are not needed.
	c, err := Open(ctx, script(t, refuse("--error-format")).Bin, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.MachineCreate(ctx, "a", full), c.MachineStart(ctx, "a"), c.MachineDelete(ctx, "a"), c.MachineCp(ctx, "/a", "b:/c")); err != nil {
		t.Errorf("without --error-format: %v", err)
	}
	if r, err := c.MachineExec(ctx, "a", ExecOptions{}, "true"); err != nil || r.Code != 0 {
		t.Errorf("exec without --error-format: %+v, %v", r, err)
	}
	// The call without it fails as any other does.
	c.Bin = script(t, refuse("--error-format")+"\necho 'Error: vm not found: a' >&2; exit 1").Bin
	if err := c.MachineStart(ctx, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	if NewestTested.String() != wheel.Newest || !strings.Contains(InstallHint, wheel.Newest) {
		t.Errorf("NewestTested is %s, the hint %q; %s is pinned", NewestTested, InstallHint, wheel.Newest)
	}
}

// What the real ones say of a flag that they do not have.
func TestRecordedUnknownFlags(t *testing.T) {
	recs, err := fakesmolvm.Load(transcripts)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"1.9.1 create-unknown-flag": "--no-such-flag", "1.32.2 create-unknown-flag": "--no-such-flag", "1.9.1 error-format": "--error-format", "1.9.1 state-dir": "--state-dir",
		"1.9.1 exec-user-unknown": "--user", "1.9.1 credential": "--credential", "1.9.1 cp-r": "-r", "1.32.2 cp-r": "-r", "1.9.1 create-positional": "", "1.32.2 create-cpus-999": "",
	}
	for _, r := range recs {
		flag, ok := want[r.Version+" "+r.Name]
		if !ok {
			continue
		}
		delete(want, r.Version+" "+r.Name)
		e := classify("machine create", *r.Exit, r.Stderr)
		if got := unknownFlag(e); e.Kind != ErrUsage || got != flag {
			t.Errorf("%s %s: %v, flag %q, want %q", r.Version, r.Name, e, got, flag)
		}
	}
	if len(want) > 0 {
		t.Errorf("not recorded: %v", want)
	}
}

func TestParseVersion(t *testing.T) {
	for in, want := range map[string]Version{"smolvm 1.9.1": {1, 9, 1}, "smolvm 1.32.2": {1, 32, 2}, "smolvm 2.0.0-rc.1": {2, 0, 0}} {
		if got, err := ParseVersion(in); err != nil || got != want {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "smolvm", "smolvm 1.9", "smol-vmm 1.9.1", "smolvm 1.9.1\nx", "smolvm 99999999999.0.0"} {
		if got, err := ParseVersion(in); err == nil {
			t.Errorf("%q: %v", in, got)
		}
	}
	if !(Version{1, 9, 1}).Less(Version{1, 10, 0}) || (Version{1, 9, 1}).Less(Version{1, 9, 1}) {
		t.Error("Less")
	}
}

func TestWrongPrograms(t *testing.T) {
	ctx := t.Context()
	for name, tt := range map[string]struct {
		body string
		want error
		code string
		text string
	}{
		"the Python package smolvm": {`echo "smolvm 0.0.36"`, ErrWrongProgram, "smolvm_wrong_program", "0.0.36"},
		"its import error":          {`printf 'Traceback (most recent call last):\nModuleNotFoundError\n' >&2; exit 1`, ErrWrongProgram, "smolvm_wrong_program", ""},
		"garbage":                   {`head -c 300 /dev/urandom`, ErrGarbage, "smolvm_garbage", ""},
		"nothing":                   {`exit 0`, ErrGarbage, "smolvm_garbage", ""},
		"an error":                  {`echo "libkrun.so: cannot open" >&2; exit 127`, ErrGarbage, "smolvm_garbage", "libkrun.so"},
		"a right answer, exit 1":    {`echo "smolvm 1.9.1"; exit 1`, ErrWrongProgram, "smolvm_wrong_program", ""},
		"killed":                    {`kill -9 $$`, ErrFailed, "smolvm_failed", "killed"},
	} {
		c := script(t, tt.body)
		_, err := Open(ctx, c.Bin, nil)
		if !errors.Is(err, tt.want) || fault.As(err).Code != tt.code || fault.As(err).Exit != fault.Unavailable || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if f := fault.As(&Error{Kind: ErrWrongProgram}); !strings.Contains(f.Hint, "smolmachines") {
		t.Error(f.Hint)
	}
}

func TestMegabytesAreCutOff(t *testing.T) {
	c := script(t, "exec cat /dev/zero")
	start := time.Now()
	if _, err := c.MachineLs(t.Context()); !errors.Is(err, ErrTooMuch) {
		t.Errorf("stdout: %v", err)
	}
	c = script(t, "exec cat /dev/zero >&2")
	_, err := c.MachineLs(t.Context())
	if !errors.Is(err, ErrTooMuch) || len(err.Error()) > 6<<10 {
		t.Errorf("stderr: %.200v", err)
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("took %s", d)
	}
	// A long message that fits is cut to what a person can read.
	c = script(t, `head -c 100000 /dev/zero | tr '\0' x >&2; echo "last words" >&2; exit 1`)
	_, err = c.MachineLs(t.Context())
	if len(err.Error()) > 6<<10 || !strings.Contains(err.Error(), "last words") {
		t.Errorf("%d bytes", len(err.Error()))
	}
}

func TestHangingIsEnded(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	c := script(t, "sleep 300 & echo $! > "+pidFile+"\nwait")
	c.Timeout = 300 * time.Millisecond
	start := time.Now()
	_, err := c.MachineLs(t.Context())
	if !errors.Is(err, ErrTimeout) || fault.As(err).Code != "smolvm_timeout" {
		t.Errorf("%v", err)
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("took %s", d)
	}
	waitGone(t, pidFile) // the whole process group

	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(200*time.Millisecond, cancel)
	c.Timeout = time.Minute
	if _, err := c.MachineLs(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A helper that keeps smolvm's output open must not keep the caller.
func TestInheritedPipesDoNotHang(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	c := script(t, "sleep 300 & echo $! > "+pidFile+"\necho '[]'")
	start := time.Now()
	if _, err := c.MachineLs(t.Context()); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("took %s", d)
	}
	if pid := readPID(t, pidFile); pid > 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

func readPID(t *testing.T, file string) int {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, c := range strings.TrimSpace(string(data)) {
		n = n*10 + int(c-'0')
	}
	return n
}

func waitGone(t *testing.T, file string) {
	t.Helper()
	pid := readPID(t, file)
	for range 3000 {
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(itoa(pid)) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("process %d is still there", pid)
}

func itoa(n int) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + string(rune('0'+n%10))
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	put := func(rel string, mode os.FileMode) string {
		p := filepath.Join(dir, rel)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte("#!/bin/sh\necho smolvm 1.9.1\n"), mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	onPath := put("path/smolvm", 0o755)
	put("notexec/smolvm", 0o644)
	old := put("data/bottle/smolvm/1.9.1/smol/smolvm", 0o755)
	newest := put("data/bottle/smolvm/1.32.2/smol/smolvm", 0o755)
	put("data/bottle/smolvm/other/smol/smolvm", 0o755)
	data := filepath.Join(dir, "data")
	tests := []struct {
		name, want string
		env        map[string]string
	}{
		{"path", onPath, map[string]string{"PATH": "relative:" + dir + "/notexec:" + dir + "/path", "XDG_DATA_HOME": data}},
		{"variable wins", old, map[string]string{"PATH": dir + "/path", "BOTTLE_SMOLVM": old}},
		{"variable is wrong", "", map[string]string{"PATH": dir + "/path", "BOTTLE_SMOLVM": dir + "/none"}},
		{"variable is not executable", "", map[string]string{"BOTTLE_SMOLVM": dir + "/notexec/smolvm"}},
		{"variable is a folder", "", map[string]string{"BOTTLE_SMOLVM": dir}},
		{"variable is relative", "", map[string]string{"BOTTLE_SMOLVM": "smolvm"}},
		{"installed", newest, map[string]string{"PATH": dir + "/notexec", "XDG_DATA_HOME": data}},
		{"nothing", "", map[string]string{"PATH": "", "HOME": dir + "/nobody"}},
		{"relative path entry", "", map[string]string{"PATH": "path:."}},
	}
	for _, tt := range tests {
		got, err := Find(func(k string) string { return tt.env[k] })
		if got != tt.want || (tt.want == "") != errors.Is(err, ErrMissing) {
			t.Errorf("%s: %q, %v", tt.name, got, err)
		}
	}
	getenv := func(k string) string { return map[string]string{"PATH": dir + "/path"}[k] }
	if ok, err := IsAvailable(t.Context(), getenv, nil); !ok || err != nil {
		t.Errorf("IsAvailable: %v, %v", ok, err)
	}
	if ok, err := IsAvailable(t.Context(), func(string) string { return "" }, nil); ok || !errors.Is(err, ErrMissing) {
		t.Errorf("IsAvailable: %v, %v", ok, err)
	}
}

func TestPrograms(t *testing.T) {
	dir := t.TempDir()
	notAProgram := filepath.Join(dir, "smolvm")
	if err := os.WriteFile(notAProgram, []byte("\x7fELF\x00junk"), 0o755); err != nil {
		t.Fatal(err)
	}
	for bin, want := range map[string]error{filepath.Join(dir, "none"): ErrMissing, dir: ErrMissing, notAProgram: ErrWrongProgram} {
		if _, err := Open(t.Context(), bin, nil); !errors.Is(err, want) {
			t.Errorf("%s: %v", bin, err)
		}
		c := &Client{Bin: bin, Version: Version{1, 9, 1}}
		if _, err := c.MachineExecAttached(t.Context(), "a", Attached{}, "true"); !errors.Is(err, want) {
			t.Errorf("attached %s: %v", bin, err)
		}
	}
}

// Messages go to terminals and logs; a guest has a say in some of them.
func TestMessagesAreOneCleanLine(t *testing.T) {
	e := classify("machine start", 1, "Starting machine 'x'...\n\x1b[2m2026\x1b[0m WARN \x07\u009b31m\nError: agent: KvmContext(KvmOpen(Error(13)))\n")
	if e.Kind != ErrKVM || fault.As(e).Exit != fault.Host {
		t.Errorf("%v", e)
	}
	if s := e.Error(); strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x9b || r == 0x1b }) || !strings.Contains(s, "KvmOpen(Error(13))") {
		t.Errorf("%q", s)
	}
}

func TestEveryKindHasItsFault(t *testing.T) {
	for kind, f := range faults {
		if f.Exit == 0 || f.Code == "" || f.Hint == "" {
			t.Errorf("%v: %+v", kind, f)
		}
		if got := fault.As(&Error{Kind: kind}); got.Code != f.Code || got.Exit != f.Exit {
			t.Errorf("%v: %+v", kind, got)
		}
	}
	for _, m := range markers {
		if _, ok := faults[m.kind]; !ok {
			t.Errorf("%v has no fault", m.kind)
		}
	}
}

// Every failure that was recorded is classified, and never as a guest's.
func TestRecordedFailuresAreClassified(t *testing.T) {
	recs, err := fakesmolvm.Load(transcripts)
	if err != nil {
		t.Fatal(err)
	}
	guest := map[string]bool{} // exits that the guest command chose
	for _, n := range []string{"exec-3", "exec-255", "exec-1", "exec-killed", "exec-terminated", "exec-timeout", "exec-after-timeout", "exec-stdin-exit", "exec-both", "exec-both-stream",
		"image-exec-3", "image-exec-1", "image-exec-127", "image-exec-not-found", "image-exec-timeout", "image-read-only", "itar-4exec3", "itar-4timeout"} {
		guest[n] = true
	}
	seen := 0
	for _, r := range recs {
		if *r.Exit == 0 {
			continue
		}
		seen++
		// exec-forged is a guest that says what smolvm says; see TestForgedFailureIsToldApart.
		if own := looksLikeOwnFailure(*r.Exit, r.Stderr); own == guest[r.Name] {
			t.Errorf("%s: taken for smolvm's own: %v", r.Name, own)
		}
	}
	if seen < 100 {
		t.Errorf("only %d failures were recorded", seen)
	}
}

func FuzzClassify(f *testing.F) {
	f.Add(1, "Error: vm not found: x\n")
	f.Add(2, "error: unexpected argument\n")
	f.Add(1, `{"error":{"code":"NOT_FOUND","message":"\u0000"}}`)
	f.Fuzz(func(t *testing.T, exit int, stderr string) {
		e := classify("machine ls", exit, stderr)
		if len(e.Stderr) > maxStderr+8 || len(e.Error()) > 2<<10 {
			t.Fatalf("unbounded: %d, %d", len(e.Stderr), len(e.Error()))
		}
		if strings.ContainsAny(e.Error(), "\n\r\x1b") {
			t.Fatalf("%q", e.Error())
		}
		looksLikeOwnFailure(exit, stderr)
	})
}

func FuzzLs(f *testing.F) {
	f.Add(`[{"name":"a","labels":{"k":"v"},"pid":1}]`)
	f.Fuzz(func(t *testing.T, out string) {
		v, err := decode("machine ls", Result{Stdout: []byte(out)}, "[")
		if err != nil {
			return
		}
		for _, item := range v.Array() {
			if m, err := machine("machine ls", item); err == nil && (m.Name == "" || m.PID < 0) {
				t.Fatalf("%+v", m)
			}
		}
	})
}

// What smolvm said about packs and Smolfiles, by what it means.
func TestRecordedPackFailures(t *testing.T) {
	recs, err := fakesmolvm.Load(transcripts)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]error{
		"pk1322-pack-not-ready": ErrNotReady,
		"pk191-smolfile-from":   ErrUsage, "pk1322-smolfile-from": ErrUsage,
		"pk191-from-junk": ErrFailed, "pk1322-from-junk": ErrFailed,
		"pk191-output-name": ErrFailed, "pk1322-output-name": ErrFailed,
		"pk191-full-staging": ErrDiskFull, "pk1322-full-staging": ErrDiskFull,
		"pk191-full-output": ErrDiskFull, "pk1322-full-output": ErrDiskFull,
	}
	for _, r := range recs {
		if kind, ok := want[r.Name]; ok {
			if e := classify("pack create", *r.Exit, r.Stderr); !errors.Is(e, kind) || strings.ContainsAny(e.Error(), "\n\r\x1b") {
				t.Errorf("%s: %v", r.Name, e)
			}
			delete(want, r.Name)
		}
	}
	if len(want) > 0 {
		t.Errorf("not recorded: %v", want)
	}
}
