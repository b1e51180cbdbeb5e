package gate

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// serveTCP runs handle for each connection to a port on loopback.
func serveTCP(t testing.TB, handle func(*net.TCPConn)) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, l, func(c net.Conn) { handle(c.(*net.TCPConn)) })
}

// serveOn runs handle for each connection to l, until the test ends.
func serveOn(t testing.TB, l net.Listener, handle func(net.Conn)) (port int) {
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

func tcpRule(host string, port int) plan.Rule { return pin(allowHost(host, "tcp", port), "127.0.0.1") }

// Each side may end its half and still get the other's.
func TestHalfClose(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) {
		sum := sha256.New()
		io.Copy(sum, c) // until the guest has ended its half
		fmt.Fprintf(c, "%x", sum.Sum(nil))
	})
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	data := make([]byte, 5<<20)
	rand.Read(data)
	_, _, c := g.connect(hostPort("tcp.test", port))
	go func() {
		c.Write(data)
		closeWrite(c)
	}()
	got, err := io.ReadAll(c)
	if want := fmt.Sprintf("%x", sha256.Sum256(data)); err != nil || string(got) != want {
		t.Errorf("%q %v", got, err)
	}
	e := g.await("close", func(e audit.Event) bool { return e.Event == "close" })
	if e.BytesOut != int64(len(data)) || e.BytesIn != int64(len(got)) {
		t.Errorf("%+v", e)
	}
}

func TestHostEndsFirst(t *testing.T) {
	got := make(chan string, 1)
	port := serveTCP(t, func(c *net.TCPConn) {
		c.Write([]byte("bye"))
		c.CloseWrite()
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	_, _, c := g.connect(hostPort("tcp.test", port))
	if b, err := io.ReadAll(c); string(b) != "bye" || err != nil {
		t.Fatalf("%q %v", b, err)
	}
	io.WriteString(c, "and this")
	closeWrite(c)
	if s := <-got; s != "and this" {
		t.Errorf("%q", s)
	}
	g.await("close", func(e audit.Event) bool { return e.Event == "close" && e.BytesOut == 8 && e.BytesIn == 3 })
}

// A client may send long before it has its 200.
func TestSentAhead(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	data := make([]byte, 100_000)
	rand.Read(data)
	head := []byte("CONNECT " + hostPort("tcp.test", port) + " HTTP/1.1\r\n\r\n")
	for _, cut := range []int{1, 9, len(head) - 1, len(head), len(head) + 5000} {
		c := g.dial()
		all := append(head[:len(head):len(head)], data...)
		go func() {
			c.Write(all[:cut])
			time.Sleep(20 * time.Millisecond)
			c.Write(all[cut:])
			closeWrite(c)
		}()
		got, err := io.ReadAll(c)
		if err != nil || string(got) != established+string(data) {
			t.Errorf("cut at %d: %d bytes, %v", cut, len(got), err)
		}
	}
}

// A host that never answers does not keep alive what the guest has closed.
func TestGuestHangsUp(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("SKIPPED: only Linux tells a closed Unix socket from a half-closed one")
	}
	silent := make(chan struct{})
	defer close(silent)
	port := serveTCP(t, func(c *net.TCPConn) { <-silent })
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	_, _, once := g.connect(hostPort("tcp.test", port))
	_, _, later := g.connect(hostPort("tcp.test", port))
	_, _, half := g.connect(hostPort("tcp.test", port))
	closeWrite(half)
	closeWrite(later)
	once.Close()
	time.Sleep(50 * time.Millisecond)
	later.Close()
	eventually(func() bool { return g.gate.Stats().Tunnels == 1 })
	time.Sleep(50 * time.Millisecond)
	if s := g.gate.Stats(); s.Tunnels != 1 {
		t.Errorf("the half-closed one is to stay, and no other: %+v", s)
	}
}

func TestReset(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1))
		c.SetLinger(0)
	})
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	_, _, c := g.connect(hostPort("tcp.test", port))
	c.Write([]byte("x"))
	if b, _ := io.ReadAll(c); len(b) > 0 {
		t.Errorf("%q", b)
	}
	g.await("close", func(e audit.Event) bool { return e.Event == "close" })
}

