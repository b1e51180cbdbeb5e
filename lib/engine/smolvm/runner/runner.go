//go:build linux

package runner

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/guest"
)

// Statuses of commands that could not be started, as shells give them.
const (
	notExecutable = 126
	notFound      = 127
	ownFailure    = 125
)

// awaitLimit is what the helper gets to set the guest up.
const awaitLimit = 20 * time.Second

// Runner has the folders as fields, so that tests can have their own.
type Runner struct{ Requests, States string }

var markerForm = regexp.MustCompile(`^[0-9a-f]{32}$`)

// Main serves the verbs above. ok is false if args are none of them.
func Main(args []string, stdout, stderr io.Writer) (status int, ok bool) {
	return Runner{RequestDir, StateDir}.Main(args, stdout, stderr)
}

// Main is Main with folders of its own.
func (r Runner) Main(args []string, stdout, stderr io.Writer) (status int, ok bool) {
	var err error
	switch {
	case len(args) == 2 && args[0] == "run":
		status, err = r.run(args[1], stderr)
	case len(args) == 2 && args[0] == "ran":
		err = r.ran(args[1], stdout)
	case len(args) >= 3 && args[0] == "await":
		if status, err = await(args[1], args[2], awaitLimit); err == nil {
			err = inodes(args[3:], stdout)
		}
	case len(args) > 1 && args[0] == "inodes":
		err = inodes(args[1:], stdout)
	case len(args) == 1 && args[0] == "sync":
		unix.Sync() // to the disks, before the guest is ended
	case len(args) == 3 && args[0] == "signal":
		err = r.signal(args[1], args[2])
	default:
		return 0, false
	}
	if err != nil {
		fmt.Fprintf(stderr, "bottle-guest: error: %v\n", err)
		if status == 0 {
			status = ownFailure
		}
	}
	return status, true
}

// run starts the command on this process's own streams and terminal, waits for
// it and gives its status, 128+n for a signal.
func (r Runner) run(marker string, stderr io.Writer) (int, error) {
	q, err := r.request(marker)
	if err != nil {
		return 0, err
	}
	if err := os.MkdirAll(r.States, 0o700); err != nil {
		return 0, err
	}
	// The signals that a terminal sends reach the command by itself; this
	// process has to outlive them. Caught and dropped, not ignored: ignoring is
	// inherited.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP, syscall.SIGTERM)
	// What start sets belongs to the thread that forks, and the command dies
	// with that thread: it has to be this one until the end.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd, err := q.start()
	if err != nil {
		status := startStatus(err)
		fmt.Fprintf(stderr, "%s: %v\n", q.Argv[0], cause(err))
		return status, r.end(marker, status)
	}
	if err := r.write(marker, State{PID: cmd.Process.Pid}); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return 0, err
	}
	_ = cmd.Wait() // the state says it all
	status := waitStatus(cmd.ProcessState)
	return status, r.end(marker, status)
}

// end keeps the status where smolvm's own failures look alike (1 and 2), and
// forgets the command otherwise: nobody will ask.
func (r Runner) end(marker string, status int) error {
	if status == 1 || status == 2 {
		return r.write(marker, State{Ended: true, Status: status})
	}
	if err := os.Remove(r.path(marker)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (r Runner) request(marker string) (*Request, error) {
	if !markerForm.MatchString(marker) {
		return nil, fmt.Errorf("not a marker: %q", marker)
	}
	b, err := os.ReadFile(filepath.Join(r.Requests, marker+".json"))
	if err != nil {
		return nil, err
	}
	var q Request
	if err := json.Unmarshal(b, &q); err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	if len(q.Argv) == 0 || q.Argv[0] == "" || !filepath.IsAbs(q.Dir) || q.UID < 0 || q.GID < 0 {
		return nil, errors.New("request: it needs argv, an absolute dir, uid and gid")
	}
	return &q, nil
}

func (q *Request) start() (*exec.Cmd, error) {
	path, err := lookPath(q.Argv[0], q.Env, q.Dir)
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{Path: path, Args: q.Argv, Env: q.Env, Dir: q.Dir,
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	if q.Env == nil {
		cmd.Env = []string{} // nil would be this process's own
	}
	// smolvm gives 1024 open files, which node and go run out of.
	const files = 1 << 20
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: files, Max: files})
	// When smolvm's agent ends this process, the command ends too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if q.UID != os.Geteuid() || q.GID != os.Getegid() {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(q.UID), Gid: uint32(q.GID)}
	}
	if q.UID != 0 {
		// No set-uid program of the image may make the agent root. What this
		// thread starts inherits the flag.
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return nil, fmt.Errorf("no_new_privs: %w", err)
		}
	}
	return cmd, cmd.Start()
}

