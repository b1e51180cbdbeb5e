package gate

import (
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// A pipe between two sockets lets the kernel hand bytes on without copying them
// (splice(2)). As with buffers, one is only held while there is something in it.
const (
	pipeSize  = 256 << 10 // asked for; a user with many pipes gets less
	maxPipes  = 256       // at one time; what goes past them is copied
	keptPipes = 32
)

type pipe struct{ r, w int }

var (
	idlePipes = make(chan pipe, keptPipes)
	openPipes atomic.Int64
)

// takePipe gives an empty pipe; ok is false where there is none to be had.
func takePipe() (p pipe, ok bool) {
	select {
	case p := <-idlePipes:
		return p, true
	default:
	}
	var fds [2]int
	if openPipes.Add(1) > maxPipes || unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		openPipes.Add(-1)
		return pipe{}, false
	}
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	return pipe{fds[0], fds[1]}, true
}

// give takes an empty pipe back.
func (p pipe) give() {
	select {
	case idlePipes <- p:
	default:
		p.close()
	}
}

func (p pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
	openPipes.Add(-1)
}

// splicer gives a function that waits for what src has and moves it to dst, at
// most as much as a pipe holds. It gives the bytes that dst took, io.EOF at the
// end of src, and errNoSplice if it has moved nothing and cannot now. The result
// is nil if one of the two is more than a socket of the kernel's.
func splicer(dst, src net.Conn) func() (int, error) {
	from, to := socket(src), socket(dst)
	if from == nil || to == nil {
		return nil
	}
	return func() (int, error) {
		p, n, err := spliceIn(from)
		if err != nil {
			return 0, err
		}
		moved := 0
		for moved < n {
			m, err := spliceOut(to, p, n-moved)
			moved += m
			if err != nil {
				p.close() // with what is in it
				return moved, err
			}
		}
		p.give()
		return moved, nil
	}
}

// socket gives the descriptor of c if c is a socket and nothing else.
func socket(c net.Conn) syscall.RawConn {
	if r, ok := c.(*replayed); ok {
		c = r.Conn
	}
	var sc syscall.Conn
	switch c := c.(type) {
	case *net.TCPConn:
		sc = c
	case *net.UnixConn:
		sc = c
	default:
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// spliceIn waits for bytes and moves them into a pipe. None is held meanwhile, and
// there is none with an error.
func spliceIn(src syscall.RawConn) (p pipe, n int, err error) {
	ok := false
	waitErr := src.Read(func(fd uintptr) bool {
		if p, ok = takePipe(); !ok {
			err = errNoSplice
			return true
		}
		n, err = splice(int(fd), p.w, pipeSize)
		if n > 0 {
			return true
		}
		p.give()
		return err != unix.EAGAIN
	})
	switch {
	case waitErr != nil:
		return pipe{}, 0, waitErr
	case err == unix.EINVAL, err == errNoSplice: // EINVAL: not with this kind of socket
		return pipe{}, 0, errNoSplice
	case err != nil:
		return pipe{}, 0, os.NewSyscallError("splice", err)
	case n == 0:
		return pipe{}, 0, io.EOF
	}
	return p, n, nil
}

func spliceOut(dst syscall.RawConn, p pipe, most int) (n int, err error) {
	waitErr := dst.Write(func(fd uintptr) bool {
		n, err = splice(p.r, int(fd), most)
		return err != unix.EAGAIN
	})
	switch {
	case waitErr != nil:
		return 0, waitErr
	case err != nil:
		return 0, os.NewSyscallError("splice", err)
	case n == 0:
		return 0, io.ErrShortWrite
	}
	return n, nil
}

func splice(from, to, most int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if err != unix.EINTR {
			return int(n), err
		}
	}
}
