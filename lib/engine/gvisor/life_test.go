//go:build linux

package gvisor

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/runsc"
	"github.com/bottle-tools/bottle/lib/state"
)

// The tools that people's agents use have to work out of the box.
func TestBottleToolchain(t *testing.T) {
	b := start(t, newSpec(t, "tools-00000001"), nil)
	for _, c := range []struct{ needs, line, want string }{
		{"/usr/bin/git", "cd /workspace && git init -q . && git config user.email a@b && git config user.name a && echo x > f && git add f && git commit -q -m one && git status --porcelain && git log --oneline | wc -l", "1"},
		{"/usr/bin/python3", "python3 -c 'import ssl, sqlite3, multiprocessing as m; print(m.Pool(2).map(abs, [-1, -2]))'", "[1, 2]"},
		{"/usr/bin/pip3", "python3 -m pip --version", "pip "},
		{"/usr/bin/node", "node -e 'console.log(require(\"os\").userInfo().username, require(\"os\").hostname())'", "agent tools-00000001"},
		{"/usr/bin/npm", "npm --version", "."},
		{"/usr/bin/java", "java -version 2>&1", "openjdk"},
		{"/usr/bin/gcc", "printf 'int main(){return 7;}' > /tmp/a.c && gcc -o /tmp/a /tmp/a.c && (/tmp/a; echo $?)", "7"},
		{"/usr/local/go/bin/go", "go version", "go version"},
		{"/bin/bash", "bash -c 'cat <(echo fd) && ls /dev/fd/ >/dev/null && echo $HOME $USER'", "fd"},
		{"/usr/bin/openssl", "openssl version", "OpenSSL"},
		{"/usr/bin/perl", "perl -MPOSIX -e 'print getcwd'", "/workspace"},
	} {
		t.Run(filepath.Base(c.needs), func(t *testing.T) {
			if !exists(c.needs) {
				t.Skipf("NOT TESTED: this host has no %s", c.needs)
			}
			if out := b.sh(t, c.line); !strings.Contains(out, c.want) {
				t.Errorf("got %q, want %q", out, c.want)
			}
		})
	}
}

