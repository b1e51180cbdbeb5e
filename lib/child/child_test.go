package child

import (
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// said collects the lines of a program.
type said struct {
	mu       sync.Mutex
	out, err []string
	ended    bool
}

func run(t *testing.T, script string) (*Process, *said) {
	t.Helper()
	s := &said{}
	p, err := Start(Options{
		Argv: []string{"/bin/sh", "-c", script},
		Env:  []string{"PATH=/usr/bin:/bin", "A=b"},
		Dir:  t.TempDir(),
		Line: func(line []byte, stderr bool) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if stderr {
				s.err = append(s.err, string(line))
			} else {
				s.out = append(s.out, string(line))
			}
		},
		Ended: func() { s.ended = true },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p, s
}

func TestLines(t *testing.T) {
	p, s := run(t, `echo "$A"; echo err >&2; printf end; exit 3`)
	if got := p.How(); got != "exit status 3" {
		t.Errorf("it ended with %q", got)
	}
	if got := fmt.Sprint(s.out, s.err, s.ended); got != "[b\n end] [err\n] true" {
		t.Errorf("said %q", got)
	}
	if p.Stop(time.Second) != nil || p.Stop(time.Second) != nil {
		t.Error("what has ended cannot be stopped again")
	}
}

func TestNoProgram(t *testing.T) {
	if p, err := Start(Options{Argv: []string{"/nonexistent/program"}}); err == nil || p != nil {
		t.Errorf("%v, %v", p, err)
	}
}

// A line without end comes in parts, and nothing is kept of it.
func TestEndlessLine(t *testing.T) {
	p, s := run(t, `head -c 300000 /dev/zero | tr '\0' x`)
	if err := p.Status(); err != nil {
		t.Fatal(err)
	}
	if n := len(strings.Join(s.out, "")); n != 300000 || len(s.out[0]) != maxLine {
		t.Errorf("%d bytes, the first part of them %d", n, len(s.out[0]))
	}
}

// What the program has started, and what holds its output, goes with it.
func TestGroup(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("SKIPPED: only Linux lets a child be looked at before it is reaped")
	}
	p, s := run(t, `sleep 1000 & echo $!`)
	select {
	case <-p.Exited():
	case <-time.After(20 * time.Second):
		t.Fatal("it waits for a process that it left behind")
	}
	pid, err := strconv.Atoi(strings.TrimSpace(strings.Join(s.out, "")))
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if syscall.Kill(pid, 0) != nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Error("a process is left")
}

// Stop ends what does not want to.
func TestStubborn(t *testing.T) {
	p, s := run(t, `trap '' TERM; echo ready; while :; do sleep 1; done`)
	for ready := false; !ready; time.Sleep(10 * time.Millisecond) {
		s.mu.Lock()
		ready = len(s.out) > 0
		s.mu.Unlock()
	}
	if err := p.Stop(50 * time.Millisecond); err != nil {
		t.Error(err)
	}
	if got := p.How(); got != "signal: killed" {
		t.Errorf("it ended with %q", got)
	}
}
