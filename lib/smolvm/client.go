package smolvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Time limits and sizes. DefaultTimeout is for calls that only touch records
// (measured: 7 to 12 ms); the others are for calls that boot or end a guest or copy.
// smolvm itself gives up when a boot has made no progress for 30 s, so BootTimeout
// is for one that hangs: a boot that is slow (90 s and more were seen under
// emulation on a busy host) has to come to its end.
const (
	DefaultTimeout = 20 * time.Second
	BootTimeout    = 4 * time.Minute
	PackTimeout    = 30 * time.Minute
	maxOutput      = 16 << 20 // stdout of a control call
	maxExecOutput  = 64 << 20 // each stream of MachineExec
	drainTime      = 500 * time.Millisecond
)

// Compiled when it is first needed: every start of a tool would pay for it.
var ansi = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile("\x1b\\[[0-9;?]*[ -/]*[@-~]") })

// Client runs one smolvm program. Make it with Open, which finds out the
// version; the zero Version is refused by every call that depends on it.
type Client struct {
	Bin     string        // path of the program
	Env     []string      // its whole environment; nil means ours
	Timeout time.Duration // for calls without a guest; 0 means DefaultTimeout
	Version Version
	// StateDir is where smolvm keeps all that it has (--state-dir, an absolute
	// path); "" is its own place. Releases without it refuse every call.
	StateDir string
	// BootTimeout bounds create, start, stop, delete and cp; 0 means the constant.
	BootTimeout time.Duration
	// OnStart is called with the process of each call, if it is not nil.
	OnStart func(pid int)
	launch  Launch
}

// Launch may change how the program is started; nil leaves it.
type Launch func(*exec.Cmd) error

// Result is what a call printed.
type Result struct {
	Code           int // exit status
	Stdout, Stderr []byte
}

// Open runs "smolvm --version" and gives a client for what answered.
func Open(ctx context.Context, bin string, env []string) (*Client, error) {
	c := &Client{Bin: bin, Env: env}
	v, err := c.DetectVersion(ctx)
	if err != nil {
		return nil, err
	}
	c.Version = v
	return c, nil
}

// DetectVersion runs "smolvm --version", which prints "smolvm X.Y.Z".
func (c *Client) DetectVersion(ctx context.Context) (Version, error) {
	const op = "--version"
	r, err := c.run(ctx, op, c.timeout(), []string{"--version"})
	if err != nil {
		return Version{}, err
	}
	line := strings.TrimSpace(string(r.Stdout))
	v, perr := ParseVersion(line)
	// The Python package may outgrow 0.0 one day; what is too old for a bottle is
	// looked at more closely.
	if perr == nil && r.Code == 0 && !v.Less(firstRelease) && !(v.Less(SinceContainers) && c.isPython()) {
		return v, nil
	}
	e := &Error{Kind: ErrGarbage, Op: op, Exit: r.Code, Stderr: bound(string(r.Stderr), maxStderr),
		Detail: fmt.Sprintf("%s answered %q, exit %d", c.Bin, bound(line, 80), r.Code)}
	if perr == nil || strings.Contains(string(r.Stderr), "Traceback (most recent call last)") {
		// The unrelated Python package that is also named smolvm answers
		// "smolvm 0.0.36", or dies of an import error.
		e.Kind = ErrWrongProgram
	}
	return Version{}, e
}

// isPython tells whether the program is a script of Python's, as pip makes them.
// No smolvm that was ever released is one.
func (c *Client) isPython() bool {
	f, err := os.Open(c.Bin)
	if err != nil {
		return false
	}
	defer f.Close()
	head := make([]byte, 256)
	n, _ := io.ReadFull(f, head)
	line, _, _ := bytes.Cut(head[:n], []byte("\n"))
	return bytes.HasPrefix(line, []byte("#!")) && bytes.Contains(line, []byte("python"))
}

func (c *Client) timeout() time.Duration {
	if c.Timeout > 0 {
		return c.Timeout
	}
	return DefaultTimeout
}

func (c *Client) bootTimeout() time.Duration {
	if c.BootTimeout > 0 {
		return c.BootTimeout
	}
	return BootTimeout
}

// startTimeout is that of a start, which may have more to do than to boot.
func (c *Client) startTimeout() time.Duration {
	if c.BootTimeout <= 0 && c.Unpacks() {
		return BootTimeout + UnpackTimeout
	}
	return c.bootTimeout()
}

// run executes smolvm without a standard input and waits at most limit (0: as
// long as the context). Its error is about smolvm not having run properly; a status other than zero is in
// the result.
func (c *Client) run(ctx context.Context, op string, limit time.Duration, args []string) (Result, error) {
	return c.runWith(ctx, op, limit, maxOutput, nil, args)
}

