//go:build linux

package helper

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/guest"
)

// fakeGate answers as the gate does: about names, of which those that begin with
// no are refused, and by echo behind a CONNECT.
type fakeGate struct {
	services string // JSON, with PORT for port
	port     int
	mu       sync.Mutex
	asked    []string
	down     atomic.Int64 // so many connections are closed unread
	refusal  string       // answer to CONNECT instead
}

func (g *fakeGate) take(c net.Conn) {
	defer c.Close()
	if g.down.Add(-1) >= 0 {
		return
	}
	br := bufio.NewReader(c)
	for {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		g.mu.Lock()
		g.asked = append(g.asked, r.Method+" "+r.URL.Query().Get("name")+r.URL.Host)
		g.mu.Unlock()
		switch {
		case r.Method == "CONNECT" && g.refusal != "":
			io.WriteString(c, g.refusal)
			return
		case r.Method == "CONNECT":
			// The first bytes of the host come with the answer.
			io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n"+r.URL.Host+"\n")
			io.Copy(c, br)
			return
		case strings.HasPrefix(r.URL.Query().Get("name"), "no"):
			body := `{"error":{}}`
			fmt.Fprintf(c, "HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		case strings.HasPrefix(r.URL.Query().Get("name"), "busy"):
			io.WriteString(c, "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
		default:
			body := strings.ReplaceAll(g.services, "PORT", fmt.Sprint(g.port))
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s", len(body), body)
		}
	}
}

func (g *fakeGate) log() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]string(nil), g.asked...)
}

const tcpService = `{"services":[{"port":PORT,"protocol":"tcp"}]}`

func testNames(t *testing.T, g *fakeGate) (*names, *syncBuffer) {
	t.Helper()
	if g.port == 0 {
		// Free on every address of the host, most likely, for as long as this takes.
		l, err := net.Listen("tcp4", "0.0.0.0:0")
		if err != nil {
			t.Fatal(err)
		}
		g.port = l.Addr().(*net.TCPAddr).Port
		l.Close()
	}
	stderr := &syncBuffer{}
	n := newNames(newRelay(guest.Relay{Service: guest.ServiceEgress}, upstreams(g.take), stderr), stderr)
	t.Cleanup(func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		for n.used.Len() > 0 {
			n.forget(n.used.Back())
		}
		if n.listening != 0 {
			t.Errorf("%d listeners are left by the count", n.listening)
		}
	})
	return n, stderr
}

func (g *fakeGate) dial(t *testing.T, ip netip.Addr) *net.TCPConn {
	t.Helper()
	return dialTCP(t, netip.AddrPortFrom(ip, uint16(g.port)).String())
}

// exchange sends, and reads to the end. A reset may come before the connection is
// there for the client.
func (g *fakeGate) exchange(ip netip.Addr, send string) (string, error) {
	c, err := net.Dial("tcp", netip.AddrPortFrom(ip, uint16(g.port)).String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	io.WriteString(c, send)
	got, err := io.ReadAll(c)
	return string(got), err
}

func TestNameToTunnel(t *testing.T) {
	g := &fakeGate{services: tcpService}
	n, _ := testNames(t, g)
	a, err := n.resolve("a.test", false)
	if err != nil {
		t.Fatal(err)
	}
	b, err := n.resolve("b.test", false)
	if err != nil || a == b {
		t.Fatalf("%v, %v: two names with one address", b, err)
	}
	if again, err := n.resolve("a.test", false); err != nil || again != a {
		t.Errorf("asked again: %v, %v; want %v", again, err, a)
	}
	for name, ip := range map[string]netip.Addr{"a.test": a, "b.test": b} {
		c := g.dial(t, ip)
		io.WriteString(c, "ping")
		c.CloseWrite()
		got, err := io.ReadAll(c)
		if want := fmt.Sprintf("%s:%d\nping", name, g.port); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	if _, err := n.resolve("no.test", false); !errors.Is(err, errRefused) {
		t.Errorf("refused name: %v", err)
	}
	if _, err := n.resolve("busy.test", false); err == nil || errors.Is(err, errRefused) {
		t.Errorf("a gate with no time: %v", err)
	}
}

// What the agent serves on 127.0.0.1 is its own, on ports of names, too.
func TestOwnPortStaysFree(t *testing.T) {
	g := &fakeGate{services: tcpService}
	n, _ := testNames(t, g)
	if _, err := n.resolve("a.test", false); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", g.port))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestGateComesBack(t *testing.T) {
	g := &fakeGate{services: tcpService}
	n, _ := testNames(t, g)
	g.down.Store(3)
	ip, err := n.resolve("a.test", false)
	if err != nil {
		t.Fatalf("while the gate is replaced: %v", err)
	}
	g.down.Store(3)
	c := g.dial(t, ip)
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "a.test:") {
		t.Errorf("%q, %v", line, err)
	}
}

func TestRefusalsInTheClientsProtocol(t *testing.T) {
	body := `{"error":{"code":"not_in_allowlist"}}`
	head := fmt.Sprintf("HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n", len(body))
	for protocol, want := range map[string]string{"http": head + body, "tls": string(accessDenied), "tcp": "", "ssh": ""} {
		g := &fakeGate{services: `{"services":[{"port":PORT,"protocol":"` + protocol + `"}]}`, refusal: head + body}
		n, _ := testNames(t, g)
		ip, err := n.resolve("a.test", false)
		if err != nil {
			t.Fatal(err)
		}
		got, err := g.exchange(ip, "hello")
		if want == "" {
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: %q, %v; want a reset", protocol, got, err)
			}
		} else if string(got) != want || err != nil {
			t.Errorf("%s: %q, %v", protocol, got, err)
		}
	}
	// A network that failed is none of the policy's doing.
	g := &fakeGate{services: `{"services":[{"port":PORT,"protocol":"tls"}]}`, refusal: "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"}
	n, _ := testNames(t, g)
	ip, err := n.resolve("a.test", false)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := g.exchange(ip, ""); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%q, %v; want a reset", got, err)
	}
}