func TestIdleTunnelEnds(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	l := defaultLimits
	for l.tunnel = 300 * time.Millisecond; ; l.tunnel *= 2 {
		g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, func(c *Config) { c.limits = &l })
		_, _, c := g.connect(hostPort("tcp.test", port))
		// It lives as long as something moves, in one direction or the other.
		slowest, err := time.Duration(0), error(nil)
		for range 5 {
			moved := time.Now()
			time.Sleep(l.tunnel * 2 / 5)
			c.Write([]byte("x"))
			_, err = io.ReadFull(c, make([]byte, 1))
			if slowest = max(slowest, time.Since(moved)); err != nil {
				break
			}
		}
		if err != nil && slowest > l.tunnel/2 && l.tunnel < patience {
			continue // this machine was too slow to keep it moving
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("it stays open: %v", err)
		}
		return
	}
}

func TestSlowClients(t *testing.T) {
	l := defaultLimits
	l.handshake, l.head = 300*time.Millisecond, 300*time.Millisecond
	o := startOrigin(t, true, echo, "api.test")
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1")}, nil, func(c *Config) {
		c.MaxConns = 50
		c.limits = &l
	})
	began := time.Now()
	var wg sync.WaitGroup
	for i := range 40 {
		c := g.dial()
		wg.Go(func() {
			// Half a head, or a tunnel and half a ClientHello, and then silence.
			if i%2 == 0 {
				io.WriteString(c, "GET http://api.test/ HTTP/1.1\r\nHost:")
			} else {
				fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\n\r\n\x16\x03\x01", hostPort("api.test", o.port))
			}
			io.Copy(io.Discard, c)
		})
	}
	wg.Wait()
	if d := time.Since(began); d > defaultLimits.handshake-time.Second {
		t.Errorf("took %v", d)
	}
	if resp, _ := g.get("https://" + hostPort("api.test", o.port) + "/"); resp.StatusCode != 200 {
		t.Error(resp.Status)
	}
	g.settled()
}

// settled waits until nothing is left of the connections.
func (g *rig) settled() {
	g.t.Helper()
	if !eventually(func() bool { s := g.gate.Stats(); return s.Conns == 0 && s.Tunnels == 0 }) {
		g.t.Errorf("left: %+v", g.gate.Stats())
	}
}

func TestThousandConnections(t *testing.T) {
	const n = 1000
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	goroutines := runtime.NumGoroutine()
	conns := make([]net.Conn, n)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 64)
	for i := range conns {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			c, err := net.Dial("unix", g.sock)
			if err != nil {
				t.Error(err)
				return
			}
			c.SetDeadline(time.Now().Add(patience))
			conns[i] = c
			fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\n\r\n", hostPort("tcp.test", port))
			br := bufio.NewReader(c)
			if l, err := br.ReadString('\n'); err != nil || !strings.Contains(l, " 200 ") {
				t.Errorf("%q %v", l, err)
				return
			}
			br.ReadString('\n')
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	if s := g.gate.Stats(); s.Conns != n || s.Tunnels != n {
		t.Errorf("%+v", s)
	}
	for i, c := range conns {
		fmt.Fprintf(c, "%04d", i)
	}
	for i, c := range conns {
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != fmt.Sprintf("%04d", i) {
			t.Fatalf("%d: %q %v", i, b, err)
		}
		c.Close()
	}
	g.settled()
	if eventually(func() bool { return runtime.NumGoroutine() <= goroutines+10 }) {
		return
	}
	t.Errorf("%d goroutines, %d before", runtime.NumGoroutine(), goroutines)
}

func TestTooManyConnections(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, func(c *Config) { c.MaxConns = 2 })
	_, _, a := g.connect(hostPort("tcp.test", port))
	g.connect(hostPort("tcp.test", port))
	got, _ := io.ReadAll(g.dial())
	if !bytes.HasPrefix(got, []byte("HTTP/1.1 503 ")) || !bytes.Contains(got, []byte("too_many_connections")) || !bytes.Contains(got, []byte("Retry-After: 1")) {
		t.Errorf("%s", got)
	}
	a.Close()
	eventually(func() bool { return g.gate.Stats().Conns < 2 })
	if status, _, _ := g.connect(hostPort("tcp.test", port)); status != 200 {
		t.Error(status)
	}
}

