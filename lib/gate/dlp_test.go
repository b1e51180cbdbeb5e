package gate

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/netip"
	"net/textproto"
	"os"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

// githubPAT is of the form of a key of GitHub's, and none.
const githubPAT = "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a"

func send(t testing.TB, g *rig, method, url string, body io.Reader, edit func(*http.Request)) (int, string, *refusalBody) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		edit(r)
	}
	c := g.client()
	defer c.CloseIdleConnections()
	resp, err := c.Do(r)
	if err != nil {
		t.Fatalf("%s %.100s: %v", method, url, err)
	}
	defer resp.Body.Close()
	if resp.Header.Get("X-Bottle-Decision") != "" {
		f := decode(t, resp)
		return resp.StatusCode, "", f
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b), nil
}

func gzipped(s string) io.Reader {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	io.WriteString(w, s)
	w.Close()
	return &b
}

// chunked hides the length of what it holds.
type chunked struct{ io.Reader }

// TestScreen: nothing of a request that holds a secret leaves, the answer and
// the log name the rule and the place, and neither says what it was.
func TestScreen(t *testing.T) {
	const other = "another secret, of words"
	plain, secure := startOrigin(t, false, echo), startOrigin(t, true, echo, "api.test", "key.test")
	secrets := append(keySecret("key.test", "x-api-key"), plan.Secret{Name: "OTHER", From: "env:OTHER", GuestCanRead: "never"})
	g := start(t, []plan.Rule{
		pin(allowHost("ok.test", "http", plain.port), "127.0.0.1"),
		inspect(pin(allowHost("api.test", "tls", secure.port), "127.0.0.1")),
		pin(allowHost("key.test", "tls", secure.port), "127.0.0.1"),
	}, secrets, func(c *Config) { c.Secrets = map[string]string{"KEY": secretValue, "OTHER": other} })
	form := func(value string) (io.Reader, func(*http.Request)) {
		var b bytes.Buffer
		w := multipart.NewWriter(&b)
		p, _ := w.CreatePart(textproto.MIMEHeader{"Content-Disposition": {`form-data; name="f"; filename="x"`}, "Content-Transfer-Encoding": {"base64"}})
		io.WriteString(p, base64.StdEncoding.EncodeToString([]byte(value)))
		w.Close()
		return &b, func(r *http.Request) { r.Header.Set("Content-Type", w.FormDataContentType()) }
	}
	header := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header[name] = []string{value} }
	}
	type attempt struct {
		path, where string
		body        io.Reader
		edit        func(*http.Request)
	}
	for value, rule := range map[string]string{githubPAT: "github-pat", other: "secret:OTHER", secretValue: "secret:KEY"} {
		part, partType := form(value)
		escaped := ""
		for i := range len(value) {
			escaped += fmt.Sprintf("%%%02x", value[i])
		}
		for name, a := range map[string]attempt{
			"path":          {"/a/" + escaped, "the address", nil, nil},
			"query":         {"/?q=" + base64.RawURLEncoding.EncodeToString([]byte(value)), "the address", nil, nil},
			"header":        {"/", "header x-note", nil, header("X-Note", "it is "+value)},
			"header base64": {"/", "header x-note", nil, header("X-Note", base64.StdEncoding.EncodeToString([]byte("it is "+value)))},
			"header name":   {"/", "the name of a header", nil, header("X-"+hex.EncodeToString([]byte(value)), "1")},
			"body":          {"/", "the body", strings.NewReader(`{"text":"` + escaped + `"}`), nil},
			"chunks":        {"/", "the body", chunked{strings.NewReader(strings.Repeat("x ", 5000) + hex.EncodeToString([]byte(value)))}, nil},
			"gzip":          {"/", "the body", gzipped("a text " + value), header("Content-Encoding", "gzip")},
			"form":          {"/", "the body", part, partType},
			"large":         {"/", "the body", strings.NewReader(strings.Repeat("large ", 400<<10) + hex.EncodeToString([]byte(value))), nil},
		} {
			for _, url := range []string{"http://" + hostPort("ok.test", plain.port), "https://" + hostPort("api.test", secure.port), "https://" + hostPort("key.test", secure.port)} {
				if a.body != nil {
					b, err := io.ReadAll(a.body)
					if err != nil {
						t.Fatal(err)
					}
					a.body = bytes.NewReader(b)
				}
				body := a.body
				if name == "chunks" {
					body = chunked{body}
				}
				status, answer, f := send(t, g, "POST", url+a.path, body, a.edit)
				if f == nil || status != 403 || f.Error.Code != "dlp_blocked" || !strings.HasPrefix(f.Error.Reason, a.where+" holds ") {
					t.Errorf("%s, %s to %s: %d %q %+v", rule, name, url, status, answer, f)
				} else if want := strings.TrimPrefix(rule, "secret:"); !strings.Contains(f.Error.Reason, want) {
					t.Errorf("%s: %q", rule, f.Error.Reason)
				}
				if a.body != nil {
					a.body.(*bytes.Reader).Seek(0, io.SeekStart)
				}
			}
		}
	}
	if n := len(plain.log()) + len(secure.log()); n != 0 {
		t.Errorf("%d requests reached an origin", n)
	}
	if n := g.gate.screen.held.Load(); n != 0 {
		t.Errorf("%d bytes are held for nothing", n)
	}
	b, err := os.ReadFile(g.log)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{githubPAT, other, secretValue, hex.EncodeToString([]byte(other)), "%61%6e%6f", "anothersecret"} {
		if bytes.Contains(b, []byte(s)) {
			t.Errorf("%q is in the log", s)
		}
	}
	found := map[string]int{}
	for _, e := range g.events() {
		if e.Code == "dlp_blocked" {
			found[e.Finding]++
		}
	}
	if len(found) != 3 || found["github-pat"] != 30 || found["secret:OTHER"] != 30 || found["secret:KEY"] != 30 {
		t.Errorf("findings in the log: %v", found)
	}
}

