package gate

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

// inUse is the memory of the process that holds something: heap and stacks.
func inUse() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64() + s[1].Value.Uint64()
}

// growth is by how much do makes it grow at most. Garbage counts, as it does for
// the machine that has to hold it.
func growth(do func()) uint64 {
	debug.FreeOSMemory()
	before, most := inUse(), uint64(0)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			most = max(most, inUse())
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	}()
	do()
	close(stop)
	<-done
	return most - min(most, before)
}

// unleaked notes what the process holds, and gives a check that it is no more,
// once hosts that are late have been let go as well.
func unleaked(t *testing.T, letGo func()) func() {
	t.Helper()
	fds := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return 0 // not Linux
		}
		return len(entries)
	}
	http.DefaultClient.CloseIdleConnections()
	goroutines, files := runtime.NumGoroutine(), fds()
	return func() {
		t.Helper()
		if eventually(func() bool {
			letGo()
			return runtime.NumGoroutine() <= goroutines+5 && fds() <= files+5
		}) {
			return
		}
		stacks := make([]byte, 1<<20)
		t.Errorf("%d goroutines, %d before; %d descriptors, %d before\n%.20000s", runtime.NumGoroutine(), goroutines, fds(), files,
			stacks[:runtime.Stack(stacks, true)])
	}
}

// abuse is a gate in front of hosts of every bad kind.
type abuse struct {
	*rig
	port map[string]int
	said *safeBuffer
	half sync.WaitGroup // of the clients that have not got half an answer

	mu  sync.Mutex
	let chan struct{}
}

// letGo ends the hosts that hold their connections.
func (a *abuse) letGo() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.let)
	a.let = make(chan struct{})
}

// hang is a resolver and a network where nobody answers.
type hang struct{}

func (hang) LookupNetIP(ctx context.Context, _, _ string) ([]netip.Addr, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func startAbuse(t *testing.T, short func(*limits)) *abuse {
	a := &abuse{port: map[string]int{}, said: &safeBuffer{}}
	a.let = make(chan struct{})
	hold := func(c *net.TCPConn) { // until the gate has lost its patience
		a.mu.Lock()
		let := a.let
		a.mu.Unlock()
		io.Copy(io.Discard, c)
		<-let
	}
	t.Cleanup(a.letGo)
	web := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		io.WriteString(w, "ok")
	}))
	rules := []plan.Rule{pin(allowHost("web.test", "http", web.port), "127.0.0.1"), allowHost("nowhere.test", "tls", 443),
		pin(allowHost("silent-net.test", "tls", 443), "93.184.216.34")}
	a.port["web.test"], a.port["nowhere.test"], a.port["silent-net.test"] = web.port, 443, 443
	for _, h := range []struct {
		name, protocol string
		serve          func(c *net.TCPConn)
	}{
		{"holds.test", "tcp", hold},
		{"silent.test", "tls", hold},
		{"resets.test", "tls", func(c *net.TCPConn) { c.Read(make([]byte, 1)); c.SetLinger(0) }},
		{"resets-body.test", "http", func(c *net.TCPConn) {
			c.Read(make([]byte, 1000))
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
			a.half.Wait() // a reset takes along what has not been read
			c.SetLinger(0)
		}},
		{"resets-chunks.test", "http", func(c *net.TCPConn) {
			c.Read(make([]byte, 1000))
			io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
			a.half.Wait()
			io.WriteString(c, "ff\r\nof it")
			time.Sleep(10 * time.Millisecond)
			c.SetLinger(0)
		}},
		{"silent-web.test", "http", hold},
	} {
		a.port[h.name] = serveTCP(t, h.serve)
		rules = append(rules, pin(allowHost(h.name, h.protocol, a.port[h.name]), "127.0.0.1"))
	}
	l := defaultLimits
	for _, d := range []*time.Duration{&l.head, &l.handshake, &l.stall, &l.halfOpen, &l.resolve, &l.dial, &l.answer} {
		*d = 10 * patience // so that the one below ends it
	}
	short(&l)
	a.rig = start(t, rules, nil, func(c *Config) {
		c.limits, c.Resolver, c.Log = &l, hang{}, a.said
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if strings.HasPrefix(address, "93.") {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return new(net.Dialer).DialContext(ctx, network, address)
		}
	})
	return a
}

func (a *abuse) at(host string) string { return hostPort(host, a.port[host]) }

