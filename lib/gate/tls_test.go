package gate

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/plan"
)

// recorder keeps what a TLS client sends first.
type recorder struct {
	net.Conn
	sent bytes.Buffer
}

func (r *recorder) Write(p []byte) (int, error) { r.sent.Write(p); return len(p), nil }
func (r *recorder) Read([]byte) (int, error)    { return 0, io.EOF }

// clientHello is one whole ClientHello record as Go's client makes it.
func clientHello(t testing.TB, cfg *tls.Config) []byte {
	t.Helper()
	cfg = cfg.Clone()
	cfg.InsecureSkipVerify = cfg.EncryptedClientHelloConfigList == nil
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	r := &recorder{Conn: a}
	_ = tls.Client(r, cfg).Handshake()
	if r.sent.Len() == 0 {
		t.Fatal("no ClientHello")
	}
	return r.sent.Bytes()
}

// split puts the handshake message of one record into records of n bytes.
func split(record []byte, n int) []byte {
	var out []byte
	for msg := record[5:]; len(msg) > 0; {
		k := min(n, len(msg))
		out = append(out, record[0], record[1], record[2], 0, 0)
		binary.BigEndian.PutUint16(out[len(out)-2:], uint16(k))
		out = append(out, msg[:k]...)
		msg = msg[k:]
	}
	return out
}

