package gate

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

// rawOrigin is a TLS server that answers every request with what answer makes
// of the value of its x-api-key header, byte for byte.
func rawOrigin(t *testing.T, host string, answer func(key string) string) (port int) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{world().leaf(host)}})
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, l, func(c net.Conn) {
		if r, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			io.WriteString(c, answer(r.Header.Get("X-Api-Key")))
		}
	})
}

// An answer that is no HTTP, and quotes the secret where a parser's error would
// repeat it, gives it away neither to the guest nor to the log.
func TestBrokenAnswersHoldNoSecret(t *testing.T) {
	for name, answer := range map[string]func(key string) string{
		"no HTTP":     func(k string) string { return k + "\r\n\r\n" },
		"status line": func(k string) string { return "HTTP/1.1 " + k + " OK\r\n\r\n" },
		"version":     func(k string) string { return k + " 200 OK\r\n\r\n" },
		"no colon":    func(k string) string { return "HTTP/1.1 200 OK\r\nx-api-key " + k + "\r\n\r\n" },
		"length":      func(k string) string { return "HTTP/1.1 200 OK\r\nContent-Length: " + k + "\r\n\r\n" },
		"coding":      func(k string) string { return "HTTP/1.1 200 OK\r\nTransfer-Encoding: " + k + "\r\n\r\n" },
		"trailer": func(k string) string {
			return "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: " + k[:7] + "\r\n\r\n0\r\n\r\n"
		},
		"reason phrase": func(k string) string { return "HTTP/1.1 200 " + k + "\r\nContent-Length: 0\r\n\r\n" },
		"early hints": func(k string) string {
			return "HTTP/1.1 103 " + k + "\r\nLink: " + k + "\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
		},
		"odd status": func(k string) string { return "HTTP/1.1 099 OK\r\nX-A: " + k + "\r\nContent-Length: 0\r\n\r\n" },
		"status 0":   func(k string) string { return "HTTP/1.1 000 OK\r\nX-A: " + k + "\r\nContent-Length: 0\r\n\r\n" },
		"chunk":      func(k string) string { return "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + k + "\r\n" },
		"unasked upgrade": func(k string) string {
			return "HTTP/1.1 101 " + k + "\r\nUpgrade: " + k + "\r\nConnection: upgrade\r\n\r\n" + k
		},
		"encoding twice": func(k string) string {
			return "HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b"
		},
		"folded": func(k string) string { return "HTTP/1.1 200 OK\r\nX-A: a\r\n " + k + "\r\nContent-Length: 0\r\n\r\n" },
		"cookie": func(k string) string {
			return "HTTP/1.1 200 OK\r\nSet-Cookie: k=" + k + "\r\nContent-Length: 0\r\n\r\n"
		},
		"bare CR": func(k string) string { return "HTTP/1.1 200 OK\r\nX-A: a\rX-B: " + k + "\r\nContent-Length: 0\r\n\r\n" },
	} {
		t.Run(name, func(t *testing.T) {
			var remarks bytes.Buffer
			port := rawOrigin(t, "api.test", answer)
			g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", port), "127.0.0.1")}, keySecret("api.test", "x-api-key"), func(c *Config) { c.Log = &remarks })
			resp, err := g.client().Get("https://" + hostPort("api.test", port) + "/")
			var got string
			if err != nil {
				got = err.Error()
			} else {
				b, berr := io.ReadAll(resp.Body)
				got = fmt.Sprint(resp.Status, resp.Header, resp.Trailer, string(b), berr)
				resp.Body.Close()
			}
			t.Logf("%.300s", got)
			if strings.Contains(strings.ToLower(got), strings.ToLower(secretValue[:12])) {
				t.Errorf("the guest got %s", got)
			}
			for _, e := range g.events() {
				if s := fmt.Sprintf("%+v", e); strings.Contains(s, secretValue[:12]) {
					t.Errorf("in the log: %s", s)
				}
			}
			if strings.Contains(remarks.String(), secretValue[:12]) || strings.Contains(remarks.String(), "panic") {
				t.Errorf("remarks: %.300s", remarks.String())
			}
		})
	}
}

// What a host sends after its answer is quoted by net/http to the standard
// logger, which is the keeper's log in a gate process.
func TestUnaskedBytesAreNotLogged(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	log.SetOutput(w)
	port := rawOrigin(t, "api.test", func(k string) string {
		return "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nX-A: " + k + "\r\n\r\n"
	})
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", port), "127.0.0.1")}, keySecret("api.test", "x-api-key"), nil)
	for range 5 {
		if _, body := g.get("https://" + hostPort("api.test", port) + "/"); string(body) != "ok" {
			t.Errorf("%s", body)
		}
	}
	time.Sleep(100 * time.Millisecond) // the transport looks at the rest by itself
	w.Close()
	if b, _ := io.ReadAll(r); len(b) > 0 {
		t.Errorf("logged: %s", b)
	}
}

// Servers that follow CGI conventions take several spellings for one header.
func TestSpellingsOfAnInjectedHeader(t *testing.T) {
	m, err := injectors([]plan.Secret{{Name: "KEY", Inject: []plan.Injection{{Host: "a.test", Header: "X_Own-Key"}}}}, map[string]string{"KEY": "real-value"})
	if err != nil {
		t.Fatal(err)
	}
	h := http.Header{"X-Own-Key": {"a"}, "X_own_key": {"b"}, "X.own.key": {"c"}, "x-own_key": {"d"}, "X!own^key": {"e"}}
	m["a.test"].apply(h)
	if fmt.Sprint(h) != "map[X_own-Key:[real-value]]" {
		t.Errorf("%v", h)
	}
}

// A CONNECT inside a tunnel is answered, and what follows it is no request.
func TestConnectInsideTunnel(t *testing.T) {
	o := startOrigin(t, false, echo)
	at := hostPort("ok.test", o.port)
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	_, _, c := g.connect(at)
	// Bare LF: framing would refuse it.
	io.WriteString(c, "CONNECT "+at+" HTTP/1.1\r\nHost: "+at+"\r\n\r\nGET /smuggled HTTP/1.1\nHost: "+at+"\n\n")
	closeWrite(c)
	b, _ := io.ReadAll(c)
	if !bytes.Contains(b, []byte("method_refused")) || len(o.log()) > 0 {
		t.Errorf("%s\n%v", b, o.log())
	}
}

// Names of trailers are told before the body, and their case is not kept.
func TestTrailerNamesHoldNoSecret(t *testing.T) {
	port := rawOrigin(t, "api.test", func(k string) string {
		return "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: a-" + k + ", X-Sum\r\n\r\n2\r\nok\r\n0\r\na-" + k + ": 1\r\nX-Sum: 2\r\n\r\n"
	})
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", port), "127.0.0.1")}, keySecret("api.test", "x-api-key"),
		func(c *Config) { c.Secrets = map[string]string{"KEY": "token-0123456789abcdef"} })
	resp, body := g.get("https://" + hostPort("api.test", port) + "/")
	if all := strings.ToLower(fmt.Sprint(resp.Header, resp.Trailer)); string(body) != "ok" || strings.Contains(all, "0123456789") || resp.Trailer.Get("X-Sum") != "2" {
		t.Errorf("%q %s", body, all)
	}
}

