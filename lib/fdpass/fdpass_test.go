package fdpass

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func pair(t *testing.T) (*Conn, *Conn) {
	t.Helper()
	a, far, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	b, err := New(far)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// openFDs counts this process's descriptors.
func openFDs(t *testing.T) int {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}

func TestSendRecvDescriptor(t *testing.T) {
	a, b := pair(t)
	near, far, err := Stream()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	if err := a.Send([]byte("one"), far); err != nil {
		t.Fatal(err)
	}
	far.Close()
	msg, f, err := b.Recv()
	if err != nil || string(msg) != "one" || f == nil {
		t.Fatalf("got %q, %v, %v", msg, f, err)
	}
	defer f.Close()
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor is not close-on-exec (flags %d, %v)", flags, err)
	}
	if _, err := near.Write([]byte("hi")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2)
	if _, err := io.ReadFull(f, buf); err != nil || string(buf) != "hi" {
		t.Fatalf("through the descriptor: %q, %v", buf, err)
	}
}

func TestRecvEOFAndClosed(t *testing.T) {
	a, b := pair(t)
	a.Close()
	if _, _, err := b.Recv(); err != io.EOF {
		t.Errorf("peer closed: %v, want EOF", err)
	}
	c, d := pair(t)
	defer c.Close()
	errs := make(chan error)
	go func() { _, _, err := d.Recv(); errs <- err }()
	time.Sleep(10 * time.Millisecond)
	d.Close()
	if err := <-errs; !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed while waiting: %v, want net.ErrClosed", err)
	}
}

func TestSendRefusesBadSizes(t *testing.T) {
	a, _ := pair(t)
	for _, n := range []int{0, MaxMessage + 1} {
		if err := a.Send(make([]byte, n), nil); !errors.Is(err, ErrMessage) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if err := a.Send(make([]byte, MaxMessage), nil); err != nil {
		t.Errorf("largest message: %v", err)
	}
}

// A hostile peer writes to the socket directly.
func TestHostilePackets(t *testing.T) {
	a, b := pair(t)
	raw, err := a.File()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	devnull, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer devnull.Close()
	before := openFDs(t)

	many := make([]int, 200)
	for i := range many {
		many[i] = int(devnull.Fd())
	}
	if err := unix.Sendmsg(int(raw.Fd()), []byte("many"), unix.UnixRights(many...), nil, 0); err != nil {
		t.Fatal(err)
	}
	if msg, err := b.RecvOnly(); err != nil || string(msg) != "many" {
		t.Fatalf("got %q, %v", msg, err)
	}
	if after := openFDs(t); after != before {
		t.Errorf("descriptors sent unasked stay open: %d before, %d after", before, after)
	}

	if err := unix.Sendmsg(int(raw.Fd()), []byte("many"), unix.UnixRights(many...), nil, 0); err != nil {
		t.Fatal(err)
	}
	_, f, err := b.Recv()
	if err != nil || f == nil {
		t.Fatal(f, err)
	}
	f.Close()
	if after := openFDs(t); after != before {
		t.Errorf("surplus descriptors stay open: %d before, %d after", before, after)
	}

	if err := unix.Sendmsg(int(raw.Fd()), bytes.Repeat([]byte("x"), MaxMessage+100), unix.UnixRights(many[0]), nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.Recv(); !errors.Is(err, ErrMessage) {
		t.Errorf("oversized packet: %v", err)
	}
	if after := openFDs(t); after != before {
		t.Errorf("descriptor of an oversized packet stays open: %d before, %d after", before, after)
	}
	if err := a.Send([]byte("still in step"), nil); err != nil {
		t.Fatal(err)
	}
	if msg, f, err := b.Recv(); err != nil || f != nil || string(msg) != "still in step" {
		t.Errorf("after the hostile packets: %q, %v, %v", msg, f, err)
	}
}

// An empty packet is the end of a SOCK_SEQPACKET stream, and can carry
// descriptors nevertheless.
func TestEmptyPacketWithDescriptors(t *testing.T) {
	a, b := pair(t)
	raw, err := a.File()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	before := openFDs(t)
	fd := int(raw.Fd())
	oob := unix.UnixRights(fd, fd, fd)
	h := unix.Msghdr{Control: &oob[0]}
	h.SetControllen(len(oob))
	// Not through Sendmsg, which would add a byte.
	if _, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&h)), 0); errno != 0 {
		t.Fatal(errno)
	}
	if _, _, err := b.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("%v", err)
	}
	if after := openFDs(t); after != before {
		t.Errorf("descriptors of an empty packet stay open: %d before, %d after", before, after)
	}
}

func TestNewRefusesOtherFiles(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(f); err == nil {
		t.Error("a device was accepted")
	}
	a, b, err := Stream()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := New(b); err == nil {
		t.Error("a stream socket was accepted")
	}
}

func TestListener(t *testing.T) {
	a, b := pair(t)
	l := NewListener(b)
	const n = 50
	var wg sync.WaitGroup
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			near, far, err := Stream()
			if err != nil {
				t.Error(err)
				return
			}
			err = a.Send([]byte("conn"), far)
			far.Close()
			if err != nil {
				t.Error(err)
				return
			}
			c, err := net.FileConn(near)
			near.Close()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			fmt.Fprintf(c, "%d", i)
			c.(*net.UnixConn).CloseWrite()
			got, err := io.ReadAll(c)
			if err != nil || string(got) != fmt.Sprintf("echo %d", i) {
				t.Errorf("%d: %q, %v", i, got, err)
			}
		}()
	}
	// Junk between the connections must not end the listener.
	a.Send([]byte("no descriptor"), nil)
	devnull, _ := os.Open(os.DevNull)
	a.Send([]byte("not a socket"), devnull)
	devnull.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				fmt.Fprintf(c, "echo %s", b)
			}()
		}
	}()
	wg.Wait()
	a.Close()
	if _, err := l.Accept(); err == nil {
		t.Error("Accept works after the sender is gone")
	}
	l.Close()
}