func (c *Client) runWith(ctx context.Context, op string, limit time.Duration, maxOut int, stdin io.Reader, args []string) (Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if limit > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, limit, errLimit)
		defer stop()
	}
	cmd := exec.CommandContext(ctx, c.Bin, args...)
	cmd.Env, cmd.Stdin = c.Env, stdin
	// A process group of its own, so that a time limit ends helpers too. The
	// guest's monitor leaves the group by design; MachineDelete ends that one.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return killGroup(cmd.Process.Pid) }
	cmd.WaitDelay = drainTime
	out := &limited{max: maxOut, over: cancel}
	errs := &limited{max: maxOut, over: cancel}
	cmd.Stdout, cmd.Stderr = out, errs

	var err error
	if c.launch != nil {
		err = c.launch(cmd)
		for _, f := range cmd.ExtraFiles {
			defer f.Close()
		}
	}
	if err == nil {
		err = begin(cmd)
	}
	if err == nil {
		if c.OnStart != nil {
			c.OnStart(cmd.Process.Pid)
		}
		err = cmd.Wait()
	}
	// A monitor that inherited our pipes keeps them open; the call has ended.
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	r := Result{Code: -1, Stdout: out.buf.Bytes(), Stderr: errs.buf.Bytes()}
	if cmd.ProcessState != nil {
		r.Code = cmd.ProcessState.ExitCode()
	}
	if out.full || errs.full {
		return r, &Error{Kind: ErrTooMuch, Op: op, Exit: r.Code, Stderr: bound(string(r.Stderr), maxStderr),
			Detail: fmt.Sprintf("more than %d MiB", maxOut>>20)}
	}
	return r, c.startError(ctx, op, limit, r, err)
}

var errLimit = errors.New("time limit")

// startError turns what os/exec says into a typed error, or nil when smolvm ran
// and exited.
func (c *Client) startError(ctx context.Context, op string, limit time.Duration, r Result, err error) error {
	stderr := bound(string(r.Stderr), maxStderr)
	switch {
	case errors.Is(context.Cause(ctx), errLimit):
		return &Error{Kind: ErrTimeout, Op: op, Exit: -1, Stderr: stderr, Detail: "ended after " + limit.String()}
	case errors.Is(ctx.Err(), context.DeadlineExceeded) && r.Code < 0:
		return &Error{Kind: ErrTimeout, Op: op, Exit: -1, Stderr: stderr, Detail: "ended at the time limit that it was given"}
	case ctx.Err() != nil && r.Code < 0:
		return ctx.Err()
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, exec.ErrNotFound):
		return &Error{Kind: ErrMissing, Op: op, Exit: -1, Detail: c.Bin + " does not exist (or the interpreter it names)"}
	case errors.Is(err, fs.ErrPermission):
		return &Error{Kind: ErrMissing, Op: op, Exit: -1, Detail: c.Bin + " may not be executed"}
	case errors.Is(err, syscall.ENOEXEC):
		return &Error{Kind: ErrWrongProgram, Op: op, Exit: -1, Detail: c.Bin + " is not a program of this machine"}
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if exit.Exited() {
			return nil
		}
		return &Error{Kind: ErrFailed, Op: op, Exit: -1, Stderr: stderr, Detail: "ended by " + exit.String()}
	}
	return &Error{Kind: ErrFailed, Op: op, Exit: -1, Stderr: stderr, Detail: err.Error()}
}

// call runs a control subcommand; any status but zero is its typed error.
func (c *Client) call(ctx context.Context, op string, limit time.Duration, args []string) (Result, error) {
	if err := c.checkStateDir(op); err != nil {
		return Result{Code: -1}, err
	}
	r, err := c.run(ctx, op, limit, args)
	if err != nil || r.Code == 0 {
		return r, err
	}
	e := c.failed(op, r)
	if unknownFlag(e) == errorFormatFlag[0] {
		// No call needs it, and one that is refused for its arguments did nothing.
		if r, err = c.run(ctx, op, limit, without(args, errorFormatFlag)); err != nil || r.Code == 0 {
			return r, err
		}
		e = c.failed(op, r)
	}
	return r, e
}

// without gives args without the first place where part stands.
func without(args, part []string) []string {
	for i := range args {
		if len(args)-i >= len(part) && slices.Equal(args[i:i+len(part)], part) {
			return append(slices.Clone(args[:i]), args[i+len(part):]...)
		}
	}
	return args
}

// killGroup ends the process group that Setpgid made.
func killGroup(pid int) error {
	err := syscall.Kill(-pid, syscall.SIGKILL)
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}

// limited keeps up to max bytes and calls over once when there are more.
type limited struct {
	buf  bytes.Buffer
	max  int
	full bool
	over func()
}

func (l *limited) Write(p []byte) (int, error) {
	if room := l.max - l.buf.Len(); len(p) > room {
		l.buf.Write(p[:room])
		l.full = true
		l.over()
		return len(p), nil
	}
	return l.buf.Write(p)
}