func (a *abuse) open(c net.Conn, host string) {
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\n\r\n", a.at(host))
}

// drip sends s one byte at a time, for as long as somebody takes it.
func drip(c net.Conn, s string) {
	for i := range s {
		if _, err := io.WriteString(c, s[i:i+1]); err != nil {
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
}

// Whatever guests and hosts do, every connection ends, nothing is left of it, and
// the gate serves the next one. Each case names the limit that has to end it, if
// it takes one.
func TestAbuse(t *testing.T) {
	const each, short = 60, 300 * time.Millisecond
	hello := func(host string) string { return string(clientHello(t, &tls.Config{ServerName: host})) }
	silent, resets, nowhere, quietNet := hello("silent.test"), hello("resets.test"), hello("nowhere.test"), hello("silent-net.test")
	get := func(a *abuse, host string) string {
		return fmt.Sprintf("GET http://%s/ HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", a.at(host), a.at(host))
	}
	post := func(a *abuse) string {
		return fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: %s\r\nContent-Length: 100\r\n\r\n", a.at("web.test"), a.at("web.test"))
	}
	long := strings.Repeat("x-a: bcdefgh\r\n", 100)
	none := func(*limits) {}
	head, handshake := func(l *limits) { l.head = short }, func(l *limits) { l.handshake = short }
	stall, halfOpen := func(l *limits) { l.stall = short }, func(l *limits) { l.halfOpen = short }
	resolve, dial, answer := func(l *limits) { l.resolve = short }, func(l *limits) { l.dial = short }, func(l *limits) { l.answer = short }
	for _, c := range []struct {
		name  string
		do    func(a *abuse, c *net.UnixConn)
		limit func(*limits)
		want  string // in what the client gets, "" for anything
	}{
		{"half a head", func(a *abuse, c *net.UnixConn) { io.WriteString(c, "GET http://a/ HTTP/1.1\r\nHost") }, head, ""},
		{"a head byte by byte", func(a *abuse, c *net.UnixConn) { drip(c, "GET http://a/ HTTP/1.1\r\n"+long) }, head, ""},
		{"half a hello", func(a *abuse, c *net.UnixConn) { a.open(c, "silent.test"); io.WriteString(c, silent[:100]) }, handshake, "\x15\x03\x03"},
		{"a hello byte by byte", func(a *abuse, c *net.UnixConn) { a.open(c, "silent.test"); drip(c, silent) }, handshake, "\x15\x03\x03"},
		{"half a body", func(a *abuse, c *net.UnixConn) { io.WriteString(c, post(a)+"half") }, stall, ""},
		{"a body byte by byte, and no more", func(a *abuse, c *net.UnixConn) { io.WriteString(c, post(a)); drip(c, "half a body") }, stall, ""},
		{"half closed, and the host holds it", func(a *abuse, c *net.UnixConn) {
			a.open(c, "holds.test")
			time.Sleep(100 * time.Millisecond)
			c.CloseWrite()
		}, halfOpen, ""},
		{"gone at once", func(a *abuse, c *net.UnixConn) { a.open(c, "holds.test"); c.Close() }, halfOpen, ""},
		{"gone in a lookup", func(a *abuse, c *net.UnixConn) {
			a.open(c, "nowhere.test")
			time.Sleep(20 * time.Millisecond)
			c.Close()
		}, resolve, ""},
		{"the host resets in the handshake", func(a *abuse, c *net.UnixConn) { a.open(c, "resets.test"); io.WriteString(c, resets) }, none, " 200 "},
		{"the host says nothing in the handshake", func(a *abuse, c *net.UnixConn) { a.open(c, "silent.test"); io.WriteString(c, silent) }, stall, " 200 "},
		{"the host resets in a body", func(a *abuse, c *net.UnixConn) { io.WriteString(c, get(a, "resets-body.test")) }, none, "half"},
		{"the host resets in a chunk", func(a *abuse, c *net.UnixConn) { io.WriteString(c, get(a, "resets-chunks.test")) }, none, "half"},
		{"the host says nothing", func(a *abuse, c *net.UnixConn) { io.WriteString(c, get(a, "silent-web.test")) }, answer, "upstream_timeout"},
		{"the name server says nothing", func(a *abuse, c *net.UnixConn) { a.open(c, "nowhere.test"); io.WriteString(c, nowhere) }, resolve, "upstream_timeout"},
		{"the address says nothing", func(a *abuse, c *net.UnixConn) { a.open(c, "silent-net.test"); io.WriteString(c, quietNet) }, dial, "upstream_timeout"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := startAbuse(t, c.limit)
			whole := unleaked(t, a.letGo)
			var wg sync.WaitGroup
			a.half.Add(each)
			for range each {
				wg.Go(func() {
					half := sync.OnceFunc(a.half.Done)
					defer half()
					conn, err := net.Dial("unix", a.sock)
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					conn.SetDeadline(time.Now().Add(patience))
					var got []byte
					read := make(chan error, 1)
					go func() {
						for buf := make([]byte, 4<<10); ; {
							n, err := conn.Read(buf)
							if got = append(got, buf[:n]...); bytes.Contains(got, []byte("half")) {
								half()
							}
							if err != nil {
								read <- err
								return
							}
						}
					}()
					c.do(a, conn.(*net.UnixConn))
					if err := <-read; errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("the connection stays open; %q", got)
					}
					if !bytes.Contains(got, []byte(c.want)) {
						t.Errorf("got %q, want %q", got, c.want)
					}
				})
			}
			wg.Wait()
			a.settled()
			a.letGo()
			if resp, _ := a.get("http://" + a.at("web.test") + "/"); resp.StatusCode != 200 {
				t.Errorf("afterwards: %s", resp.Status)
			}
			a.gate.direct.CloseIdleConnections()
			whole()
			a.gate.Close()
			<-a.done
			a.done <- nil
			if strings.Contains(a.said.String(), "panic") {
				t.Errorf("%.2000s", a.said.String())
			}
			a.audit.Close()
			if r, err := audit.Verify(a.log, ""); err != nil || r.Break != nil {
				t.Errorf("%+v %v", r.Break, err)
			}
		})
	}
}

