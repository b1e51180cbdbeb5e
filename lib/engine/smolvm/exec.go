package smolvm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engine/smolvm/runner"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/smolvm"
)

const (
	signalTries = 3
	signalLimit = 10 * time.Second
	ranLimit    = 20 * time.Second
	// How often, at least, and how long a guest may be "not running" while its
	// monitor lives.
	execTries    = 4
	execPatience = 10 * time.Second
)

// newMarker gives 32 hex digits that no guest can guess.
func newMarker() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	return hex.EncodeToString(b[:]), nil
}

// Exec runs the command through the helper's runner; see package runner.
func (e *Engine) Exec(ctx context.Context, r engine.Ref, q engine.ExecRequest) (int, error) {
	c, err := e.client(ctx)
	if err != nil {
		return 0, err
	}
	marker, err := newMarker()
	if err != nil {
		return 0, err
	}
	file, err := putRequest(r, q, marker)
	if err != nil {
		return 0, err
	}
	defer os.Remove(file)

	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	h := helperOf(c, r)
	stop := h.passSignals(ctx, marker, q.Signals, func(err error) { giveUp(silent(r.ID, err)) })
	defer stop()
	defer h.watchBegin(ctx, func(err error) { giveUp(silent(r.ID, err)) })()
	defer func() {
		// Ending smolvm's exec is not known to end the guest's command.
		if ctx.Err() != nil && fault.As(context.Cause(ctx)).Code != silentCode {
			_ = h.signal(context.WithoutCancel(ctx), marker, syscall.SIGKILL)
		}
	}()
	a := smolvm.Attached{Stdin: q.Stdin, Stdout: q.Stdout, Stderr: q.Stderr, TTY: q.TTY, Dir: "/",
		Ran: func(ctx context.Context) (int, bool) { return h.ran(ctx, marker) }}
	begun, pause := time.Now(), probeFirst
	for try := 1; ; try++ {
		status, err := c.MachineExecAttached(ctx, r.ID, a, h.path, "run", marker)
		if cause := context.Cause(ctx); err != nil && cause != nil && fault.As(cause).Code == silentCode {
			return status, cause
		}
		// A guest that is slow to answer is called "not running" too. smolvm
		// finds that out before it reads any input.
		if !errors.Is(err, smolvm.ErrNotRunning) {
			return status, err
		}
		if alive, aerr := e.Alive(ctx, r); aerr != nil || !alive {
			return status, err
		}
		if try >= execTries && time.Since(begun) > execPatience {
			return status, silent(r.ID, err)
		}
		if serr := sleep(ctx, pause); serr != nil {
			return status, serr
		}
		pause = min(2*pause, probePause)
	}
}

// helper is the guest's, which commands are run and asked about with.
type helper struct {
	c        *smolvm.Client
	id, path string
}

func helperOf(c *smolvm.Client, r engine.Ref) helper {
	return helper{c, r.ID, cmp.Or(readRecord(r.Dir, r.ID).Helper, engine.GuestHelper)}
}

// ask runs a verb of the helper's.
func (h helper) ask(ctx context.Context, limit time.Duration, verb ...string) (smolvm.Result, error) {
	return h.c.MachineExec(ctx, h.id, smolvm.ExecOptions{Limit: limit}, append([]string{h.path}, verb...)...)
}

const silentCode = "guest_silent"

// silent is the fault for a guest that is there and answers nothing.
func silent(id string, err error) error {
	return fault.New(fault.Unavailable, silentCode, "bottle %s runs, and its guest does not answer: %w", id, err).
		WithHint("wait if the host is busy; bottle-vm down %s ends it", id)
}

// putRequest writes the request where the guest sees it. The state folder is
// 0700, so on the host only the bottle's owner can read it.
func putRequest(r engine.Ref, q engine.ExecRequest, marker string) (string, error) {
	user := q.User
	if user == "" && r.Bottle != nil {
		user = r.Bottle.User
	}
	u := userOf(user)
	req := runner.Request{Argv: q.Argv, Env: mergeEnv(r.Env, q.Env), Dir: q.Dir, UID: u.UID, GID: u.GID}
	if req.Dir == "" {
		req.Dir = engine.GuestWorkspace
	}
	b, err := json.Marshal(req)
	if err != nil {
		return "", err
	}
	file := filepath.Join(guestDir(r.Dir), requestsDir, marker+".json")
	err = os.WriteFile(file, b, 0o600)
	if errors.Is(err, os.ErrNotExist) {
		return "", fault.New(fault.Unavailable, "not_running", "bottle %s does not run", r.ID).WithHint("see what runs with: bottle-vm ls")
	}
	return file, err
}

// mergeEnv lays over on top of base; the last value of a name counts.
func mergeEnv(base, over []string) []string {
	at := map[string]int{}
	out := []string{}
	for _, kv := range append(append([]string{}, base...), over...) {
		name, _, _ := strings.Cut(kv, "=")
		if i, ok := at[name]; ok {
			out[i] = kv
			continue
		}
		at[name] = len(out)
		out = append(out, kv)
	}
	return out
}

// ran asks the runner how the command ended.
func (h helper) ran(ctx context.Context, marker string) (int, bool) {
	r, err := h.ask(ctx, ranLimit, "ran", marker)
	if err != nil || r.Code != 0 {
		return 0, false
	}
	var s runner.State
	if json.Unmarshal(r.Stdout, &s) != nil || !s.Ended || s.Status < 0 || s.Status > 255 {
		return 0, false
	}
	return s.Status, true
}