// TestScreenPasses: what holds nothing arrives as it was sent, the gate's own
// secret goes into its header, and what the manifest lets pass passes.
func TestScreenPasses(t *testing.T) {
	o := startOrigin(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %d %v %x", r.Header.Get("X-Api-Key"), len(b), r.TransferEncoding, b[:min(len(b), 8)])
	}), "api.test", "key.test", "jwt.test", "all.test")
	may := inspect(pin(allowHost("jwt.test", "tls", o.port), "127.0.0.1"))
	may.DLPAllow, may.DLPAllowFrom = []string{"github-pat"}, "here"
	g := start(t, []plan.Rule{
		inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1")), pin(allowHost("key.test", "tls", o.port), "127.0.0.1"),
		may, inspect(unscreened(pin(allowHost("all.test", "tls", o.port), "127.0.0.1"))),
	}, keySecret("key.test", "x-api-key"), nil)
	noise := make([]byte, 3<<20)
	_, _ = rand.Read(noise)
	at := func(host string) string { return "https://" + hostPort(host, o.port) + "/" }
	for _, size := range []int{0, 1, 1000, keptInHeap, keptInHeap + 1, 3 << 20} {
		for _, hide := range []bool{false, true} {
			var body io.Reader = bytes.NewReader(noise[:size])
			if hide {
				body = chunked{body}
			}
			status, answer, f := send(t, g, "PUT", at("api.test"), body, nil)
			if f != nil || status != 200 || !strings.Contains(answer, fmt.Sprintf(" %d [", size)) || !strings.HasSuffix(answer, fmt.Sprintf("%x", noise[:min(size, 8)])) {
				t.Errorf("%d bytes, chunked %v: %d %s %+v", size, hide, status, answer, f)
			}
		}
	}
	if status, answer, f := send(t, g, "POST", at("key.test"), strings.NewReader("{}"), nil); status != 200 || !strings.HasPrefix(answer, strings.Repeat("*", len(secretValue))) {
		t.Errorf("%d %s %+v", status, answer, f)
	}
	if status, _, f := send(t, g, "POST", at("jwt.test"), strings.NewReader(githubPAT), nil); status != 200 {
		t.Errorf("a rule that is allowed: %d %+v", status, f)
	}
	if _, _, f := send(t, g, "POST", at("jwt.test"), strings.NewReader(secretValue), nil); f == nil || f.Error.Code != "dlp_blocked" {
		t.Errorf("the own secret passes where another rule is allowed: %+v", f)
	}
	if status, _, f := send(t, g, "POST", at("all.test"), strings.NewReader(githubPAT+secretValue), nil); status != 200 {
		t.Errorf("where nothing is looked through: %d %+v", status, f)
	}
	if n := g.gate.screen.held.Load(); n != 0 {
		t.Errorf("%d bytes are held for nothing", n)
	}
}

