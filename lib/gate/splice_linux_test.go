package gate

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

// noise is a stream of n bytes that do not repeat.
func noise(seed uint64, n int64) io.Reader {
	var key [32]byte
	key[0] = byte(seed)
	return io.LimitReader(rand.NewChaCha8(key), n)
}

func digest(t *testing.T, r io.Reader) (string, int64) {
	t.Helper()
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		t.Error(err)
	}
	return hex.EncodeToString(h.Sum(nil)), n
}

// What is spliced arrives as it was sent, in both directions at once, also where
// no pipe is to be had, and what it takes is given back.
func TestBulk(t *testing.T) {
	const size = 24<<20 + 17
	sent := make(chan string, 1)
	port := serveTCP(t, func(c *net.TCPConn) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			io.Copy(c, noise(2, size))
			c.CloseWrite()
		}()
		d, n := digest(t, c)
		sent <- fmt.Sprint(d, n)
		<-done // or what is under way would be cut off
	})
	out, _ := digest(t, noise(1, size))
	in, _ := digest(t, noise(2, size))
	for _, pipes := range []int64{0, maxPipes} {
		g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
		openPipes.Add(pipes)
		_, _, c := g.connect(hostPort("tcp.test", port))
		go func() {
			io.Copy(c, noise(1, size))
			closeWrite(c)
		}()
		if got, n := digest(t, c); got != in || n != size {
			t.Errorf("the guest got %d bytes, %s, want %s", n, got, in)
		}
		if got := <-sent; got != fmt.Sprint(out, size) {
			t.Errorf("the host got %s, want %s", got, out)
		}
		e := g.await("close", func(e audit.Event) bool { return e.Event == audit.KindClose })
		if e.BytesIn != size || e.BytesOut != size {
			t.Errorf("%+v", e)
		}
		openPipes.Add(-pipes)
		if n := openPipes.Load(); n < 0 || n > keptPipes || len(bulkSlots) != 0 {
			t.Errorf("%d pipes and %d places for bulk are not given back", n, len(bulkSlots))
		}
	}
}

// A guest that takes nothing holds no more than so much of the host's memory,
// and tunnels beyond the pipes still work.
func TestStalledReaders(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, noise(3, 4<<20)) })
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	const n = maxPipes/2 + maxBulk + 100
	conns := make([]net.Conn, n)
	for i := range conns {
		_, _, conns[i] = g.connect(hostPort("tcp.test", port))
	}
	time.Sleep(200 * time.Millisecond)
	if p := openPipes.Load(); p > maxPipes || len(bulkSlots) > maxBulk {
		t.Errorf("%d pipes, %d places", p, len(bulkSlots))
	}
	want, _ := digest(t, noise(3, 4<<20))
	for _, i := range []int{0, n / 2, n - 1} {
		if got, _ := digest(t, conns[i]); got != want {
			t.Errorf("connection %d: %s", i, got)
		}
	}
}

// Descriptors that a guest sends along are dropped by splice(2), too.
func TestSpliceDropsDescriptors(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	_, _, c := g.connect(hostPort("tcp.test", port))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	uc := c.(*buffered).UnixConn
	if _, _, err := uc.WriteMsgUnix([]byte("with a descriptor"), unix.UnixRights(int(w.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := io.ReadFull(c, make([]byte, len("with a descriptor"))); err != nil {
		t.Fatal(err)
	}
	// Had the gate kept it, this would wait for ever.
	_ = r.SetReadDeadline(time.Now().Add(patience))
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the descriptor is still open somewhere: %v", err)
	}
}