// An address is never another name's, however many names there are, and what is
// held for names is bounded.
func TestAddressesAreNotReused(t *testing.T) {
	g := &fakeGate{services: `{"services":[]}`}
	n, _ := testNames(t, g)
	seen := map[netip.Addr]string{}
	for i := range maxNames + 200 {
		name := fmt.Sprintf("n%d.test", i)
		ip, err := n.resolve(name, false)
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[ip]; ok {
			t.Fatalf("%s has the address of %s", name, other)
		}
		seen[ip] = name
	}
	if len(n.byName) != maxNames || len(n.byAddress) != maxNames || n.used.Len() != maxNames {
		t.Errorf("%d names, %d addresses are held", len(n.byName), len(n.byAddress))
	}
	n.mu.Lock()
	n.next = lastAddress
	n.mu.Unlock()
	if ip, err := n.resolve("last.test", false); err != nil || ip != lastAddress {
		t.Errorf("%v, %v", ip, err)
	}
	if ip, err := n.resolve("onemore.test", false); err == nil {
		t.Errorf("an address came from nowhere: %v", ip)
	}
	if _, err := n.resolve("last.test", false); err != nil {
		t.Errorf("a name that has its address: %v", err)
	}
}

// IPv6 addresses are few, and not given a second time either.
func TestAddresses6(t *testing.T) {
	g := &fakeGate{services: `{"services":[]}`}
	n, _ := testNames(t, g)
	if ip, err := n.resolve("early.test", true); ip.IsValid() || err != nil {
		t.Errorf("before there are any: %v, %v", ip, err)
	}
	n.left6 = []netip.Addr{firstAddress6, firstAddress6.Next()}
	for _, c := range []struct {
		name string
		want netip.Addr
	}{{"a.test", firstAddress6}, {"b.test", firstAddress6.Next()}, {"a.test", firstAddress6}, {"c.test", netip.Addr{}}} {
		if ip, err := n.resolve(c.name, true); ip != c.want || err != nil {
			t.Errorf("%s: %v, %v; want %v", c.name, ip, err, c.want)
		}
	}
	n.mu.Lock()
	n.forget(n.byName["a.test"].place)
	n.mu.Unlock()
	if ip, err := n.resolve("a.test", true); ip.IsValid() || err != nil {
		t.Errorf("an address again: %v, %v", ip, err)
	}
}

func TestListenersAreBounded(t *testing.T) {
	g := &fakeGate{services: tcpService}
	n, _ := testNames(t, g)
	first, err := n.resolve("first.test", false)
	if err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	n.listening += maxListeners - 1 // as if there were so many
	n.mu.Unlock()
	if _, err := n.resolve("second.test", false); err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	if n.listening != maxListeners || n.byName["first.test"] != nil {
		t.Errorf("%d listeners; the name used longest ago is still there: %v", n.listening, n.byName["first.test"])
	}
	n.listening -= maxListeners - 1
	n.mu.Unlock()
	if c, err := net.Dial("tcp", netip.AddrPortFrom(first, uint16(g.port)).String()); err == nil {
		c.Close()
		t.Error("a name that was forgotten is still listened for")
	}
}

