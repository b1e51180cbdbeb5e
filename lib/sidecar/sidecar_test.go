package sidecar

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/sidecar/sidecartest"
)

// options are those of a sidecar for keys.test, in front of back.
func options(t testing.TB, program, back string, backCA []byte, code string) Options {
	t.Helper()
	a, err := ca.New("t", []string{"keys.test"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return Options{Program: program, Dir: t.TempDir(), Addons: []Addon{{"addon.py", []byte(code)}}, Back: back,
		Auth: NewAuth(), BackAuth: NewAuth(), Authority: authority, BackCA: backCA, Host: "keys.test"}
}

// startBack is the gate's other side: it takes CONNECT and answers below TLS
// what it was asked.
func startBack(t testing.TB) (addr string, cert []byte, seen func() []string) {
	t.Helper()
	a, err := ca.New("back", []string{"keys.test"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var mu sync.Mutex
	var lines []string
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r, err := http.ReadRequest(bufio.NewReader(c))
				if err != nil {
					return
				}
				mu.Lock()
				lines = append(lines, r.Method+" "+r.RequestURI+" "+r.Header.Get("Proxy-Authorization"))
				mu.Unlock()
				io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
				s := tls.Server(c, &tls.Config{GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return a.Leaf(h.ServerName) }})
				br := bufio.NewReader(s)
				for {
					r, err := http.ReadRequest(br)
					if err != nil {
						return
					}
					body, _ := io.ReadAll(r.Body)
					text := fmt.Sprintf("%s %s %s %d", r.Method, r.URL.Path, r.Header.Get("X-Addon"), len(body))
					fmt.Fprintf(s, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
				}
			}()
		}
	}()
	return l.Addr().String(), a.CertPEM(), func() []string { mu.Lock(); defer mu.Unlock(); return lines }
}

// client is the gate's near side.
func client(p *Proc) *http.Client {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.o.Authority)
	user, password, _ := strings.Cut(p.Auth(), ":")
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		Proxy:           http.ProxyURL(&url.URL{Scheme: "http", Host: p.Addr().String(), User: url.UserPassword(user, password)}),
		TLSClientConfig: &tls.Config{RootCAs: roots},
	}}
}

func wantFault(t *testing.T, err error, code, text string) {
	t.Helper()
	f := fault.As(err)
	if err == nil || f.Code != code || !strings.Contains(f.Error(), text) {
		t.Errorf("%v; want %s with %q", err, code, text)
	}
}

func TestRealMitmdump(t *testing.T) {
	program := sidecartest.Path(t)
	back, cert, seen := startBack(t)
	p, err := Start(options(t, program, back, cert, `
def request(flow):
    flow.request.headers["x-addon"] = "was here"
def response(flow):
    flow.response.headers["x-answer"] = str(len(flow.response.content))
`), netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	began := time.Now()
	if err := p.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("serves after %s", time.Since(began).Round(time.Millisecond))
	if got := seen(); len(got) > 0 {
		t.Errorf("a connection that no request asked for: %q", got)
	}
	c := client(p)
	resp, err := c.Post("https://keys.test/p", "text/plain", strings.NewReader(strings.Repeat("x", 1<<20)))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	if string(body) != "POST /p was here 1048576" || resp.Header.Get("X-Answer") == "" {
		t.Errorf("%s %v", body, resp.Header)
	}
	if got := seen(); len(got) != 1 || !strings.HasPrefix(got[0], "CONNECT keys.test:443 Basic ") {
		t.Errorf("%q", got)
	}
	// A back door that shows another certificate is not the gate's.
	other, _, _ := startBack(t)
	q, err := Start(options(t, program, other, cert, ""), netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Stop()
	if err := q.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if resp, err := client(q).Get("https://keys.test/"); err != nil || resp.StatusCode != http.StatusBadGateway {
		t.Errorf("%v %v", resp, err)
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID()))
	if err != nil || strings.Contains(string(raw), strings.TrimPrefix(p.Auth(), "bottle:")) {
		t.Errorf("%q %v", raw, err)
	}
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.PID()))
	if err != nil || strings.Contains(string(environ), "SSH") || !strings.Contains(string(environ), "HOME="+p.o.Dir) {
		t.Errorf("%q %v", environ, err)
	}
	p.Stop()
	p.Stop()
	if err := syscall.Kill(p.PID(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("still there: %v", err)
	}
	wantFault(t, p.Wait(), "sidecar_failed", "mitmdump ended")
}

func TestBrokenAddon(t *testing.T) {
	program := sidecartest.Path(t)
	p, err := Start(options(t, program, "127.0.0.1:1", nil, "import no_such_module_anywhere\n"), netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	wantFault(t, p.Ready(t.Context()), "sidecar_failed", "no_such_module_anywhere")
}

// script is a program in mitmdump's place.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mitmdump")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestNotReady(t *testing.T) {
	begin := func(program string, at netip.AddrPort) *Proc {
		t.Helper()
		p, err := Start(options(t, program, "127.0.0.1:1", nil, ""), at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Stop)
		return p
	}
	wantFault(t, begin(script(t, "echo out of order >&2; exit 3"), netip.AddrPort{}).Ready(t.Context()), "sidecar_failed", "exit status 3): out of order")

	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	slow := begin(script(t, "exec sleep 60"), netip.AddrPort{})
	wantFault(t, slow.Ready(ctx), "sidecar_failed", "nothing listens on its port")

	// One that lets anybody in is no gate's sidecar.
	for status, text := range map[string]string{"200 OK": "answers 200 to who has no password", "403 Forbidden": "answers 403"} {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n", status)
				c.Close()
			}
		}()
		wantFault(t, begin(script(t, "exec sleep 60"), l.Addr().(*net.TCPAddr).AddrPort()).Ready(t.Context()), "sidecar_failed", text)
	}
	if _, err := Start(options(t, "/nonexistent", "127.0.0.1:1", nil, ""), netip.AddrPort{}); err == nil || fault.As(err).Code != "sidecar_failed" {
		t.Errorf("%v", err)
	}
}