// lookPath finds the program in the PATH of the command, not of this process.
func lookPath(name string, env []string, dir string) (string, error) {
	if strings.Contains(name, "/") {
		if filepath.IsAbs(name) {
			return name, nil
		}
		return filepath.Join(dir, name), nil
	}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	found := error(fs.ErrNotExist)
	for _, d := range filepath.SplitList(path) {
		if d == "" {
			d = "."
		}
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		p := filepath.Join(d, name)
		fi, err := os.Stat(p)
		if err != nil || !fi.Mode().IsRegular() {
			continue
		}
		if fi.Mode().Perm()&0o111 != 0 {
			return p, nil
		}
		found = fs.ErrPermission
	}
	return "", found
}

// startStatus gives what a shell would: 127 for what is not there, 126 for what
// cannot be executed. A working folder that is missing is 127 as well.
func startStatus(err error) int {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return notFound
	}
	return notExecutable
}

// cause is the reason without the names that the caller prints itself.
func cause(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("command or working folder not found")
	}
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

func waitStatus(p *os.ProcessState) int {
	ws, ok := p.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return p.ExitCode()
}

func (r Runner) path(marker string) string { return filepath.Join(r.States, marker) }

// write replaces the state in one step: a reader sees the old or the new one.
func (r Runner) write(marker string, s State) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	tmp := r.path(marker) + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, r.path(marker))
}

func (r Runner) state(marker string) (State, error) {
	var s State
	if !markerForm.MatchString(marker) {
		return s, fmt.Errorf("not a marker: %q", marker)
	}
	b, err := os.ReadFile(r.path(marker))
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// inodes prints the inode numbers of the paths.
func inodes(paths []string, stdout io.Writer) error {
	all, err := guest.Inodes(paths)
	for _, n := range all {
		if _, err := fmt.Fprintln(stdout, n); err != nil {
			return err
		}
	}
	return err
}

// ran prints the state, once: whoever asked knows it then.
func (r Runner) ran(marker string, stdout io.Writer) error {
	s, err := r.state(marker)
	if err != nil {
		return err
	}
	if s.Ended {
		err = os.Remove(r.path(marker))
	}
	return errors.Join(json.NewEncoder(stdout).Encode(s), err)
}

// signal sends a signal to the command itself. One that has ended, or has not
// begun, is no error.
func (r Runner) signal(marker, number string) error {
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 || n > 64 {
		return fmt.Errorf("not a signal: %q", number)
	}
	s, err := r.state(marker)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && (s.Ended || s.PID < 2)) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := syscall.Kill(s.PID, syscall.Signal(n)); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

// await dials the address until somebody listens there, and then the gate's
// socket until the keeper answers on it; else it gives a status to end with.
func await(address, socket string, limit time.Duration) (status int, err error) {
	deadline := time.Now().Add(limit)
	err = guest.Until(deadline, func() error {
		c, err := net.DialTimeout("tcp", address, time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
	if err != nil {
		return ownFailure, fmt.Errorf("the helper is not ready: %w", err)
	}
	if err := guest.Greet(socket, deadline, nil); err != nil {
		return NoGate, fmt.Errorf("the gate's socket: %w", err)
	}
	return 0, nil
}
