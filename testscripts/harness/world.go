package harness

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"
)

// World is the place of one test with real bottles: a workspace, a state folder
// and a folder for sockets that nobody else uses, and the user who works in it.
// When the test ends, nothing of it may be left: no process, mount or socket.
type World struct {
	T   testing.TB
	Dir string // workspace; holds bottle.json
	// State and Run are XDG_STATE_HOME and XDG_RUNTIME_DIR.
	State, Run, Home, Cache string
	Bin                     string // the tools, and bottle
	Env                     []string
	cred                    *syscall.Credential
}

// Result is what a program answered.
type Result struct {
	Code        int // 128+n where signal n ended it
	Out, Stderr string
}

// EachUser runs f as root and as a plain user where the test runs as root, and
// otherwise as whoever runs it.
func EachUser(t *testing.T, f func(t *testing.T, w *World)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Run("root", func(t *testing.T) { t.Skip("SKIPPED: not root, so only this plain user is tried") })
		t.Run("plain", func(t *testing.T) { f(t, NewWorld(t)) })
		return
	}
	t.Run("root", func(t *testing.T) { f(t, NewWorld(t)) })
	t.Run("plain", func(t *testing.T) { f(t, PlainWorld(t)) })
}

// NewWorld is a World of the user who runs the test.
func NewWorld(t testing.TB) *World { return newWorld(t, nil) }

// PlainWorld is a World of a plain user: the one who runs the test, or, for
// root, a system user bottle-test that is made for this.
func PlainWorld(t testing.TB) *World {
	if os.Geteuid() != 0 {
		return NewWorld(t)
	}
	return newWorld(t, plainUser(t))
}

// newWorld makes short paths: a socket's has 108 bytes at most.
func newWorld(t testing.TB, cred *syscall.Credential) *World {
	t.Helper()
	top, err := os.MkdirTemp("", "bw-")
	if err != nil {
		t.Fatal(err)
	}
	w := &World{T: t, cred: cred, Bin: installed(t),
		Dir: filepath.Join(top, "w"), State: filepath.Join(top, "state"), Run: filepath.Join(top, "run"),
		Home: filepath.Join(top, "home"), Cache: filepath.Join(top, "cache")}
	for _, dir := range []string{top, w.Dir, w.State, w.Run, w.Home, w.Cache} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		w.own(dir)
	}
	t.Cleanup(func() {
		w.clear()
		if err := os.RemoveAll(top); err != nil {
			t.Errorf("removing the test's folder: %v", err)
		}
	})
	return w
}

// own gives a file to the world's user.
func (w *World) own(path string) {
	w.T.Helper()
	if w.cred == nil {
		return
	}
	if err := os.Lchown(path, int(w.cred.Uid), int(w.cred.Gid)); err != nil {
		w.T.Fatal(err)
	}
}

// Root tells whether the world's user is root.
func (w *World) Root() bool { return w.cred == nil && os.Geteuid() == 0 }

// UID is the world's user.
func (w *World) UID() int {
	if w.cred != nil {
		return int(w.cred.Uid)
	}
	return os.Geteuid()
}

// Write makes a file of the workspace, with its folders.
func (w *World) Write(name, text string) string {
	w.T.Helper()
	path := name
	if !filepath.IsAbs(name) {
		path = filepath.Join(w.Dir, name)
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(dir); err == nil {
			break
		}
		defer w.own(dir)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		w.T.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		w.T.Fatal(err)
	}
	w.own(path)
	return path
}

// Read gives a file of the workspace.
func (w *World) Read(name string) string {
	w.T.Helper()
	if !filepath.IsAbs(name) {
		name = filepath.Join(w.Dir, name)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		w.T.Fatal(err)
	}
	return string(b)
}

// Manifest writes bottle.json with one bottle and its agent "bash"; bottle holds
// the bottle's members, such as `"egress": {}`.
func (w *World) Manifest(bottle string) {
	w.T.Helper()
	w.Write("bottle.json", `{"format_version":"1.0","bottles":{"dev":{`+bottle+`}},"agents":{"bash":{"bottle":"dev","command":["bash"]}}}`)
}