// What it has started goes with it, and holds nothing up.
func TestChildrenGo(t *testing.T) {
	child := filepath.Join(t.TempDir(), "child")
	p, err := Start(options(t, script(t, "sleep 300 & echo $! >"+child+"; exit 0"), "127.0.0.1:1", nil, ""), netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Exited():
	case <-time.After(time.Minute):
		p.Stop()
		t.Fatal("its end was not seen")
	}
	raw, err := os.ReadFile(child)
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	fmt.Sscan(string(raw), &pid)
	for range 3000 {
		if err := syscall.Kill(pid, 0); errors.Is(err, syscall.ESRCH) {
			return
		}
		if stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); strings.Contains(string(stat), ") Z ") {
			return // waits for the system's first process to take note
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("process %d is left", pid)
}

func TestLaidOut(t *testing.T) {
	o := options(t, "/bin/true", "127.0.0.1:9", []byte("BACK"), "code")
	o.Addons = append(o.Addons, Addon{"addon.py", []byte("more")})
	at := netip.MustParseAddrPort("127.0.0.1:8")
	sum, err := lay(&o, at)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(o.Dir, "conf", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatal(err)
	}
	if got["listen_host"] != "127.0.0.1" || got["listen_port"] != 8.0 || got["proxyauth"] != o.Auth || got["upstream_auth"] != o.BackAuth ||
		got["ssl_insecure"] != false || got["connection_strategy"] != "lazy" || len(got["scripts"].([]any)) != 2 {
		t.Errorf("%s", raw)
	}
	for i, want := range []string{"code", "more"} {
		path := got["scripts"].([]any)[i].(string)
		b, err := os.ReadFile(path)
		beside, _ := os.ReadDir(filepath.Dir(path))
		if string(b) != want || len(beside) != 1 || err != nil {
			t.Errorf("%s: %q %v %v", path, b, beside, err)
		}
	}
	err = filepath.WalkDir(o.Dir, func(path string, d fs.DirEntry, err error) error {
		if fi, e := os.Stat(path); e != nil || path != o.Dir && fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v %v", path, fi.Mode(), e)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	// The digest is about what it does, not about ports and passwords.
	o.Auth, o.Back = NewAuth(), "127.0.0.1:10"
	if again, err := lay(&o, netip.MustParseAddrPort("127.0.0.1:11")); err != nil || again != sum {
		t.Errorf("%s %s %v", again, sum, err)
	}
	o.Addons[1].Code = []byte("other")
	if again, err := lay(&o, at); err != nil || again == sum {
		t.Errorf("another addon, the same digest: %v", err)
	}
	o.Dir = filepath.Join(o.Dir, "none", "there")
	if _, err := lay(&o, at); err == nil || fault.As(err).Code != "cannot_create" {
		t.Errorf("%v", err)
	}
}

func TestLoad(t *testing.T) {
	read := func(path string) ([]byte, error) {
		if path == "a.py" {
			return []byte("code"), nil
		}
		return nil, fs.ErrNotExist
	}
	all, err := Load([]plan.Addon{{Path: "a.py", SHA256: plan.SHA256([]byte("code"))}}, read)
	if err != nil || len(all) != 1 || all[0].Name != "a.py" || string(all[0].Code) != "code" {
		t.Errorf("%v %v", all, err)
	}
	_, err = Load([]plan.Addon{{Path: "a.py", SHA256: plan.SHA256([]byte("other"))}}, read)
	wantFault(t, err, "addon_changed", "a.py is not the addon that was planned")
	_, err = Load([]plan.Addon{{Path: "b.py", SHA256: plan.SHA256([]byte("code"))}}, read)
	wantFault(t, err, "no_addon", "not exist")
}

func TestFind(t *testing.T) {
	good := script(t, "")
	env := func(m map[string]string) func(string) string { return func(k string) string { return m[k] } }
	for name, c := range map[string]struct {
		env  map[string]string
		want string
	}{
		"named":         {map[string]string{"BOTTLE_MITMDUMP": good, "PATH": "/nowhere"}, good},
		"on PATH":       {map[string]string{"PATH": "/nowhere:" + filepath.Dir(good)}, good},
		"named wrongly": {map[string]string{"BOTTLE_MITMDUMP": "/nowhere/mitmdump", "PATH": filepath.Dir(good)}, ""},
		"nowhere":       {map[string]string{"PATH": "/nowhere"}, ""},
		"relative PATH": {map[string]string{"PATH": "."}, ""},
		"no program":    {map[string]string{"BOTTLE_MITMDUMP": filepath.Dir(good)}, ""},
	} {
		got, err := Find(env(c.env))
		if got != c.want || c.want == "" && (err == nil || fault.As(err).Code != "no_mitmdump") {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
}

func TestListener(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().(*net.TCPAddr).AddrPort()
	if uid, ok := listener(at); !ok || uid != os.Geteuid() {
		t.Errorf("%d %v", uid, ok)
	}
	l.Close()
	if _, ok := listener(at); ok {
		t.Error("a closed port has an owner")
	}
}

func TestAuthsDiffer(t *testing.T) {
	if a, b := NewAuth(), NewAuth(); a == b || len(a) < 40 || strings.Count(a, ":") != 1 {
		t.Errorf("%q %q", a, b)
	}
}
