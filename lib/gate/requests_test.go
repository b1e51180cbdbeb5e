package gate

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

func requests(r plan.Rule, entries ...string) plan.Rule {
	r.Requests, r.RequestsFrom = entries, "bottle.json:2:2 requests"
	return r
}

// inside opens an inspected tunnel and speaks TLS in it as a guest does.
func (g *rig) inside(host string, port int) net.Conn {
	g.t.Helper()
	status, f, c := g.connect(hostPort(host, port))
	if status != 200 {
		g.t.Fatalf("CONNECT: %d %+v", status, f)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(g.ca.CertPEM())
	tc := tls.Client(c, &tls.Config{ServerName: host, RootCAs: pool})
	if err := tc.Handshake(); err != nil {
		g.t.Fatal(err)
	}
	return tc
}

// raw sends a request as it stands and gives the answer's status, its body, and
// the code of a refusal, "" if it is none.
func raw(t testing.TB, c io.ReadWriter, request string) (status int, body, code string) {
	t.Helper()
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	if resp.Header.Get("X-Bottle-Decision") != "" {
		var f refusalBody
		if err := json.Unmarshal(b, &f); err != nil {
			t.Fatalf("%q: %s", request, b)
		}
		code = f.Error.Code
	}
	return resp.StatusCode, string(b), code
}

// TestRequests: what reaches the origin is what an entry names, over TLS that is
// terminated and in the clear, in a tunnel and in absolute form.
func TestRequests(t *testing.T) {
	secure, clear := startOrigin(t, true, echo, "api.test"), startOrigin(t, false, echo)
	entries := []string{"GET /repos/*", "POST /graphql"}
	g := start(t, []plan.Rule{
		requests(inspect(pin(allowHost("api.test", "tls", secure.port), "127.0.0.1")), entries...),
		requests(pin(allowHost("api.test", "http", clear.port), "127.0.0.1"), entries...),
	}, nil, nil)
	head := func(extra ...string) string { return strings.Join(append(extra, ""), "\r\n") + "\r\n" }
	for _, tt := range []struct{ line, headers, code string }{
		{"GET /repos/o/r", head(), ""},
		{"GET /repos/o/r?q=a%2f..%2f", head(), ""},
		{"HEAD /repos/o", head(), ""},
		{"POST /graphql", head("Content-Length: 0"), ""},
		{"GET /repos/o", head("X-Requested-With: x"), ""},
		{"GET /user?x=/repos/o", head(), "request_not_allowed"},
		{"GET /", head(), "request_not_allowed"},
		{"DELETE /repos/o", head(), "request_not_allowed"},
		{"OPTIONS /repos/o", head(), "request_not_allowed"},
		{"get /repos/o", head(), "request_not_allowed"},
		{"PUT /repos/o", head("Content-Length: 3"), "request_not_allowed"},
		{"GET /repos/../user", head(), "ambiguous_path"},
		{"GET /repos/%2e%2e/user", head(), "ambiguous_path"},
		{"GET /repos/..%2fuser", head(), "ambiguous_path"},
		{"GET /repos/..;x/user", head(), "ambiguous_path"},
		{`GET /repos/..\user`, head(), "ambiguous_path"},
		{"GET /repos//user", head(), "ambiguous_path"},
		{"GET //repos/o", head(), "ambiguous_path"},
		{"GET /repos/%00", head(), "ambiguous_path"},
		{"GET /repos/%c0%af", head(), "ambiguous_path"},
		{"POST /graphql", head("X-HTTP-Method-Override: DELETE", "Content-Length: 0"), "override_refused"},
		{"POST /graphql", head("x_http_method_override: DELETE", "Content-Length: 0"), "override_refused"},
		{"POST /graphql", head("X-HTTP-Method: PUT", "Content-Length: 0"), "override_refused"},
		{"POST /graphql", head("X-Method-Override: PUT", "Content-Length: 0"), "override_refused"},
		{"GET /repos/o", head("X-Original-URL: /user"), "override_refused"},
		{"GET /repos/o", head("X-Rewrite-Url: /user"), "override_refused"},
		{"POST /graphql?a=b&_method=DELETE", head("Content-Length: 0"), "override_refused"},
		{"POST /graphql?%5Fmethod=DELETE", head("Content-Length: 0"), "override_refused"},
		{"POST /graphql?x-http-method-override=PUT", head("Content-Length: 0"), "override_refused"},
		{"GET /repos/o?_methods=x", head(), ""},
	} {
		for _, way := range []string{"inspected", "http tunnel", "absolute form"} {
			o := secure
			if way != "inspected" {
				o = clear
			}
			before := len(o.log())
			at := hostPort("api.test", o.port)
			method, target, _ := strings.Cut(tt.line, " ")
			if way == "absolute form" {
				target = "http://" + at + target
			}
			request := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n%s", method, target, at, tt.headers)
			var c net.Conn
			switch way {
			case "inspected":
				c = g.inside("api.test", o.port)
			case "http tunnel":
				_, _, c = g.connect(at)
			default:
				c = g.dial()
			}
			if method == "HEAD" {
				io.WriteString(c, request)
				if resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: "HEAD"}); err != nil || resp.StatusCode != 200 {
					t.Errorf("%s %s: %v %v", way, tt.line, resp, err)
				}
				continue
			}
			status, body, code := raw(t, c, request)
			reached := len(o.log()) - before
			if code != tt.code || status != map[bool]int{true: 200, false: 403}[tt.code == ""] || reached != map[bool]int{true: 1}[tt.code == ""] {
				t.Errorf("%s: %s %q: %d %s, %d reached the origin", way, tt.line, tt.headers, status, body, reached)
			}
			if tt.code == "" {
				var e echoed
				if json.Unmarshal([]byte(body), &e); e.Method+" "+e.Path != tt.line {
					t.Errorf("%s: %q arrived as %q", way, tt.line, e.Method+" "+e.Path)
				}
			}
		}
	}
	// The log has method and path, and never the query.
	e := g.await("a refused request", func(e audit.Event) bool { return e.Code == "request_not_allowed" && e.Path == "/user" })
	if e.Method != "GET" || e.Verdict != "deny" || e.Status != 403 || e.From != "bottle.json:2:2 requests" || e.Rule == nil || !strings.Contains(e.Reason, "bottle.json:2:2 requests") {
		t.Errorf("%+v", e)
	}
	for _, e := range g.events() {
		if s := fmt.Sprintf("%+v", e); strings.Contains(s, "?") {
			t.Errorf("a query in %s", s)
		}
	}
}

