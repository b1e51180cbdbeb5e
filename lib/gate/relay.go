package gate

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// opening looks at the first bytes of each direction of a tunnel and passes
// them on itself: out is guest to host, in is host to guest. It returns how many
// it passed. A nil function leaves the direction alone.
type opening struct {
	out, in func(dst, src net.Conn) (int64, error)
}

// openTLS passes on the first ClientHello, which has been checked, and looks out
// for a HelloRetryRequest: the second ClientHello that it asks for has a server
// name of its own, and some servers go by that one.
func openTLS(first []byte, t *tunnel) opening {
	retry := make(chan bool, 1)
	return opening{
		in: func(dst, src net.Conn) (int64, error) {
			defer close(retry)
			// What comes with the bytes that are looked at is passed on with them:
			// mostly the whole of the server's first flight.
			buf, n, err := reader(src)()
			if buf != nil {
				defer buffers.Put(buf)
			}
			if n > 0 && n < serverStart && err == nil {
				var more int
				more, err = io.ReadFull(src, buf[n:serverStart])
				n += more
			}
			if n == 0 {
				retry <- false
				return 0, endOfStream(err)
			}
			retry <- isRetry(buf[:n])
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return 0, werr
			}
			return int64(n), endOfStream(err)
		},
		out: func(dst, src net.Conn) (int64, error) {
			if _, err := dst.Write(first); err != nil {
				return 0, err
			}
			passed := int64(len(first))
			if !<-retry {
				return passed, nil
			}
			raw, h, err := readHello(src, true)
			if err == nil {
				err = checkHello(h, t.host)
			}
			if err != nil {
				return passed, helloRefusal(err, t)
			}
			n, err := dst.Write(raw)
			return passed + int64(n), err
		},
	}
}

// endOfStream tells an orderly end, after which the other direction goes on,
// from an error.
func endOfStream(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return io.EOF
	}
	return err
}

// relay copies in both directions until both have ended, one has failed, or
// nothing moves. It returns the bytes from guest to host and back. An end of
// stream in one direction is passed on and leaves the other one open. Neither
// connection is usable afterwards; closing them is the caller's.
func relay(guest *replayed, up net.Conn, open opening, l limits) (out, in int64, err error) {
	r := &relaying{limits: l, began: time.Now()}
	r.touch()
	var wg sync.WaitGroup
	var outErr, inErr error
	wg.Go(func() {
		out, outErr = r.half(up, guest, open.out)
		r.ended(up, guest, outErr)
		if outErr == nil && r.hangsUp(guest.Conn) {
			up.Close()
		}
	})
	wg.Go(func() { in, inErr = r.half(guest, up, open.in); r.ended(guest, up, inErr) })
	wg.Wait()
	return out, in, errors.Join(outErr, inErr)
}

type relaying struct {
	limits limits
	began  time.Time
	last   atomic.Int64 // when a byte moved, since began: no clock that can be set
	one    atomic.Bool  // one direction has ended
	both   atomic.Bool
}

func (r *relaying) touch() { r.last.Store(int64(time.Since(r.began))) }

// idle is for how long nothing has moved.
func (r *relaying) idle() time.Duration { return time.Since(r.began) - time.Duration(r.last.Load()) }

func (r *relaying) limit() time.Duration {
	if r.one.Load() {
		return r.limits.halfOpen
	}
	return r.limits.tunnel
}

// half is one direction.
func (r *relaying) half(dst, src net.Conn, first func(dst, src net.Conn) (int64, error)) (n int64, err error) {
	if first != nil {
		_ = src.SetReadDeadline(time.Now().Add(r.limits.stall))
		n, err = first(dst, src)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		r.touch()
	}
	m, err := r.copy(dst, src)
	return n + m, err
}

// ended passes the end of one direction on.
func (r *relaying) ended(dst, src net.Conn, err error) {
	if err != nil {
		dst.Close()
		src.Close()
		return
	}
	_ = closeWrite(dst)
	if r.one.Swap(true) {
		r.both.Store(true)
		_ = dst.SetReadDeadline(time.Now()) // wakes hangsUp
		return
	}
	_ = dst.SetReadDeadline(time.Now().Add(r.limits.halfOpen))
}

// hangsUp waits, after the guest has ended its half, for it to close the
// connection altogether, so that a silent host does not keep it open. Only
// Linux tells the two apart, on Unix sockets.
func (r *relaying) hangsUp(guest net.Conn) (closed bool) {
	sc, ok := guest.(syscall.Conn)
	if !ok || runtime.GOOS != "linux" {
		return false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	_ = guest.SetReadDeadline(time.Now().Add(r.limits.halfOpen))
	if r.both.Load() {
		return false
	}
	_ = rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(p, 0)
		closed = err == nil && p[0].Revents&unix.POLLHUP != 0
		return closed
	})
	return closed
}

// spliceAfter is where moving bytes through a pipe begins to take less than
// copying them: a handshake and a small answer are below.
const spliceAfter = 64 << 10

