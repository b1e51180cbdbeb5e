package smolvm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// ExecOptions are the flags of "machine exec". Env and secrets of a command go
// in by a file or by Stdin, never here: an argv is public on the host.
type ExecOptions struct {
	Dir     string        // -w
	Timeout time.Duration // --timeout: smolvm kills the command, status 124
	Stdin   io.Reader     // -i; nil: the command's standard input is empty
	TTY     bool          // -t
	User    string        // --user: a name of the image or UID[:GID]; "" is the machine's
	Stream  bool          // --stream: output as it comes instead of at the end
	Limit   time.Duration // for the whole call; 0 means none but the context's
}

// execArgs is the passthrough form: argv is the guest's, untouched.
func (c *Client) execArgs(name string, o ExecOptions, argv []string) ([]string, error) {
	args := []string{"machine", "exec"}
	if err := c.checkStateDir("machine exec"); err != nil {
		return nil, err
	}
	if o.User != "" && c.Version.Less(sinceUser) {
		return nil, unsupported("machine exec", c.Version, sinceUser, "--user")
	}
	if o.Stream {
		if c.Version.Less(sinceCp) {
			return nil, unsupported("machine exec", c.Version, sinceCp, "--stream")
		}
		args = append(args, "--stream")
	}
	named, err := c.named("exec", name)
	if err != nil {
		return nil, err
	}
	args = append(args, named[2:]...)
	if o.Timeout > 0 {
		args = append(args, "--timeout", smolDuration(o.Timeout))
	}
	if o.Dir != "" {
		args = append(args, "-w", o.Dir)
	}
	if o.Stdin != nil {
		args = append(args, "-i")
	}
	if o.TTY {
		args = append(args, "-t")
	}
	if o.User != "" {
		args = append(args, "--user", o.User)
	}
	if NewestTested.Less(c.Version) {
		// A release that nobody has seen may not know --error-format. Finding that
		// out from an answer is not possible here: a guest's command may say the
		// same, and must not be run twice.
		args = c.stateDir(args)
	} else {
		args = c.common(args)
	}
	return append(append(args, "--"), argv...), nil
}

// smolDuration writes d as smolvm reads it: "5s", rounded up.
func smolDuration(d time.Duration) string {
	return (d + time.Second - 1).Truncate(time.Second).String()
}

// MachineExec runs argv in the guest and returns its status and what it
// printed. A status other than zero is the guest's business and not an error.
//
// smolvm reports its own failure with status 1 and a line "Error: …" on stderr
// (1.32: JSON), which a guest command can print too. Here that is taken for
// smolvm's failure; where a hostile guest may not have that choice, use
// MachineExecAttached with Ran.
func (c *Client) MachineExec(ctx context.Context, name string, o ExecOptions, argv ...string) (Result, error) {
	const op = "machine exec"
	args, err := c.execArgs(name, o, argv)
	if err != nil {
		return Result{Code: -1}, err
	}
	r, err := c.runWith(ctx, op, o.Limit, maxExecOutput, o.Stdin, args)
	if err != nil {
		return r, err
	}
	if looksLikeOwnFailure(r.Code, string(r.Stderr)) {
		return r, c.failed(op, r)
	}
	return r, nil
}

// Attached is a command with real streams. Stdin, Stdout and Stderr may be nil:
// an empty input, output thrown away.
type Attached struct {
	Stdin, Stdout, Stderr *os.File
	TTY                   bool
	Dir                   string

	// Ran is asked after a call that ended as smolvm's own failures do (status 1
	// and "Error: " on stderr), which a guest can forge. It gives the status
	// that the command is known to have ended with, by whatever proof the caller
	// arranged for in the guest. nil: the appearance decides.
	Ran func(context.Context) (status int, ran bool)

	// Started is called with the pid of smolvm on the host.
	Started func(pid int)
}

// MachineExecAttached runs argv in the guest on real streams and returns its
// status. smolvm itself keeps the guest's terminal in the size of ours. The call
// ends only with the command or the context.
func (c *Client) MachineExecAttached(ctx context.Context, name string, a Attached, argv ...string) (int, error) {
	const op = "machine exec"
	stdin, err := orNull(a.Stdin)
	if err != nil {
		return -1, err
	}
	if a.Stdin == nil {
		defer stdin.Close()
	}
	// Always -i: without it smolvm keeps the output back until the command ends.
	args, err := c.execArgs(name, ExecOptions{Dir: a.Dir, Stdin: stdin, TTY: a.TTY}, argv)
	if err != nil {
		return -1, err
	}
	cmd := exec.CommandContext(ctx, c.Bin, args...)
	cmd.Env, cmd.Stdin = c.Env, stdin
	if a.Stdout != nil {
		cmd.Stdout = a.Stdout
	}
	// stderr passes through us, so that smolvm's last words are known. With a
	// terminal the guest's stderr is part of stdout, and this is smolvm's alone.
	tail := &tailWriter{to: a.Stderr}
	cmd.Stderr = tail
	cmd.WaitDelay = drainTime
	cmd.Cancel = func() error { return cmd.Process.Kill() }
	if !term.IsTerminal(int(stdin.Fd())) {
		// Ctrl-C is ours to pass on. With a terminal smolvm has to stay in the
		// foreground, or it could not read.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return killGroup(cmd.Process.Pid) }
	}
	defer keepMode(int(stdin.Fd()))()
	if err := begin(cmd); err != nil {
		return -1, c.startError(ctx, op, 0, Result{Code: -1}, err)
	}
	if a.Started != nil {
		a.Started(cmd.Process.Pid)
	}
	err = cmd.Wait()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	r := Result{Code: cmd.ProcessState.ExitCode(), Stderr: tail.last}
	if err := c.startError(ctx, op, 0, r, err); err != nil {
		return -1, err
	}
	if !looksLikeOwnFailure(r.Code, string(r.Stderr)) {
		return r.Code, nil
	}
	if a.Ran != nil {
		if status, ran := a.Ran(ctx); ran {
			return status, nil
		}
	}
	return -1, c.failed(op, r)
}

// keepMode remembers how the input is set and gives what sets it so again.
// smolvm makes a terminal raw and any input non-blocking; when it is killed it
// cannot undo that, and the caller's shell would have it.
func keepMode(fd int) (restore func()) {
	state, terr := term.GetState(fd)
	flags, ferr := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	return func() {
		if terr == nil {
			_ = term.Restore(fd, state)
		}
		if ferr == nil {
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags)
		}
	}
}

func orNull(f *os.File) (*os.File, error) {
	if f != nil {
		return f, nil
	}
	return os.Open(os.DevNull)
}

// tailWriter passes everything on and remembers the last maxStderr bytes from
// the start of a line.
type tailWriter struct {
	to   *os.File
	last []byte
}

func (t *tailWriter) Write(p []byte) (int, error) {
	t.last = append(t.last, p...)
	if over := len(t.last) - maxStderr; over > 0 {
		rest := t.last[over:]
		if i := bytes.IndexByte(rest, '\n'); i >= 0 {
			rest = rest[i+1:]
		}
		t.last = append([]byte(nil), rest...)
	}
	if t.to == nil {
		return len(p), nil
	}
	return t.to.Write(p)
}
