// Package gateproc is the contract between a bottle's keeper and its gate
// process: what the gate reads on stdin, what it answers, and on which
// descriptor its connections arrive. The gate is a process of its own so that
// it can die, and be replaced, without the bottle.
//
// stdin is one line of Config, and then a line of live.Update for each change
// of the rules; stdout is one line of Ready, and a line of live.Applied for
// each of those. A gate begins with the plan's rules alone.
package gateproc

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/fdpass"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/plan"
)

// ConnFD is the descriptor on which a gate receives its connections, BackFD the
// listening socket for its sidecar, where it has one.
const (
	ConnFD = 3
	BackFD = 4
)

// Config is one line of JSON on the gate's stdin. It holds secrets, so it is
// never an argument, a variable or a file.
type Config struct {
	ID      string            `json:"id"`
	Bottle  *plan.Bottle      `json:"bottle"`
	Base    string            `json:"base"`    // absolute folder of the manifest, for roots
	Secrets map[string]string `json:"secrets"` // values by name; a missing one is missing here
	CA      []byte            `json:"ca,omitempty"`
	Audit   string            `json:"audit"` // absolute path of the audit log
	// AuditBounds of the log; zero: the default. AuditHead is its last line, as
	// the keeper found it when the gate before this one had ended.
	AuditBounds audit.Bounds `json:"audit_bounds"`
	AuditHead   audit.Head   `json:"audit_head"`
	Upstream    string       `json:"upstream"` // host:port of pipelock; "" for the built-in proxy
	Sidecar     *Sidecar     `json:"sidecar,omitempty"`
}

// Sidecar is gate.Sidecar on the wire; Back is passed as BackFD.
type Sidecar struct {
	Name     string   `json:"name"`
	Addr     string   `json:"addr"`
	Auth     string   `json:"auth"`
	BackAuth string   `json:"back_auth"`
	CA       []byte   `json:"ca"`
	Back     *os.File `json:"-"`
}

// Ready is the one line a gate writes on stdout when it serves, or fails.
type Ready struct {
	OK    bool          `json:"ok"`
	Error *plan.Failure `json:"error,omitempty"`
}

// State is a line on stdout when the gate is shut because its audit log cannot be
// written, and when it is open again.
type State struct {
	Gate string `json:"gate"` // Open | Shut
	Why  string `json:"why,omitempty"`
}

// Told is a line on stdout about once a second: the last line of the audit log
// that is on the disk. A gate that is taken over later cannot take it back.
type Told struct {
	Head audit.Head `json:"head"`
}

// States of a running gate.
const (
	Open = "open"
	Shut = "shut"
)

// Process is a running gate.
type Process struct {
	Conns *fdpass.Conn // descriptors for the gate go here
	cmd   *exec.Cmd
	done  chan struct{}
	ready chan Ready

	applying sync.Mutex // one update at a time
	seq      uint64
	stdin    io.WriteCloser
	applied  chan live.Applied

	state atomic.Pointer[State]
	head  atomic.Pointer[audit.Head]
}

// Head is the last line of the audit log that the gate has told of; zero before
// the first.
func (p *Process) Head() audit.Head {
	if h := p.head.Load(); h != nil {
		return *h
	}
	return audit.Head{}
}

// State of the gate, as it has said.
func (p *Process) State() State {
	if s := p.state.Load(); s != nil {
		return *s
	}
	return State{Gate: Open}
}

// Start runs exe (bottle-egress) as a gate. stderr goes to log.
func Start(exe string, cfg Config, log *os.File) (*Process, error) {
	config, err := json.Marshal(cfg)
	if err != nil {
		return nil, fault.New(fault.Bug, "bug", "encoding the gate's config: %w", err)
	}
	conns, theirs, err := fdpass.Pair()
	if err != nil {
		return nil, fault.New(fault.IO, "gate_failed", "gate: %w", err)
	}
	defer theirs.Close()
	cmd := exec.Command(exe, "serve", "--keeper")
	cmd.Env = environment()
	cmd.Dir = "/"
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{theirs}
	if cfg.Sidecar != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, cfg.Sidecar.Back)
	}
	// No parent-death signal: it would fire when the thread that forks ends. The
	// gate ends by itself when the keeper's end of its socket is closed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := cmd.StdinPipe()
	if err == nil {
		var stdout io.ReadCloser
		if stdout, err = cmd.StdoutPipe(); err == nil {
			if err = cmd.Start(); err == nil {
				p := &Process{Conns: conns, cmd: cmd, done: make(chan struct{}), ready: make(chan Ready, 1),
					stdin: stdin, applied: make(chan live.Applied, 1)}
				go p.feed(config)
				go p.listen(stdout)
				return p, nil
			}
		}
	}
	conns.Close()
	return nil, fault.New(fault.Unavailable, "gate_failed", "starting the gate: %w", err).
		WithHint("bottle-egress has to stand beside bottle-vm; run make build")
}

