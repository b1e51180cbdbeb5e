package gate

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/plan"
)

// between is a proxy that reads TLS and sends it on through another proxy, as
// mitmdump does in upstream mode, and does with requests what edit says.
type between struct {
	t         *testing.T
	authority *ca.Authority
	listener  net.Listener
	back      net.Listener
	backRoots *x509.CertPool // known once the gate has its authority
	edit      func(*http.Request)

	mu   sync.Mutex
	seen []http.Header
}

func startBetween(t *testing.T, hosts ...string) *between {
	t.Helper()
	b := &between{t: t, edit: func(*http.Request) {}}
	var err error
	if b.authority, err = ca.New("sidecar", hosts, time.Now(), time.Hour); err != nil {
		t.Fatal(err)
	}
	for _, l := range []*net.Listener{&b.listener, &b.back} {
		if *l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	s := &http.Server{Handler: http.HandlerFunc(b.serve)}
	go s.Serve(b.listener)
	t.Cleanup(func() { s.Close() })
	return b
}

// config is the gate's side of it.
func (b *between) config(c *Config) {
	b.backRoots = x509.NewCertPool()
	b.backRoots.AppendCertsFromPEM(c.CA.CertPEM())
	c.Sidecar = &Sidecar{Name: "mitmdump", Addr: b.listener.Addr().String(), Auth: "bottle:front", BackAuth: "bottle:back",
		CA: b.authority.CertPEM(), Back: b.back}
}

func (b *between) serve(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect || r.Header.Get("Proxy-Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte("bottle:front")) {
		w.WriteHeader(http.StatusProxyAuthRequired)
		return
	}
	target := r.RequestURI
	c, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	io.WriteString(c, established)
	tc := tls.Server(c, &tls.Config{GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return b.authority.Leaf(h.ServerName) }})
	tr := &http.Transport{
		Proxy:           http.ProxyURL(&url.URL{Scheme: "http", Host: b.back.Addr().String(), User: url.UserPassword("bottle", "back")}),
		TLSClientConfig: &tls.Config{RootCAs: b.backRoots}, DisableCompression: true,
	}
	defer tr.CloseIdleConnections()
	inner := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.mu.Lock()
		b.seen = append(b.seen, r.Header.Clone())
		b.mu.Unlock()
		r.RequestURI, r.URL.Scheme, r.URL.Host = "", "https", target
		b.edit(r)
		resp, err := tr.RoundTrip(r)
		if err != nil {
			http.Error(w, "sidecar: "+err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.Header().Set("X-Sidecar", "answer")
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	})}
	q := newQueue()
	go q.put(tc)
	b.t.Cleanup(func() { q.Close(); inner.Close() })
	inner.Serve(q)
}

func (b *between) headers(name string) (all []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, h := range b.seen {
		all = append(all, h.Values(name)...)
	}
	return all
}