// Cmd is a program that runs in the workspace, as the world's user, with the
// tools first on PATH and the world's environment alone.
func (w *World) Cmd(ctx context.Context, name string, args ...string) *exec.Cmd {
	if !filepath.IsAbs(name) {
		if own := filepath.Join(w.Bin, name); isFile(own) {
			name = own
		}
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = w.Dir
	cmd.Env = append([]string{
		"PATH=" + w.Bin + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=" + w.Home, "LC_ALL=C", "TERM=xterm",
		"XDG_STATE_HOME=" + w.State, "XDG_RUNTIME_DIR=" + w.Run, "XDG_CACHE_HOME=" + w.Cache,
	}, w.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred}
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

func isFile(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular()
}

// Limit bounds every program of a World that has no bound of its own.
const Limit = 60 * time.Second

// Do runs a program with stdin.
func (w *World) Do(stdin io.Reader, name string, args ...string) Result {
	w.T.Helper()
	return w.within(Limit, stdin, name, args...)
}

// Long runs a program that may take some minutes, as a whole battery of probes
// does.
func (w *World) Long(name string, args ...string) Result {
	w.T.Helper()
	return w.within(10*time.Minute, nil, name, args...)
}

func (w *World) within(limit time.Duration, stdin io.Reader, name string, args ...string) Result {
	w.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := w.Cmd(ctx, name, args...)
	var out, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		w.T.Fatalf("%s %q took more than %s\nstdout: %s\nstderr: %s", name, args, limit, out.String(), stderr.String())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.T.Fatalf("%s %q: %v", name, args, err)
	}
	return Result{Status(cmd.ProcessState), out.String(), stderr.String()}
}

// Status is a shell's view of how a process ended.
func Status(s *os.ProcessState) int {
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return s.ExitCode()
}

// Sh runs a script in the workspace.
func (w *World) Sh(script string) Result {
	w.T.Helper()
	return w.Do(nil, "sh", "-c", script)
}

// OK is Sh for a script that has to succeed; gives its stdout.
func (w *World) OK(script string) string {
	w.T.Helper()
	r := w.Sh(script)
	if r.Code != 0 {
		w.T.Fatalf("%s\nexit %d\nstdout: %s\nstderr: %s", script, r.Code, r.Out, r.Stderr)
	}
	return r.Out
}

// Up starts the bottle of the manifest's only agent and gives its vm.id.
func (w *World) Up() string {
	w.T.Helper()
	id := strings.TrimSpace(w.OK("bottle-plan | bottle-vm up --print-id"))
	if id == "" {
		w.T.Fatal("up printed no id")
	}
	return id
}

// Exec runs a shell script in a bottle.
func (w *World) Exec(id, script string) Result {
	w.T.Helper()
	return w.Do(nil, "bottle-vm", "exec", id, "--", "sh", "-c", script)
}

// Down removes a bottle and expects silence.
func (w *World) Down(id string) {
	w.T.Helper()
	if r := w.Do(nil, "bottle-vm", "down", id); r.Code != 0 || r.Out+r.Stderr != "" {
		w.T.Errorf("down %s: %+v", id, r)
	}
}

// Gone expects that nothing of any bottle of this world is left: no record, no
// orphan, no process, no mount, no socket.
func (w *World) Gone() {
	w.T.Helper()
	if r := w.Do(nil, "bottle-vm", "ls"); r.Code != 0 || r.Out != "" {
		w.T.Errorf("bottles are left: %+v", r)
	}
	if r := w.Do(nil, "bottle-gc", "--check", "--min-age", "0s"); r.Code != 0 || r.Out != "" {
		w.T.Errorf("bottle-gc --check: %+v", r)
	}
	// What was killed takes a moment to be gone.
	Eventually(w.T, 5*time.Second, func() string {
		if left := append(w.Processes(), w.Mounts()...); len(left) > 0 {
			return "left over:\n" + strings.Join(left, "\n")
		}
		return ""
	})
	for _, dir := range []string{filepath.Join(w.State, "bottle", "bottles"), filepath.Join(w.Run, "bottle")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			w.T.Error(err)
		}
		for _, e := range entries {
			w.T.Errorf("left over: %s", filepath.Join(dir, e.Name()))
		}
	}
}

