package gate

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

// exchangeRaw sends bytes as they are and reads all answers until the gate
// closes or, once want has come, nothing more comes.
func (g *rig) exchangeRaw(sent, want string) string {
	g.t.Helper()
	c := g.dial()
	go io.WriteString(c, sent)
	var out bytes.Buffer
	buf := make([]byte, 4096)
	for {
		wait := patience
		if strings.Contains(out.String(), want) {
			wait = 400 * time.Millisecond
		}
		c.SetReadDeadline(time.Now().Add(wait))
		n, err := c.Read(buf)
		out.Write(buf[:n])
		if err != nil {
			return out.String()
		}
	}
}

func TestHostileRequests(t *testing.T) {
	o := startOrigin(t, false, echo)
	at := hostPort("ok.test", o.port)
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	get := func(target, rest string) string { return "GET " + target + " HTTP/1.1\r\n" + rest + "\r\n" }
	url := "http://" + at + "/"
	host := "Host: " + at + "\r\n"

	if got := g.exchangeRaw(get(url, host+"Connection: close\r\n"), "\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 200 ") {
		t.Fatalf("control: %s", got)
	}
	reached := len(o.log())
	for name, c := range map[string]struct{ sent, status, code string }{
		"both lengths":             {"POST " + url + " HTTP/1.1\r\n" + host + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400", "bad_request"},
		"two lengths":              {"POST " + url + " HTTP/1.1\r\n" + host + "Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd", "400", "bad_request"},
		"same length twice":        {"POST " + url + " HTTP/1.1\r\n" + host + "Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd", "400", "bad_request"},
		"length list":              {"POST " + url + " HTTP/1.1\r\n" + host + "Content-Length: 4, 4\r\n\r\nabcd", "400", "bad_request"},
		"signed length":            {"POST " + url + " HTTP/1.1\r\n" + host + "Content-Length: +4\r\n\r\nabcd", "400", "bad_request"},
		"empty length":             {"POST " + url + " HTTP/1.1\r\n" + host + "Content-Length:\r\n\r\nabcd", "400", "bad_request"},
		"huge length":              {"POST " + url + " HTTP/1.1\r\n" + host + "Content-Length: 99999999999999999999\r\n\r\n", "400", "bad_request"},
		"odd coding":               {"POST " + url + " HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n", "400", "bad_request"},
		"two codings":              {"POST " + url + " HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n", "400", "bad_request"},
		"coding twice":             {"POST " + url + " HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", "400", "bad_request"},
		"coding in HTTP/1.0":       {"POST " + url + " HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400", "bad_request"},
		"bad chunk size":           {"POST " + url + " HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n", "400", "bad_request"},
		"chunk size 0x":            {"POST " + url + " HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0x4\r\nabcd\r\n0\r\n\r\n", "400", "bad_request"},
		"chunk extension":          {"POST " + url + " HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n4;a=b\r\nabcd\r\n0\r\n\r\n", "400", "bad_request"},
		"chunk too long":           {"POST " + url + " HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n4\r\nabcdX\r\n0\r\n\r\n", "400", "bad_request"},
		"chunk with bare LF":       {"POST " + url + " HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n4\nabcd\r\n0\r\n\r\n", "400", "bad_request"},
		"length in trailer":        {"POST " + url + " HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\nContent-Length: 3\r\n\r\n", "400", "bad_request"},
		"folded line":              {get(url, host+"X: a\r\n b\r\n"), "400", "bad_request"},
		"blank before colon":       {get(url, host+"X : a\r\n"), "400", "bad_request"},
		"blank before first":       {get(url, " "+host), "400", "bad_request"},
		"no colon":                 {get(url, host+"X\r\n"), "400", "bad_request"},
		"empty name":               {get(url, host+": x\r\n"), "400", "bad_request"},
		"NUL":                      {get(url, host+"X: a\x00b\r\n"), "400", "bad_request"},
		"bare CR":                  {get(url, host+"X: a\rb\r\n"), "400", "bad_request"},
		"bare LF":                  {"GET " + url + " HTTP/1.1\n" + "Host: " + at + "\n\n", "400", "bad_request"},
		"DEL":                      {get(url, host+"X: a\x7f\r\n"), "400", "bad_request"},
		"empty first line":         {"\r\n" + get(url, host), "400", "bad_request"},
		"tab in request line":      {"GET\t" + url + " HTTP/1.1\r\n" + host + "\r\n", "400", "bad_request"},
		"two blanks":               {"GET  " + url + " HTTP/1.1\r\n" + host + "\r\n", "400", "bad_request"},
		"HTTP/0.9":                 {"GET " + url + "\r\n\r\n", "400", "bad_request"},
		"HTTP/2.0":                 {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400", "bad_request"},
		"HTTP/1.2":                 {"GET " + url + " HTTP/1.2\r\n" + host + "\r\n", "400", "bad_request"},
		"fragment":                 {get(url+"#x", host), "400", "bad_request"},
		"two hosts":                {get(url, host+"Host: other.test\r\n"), "400", "bad_request"},
		"no host":                  {get(url, ""), "400", "bad_request"},
		"host differs":             {get(url, "Host: denied.test\r\n"), "403", "host_mismatch"},
		"host without the port":    {get(url, "Host: ok.test\r\n"), "403", "host_mismatch"},
		"target differs":           {get("http://denied.test/", host), "403", "host_mismatch"},
		"user in target":           {get("http://u:p@"+at+"/", host), "403", "host_mismatch"},
		"user in both":             {get("http://u@"+at+"/", "Host: u@"+at+"\r\n"), "400", "bad_request"},
		"origin form":              {get("/", host), "400", "bad_request"},
		"asterisk":                 {"OPTIONS * HTTP/1.1\r\n" + host + "\r\n", "400", "bad_request"},
		"https in absolute form":   {get("https://"+at+"/", host), "400", "bad_request"},
		"ftp":                      {get("ftp://"+at+"/", host), "400", "bad_request"},
		"TRACE":                    {"TRACE " + url + " HTTP/1.1\r\n" + host + "\r\n", "403", "method_refused"},
		"h2c":                      {get(url, host+"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"), "403", "upgrade_refused"},
		"websocket":                {get(url, host+"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"), "403", "upgrade_refused"},
		"CONNECT without port":     {"CONNECT ok.test HTTP/1.1\r\n\r\n", "400", "bad_request"},
		"CONNECT port 0":           {"CONNECT ok.test:0 HTTP/1.1\r\n\r\n", "400", "bad_request"},
		"CONNECT port 070":         {"CONNECT ok.test:080 HTTP/1.1\r\n\r\n", "400", "bad_request"},
		"CONNECT port 65536":       {"CONNECT ok.test:65536 HTTP/1.1\r\n\r\n", "400", "bad_request"},
		"CONNECT user":             {"CONNECT u@" + at + " HTTP/1.1\r\n\r\n", "400", "bad_request"},
		"CONNECT two dots":         {"CONNECT ok.test..:443 HTTP/1.1\r\n\r\n", "400", "bad_request"},
		"host with odd characters": {get("/", "Host: a<b\r\n"), "400", "bad_request"},
		"odd expectation":          {get(url, host+"Expect: the unexpected\r\n"), "400", "bad_request"},
		"broken escape":            {get(url+"%zz", host), "400", "bad_request"},
		"broken address":           {get("http://[::1/", host), "400", "bad_request"},
		"CONNECT with body":        {"CONNECT " + at + " HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", "400", "bad_request"},
		"CONNECT to a path":        {"CONNECT /etc/passwd HTTP/1.1\r\n\r\n", "400", "bad_request"},
		"SOCKS5":                   {"\x05\x01\x00", "400", "bad_request"},
		"TLS to the proxy":         {"\x16\x03\x01\x00\x05hello", "400", "bad_request"},
		"head too large":           {get(url, host+"X: "+strings.Repeat("a", maxHead)+"\r\n"), "431", "head_too_large"},
		"too many lines":           {get(url, host+strings.Repeat("X: a\r\n", maxHeaders)), "400", "bad_request"},
		"smuggled second request":  {"POST " + url + " HTTP/1.1\r\n" + host + "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET http://denied.test/ HTTP/1.1\r\nHost: denied.test\r\n\r\n", "400", "bad_request"},
	} {
		t.Run(name, func(t *testing.T) {
			got := g.exchangeRaw(c.sent, `"code":"`+c.code+`"`)
			if !strings.HasPrefix(got, "HTTP/1.1 "+c.status+" ") || !strings.Contains(got, `"code":"`+c.code+`"`) ||
				!strings.Contains(got, "X-Bottle-Decision: deny\r\n") || strings.Count(got, "HTTP/1.1 ") != 1 {
				t.Errorf("%s", got)
			}
		})
	}
	for _, s := range o.log()[reached:] {
		// A body that turns out bad is found after the head has left; the origin
		// must not have seen it whole.
		if !strings.HasPrefix(s, "POST ok.test:") {
			t.Errorf("reached the origin: %s", s)
		}
	}
	for _, e := range g.events() {
		if e.Host == "denied.test" && e.Verdict == "allow" {
			t.Errorf("%+v", e)
		}
	}
}

// The second request of a connection is decided like the first.
func TestKeepAlive(t *testing.T) {
	o := startOrigin(t, false, echo)
	at := hostPort("ok.test", o.port)
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	c := g.dial()
	br := bufio.NewReader(c)
	for i, target := range []string{at, "denied.test", at} {
		fmt.Fprintf(c, "POST http://%s/%d HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", target, i, target)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(i, err)
		}
		b, _ := io.ReadAll(resp.Body)
		if want := map[bool]int{true: 200, false: 403}[target == at]; resp.StatusCode != want {
			t.Fatalf("%d: %s %s", i, resp.Status, b)
		}
		if target != at {
			// The gate does not read a body that it refuses.
			c = g.dial()
			br = bufio.NewReader(c)
		}
	}
	// Pipelined, the denied one in the middle.
	one := func(h, more string) string {
		return "GET http://" + h + "/ HTTP/1.1\r\nHost: " + h + "\r\n" + more + "\r\n"
	}
	raw := g.dial()
	go io.WriteString(raw, one(at, "")+one("denied.test", "")+one(at, "Connection: close\r\n"))
	all, _ := io.ReadAll(raw)
	got := string(all)
	if strings.Count(got, "HTTP/1.1 200") != 2 || strings.Count(got, "HTTP/1.1 403") != 1 {
		t.Errorf("%s", got)
	}
	for _, s := range o.log() {
		if strings.Contains(s, "denied") {
			t.Error(s)
		}
	}
}

func TestHeadersOnTheWay(t *testing.T) {
	o := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "X-Hop")
		w.Header().Set("X-Hop", "1")
		w.Header().Set("Proxy-Authenticate", "Basic")
		w.Header().Set("Set-Cookie", "a=b")
		echo(w, r)
	}))
	at := hostPort("ok.test", o.port)
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	got := g.exchangeRaw("GET http://"+at+"/p HTTP/1.1\r\nHost: OK.test:"+fmt.Sprint(o.port)+
		"\r\nConnection: keep-alive, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 5\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\nTE: trailers\r\nAccept-Encoding: gzip\r\n\r\n", `"path":"/p"`)
	for _, want := range []string{"Set-Cookie: a=b", `"Accept-Encoding":["gzip"]`, `"host":"` + at} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in %s", want, got)
		}
	}
	for _, bad := range []string{"X-Hop", "Proxy-Authenticate", "X-Mine", "Keep-Alive\"", "Proxy-", "\"Te\"", "Via", "X-Forwarded", "Go-http-client"} {
		if strings.Contains(got, bad) {
			t.Errorf("%s in %s", bad, got)
		}
	}
}

