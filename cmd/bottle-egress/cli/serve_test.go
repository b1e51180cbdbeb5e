package cli

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/fdpass"
	"github.com/bottle-tools/bottle/lib/gateproc"
	"github.com/bottle-tools/bottle/lib/pipelock/pipelocktest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/trust"
	"github.com/tidwall/gjson"
)

// TestMain lets this binary be bottle-egress, for the keeper's tests.
func TestMain(m *testing.M) {
	if os.Getenv("BE_BOTTLE_EGRESS") != "" {
		os.Unsetenv("BE_BOTTLE_EGRESS")
		tool.Main("bottle-egress", Run)
	}
	os.Exit(m.Run())
}

// served is a gate in the foreground.
type served struct {
	addr   string // as the ready line tells it
	stdout *lockedBuffer
	stderr *lockedBuffer
	cancel context.CancelFunc
	done   chan int
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func begin(t *testing.T, doc string, env map[string]string, args ...string) *served {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	s := &served{stdout: new(lockedBuffer), stderr: new(lockedBuffer), cancel: cancel, done: make(chan int, 1)}
	p := &tool.Proc{
		Name: "bottle-egress", Args: append([]string{"serve"}, args...), Stdin: strings.NewReader(doc),
		Stdout: s.stdout, Stderr: s.stderr, Getenv: func(k string) string { return env[k] }, Now: time.Now,
	}
	go func() { s.done <- Run(ctx, p) }()
	for range 6000 {
		if _, rest, ok := strings.Cut(s.stderr.String(), " is served on "); ok && strings.Contains(rest, "\n") {
			s.addr, _, _ = strings.Cut(rest, " (proxy ")
			return s
		}
		select {
		case status := <-s.done:
			s.done <- status
			t.Fatalf("ended with %d: %s", status, s.stderr)
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Fatalf("never ready: %s", s.stderr)
	return nil
}

// granted is an environment in which the user has trusted what b wants.
func granted(t *testing.T, b *plan.Bottle, dir string, env map[string]string) map[string]string {
	t.Helper()
	env["XDG_STATE_HOME"] = t.TempDir()
	root, err := state.Open(func(k string) string { return env[k] })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := trust.Add(root, trust.Place{Base: dir}, b); err != nil {
		t.Fatal(err)
	}
	return env
}

func (s *served) wait(t *testing.T) int {
	t.Helper()
	select {
	case status := <-s.done:
		return status
	case <-time.After(time.Minute):
		t.Fatalf("does not end: %s", s.stderr)
		return -1
	}
}

func (s *served) end(t *testing.T) {
	t.Helper()
	s.cancel()
	if status := s.wait(t); status != 0 {
		t.Errorf("ended with %d: %s", status, s.stderr)
	}
}

func dialer(addr string) func(context.Context, string, string) (net.Conn, error) {
	network, rest, _ := strings.Cut(addr, ":")
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, rest)
	}
}

// through is a client whose proxy is the gate.
func through(dial func(context.Context, string, string) (net.Conn, error), roots ...[]byte) *http.Client {
	pool := x509.NewCertPool()
	for _, r := range roots {
		pool.AppendCertsFromPEM(r)
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:             func(*http.Request) (*url.URL, error) { return &url.URL{Scheme: "http", Host: "gate"}, nil },
			DialContext:       dial,
			TLSClientConfig:   &tls.Config{RootCAs: pool},
			DisableKeepAlives: true,
			OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, res *http.Response) error {
				if res.StatusCode != http.StatusOK {
					body, _ := io.ReadAll(res.Body)
					return fmt.Errorf("%d %s", res.StatusCode, body)
				}
				return nil
			},
		},
		Timeout: 10 * time.Second,
	}
}

// hello answers with the length of the key it was given.
func hello(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "hello, %d", len(r.Header.Get("X-Api-Key")))
}

