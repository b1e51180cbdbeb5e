// Package child runs a program for the keeper or the gate: one that does not
// outlive the process that started it, is ended with everything it has started
// itself, and whose output is read without end, so that it never blocks on a
// full pipe.
package child

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// maxLine bounds what Line gets at once; a longer line comes in parts.
const maxLine = 64 << 10

// Options of a program.
type Options struct {
	Argv []string
	Env  []string // all of it
	Dir  string
	// Line gets each line with its end, one at a time for each stream; it must
	// not keep the slice.
	Line func(line []byte, stderr bool)
	// Ended is called once no Line comes any more, and before Exited is closed.
	Ended func()
}

// Process is a program that runs, or has run.
type Process struct {
	cmd    *exec.Cmd
	exited chan struct{}
	status error // of Wait; read after exited is closed
}

// Start launches a program and returns once it runs. Errors are those of
// os/exec.
func Start(o Options) (*Process, error) {
	p := &Process{cmd: exec.Command(o.Argv[0], o.Argv[1:]...), exited: make(chan struct{})}
	p.cmd.Env, p.cmd.Dir = o.Env, o.Dir
	p.cmd.SysProcAttr = sysProcAttr()
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	started := make(chan error, 1)
	go func() {
		// The kernel ties the child to the thread that started it, so the thread
		// is kept until the child is gone, and ends with this goroutine.
		runtime.LockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		var readers sync.WaitGroup
		readers.Go(func() { read(stdout, func(line []byte) { o.Line(line, false) }) })
		readers.Go(func() { read(stderr, func(line []byte) { o.Line(line, true) }) })
		// Of what it has started nothing may be left to run on, or to hold the
		// pipes. Before it is reaped its number cannot be another's.
		if awaitEnd(p.cmd.Process.Pid) {
			_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		}
		readers.Wait()
		p.status = p.cmd.Wait()
		o.Ended()
		close(p.exited)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

func read(r io.Reader, line func([]byte)) {
	in := bufio.NewReaderSize(r, maxLine)
	for {
		b, err := in.ReadSlice('\n')
		if len(b) > 0 {
			line(b)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited is closed when the program has ended, for whatever reason.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Status blocks until the program has ended and says how: nil is exit status 0.
func (p *Process) Status() error {
	<-p.exited
	return p.status
}

// How is Status in words.
func (p *Process) How() string {
	if err := p.Status(); err != nil {
		return err.Error()
	}
	return "exit status 0"
}

// Signal sends s to the program itself; one that has ended is no error.
func (p *Process) Signal(s os.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Stop asks the program to end, makes it end after the given time, and returns
// when it is gone. Stopping it twice is fine.
func (p *Process) Stop(within time.Duration) error {
	err := p.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(within):
		p.Kill()
	}
	return err
}

// Kill ends the whole group, since the program may be a script around another,
// and returns when it is gone. The group's number cannot be another's: the
// program is not reaped before its output has ended, and that is waited for here.
func (p *Process) Kill() {
	select {
	case <-p.exited:
		return
	default:
	}
	// The one error is that it has ended.
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.exited
}
