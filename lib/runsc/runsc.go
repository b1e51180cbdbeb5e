//go:build linux

// Package runsc is the one place that runs gVisor's runsc (bottle-runsc, built
// from gvisor.dev/gvisor by tools/runsc): one function per subcommand, argv in
// one place, a time limit on every call. What must not be seen in a process
// list (commands, variables) goes to runsc by file, never by argv.
package runsc

import (
	"bytes"
	"cmp"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

const (
	// Name of the program beside the executable or on PATH.
	Name = "bottle-runsc"
	// Variable that overrides where it is found.
	Variable = "BOTTLE_RUNSC"
)

// callLimit bounds every call but exec, whose command may run for ever.
const callLimit = 30 * time.Second

// ownStatus is runsc's exit status for failures of its own (runsc/cli/cli.go);
// panicStatus is the Go runtime's.
const (
	ownStatus   = 128
	panicStatus = 2
)

// Error is a failure of runsc itself.
type Error struct {
	Verb   string // run, exec, …
	Status int    // exit status; -1 if it was killed or could not be started
	Text   string // what it said, without its prefix; at most a few KiB
	Err    error
}

func (e *Error) Error() string {
	switch {
	case e.Text != "":
		return fmt.Sprintf("runsc %s: %s", e.Verb, e.Text)
	case e.Err != nil:
		return fmt.Sprintf("runsc %s: %v", e.Verb, e.Err)
	}
	return fmt.Sprintf("runsc %s: exit status %d without a message", e.Verb, e.Status)
}

func (e *Error) Unwrap() error { return e.Err }

// Find gives the program's path: $BOTTLE_RUNSC, else bottle-runsc beside exe
// (the running program), else on the PATH of getenv. A runsc that others have
// installed is only used if the variable says so.
func Find(getenv func(string) string, exe string) (string, error) {
	if p := getenv(Variable); p != "" {
		if err := executable(p); err != nil {
			return "", fault.New(fault.Unavailable, "engine_missing", "%s=%s: %w", Variable, p, err).
				WithHint("unset it, or let it name an executable file")
		}
		return filepath.Abs(p)
	}
	if exe != "" {
		if p := filepath.Join(filepath.Dir(exe), Name); executable(p) == nil {
			return p, nil
		}
	}
	for _, dir := range filepath.SplitList(getenv("PATH")) {
		// A relative PATH entry could be a file of the workspace.
		if p := filepath.Join(dir, Name); filepath.IsAbs(dir) && executable(p) == nil {
			return p, nil
		}
	}
	return "", fault.New(fault.Unavailable, "engine_missing", "%s is neither beside this program nor on PATH", Name).
		WithHint("run make, or set %s to the path of gVisor's runsc", Variable)
}

func executable(p string) error {
	fi, err := os.Stat(p)
	if err != nil {
		return errors.Unwrap(err)
	}
	if !fi.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	return unix.Access(p, unix.X_OK)
}

// CheckStatic refuses a dynamically linked runsc: it executes itself inside an
// empty root folder, where no loader is.
func CheckStatic(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		// A wrapper script is the user's own affair.
		return nil
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fault.New(fault.Unavailable, "engine_unfit", "%s is dynamically linked and cannot start a sandbox", path).
				WithHint("build it with CGO_ENABLED=0 (make does)")
		}
	}
	return nil
}

// Runsc runs one program on one state folder. It may be copied.
type Runsc struct {
	Path string // the program
	Root string // --root: one folder per bottle, short (sockets live in it)
}

// flags are the global flags of every call. Overlay: what the guest writes to
// its root stays in memory. Cgroups are made by the engine, in a tenth of the
// time that runsc takes. No host sockets, no host FIFOs (the defaults, spelled
// out because isolation hangs on them).
func (r Runsc) flags() []string {
	return []string{
		"--root=" + r.Root,
		"--ignore-cgroups",
		"--network=none",
		"--overlay2=root:memory",
		"--host-uds=none",
		"--host-fifo=none",
		"--host-settings=ignore",
	}
}