// upstream is example.com, on this host.
func upstream(t *testing.T) (port int, root []byte) {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(hello))
	t.Cleanup(s.Close)
	port, err := strconv.Atoi(s.Listener.Addr().String()[len("127.0.0.1:"):])
	if err != nil {
		t.Fatal(err)
	}
	return port, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// folder is a manifest's folder with the upstream's root in it.
func folder(t *testing.T, b *plan.Bottle, root []byte) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, content []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("bottle.json", nil)
	write("ca.pem", root)
	b.Egress.Roots = []plan.Root{{Path: "ca.pem", SHA256: plan.SHA256(root)}}
	return dir
}

func get(c *http.Client, url string) (string, error) {
	res, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}

func TestServe(t *testing.T) {
	port, root := upstream(t)
	b := bottle(pinned(allow("example.com", port, "tls"), "127.0.0.1"))
	dir := folder(t, b, root)
	b.Egress.Roots = nil
	for _, listen := range []string{"tcp:127.0.0.1:0", "unix:" + filepath.Join(dir, "s")} {
		s := begin(t, document(t, b), nil, "--listen", listen)
		if path, ok := strings.CutPrefix(listen, "unix:"); ok {
			if fi, err := os.Stat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
				t.Errorf("the socket: %v %v", fi.Mode(), err)
			}
			status, _, errs := run(document(t, b), "serve", "--listen", listen)
			if status != fault.CantCreate || !strings.Contains(errs, "is in use") {
				t.Errorf("a second gate on the socket: %d %s", status, errs)
			}
		}
		c := through(dialer(s.addr), root)
		if body, err := get(c, fmt.Sprintf("https://example.com:%d/", port)); err != nil || body != "hello, 0" {
			t.Errorf("%s: %q %v", listen, body, err)
		}
		if _, err := get(c, "https://other.example/"); err == nil || !strings.Contains(err.Error(), `403 {"error":{"code":"not_in_allowlist","host":"other.example"`) {
			t.Errorf("%s: %v", listen, err)
		}
		s.end(t)
		var events []string
		for line := range strings.Lines(s.stdout.String()) {
			r := gjson.Parse(line)
			if r.Get("bottle").String() != "claude" {
				t.Errorf("%s", line)
			}
			events = append(events, r.Get("event").String()+" "+r.Get("verdict").String())
		}
		if got := strings.Join(events, ","); got != "start ,connect allow,close ,connect deny,stop " && got != "start ,connect allow,connect deny,close ,stop " {
			t.Errorf("%s: audit log %q", listen, got)
		}
		if path, ok := strings.CutPrefix(listen, "unix:"); ok {
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket is left: %v", err)
			}
		}
	}
}

func TestServeInjects(t *testing.T) {
	const value = "sk-real-0123456789"
	port, root := upstream(t)
	rule := pinned(allow("example.com", port, "tls"), "127.0.0.1")
	b := bottle(rule)
	b.Secrets = []plan.Secret{{Name: "KEY", From: "env:KEY", GuestCanRead: "never", Inject: []plan.Injection{{Host: "example.com", Header: "x-api-key"}}}}
	dir := folder(t, b, root)
	cert, log := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "audit.log")
	doc := document(t, b)
	target := fmt.Sprintf("https://example.com:%d/", port)

	env := granted(t, b, dir, map[string]string{"KEY": value})
	s := begin(t, doc, env, "--listen", "tcp:127.0.0.1:0", "--dir", dir, "--ca-cert", cert, "--audit", log)
	trusted, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := get(through(dialer(s.addr), trusted), target); err != nil || body != fmt.Sprintf("hello, %d", len(value)) {
		t.Errorf("%q %v", body, err)
	}
	s.end(t)
	lines, err := os.ReadFile(log)
	if err != nil || !strings.Contains(string(lines), `"secret":"KEY"`) || s.stdout.String() != "" {
		t.Errorf("%v %s\n%s", err, lines, s.stdout)
	}
	if all := s.stderr.String() + string(lines) + doc; strings.Contains(all, value) {
		t.Error("the secret was written down")
	}

	delete(env, "KEY")
	s = begin(t, doc, env, "--listen", "tcp:127.0.0.1:0", "--dir", dir, "--ca-cert", cert)
	if !strings.Contains(s.stderr.String(), "warning: secret KEY is missing (the variable KEY is not set)") {
		t.Errorf("no warning: %s", s.stderr)
	}
	trusted, _ = os.ReadFile(cert)
	if body, err := get(through(dialer(s.addr), trusted), target); err != nil || !strings.Contains(body, "secret_missing") {
		if err == nil || !strings.Contains(err.Error(), "secret_missing") {
			t.Errorf("%q %v", body, err)
		}
	}
	s.end(t)
}