// clear removes what the test has left on purpose, and expects that this works.
func (w *World) clear() {
	out := w.Do(nil, "bottle-vm", "ls").Out
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		if id := gjson.Get(line, "id").Str; id != "" {
			w.Down(id)
		}
	}
	w.Gone()
	if !w.T.Failed() {
		return
	}
	// A failed test must not hold the machine.
	for _, pid := range w.pids() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, m := range w.Mounts() {
		_ = syscall.Unmount(m, syscall.MNT_DETACH)
	}
}

// Processes lists what runs one of our programs, or has this world's folders in
// its arguments or environment: "PID PROGRAM ARGUMENTS". Tests with a World are
// not parallel, so all of it is this world's.
func (w *World) Processes() []string {
	var all []string
	for _, pid := range w.pids() {
		raw, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		all = append(all, strconv.Itoa(pid)+" "+exe(pid)+" "+strings.ReplaceAll(string(raw), "\x00", " "))
	}
	return all
}

func (w *World) pids() []int {
	marks := [][]byte{[]byte(w.State), []byte(w.Run)}
	entries, _ := os.ReadDir("/proc")
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if strings.HasPrefix(exe(pid), w.Bin+"/") {
			pids = append(pids, pid)
			continue
		}
		for _, file := range []string{"cmdline", "environ"} {
			raw, err := os.ReadFile(filepath.Join("/proc", e.Name(), file))
			if err == nil && (bytes.Contains(raw, marks[0]) || bytes.Contains(raw, marks[1])) {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// exe is the program of a process, or "" of a zombie.
func exe(pid int) string {
	path, _ := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "exe"))
	return strings.TrimSuffix(path, " (deleted)")
}

// Mounts lists what is mounted below the world's folders.
func (w *World) Mounts() []string {
	raw, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		w.T.Error(err)
	}
	var all []string
	for _, line := range strings.Split(string(raw), "\n") {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], filepath.Dir(w.State)+"/") {
			all = append(all, f[1])
		}
	}
	return all
}

// Eventually waits until f has nothing to complain about.
func Eventually(t testing.TB, limit time.Duration, f func() string) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		complaint := f()
		if complaint == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("after %s: %s", limit, complaint)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// install is a copy of bin/ and the driver that every user can read and run.
var install = struct {
	sync.Mutex
	dir string
}{}

func installed(t testing.TB) string {
	t.Helper()
	install.Lock()
	defer install.Unlock()
	if install.dir != "" {
		return filepath.Join(install.dir, "bin")
	}
	src := Bin(t)
	dir, err := os.MkdirTemp("", "bottle-tools-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(src)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		copyProgram(t, filepath.Join(src, e.Name()), filepath.Join(bin, e.Name()))
	}
	copyProgram(t, filepath.Join(src, "..", "scripts", "bottle"), filepath.Join(bin, "bottle"))
	install.dir = dir
	return bin
}

func copyProgram(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err == nil {
		_, err = io.Copy(out, in)
		err = errors.Join(err, out.Chmod(0o755), out.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// uninstall removes the copy; Main calls it.
func uninstall() {
	if install.dir != "" {
		os.RemoveAll(install.dir)
	}
}

// plainUser finds, or as root makes, a user for tests.
func plainUser(t testing.TB) *syscall.Credential {
	t.Helper()
	const name = "bottle-test"
	u, err := user.Lookup(name)
	if err != nil {
		out, aerr := exec.Command("useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/bin/sh", name).CombinedOutput()
		if aerr != nil && !bytes.Contains(out, []byte("already exists")) {
			t.Skipf("SKIPPED as a plain user: there is no user %s, and useradd cannot make it: %v %s", name, aerr, out)
		}
		if u, err = user.Lookup(name); err != nil {
			t.Fatal(err)
		}
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}