// TestUnscannable: what cannot be judged does not leave.
func TestUnscannable(t *testing.T) {
	o := startOrigin(t, false, echo)
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	g.gate.screen.most = 1 << 20
	bomb := gzipped(strings.Repeat("\x00", 100<<20))
	for name, c := range map[string]struct {
		body     io.Reader
		encoding string
		says     string
	}{
		"large":        {bytes.NewReader(make([]byte, 1<<20+1)), "", "larger"},
		"large chunks": {chunked{bytes.NewReader(make([]byte, 1<<20+1))}, "", "larger"},
		"brotli":       {strings.NewReader("x"), "br", "Content-Encoding"},
		"no gzip":      {strings.NewReader("x"), "gzip", "Content-Encoding"},
		"bomb":         {bomb, "gzip", "expands"},
	} {
		status, _, f := send(t, g, "POST", "http://"+hostPort("ok.test", o.port)+"/up", c.body, func(r *http.Request) {
			if c.encoding != "" {
				r.Header.Set("Content-Encoding", c.encoding)
			}
		})
		if status != 403 || f == nil || f.Error.Code != "dlp_unscannable" || !strings.Contains(f.Error.Reason, c.says) || !strings.Contains(f.Error.Hint, `"allow": ["*"]`) {
			t.Errorf("%s: %d %+v", name, status, f)
		}
	}
	g.gate.screen.held.Store(maxHeld)
	status, _, f := send(t, g, "POST", "http://"+hostPort("ok.test", o.port)+"/up", strings.NewReader("x"), nil)
	if status != 503 || f == nil || f.Error.Code != "dlp_busy" {
		t.Errorf("%d %+v", status, f)
	}
	if n := len(o.log()); n != 0 {
		t.Errorf("%d requests reached the origin", n)
	}
	if n := g.gate.screen.held.Load(); n != maxHeld {
		t.Errorf("%d bytes are held for nothing", n-maxHeld)
	}
}

// TestScreenNames: a name below a wildcard that carries a secret is asked of
// nobody.
func TestScreenNames(t *testing.T) {
	const own = "Correct-Horse_7"
	dns := &fakeDNS{answers: map[string][][]netip.Addr{}}
	o := startOrigin(t, false, echo)
	some := allowHost("*.some.test", "tls", 443)
	some.DLPAllow, some.DLPAllowFrom = []string{"*"}, "here"
	g := start(t, []plan.Rule{allowHost("*.wild.test", "tls", 443), allowHost("*.tcp.test", "tcp", 25), allowHost("*.http.test", "http", o.port), some}, nil,
		func(c *Config) { c.Resolver, c.Secrets = dns, map[string]string{"KEY": own} })
	b32 := strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString([]byte(own)))
	names := map[string]string{
		"plain": own, "base32": b32, "hex": hex.EncodeToString([]byte(own)), "split": b32[:9] + "." + b32[9:] + ".x",
		"base64": base64.RawURLEncoding.EncodeToString([]byte("id=" + own)), "a rule": "xoxb-1234567890123-1234567890123abcdefghij0123",
	}
	for name, label := range names {
		for _, base := range []string{".wild.test:443", ".tcp.test:25", ".http.test:" + fmt.Sprint(o.port)} {
			status, f, _ := g.connect(label + base)
			if status != 403 || f.Error.Code != "dlp_blocked" || !strings.HasPrefix(f.Error.Host, "*.") {
				t.Errorf("%s%s: %d %+v", name, base, status, f)
			}
		}
		resp, err := g.client().Get("http://" + label + ".http.test:" + fmt.Sprint(o.port) + "/")
		if err != nil {
			t.Fatal(err)
		}
		if f := decode(t, resp); f.Error.Code != "dlp_blocked" {
			t.Errorf("%s: %+v", name, f)
		}
		resp.Body.Close()
	}
	if len(dns.asked) != 0 {
		t.Errorf("asked for %v", dns.asked)
	}
	b, err := os.ReadFile(g.log)
	if err != nil {
		t.Fatal(err)
	}
	for name, label := range names {
		if bytes.Contains(bytes.ToLower(b), []byte(strings.ToLower(label))) {
			t.Errorf("the log holds the labels (%s)", name)
		}
	}
	if e := g.await("blocked", func(e audit.Event) bool { return e.Code == "dlp_blocked" }); e.Host != "*.wild.test" && e.Host != "*.tcp.test" && e.Host != "*.http.test" {
		t.Errorf("%+v", e)
	}
	for _, target := range []string{"harmless.wild.test:443", b32 + ".some.test:443"} {
		if status, f, _ := g.connect(target); status != 403 || f.Error.Code != "upstream_unresolvable" {
			t.Errorf("%s: %d %+v", target, status, f)
		}
	}
}

// A body that was looked through and does not leave, for want of a log, is held no
// longer than its request.
func TestNoLogHoldsNoBody(t *testing.T) {
	o := startOrigin(t, false, echo)
	for _, size := range []int{1000, keptInHeap + 1000} {
		disk := &full{}
		disk.room.Store(1) // for the gate's start
		g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, func(c *Config) {
			c.Audit = audit.New(disk, audit.Options{Bottle: "t-01234567"})
		})
		_, _, f := send(t, g, "POST", "http://"+hostPort("ok.test", o.port)+"/", strings.NewReader(strings.Repeat("x", size)), nil)
		if f == nil || f.Error.Code != "audit_failed" {
			t.Fatalf("%+v", f)
		}
		g.done <- <-g.done
		if n := g.gate.screen.held.Load(); n != 0 {
			t.Errorf("%d bytes are held for nothing", n)
		}
	}
	if len(o.log()) != 0 {
		t.Errorf("%v", o.log())
	}
}