func TestServeRefuses(t *testing.T) {
	port, root := upstream(t)
	rule := pinned(allow("example.com", port, "tls"), "127.0.0.1")
	with := func(edit func(*plan.Bottle)) (string, string) {
		b := bottle(rule)
		dir := folder(t, b, root)
		edit(b)
		return document(t, b), dir
	}
	file := filepath.Join(t.TempDir(), "file")
	os.WriteFile(file, nil, 0o600)
	for name, c := range map[string]struct {
		edit   func(*plan.Bottle)
		doc    func(string) string
		args   []string
		status int
		text   string
	}{
		"no manifest there": {func(b *plan.Bottle) { b.Manifest.Name = "other.json" }, nil, nil, fault.NoInput, "the manifest of this plan: "},
		"another manifest":  {func(b *plan.Bottle) { b.Manifest.SHA256 = plan.SHA256([]byte("x")) }, nil, nil, fault.Data, "is not the manifest that was planned"},
		"root is missing":   {func(b *plan.Bottle) { b.Egress.Roots[0].Path = "nope.pem" }, nil, nil, fault.NoInput, "trust root"},
		"root was changed":  {func(b *plan.Bottle) { b.Egress.Roots[0].SHA256 = plan.SHA256(nil) }, nil, nil, fault.Data, "is not the file that was planned"},
		"root is no PEM": {func(b *plan.Bottle) {
			b.Egress.Roots[0] = plan.Root{Path: "bottle.json", SHA256: plan.SHA256(nil)}
		}, nil, nil, fault.Data, "holds no certificate"},
		"command not trusted": {func(b *plan.Bottle) {
			b.Secrets = []plan.Secret{{Name: "K", From: "command", Command: []string{"touch", file + ".ran"}, GuestCanRead: "never"}}
		}, nil, nil, fault.NoPerm, "you have not trusted it"},
		"variable not trusted": {func(b *plan.Bottle) {
			b.Secrets = []plan.Secret{{Name: "K", From: "env:HOME", GuestCanRead: "never", Inject: []plan.Injection{{Host: "example.com", Header: "x-key"}}}}
		}, nil, nil, fault.NoPerm, "secret K sends your $HOME to example.com"},
		"addons": {func(b *plan.Bottle) {
			b.Egress.Mitmdump = &plan.Mitmdump{Addons: []plan.Addon{{Path: "a.py", SHA256: plan.SHA256(nil)}}}
		}, nil, nil, fault.Unavailable, "has addons of mitmdump, and this gate would run without them"},
		"no --ca-cert": {func(b *plan.Bottle) { b.Egress.Rules[0].Inspect = true }, nil, nil, fault.Usage, "--ca-cert FILE"},
		"edited egress": {func(*plan.Bottle) {}, func(d string) string {
			_, out, _ := run(d)
			return strings.Replace(out, `"residual":[`, `"residual":["nothing",`, 1)
		}, nil, fault.Data, "egress: the egress section is not what follows from bottle"},
		"no pipelock":      {func(b *plan.Bottle) { b.Egress.Proxy = "pipelock"; b.Egress.Rules[0].Addresses = nil }, nil, nil, fault.Unavailable, "pipelock is not on PATH"},
		"socket is a file": {func(*plan.Bottle) {}, nil, []string{"--listen", "unix:" + file}, fault.CantCreate, "exists and is no socket"},
		"no such folder":   {func(*plan.Bottle) {}, nil, []string{"--listen", "unix:/nonexistent/s"}, fault.CantCreate, "no such file"},
		"audit folder":     {func(*plan.Bottle) {}, nil, []string{"--listen", "tcp:127.0.0.1:0", "--audit", "/nonexistent/log"}, fault.CantCreate, "audit log"},
		"port taken":       {func(*plan.Bottle) {}, nil, []string{"--listen", "tcp:127.0.0.1:" + strconv.Itoa(port)}, fault.CantCreate, "address already in use"},
	} {
		t.Run(name, func(t *testing.T) {
			doc, dir := with(c.edit)
			if c.doc != nil {
				doc = c.doc(doc)
			}
			if c.args == nil {
				c.args = []string{"--listen", "tcp:127.0.0.1:0"}
			}
			var errs bytes.Buffer
			p := &tool.Proc{Name: "bottle-egress", Args: append([]string{"serve", "--dir", dir}, c.args...), Stdin: strings.NewReader(doc),
				Stdout: io.Discard, Stderr: &errs, Now: time.Now,
				Getenv: func(k string) string { return map[string]string{"HOME": dir, "PATH": "/nonexistent"}[k] }}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if status := Run(ctx, p); status != c.status || !strings.Contains(errs.String(), c.text) {
				t.Errorf("%d %s", status, &errs)
			}
		})
	}
	if _, err := os.Stat(file + ".ran"); err == nil {
		t.Error("an untrusted command was run")
	}
}