// Python before 3.12 and nc ask for tunnels in HTTP/1.0 without a Host.
func TestHTTP10(t *testing.T) {
	o := startOrigin(t, false, echo)
	at := hostPort("ok.test", o.port)
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	if got := g.exchangeRaw("GET http://"+at+"/ HTTP/1.0\r\n\r\n", "\r\n\r\n"); !strings.Contains(got, " 200 OK\r\n") {
		t.Errorf("%s", got)
	}
	got := g.exchangeRaw("CONNECT "+at+" HTTP/1.0\r\n\r\nGET /in HTTP/1.1\r\nHost: "+at+"\r\nConnection: close\r\n\r\n", `"path":"/in"`)
	if !strings.HasPrefix(got, "HTTP/1.1 200 Connection established\r\n\r\nHTTP/1.1 200 OK\r\n") || !strings.Contains(got, `"path":"/in"`) {
		t.Errorf("%s", got)
	}
}

// Requests of an http rule inside a tunnel are held against the tunnel.
func TestPlainTunnel(t *testing.T) {
	o := startOrigin(t, false, echo)
	at := hostPort("ok.test", o.port)
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	for request, code := range map[string]string{
		"GET / HTTP/1.1\r\nHost: denied.test\r\n\r\n":                       "host_mismatch",
		"GET / HTTP/1.1\r\nHost: ok.test\r\n\r\n":                           "host_mismatch",
		"GET http://denied.test/ HTTP/1.1\r\nHost: denied.test\r\n\r\n":     "bad_request",
		"CONNECT denied.test:443 HTTP/1.1\r\nHost: denied.test:443\r\n\r\n": "method_refused",
		"SSH-2.0-x\r\n": "bad_request",
	} {
		got := g.exchangeRaw("CONNECT "+at+" HTTP/1.1\r\n\r\n"+request, `"code":"`+code+`"`)
		if !strings.Contains(got, `"code":"`+code+`"`) || !strings.HasPrefix(got, "HTTP/1.1 200") {
			t.Errorf("%q: %s", request, got)
		}
	}
	if len(o.log()) > 0 {
		t.Errorf("%v", o.log())
	}
}

