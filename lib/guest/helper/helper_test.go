//go:build linux

package helper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fdpass"
	"github.com/bottle-tools/bottle/lib/guest"
)

// upstreams gives a dialFunc whose far ends go to take.
func upstreams(take func(net.Conn)) dialFunc {
	return func(context.Context, guest.Relay) (net.Conn, error) {
		a, b, err := fdpass.Stream()
		if err != nil {
			return nil, err
		}
		near, err := net.FileConn(a)
		a.Close()
		if err != nil {
			return nil, err
		}
		far, err := net.FileConn(b)
		b.Close()
		if err != nil {
			return nil, err
		}
		go take(far)
		return near, nil
	}
}

func serve(t *testing.T, dial dialFunc) (addr string, stderr *syncBuffer) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	stderr = &syncBuffer{}
	go newRelay(guest.Relay{Service: guest.ServiceEgress}, dial, stderr).serve(l)
	return l.Addr().String(), stderr
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}
func (s *syncBuffer) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.b.String() }

func dialTCP(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return c.(*net.TCPConn)
}

func TestRelayHalfClose(t *testing.T) {
	addr, _ := serve(t, upstreams(func(c net.Conn) {
		defer c.Close()
		all, _ := io.ReadAll(c) // ends only when the client's half does
		fmt.Fprintf(c, "%d bytes", len(all))
	}))
	for _, size := range []int{0, 1, bufSize, 3*bufSize + 1, bufSize + bulkSize, 5 << 20} {
		c := dialTCP(t, addr)
		if _, err := c.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		c.CloseWrite()
		got, err := io.ReadAll(c)
		if err != nil || string(got) != fmt.Sprintf("%d bytes", size) {
			t.Errorf("%d sent: %q, %v", size, got, err)
		}
	}
}

// Connections that move much have large buffers, which are few, and the others
// wait for none of them.
func TestRelayBulk(t *testing.T) {
	const size = 8 << 20
	release := make(chan struct{})
	addr, _ := serve(t, upstreams(func(c net.Conn) {
		defer c.Close()
		n, _ := io.Copy(io.Discard, io.LimitReader(c, 1))
		<-release
		c.Write(bytes.Repeat([]byte{byte(n)}, size))
	}))
	conns := make([]*net.TCPConn, maxBulk+20)
	for i := range conns {
		conns[i] = dialTCP(t, addr)
		conns[i].Write([]byte("x"))
	}
	close(release)
	time.Sleep(100 * time.Millisecond) // none reads, and buffers stay full
	for i, c := range conns {
		if n, err := io.Copy(io.Discard, c); n != size || err != nil {
			t.Fatalf("connection %d: %d bytes, %v", i, n, err)
		}
	}
	if len(bulkSlots) != 0 {
		t.Errorf("%d large buffers are not given back", len(bulkSlots))
	}
}

// The upstream ends first; the client may go on sending.
func TestRelayUpstreamEndsFirst(t *testing.T) {
	got := make(chan string, 1)
	addr, _ := serve(t, upstreams(func(c net.Conn) {
		io.WriteString(c, "bye")
		c.(*net.UnixConn).CloseWrite()
		all, _ := io.ReadAll(c)
		got <- string(all)
		c.Close()
	}))
	c := dialTCP(t, addr)
	if b, err := io.ReadAll(c); err != nil || string(b) != "bye" {
		t.Fatalf("%q, %v", b, err)
	}
	io.WriteString(c, "late")
	c.CloseWrite()
	select {
	case s := <-got:
		if s != "late" {
			t.Errorf("got %q", s)
		}
	case <-time.After(time.Minute):
		t.Error("what the client sent after the upstream's end is lost")
	}
}

func TestRelayNoHost(t *testing.T) {
	addr, stderr := serve(t, func(context.Context, guest.Relay) (net.Conn, error) { return nil, errors.New("host gone") })
	c := dialTCP(t, addr)
	if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
		t.Errorf("%q, %v; want the end of the stream", b, err)
	}
	if !strings.Contains(stderr.String(), "host gone") {
		t.Errorf("stderr: %q", stderr.String())
	}
}