func TestServeWithoutSidecar(t *testing.T) {
	b := bottle(allow("example.com", 443, "tls"))
	if err := withoutSidecar(b); err != nil {
		t.Error(err)
	}
	b.Egress.Mitmdump = &plan.Mitmdump{}
	if err := withoutSidecar(b); err == nil || fault.As(err).Code != "no_sidecar_here" {
		t.Errorf("%v", err)
	}
}

// A socket that a killed gate left is replaced.
func TestServeStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	syscall.Close(fd)
	s := begin(t, document(t, bottle()), nil, "--listen", "unix:"+path)
	if _, err := get(through(dialer(s.addr)), "https://a.example/"); err == nil || !strings.Contains(err.Error(), "not_in_allowlist") {
		t.Errorf("%v", err)
	}
	s.end(t)
}

// With a real pipelock behind it.
func TestServePipelock(t *testing.T) {
	program := pipelocktest.Path(t)
	t.Setenv("TMPDIR", t.TempDir())
	port, root := upstream(t)
	b := bottle(pinned(allow("example.com", port, "tls"), "127.0.0.1"), allow("p.example", 80, "http"))
	b.Egress.Proxy = "pipelock"
	s := begin(t, document(t, b), map[string]string{"BOTTLE_PIPELOCK": program}, "--listen", "tcp:127.0.0.1:0")
	if !strings.Contains(s.stderr.String(), "(proxy pipelock: the manifest asks for pipelock)") {
		t.Errorf("%s", s.stderr)
	}
	c := through(dialer(s.addr), root)
	if body, err := get(c, fmt.Sprintf("https://example.com:%d/", port)); err != nil || body != "hello, 0" {
		t.Errorf("a pinned host leaves from the gate: %q %v", body, err)
	}
	// pipelock sees this before it looks the name up.
	if body, err := get(c, "http://p.example/?q=AKIAIOSFODNN7EXAMPLQ"); err != nil || !strings.Contains(body, `"code":"proxy_refused","host":"p.example"`) {
		t.Errorf("a secret in a URL: %q %v", body, err)
	}
	dirs, err := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "bottle-egress-*"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("%v %v", dirs, err)
	}
	// It dies: the gate ends with it, since its port may be another's by now.
	pid := pipelockPID(t, dirs[0])
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if status := s.wait(t); status != fault.Unavailable || !strings.Contains(s.stderr.String(), "pipelock ended (signal: killed)") {
		t.Errorf("%d %s", status, s.stderr)
	}
	if left, _ := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "bottle-*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	// Asked to end, both end.
	s = begin(t, document(t, b), map[string]string{"BOTTLE_PIPELOCK": program}, "--listen", "tcp:127.0.0.1:0")
	s.end(t)
	if left, _ := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "bottle-*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// The whole chain: client, gate, the real pipelock, upstream.
