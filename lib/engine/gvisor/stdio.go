//go:build linux

package gvisor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// streamBuffer is the size of a read, in bytes.
const streamBuffer = 128 << 10

// streams copies between a caller's files and the ends that the guest gets.
type streams struct {
	ours  []*os.File // to be closed when all is over
	pumps []*pump
	wake  *os.File // its closing stops the input
	stop  *os.File
}

type pump struct {
	run  func()
	out  *os.File // nil for input: what is read from, in the end until it is empty
	dst  *os.File
	done chan struct{}
}

// input gives the file that the guest reads src through; nil is empty.
func (s *streams) input(src *os.File) (*os.File, error) {
	if src == nil {
		return os.Open(os.DevNull)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	if err := s.feed(src, w); err != nil {
		r.Close()
		w.Close()
		return nil, err
	}
	s.ours = append(s.ours, w)
	return r, nil
}

// feed copies src to w until its end or finish. Only what can be read at once
// is: what is typed after the command's end belongs to the next reader.
func (s *streams) feed(src, w *os.File) error {
	var err error
	if s.stop, s.wake, err = os.Pipe(); err != nil {
		return err
	}
	stop := s.stop
	s.pumps = append(s.pumps, &pump{done: make(chan struct{}), run: func() {
		defer w.Close()
		buf := make([]byte, streamBuffer)
		for {
			n, err := readOrStop(src, stop, buf)
			if n > 0 {
				if _, err := w.Write(buf[:n]); err != nil {
					return // the command does not read any more
				}
			}
			if err != nil {
				return
			}
		}
	}})
	return nil
}

// output gives the file through which the guest writes to dst; nil discards.
func (s *streams) output(dst *os.File) (*os.File, error) {
	if dst == nil {
		return os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	s.drain(r, dst)
	return w, nil
}

func (s *streams) drain(r, dst *os.File) {
	p := &pump{done: make(chan struct{}), out: r, dst: dst}
	p.run = func() {
		buf := make([]byte, streamBuffer)
		for {
			n, err := r.Read(buf)
			if n > 0 && !writeAll(dst, buf[:n]) {
				r.Close() // the command's next write fails, as it would without us
				return
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				drainNow(r, dst, buf)
				return
			}
			if err != nil {
				return
			}
		}
	}
	s.ours = append(s.ours, r)
	s.pumps = append(s.pumps, p)
}

// terminal connects the caller's files to the master of a terminal.
func (s *streams) terminal(in, out, master *os.File) error {
	if in != nil {
		// The end of the caller's input is no end of the terminal.
		again, err := dup(master)
		if err != nil {
			return err
		}
		if err := s.feed(in, again); err != nil {
			again.Close()
			return err
		}
		s.ours = append(s.ours, again)
	}
	if out == nil {
		var err error
		if out, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
			return err
		}
		s.ours = append(s.ours, out)
	}
	s.drain(master, out)
	return nil
}

func dup(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	nfd := -1
	if cerr := raw.Control(func(fd uintptr) { nfd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(nfd), f.Name()), nil
}

func (s *streams) start() {
	for _, p := range s.pumps {
		go func() {
			defer close(p.done)
			p.run()
		}()
	}
}

// finish is for when the command has ended: everything it wrote is copied, and
// what its children in the background may still write is not waited for. tail
// is how long output that is on its way may take.
func (s *streams) finish(tail time.Duration) {
	if s.wake != nil {
		s.wake.Close()
	}
	late := time.After(tail)
	for _, p := range s.pumps {
		if p.out == nil {
			// A write that blocks, because nobody reads, ends with its file.
			continue
		}
		if tail > 0 {
			select {
			case <-p.done:
				continue
			case <-late:
			}
		}
		p.out.SetReadDeadline(time.Unix(1, 0))
		<-p.done
	}
	s.closeOurs()
	for _, p := range s.pumps {
		<-p.done
	}
	if s.stop != nil {
		s.stop.Close()
	}
}

// abort is for streams that were never started.
func (s *streams) abort() error {
	s.closeOurs()
	if s.wake != nil {
		s.wake.Close()
		s.stop.Close()
	}
	return nil
}

func (s *streams) closeOurs() {
	for _, f := range s.ours {
		f.Close()
	}
}

// readOrStop reads what is there, or waits for it until stop is closed from the
// other side. It leaves src's mode as it is: others may share it.
func readOrStop(src, stop *os.File, buf []byte) (int, error) {
	fds := []unix.PollFd{{Fd: fdOf(src), Events: unix.POLLIN}, {Fd: fdOf(stop), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, err
		case fds[1].Revents != 0:
			return 0, io.EOF
		}
		n, err := unix.Read(int(fds[0].Fd), buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// fdOf gives the descriptor without making it blocking, as Fd does.
func fdOf(f *os.File) int32 {
	fd := int32(-1)
	if raw, err := f.SyscallConn(); err == nil {
		_ = raw.Control(func(n uintptr) { fd = int32(n) })
	}
	return fd
}

// writeAll writes past the os package, which ends the process when descriptor 1
// or 2 is a broken pipe; here that is the guest's affair.
func writeAll(dst *os.File, b []byte) bool {
	fd := fdOf(dst)
	for len(b) > 0 {
		n, err := unix.Write(int(fd), b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			_, _ = unix.Poll([]unix.PollFd{{Fd: fd, Events: unix.POLLOUT}}, -1)
			continue
		case err != nil:
			return false
		}
		b = b[n:]
	}
	return true
}

// drainNow copies what r holds at this moment.
func drainNow(r, dst *os.File, buf []byte) {
	raw, err := r.SyscallConn()
	if err != nil {
		return
	}
	for {
		n, rerr := 0, error(nil)
		if err := raw.Control(func(fd uintptr) { n, rerr = syscall.Read(int(fd), buf) }); err != nil {
			return
		}
		if errors.Is(rerr, unix.EINTR) {
			continue
		}
		if rerr != nil || n <= 0 || !writeAll(dst, buf[:n]) {
			return
		}
	}
}

// bounded keeps the beginning of what a helper in the guest said.
type bounded struct {
	mu sync.Mutex
	b  []byte
}

func (w *bounded) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if room := 1024 - len(w.b); room > 0 {
		w.b = append(w.b, p[:min(room, len(p))]...)
	}
	return len(p), nil
}

// line gives it as one printable line.
func (w *bounded) line(status int) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := fault.Line(strings.TrimSpace(string(w.b)))
	text = strings.TrimPrefix(text, "bottle-guest: error: ")
	if text == "" {
		return fmt.Sprintf("the helper ended with status %d", status)
	}
	return text
}