// What an origin does not want to read of a body is never taken for a request:
// it may be a file that somebody else wrote.
func TestBodyIsNeverARequest(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	port := serveTCP(t, func(c *net.TCPConn) {
		br := bufio.NewReader(c)
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			mu.Lock()
			seen = append(seen, r.URL.Path)
			mu.Unlock()
			if r.URL.Path != "/early" {
				io.Copy(io.Discard, r.Body)
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
				continue
			}
			io.WriteString(c, "HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
			io.Copy(io.Discard, c)
			return
		}
	})
	at := hostPort("ok.test", port)
	// A body that is looked through is read whole before the origin sees any of it.
	g := start(t, []plan.Rule{unscreened(pin(allowHost("ok.test", "http", port), "127.0.0.1"))}, nil, nil)
	head := func(path string) string { return "POST http://" + at + path + " HTTP/1.1\r\nHost: " + at + "\r\n" }
	inside := head("/smuggled") + "Content-Length: 0\r\n\r\n"

	for name, c := range map[string]struct{ first, more string }{
		"length, nothing sent yet": {"Content-Length: 4000\r\n\r\na", inside},
		"length, some of it sent":  {"Content-Length: 400000\r\n\r\n" + strings.Repeat(inside, 1000), inside},
		"chunks":                   {"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n", "fff\r\n" + inside},
		"expecting":                {"Expect: 100-continue\r\nContent-Length: 4000\r\n\r\n", inside},
	} {
		conn := g.dial()
		go io.WriteString(conn, head("/early")+c.first)
		br := bufio.NewReader(conn)
		resp, err := http.ReadResponse(br, nil)
		for err == nil && resp.StatusCode == http.StatusContinue {
			resp, err = http.ReadResponse(br, nil)
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		body, err := io.ReadAll(resp.Body)
		if resp.StatusCode != 413 || string(body) != "no" || err != nil || !resp.Close {
			t.Errorf("%s: %v %q %v", name, resp, body, err)
		}
		io.WriteString(conn, c.more)
		if _, err := http.ReadResponse(br, nil); err == nil {
			t.Errorf("%s: a second answer", name)
		}
	}

	// A client that sends all before it reads gets its answer, too.
	big := make([]byte, 8<<20)
	conn := g.dial()
	if _, err := io.WriteString(conn, head("/early")+fmt.Sprintf("Content-Length: %d\r\n\r\n", len(big))); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(big); err != nil {
		t.Errorf("sending the rest: %v", err)
	}
	if b, err := io.ReadAll(conn); err != nil || !bytes.HasPrefix(b, []byte("HTTP/1.1 413 ")) || !bytes.HasSuffix(b, []byte("\r\n\r\nno")) {
		t.Errorf("%q %v", b, err)
	}

	// A body that was read to its end leaves the connection as it is.
	conn = g.dial()
	br := bufio.NewReader(conn)
	for range 20 {
		for _, rest := range []string{"Content-Length: 3\r\n\r\nabc", "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"} {
			io.WriteString(conn, head("/whole")+rest)
			resp, err := http.ReadResponse(br, nil)
			if err != nil || resp.Close {
				t.Fatalf("%v %v", resp, err)
			}
			io.Copy(io.Discard, resp.Body)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	for _, p := range seen {
		if p != "/early" && p != "/whole" {
			t.Errorf("%s reached the origin", p)
		}
	}
	for _, e := range g.events() {
		if e.Event == "request" && e.Path != "/early" && e.Path != "/whole" {
			t.Errorf("%+v was taken for a request", e)
		}
	}
}

// TestPartsOfAnswers: a secret that is reflected is not asked for in parts, nor in
// a form in which it would not be found.
func TestPartsOfAnswers(t *testing.T) {
	o := startOrigin(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name := range r.Header {
			fmt.Fprintln(w, name)
		}
	}), "api.test")
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1")}, keySecret("api.test", "x-api-key"), nil)
	_, body, f := send(t, g, "GET", "https://"+hostPort("api.test", o.port)+"/", nil, func(r *http.Request) {
		for _, name := range []string{"Range", "Request-Range", "If-Range", "A-IM", "X-Passed"} {
			r.Header.Set(name, "bytes=0-3")
		}
	})
	if strings.Contains(body, "Range") || strings.Contains(body, "A-Im") || !strings.Contains(body, "X-Passed") {
		t.Errorf("%s %+v", body, f)
	}
}

// TestReflectedPassword: a host that takes a credential for Basic apart, and
// repeats what is in it, does not give it away.
func TestReflectedPassword(t *testing.T) {
	const user, password = "someone", "a password of theirs"
	o := startOrigin(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u, p, _ := r.BasicAuth()
		if u != user || p != password {
			w.WriteHeader(http.StatusUnauthorized)
		}
		fmt.Fprintf(w, "user %s, password %s, both %s:%s", u, p, u, p)
	}), "api.test")
	secrets := keySecret("api.test", "authorization")
	secrets[0].Inject[0].Format = "Basic {}"
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1")}, secrets, func(c *Config) {
		c.Secrets = map[string]string{"KEY": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}
	})
	status, body, f := send(t, g, "GET", "https://"+hostPort("api.test", o.port)+"/", nil, nil)
	if status != 200 || strings.Contains(body, password) || !strings.Contains(body, "user someone, password ***") {
		t.Errorf("%d %s %+v", status, body, f)
	}
	for value, want := range map[string]int{
		"c29tZW9uZTphIHBhc3N3b3Jk": 2, "c29tZW9uZTphIHBhc3N3b3JkIQ==": 2, "c29tZSBsb25nIHdvcmRz": 1, "c2hvcnQ=": 0, "sk-ant-api03-something": 0,
		base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xfe}, 20)): 0,
	} {
		if got := decodings(value); len(got) != want {
			t.Errorf("%s: %q", value, got)
		}
	}
}