func TestServeThroughPipelock(t *testing.T) {
	const value = "sk-real-0123456789"
	program := pipelocktest.Path(t)
	if !pipelocktest.OwnNetwork(t, "127.0.0.1 localhost\n"+pipelocktest.PublicAddr+" example.com keys.example.com w.example plain.example\n10.1.2.3 inner.example\n") {
		return
	}
	_, root := upstream(t)
	b := bottle(allow("*.example.com", 443, "tls"), allow("example.com", 443, "tls"), allow("*.w.example", 443, "tls"),
		allow("inner.example", 443, "tls"), allow("plain.example", 80, "http"))
	b.Egress.Proxy = "auto"
	b.Secrets = []plan.Secret{{Name: "KEY", From: "env:KEY", GuestCanRead: "never", Inject: []plan.Injection{{Host: "keys.example.com", Header: "x-api-key"}}}}
	dir := folder(t, b, root)
	cert := filepath.Join(dir, "cert.pem")
	env := granted(t, b, dir, map[string]string{"BOTTLE_PIPELOCK": program, "KEY": value})
	s := begin(t, document(t, b), env, "--listen", "tcp:127.0.0.1:0", "--dir", dir, "--ca-cert", cert)
	own, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	pipelocktest.Serve(t, 443, true, http.HandlerFunc(hello))
	pipelocktest.Serve(t, 80, false, http.HandlerFunc(hello))
	c := through(dialer(s.addr), root, own)
	for url, want := range map[string]string{
		"https://example.com/":      "hello, 0",
		"https://keys.example.com/": fmt.Sprintf("hello, %d", len(value)),
		"http://plain.example/":     "hello, 0",
		"https://w.example/":        "not_in_allowlist",
		"https://inner.example/":    "proxy_refused",
		"https://example.com:444/":  "port_not_allowed",
	} {
		body, err := get(c, url)
		if err != nil {
			body = err.Error()
		}
		if !strings.Contains(body, want) {
			t.Errorf("%s: %q, want %s", url, body, want)
		}
	}
	s.end(t)
}

// pipelockPID finds the pipelock that runs in dir.
func pipelockPID(t *testing.T, dir string) int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if line, err := os.ReadFile(f); err == nil && bytes.Contains(line, []byte(dir)) {
			pid, _ := strconv.Atoi(strings.Split(f, "/")[2])
			return pid
		}
	}
	t.Fatal("no pipelock")
	return 0
}