// A buffer is only held while there is something in it: a thousand idle tunnels
// cost no memory.
var buffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// errNoSplice: these bytes have to be copied.
var errNoSplice = errors.New("nothing can be spliced here")

func (r *relaying) copy(dst, src net.Conn) (total int64, err error) {
	read, move := reader(src), splicer(dst, src)
	if ahead, ok := src.(*replayed); ok && len(ahead.ahead) > 0 {
		n, err := dst.Write(ahead.ahead)
		total, ahead.ahead = int64(n), nil
		if err != nil {
			return total, err
		}
		r.touch()
	}
	tried := false
	var armed time.Time
	for {
		if now := time.Now(); now.Sub(armed) > r.limit()/16 {
			armed = now
			_ = src.SetReadDeadline(now.Add(r.limit()))
			_ = dst.SetWriteDeadline(now.Add(r.limit()))
		}
		n, err := 0, errNoSplice
		if move != nil && total >= spliceAfter {
			n, err = move()
		}
		if err == errNoSplice {
			n, err = copyOnce(dst, read)
		}
		if n > 0 {
			r.touch()
			total += int64(n)
			if total >= bulkAfter && !tried {
				tried = true
				if done, ok := widen(dst); ok {
					defer done()
				}
			}
		}
		switch {
		case err == io.EOF:
			return total, nil
		case errors.Is(err, os.ErrDeadlineExceeded) && r.idle() < r.limit():
			armed = time.Time{} // the other direction moves
		case err != nil:
			return total, err
		}
	}
}

// A guest that does not read holds memory of the host, so its connections get
// room for much only once much has come, and only so many at one time.
const (
	bulkAfter  = 1 << 20
	bulkBuffer = 512 << 10
	maxBulk    = 64
)

var (
	bulkSlots   = make(chan struct{}, maxBulk)
	bulkBuffers = sync.Pool{New: func() any { return new([bulkBuffer]byte) }}
)

// widen gives a guest's connection more room for what it has not read yet. ok is
// false where there is no place, or dst is no guest's; otherwise done is called
// once nothing more is sent.
func widen(dst net.Conn) (done func(), ok bool) {
	if r, is := dst.(*replayed); is {
		dst = r.guestConn
	}
	g, is := dst.(*guestConn)
	if !is {
		return nil, false // towards hosts TCP sees to it
	}
	select {
	case bulkSlots <- struct{}{}:
	default:
		return nil, false
	}
	if c, is := g.Conn.(*net.UnixConn); is {
		_ = c.SetWriteBuffer(bulkBuffer)
	}
	return func() { <-bulkSlots }, true
}

// bulk is widen with a buffer of that size, nil where there is no place.
func bulk(dst net.Conn) (buf []byte, done func()) {
	release, ok := widen(dst)
	if !ok {
		return nil, nil
	}
	b := bulkBuffers.Get().(*[bulkBuffer]byte)
	return b[:], func() {
		bulkBuffers.Put(b)
		release()
	}
}

// copyOnce is one read and its write. n are the bytes that dst took.
func copyOnce(dst net.Conn, read func() (*[64 << 10]byte, int, error)) (n int, err error) {
	buf, got, err := read()
	if buf != nil {
		defer buffers.Put(buf)
	}
	if got > 0 {
		var werr error
		if n, werr = dst.Write(buf[:got]); werr != nil {
			err = werr
		}
	}
	return n, err
}

// reader gives a function that waits for bytes before it takes a buffer.
func reader(src net.Conn) func() (*[64 << 10]byte, int, error) {
	plain := func() (*[64 << 10]byte, int, error) {
		buf := buffers.Get().(*[64 << 10]byte)
		n, err := src.Read(buf[:])
		return buf, n, err
	}
	raw := src
	var ahead *replayed
	if r, ok := src.(*replayed); ok {
		ahead, raw = r, r.Conn
	}
	sc, ok := raw.(syscall.Conn)
	if !ok {
		return plain
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return plain
	}
	return func() (buf *[64 << 10]byte, n int, err error) {
		if ahead != nil && len(ahead.ahead) > 0 {
			return plain()
		}
		waitErr := rc.Read(func(fd uintptr) bool {
			buf = buffers.Get().(*[64 << 10]byte)
			// read(2) on a Unix socket drops descriptors that come along.
			n, err = ignoringEINTR(int(fd), buf[:])
			if err == syscall.EAGAIN {
				buffers.Put(buf)
				buf, n = nil, 0
				return false
			}
			return true
		})
		switch {
		case waitErr != nil:
			return buf, 0, waitErr
		case err != nil:
			return buf, 0, os.NewSyscallError("read", err)
		case n == 0:
			return buf, 0, io.EOF
		}
		return buf, n, nil
	}
}

func ignoringEINTR(fd int, p []byte) (int, error) {
	for {
		n, err := syscall.Read(fd, p)
		if err != syscall.EINTR {
			return n, err
		}
	}
}