func TestBodies(t *testing.T) {
	o := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		n, _ := io.Copy(w, r.Body)
		w.Header().Set(http.TrailerPrefix+"X-Sum", fmt.Sprint(n))
	}))
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<19) // 8 MiB
	for name, body := range map[string]io.Reader{"length": bytes.NewReader(big), "chunked": io.MultiReader(bytes.NewReader(big))} {
		resp, err := g.client().Post("http://"+hostPort("ok.test", o.port)+"/", "text/plain", body)
		if err != nil {
			t.Fatal(name, err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil || !bytes.Equal(b, big) || resp.Trailer.Get("X-Sum") != fmt.Sprint(len(big)) {
			t.Errorf("%s: %d bytes, %v, trailer %v", name, len(b), err, resp.Trailer)
		}
	}
	e := g.await("close", func(e audit.Event) bool { return e.Event == "close" && e.BytesIn == int64(len(big)) })
	if e.BytesOut != int64(len(big)) || e.Status != 200 {
		t.Errorf("%+v", e)
	}
}

// Half an answer must not look like a whole one.
func TestOriginBreaksOff(t *testing.T) {
	o := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "half")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}))
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	resp, err := g.client().Get("http://" + hostPort("ok.test", o.port) + "/")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("read %q without an error", b)
	}
}

