//go:build linux

package gvisor

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/runsc"
)

// Statuses of a shell for a command that cannot be run.
const (
	notExecutable = 126
	notFound      = 127
)

// Exec runs a command in the guest. Nothing of it shows in the host's process
// list. The guest never gets the caller's files, only pipes or a terminal of
// its own: it would make them non-blocking for whoever else has them.
func (e *Engine) Exec(ctx context.Context, r engine.Ref, q engine.ExecRequest) (int, error) {
	rs, err := e.runsc(r.RunDir)
	if err != nil {
		return 0, err
	}
	if len(q.Argv) == 0 {
		return 0, fault.New(fault.Usage, "no_command", "no command to run")
	}
	p, err := process(r, q)
	if err != nil {
		return 0, err
	}
	x := &execution{runsc: rs, id: r.ID, process: p, q: q, done: make(chan struct{})}
	if q.Signals != nil || ctx.Done() != nil {
		x.pidFile = filepath.Join(r.RunDir, "x"+randomName())
		defer os.Remove(x.pidFile)
	}
	status, err := x.run(ctx)
	if err == nil {
		return status, ctx.Err()
	}
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return explain(q, err)
}

func randomName() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// process turns a request into runsc's form. Only root has capabilities.
func process(r engine.Ref, q engine.ExecRequest) (*runsc.Process, error) {
	name := q.User
	if name == "" {
		name = r.Bottle.User
	}
	var user runsc.User
	var caps []string
	switch name {
	case "root":
		caps = rootCapabilities
	case engine.GuestUser:
		user = runsc.User{UID: engine.GuestUID, GID: engine.GuestUID}
	default:
		return nil, fault.New(fault.Usage, "bad_user", "user %q is neither agent nor root", name)
	}
	dir := q.Dir
	if dir == "" {
		dir = engine.GuestWorkspace
	}
	if !filepath.IsAbs(dir) {
		return nil, fault.New(fault.Usage, "bad_dir", "folder %q is not an absolute path in the guest", dir)
	}
	return runsc.NewProcess(user, q.Argv, mergeEnv(r.Env, q.Env), dir, caps, q.TTY), nil
}

// mergeEnv lets later settings of a name win; the order is kept.
func mergeEnv(lists ...[]string) []string {
	var out []string
	at := map[string]int{}
	for _, list := range lists {
		for _, kv := range list {
			name, _, _ := strings.Cut(kv, "=")
			if i, ok := at[name]; ok {
				out[i] = kv
				continue
			}
			at[name] = len(out)
			out = append(out, kv)
		}
	}
	return out
}

// explain tells a command that cannot be run, which has a status as in a shell,
// from a failure of the engine.
func explain(q engine.ExecRequest, err error) (int, error) {
	var r *runsc.Error
	if !errors.As(err, &r) {
		return 0, asFault(err)
	}
	text := r.Text
	has := func(parts ...string) bool {
		for _, p := range parts {
			if !strings.Contains(text, p) {
				return false
			}
		}
		return true
	}
	say := func(status int, why string) (int, error) {
		if q.Stderr != nil {
			fmt.Fprintf(q.Stderr, "%s: %s\n", q.Argv[0], why)
		}
		return status, nil
	}
	switch {
	case has("failed to find initial working directory"):
		return 0, fault.New(fault.NoInput, "no_dir", "there is no folder %s in the bottle", q.Dir)
	case has("error finding executable", "no such file"):
		return say(notFound, "command not found")
	case has("error finding executable"), has("failed to load", "permission denied"):
		return say(notExecutable, "permission denied")
	case has("failed to load", "no such file"):
		return say(notFound, "no such file (or its interpreter is missing)")
	case has("failed to load", "not a directory"):
		return say(notFound, "no such file")
	case has("failed to load", "exec format error"):
		return say(notExecutable, "not a program")
	case has("failed to load"):
		return say(notExecutable, "cannot be run")
	case has("loading container"), has("connecting to control server"), has("has stopped"), has("not started"), has("sandbox is not running"):
		return 0, fault.New(fault.Unavailable, "not_running", "the bottle does not run").WithHint("bottle-vm ls shows what does")
	case has("waiting on pid"):
		return 0, fault.New(fault.Unavailable, "engine_died", "the bottle ended while the command ran")
	}
	return 0, asFault(err)
}

