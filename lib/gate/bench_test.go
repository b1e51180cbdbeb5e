package gate

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
)

// BenchmarkNewTLS is a new TLS connection with one small request, direct and
// through the gate.
func BenchmarkNewTLS(b *testing.B) {
	o := startOrigin(b, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") }), "api.test", "key.test")
	g := start(b, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1"), pin(allowHost("key.test", "tls", o.port), "127.0.0.1")},
		keySecret("key.test", "x-api-key"), nil)
	run := func(b *testing.B, host string, dial func() (net.Conn, error)) {
		for b.Loop() {
			c, err := dial()
			if err != nil {
				b.Fatal(err)
			}
			tc := tls.Client(c, &tls.Config{ServerName: host, InsecureSkipVerify: true})
			fmt.Fprintf(tc, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", hostPort(host, o.port))
			if out, err := io.ReadAll(tc); err != nil || len(out) == 0 {
				b.Fatal(string(out), err)
			}
			c.Close()
		}
	}
	through := func(host string) func() (net.Conn, error) {
		return func() (net.Conn, error) {
			c, err := net.Dial("unix", g.sock)
			if err != nil {
				return nil, err
			}
			fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\n\r\n", hostPort(host, o.port))
			buf := make([]byte, len(established))
			_, err = io.ReadFull(c, buf)
			return c, err
		}
	}
	b.Run("direct", func(b *testing.B) {
		run(b, "api.test", func() (net.Conn, error) { return net.Dial("tcp", hostPort("127.0.0.1", o.port)) })
	})
	b.Run("gate", func(b *testing.B) { run(b, "api.test", through("api.test")) })
	b.Run("inspected", func(b *testing.B) { run(b, "key.test", through("key.test")) })
}

// BenchmarkBulk is a download of 64 MiB without TLS.
func BenchmarkBulk(b *testing.B) {
	const size = 64 << 20
	chunk := make([]byte, 1<<20)
	port := serveTCP(b, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1))
		for range size / len(chunk) {
			if _, err := c.Write(chunk); err != nil {
				return
			}
		}
	})
	web := startOrigin(b, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		for range size / len(chunk) {
			w.Write(chunk)
		}
	}))
	g := start(b, []plan.Rule{tcpRule("tcp.test", port), pin(allowHost("web.test", "http", web.port), "127.0.0.1")}, nil, nil)
	take := func(b *testing.B, open func() net.Conn, request string) {
		b.SetBytes(size)
		buf := make([]byte, 256<<10)
		for b.Loop() {
			c := open()
			io.WriteString(c, request)
			for n := 0; n < size; {
				k, err := c.Read(buf)
				if n += k; err != nil {
					b.Fatal(n, err)
				}
			}
			c.Close()
		}
	}
	b.Run("direct", func(b *testing.B) {
		take(b, func() net.Conn { c, _ := net.Dial("tcp", hostPort("127.0.0.1", port)); return c }, "x")
	})
	b.Run("tunnel", func(b *testing.B) {
		take(b, func() net.Conn { _, _, c := g.connect(hostPort("tcp.test", port)); return c }, "x")
	})
	b.Run("http", func(b *testing.B) {
		at := hostPort("web.test", web.port)
		take(b, func() net.Conn { return g.dial() }, "GET http://"+at+"/ HTTP/1.1\r\nHost: "+at+"\r\nConnection: close\r\n\r\n")
	})
}

// BenchmarkDenied is a refused request with a hundred thousand rules, audit line
// included.
func BenchmarkDenied(b *testing.B) {
	rules := make([]plan.Rule, 100_000)
	for i := range rules {
		rules[i] = allowHost(fmt.Sprintf("h%d.example.test", i), "tls", 443)
	}
	g := start(b, rules, nil, nil)
	c := g.dial()
	want := []byte("GET http://denied.test/ HTTP/1.1\r\nHost: denied.test\r\n\r\n")
	buf := make([]byte, 4096)
	for b.Loop() {
		c.Write(want)
		if n, err := c.Read(buf); err != nil || n < 20 {
			b.Fatal(err)
		}
	}
}

// BenchmarkMask searches an answer: text, and JSON that is full of escapes.
func BenchmarkMask(b *testing.B) {
	for _, c := range []struct{ name, text string }{
		{"text", "abcdefghijklmnop \"{}:s"},
		{"json", `{"text":"a line\nand \"another\" one\t","path":"C:\\dir"},`},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := scan{finder: newFinder([]string{secretValue})}
			body := bytes.Repeat([]byte(c.text), 64<<10/len(c.text))
			b.SetBytes(int64(len(body)))
			for b.Loop() {
				if s.mask(body) {
					b.Fatal("found")
				}
				s.held(body)
			}
		})
	}
}