func TestReadHello(t *testing.T) {
	whole := clientHello(t, &tls.Config{ServerName: "api.test"})
	for _, n := range []int{1, 2, 3, 5, 100, 1 << 14} {
		sent := split(whole, n)
		raw, h, err := readHello(bytes.NewReader(append(slices.Clone(sent), "rest"...)), false)
		if err != nil || h.sni != "api.test" || !bytes.Equal(raw, sent) {
			t.Errorf("records of %d: %+v %v", n, h, err)
		}
	}
	if _, h, err := readHello(bytes.NewReader(clientHello(t, &tls.Config{ServerName: "192.0.2.1"})), false); err != nil || h.hasSNI {
		t.Errorf("address: %+v %v", h, err)
	}
	patch := func(f func(b []byte) []byte) []byte { return f(slices.Clone(whole)) }
	for name, c := range map[string]struct {
		sent []byte
		code string
	}{
		"nothing":      {nil, "no_client_hello"},
		"cut":          {whole[:len(whole)-1], "no_client_hello"},
		"http":         {[]byte("GET / HTTP/1.1\r\nHost: api.test\r\n\r\n"), "not_tls"},
		"ssh":          {[]byte("SSH-2.0-OpenSSH_9.9\r\n"), "not_tls"},
		"SSLv2":        {[]byte{0x80, 0x2e, 1, 3, 1, 0, 0}, "not_tls"},
		"alert first":  {[]byte{21, 3, 1, 0, 2, 1, 0}, "not_tls"},
		"empty record": {append([]byte{22, 3, 1, 0, 0}, whole...), "bad_client_hello"},
		"huge record":  {[]byte{22, 3, 1, 0xff, 0xff}, "bad_client_hello"},
		"server hello": {patch(func(b []byte) []byte { b[5] = 2; return b }), "bad_client_hello"},
		"huge message": {patch(func(b []byte) []byte { b[6] = 1; return b }), "bad_client_hello"},
		"two in one record": {patch(func(b []byte) []byte {
			binary.BigEndian.PutUint16(b[3:], uint16(len(b)-5+4))
			return append(b, 1, 0, 0, 0)
		}), "bad_client_hello"},
		"other in between": {append(split(whole, 50)[:55], append([]byte{23, 3, 3, 0, 1, 0}, split(whole, 50)[55:]...)...), "not_tls"},
		"endless":          {bytes.Repeat([]byte{22, 3, 1, 0, 1, 1}, 1), "no_client_hello"},
	} {
		_, _, err := readHello(bytes.NewReader(c.sent), false)
		var bad *helloError
		if !errors.As(err, &bad) || bad.code != c.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	// 31 KiB in records of one byte is within a message's bound and not the flow's.
	long := append([]byte{22, 3, 1, 0, 0, 1, 0, 0x7c, 0}, make([]byte, 0x7c00)...)
	if _, _, err := readHello(bytes.NewReader(split(long, 1)), false); err == nil {
		t.Error("no bound on records")
	}
}

// What clients that people use send must not look like ECH.
func TestECHIsSeen(t *testing.T) {
	if h := helloOf(t, clientHello(t, &tls.Config{ServerName: "api.test"})); h.ech {
		t.Error("Go's client seems to send ECH")
	}
	msg := slices.Clone(clientHello(t, &tls.Config{ServerName: "api.test"}))
	if err := checkHello(helloOf(t, withExtension(msg, extECH, []byte{0, 0, 1})), "api.test"); err == nil || err.(*helloError).code != "ech_refused" {
		t.Errorf("%v", err)
	}
	if _, _, err := readHello(bytes.NewReader(withExtension(msg, extServerName, nil)), false); err == nil {
		t.Error("an extension twice")
	}
}

func helloOf(t testing.TB, record []byte) hello {
	t.Helper()
	_, h, err := readHello(bytes.NewReader(record), false)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// withExtension appends an extension to a ClientHello record.
func withExtension(record []byte, kind int, data []byte) []byte {
	b := slices.Clone(record)
	at := 5 + 4 + 2 + 32
	at += 1 + int(b[at])
	at += 2 + int(binary.BigEndian.Uint16(b[at:]))
	at += 1 + int(b[at])
	ext := binary.BigEndian.AppendUint16(nil, uint16(kind))
	ext = binary.BigEndian.AppendUint16(ext, uint16(len(data)))
	ext = append(ext, data...)
	binary.BigEndian.PutUint16(b[at:], binary.BigEndian.Uint16(b[at:])+uint16(len(ext)))
	b = append(b, ext...)
	binary.BigEndian.PutUint16(b[3:], uint16(len(b)-5))
	n := len(b) - 9
	b[6], b[7], b[8] = byte(n>>16), byte(n>>8), byte(n)
	return b
}

func FuzzReadHello(f *testing.F) {
	whole := clientHello(f, &tls.Config{ServerName: "api.test", NextProtos: []string{"h2"}})
	f.Add(whole, false)
	f.Add(split(whole, 7), true)
	f.Add(append([]byte{20, 3, 3, 0, 1, 1}, whole...), true)
	f.Fuzz(func(t *testing.T, b []byte, second bool) {
		raw, h, err := readHello(bytes.NewReader(b), second)
		if !bytes.HasPrefix(b, raw) || len(raw) > maxRecords {
			t.Fatalf("%d bytes that did not come", len(raw))
		}
		if err != nil || second {
			return
		}
		// Go's own parser, where it accepts the hello, has to see the same name.
		var seen *string
		_ = tls.Server(&canned{r: bytes.NewReader(raw)}, &tls.Config{GetConfigForClient: func(i *tls.ClientHelloInfo) (*tls.Config, error) {
			seen = &i.ServerName
			return nil, errors.New("enough")
		}}).Handshake()
		if seen != nil && *seen != strings.TrimSuffix(h.sni, ".") && *seen != h.sni {
			t.Fatalf("Go sees %q, the gate %q", *seen, h.sni)
		}
	})
}

// canned is a peer that has sent all it has to say.
type canned struct {
	net.Conn
	r io.Reader
}

func (c *canned) Read(p []byte) (int, error)       { return c.r.Read(p) }
func (c *canned) Write(p []byte) (int, error)      { return len(p), nil }
func (c *canned) Close() error                     { return nil }
func (c *canned) SetWriteDeadline(time.Time) error { return nil }

func TestServerName(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test", "127.0.0.1")
	cidr := plan.Rule{CIDR: "127.0.0.1/32", Ports: []int{o.port}, Protocol: "tls", Verdict: "allow", Class: "private", From: "x"}
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1"), cidr}, nil, nil)
	for _, c := range []struct{ host, sni, code string }{
		{"api.test", "api.test", ""},
		{"api.test", "API.TEST", ""},
		{"API.test", "api.test", ""},
		{"api.test", "denied.test", "sni_mismatch"},
		{"api.test", "x.api.test", "sni_mismatch"},
		{"api.test", "", "sni_missing"},
		{"127.0.0.1", "", ""},
		{"127.0.0.1", "api.test", "sni_mismatch"},
	} {
		status, _, conn := g.connect(hostPort(c.host, o.port))
		if status != 200 {
			t.Fatalf("%+v: %d", c, status)
		}
		tc := tls.Client(conn, &tls.Config{ServerName: c.sni, InsecureSkipVerify: true})
		err := tc.Handshake()
		if c.code == "" {
			if err != nil {
				t.Errorf("%+v: %v", c, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), "access denied") {
			t.Errorf("%+v: %v", c, err)
		}
		e := g.await(c.code, func(e audit.Event) bool { return e.Code == c.code && e.SNI == c.sni })
		if e.Verdict != "deny" {
			t.Errorf("%+v", e)
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range o.sni {
		if s != "api.test" && s != "API.TEST" && s != "" {
			t.Errorf("the origin saw %q", s)
		}
	}
}

func TestNotTLS(t *testing.T) {
	var mu sync.Mutex
	var reached []byte
	l, _ := net.Listen("tcp", "127.0.0.1:0")
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				b, _ := io.ReadAll(c)
				mu.Lock()
				reached = append(reached, b...)
				mu.Unlock()
			}()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", port), "127.0.0.1")}, nil, nil)
	for _, sent := range []string{"GET / HTTP/1.1\r\nHost: denied.test\r\n\r\n", "SSH-2.0-x\r\n", "\x00", string(alert(0))} {
		_, _, c := g.connect(hostPort("api.test", port))
		io.WriteString(c, sent)
		closeWrite(c)
		got, _ := io.ReadAll(c)
		if !bytes.Equal(got, alert(alertAccessDenied)) {
			t.Errorf("%q: %x", sent, got)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(reached) > 0 {
		t.Errorf("%q reached the host", reached)
	}
}

// A ClientHello in a record for each byte, and written byte by byte, as part of
// the same write as the CONNECT.
func TestSplitHello(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	at := hostPort("api.test", o.port)
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1")}, nil, nil)
	for _, sni := range []string{"api.test", "denied.test"} {
		hello := split(clientHello(t, &tls.Config{ServerName: sni}), 1)
		c := g.dial()
		first := append([]byte("CONNECT "+at+" HTTP/1.1\r\n\r\n"), hello[:20]...)
		c.Write(first)
		for _, b := range hello[20:] {
			c.Write([]byte{b})
		}
		br := bufio.NewReader(c)
		line, _ := br.ReadString('\n')
		br.ReadString('\n')
		answer := make([]byte, 7)
		if _, err := io.ReadFull(br, answer); err != nil || !strings.Contains(line, " 200 ") {
			t.Fatal(line, err)
		}
		if denied := bytes.Equal(answer, alert(alertAccessDenied)); denied != (sni == "denied.test") {
			t.Errorf("%s: %x", sni, answer)
		}
	}
}

// A server that asks again gets a second ClientHello, whose name counts as well.
func TestHelloRetry(t *testing.T) {
	cert := world().leaf("api.test")
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, CurvePreferences: []tls.CurveID{tls.CurveP384}, MinVersion: tls.VersionTLS13})
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
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", port), "127.0.0.1")}, nil, nil)
	cfg := &tls.Config{ServerName: "api.test", InsecureSkipVerify: true, CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP384}}

	_, _, c := g.connect(hostPort("api.test", port))
	tc := tls.Client(c, cfg)
	if _, err := tc.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if buf := make([]byte, 4); !tc.ConnectionState().HelloRetryRequest {
		t.Fatal("the server did not ask again")
	} else if _, err := io.ReadFull(tc, buf); err != nil || string(buf) != "ping" {
		t.Fatal(err)
	}

	// The same with another name in the second one.
	_, _, c = g.connect(hostPort("api.test", port))
	err = tls.Client(&renaming{Conn: c}, cfg).Handshake()
	e := g.await("sni_mismatch", func(e audit.Event) bool { return e.Code == "sni_mismatch" && e.Verdict == "deny" })
	if err == nil || e.Host != "api.test" {
		t.Errorf("%v %+v", err, e)
	}
}

// renaming puts another name into the second ClientHello.
type renaming struct {
	net.Conn
	n int
}

func (r *renaming) Write(p []byte) (int, error) {
	if r.n++; r.n > 1 {
		q := bytes.ReplaceAll(p, []byte("api.test"), []byte("evi.test"))
		return r.Conn.Write(q)
	}
	return r.Conn.Write(p)
}

func TestIsRetryNeedsTheMagic(t *testing.T) {
	b := append([]byte{22, 3, 3, 0, 90, 2, 0, 0, 86, 3, 3}, retryRandom...)
	if !isRetry(b) || isRetry(b[:len(b)-1]) {
		t.Error("magic")
	}
	b[20] ^= 1
	if isRetry(b) {
		t.Error("any random passes")
	}
}

func keySecret(host string, headers ...string) []plan.Secret {
	s := plan.Secret{Name: "KEY", From: "env:KEY", GuestCanRead: "never"}
	for _, h := range headers {
		i := plan.Injection{Host: host, Header: h}
		if h == "authorization" {
			i.Format = "Bearer {}"
		}
		s.Inject = append(s.Inject, i)
	}
	return []plan.Secret{s}
}

func TestInjection(t *testing.T) {
	o := startOrigin(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k := r.Header.Get("X-Api-Key")
		w.Header().Set("X-Got", fmt.Sprintf("%v %d %v %v %q %q", k == secretValue, len(r.Header["X-Api-Key"]), r.Header["Authorization"],
			r.Header["X_api_key"], r.Header.Get("Accept-Encoding"), r.Header.Get("Range")))
		fmt.Fprint(w, "fine")
	}), "api.test")
	plainOrigin := startOrigin(t, false, echo)
	g := start(t, []plan.Rule{
		pin(allowHost("api.test", "tls", o.port), "127.0.0.1"),
		pin(allowHost("api.test", "http", plainOrigin.port), "127.0.0.1"),
	}, keySecret("api.test", "x-api-key"), nil)
	req, _ := http.NewRequest("GET", "https://"+hostPort("api.test", o.port)+"/", nil)
	req.Header = http.Header{"X-Api-Key": {"placeholder", "second"}, "Authorization": {"Bearer mine"}, "X_api_key": {"third"},
		"Accept-Encoding": {"gzip"}, "Range": {"bytes=0-3"}, "Connection": {"x-api-key"}}
	resp, err := g.client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.Header.Get("X-Got"); got != `true 1 [] [] "identity" ""` {
		t.Errorf("%s", got)
	}
	if e := g.await("request", func(e audit.Event) bool { return e.Event == "request" }); e.Secret != "KEY" || e.Path != "/" {
		t.Errorf("%+v", e)
	}
	// Never over plain HTTP, and never to another host.
	_, b := g.get("http://" + hostPort("api.test", plainOrigin.port) + "/")
	if bytes.Contains(b, []byte("X-Api-Key")) || bytes.Contains(b, []byte(secretValue)) {
		t.Errorf("%s", b)
	}
	for _, e := range g.events() {
		if s := fmt.Sprintf("%+v", e); strings.Contains(s, secretValue) {
			t.Errorf("in the log: %s", s)
		}
	}
}

func TestInjectionPicksTheClientsHeader(t *testing.T) {
	m, err := injectors(keySecret("api.test", "x-api-key", "authorization"), map[string]string{"KEY": "real-value"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ sent, want http.Header }{
		{http.Header{}, http.Header{"X-Api-Key": {"real-value"}}},
		{http.Header{"X-Api-Key": {"p"}}, http.Header{"X-Api-Key": {"real-value"}}},
		{http.Header{"Authorization": {"Bearer p"}}, http.Header{"Authorization": {"Bearer real-value"}}},
		{http.Header{"Authorization": {"p"}, "X-Api-Key": {"p"}, "X": {"y"}}, http.Header{"X-Api-Key": {"real-value"}, "X": {"y"}}},
	} {
		m["api.test"].apply(c.sent)
		if fmt.Sprint(c.sent) != fmt.Sprint(c.want) {
			t.Errorf("%v, want %v", c.sent, c.want)
		}
	}
}

func TestSecretMissing(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test", "free.test")
	for value, code := range map[string]string{"": "secret_missing", "abc": "secret_invalid", "has\nnewline": "secret_invalid"} {
		g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1"), pin(allowHost("free.test", "tls", o.port), "127.0.0.1")},
			keySecret("api.test", "x-api-key"), func(c *Config) { c.Secrets = map[string]string{"KEY": value} })
		resp, b := g.get("https://" + hostPort("api.test", o.port) + "/")
		if resp.StatusCode != 403 || !bytes.Contains(b, []byte(`"code":"`+code+`"`)) || value != "" && bytes.Contains(b, []byte(value)) {
			t.Errorf("%s %s", resp.Status, b)
		}
		if resp, _ := g.get("https://" + hostPort("free.test", o.port) + "/"); resp.StatusCode != 200 {
			t.Errorf("another host: %s", resp.Status)
		}
	}
	if len(o.log()) != 3 {
		t.Errorf("%v", o.log())
	}
}

func TestInspectedRequests(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	g := start(t, []plan.Rule{inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1"))}, nil, nil)
	at := hostPort("api.test", o.port)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(g.ca.CertPEM())
	open := func(protos ...string) *tls.Conn {
		_, _, c := g.connect(at)
		tc := tls.Client(c, &tls.Config{ServerName: "api.test", RootCAs: pool, NextProtos: protos})
		if err := tc.Handshake(); err != nil {
			t.Fatal(err)
		}
		return tc
	}
	if c := open("h2", "http/1.1"); c.ConnectionState().NegotiatedProtocol != "http/1.1" {
		t.Error("HTTP/2 was offered")
	}
	for request, want := range map[string]string{
		"GET /x HTTP/1.1\r\nHost: " + at + "\r\n\r\n":                                                    `"path":"/x"`,
		"GET / HTTP/1.1\r\nHost: denied.test\r\n\r\n":                                                    "host_mismatch",
		"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n":                                                       "host_mismatch", // that is port 443
		"GET https://denied.test/ HTTP/1.1\r\nHost: denied.test\r\n\r\n":                                 "bad_request",
		"GET https://" + at + "/ HTTP/1.1\r\nHost: denied.test\r\n\r\n":                                  "host_mismatch",
		"TRACE / HTTP/1.1\r\nHost: " + at + "\r\n\r\n":                                                   "method_refused",
		"CONNECT denied.test:443 HTTP/1.1\r\nHost: denied.test:443\r\n\r\n":                              "method_refused",
		"GET / HTTP/1.1\r\nHost: " + at + "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n":        "upgrade_refused",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n":                                                               "bad_request",
		"POST / HTTP/1.1\r\nHost: " + at + "\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n": "bad_request",
	} {
		c := open()
		io.WriteString(c, request)
		c.SetReadDeadline(time.Now().Add(patience))
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Errorf("%q: %v", request, err)
			continue
		}
		if b, _ := io.ReadAll(resp.Body); !bytes.Contains(b, []byte(want)) {
			t.Errorf("%q: %s", request, b)
		}
		c.Close()
	}
	// The first request decides nothing about the second.
	c := open()
	br := bufio.NewReader(c)
	for i, host := range []string{at, "denied.test"} {
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		if want := []int{200, 403}[i]; resp.StatusCode != want {
			t.Errorf("%s: %s", host, resp.Status)
		}
	}
	for _, s := range o.log() {
		if s != "GET "+at+" /" && s != "GET "+at+" /x" {
			t.Error(s)
		}
	}
}

func TestUpstreamIsVerified(t *testing.T) {
	o := startOrigin(t, true, echo, "other.test")
	g := start(t, []plan.Rule{inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1"))}, nil, nil)
	resp, b := g.get("https://" + hostPort("api.test", o.port) + "/")
	if resp.StatusCode != 403 || !bytes.Contains(b, []byte("upstream_untrusted")) {
		t.Errorf("%s %s", resp.Status, b)
	}
	if len(o.log()) > 0 {
		t.Error("a request went to a host with another's certificate")
	}
}

// The real value never comes back, however the host cuts or writes it.
func TestReflection(t *testing.T) {
	o := startOrigin(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := r.Header.Get("X-Api-Key")
		switch r.URL.Path {
		case "/header":
			w.Header().Set("X-Echo", "key="+key)
			w.Header().Set(key[:2]+"x", "1")
			w.Header().Set("Location", "https://api.test/?k="+key)
			w.WriteHeader(302)
		case "/bytes":
			for i := range len(key) {
				w.Write([]byte{key[i]})
				w.(http.Flusher).Flush()
			}
		case "/length":
			w.Header().Set("Content-Length", fmt.Sprint(len(key)+4))
			io.WriteString(w, "a:"+key+":b")
		case "/trailer":
			io.WriteString(w, "body")
			w.(http.Flusher).Flush()
			w.Header().Set(http.TrailerPrefix+"X-Sum", key)
		case "/gzip":
			w.Header().Set("Content-Encoding", "gzip")
			io.WriteString(w, "not really")
		case "/prefix":
			io.WriteString(w, key[:len(key)-1]+"!"+key[:5])
		}
	}), "api.test")
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1")}, keySecret("api.test", "x-api-key"), nil)
	stars := strings.Repeat("*", len(secretValue))
	for path, want := range map[string]string{"/bytes": stars, "/length": "a:" + stars + ":b", "/trailer": "body", "/header": "",
		"/prefix": secretValue[:len(secretValue)-1] + "!" + secretValue[:5]} {
		resp, b := g.get("https://" + hostPort("api.test", o.port) + path)
		if string(b) != want {
			t.Errorf("%s: %q", path, b)
		}
		if all := fmt.Sprint(resp.Header, resp.Trailer); strings.Contains(all, secretValue) {
			t.Errorf("%s: %s", path, all)
		}
		if path == "/trailer" && resp.Trailer.Get("X-Sum") != stars {
			t.Errorf("%v", resp.Trailer)
		}
		if path != "/prefix" {
			g.await("reflected "+path, func(e audit.Event) bool { return e.Path == path && e.Code == "secret_reflected" })
		}
	}
	if resp, b := g.get("https://" + hostPort("api.test", o.port) + "/gzip"); resp.StatusCode != 403 || !bytes.Contains(b, []byte("response_encoded")) {
		t.Errorf("%s %s", resp.Status, b)
	}
}

func TestMasker(t *testing.T) {
	m := newFinder([]string{`va"lue/with+odd`, "abcabcabd"})
	for in, want := range map[string]string{
		`{"k":"va\"lue/with+odd"}`:  `{"k":"` + strings.Repeat("*", 16) + `"}`,
		`k=va%22lue%2Fwith%2Bodd&x`: `k=` + strings.Repeat("*", 21) + `&x`,
		"abcabcabcabd":              "abc*********",
		"YWJjYWJjYWJk":              "************",
		"abcabcab":                  "abcabcab",
		"":                          "",
		"abcabcabdabcabcabd":        strings.Repeat("*", 18),
	} {
		for step := 1; step <= len(in)+1; step++ {
			r := newMaskReader(&stepReader{s: in, step: step}, m)
			got, err := io.ReadAll(r)
			if err != nil || string(got) != want {
				t.Errorf("%q by %d: %q %v", in, step, got, err)
			}
		}
	}
	if newFinder([]string{"", "abc"}) != nil {
		t.Error("looks for nothing")
	}
}

type stepReader struct {
	s    string
	step int
}

func (r *stepReader) Read(p []byte) (int, error) {
	if r.s == "" {
		return 0, io.EOF
	}
	n := copy(p, r.s[:min(r.step, len(r.s))])
	r.s = r.s[n:]
	return n, nil
}

// A stream is not held up by bytes that are no secret's beginning.
func TestInjectedStreaming(t *testing.T) {
	step := make(chan string)
	o := startOrigin(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush()
		for s := range step {
			io.WriteString(w, s)
			w.(http.Flusher).Flush()
		}
	}), "api.test")
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1")}, keySecret("api.test", "x-api-key"), nil)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "GET", "https://"+hostPort("api.test", o.port)+"/", nil)
	resp, err := g.client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	buf := make([]byte, 100)
	for i := range 3 {
		want := fmt.Sprintf("data: %d\n\n", i)
		step <- want
		if n, err := resp.Body.Read(buf); err != nil || string(buf[:n]) != want {
			t.Fatalf("%q %v", buf[:n], err)
		}
	}
	close(step)
}