// Events arrive when they are sent, and so does the head before the first one.
func TestStreaming(t *testing.T) {
	step := make(chan string)
	o := startOrigin(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", r.URL.Query().Get("type"))
		w.(http.Flusher).Flush()
		for s := range step {
			if s == "" {
				return
			}
			io.WriteString(w, s)
			w.(http.Flusher).Flush()
		}
	}))
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	for _, kind := range []string{"text/event-stream", "application/x-ndjson"} {
		resp, err := g.client().Get("http://" + hostPort("ok.test", o.port) + "/?type=" + kind)
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		for i := range 3 {
			want := fmt.Sprintf("data: %d\n\n", i)
			step <- want
			n, err := resp.Body.Read(buf)
			if err != nil || string(buf[:n]) != want {
				t.Fatalf("%s: %q %v", kind, buf[:n], err)
			}
		}
		step <- ""
		resp.Body.Close()
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	o := startOrigin(t, false, http.RedirectHandler("http://denied.test/x", 302))
	g := start(t, []plan.Rule{pin(allowHost("ok.test", "http", o.port), "127.0.0.1")}, nil, nil)
	resp, _ := g.get("http://" + hostPort("ok.test", o.port) + "/")
	if resp.StatusCode != 302 || resp.Header.Get("Location") != "http://denied.test/x" {
		t.Errorf("%s", resp.Status)
	}
}

