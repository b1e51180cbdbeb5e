//go:build unix

// Package fdpass hands open descriptors from one process to another over a
// SOCK_SEQPACKET pair (SCM_RIGHTS, unix(7)), one descriptor and one small
// message a packet.
//
// A peer may be hostile: messages are bounded, and descriptors that were not
// asked for are closed unread.
package fdpass

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// MaxMessage is the largest message in bytes; a longer one is ErrMessage.
const MaxMessage = 4096

// maxFDs is what one packet may carry at most (SCM_MAX_FD, unix(7)); a control
// buffer of that size never truncates, so no descriptor is lost track of.
const maxFDs = 253

// ErrMessage tells of a packet that breaks the rules: too long, or with
// control data that cannot be read. The connection is still in step.
var ErrMessage = errors.New("malformed packet on a descriptor socket")

// Conn is one end of a pair. Send and Recv may run at the same time; each is
// serialized within itself.
type Conn struct {
	uc *net.UnixConn

	sendMu sync.Mutex
	recvMu sync.Mutex
	buf    [MaxMessage + 1]byte
	oob    []byte
}

// Pair makes a connected pair, both ends close-on-exec. The second end is left
// as a file, ready to be given to another process.
func Pair() (*Conn, *os.File, error) {
	fds, err := socketpair(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	far := os.NewFile(uintptr(fds[1]), "descriptor socket")
	c, err := New(os.NewFile(uintptr(fds[0]), "descriptor socket"))
	if err != nil {
		far.Close()
		return nil, nil, err
	}
	return c, far, nil
}

// Stream makes a connected pair of stream sockets, both close-on-exec.
func Stream() (a, b *os.File, err error) {
	fds, err := socketpair(unix.SOCK_STREAM)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "stream"), os.NewFile(uintptr(fds[1]), "stream"), nil
}

// SetSendBuffer lets f, a socket, hold n bytes that its peer has not read, or as
// many as the system lets the caller ask for.
func SetSendBuffer(f *os.File, n int) {
	if raw, err := f.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { setSendBuffer(int(fd), n) })
	}
}

// New takes over f, a connected SOCK_SEQPACKET unix socket, and closes it.
func New(f *os.File) (*Conn, error) {
	defer f.Close()
	if t, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
		return nil, fmt.Errorf("descriptor socket: %w", err)
	} else if t != unix.SOCK_SEQPACKET {
		return nil, fmt.Errorf("descriptor socket: not a SOCK_SEQPACKET socket")
	}
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor socket: %w", err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		nc.Close()
		return nil, fmt.Errorf("descriptor socket: not a unix socket")
	}
	return &Conn{uc: uc}, nil
}

// Send sends msg (1 to MaxMessage bytes) and, unless f is nil, a duplicate of
// f. The caller keeps f and closes it.
func (c *Conn) Send(msg []byte, f *os.File) error {
	if len(msg) == 0 || len(msg) > MaxMessage {
		return fmt.Errorf("message of %d bytes: %w", len(msg), ErrMessage)
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	if f == nil {
		_, _, err := c.uc.WriteMsgUnix(msg, nil, nil)
		return err
	}
	// Control keeps f alive and, unlike Fd, does not make it blocking.
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	if err := raw.Control(func(fd uintptr) {
		_, _, sendErr = c.uc.WriteMsgUnix(msg, unix.UnixRights(int(fd)), nil)
	}); err != nil {
		return err
	}
	return sendErr
}

// Recv receives one message and at most one descriptor (nil without one),
// close-on-exec and owned by the caller. Any further descriptor of the same
// packet is closed. io.EOF once the peer has closed; an error that wraps
// ErrMessage leaves the connection usable.
func (c *Conn) Recv() ([]byte, *os.File, error) {
	return c.recv(true)
}

// RecvOnly receives one message and closes, unread, whatever descriptors came
// with it: for a peer that has none to give.
func (c *Conn) RecvOnly() ([]byte, error) {
	msg, _, err := c.recv(false)
	return msg, err
}

func (c *Conn) recv(keep bool) ([]byte, *os.File, error) {
	c.recvMu.Lock()
	defer c.recvMu.Unlock()
	if c.oob == nil {
		c.oob = make([]byte, unix.CmsgSpace(maxFDs*4))
	}
	// The net package asks for MSG_CMSG_CLOEXEC itself.
	n, oobn, flags, _, err := c.uc.ReadMsgUnix(c.buf[:], c.oob)
	// Before the error: an empty packet is reported as one, and may have brought
	// descriptors all the same.
	f, bad := takeRights(c.oob[:max(oobn, 0)], keep && err == nil)
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return nil, nil, io.EOF
	}
	if err != nil {
		return nil, nil, err
	}
	// An empty packet is how SOCK_SEQPACKET says end of file; one sent on
	// purpose looks the same and is not worth telling apart.
	if n == 0 {
		closeFile(f)
		return nil, nil, io.EOF
	}
	if bad || n > MaxMessage || flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0 {
		closeFile(f)
		return nil, nil, ErrMessage
	}
	return append([]byte(nil), c.buf[:n]...), f, nil
}

// takeRights keeps the first descriptor in oob, if asked to, and closes the
// rest. bad says that oob could not be parsed.
func takeRights(oob []byte, keep bool) (f *os.File, bad bool) {
	if len(oob) == 0 {
		return nil, false
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, true
	}
	for i := range cmsgs {
		fds, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			continue // credentials and the like carry nothing to close
		}
		for _, fd := range fds {
			if keep && f == nil {
				f = os.NewFile(uintptr(fd), "received")
				continue
			}
			unix.Close(fd)
		}
	}
	return f, false
}

func closeFile(f *os.File) {
	if f != nil {
		f.Close()
	}
}

// File gives a duplicate of the socket, to be handed to another process.
func (c *Conn) File() (*os.File, error) { return c.uc.File() }

// Close closes the socket; a blocked Recv or Send returns net.ErrClosed.
func (c *Conn) Close() error { return c.uc.Close() }

// Listener is a net.Listener whose connections arrive as descriptors: another
// process accepts (or makes) them and sends them over a Conn.
type Listener struct {
	conn *Conn
}

// NewListener takes over c.
func NewListener(c *Conn) *Listener { return &Listener{conn: c} }

// Accept waits for the next connection. io.EOF once the sender has closed its
// end, net.ErrClosed after Close. Packets that hold no stream socket are
// dropped: a sender cannot end the listener with one.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		_, f, err := l.conn.Recv()
		if errors.Is(err, ErrMessage) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if f == nil {
			continue
		}
		nc, err := net.FileConn(f)
		f.Close()
		if err != nil {
			continue
		}
		return nc, nil
	}
}

// Close ends Accept. Connections that were accepted live on.
func (l *Listener) Close() error { return l.conn.Close() }

// Addr has no meaning outside of this process; it is there for logs.
func (l *Listener) Addr() net.Addr {
	return &net.UnixAddr{Name: "descriptor socket", Net: "unixpacket"}
}