func TestNewNeedsCA(t *testing.T) {
	b := &plan.Bottle{Egress: plan.Policy{Rules: []plan.Rule{inspect(allowHost("api.test", "tls", 443))}}}
	if _, err := New(Config{Bottle: b, RootsPEM: [][]byte{world().pem}}); err == nil {
		t.Error("an inspected host without a CA")
	}
	authority, err := ca.New("b", []string{"api.test"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Bottle: b, CA: authority}); err == nil {
		t.Error("an inspected host without roots to verify it with")
	}
	if _, err := New(Config{Bottle: &plan.Bottle{}}); err != nil {
		t.Errorf("a gate that verifies nothing needs no roots: %v", err)
	}
}

// Only ASCII is the same in either case.
func TestServerNameInOtherLetters(t *testing.T) {
	o := startOrigin(t, true, echo, "k.test")
	g := start(t, []plan.Rule{pin(allowHost("k.test", "tls", o.port), "127.0.0.1")}, nil, nil)
	for name, refused := range map[string]bool{"K.test": false, "\u212a.test": true} {
		status, _, c := g.connect(hostPort("k.test", o.port))
		if status != 200 {
			t.Fatal(status)
		}
		stand := strings.Repeat("x", len(name)-len(".test")) + ".test"
		_, _ = c.Write(bytes.Replace(clientHello(t, &tls.Config{ServerName: stand}), []byte(stand), []byte(name), 1))
		got := make([]byte, 7)
		if _, err := io.ReadFull(c, got); err != nil || bytes.Equal(got, alert(alertAccessDenied)) != refused {
			t.Errorf("%q: %x %v", name, got, err)
		}
	}
}