func TestCloseCutsTunnels(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	_, _, c := g.connect(hostPort("tcp.test", port))
	g.gate.Close()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("still open")
	}
	if err := <-g.done; err != nil {
		t.Error(err)
	}
	g.done <- nil
	es := g.events()
	if last := es[len(es)-1]; last.Event != "stop" || es[len(es)-2].Event != "close" {
		t.Errorf("%+v", es)
	}
	if _, err := net.Dial("unix", g.sock); err == nil {
		t.Error("still listening")
	}
}

// full is a disk with room for some lines.
type full struct{ room atomic.Int64 }

func (f *full) Write(p []byte) (int, error) {
	if f.room.Add(-1) < 0 {
		return 0, errors.New("no space left on device")
	}
	return len(p), nil
}
func (f *full) Close() error { return nil }

// Without its log the gate lets nothing through, and ends where the log is lost
// for good.
func TestAuditFailureCloses(t *testing.T) {
	var reached atomic.Int64
	port := serveTCP(t, func(c *net.TCPConn) {
		n, _ := io.Copy(io.Discard, c)
		reached.Add(n)
	})
	o := startOrigin(t, false, echo)
	w := &full{}
	w.room.Store(1) // the start line
	g := start(t, []plan.Rule{tcpRule("tcp.test", port), pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil,
		func(c *Config) { c.Audit = audit.New(w, audit.Options{Bottle: "t"}) })
	status, f, c := g.connect(hostPort("tcp.test", port))
	if status != 503 || f.Error.Code != "audit_failed" {
		t.Errorf("%d %+v", status, f)
	}
	io.WriteString(c, "data")
	err := <-g.done
	if f := fault.As(err); err == nil || f.Code != "audit_write_failed" || f.Exit != fault.IO {
		t.Errorf("%v", err)
	}
	g.done <- nil
	if reached.Load() > 0 || len(o.log()) > 0 {
		t.Error("bytes got out")
	}
}

// standIn is an HTTP proxy that answers as the recordings of pipelock do.
func standIn(t *testing.T, answer func(w http.ResponseWriter, r *http.Request) bool) (string, *[]string) {
	var mu sync.Mutex
	var seen []string
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen = append(seen, r.Method+" "+r.RequestURI)
		mu.Unlock()
		if answer(w, r) {
			return
		}
		if r.Method != "CONNECT" {
			r.RequestURI = ""
			r.URL.Host = "127.0.0.1:" + r.URL.Port()
			resp, err := http.DefaultTransport.RoundTrip(r)
			if err != nil {
				http.Error(w, err.Error(), 502)
				return
			}
			w.WriteHeader(resp.StatusCode)
			io.Copy(w, resp.Body)
			return
		}
		_, port, _ := net.SplitHostPort(r.RequestURI)
		up, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err != nil {
			http.Error(w, "tunnel dial failed", 502)
			return
		}
		c, _, _ := w.(http.Hijacker).Hijack()
		io.WriteString(c, "HTTP/1.1 200 Connection Established\r\n\r\n")
		go func() { io.Copy(up, c); up.Close() }()
		go func() { io.Copy(c, up); c.Close() }()
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String(), &seen
}

func TestThroughProxy(t *testing.T) {
	secure := startOrigin(t, true, echo, "api.test", "key.test")
	plain := startOrigin(t, false, echo)
	raw := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	upstream, seen := standIn(t, func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.Contains(r.RequestURI, "blocked.test"):
			text := "CONNECT blocked: domain not in allowlist: blocked.test"
			if r.Method != "CONNECT" {
				text = "blocked: domain not in allowlist: blocked.test"
			}
			http.Error(w, text, 403)
		case strings.Contains(r.RequestURI, "killed.test"):
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(503)
			io.WriteString(w, `{"error":"kill_switch_active"}`)
		default:
			return false
		}
		return true
	})
	g := start(t, []plan.Rule{
		allowHost("api.test", "tls", secure.port), allowHost("key.test", "tls", secure.port), allowHost("web.test", "http", plain.port),
		allowHost("blocked.test", "tls", 443), allowHost("blocked.test", "http", 80), allowHost("killed.test", "tls", 443),
		tcpRule("raw.test", raw), pin(allowHost("pinned.test", "http", plain.port), "127.0.0.1"),
	}, keySecret("key.test", "x-api-key"), func(c *Config) {
		c.Upstream = upstream
		c.Resolver = &fakeDNS{err: errors.New("must not be asked")}
	})
	for _, u := range []string{"https://" + hostPort("api.test", secure.port), "https://" + hostPort("key.test", secure.port), "http://" + hostPort("web.test", plain.port)} {
		if resp, b := g.get(u + "/p"); resp.StatusCode != 200 || !bytes.Contains(b, []byte(`"path":"/p"`)) {
			t.Errorf("%s: %s %s", u, resp.Status, b)
		}
	}
	if n := len(*seen); n != 3 {
		t.Errorf("%v", *seen)
	}
	status, f, _ := g.connect("blocked.test:443")
	if status != 403 || f.Error.Code != "proxy_refused" || !strings.Contains(f.Error.Reason, "domain not in allowlist") {
		t.Errorf("%d %+v", status, f)
	}
	if resp, b := g.get("http://blocked.test/"); resp.StatusCode != 403 || !bytes.Contains(b, []byte(`"code":"proxy_refused"`)) {
		t.Errorf("%s %s", resp.Status, b)
	}
	if status, f, _ := g.connect("killed.test:443"); status != 503 || f.Error.Code != "proxy_closed" {
		t.Errorf("%d %+v", status, f)
	}
	// These leave from the gate.
	before := len(*seen)
	if status, _, _ := g.connect(hostPort("raw.test", raw)); status != 200 {
		t.Error(status)
	}
	if resp, _ := g.get("http://" + hostPort("pinned.test", plain.port) + "/"); resp.StatusCode != 200 {
		t.Error(resp.Status)
	}
	if len(*seen) != before {
		t.Errorf("%v", (*seen)[before:])
	}
}