func TestSidecar(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test", "pass.test", "other.test")
	b := startBetween(t, "api.test", "other.test")
	b.edit = func(r *http.Request) {
		switch r.URL.Path {
		case "/elsewhere":
			r.URL.Host, r.Host = hostPort("evil.test", o.port), ""
		case "/end-to-end":
			r.URL.Host, r.Host = hostPort("pass.test", o.port), ""
		case "/fronting":
			r.Host = "other.test"
		case "/unlisted":
			r.URL.Path = "/private"
		case "/rewrite":
			r.URL.Path = "/rewritten"
		}
		r.Header.Set("X-Added", "by the sidecar")
	}
	api := inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1"))
	api.Requests = []string{"GET /a", "GET /elsewhere", "GET /end-to-end", "GET /fronting", "GET /mirror", "GET /rewrite", "GET /rewritten", "GET /unlisted", "POST /post"}
	api.RequestsFrom = "here"
	g := start(t, []plan.Rule{api, pin(allowHost("pass.test", "tls", o.port), "127.0.0.1"), inspect(pin(allowHost("other.test", "tls", o.port), "127.0.0.1"))},
		keySecret("api.test", "x-api-key"), b.config)
	at := "https://" + hostPort("api.test", o.port)

	resp, body := g.get(at + "/a")
	if resp.StatusCode != 200 || !bytes.Contains(body, []byte("by the sidecar")) || resp.Header.Get("X-Sidecar") != "answer" || bytes.Contains(body, []byte(secretValue)) {
		t.Fatalf("%s %v %s\n%+v", resp.Status, resp.Header, body, g.events())
	}
	if _, body := g.get(at + "/rewrite"); !bytes.Contains(body, []byte(`"path":"/rewritten"`)) {
		t.Errorf("%s", body)
	}
	big := strings.Repeat("x", 3<<20)
	if resp, err := g.client().Post(at+"/post", "text/plain", strings.NewReader(big)); err != nil || resp.StatusCode != 200 {
		t.Errorf("%v %v", resp, err)
	}
	for _, h := range b.headers("X-Api-Key") {
		if strings.Contains(h, secretValue) {
			t.Error("the sidecar saw the secret")
		}
	}
	// Nothing that the guest could not: the answer is the gate's, or the sidecar's
	// word that it got none.
	reached := len(o.log())
	for path, code := range map[string]string{"/elsewhere": "not_in_allowlist", "/end-to-end": "not_inspected", "/fronting": "host_mismatch", "/unlisted": "request_not_allowed"} {
		resp, body := g.get(at + path)
		if resp.StatusCode < 400 {
			t.Errorf("%s: %s %s", path, resp.Status, body)
		}
		g.await(path, func(e audit.Event) bool { return e.Sender == "mitmdump" && e.Verdict == "deny" && e.Code == code })
	}
	if n := len(o.log()); n != reached {
		t.Errorf("reached an origin: %v", o.log()[reached:])
	}
	// A refusal on the far side is told to the guest as it is.
	if resp, _ := g.get(at + "/unlisted"); resp.Header.Get("X-Bottle-Decision") != "deny" {
		t.Errorf("%v", resp.Header)
	}
	// What the front refuses does not get to the sidecar at all.
	n := len(b.headers("X-Added")) + len(b.seen)
	if resp, _ := g.get(at + "/never"); resp.StatusCode != 403 {
		t.Error(resp.Status)
	}
	if m := len(b.headers("X-Added")) + len(b.seen); m != n {
		t.Error("a refused request was shown to the sidecar")
	}
	// End to end is end to end.
	if resp, body := g.get("https://" + hostPort("pass.test", o.port) + "/p"); resp.StatusCode != 200 || resp.Header.Get("X-Sidecar") != "" || bytes.Contains(body, []byte("by the sidecar")) {
		t.Errorf("%s %s", resp.Status, body)
	}
	g.await("front", func(e audit.Event) bool {
		return e.Event == "request" && e.Path == "/a" && e.Via == "mitmdump" && e.Secret == "" && e.Sender == ""
	})
	g.await("back", func(e audit.Event) bool {
		return e.Event == "request" && e.Path == "/a" && e.Sender == "mitmdump" && e.Secret == "KEY" && e.Via == ""
	})
}

// The guest's requests wait for the sidecar's, so that each side has a bound of
// its own.
func TestSidecarBounds(t *testing.T) {
	const most = 8
	arrived, release := make(chan bool, most), make(chan bool)
	o := startOrigin(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- true
		<-release
	}), "api.test")
	b := startBetween(t, "api.test")
	g := start(t, []plan.Rule{inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1"))}, nil, func(c *Config) { b.config(c); c.MaxConns = most })
	var wg sync.WaitGroup
	for range most {
		wg.Go(func() {
			c := g.client()
			defer c.CloseIdleConnections()
			resp, err := c.Get("https://" + hostPort("api.test", o.port) + "/")
			if err != nil {
				t.Error(err)
				return
			}
			if resp.StatusCode != 200 {
				t.Error(resp.Status)
			}
			resp.Body.Close()
		})
		select {
		case <-arrived:
		case <-time.After(patience):
			t.Error("a request does not arrive")
		}
	}
	close(release)
	wg.Wait()
}

// The way back is for the sidecar, which says who it is.
func TestBackDoor(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	b := startBetween(t, "api.test")
	g := start(t, []plan.Rule{inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1")), pin(allowHost("web.test", "http", o.port), "127.0.0.1")},
		keySecret("api.test", "x-api-key"), b.config)
	ask := func(head string) string {
		t.Helper()
		c, err := net.Dial("tcp", b.back.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, head+"\r\n\r\n")
		closeWrite(c)
		got, _ := io.ReadAll(c)
		return string(got)
	}
	target := hostPort("api.test", o.port)
	word := func(s string) string {
		return "\r\nProxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(s))
	}
	for name, c := range map[string]struct{ head, status, code string }{
		"no word":           {"CONNECT " + target + " HTTP/1.1\r\nHost: " + target, "407", "not_the_sidecar"},
		"the gate's word":   {"CONNECT " + target + " HTTP/1.1\r\nHost: " + target + word("bottle:front"), "407", "not_the_sidecar"},
		"another scheme":    {"CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\nProxy-Authorization: Bearer bottle:back", "407", "not_the_sidecar"},
		"plain":             {"GET http://" + hostPort("web.test", o.port) + "/ HTTP/1.1\r\nHost: " + hostPort("web.test", o.port), "403", "not_inspected"},
		"plain, with it":    {"GET http://" + hostPort("web.test", o.port) + "/ HTTP/1.1\r\nHost: " + hostPort("web.test", o.port) + word("bottle:back"), "403", "not_inspected"},
		"a tunnel for http": {"CONNECT " + hostPort("web.test", o.port) + " HTTP/1.1\r\nHost: " + hostPort("web.test", o.port) + word("bottle:back"), "403", "not_inspected"},
		"elsewhere":         {"CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443" + word("bottle:back"), "403", "not_in_allowlist"},
	} {
		if got := ask(c.head); !strings.HasPrefix(got, "HTTP/1.1 "+c.status) || !strings.Contains(got, `"code":"`+c.code+`"`) {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := ask("CONNECT " + target + " HTTP/1.1\r\nHost: " + target + word("bottle:back")); !strings.HasPrefix(got, established) {
		t.Errorf("with the word: %s", got)
	}
	if len(o.log()) > 0 {
		t.Errorf("%v", o.log())
	}
	for _, e := range g.events() {
		if strings.Contains(fmt.Sprintf("%+v", e), "bottle:back") {
			t.Errorf("the word is in the log: %+v", e)
		}
	}
}

// Without the sidecar there is no other way, and with another in its place none
// either.
func TestSidecarDown(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	b := startBetween(t, "api.test")
	impostor := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, _, _ := w.(http.Hijacker).Hijack()
		io.WriteString(c, established)
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{world().leaf("api.test")}})
		if s.Handshake() == nil {
			t.Error("the gate took a stranger's certificate")
		}
		c.Close()
	}))
	defer impostor.Close()
	gone, _ := net.Listen("tcp", "127.0.0.1:0")
	gone.Close()
	for name, c := range map[string]struct{ addr, auth, code string }{
		"nobody there":  {gone.Addr().String(), "bottle:front", "sidecar_down"},
		"another word":  {b.listener.Addr().String(), "bottle:old", "sidecar_down"},
		"somebody else": {strings.TrimPrefix(impostor.URL, "http://"), "bottle:front", "sidecar_untrusted"},
	} {
		b := startBetween(t, "api.test")
		g := start(t, []plan.Rule{inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1"))}, keySecret("api.test", "x-api-key"), func(cfg *Config) {
			b.config(cfg)
			cfg.Sidecar.Addr, cfg.Sidecar.Auth = c.addr, c.auth
		})
		resp, body := g.get("https://" + hostPort("api.test", o.port) + "/")
		if resp.StatusCode != 503 || !bytes.Contains(body, []byte(`"code":"`+c.code+`"`)) || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s: %s %s", name, resp.Status, body)
		}
	}
	if len(o.log()) > 0 {
		t.Errorf("%v", o.log())
	}
}