// A gate that was replaced leaves spare connections that are dead.
func TestRelayDropsDeadSpares(t *testing.T) {
	var mu sync.Mutex
	var fars []net.Conn
	addr, _ := serve(t, upstreams(func(c net.Conn) {
		mu.Lock()
		fars = append(fars, c)
		mu.Unlock()
		b := make([]byte, 5)
		if _, err := io.ReadFull(c, b); err == nil {
			c.Write(b)
		}
	}))
	echo := func() {
		t.Helper()
		c := dialTCP(t, addr)
		io.WriteString(c, "hello")
		b := make([]byte, 5)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
			t.Fatalf("%q, %v", b, err)
		}
	}
	echo()
	deadline := time.Now().Add(time.Minute)
	for { // the spares are there
		mu.Lock()
		n := len(fars)
		mu.Unlock()
		if n == 1+spares {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d connections, want %d", n, 1+spares)
		}
		time.Sleep(time.Millisecond)
	}
	mu.Lock()
	for _, c := range fars {
		c.Close()
	}
	mu.Unlock()
	for range 2 * spares {
		echo()
	}
}

func TestManyIdleConnections(t *testing.T) {
	addr, _ := serve(t, upstreams(func(c net.Conn) { defer c.Close(); io.Copy(c, c) }))
	conns := make([]*net.TCPConn, 300)
	for i := range conns {
		conns[i] = dialTCP(t, addr)
	}
	for i, c := range conns {
		msg := fmt.Sprintf("%08d", i)
		io.WriteString(c, msg)
		b := make([]byte, 8)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != msg {
			t.Fatalf("%d: %q, %v", i, b, err)
		}
	}
}