// TestRequestsHint: the answer says which line to add, and it is enough.
func TestRequestsHint(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	rule := inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1"))
	g := start(t, []plan.Rule{requests(rule, "GET /a")}, nil, nil)
	resp, b := g.get("https://" + hostPort("api.test", o.port) + "/b/c?token=secret")
	if resp.StatusCode != 403 || !bytes.Contains(b, []byte(`add \"GET /b/c\" to the requests of api.test`)) || bytes.Contains(b, []byte("token")) {
		t.Fatalf("%s %s", resp.Status, b)
	}
	g = start(t, []plan.Rule{requests(rule, "GET /a", "GET /b/c")}, nil, nil)
	if resp, b := g.get("https://" + hostPort("api.test", o.port) + "/b/c?token=secret"); resp.StatusCode != 200 {
		t.Fatalf("%s %s", resp.Status, b)
	}
}

// TestHostOfInspectedRequests: the host of a request inside of an inspected
// tunnel is that of the tunnel, however it is written, for each request anew.
func TestHostOfInspectedRequests(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test", "denied.test")
	g := start(t, []plan.Rule{inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1")), inspect(pin(allowHost("also.test", "tls", o.port), "127.0.0.1"))}, nil, nil)
	at := hostPort("api.test", o.port)
	for _, tt := range []struct{ request, code string }{
		{"GET / HTTP/1.1\r\nHost: " + at, ""},
		{"GET / HTTP/1.1\r\nHost: " + strings.ToUpper(at), ""},
		{"GET / HTTP/1.1\r\nHost: " + hostPort("api.test.", o.port), ""},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nX-Forwarded-Host: " + at, ""},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nForwarded: for=10.0.0.1;proto=https", ""},
		{"GET / HTTP/1.0\r\nHost: " + at, ""},
		{"GET / HTTP/1.0", "host_mismatch"},
		{"GET / HTTP/1.1", "bad_request"},
		{"GET / HTTP/1.1\r\nHost:", "bad_request"},
		{"GET / HTTP/1.1\r\nHost: denied.test", "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: " + hostPort("also.test", o.port), "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: api.test", "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: api.test:1", "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: api.test:0", "bad_request"},
		{"GET / HTTP/1.1\r\nHost: api.test:0" + fmt.Sprint(o.port), "bad_request"},
		{"GET / HTTP/1.1\r\nHost: api.test:", "bad_request"},
		{"GET / HTTP/1.1\r\nHost: " + at + ":443", "bad_request"},
		{"GET / HTTP/1.1\r\nHost: api.test..:" + fmt.Sprint(o.port), "bad_request"},
		{"GET / HTTP/1.1\r\nHost: user@" + at, "bad_request"},
		{"GET / HTTP/1.1\r\nHost: " + at + "/x", "bad_request"},
		{"GET / HTTP/1.1\r\nHost: " + at + ",denied.test", "bad_request"},
		{"GET / HTTP/1.1\r\nHost: " + at + " denied.test", "bad_request"},
		{"GET / HTTP/1.1\r\nHost: 127.0.0.1:" + fmt.Sprint(o.port), "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nHost: " + at, "bad_request"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nHost: denied.test", "bad_request"},
		{"GET / HTTP/1.1\r\nhost: " + at + "\r\nHOST: denied.test", "bad_request"},
		{"GET / HTTP/1.1\r\n Host: denied.test\r\nHost: " + at, "bad_request"},
		{"GET / HTTP/1.1\r\nHost : denied.test\r\nHost: " + at, "bad_request"},
		{"GET https://" + at + "/ HTTP/1.1\r\nHost: " + at, "bad_request"},
		{"GET http://denied.test/ HTTP/1.1\r\nHost: denied.test", "bad_request"},
		{"GET https://user@" + at + "/ HTTP/1.1\r\nHost: " + at, "host_mismatch"},
		{"OPTIONS * HTTP/1.1\r\nHost: " + at, "bad_request"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nX-Forwarded-Host: denied.test", "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nX_Forwarded_Host: denied.test", "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nX-Forwarded-Host: " + at + ", denied.test", "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nX-Host: denied.test", "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nForwarded: for=x;host=denied.test", "host_mismatch"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nForwarded: host=" + at + ", host=denied.test", "host_mismatch"},
		{"TRACE / HTTP/1.1\r\nHost: " + at, "method_refused"},
		{"trace / HTTP/1.1\r\nHost: " + at, "method_refused"},
		{"TRACK / HTTP/1.1\r\nHost: " + at, "method_refused"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__", "upgrade_refused"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "upgrade_refused"},
		{"GET / HTTP/1.1\r\nHost: " + at + "\r\nUpgrade: anything", "upgrade_refused"},
		{"GET / HTTP/2.0\r\nHost: " + at, "bad_request"},
		{"PRI * HTTP/2.0", "bad_request"},
	} {
		// As the first request of a connection, and as the second one.
		for _, first := range []bool{true, false} {
			c := g.inside("api.test", o.port)
			if !first {
				if status, body, _ := raw(t, c, "GET /first HTTP/1.1\r\nHost: "+at+"\r\n\r\n"); status != 200 {
					t.Fatalf("%d %s", status, body)
				}
			}
			before := len(o.log())
			status, body, code := raw(t, c, tt.request+"\r\n\r\n")
			if code != tt.code || (status == 200) != (tt.code == "") || (len(o.log()) > before) != (tt.code == "") {
				t.Errorf("%q (first: %v): %d %s", tt.request, first, status, body)
			}
			c.Close()
		}
	}
	for _, seen := range o.log() {
		if !slices.Contains([]string{"GET " + at + " /", "GET " + at + " /first"}, seen) {
			t.Errorf("the origin saw %s", seen)
		}
	}
}