func TestBottleLifecycle(t *testing.T) {
	s := newSpec(t, "life-00000001")
	var roles []string
	s.Record = func(role string, pid int) error {
		if _, err := state.Identify(pid); err != nil {
			t.Errorf("%s %d is recorded when it does not run: %v", role, pid, err)
		}
		roles = append(roles, role)
		return nil
	}
	b := start(t, s, nil)
	if got := strings.Join(roles, " "); got != "runsc sandbox gofer" {
		t.Errorf("recorded %q", got)
	}
	ctx := context.Background()
	if alive, err := b.Alive(ctx, b.ref); err != nil || !alive {
		t.Errorf("alive: %v, %v", alive, err)
	}
	if u, err := b.Usage(ctx, b.ref); err != nil || u.MemoryBytes < 1<<20 {
		t.Errorf("usage: %+v, %v", u, err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := b.started.Wait(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait with a time limit: %v", err)
	}
	for range 2 {
		if err := b.Delete(ctx, b.ref); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if err := b.started.Wait(ctx); err != nil {
		t.Errorf("wait after delete: %v", err)
	}
	if alive, err := b.Alive(ctx, b.ref); err != nil || alive {
		t.Errorf("alive after delete: %v, %v", alive, err)
	}
	_, err := b.Exec(ctx, b.ref, engine.ExecRequest{Argv: []string{"true"}})
	if f := fault.As(err); f == nil || f.Code != "not_running" || f.Exit != fault.Unavailable {
		t.Errorf("exec after delete: %v", err)
	}
	nothingLeft(t, s)
}

// A keeper that was killed before it recorded anything leaves a sandbox that
// Delete finds all the same.
func TestBottleDeleteUnrecorded(t *testing.T) {
	s := newSpec(t, "cut-00000001")
	b := start(t, s, nil)
	if err := os.Remove(filepath.Join(s.Dir, recordName)); err != nil {
		t.Fatal(err)
	}
	if err := b.Delete(context.Background(), b.ref); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, s)
}

func TestBottleSandboxKilled(t *testing.T) {
	s := newSpec(t, "kill-00000001")
	b := start(t, s, nil)
	rec, err := loadRecord(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	go func() {
		_, err := b.Exec(context.Background(), b.ref, engine.ExecRequest{Argv: []string{"sleep", "1000"}})
		result <- err
	}()
	time.Sleep(200 * time.Millisecond)
	if err := state.Signal(rec.Sandbox, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-result:
		if f := fault.As(err); f == nil || f.Exit != fault.Unavailable {
			t.Errorf("exec in a sandbox that dies: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("exec hangs")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := b.started.Wait(ctx); err != nil {
		t.Errorf("wait: %v", err)
	}
}

func TestBottlesAtOnce(t *testing.T) {
	if testing.Short() {
		t.Skip("short")
	}
	const n = 20
	bottles := make([]*bottle, n)
	var wg sync.WaitGroup
	limit := make(chan struct{}, runtime.NumCPU()*2)
	for i := range n {
		s := newSpec(t, fmt.Sprintf("many-%08d", i))
		wg.Add(1)
		go func() {
			defer wg.Done()
			limit <- struct{}{}
			defer func() { <-limit }()
			bottles[i] = start(t, s, echo)
		}()
	}
	wg.Wait()
	for i, b := range bottles {
		if b == nil {
			t.Fatalf("bottle %d did not start", i)
		}
		if out := b.sh(t, "hostname"); out != b.spec.ID+"\n" {
			t.Errorf("bottle %d says %q", i, out)
		}
	}
}

func TestBottleMounts(t *testing.T) {
	s := newSpec(t, "mounts-00000001")
	dir := base(t)
	write := func(p, content string) string {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	tool := filepath.Dir(write(dir+"/tool/data", "tool"))
	single := write(dir+"/single", "single")
	write(s.Workspace+"/.git/config", "config")
	write(s.Workspace+"/.git/hooks/pre-commit", "hook")
	write(s.Workspace+"/.env", "SECRET")
	if os.Geteuid() == 0 {
		filepath.Walk(s.Workspace, func(p string, _ os.FileInfo, _ error) error { return os.Chown(p, plainUser, plainUser) })
	}
	s.Binds = []engine.Bind{
		{Source: tool, Target: "/opt/tool", ReadOnly: true},
		{Source: single, Target: "/opt/deep/er/single", ReadOnly: true},
		{Source: tool, Target: "/tmp/tool", ReadOnly: true},
		{Source: s.Workspace + "/.git", Target: "/workspace/.git"},
		{Source: s.Workspace + "/.git/hooks", Target: "/workspace/.git/hooks", ReadOnly: true},
		{Source: s.Workspace + "/.git/config", Target: "/workspace/.git/config", ReadOnly: true},
		{Source: os.DevNull, Target: "/workspace/.env", ReadOnly: true},
	}
	before := tree(t, s.Workspace)
	b := start(t, s, nil)
	out := b.sh(t, `cat /opt/tool/data /opt/deep/er/single /tmp/tool/data; echo
wc -c < /workspace/.env
echo x > /workspace/.git/hooks/pre-commit || echo hooks-ro
echo x > /workspace/.git/hooks/new || echo hooks-ro
echo x > /workspace/.git/config || echo config-ro
mv /workspace/.git /workspace/.git2 || echo git-pinned
echo x > /opt/tool/data || echo tool-ro
echo x > /workspace/.env || echo env-ro
rm -f /workspace/.env || echo env-pinned`)
	for _, want := range []string{"toolsingletool\n0\n", "hooks-ro\nhooks-ro\nconfig-ro\ngit-pinned\ntool-ro\nenv-ro\nenv-pinned"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if err := b.Delete(context.Background(), b.ref); err != nil {
		t.Fatal(err)
	}
	if after := tree(t, s.Workspace); after != before {
		t.Errorf("the workspace changed:\n%s\nwas\n%s", after, before)
	}
}

// tree lists names, modes and contents.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.Walk(dir, func(p string, fi os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		fmt.Fprintln(&out, strings.TrimPrefix(p, dir), fi.Mode())
		if fi.Mode().IsRegular() {
			b, err := os.ReadFile(p)
			fmt.Fprintf(&out, "%q\n", b)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestBottleMountsRefused(t *testing.T) {
	e := testEngine(t)
	for _, c := range []struct {
		name, target, code string
		source             string
	}{
		{"missing in the workspace", "/workspace/no/such", "mountpoint_missing", ""},
		{"missing in /usr", "/usr/no-such", "mountpoint_missing", ""},
		{"through /lib", "/lib/no-such", "mountpoint_missing", ""},
		{"through a link", "/workspace/link/x", "mountpoint_link", ""},
		{"folder on a file", "/workspace/file", "mountpoint_kind", ""},
		{"proc", "/proc/x", "mount_target", ""},
		{"root", "/", "mount_target", ""},
		{"relative", "x", "mount_target", ""},
		{"above the helper", "/opt", "mount_target", ""},
		{"over the workspace", "/workspace", "mount_target", ""},
		{"no source", "/opt/x", "mount_missing", "/no/such/source"},
		{"device", "/opt/x", "mount_source", "/dev/zero"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSpec(t, "refused-00000001")
			if err := os.Symlink("/etc", s.Workspace+"/link"); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(s.Workspace+"/file", nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if c.source == "" {
				c.source = base(t)
			}
			s.Binds = []engine.Bind{{Source: c.source, Target: c.target}}
			before := tree(t, s.Workspace)
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			s.Guest = w
			_, err = e.Start(context.Background(), s)
			if f := fault.As(err); f == nil || f.Code != c.code {
				t.Errorf("got %v, want %s", err, c.code)
			}
			if after := tree(t, s.Workspace); after != before {
				t.Errorf("the workspace changed:\n%s", after)
			}
			ref := engine.Ref{ID: s.ID, Dir: s.Dir, RunDir: s.RunDir, Bottle: s.Bottle}
			if err := e.Delete(context.Background(), ref); err != nil {
				t.Error(err)
			}
			nothingLeft(t, s)
		})
	}
}

func TestBottleReadOnlyAndHome(t *testing.T) {
	s := newSpec(t, "home-00000001")
	s.ReadOnly = true
	s.Home = base(t) + "/home"
	if err := os.Mkdir(s.Home, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.Home+"/kept", []byte("kept"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(s.Home, s.HostUID, s.HostGID); err != nil {
		t.Fatal(err)
	}
	s.Bottle.Files = []plan.File{{Path: ".agent/settings.json", Content: "{}"}, {Path: "kept", Content: "new"}}
	b := start(t, s, nil)
	out := b.sh(t, `echo x > /workspace/f || echo workspace-ro; cat ~/.agent/settings.json ~/kept; echo; ls -ln ~/.agent | tail -1; echo mine > ~/mine`)
	for _, want := range []string{"workspace-ro", "{}kept\n", " 1000 1000 "} {
		if !strings.Contains(strings.Join(strings.Fields(out), " ")+" "+out, want) {
			t.Errorf("no %q in %q", want, out)
		}
	}
	if b, err := os.ReadFile(s.Home + "/mine"); err != nil || string(b) != "mine\n" {
		t.Errorf("kept home: %q, %v", b, err)
	}
}

func TestBottleUserRoot(t *testing.T) {
	s := newSpec(t, "root-00000001")
	s.Bottle.User = "root"
	b := start(t, s, nil)
	out := b.sh(t, `id -u; touch /workspace/f; chown 33:33 /etc/hostname && echo chowned; echo $HOME; ls -ld /home/agent`)
	if !strings.HasPrefix(out, "0\nchowned\n/home/agent\n") {
		t.Errorf("got %q", out)
	}
	fi, err := os.Stat(s.Workspace + "/f")
	if err != nil {
		t.Fatal(err)
	}
	if got := ownerOf(fi); got != fmt.Sprintf("%d:%d", s.HostUID, s.HostGID) {
		t.Errorf("the file belongs to %s on the host", got)
	}
}

func TestBottleLimits(t *testing.T) {
	s := newSpec(t, "limits-00000001")
	s.Bottle.Resources = plan.Resources{Pids: 20, CPUs: 1, MemoryMiB: 300, Enforcement: "watched"}
	b := start(t, s, nil)
	want := plan.Enforcement{Memory: "watched", CPUs: "engine", Pids: "engine"}
	if p := ownCgroups(); p.memory != "" {
		want = plan.Enforcement{Memory: "cgroup", CPUs: "cgroup", Pids: "engine"}
	}
	if b.started.Enforcement != want {
		t.Errorf("enforcement %+v, want %+v", b.started.Enforcement, want)
	}
	_, out, _ := b.run(t, "", "python3", "-c", `
import os
kids = []
try:
    while len(kids) < 200:
        pid = os.fork()
        if pid == 0:
            import time; time.sleep(30); os._exit(0)
        kids.append(pid)
except OSError as e:
    print("stopped", e.errno)
print(len(kids), open("/sys/fs/cgroup/limits-00000001/pids.current").read().strip())
for k in kids: os.kill(k, 9)`)
	var forks int
	if n, _ := fmt.Sscanf(out, "stopped 11\n%d", &forks); n != 1 || forks < 10 || forks > 20+helperTasks {
		t.Errorf("process limit: %q", out)
	}
	if out := b.sh(t, "cd /sys/fs/cgroup && (echo 9999 > limits-00000001/pids.max || echo $$ > cgroup.procs || mkdir other) 2>/dev/null || echo denied"); out != "denied\n" {
		t.Errorf("the agent can lift its limit: %q", out)
	}
	if out := b.sh(t, "nproc"); want.CPUs == "engine" && out != "1\n" {
		t.Errorf("%q processors", out)
	}
	if want.Memory == "cgroup" {
		_, err := b.Exec(context.Background(), b.ref, engine.ExecRequest{Argv: []string{"python3", "-c", "x = b'x' * (600 << 20); print(len(x))"}})
		if err == nil {
			t.Error("600 MiB fit into 300")
		}
		if err := b.started.Wait(context.Background()); err == nil || !strings.Contains(err.Error(), "memory limit of 300 MiB") {
			t.Errorf("the guest's end: %v", err)
		}
	}
}

// What the guest's root takes out of its group is still counted.
func TestBottleUsageOfRoot(t *testing.T) {
	s := newSpec(t, "rooted-00000001")
	s.Bottle.User = "root"
	s.Bottle.Resources = plan.Resources{Pids: 5, Enforcement: "watched"}
	b := start(t, s, nil)
	if b.started.Enforcement.Pids != "watched" {
		t.Errorf("enforcement %+v", b.started.Enforcement)
	}
	b.sh(t, "echo $$ > /sys/fs/cgroup/cgroup.procs; for i in $(seq 40); do sleep 60 >/dev/null 2>&1 & done")
	if u, err := b.Usage(context.Background(), b.ref); err != nil || u.Pids < 40-helperTasks || u.Pids > 40 {
		t.Errorf("usage with 40 processes: %+v, %v", u, err)
	}
}

func TestBottleMemoryRefused(t *testing.T) {
	if p := ownCgroups(); p.memory != "" {
		t.Skip("a cgroup can be made here; the plain user's run tests this")
	}
	s := newSpec(t, "refuse-00000001")
	s.Bottle.Resources.MemoryMiB = 300
	err := testEngine(t).Prepare(context.Background(), s)
	if f := fault.As(err); f == nil || f.Code != "limit_unenforceable" || f.Exit != fault.Host {
		t.Errorf("got %v", err)
	}
}

// A root file system of an image: nothing of the host but what is mounted.
func TestBottleImage(t *testing.T) {
	s := newSpec(t, "image-00000001")
	s.Rootfs = base(t) + "/rootfs"
	for _, d := range []string{"bin", "dev", "etc/ssl/certs", "home/agent", "opt/bottle", "proc", "run", "sys", "tmp", "var/tmp", "workspace"} {
		if err := os.MkdirAll(filepath.Join(s.Rootfs, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{"etc/passwd": "root:x:0:0::/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/sh\n", "etc/group": "root:x:0:\n",
		"etc/ssl/certs/ca-certificates.crt": "IMAGE ROOTS", "etc/hostname": "", "etc/hosts": "", "etc/resolv.conf": "nameserver 9.9.9.9\n"} {
		if err := os.WriteFile(filepath.Join(s.Rootfs, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	helper, err := os.ReadFile(s.GuestHelper)
	if err != nil {
		t.Fatal(err)
	}
	// The only program in this image is static and can copy files out.
	if err := os.WriteFile(s.Rootfs+"/bin/tool", helper, 0o755); err != nil {
		t.Fatal(err)
	}
	s.CACert, s.CABundle = []byte("OWN CA\n"), []byte("HOST ROOTS\nOWN CA\n")
	before := tree(t, s.Rootfs)
	b := start(t, s, nil)
	var out bytes.Buffer
	if err := b.CopyOut(context.Background(), b.ref, "/etc", &out); err != nil {
		t.Fatal(err)
	}
	got := untar(t, &out)
	for name, want := range map[string]string{
		"etc/passwd":                        "agent:x:1000:1000::/home/agent:/bin/sh\nroot:x:0:0::/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/sh\n",
		"etc/ssl/certs/ca-certificates.crt": "IMAGE ROOTS\nOWN CA\n",
		"etc/ssl/certs/bottle-ca.pem":       "OWN CA\n",
		"etc/hosts":                         "127.0.0.1 localhost image-00000001\n::1 localhost ip6-localhost\n",
		"etc/resolv.conf":                   "nameserver 127.0.0.1\n",
		"etc/hostname":                      "image-00000001\n",
	} {
		if got[name] != want {
			t.Errorf("%s: %q, want %q", name, got[name], want)
		}
	}
	if status, _, _ := b.run(t, "", "/usr/bin/env"); status != 127 {
		t.Errorf("the host's programs show: status %d", status)
	}
	if err := b.Delete(context.Background(), b.ref); err != nil {
		t.Fatal(err)
	}
	if after := tree(t, s.Rootfs); after != before {
		t.Errorf("the image changed:\n%s\nwas\n%s", after, before)
	}
}

func untar(t *testing.T, r io.Reader) map[string]string {
	t.Helper()
	got := map[string]string{}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = string(b)
	}
}

func TestBottleCopy(t *testing.T) {
	s := newSpec(t, "copy-00000001")
	b := start(t, s, nil)
	ctx := context.Background()
	big := strings.Repeat("0123456789", 300000)
	var in bytes.Buffer
	tw := tar.NewWriter(&in)
	for name, content := range map[string]string{"d/small": "s", "d/big": big} {
		tw.WriteHeader(&tar.Header{Name: name, Mode: 0o640, Size: int64(len(content)), Typeflag: tar.TypeReg})
		io.WriteString(tw, content)
	}
	tw.Close()
	if err := b.CopyIn(ctx, b.ref, "/workspace/in", &in); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(s.Workspace + "/in/d/big"); err != nil || string(got) != big {
		t.Errorf("copied in: %d bytes, %v", len(got), err)
	}
	b.sh(t, "ln -s /etc/passwd /workspace/in/link; mkfifo /tmp/fifo")
	var out bytes.Buffer
	if err := b.CopyOut(ctx, b.ref, "/workspace/in", &out); err != nil {
		t.Fatal(err)
	}
	got := untar(t, &out)
	if got["in/d/big"] != big || got["in/d/small"] != "s" || got["in/link"] != "" {
		t.Errorf("copied out: %d entries", len(got))
	}
	if err := b.CopyOut(ctx, b.ref, "/no/such", io.Discard); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("missing: %v", err)
	}
	if err := b.CopyIn(ctx, b.ref, "/workspace/x", strings.NewReader("not a tar stream")); err == nil {
		t.Error("junk was unpacked")
	}
	if err := b.CopyIn(ctx, b.ref, "/workspace/x", io.MultiReader(strings.NewReader(""), failing{})); err == nil || !strings.Contains(err.Error(), "source broke") {
		t.Errorf("broken source: %v", err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("source broke") }

func TestBottleCheck(t *testing.T) {
	dir := base(t)
	if err := testEngine(t).Check(context.Background(), dir); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestAvailable(t *testing.T) {
	e := New(func(string) string { return "" }, "")
	if f := fault.As(e.Available(context.Background())); f == nil || f.Code != "engine_missing" || f.Exit != fault.Unavailable {
		t.Errorf("without the program: %v", f)
	}
	script := filepath.Join(t.TempDir(), runsc.Name)
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho broken >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	e = New(func(n string) string {
		if n == runsc.Variable {
			return script
		}
		return ""
	}, "")
	if f := fault.As(e.Available(context.Background())); f == nil || f.Code != "engine_unfit" {
		t.Errorf("with a broken program: %v", f)
	}
}

// A workspace of root's own: the agent in the guest is still a plain user, and
// the sandbox has none of root's rights.
func TestBottleOwnedByRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root; TestBottleExec covers a plain user's workspace")
	}
	s := newSpec(t, "owned-00000001")
	s.HostUID, s.HostGID = 0, 0
	if err := os.Chown(s.Workspace, 0, 0); err != nil {
		t.Fatal(err)
	}
	b := start(t, s, nil)
	out := b.sh(t, "id -u; echo x > /workspace/f; mkdir /workspace/d; stat -c %u /workspace/f; cat /etc/shadow /usr/share/../../etc/shadow 2>&1 | head -1; git -C /workspace init -q . && git -C /workspace status --porcelain")
	if !strings.HasPrefix(out, "1000\n1000\n") || !strings.Contains(out, "No such file") || !strings.Contains(out, "?? f") {
		t.Errorf("got %q", out)
	}
	fi, err := os.Stat(s.Workspace + "/f")
	if err != nil || ownerOf(fi) != "0:0" {
		t.Errorf("the file belongs to %v, %v", ownerOf(fi), err)
	}
	for _, p := range processesOf(filepath.Join(s.RunDir, "r")) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
		if err != nil {
			t.Fatal(err)
		}
		uid := field(string(status), "Uid:")
		if len(uid) == 0 || uid[0] == "0" {
			t.Errorf("process %d runs as the host's root: %v", p.PID, uid)
		}
	}
}

func field(status, name string) []string {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strings.Fields(rest)
		}
	}
	return nil
}

// Flags that the workspace is mounted with cannot be taken away in a user
// namespace; runsc has to be told to keep them.
func TestBottleWorkspaceNoexec(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount something noexec")
	}
	for _, ro := range []bool{false, true} {
		s := newSpec(t, fmt.Sprintf("noexec-0000000%d", len(fmt.Sprint(ro))))
		s.ReadOnly = ro
		if err := unix.Mount("test", s.Workspace, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, ""); err != nil {
			t.Skipf("NOT TESTED, root may not mount here: %v", err)
		}
		workspace := s.Workspace
		t.Cleanup(func() { unix.Unmount(workspace, unix.MNT_DETACH) })
		if err := os.Chown(s.Workspace, plainUser, plainUser); err != nil {
			t.Fatal(err)
		}
		b := start(t, s, nil)
		out := b.sh(t, "touch /workspace/f 2>/dev/null && echo writable; echo done")
		if want := map[bool]string{false: "writable\ndone\n", true: "done\n"}[ro]; out != want {
			t.Errorf("read-only %v: got %q", ro, out)
		}
		if err := b.Delete(context.Background(), b.ref); err != nil {
			t.Fatal(err)
		}
		if err := unix.Unmount(workspace, 0); err != nil {
			t.Errorf("the workspace's mount is still in use: %v", err)
		}
	}
}