// In a network namespace of its own a block of addresses becomes the guest's.
func TestLiteralAddresses(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: making a network namespace takes root")
	}
	g := &fakeGate{services: tcpService, port: 2222}
	services := []guest.Service{{Port: 2222, Protocol: "tcp"}}
	addresses := []guest.Address{{CIDR: "100.64.0.7/32", Services: services}, {CIDR: "10.1.0.0/16", Services: services},
		{CIDR: "2001:db8::7/128", Services: services}, {CIDR: "10.1.2.0/24", Services: []guest.Service{{Port: 2223, Protocol: "tcp"}}}}
	// The thread is not given back: its namespace is lost with it.
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		if err := linkUp(); err != nil {
			t.Error(err)
			return
		}
		for range 2 { // again is no error
			if err := ownAddresses(addresses); err != nil {
				t.Error(err)
				return
			}
		}
		n, _ := testNames(t, g)
		if err := n.start(addresses); err != nil { // nobody else has its port here
			t.Error(err)
			return
		}
		if err := n.complete(); err != nil {
			t.Error(err)
			return
		}
		ip, err := n.resolve("six.test", true)
		if err != nil || ip != firstAddress6 {
			t.Errorf("%v, %v", ip, err)
		}
		for at, want := range map[string]string{
			"100.64.0.7:2222": "100.64.0.7:2222", "10.1.2.3:2222": "10.1.2.3:2222", "10.1.2.3:2223": "10.1.2.3:2223",
			"[2001:db8::7]:2222": "[2001:db8::7]:2222", "[" + firstAddress6.String() + "]:2222": "six.test:2222",
			"10.1.3.3:2223": "reset", "127.0.0.1:2222": "reset", "10.2.0.1:2222": "unreachable",
		} {
			got := literalAnswer(at)
			for range 6000 { // Linux makes the route of an IPv6 address a little later
				if got != "unreachable" || got == want {
					break
				}
				time.Sleep(10 * time.Millisecond)
				got = literalAnswer(at)
			}
			if got != want {
				t.Errorf("%s: %s, want %s", at, got, want)
			}
		}
	}()
	<-done
}

// literalAnswer dials on the calling thread: net does so for addresses.
func literalAnswer(at string) string {
	c, err := net.DialTimeout("tcp", at, time.Minute)
	switch {
	case errors.Is(err, unix.ENETUNREACH):
		return "unreachable"
	case errors.Is(err, unix.ECONNRESET):
		return "reset"
	}
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	line, err := bufio.NewReader(c).ReadString('\n')
	if errors.Is(err, syscall.ECONNRESET) {
		return "reset"
	}
	if err != nil {
		return err.Error()
	}
	return strings.TrimSuffix(line, "\n")
}

func linkUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

func TestReadAnswer(t *testing.T) {
	for in, want := range map[string]string{
		"HTTP/1.1 200 OK\r\n\r\nrest":                          "200 0 rest",
		"HTTP/1.1 403 Forbidden\r\nContent-Length:  3\r\n\r\n": "403 3 ",
		"HTTP/1.1 20 OK\r\n\r\n":                               "the gate's answer is no HTTP",
		"SSH-2.0-x\r\n\r\n":                                    "the gate's answer is no HTTP",
		"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n":        "the gate's answer has no length",
		"HTTP/1.1 200 OK\r\n":                                  "unexpected EOF",
		"":                                                     "EOF",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxHead) + "\r\n\r\n": "the gate's answer has no end",
	} {
		for _, r := range []io.Reader{strings.NewReader(in), oneByte{strings.NewReader(in)}} {
			a, err := readAnswer(r)
			got := fmt.Sprintf("%d %d %s", a.status, a.length, a.rest)
			if err != nil {
				got = err.Error()
			}
			if _, slow := r.(oneByte); slow {
				got = strings.TrimSuffix(got, "rest")
				want = strings.TrimSuffix(want, "rest")
			}
			if got != want {
				t.Errorf("%.60q: %s, want %s", in, got, want)
			}
		}
	}
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:1]) }

func FuzzReadAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"))
	f.Fuzz(func(t *testing.T, in []byte) {
		a, err := readAnswer(bytes.NewReader(in))
		if err == nil && !bytes.HasPrefix(in, append(a.head, a.rest...)) {
			t.Errorf("%q became %q and %q", in, a.head, a.rest)
		}
	})
}

// There may be as many listeners as places for connections: one that waits takes
// none.
func TestListenersTakeNoPlace(t *testing.T) {
	g := &fakeGate{services: tcpService}
	n, _ := testNames(t, g)
	n.slots = make(chan struct{}, 1)
	for _, name := range []string{"first.test", "second.test", "third.test"} {
		ip, err := n.resolve(name, false)
		if err != nil {
			t.Fatal(err)
		}
		c := g.dial(t, ip)
		io.WriteString(c, "ping")
		c.CloseWrite()
		if got, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(got), "ping") {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
}