func TestBadSidecar(t *testing.T) {
	rule := inspect(allowHost("api.test", "tls", 443))
	authority, err := ca.New("t", []string{"api.test"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	good := Sidecar{Name: "s", Addr: "127.0.0.1:1", Auth: "a:b", BackAuth: "a:c", CA: authority.CertPEM(), Back: l}
	for name, edit := range map[string]func(*Sidecar){
		"no certificate":   func(s *Sidecar) { s.CA = nil },
		"no password":      func(s *Sidecar) { s.Auth = "a" },
		"no word back":     func(s *Sidecar) { s.BackAuth = "" },
		"no listener":      func(s *Sidecar) { s.Back = nil },
		"nothing is wrong": func(*Sidecar) {},
	} {
		s := good
		edit(&s)
		_, err := New(Config{Bottle: &plan.Bottle{ID: "t", Egress: plan.Policy{Rules: []plan.Rule{rule}}}, Audit: audit.New(&full{}, audit.Options{}),
			RootsPEM: [][]byte{world().pem}, CA: authority, Sidecar: &s})
		if want := name != "nothing is wrong"; (err != nil) != want || want && fault.As(err).Code != "bad_sidecar" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Other users of the host reach the way back, too: they learn nothing of the
// policy there, and cannot push the bottle's decisions out of its log.
func TestStrangersAtTheBackDoor(t *testing.T) {
	b := startBetween(t, "api.test")
	g := start(t, []plan.Rule{inspect(allowHost("api.test", "tls", 443))}, nil, b.config)
	for i := range 30 {
		for _, head := range []string{
			fmt.Sprintf("CONNECT host-%d.test:443 HTTP/1.1\r\nHost: x", i),
			fmt.Sprintf("GET http://host-%d.test/ HTTP/1.1\r\nHost: host-%d.test", i, i),
			"GET " + guest.LookupPath + "?name=api.test HTTP/1.1\r\nHost: x",
			fmt.Sprintf("GET  host-%d HTTP/1.1", i),
		} {
			c, err := net.Dial("tcp", b.back.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(patience))
			io.WriteString(c, head+"\r\n\r\n")
			closeWrite(c)
			got, _ := io.ReadAll(c)
			c.Close()
			if !bytes.HasPrefix(got, []byte("HTTP/1.1 4")) || bytes.Contains(got, []byte("443")) {
				t.Fatalf("%s: %s", head, got)
			}
		}
	}
	lines := 0
	for _, e := range g.events() {
		if e.Event != audit.KindStart {
			lines++
		}
		if strings.Contains(fmt.Sprintf("%+v", e), "host-") {
			t.Errorf("%+v", e)
		}
	}
	if lines != 3 {
		t.Errorf("%d lines", lines)
	}
}