// A thousand clients that fill what they may, and leave it at that, cost a
// bounded amount of memory.
func TestThousandHeadsInMemory(t *testing.T) {
	const n, most = 1000, 400 << 20
	l := defaultLimits
	l.head, l.handshake = 10*patience, 10*patience
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	a := start(t, []plan.Rule{pin(allowHost("silent.test", "tls", port), "127.0.0.1")}, nil, func(c *Config) { c.limits = &l })
	hello := clientHello(t, &tls.Config{ServerName: "silent.test"})
	big := append(bytes.Clone(hello[:5]), 1, 0, 0x7f, 0xff) // a ClientHello of 32 KiB is to come
	big[3], big[4] = 0x40, 0
	big = append(big, bytes.Repeat([]byte{0}, 16<<10-10)...)
	for name, send := range map[string]string{
		"heads":  "GET http://a/ HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", maxHead-100),
		"hellos": fmt.Sprintf("CONNECT %s HTTP/1.1\r\n\r\n", hostPort("silent.test", port)) + string(big),
	} {
		used := growth(func() {
			var wg sync.WaitGroup
			conns := make([]net.Conn, n)
			for i := range conns {
				var err error
				if conns[i], err = net.Dial("unix", a.sock); err != nil {
					t.Fatal(err)
				}
				wg.Go(func() {
					conns[i].SetDeadline(time.Now().Add(2 * patience))
					if _, err := io.WriteString(conns[i], send); err != nil {
						t.Errorf("%s: %v", name, err)
					}
				})
			}
			wg.Wait()
			if !eventually(func() bool { return a.gate.Stats().Conns == n }) {
				t.Errorf("%s: %d connections", name, a.gate.Stats().Conns)
			}
			if !eventually(func() bool { return !slices.ContainsFunc(conns, unread) }) {
				t.Errorf("%s: the gate does not read all", name)
			}
			for _, c := range conns {
				c.Close()
			}
		})
		a.settled()
		t.Logf("%s: %d MiB more for %d connections", name, used>>20, n)
		if used > most {
			t.Errorf("%s: %d MiB more for %d connections", name, used>>20, n)
		}
	}
}

// unread tells if some of what was sent over c waits for its reader.
func unread(c net.Conn) bool {
	rc, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	_ = rc.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) })
	return n > 0
}