// EnvNames are the variables that a gate may have.
var EnvNames = []string{"PATH", "GOMEMLIMIT", "SSL_CERT_FILE", "SSL_CERT_DIR"}

// environment is next to nothing: where the host's trust roots are, if somebody
// moved them.
func environment() []string {
	env := []string{"PATH=/usr/bin:/bin", "GOMEMLIMIT=256MiB"}
	for _, name := range []string{"SSL_CERT_FILE", "SSL_CERT_DIR"} {
		if v := os.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// feed ends before the gate is ready, which has to read all of it.
func (p *Process) feed(config []byte) {
	_, _ = p.stdin.Write(append(config, '\n'))
}

func (p *Process) listen(r io.Reader) {
	var got Ready
	in := bufio.NewReader(r)
	line, err := in.ReadBytes('\n')
	if err != nil || json.Unmarshal(line, &got) != nil {
		got = Ready{Error: &plan.Failure{Code: "gate_failed", Exit: fault.Unavailable, Message: "the gate ended before it was ready"}}
	}
	p.ready <- got
	for err == nil {
		if line, err = in.ReadBytes('\n'); err != nil {
			break
		}
		var s struct {
			State
			Told
		}
		if json.Unmarshal(line, &s) == nil && s.Gate != "" {
			p.state.Store(&s.State)
			continue
		} else if s.Head.Seq > 0 {
			p.head.Store(&s.Head)
			continue
		}
		var a live.Applied
		if json.Unmarshal(line, &a) != nil {
			continue // it is missed where it is waited for
		}
		select {
		case p.applied <- a:
		default: // nobody waits any more
		}
	}
	_ = p.cmd.Wait()
	close(p.done)
}

// Apply gives a ready gate other rules and returns when they are in force. A
// refusal by the gate is its fault, with nothing opened; where it does not
// answer, the error has the code gate_failed, and the gate has to be replaced.
func (p *Process) Apply(ctx context.Context, u live.Update) (live.Applied, error) {
	p.applying.Lock()
	defer p.applying.Unlock()
	p.seq++
	u.Seq = p.seq
	line, err := json.Marshal(u)
	if err != nil {
		return live.Applied{}, fault.New(fault.Bug, "bug", "encoding the gate's rules: %w", err)
	}
	written := make(chan error, 1)
	go func() {
		_, err := p.stdin.Write(append(line, '\n'))
		written <- err
	}()
	for {
		select {
		case a := <-p.applied:
			if a.Seq != u.Seq {
				continue // of one that was given up
			}
			if a.Error != nil {
				return a, fault.New(a.Error.Exit, a.Error.Code, "gate: %s", a.Error.Message).WithHint("%s", a.Error.Hint)
			}
			return a, nil
		case err := <-written:
			if err != nil {
				return live.Applied{}, noAnswer(err)
			}
			written = nil
		case <-p.done:
			return live.Applied{}, noAnswer(errors.New("it has ended"))
		case <-ctx.Done():
			return live.Applied{}, noAnswer(ctx.Err())
		}
	}
}

func noAnswer(err error) error {
	return fault.New(fault.Unavailable, "gate_failed", "the gate does not take rules: %w", err)
}

// AwaitReady waits until the gate serves.
func (p *Process) AwaitReady(ctx context.Context) error {
	select {
	case r := <-p.ready:
		if r.OK {
			return nil
		}
		if r.Error == nil {
			r.Error = &plan.Failure{Code: "gate_failed", Exit: fault.Unavailable, Message: "no reason given"}
		}
		return fault.New(r.Error.Exit, r.Error.Code, "gate: %s", r.Error.Message).WithHint("%s", r.Error.Hint)
	case <-ctx.Done():
		return fault.New(fault.Unavailable, "gate_failed", "the gate was not ready in time: %w", ctx.Err())
	}
}

// PID of the gate.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the gate has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exited describes how the gate ended; valid once Done is closed.
func (p *Process) Exited() string { return p.cmd.ProcessState.String() }

// Stop ends the gate: its connections are closed with it.
func (p *Process) Stop(grace time.Duration) error {
	p.Conns.Close() // a gate whose listener has ended ends by itself
	if grace > 0 {
		_ = p.cmd.Process.Signal(os.Interrupt)
		select {
		case <-p.done:
			return nil
		case <-time.After(grace):
		}
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("ending the gate: %w", err)
	}
	<-p.done
	return nil
}