// CheckArgv looks at the arguments of a sandbox or gofer that a Run started: verb
// is boot or gofer. It gives what is missing or wrong of the flags that isolation
// hangs on, and every other one that Run does not lead to, as "flag" and the
// value that it has ("" is absent).
func (r Runsc) CheckArgv(argv []string, verb string, o RunOptions) (wrong map[string][2]string) {
	wrong = make(map[string][2]string)
	want := make(map[string]string)
	for _, f := range r.flags() {
		name, value, ok := strings.Cut(strings.TrimPrefix(f, "--"), "=")
		if !ok {
			value = "true"
		}
		want[name] = value
	}
	if o.InternalCgroups {
		want["in-sandbox-cgroup"] = "v2"
	}
	global := true
	seen := make(map[string]bool)
	for _, a := range argv[min(1, len(argv)):] {
		name, value, ok := strings.Cut(strings.TrimLeft(a, "-"), "=")
		switch {
		case global && a == verb:
			global = false
		case global && !strings.HasPrefix(a, "--"):
			wrong["command"] = [2]string{verb, a}
			global = false
		case global && (name == "log" || name == "log-fd"):
		case global:
			if !ok {
				value = "true"
			}
			seen[name] = true
			if want[name] != value {
				wrong[name] = [2]string{want[name], value}
			}
		case strings.HasPrefix(a, "-") && !childFlags[verb][name]:
			wrong[verb+" "+name] = [2]string{"", value}
		}
	}
	for name, value := range want {
		if !seen[name] {
			wrong[name] = [2]string{value, ""}
		}
	}
	return wrong
}

// childFlags are those that runsc gives to the processes that it starts: which
// descriptor is what, ids, and how much memory there is (runsc/cmd/gofer.go and
// runsc/cmd/sentry/sentrycmd/boot.go). Not among them is what saves a sandbox,
// records it, or gives it devices.
var childFlags = map[string]map[string]bool{
	"boot": set("apply-caps", "attached", "bundle", "controller-fd", "cpu-num", "cpu-period", "cpu-quota", "dev-io-fd", "exec-fd",
		"gid", "gofer-filestore-fds", "gofer-mount-confs", "host-thp-defrag", "host-thp-shmem-enabled", "io-fds", "mounts-fd", "pass-fd",
		"pin-ring-fd", "proc-mount-sync-fd", "product-name", "setup-root", "spec-fd", "start-sync-fd", "stdio-fds", "sync-fd",
		"sync-userns-fd", "total-host-memory", "total-memory", "uid", "user-log-fd"),
	"gofer": set("apply-caps", "bundle", "dev-io-fd", "gid", "gofer-mount-confs", "io-fds", "mounts-fd", "pin-ring-fd",
		"proc-mount-sync-fd", "rpc-fd", "setup-root", "spec-fd", "sync-chroot-fd", "sync-sentry-exit-fd", "sync-userns-fd", "uid"),
}

func set(names ...string) map[string]bool {
	m := make(map[string]bool, len(names))
	for _, n := range names {
		m[n] = true
	}
	return m
}

// Saved is the part of runsc's own record of a sandbox that tells how it was
// made.
type Saved struct {
	Spec     Spec `json:"spec"`
	GoferPid int  `json:"goferPid"`
}

// Saved reads that record.
func (r Runsc) Saved(id string) (*Saved, error) {
	b, err := os.ReadFile(filepath.Join(r.Root, id+"_sandbox:"+id+".state"))
	if err != nil {
		return nil, err
	}
	s := new(Saved)
	return s, json.Unmarshal(b, s)
}

// ControlSocket is where a sandbox takes orders.
func (r Runsc) ControlSocket(id string) string { return filepath.Join(r.Root, "runsc-"+id+".sock") }

func (r Runsc) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, r.Path, append(r.flags(), args...)...)
	// runsc hands its environment on to sandbox and gofer: it gets none.
	cmd.Env = []string{}
	cmd.Dir = "/"
	return cmd
}

// Version gives the first line of runsc --version.
func (r Runsc) Version(ctx context.Context) (string, error) {
	out, err := r.call(ctx, "version", "--version")
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimPrefix(line, "runsc version "), err
}

// RunOptions are for Run.
type RunOptions struct {
	ID      string
	Bundle  string   // folder of config.json
	PIDFile string   // the sandbox's pid is written here
	Pass    *os.File // becomes descriptor 3 of the first process; may be nil
	// InternalCgroups makes the guest kernel's own cgroups those of version 2.
	// Its version 1 charges a new process to any one of its hierarchies
	// (kernel.Task.chargeLocked), so that a process limit does not hold.
	InternalCgroups bool
	Output          *os.File // stdout and stderr of the first process; a pipe, never a regular file
	// Started is called with runsc's own pid right after it was started.
	Started func(pid int) error
	// Attributes of the process that starts the sandbox; may be nil.
	SysProcAttr *unix.SysProcAttr
}