// A gigabyte is passed on, not gathered.
func TestGigabyte(t *testing.T) {
	const size, most = 1 << 30, 64 << 20
	chunk := make([]byte, 1<<20)
	pour := func(w io.Writer) {
		for range size / len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
	port := serveTCP(t, func(c *net.TCPConn) {
		b := make([]byte, 1)
		io.ReadFull(c, b)
		if b[0] == 'd' {
			pour(c)
			return
		}
		n, _ := io.Copy(io.Discard, c)
		fmt.Fprint(c, n)
	})
	web := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		pour(w)
	}))
	g := start(t, []plan.Rule{tcpRule("tcp.test", port), pin(allowHost("web.test", "http", web.port), "127.0.0.1")}, nil, nil)
	at := hostPort("web.test", web.port)
	for name, do := range map[string]func(c *net.UnixConn) int64{
		"tunnel down": func(c *net.UnixConn) int64 {
			fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\n\r\nd", hostPort("tcp.test", port))
			io.CopyN(io.Discard, c, int64(len(established)))
			n, _ := io.Copy(io.Discard, c)
			return n
		},
		"tunnel up": func(c *net.UnixConn) (n int64) {
			fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\n\r\nu", hostPort("tcp.test", port))
			io.CopyN(io.Discard, c, int64(len(established)))
			pour(c)
			c.CloseWrite()
			fmt.Fscan(c, &n)
			return n
		},
		"http down": func(c *net.UnixConn) int64 {
			fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", at, at)
			n, _ := io.Copy(io.Discard, c)
			return n - n%(1<<20) // its head
		},
	} {
		c, err := net.Dial("unix", g.sock)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * patience))
		var n int64
		used := growth(func() { n = do(c.(*net.UnixConn)) })
		c.Close()
		t.Logf("%s: %d MiB more", name, used>>20)
		if n != size || used > most {
			t.Errorf("%s: %d bytes came, with %d MiB more", name, n, used>>20)
		}
		g.await(name, func(e audit.Event) bool { return e.Event == audit.KindClose && e.BytesIn+e.BytesOut >= size })
	}
	g.settled()
}

// Bodies that wait to be looked through, whatever their size, cost hardly more
// than what they are allowed to hold.
func TestThousandBodiesInMemory(t *testing.T) {
	const n, most = 1000, 300 << 20
	g := start(t, []plan.Rule{pin(allowHost("web.test", "http", 80), "127.0.0.1")}, nil, nil)
	for _, size := range []int{keptInHeap - 1, 120 << 10, 250 << 10} {
		fill, room := bytes.Repeat([]byte("x"), size), min(n*int64(size), maxHeld)
		held := func() int64 { return g.gate.screen.held.Load() }
		var peak, last int64
		used := growth(func() {
			var wg, watch sync.WaitGroup
			// From the beginning: what is refused for want of room gives back what it had.
			// The count is raised before it is compared, so a peak may be above the limit.
			written := make(chan struct{})
			watch.Go(func() {
				for {
					peak = max(peak, held())
					select {
					case <-written:
						return
					case <-time.After(time.Millisecond):
					}
				}
			})
			conns := make([]net.Conn, n)
			for i := range conns {
				conns[i], _ = net.Dial("unix", g.sock)
				wg.Go(func() {
					conns[i].SetDeadline(time.Now().Add(2 * patience))
					fmt.Fprintf(conns[i], "POST http://web.test/ HTTP/1.1\r\nHost: web.test\r\nContent-Length: %d\r\n\r\n", size+1)
					_, _ = conns[i].Write(fill)
				})
			}
			wg.Wait()
			close(written)
			watch.Wait()
			eventually(func() bool { last = max(last, held()); return max(peak, last) >= room*9/10 })
			for same := 0; same < 10; same++ { // until it is no more
				if now := held(); now > last {
					last, same = now, 0
				}
				time.Sleep(20 * time.Millisecond)
			}
			for _, c := range conns {
				c.Close()
			}
		})
		eventually(func() bool { return held() == 0 })
		t.Logf("bodies of %d KiB: %d MiB more, with %d and at the end %d MiB of bodies", size>>10, used>>20, peak>>20, last>>20)
		if last > maxHeld || max(peak, last) < room*9/10 || used > most {
			t.Errorf("bodies of %d KiB: %d MiB more, with %d and at the end %d MiB of bodies", size>>10, used>>20, peak>>20, last>>20)
		}
		if left := held(); left != 0 {
			t.Errorf("%d bytes are held for nothing", left)
		}
	}
}