func TestFramingFeedsWhole(t *testing.T) {
	const ok = "POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n" +
		"POST http://a.test/ HTTP/1.1\r\nhOST:a.test:80\r\nContent-Length: 3\r\n\r\nabcGET http://A.test./ HTTP/1.1\r\nHost: a.test\r\n\r\n" +
		"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test\r\n\r\n\x16\x03\x01\x00\x00anything\x00\n"
	for _, step := range []int{1, 2, 3, 7, len(ok)} {
		var f framing
		for at := 0; at < len(ok); at += step {
			p := []byte(ok[at:min(at+step, len(ok))])
			if n, bad := f.feed(p); bad != nil || n != len(p) {
				t.Fatalf("step %d at %d: %+v", step, at+n, bad)
			}
		}
		if f.state != inTunnel {
			t.Errorf("state %d", f.state)
		}
	}
}

// Whatever framing lets through, net/http reads in the same way.
func FuzzFraming(f *testing.F) {
	f.Add("GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n", 3)
	f.Add("POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\n\r\nabcGET http://a.test/2 HTTP/1.1\r\nHost: a.test\r\n\r\n", 5)
	f.Add("POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET http://a.test/2 HTTP/1.1\r\nHost: a.test\r\n\r\n", 1)
	f.Add("POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 9)
	f.Add("CONNECT a.test:1 HTTP/1.1\r\n\r\nxyz", 2)
	f.Add("POST http://a.test/ HTTP/1.0\r\nContent-Length: 1\r\n\r\na", 2)
	f.Fuzz(func(t *testing.T, s string, step int) {
		if step < 1 || step > 1<<20 {
			step = 1
		}
		var fr framing
		var passed []byte
		ends := 0 // requests that framing saw the end of
		for at := 0; at < len(s); at += step {
			p := []byte(s[at:min(at+step, len(s))])
			for i := range p { // by byte, to count the ends
				wasIdle := fr.idle()
				if n, bad := fr.feed(p[i : i+1]); bad != nil || n != 1 {
					goto done
				}
				passed = append(passed, p[i])
				if fr.state == inTunnel {
					goto done
				}
				if !wasIdle && fr.idle() {
					ends++
				}
			}
		}
	done:
		br := bufio.NewReader(bytes.NewReader(passed))
		for i := 0; i < ends; i++ {
			r, err := http.ReadRequest(br)
			if err != nil {
				t.Fatalf("request %d: net/http would refuse it in its own words: %v\n%q", i, err, passed)
			}
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				t.Fatalf("request %d: framing saw it end, net/http did not: %v\n%q", i, err, passed)
			}
		}
		if fr.idle() && br.Buffered() > 0 {
			rest, _ := io.ReadAll(br)
			t.Fatalf("net/http sees more after %d requests: %q\n%q", ends, rest, passed)
		}
	})
}
