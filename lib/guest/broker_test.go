package guest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fdpass"
)

// echoBroker serves "egress" with an echo, and "broken" with a failure.
func echoBroker(t *testing.T) (*Broker, *os.File, chan error) {
	t.Helper()
	conn, far, err := fdpass.Pair()
	if err != nil {
		t.Fatal(err)
	}
	b := &Broker{Conn: conn, Services: map[string]func(*os.File) error{
		ServiceEgress: func(f *os.File) error {
			go func() { defer f.Close(); io.Copy(f, f) }()
			return nil
		},
		"broken": func(f *os.File) error { f.Close(); return errors.New("no gate") },
	}}
	done := make(chan error, 1)
	go func() { done <- b.Serve() }()
	t.Cleanup(func() { conn.Close() })
	return b, far, done
}

func TestDialEcho(t *testing.T) {
	_, far, done := echoBroker(t)
	d, err := NewDialer(far)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for range 100 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			c, err := d.Dial(ctx, ServiceEgress)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.Write([]byte("hello"))
			c.(*net.UnixConn).CloseWrite()
			if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
				t.Errorf("%q, %v", b, err)
			}
		}()
	}
	wg.Wait()
	if _, err := d.Dial(ctx, "git"); err == nil || !strings.Contains(err.Error(), "no such service") {
		t.Errorf("unknown service: %v", err)
	}
	c, err := d.Dial(ctx, "broken")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
		t.Errorf("a taker that fails: %q, %v; want the end of the stream", b, err)
	}
	d.Close()
	if err := <-done; err != nil {
		t.Errorf("Serve after the guest is gone: %v", err)
	}
}

func TestDialHostGone(t *testing.T) {
	conn, far, err := fdpass.Pair()
	if err != nil {
		t.Fatal(err)
	}
	d, err := NewDialer(far)
	if err != nil {
		t.Fatal(err)
	}
	go func() { time.Sleep(20 * time.Millisecond); conn.Close() }()
	if _, err := d.Dial(context.Background(), ServiceEgress); err == nil {
		t.Error("dial without a host succeeded")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	conn2, far2, err := fdpass.Pair() // nobody answers
	if err != nil {
		t.Fatal(err)
	}
	defer conn2.Close()
	d2, err := NewDialer(far2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d2.Dial(ctx, ServiceEgress); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("time limit: %v", err)
	}
}

func TestReadyOnceAndFailedPrintable(t *testing.T) {
	conn, far, err := fdpass.Pair()
	if err != nil {
		t.Fatal(err)
	}
	ready, failed := 0, []string{}
	b := &Broker{Conn: conn, Ready: func() { ready++ }, Failed: func(s string) { failed = append(failed, s) }}
	done := make(chan error, 1)
	go func() { done <- b.Serve() }()
	d, err := NewDialer(far)
	if err != nil {
		t.Fatal(err)
	}
	d.Failed(errors.New("bad\x1b[2Jthing\n" + strings.Repeat("x", 3000)))
	d.Ready()
	d.Ready()
	d.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if ready != 0 || len(failed) != 1 {
		t.Fatalf("ready %d, failed %d times; the first word counts", ready, len(failed))
	}
	if s := failed[0]; len(s) > maxText || strings.ContainsAny(s, "\x1b\n") || !strings.HasPrefix(s, "bad?[2Jthing ") {
		t.Errorf("reason is not printable or too long: %q", s)
	}
}

// A hostile guest may write anything; the broker must answer no more than it
// was asked, never panic, and stay in step.
func FuzzBroker(f *testing.F) {
	f.Add([]byte(`{"t":"dial","id":1,"service":"egress"}`))
	f.Add([]byte(`{"t":"dial","id":18446744073709551615,"service":"\u0000"}`))
	f.Add([]byte(`{"t":"failed","text":"\u001b"}`))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, msg []byte) {
		if len(msg) == 0 || len(msg) > fdpass.MaxMessage {
			return
		}
		conn, far, err := fdpass.Pair()
		if err != nil {
			t.Fatal(err)
		}
		peer, err := fdpass.New(far)
		if err != nil {
			t.Fatal(err)
		}
		taken := 0
		b := &Broker{Conn: conn, Failed: func(s string) {
			if strings.ContainsAny(s, "\x1b\n\r") {
				t.Errorf("unprintable reason %q", s)
			}
		}, Services: map[string]func(*os.File) error{ServiceEgress: func(f *os.File) error { taken++; return f.Close() }}}
		peer.Send(msg, nil)
		peer.Send([]byte(`{"t":"dial","id":7,"service":"egress"}`), nil)
		done := make(chan error, 1)
		go func() { done <- b.Serve() }()
		for {
			m, fd, err := peer.Recv()
			if err != nil {
				t.Fatal("no answer to a good request after ", string(msg))
			}
			if fd != nil {
				fd.Close()
			}
			if p, _ := decode(m); p.Kind == kindConn && p.ID == 7 {
				break
			}
		}
		peer.Close()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if taken > 2 {
			t.Errorf("%d connections for two requests", taken)
		}
	})
}