// keeperExe is bottle-egress as the keeper finds it: a program that needs no
// environment.
func keeperExe(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "bottle-egress")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nBE_BOTTLE_EGRESS=1 exec '"+self+"' \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestServeKeeper(t *testing.T) {
	const value = "sk-real-0123456789"
	port, root := upstream(t)
	b := bottle(pinned(allow("example.com", port, "tls"), "127.0.0.1"))
	b.Secrets = []plan.Secret{{Name: "KEY", From: "env:KEY", GuestCanRead: "never", Inject: []plan.Injection{{Host: "example.com", Header: "x-api-key"}}}}
	dir := folder(t, b, root)
	authority, err := ca.New("claude-01234567", []string{"example.com"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	marshalled, err := authority.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "gate.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cfg := gateproc.Config{ID: "claude-01234567", Bottle: b, Base: dir, Secrets: map[string]string{"KEY": value}, CA: marshalled,
		Audit: filepath.Join(dir, "audit.log")}
	exe := keeperExe(t)

	// Twice on one log, as after the death of a gate.
	for range 2 {
		g, err := gateproc.Start(exe, cfg, log)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if err := g.AwaitReady(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		c := through(handOver(g.Conns), authority.CertPEM())
		if body, err := get(c, fmt.Sprintf("https://example.com:%d/", port)); err != nil || body != fmt.Sprintf("hello, %d", len(value)) {
			t.Errorf("%q %v", body, err)
		}
		if _, err := get(c, "https://other.example/"); err == nil || !strings.Contains(err.Error(), "not_in_allowlist") {
			t.Errorf("%v", err)
		}
		if err := g.Stop(5 * time.Second); err != nil {
			t.Error(err)
		}
		if g.Exited() != "exit status 0" {
			t.Error(g.Exited())
		}
	}
	f, err := os.Open(cfg.Audit)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	seq := int64(0)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		r := gjson.ParseBytes(lines.Bytes())
		if seq++; r.Get("seq").Int() != seq || r.Get("bottle").String() != cfg.ID || strings.Contains(r.Raw, value) {
			t.Errorf("line %d: %s", seq, r.Raw)
		}
	}
	if seq < 10 {
		t.Errorf("only %d lines", seq)
	}
}

// handOver makes a connection and sends its other end to the gate.
func handOver(conns *fdpass.Conn) func(context.Context, string, string) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) {
		ours, theirs, err := fdpass.Stream()
		if err != nil {
			return nil, err
		}
		defer ours.Close()
		defer theirs.Close()
		if err := conns.Send([]byte("c"), theirs); err != nil {
			return nil, err
		}
		return net.FileConn(ours)
	}
}

func TestServeKeeperFailures(t *testing.T) {
	dir := t.TempDir()
	log, err := os.Create(filepath.Join(dir, "gate.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	exe := keeperExe(t)
	good := gateproc.Config{ID: "x-01234567", Bottle: bottle(), Base: dir, Audit: filepath.Join(dir, "audit.log")}
	for name, c := range map[string]struct {
		edit func(*gateproc.Config)
		code string
	}{
		"no bottle":  {func(c *gateproc.Config) { c.Bottle = nil }, "bad_config"},
		"bad bottle": {func(c *gateproc.Config) { b := *c.Bottle; b.User = "x"; c.Bottle = &b }, "bad_bottle"},
		"bad rule":   {func(c *gateproc.Config) { c.Bottle = bottle(allow("*", 443, "tls")) }, "too_broad"},
		"no root": {func(c *gateproc.Config) {
			c.Bottle = bottle()
			c.Bottle.Egress.Roots = []plan.Root{{Path: "x", SHA256: plan.SHA256(nil)}}
		}, "no_root"},
		"no audit log": {func(c *gateproc.Config) { c.Audit = "/nonexistent/log" }, "audit_log_failed"},
		"bad CA":       {func(c *gateproc.Config) { c.CA = []byte("x") }, ""},
		"no CA": {func(c *gateproc.Config) {
			c.Bottle = bottle(allow("a.example", 443, "tls"))
			c.Bottle.Egress.Rules[0].Inspect = true
		}, "gate_without_ca"},
	} {
		cfg := good
		c.edit(&cfg)
		g, err := gateproc.Start(exe, cfg, log)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		err = g.AwaitReady(ctx)
		cancel()
		if f := fault.As(err); err == nil || c.code != "" && f.Code != c.code {
			t.Errorf("%s: %+v", name, err)
		}
		<-g.Done()
		if s := g.Exited(); s == "exit status 0" || strings.Contains(s, "signal") {
			t.Errorf("%s: %s", name, s)
		}
		g.Conns.Close()
	}
	// By hand.
	status, out, errs := run("{}\n", "serve", "--keeper")
	if status != fault.Data || gjson.Get(out, "error.code").String() != "bad_config" || !strings.Contains(errs, "--keeper is for bottle-vm") {
		t.Errorf("%d %s %s", status, out, errs)
	}
}