// TestCertificateThatNamesTheSecret: what a host chose to have in its certificate
// is quoted when it is refused, but for the secret that it was given before.
func TestCertificateThatNamesTheSecret(t *testing.T) {
	const key = "sk-abcdef0123456789"
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{world().leaf("other.test", key+".test")}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			_ = c.(*tls.Conn).Handshake()
			c.Close()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", port), "127.0.0.1")}, keySecret("api.test", "x-api-key"), func(c *Config) {
		c.Secrets = map[string]string{"KEY": key}
	})
	_, _, f := send(t, g, "GET", "https://"+hostPort("api.test", port)+"/", nil, nil)
	if f == nil || f.Error.Code != "upstream_untrusted" || strings.Contains(f.Error.Reason, key) || !strings.Contains(f.Error.Reason, "other.test") {
		t.Errorf("%+v", f)
	}
	e := g.await("untrusted", func(e audit.Event) bool { return e.Code == "upstream_untrusted" })
	if strings.Contains(fmt.Sprintf("%+v", e), key) {
		t.Errorf("%+v", e)
	}
}

// The head of an answer may be as long as that of a request: a guest that reads
// none of them lets a thousand wait in the gate (128 MiB; 660 with heads of 256 KiB).
func TestLongHeadsOfAnswers(t *testing.T) {
	o := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		lines := map[string]int{"/long": 55, "/longer": 70}[r.URL.Path]
		for i := range lines {
			w.Header().Set(fmt.Sprint("X-", i), strings.Repeat("v", 1<<10))
		}
	}))
	g := start(t, []plan.Rule{pin(allowHost("web.test", "http", o.port), "127.0.0.1")}, nil, nil)
	for path, want := range map[string]int{"/long": 200, "/longer": 502} {
		if resp, body := g.get("http://" + hostPort("web.test", o.port) + path); resp.StatusCode != want {
			t.Errorf("%s: %s %s", path, resp.Status, body)
		}
	}
}