// A dead proxy is no decision, and no reason to go out directly.
func TestProxyDown(t *testing.T) {
	o := startOrigin(t, false, echo)
	l, _ := net.Listen("tcp", "127.0.0.1:0")
	l.Close()
	g := start(t, []plan.Rule{allowHost("web.test", "http", o.port), allowHost("api.test", "tls", 443)}, nil, func(c *Config) {
		c.Upstream = l.Addr().String()
		c.Resolver = &fakeDNS{err: errors.New("must not be asked")}
	})
	status, f, _ := g.connect("api.test:443")
	if status != 503 || f.Error.Code != "proxy_down" || f.Error.Host != "api.test" {
		t.Errorf("%d %+v", status, f)
	}
	resp, b := g.get("http://" + hostPort("web.test", o.port) + "/")
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" || !bytes.Contains(b, []byte("proxy_down")) || len(o.log()) > 0 {
		t.Errorf("%s %s", resp.Status, b)
	}
}

// tcp lets programs reach the gate that speak to proxies over TCP only.
func (g *rig) tcp() string {
	port := serveTCP(g.t, func(c *net.TCPConn) {
		u, err := net.Dial("unix", g.sock)
		if err != nil {
			return
		}
		defer u.Close()
		go func() { io.Copy(u, c); closeWrite(u) }()
		io.Copy(c, u)
	})
	return hostPort("127.0.0.1", port)
}

