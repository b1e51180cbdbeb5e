//go:build linux

package helper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/guest"
)

const (
	// maxConns bounds the connections of one relay; further clients wait in
	// the listener's queue.
	maxConns = 4096
	// spares is how many connections are dialled ahead of need.
	spares = 2
	// bufSize is what one direction of a busy connection uses; an idle one
	// uses none.
	bufSize = 64 << 10
	// bulkSize is what those use that move a lot, as far as there are no more
	// than maxBulk: a system call of a guest is dear.
	bulkSize = 512 << 10
	maxBulk  = 32
	// dialTimeout bounds the wait for the host.
	dialTimeout = 30 * time.Second
)

type dialFunc func(ctx context.Context, r guest.Relay) (net.Conn, error)

func fdDial(d *guest.Dialer) dialFunc {
	return func(ctx context.Context, r guest.Relay) (net.Conn, error) { return d.Dial(ctx, r.Service) }
}

func socketDial(ctx context.Context, r guest.Relay) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", r.Socket)
}

type relay struct {
	guest.Relay
	dial   dialFunc
	stderr io.Writer
	slots  chan struct{}
	spare  chan net.Conn
	refill chan struct{}
}

func newRelay(r guest.Relay, dial dialFunc, stderr io.Writer) *relay {
	return &relay{Relay: r, dial: dial, stderr: stderr,
		slots: make(chan struct{}, maxConns), spare: make(chan net.Conn, spares), refill: make(chan struct{}, 1)}
}

// serve accepts until l is closed.
func (r *relay) serve(l net.Listener) {
	done := make(chan struct{})
	defer close(done)
	go r.keepSpares(done)
	for {
		r.slots <- struct{}{}
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			<-r.slots
			fmt.Fprintf(r.stderr, "relay %s: %v\n", r.Service, err)
			time.Sleep(100 * time.Millisecond) // out of descriptors, most likely
			continue
		}
		go func() {
			defer func() { <-r.slots }()
			r.handle(c.(*net.TCPConn))
		}()
	}
}

// keepSpares dials ahead after the first use: a bottle that never calls out
// holds no connection to the gate.
func (r *relay) keepSpares(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case <-r.refill:
		}
		for len(r.spare) < spares {
			c, err := r.connect()
			if err != nil {
				break // the next client will see the reason
			}
			r.spare <- c // this goroutine alone fills it
		}
	}
}

func (r *relay) connect() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	return r.dial(ctx, r.Relay)
}

// upstream takes a spare that is still good (a gate that was replaced has
// closed its own) or dials.
func (r *relay) upstream() (net.Conn, error) {
	defer func() {
		select {
		case r.refill <- struct{}{}:
		default:
		}
	}()
	for {
		select {
		case c := <-r.spare:
			if alive(c) {
				return c, nil
			}
			c.Close()
		default:
			return r.connect()
		}
	}
}

func (r *relay) handle(client *net.TCPConn) {
	defer client.Close()
	up, err := r.upstream()
	if err != nil {
		fmt.Fprintf(r.stderr, "relay %s: %v\n", r.Service, err)
		return
	}
	defer up.Close()
	splice(client, up.(stream))
}

// stream is a *net.TCPConn or a *net.UnixConn.
type stream interface {
	net.Conn
	CloseWrite() error
	syscallConn
}

// splice copies both ways until both have ended. An end of file on one side is
// passed on as one; an error ends both.
func splice(a, b stream) {
	var wg sync.WaitGroup
	wg.Add(2)
	one := func(dst, src stream) {
		defer wg.Done()
		if err := pump(dst, src); err != nil {
			a.Close()
			b.Close()
			return
		}
		dst.CloseWrite()
	}
	go one(a, b)
	one(b, a)
	wg.Wait()
}

var (
	buffers     = sync.Pool{New: func() any { b := make([]byte, bufSize); return &b }}
	bulkBuffers = sync.Pool{New: func() any { b := make([]byte, bulkSize); return &b }}
	bulkSlots   = make(chan struct{}, maxBulk)
)

// takeBuffer gives a large buffer if one is asked for and to be had.
func takeBuffer(bulk bool) *[]byte {
	if bulk {
		select {
		case bulkSlots <- struct{}{}:
			return bulkBuffers.Get().(*[]byte)
		default:
		}
	}
	return buffers.Get().(*[]byte)
}

func giveBuffer(b *[]byte) {
	if len(*b) == bulkSize {
		bulkBuffers.Put(b)
		<-bulkSlots
		return
	}
	buffers.Put(b)
}

// pump copies src to dst. It holds a buffer only while there is something to
// copy, so that thousands of idle connections cost little.
func pump(dst, src stream) error {
	raw, err := src.SyscallConn()
	if err != nil {
		return err
	}
	for n := 0; ; {
		n, err = pass(dst, raw, n >= bufSize)
		if n == 0 || err != nil {
			return err
		}
	}
}

// pass waits for bytes and copies what there is, up to a buffer; 0 at end of
// file.
func pass(dst net.Conn, src syscall.RawConn, bulk bool) (n int, err error) {
	var buf *[]byte
	waited := src.Read(func(fd uintptr) bool {
		buf = takeBuffer(bulk)
		if n, err = read(int(fd), *buf); err != unix.EAGAIN {
			return true
		}
		giveBuffer(buf)
		buf = nil
		return false
	})
	if buf != nil {
		defer giveBuffer(buf)
	}
	switch {
	case waited != nil:
		return 0, waited
	case err != nil:
		return 0, os.NewSyscallError("read", err)
	case n > 0:
		_, err = dst.Write((*buf)[:n])
	}
	return n, err
}

func read(fd int, p []byte) (int, error) {
	for {
		n, err := unix.Read(fd, p)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// peek looks for one byte without taking it: (1, nil) data, (0, nil) end of
// file, EAGAIN nothing yet.
func peek(fd uintptr) (int, error) {
	var b [1]byte
	for {
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// alive tells whether the far side of an idle connection is still there.
func alive(c net.Conn) bool {
	sc, ok := c.(syscallConn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	ok = false
	if err := raw.Control(func(fd uintptr) {
		_, err := peek(fd)
		ok = err == unix.EAGAIN
	}); err != nil {
		return false
	}
	return ok
}