// execution is one command under way.
type execution struct {
	runsc   runsc.Runsc
	id      string
	process *runsc.Process
	q       engine.ExecRequest
	pidFile string
	done    chan struct{} // closed when the command has ended

	mu    sync.Mutex
	local *os.Process // runsc exec, once it was started
}

func (x *execution) run(ctx context.Context) (int, error) {
	if x.q.TTY {
		return x.runTerminal(ctx)
	}
	return x.runPipes(ctx)
}

// exec runs runsc with the guest's ends of the streams, and passes signals and
// the end of ctx on. theirs are closed here as soon as runsc has them.
func (x *execution) exec(ctx context.Context, o runsc.ExecOptions, theirs ...*os.File) (int, error) {
	o.ID, o.Process, o.PIDFile = x.id, x.process, x.pidFile
	// Ended with ctx only if the command in the guest does not end by itself.
	callCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	o.Started = func(p *os.Process) {
		closeAll(theirs)
		x.mu.Lock()
		x.local = p
		x.mu.Unlock()
	}
	var status int
	var err error
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		defer closeAll(theirs)
		// runsc is killed when its thread ends: that has to be this call's end.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		status, err = x.runsc.Exec(callCtx, o)
	}()
	var passing sync.WaitGroup
	passing.Add(1)
	go func() { defer passing.Done(); x.passSignals(ctx, cancel) }()
	<-finished
	close(x.done)
	passing.Wait()
	return status, err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// killGrace is how long a killed command may take before runsc is killed.
const killGrace = 3 * time.Second

func (x *execution) passSignals(ctx context.Context, giveUp func()) {
	ended := ctx.Done()
	for {
		select {
		case <-x.done:
			return
		case sig, ok := <-x.q.Signals:
			if !ok {
				x.q.Signals = nil
				continue
			}
			if s, ok := sig.(unix.Signal); ok {
				x.signal(s)
			}
		case <-ended:
			ended = nil
			x.signal(unix.SIGKILL)
			timer := time.AfterFunc(killGrace, giveUp)
			defer timer.Stop()
		}
	}
}

// signal sends sig to the command. With a terminal runsc passes it on to the
// foreground job, except for those that would end runsc itself.
func (x *execution) signal(sig unix.Signal) {
	if x.q.TTY && sig != unix.SIGKILL && sig != unix.SIGSTOP {
		x.mu.Lock()
		local := x.local
		x.mu.Unlock()
		if local != nil {
			_ = local.Signal(sig)
		}
		return
	}
	pid, ok := x.guestPID()
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), killGrace)
	defer cancel()
	// A command that ends at this moment is what the signal wanted.
	_ = x.runsc.Kill(ctx, x.id, pid, sig)
}