// Programs that agents run, with the TLS libraries they are built on.
func TestClients(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test", "pass.test")
	plain := startOrigin(t, false, echo)
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1"), pin(allowHost("pass.test", "tls", o.port), "127.0.0.1"),
		pin(allowHost("web.test", "http", plain.port), "127.0.0.1")}, keySecret("api.test", "x-api-key"), nil)
	proxy := g.tcp()
	roots := filepath.Join(t.TempDir(), "ca.pem")
	os.WriteFile(roots, append(g.ca.CertPEM(), world().pem...), 0o600)
	secure, web := ":"+strconv.Itoa(o.port), ":"+strconv.Itoa(plain.port)
	curl := func(args ...string) []string {
		return append([]string{"curl", "-sS", "-i", "-q", "--cacert", roots, "-x", "http://" + proxy}, args...)
	}
	python := `import sys,urllib.request;print(urllib.request.urlopen(sys.argv[1]).read().decode())`
	node := `const [h,p]=process.argv[1].split(':');const u=new URL(process.env.https_proxy);
		require('http').request({host:u.hostname,port:u.port,method:'CONNECT',path:h+':'+p}).on('connect',(r,s)=>{
		const t=require('tls').connect({socket:s,servername:h,ca:require('fs').readFileSync(process.env.SSL_CERT_FILE)},()=>
		t.write('GET /n HTTP/1.1\r\nHost: '+h+':'+p+'\r\nConnection: close\r\n\r\n'));t.pipe(process.stdout)}).end()`
	for name, c := range map[string]struct {
		argv []string
		want string
	}{
		"curl inspected":      {curl("-H", "x-api-key: placeholder", "https://api.test"+secure+"/a"), `"path":"/a"`},
		"curl end to end":     {curl("https://pass.test" + secure + "/b"), `"path":"/b"`},
		"curl plain":          {curl("-d", "x=y", "http://web.test"+web+"/c"), `"body":"x=y"`},
		"curl plain tunnel":   {curl("-p", "http://web.test"+web+"/p"), `"path":"/p"`},
		"curl denied tunnel":  {curl("https://denied.test/"), `403`},
		"curl denied plain":   {curl("http://denied.test/"), `"code":"not_in_allowlist"`},
		"curl fronting":       {curl("-H", "Host: denied.test", "https://api.test"+secure+"/"), `"code":"host_mismatch"`},
		"curl other name":     {curl("--connect-to", "denied.test:443:pass.test"+secure, "https://denied.test/"), "access denied"},
		"curl expect":         {curl("-H", "Expect: 100-continue", "-d", "x=y", "https://api.test"+secure+"/e"), `"body":"x=y"`},
		"curl head":           {curl("-I", "https://api.test"+secure+"/h"), "HTTP/1.1 200 OK"},
		"curl number address": {curl("http://2130706433/"), "not_in_allowlist"},
		"python inspected":    {[]string{"python3", "-c", python, "https://api.test" + secure + "/py"}, `"path": "/py"`},
		"python end to end":   {[]string{"python3", "-c", python, "https://pass.test" + secure + "/py"}, `"path": "/py"`},
		"node inspected":      {[]string{"node", "-e", node, "api.test" + secure}, `"path":"/n"`},
		"node end to end":     {[]string{"node", "-e", node, "pass.test" + secure}, `"path":"/n"`},
		// The origin is no git server: the answer of the right one is the proof.
		"git inspected":  {[]string{"git", "ls-remote", "https://api.test" + secure + "/r.git"}, "not valid: is this a git repository"},
		"git end to end": {[]string{"git", "ls-remote", "https://pass.test" + secure + "/r.git"}, "not valid: is this a git repository"},
	} {
		t.Run(name, func(t *testing.T) {
			bin, err := exec.LookPath(c.argv[0])
			if err != nil {
				t.Skipf("SKIPPED: %s is not installed, so the gate was not tried with it", c.argv[0])
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			cmd := exec.CommandContext(ctx, bin, c.argv[1:]...)
			cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "SSL_CERT_FILE=" + roots, "GIT_SSL_CAINFO=" + roots,
				"GIT_CONFIG_NOSYSTEM=1", "LC_ALL=C", "https_proxy=http://" + proxy}
			out, _ := cmd.CombinedOutput()
			if !strings.Contains(strings.ReplaceAll(string(out), `": "`, `":"`), strings.ReplaceAll(c.want, `": "`, `":"`)) || strings.Contains(string(out), secretValue) {
				t.Errorf("%s\n%+v", out, g.events())
			}
		})
	}
}

// TLS inside tunnels is not only Go's: what OpenSSL sends passes, too.
func TestTLSVersions(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1")}, nil, nil)
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		_, _, c := g.connect(hostPort("api.test", o.port))
		tc := tls.Client(c, &tls.Config{ServerName: "api.test", InsecureSkipVerify: true, MaxVersion: v})
		if err := tc.Handshake(); err != nil {
			t.Errorf("%x: %v", v, err)
		}
	}
}