// roomDescriptor keeps the sandbox from waiting 5 to 15 ms for nothing. It moves
// its standard streams to 253 and up (startingStdioFD in runsc/boot/loader.go), and
// a process with threads whose table of descriptors has to grow waits for an RCU
// grace period (expand_fdtable in the kernel's fs/file.c). One that is forked by a
// process with a descriptor as high as this has the room from the start. gVisor has
// a C program for it, "prewarmer", that its Go module comes without.
// tools/runsc closes it in the sandbox.
const roomDescriptor = 252

// Run starts a sandbox and returns when its first process runs (run --detach:
// one process, where create and start would be two). The sandbox outlives the
// caller. Call it on a locked thread if SysProcAttr has a Pdeathsig.
func (r Runsc) Run(ctx context.Context, o RunOptions) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	args := []string{"run", "--detach", "--bundle=" + o.Bundle}
	if o.PIDFile != "" {
		args = append(args, "--pid-file="+o.PIDFile)
	}
	if o.Pass != nil {
		args = append(args, "--pass-fd=3:3")
	}
	if o.InternalCgroups {
		args = append([]string{"--in-sandbox-cgroup=v2"}, args...)
	}
	// runsc's own messages cannot go to its stderr: that is the first process's.
	log, err := memfile("runsc log", nil)
	if err != nil {
		return &Error{Verb: "run", Status: -1, Err: err}
	}
	defer log.Close()
	cmd := r.command(ctx, append([]string{"--log=/proc/self/fd/4"}, append(args, o.ID)...)...)
	cmd.Stdout, cmd.Stderr = o.Output, o.Output
	null, err := os.Open(os.DevNull)
	if err != nil {
		return &Error{Verb: "run", Status: -1, Err: err}
	}
	defer null.Close()
	cmd.ExtraFiles = make([]*os.File, roomDescriptor-3+1)
	cmd.ExtraFiles[0], cmd.ExtraFiles[1], cmd.ExtraFiles[roomDescriptor-3] = cmp.Or(o.Pass, null), log, null
	cmd.SysProcAttr = o.SysProcAttr
	if err := cmd.Start(); err != nil {
		return &Error{Verb: "run", Status: -1, Err: err}
	}
	if o.Started != nil {
		if err := o.Started(cmd.Process.Pid); err != nil {
			cmd.Process.Kill()
			cmd.Wait()
			return err
		}
	}
	if err := cmd.Wait(); err != nil {
		return failure(ctx, "run", cmd, logged(log), err)
	}
	return nil
}

// ExecOptions are for Exec. Stdin, Stdout and Stderr go to the command as they
// are: pipes or a terminal of one's own, never a regular file (runsc reads and
// writes those from offset 0) and never a file that others share (it is made
// non-blocking).
type ExecOptions struct {
	ID      string
	Process *Process
	PIDFile string // the command's pid in the guest is written here; may be ""
	Stdin   *os.File
	Stdout  *os.File
	Stderr  *os.File
	// Session makes Stdin the controlling terminal of a session of its own, so
	// that its signals (Ctrl-C, a new size) reach runsc, which passes them on.
	Session bool
	// Started is called with the process, to send it signals with Session.
	Started func(*os.Process)
}

// Exec runs a command in a sandbox and gives its exit status, 128+n for a
// signal. A failure of runsc's own is an *Error. Call it on a locked thread:
// runsc is killed when the thread that started it ends.
func (r Runsc) Exec(ctx context.Context, o ExecOptions) (int, error) {
	process, err := memfile("process.json", Encode(o.Process))
	if err != nil {
		return 0, &Error{Verb: "exec", Status: -1, Err: err}
	}
	defer process.Close()
	log, err := memfile("runsc log", nil)
	if err != nil {
		return 0, &Error{Verb: "exec", Status: -1, Err: err}
	}
	defer log.Close()
	// The command's stderr is passed apart from runsc's own.
	args := []string{"exec", "--process=/proc/self/fd/3", "--pass-fd=4:2"}
	if o.PIDFile != "" {
		args = append(args, "--internal-pid-file="+o.PIDFile)
	}
	cmd := r.command(ctx, append(args, o.ID)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = o.Stdin, o.Stdout, log
	cmd.ExtraFiles = []*os.File{process, o.Stderr}
	// A Ctrl-C at the caller's terminal is the caller's to pass on. A caller that
	// is killed leaves no runsc that waits; the command sees its streams end.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	if o.Session {
		cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0, Pdeathsig: unix.SIGKILL}
	}
	if err := cmd.Start(); err != nil {
		return 0, &Error{Verb: "exec", Status: -1, Err: err}
	}
	if o.Started != nil {
		o.Started(cmd.Process)
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, &Error{Verb: "exec", Status: -1, Err: err}
	}
	status := cmd.ProcessState.ExitCode()
	text := logged(log)
	switch {
	case status < 0:
		return 0, failure(ctx, "exec", cmd, text, err)
	case (status == ownStatus || status == panicStatus) && text != "":
		return 0, failure(ctx, "exec", cmd, text, nil)
	}
	return status, nil
}

