package gate

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

// FuzzServe gives a whole gate the bytes of a connection. Whatever they are, the
// connection ends, nothing panics, nothing is dialled that no rule names, and the
// gate answers in HTTP.
func FuzzServe(f *testing.F) {
	var mu sync.Mutex
	var remarks bytes.Buffer
	var dialled []string
	b := &plan.Bottle{ID: "t", Egress: plan.Policy{Rules: []plan.Rule{
		pin(allowHost("api.test", "tls", 443), "127.0.0.1"), pin(allowHost("web.test", "http", 80), "127.0.0.1"),
		pin(allowHost("git.test", "ssh", 22), "127.0.0.1"), pin(allowHost("raw.test", "tcp", 1), "127.0.0.1")}}}
	l := defaultLimits
	l.head, l.handshake, l.stall, l.answer, l.halfOpen = time.Second, time.Second, time.Second, time.Second, time.Second
	g, err := New(Config{Bottle: b, Audit: audit.New(nowhere{}, audit.Options{Bottle: "t"}), limits: &l,
		Log: lockedWriter{&mu, &remarks},
		Dial: func(_ context.Context, _, address string) (net.Conn, error) {
			mu.Lock()
			dialled = append(dialled, address)
			mu.Unlock()
			a, far := net.Pipe()
			go func() { // a host that hears something, and hangs up
				far.Read(make([]byte, 1))
				far.Close()
			}()
			return pipeConn{a}, nil
		}})
	if err != nil {
		f.Fatal(err)
	}
	sock := filepath.Join(f.TempDir(), "g")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		f.Fatal(err)
	}
	go func() { _ = g.Serve(context.Background(), ln) }()
	f.Cleanup(func() { g.Close() })

	f.Add([]byte("GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n"))
	f.Add([]byte("GET http://denied.test/ HTTP/1.1\r\nHost: denied.test\r\n\r\nGET http://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n"))
	f.Add([]byte("POST http://web.test/ HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"))
	f.Add(append([]byte("CONNECT api.test:443 HTTP/1.1\r\n\r\n"), clientHello(f, &tls.Config{ServerName: "api.test", CurvePreferences: []tls.CurveID{tls.X25519}})...))
	f.Add([]byte("CONNECT git.test:22 HTTP/1.1\r\n\r\nSSH-2.0-x\r\n"))
	f.Add([]byte("CONNECT raw.test:1 HTTP/1.1\r\n\r\nx"))
	f.Add([]byte("CONNECT web.test:80 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nHost: web.test\r\n\r\n"))
	ours := []string{"127.0.0.1:443", "127.0.0.1:80", "127.0.0.1:22", "127.0.0.1:1"}
	f.Fuzz(func(t *testing.T, sent []byte) {
		c, err := net.Dial("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		go func() {
			_, _ = c.Write(sent)
			_ = c.(*net.UnixConn).CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the connection stays open after %q", got)
		}
		if len(got) > 0 && !strings.HasPrefix(string(got), "HTTP/1.") {
			t.Fatalf("answered %q", got)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, address := range dialled {
			if !slices.Contains(ours, address) {
				t.Fatalf("dialled %s", address)
			}
		}
		dialled = nil
		if strings.Contains(remarks.String(), "panic") {
			t.Fatal(remarks.String())
		}
		remarks.Reset()
	})
}

type nowhere struct{}

func (nowhere) Write(p []byte) (int, error) { return len(p), nil }
func (nowhere) Close() error                { return nil }

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// pieces gives its bytes in pieces of one size.
type pieces struct {
	rest []byte
	size int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.rest[:min(p.size, len(p.rest))])
	p.rest = p.rest[n:]
	return n, nil
}

// FuzzSSH: what passes is a version line, after the lines that a host may send
// before it, and then what began as an SSH packet does; how it comes in pieces
// makes no difference to what is let in.
func FuzzSSH(f *testing.F) {
	f.Add([]byte("SSH-2.0-OpenSSH_9.2\r\n\x00\x00\x00\x10\x04\x14rest"), 3, false)
	f.Add([]byte("hello\r\nSSH-2.0-x\r\n"), 1, true)
	f.Add([]byte("SSH-2.0-x\r\nGET / HTTP/1.1\r\n"), 7, true)
	f.Fuzz(func(t *testing.T, b []byte, size int, host bool) {
		before := 0
		if host {
			before = maxGreeting
		}
		try := func(size int) (out []byte, version, packet error) {
			var dst bytes.Buffer
			s := &sshStart{src: &pieces{bytes.Clone(b), size}, dst: &dst, who: "it"}
			if version = s.version(before); version == nil {
				if line := dst.Bytes(); !isVersionLine(line[bytes.LastIndexByte(line[:len(line)-1], '\n')+1 : len(line)-1]) {
					t.Fatalf("passed %q for a version line", line)
				}
				packet = s.firstPacket()
			}
			if int64(dst.Len()) != s.passed || !bytes.HasPrefix(b, dst.Bytes()) || version != nil && dst.Len() > 0 {
				t.Fatalf("passed %q of %q", dst.Bytes(), b)
			}
			return dst.Bytes(), version, packet
		}
		if size < 1 || size > 1<<10 {
			size = 1 << 10
		}
		_, v1, p1 := try(1)
		_, v, p := try(size)
		if (v1 == nil) != (v == nil) || (p1 == nil) != (p == nil) {
			t.Fatalf("in pieces of 1: %v %v; of %d: %v %v; %q", v1, p1, size, v, p, b)
		}
	})
}