func TestSetupEtcAndTrust(t *testing.T) {
	root := t.TempDir()
	at := func(p string) string { return filepath.Join(root, p) }
	write := func(p, s string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(at(p)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at(p), []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("etc/passwd", "root:x:0:0:r:/root:/bin/ash\nnode:x:1000:1000::/home/node:/bin/sh\nagent:x:5:5::/:/bin/false")
	write("etc/pki/tls/certs/ca-bundle.crt", "RPM ROOTS") // no newline at its end
	if err := os.Symlink("../run/resolv.conf", at("etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(at("etc/ssl"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../pki/tls/certs/ca-bundle.crt", at("etc/ssl/cert.pem")); err != nil {
		t.Fatal(err)
	}
	write("opt/bottle/ca-bundle.pem", "WHOLE BUNDLE\n")
	write("opt/bottle/cacerts", "JAVA")
	write("usr/lib/jvm/java-21/lib/security/cacerts", "OLD")
	write("etc/pki/ca-trust/extracted/java/cacerts", "OLD")
	if err := errors.Join(os.MkdirAll(at("opt/java/openjdk/lib/security"), 0o755),
		os.Symlink("gone", at("opt/java/openjdk/lib/security/cacerts")),
		os.MkdirAll(at("etc/pki/java"), 0o755), os.Symlink("../ca-trust/extracted/java/cacerts", at("etc/pki/java/cacerts"))); err != nil {
		t.Fatal(err)
	}
	cfg := &guest.Config{Hostname: "h", User: guest.User{Name: "agent", UID: 1000, GID: 1000, Home: "/home/agent"},
		CACert: "OWN\n", CABundle: "/opt/bottle/ca-bundle.pem", Truststore: "/opt/bottle/cacerts"}
	for range 2 { // again is no change
		if err := setupEtc(at, cfg); err != nil {
			t.Fatal(err)
		}
		if err := setupTrust(at, cfg); err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{
			"etc/passwd":                        "agent:x:1000:1000::/home/agent:/bin/sh\nroot:x:0:0:r:/root:/bin/ash\nnode:x:1000:1000::/home/node:/bin/sh\n",
			"etc/group":                         "agent:x:1000:\nroot:x:0:\n",
			"etc/hosts":                         Hosts("h"),
			"etc/resolv.conf":                   Resolv,
			"etc/nsswitch.conf":                 NSSwitch,
			"etc/ssl/certs/bottle-ca.pem":       "OWN\n",
			"etc/pki/tls/certs/ca-bundle.crt":   "RPM ROOTS\nOWN\n",
			"etc/ssl/cert.pem":                  "RPM ROOTS\nOWN\n",
			"etc/ssl/certs/ca-certificates.crt": "WHOLE BUNDLE\n",
			"etc/pki/java/cacerts":              "JAVA",

			"usr/lib/jvm/java-21/lib/security/cacerts": "JAVA",
		} {
			if b, err := os.ReadFile(at(name)); err != nil || string(b) != want {
				if name == "etc/ssl/certs/ca-certificates.crt" && string(b) == want+"OWN\n" {
					continue // the second time it is a bundle of the image like any other
				}
				t.Errorf("%s: %q, %v; want %q", name, b, err, want)
			}
		}
	}
}

func TestSetupHome(t *testing.T) {
	root := t.TempDir()
	at := func(p string) string { return filepath.Join(root, p) }
	me := guest.User{Name: "agent", UID: os.Geteuid(), GID: os.Getegid(), Home: "/home/agent"}
	cfg := &guest.Config{User: me, Files: []guest.File{
		{Path: ".a/b/c.json", Content: "{}"}, {Path: "own", Content: "new"}, {Path: "../../escape", Content: "x"}}}
	if err := os.MkdirAll(at("home/agent"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("home/agent/own"), []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := setupHome(at, cfg); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{".a/b/c.json": "{}", "own": "old", "escape": "x"} {
		if b, err := os.ReadFile(at("home/agent/" + name)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if _, err := os.Stat(at("escape")); err == nil {
		t.Error("a file left the home")
	}
}

// keeperAt plays the keeper on a socket, and gives what it is told.
func keeperAt(t *testing.T, path string) <-chan guest.Report {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	told := make(chan guest.Report, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, guest.Greeting)
			if r, ok := guest.ReadReport(c); ok {
				told <- r
			}
			c.Close()
		}
	}()
	return told
}

// The keeper hears that the guest is ready, with its folders, or why it is not.
func TestReport(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "gate.sock")
	told := keeperAt(t, socket)
	cfg := &guest.Config{Relays: []guest.Relay{{Service: guest.ServiceEgress, Socket: socket}}, Folders: []string{dir, "/"}}
	var stderr bytes.Buffer
	want, err := guest.Inodes(cfg.Folders)
	ready, failed := reporter(cfg, want, &stderr)
	if err := ready(); err != nil {
		t.Fatal(err)
	}
	if r := <-told; err != nil || r.Failed != "" || !slices.Equal(r.Inodes, want) || len(want) != 2 {
		t.Errorf("%+v, %v, want %v", r, err, want)
	}
	if err := failed(errors.New("no \x1b[31m/etc")); err != nil {
		t.Error(err)
	}
	if r := <-told; !strings.Contains(r.Failed, "/etc") || strings.Contains(r.Failed, "\x1b") || r.Inodes != nil {
		t.Errorf("%+v", r)
	}
	// A config without a way out is what failed.
	_, failed = reporter(&guest.Config{}, want, &stderr)
	if err := failed(errors.New("x")); err != nil {
		t.Error(err)
	}
}

// The copy of the helper is root's alone, and takes the place of another whole.
func TestCopySelf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "guest")
	for range 2 {
		if err := CopySelf(path); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	fi, serr := os.Stat(path)
	if err != nil || serr != nil || !bytes.Equal(got, self) || fi.Mode() != 0o700 {
		t.Errorf("%v, %v, %v", err, serr, fi.Mode())
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	if err := CopySelf("/proc/none/guest"); err == nil {
		t.Error("a copy where there can be none")
	}
}