// Kill sends sig to the process with this pid in the guest; 0 is the first
// process.
func (r Runsc) Kill(ctx context.Context, id string, pid int, sig unix.Signal) error {
	args := []string{"kill"}
	if pid != 0 {
		args = append(args, "--pid="+strconv.Itoa(pid))
	}
	_, err := r.call(ctx, "kill", append(args, id, strconv.Itoa(int(sig)))...)
	return err
}

// Delete kills the sandbox and removes runsc's record of it. An id that runsc
// does not know is success.
func (r Runsc) Delete(ctx context.Context, id string) error {
	_, err := r.call(ctx, "delete", "delete", "--force", id)
	return err
}

// Stats are of the guest kernel's own accounting.
type Stats struct {
	MemoryBytes int64
	Pids        int
}

// Stats asks a sandbox for its use of memory and its number of processes
// (events --stats).
func (r Runsc) Stats(ctx context.Context, id string) (Stats, error) {
	out, err := r.call(ctx, "events", "events", "--stats", id)
	if err != nil {
		return Stats{}, err
	}
	var ev struct {
		Data struct {
			Memory struct {
				Usage struct {
					Usage int64 `json:"usage"`
				} `json:"usage"`
			} `json:"memory"`
			Pids struct {
				Current int `json:"current"`
			} `json:"pids"`
		} `json:"data"`
	}
	if err := json.Unmarshal(out, &ev); err != nil {
		return Stats{}, &Error{Verb: "events", Err: err}
	}
	return Stats{MemoryBytes: ev.Data.Memory.Usage.Usage, Pids: ev.Data.Pids.Current}, nil
}

// Gofer gives the pid of the process that serves the sandbox's files, from
// runsc's record: no subcommand tells it.
func (r Runsc) Gofer(id string) (int, error) {
	s, err := r.Saved(id)
	if err != nil {
		return 0, err
	}
	return s.GoferPid, nil
}

func (r Runsc) call(ctx context.Context, verb string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	cmd := r.command(ctx, args...)
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	var text capped
	cmd.Stdout, cmd.Stderr = &out, &text
	if err := cmd.Run(); err != nil {
		return nil, failure(ctx, verb, cmd, strings.TrimSpace(text.b.String()), err)
	}
	return out.Bytes(), nil
}

func failure(ctx context.Context, verb string, cmd *exec.Cmd, text string, err error) error {
	if ctx.Err() != nil {
		err, text = fmt.Errorf("no answer in time: %w", context.Cause(ctx)), ""
	}
	status := -1
	if cmd.ProcessState != nil {
		status = cmd.ProcessState.ExitCode()
	}
	return &Error{Verb: verb, Status: status, Text: text, Err: err}
}

// maxText is how much of runsc's messages is kept.
const maxText = 8 << 10

// capped keeps the first maxText bytes. The buffer is no embedded one, whose
// ReadFrom would go round the limit.
type capped struct{ b bytes.Buffer }

func (c *capped) Write(p []byte) (int, error) {
	if room := maxText - c.b.Len(); room > 0 {
		c.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// memfile is an anonymous file that a child opens as /proc/self/fd/N: nothing
// is left behind on disk, whatever happens.
func memfile(name string, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(content); err != nil {
		f.Close()
		return nil, err
	}
	// Written through a descriptor, it starts there; opened by name, at 0.
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// logged gives what runsc wrote: lines of text on stderr, or JSON objects with
// a msg in --log.
func logged(f *os.File) string {
	b := make([]byte, maxText)
	n, _ := f.ReadAt(b, 0)
	b = b[:n]
	var msgs []string
	dec := json.NewDecoder(bytes.NewReader(b))
	for {
		var m struct {
			Msg   string `json:"msg"`
			Level string `json:"level"`
		}
		if dec.Decode(&m) != nil {
			break
		}
		if m.Level == "error" {
			msgs = append(msgs, m.Msg)
		}
	}
	if len(msgs) > 0 {
		return strings.Join(msgs, "; ")
	}
	return strings.TrimSpace(string(b))
}
