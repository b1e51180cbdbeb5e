package gate

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Connections arrive as descriptors of socket pairs, which have no names.
func TestSocketPair(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test", "key.test")
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1"), pin(allowHost("key.test", "tls", o.port), "127.0.0.1")},
		keySecret("key.test", "x-api-key"), nil)
	handed := newQueue()
	ctx, cancel := context.WithCancel(context.Background())
	other, err := New(g.gate.cfg)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- other.Serve(ctx, handed) }()
	c := g.client()
	c.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		if err != nil {
			return nil, err
		}
		var conns [2]net.Conn
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "pair")
			if conns[i], err = net.FileConn(f); err != nil {
				return nil, err
			}
			f.Close()
		}
		go handed.put(conns[1])
		return conns[0], nil
	}
	for _, host := range []string{"api.test", "key.test"} {
		resp, err := c.Get("https://" + hostPort(host, o.port) + "/")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 {
			t.Error(resp.Status)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A guest that goes away ends the work of its request at the origin.
func TestClientGoesAway(t *testing.T) {
	gone := make(chan struct{})
	o := startOrigin(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		close(gone)
	}), "api.test")
	g := start(t, []plan.Rule{inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1"))}, nil, nil)
	ctx, cancel := context.WithCancel(context.Background())
	req, _ := http.NewRequestWithContext(ctx, "POST", "https://"+hostPort("api.test", o.port)+"/", strings.NewReader("question"))
	resp, err := g.client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	cancel()
	select {
	case <-gone:
	case <-time.After(patience):
		t.Error("the origin still works")
	}
	g.settled()
}

// A guest that asks for much and takes nothing, or announces a body and does not
// send it, is dropped.
func TestStalledClients(t *testing.T) {
	o := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			io.Copy(io.Discard, r.Body)
			return
		}
		for chunk := make([]byte, 1<<20); ; {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}))
	l := defaultLimits
	l.stall = 300 * time.Millisecond
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, func(c *Config) { c.limits = &l })
	at := hostPort("ok.test", o.port)
	fmt.Fprintf(g.dial(), "GET http://%s/ HTTP/1.1\r\nHost: %s\r\n\r\n", at, at)
	fmt.Fprintf(g.dial(), "POST http://%s/ HTTP/1.1\r\nHost: %s\r\nContent-Length: 1000\r\n\r\nhalf", at, at)
	for range 2 {
		g.await("close", func(e audit.Event) bool { return e.Event == "close" })
	}
	g.settled()
}

// Connections that were opened ahead of need wait longer than a head may take.
func TestOpenedAhead(t *testing.T) {
	l := defaultLimits
	l.head = 100 * time.Millisecond
	o := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(3 * l.head)
		io.WriteString(w, "slow")
	}))
	g := start(t, []plan.Rule{pin(allowHost("slow.test", "http", o.port), "127.0.0.1")}, nil, func(c *Config) { c.limits = &l })
	if _, b := g.get("http://" + hostPort("slow.test", o.port) + "/"); string(b) != "slow" {
		t.Errorf("an answer that takes longer than a head may: %q", b)
	}
	c := g.dial()
	time.Sleep(3 * l.head)
	io.WriteString(c, "CONNECT denied.test:443 HTTP/1.1\r\n\r\n")
	if b, _ := io.ReadAll(c); !bytes.HasPrefix(b, []byte("HTTP/1.1 403 ")) {
		t.Errorf("%q", b)
	}
	g.settled()
	// Not for ever, though.
	l.keepAlive = 300 * time.Millisecond
	g = start(t, nil, nil, func(c *Config) { c.limits = &l })
	if b, err := io.ReadAll(g.dial()); len(b) > 0 || err != nil {
		t.Errorf("%q %v", b, err)
	}
	g.settled()
}

func TestUnaskedUpgrade(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) {
		http.ReadRequest(bufio.NewReader(c))
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nraw")
		io.Copy(io.Discard, c)
	})
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", port), "127.0.0.1")}, nil, nil)
	resp, b := g.get("http://" + hostPort("ok.test", port) + "/")
	if resp.StatusCode != 403 || !bytes.Contains(b, []byte("upgrade_refused")) {
		t.Errorf("%s %s", resp.Status, b)
	}
}

// An inspected wildcard: each name below it has a certificate and a tunnel of
// its own.
func TestInspectedWildcard(t *testing.T) {
	o := startOrigin(t, true, echo, "a.wild.test", "b.wild.test")
	g := start(t, []plan.Rule{inspect(allowHost("*.wild.test", "tls", o.port))}, nil, func(c *Config) {
		c.Resolver = &fakeDNS{answers: map[string][][]netip.Addr{"a.wild.test.": {ips("93.184.216.34")}, "b.wild.test.": {ips("93.184.216.34")}}}
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			return net.Dial("tcp", hostPort("127.0.0.1", o.port))
		}
	})
	for _, host := range []string{"a.wild.test", "b.wild.test"} {
		if resp, b := g.get("https://" + hostPort(host, o.port) + "/"); resp.StatusCode != 200 || !bytes.Contains(b, []byte(host)) {
			t.Errorf("%s %s", resp.Status, b)
		}
	}
	if status, f, _ := g.connect(hostPort("wild.test", o.port)); status != 403 || f.Error.Code != "not_in_allowlist" {
		t.Errorf("%d %+v", status, f)
	}
}

// The header by which the guest tells the gate's answers apart is the gate's.
func TestDecisionHeaderIsOurs(t *testing.T) {
	o := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Header().Set("X-Bottle-Decision", "deny") }))
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	if resp, _ := g.get("http://" + hostPort("ok.test", o.port) + "/"); resp.Header.Get("X-Bottle-Decision") != "" {
		t.Error(resp.Header)
	}
}

// pipelock's recorded answers are told from an origin's.
func TestRecordedProxyAnswers(t *testing.T) {
	f, err := os.Open(filepath.Join("..", "..", "testscripts", "transcripts", "pipelock", "rt.ndjson"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	own, others := 0, 0
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var rec struct{ Name, Request, Response string }
		if err := json.Unmarshal(lines.Bytes(), &rec); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(rec.Response, "HTTP/1.1 ") || strings.HasPrefix(rec.Request, "CONNECT") || strings.Contains(rec.Name, "origin-form") {
			continue
		}
		resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(rec.Response)), nil)
		if err != nil {
			t.Fatal(rec.Name, err)
		}
		want := resp.StatusCode >= 400
		if got := new(exchange).fromProxy(resp); got != want {
			t.Errorf("%s: %v", rec.Name, got)
		}
		if !want {
			others++
			continue
		}
		own++
		if f := proxyRefusal(resp, "h.test", 80); f.Status != resp.StatusCode || f.Status == 403 && !strings.Contains(f.Reason, "blocked") {
			t.Errorf("%s: %+v", rec.Name, f)
		}
	}
	if own < 10 || others < 3 {
		t.Errorf("%d %d", own, others)
	}
}