// A command may take for ever, but not to begin: until the guest has answered
// once beside it, it is asked, and given up after beginTries.
var (
	beginWatch = 30 * time.Second
	beginTries = 4
)

func (h helper) watchBegin(ctx context.Context, lost func(error)) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for try := 1; sleep(ctx, beginWatch) == nil; try++ {
			_, err := h.ask(ctx, ranLimit, "inodes", "/")
			if err == nil {
				return
			}
			if try == beginTries && ctx.Err() == nil {
				lost(err)
				return
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

// passSignals gives each signal to the command by a call of its own, in order.
// lost is called when a guest does not take one that is to end the command:
// whoever pressed Ctrl-C must not hang for ever with it.
func (h helper) passSignals(ctx context.Context, marker string, signals <-chan os.Signal, lost func(error)) (stop func()) {
	if signals == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case s, ok := <-signals:
				if !ok {
					return
				}
				n, ok := s.(syscall.Signal)
				if !ok {
					continue
				}
				if err := h.insist(ctx, marker, n); err != nil && ctx.Err() == nil && ends(n) {
					lost(err)
					return
				}
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

// ends tells whether the signal asks a command to end.
func ends(s syscall.Signal) bool {
	return s == syscall.SIGINT || s == syscall.SIGTERM || s == syscall.SIGHUP || s == syscall.SIGQUIT
}

// insist sends the signal, again and again to a guest that is slow.
func (h helper) insist(ctx context.Context, marker string, s syscall.Signal) error {
	for try := 1; ; try++ {
		err := h.signal(ctx, marker, s)
		if err == nil || try == signalTries || !errors.Is(err, smolvm.ErrNotRunning) {
			return err
		}
		if err := sleep(ctx, probePause); err != nil {
			return err
		}
	}
}

// signal: what the runner answers does not matter, the command may be gone
// already, and its status tells. An error is smolvm's.
func (h helper) signal(ctx context.Context, marker string, s syscall.Signal) error {
	_, err := h.ask(ctx, signalLimit, "signal", marker, strconv.Itoa(int(s)))
	return err
}

// CopyOut writes a tar stream of the guest path to w.
func (e *Engine) CopyOut(ctx context.Context, r engine.Ref, path string, w io.Writer) error {
	return e.pipe(ctx, r, []string{engine.GuestHelper, "tar-out", path}, nil, w)
}

// CopyIn unpacks a tar stream below the guest folder dir.
func (e *Engine) CopyIn(ctx context.Context, r engine.Ref, dir string, rd io.Reader) error {
	return e.pipe(ctx, r, []string{engine.GuestHelper, "tar-in", dir}, rd, nil)
}

// pipe runs argv as the bottle's user with in and out as its streams.
func (e *Engine) pipe(ctx context.Context, r engine.Ref, argv []string, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	q := engine.ExecRequest{Argv: argv, Dir: "/"}
	var streams []*stream
	open := func(run func(*os.File) error, guestReads bool) (*os.File, error) {
		s, err := newStream(run, guestReads, cancel)
		if err != nil {
			return nil, err
		}
		streams = append(streams, s)
		return s.far, nil
	}
	var err error
	if in != nil {
		if q.Stdin, err = open(func(f *os.File) error { _, err := io.Copy(f, in); return err }, true); err != nil {
			return err
		}
	}
	if out != nil {
		if q.Stdout, err = open(func(f *os.File) error { _, err := io.Copy(out, f); return err }, false); err != nil {
			return err
		}
	}
	var said tail
	if q.Stderr, err = open(func(f *os.File) error { _, err := io.Copy(&said, f); return err }, false); err != nil {
		return err
	}
	status, err := e.Exec(ctx, r, q)
	for _, s := range streams {
		// Our own trouble is why the rest failed.
		if serr := s.finish(err == nil && status == 0); serr != nil {
			err = serr
		}
	}
	if err != nil {
		return err
	}
	if status == fault.NoInput {
		return fault.New(fault.NoInput, "no_file", "copying: %s", said.String())
	}
	if status != 0 {
		return fault.New(fault.IO, "guest_copy", "copying in the guest failed with status %d: %q", status, said.String()).
			WithHint("see that the path exists in the guest and that its user may use it")
	}
	return nil
}

// stream is an os.Pipe with the guest's end and a goroutine at ours.
type stream struct {
	near, far *os.File
	done      chan error
	reads     bool
}

func newStream(run func(*os.File) error, guestReads bool, abort func()) (*stream, error) {
	rd, wr, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	s := &stream{near: rd, far: wr, done: make(chan error, 1), reads: guestReads}
	if guestReads {
		s.near, s.far = wr, rd
	}
	go func() {
		err := run(s.near)
		if guestReads && errors.Is(err, syscall.EPIPE) {
			err = nil // the guest stopped reading; its status says why
		}
		s.near.Close()
		if err != nil {
			abort()
		}
		s.done <- err
	}()
	return s, nil
}

// finish gives up the guest's end and waits for ours. The source of a guest
// that failed may never end and is not waited for: its next write fails.
func (s *stream) finish(ok bool) error {
	s.far.Close()
	if s.reads && !ok {
		select {
		case err := <-s.done:
			return err
		default:
			return nil
		}
	}
	return <-s.done
}

// tail keeps the first part of what the guest said.
type tail struct{ bytes.Buffer }

func (t *tail) Write(p []byte) (int, error) {
	const most = 2 << 10
	if room := most - t.Len(); room > 0 {
		t.Buffer.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}