// guestPID waits for runsc to write the command's pid.
func (x *execution) guestPID() (int, bool) {
	for {
		if b, err := os.ReadFile(x.pidFile); err == nil {
			pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
			return pid, err == nil
		}
		select {
		case <-x.done:
			return 0, false
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (x *execution) runPipes(ctx context.Context) (int, error) {
	var s streams
	in, err := s.input(x.q.Stdin)
	if err != nil {
		return 0, asFault(err)
	}
	out, err := s.output(x.q.Stdout)
	if err != nil {
		closeAll([]*os.File{in})
		return 0, asFault(errors.Join(err, s.abort()))
	}
	errOut, err := s.output(x.q.Stderr)
	if err != nil {
		closeAll([]*os.File{in, out})
		return 0, asFault(errors.Join(err, s.abort()))
	}
	s.start()
	status, err := x.exec(ctx, runsc.ExecOptions{Stdin: in, Stdout: out, Stderr: errOut}, in, out, errOut)
	s.finish(0)
	return status, err
}

// tailLimit is how long the last output of a terminal may take to come through
// once the command has ended: unlike a pipe, the kernel hands it over later.
const tailLimit = 500 * time.Millisecond

// runTerminal gives the command a terminal of its own, which is its controlling
// one in the guest too, and keeps it in step with the caller's.
func (x *execution) runTerminal(ctx context.Context) (int, error) {
	master, slave, err := pty.Open()
	if err != nil {
		return 0, fault.New(fault.Host, "no_terminal", "no terminal can be made: %w", err)
	}
	var s streams
	if in := x.q.Stdin; in != nil && term.IsTerminal(int(in.Fd())) {
		sync := func() { _ = pty.InheritSize(in, master) }
		sync()
		winch := make(chan os.Signal, 1)
		signal.Notify(winch, unix.SIGWINCH)
		defer signal.Stop(winch)
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			for {
				select {
				case <-winch:
					sync()
				case <-stop:
					return
				}
			}
		}()
		old, err := term.MakeRaw(int(in.Fd()))
		if err != nil {
			master.Close()
			slave.Close()
			return 0, fault.New(fault.IO, "no_terminal", "the terminal cannot be set: %w", err)
		}
		defer term.Restore(int(in.Fd()), old)
	}
	if err := s.terminal(x.q.Stdin, x.q.Stdout, master); err != nil {
		return 0, asFault(errors.Join(err, master.Close(), slave.Close()))
	}
	s.start()
	status, err := x.exec(ctx, runsc.ExecOptions{Stdin: slave, Stdout: slave, Stderr: slave, Session: true}, slave)
	s.finish(tailLimit)
	return status, err
}

// CopyOut writes a tar stream of path: made by the helper, as the bottle's user.
func (e *Engine) CopyOut(ctx context.Context, r engine.Ref, path string, w io.Writer) error {
	return e.copy(ctx, r, []string{engine.GuestHelper, "tar-out", path}, nil, w)
}

// CopyIn unpacks a tar stream below the folder dir, likewise.
func (e *Engine) CopyIn(ctx context.Context, r engine.Ref, dir string, rd io.Reader) error {
	return e.copy(ctx, r, []string{engine.GuestHelper, "tar-in", dir}, rd, io.Discard)
}

func (e *Engine) copy(ctx context.Context, r engine.Ref, argv []string, in io.Reader, out io.Writer) error {
	q := engine.ExecRequest{Argv: argv, Dir: "/"}
	var pumps sync.WaitGroup
	var outErr error
	inErr := make(chan error, 1)
	var said bounded
	if in != nil {
		rd, wr, err := os.Pipe()
		if err != nil {
			return asFault(err)
		}
		defer rd.Close()
		q.Stdin = rd
		go func() { // may outlive the call if in never ends: rd's closing stops it at the next write
			_, err := io.Copy(wr, in)
			wr.Close()
			inErr <- err
		}()
	}
	sink := func(w io.Writer, err *error) (*os.File, error) {
		rd, wr, perr := os.Pipe()
		if perr != nil {
			return nil, perr
		}
		pumps.Add(1)
		go func() {
			defer pumps.Done()
			defer rd.Close()
			_, *err = io.Copy(w, rd)
		}()
		return wr, nil
	}
	var sayErr error
	var err error
	if q.Stdout, err = sink(out, &outErr); err != nil {
		return asFault(err)
	}
	if q.Stderr, err = sink(&said, &sayErr); err != nil {
		q.Stdout.Close()
		return asFault(err)
	}
	status, err := e.Exec(ctx, r, q)
	q.Stdout.Close()
	q.Stderr.Close()
	pumps.Wait()
	select {
	case e := <-inErr:
		if e != nil && !errors.Is(e, unix.EPIPE) {
			return fault.New(fault.IO, "copy_failed", "copying: %w", e)
		}
	default:
	}
	switch {
	case err != nil:
		return err
	case outErr != nil:
		return fault.New(fault.IO, "copy_failed", "copying: %w", outErr)
	case status == fault.NoInput:
		return fault.New(fault.NoInput, "no_file", "copying: %s", said.line(status))
	case status != 0:
		return fault.New(fault.IO, "copy_failed", "copying: %s", said.line(status))
	}
	return nil
}
