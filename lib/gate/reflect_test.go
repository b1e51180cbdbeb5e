package gate

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/plan"
)

// startRaw is an origin that answers every request with the bytes that answer
// gives, and closes the connection.
func startRaw(t testing.TB, host string, answer func(r *http.Request) []string) int {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{world().leaf(host)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
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
				for _, piece := range answer(r) {
					io.WriteString(c, piece)
					time.Sleep(time.Millisecond)
				}
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// TestReflectionInEveryPart: no part of an answer, and of what comes before it,
// gives the value away, on the wire that the guest reads.
func TestReflectionInEveryPart(t *testing.T) {
	key := secretValue
	pieces := func(s string, n int) (out []string) {
		for len(s) > n {
			out, s = append(out, s[:n]), s[n:]
		}
		return append(out, s)
	}
	chunked := func(body ...string) string {
		var b strings.Builder
		b.WriteString("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		for _, s := range body {
			fmt.Fprintf(&b, "%x\r\n%s\r\n", len(s), s)
		}
		return b.String()
	}
	answers := map[string][]string{
		"/reason":        {"HTTP/1.1 200 " + key + "\r\nContent-Length: 2\r\n\r\nok"},
		"/early-hints":   {"HTTP/1.1 103 Early Hints\r\nLink: <https://x/" + key + ">\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		"/processing":    {"HTTP/1.1 102 " + key + "\r\nX: " + key + "\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		"/continue":      {"HTTP/1.1 100 Continue\r\nX: " + key + "\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		"/header":        {"HTTP/1.1 200 OK\r\nX: " + key + "\r\nSet-Cookie: k=" + writings["a query"].write(key) + "\r\nContent-Length: 2\r\n\r\nok"},
		"/header64":      {"HTTP/1.1 200 OK\r\nX: Basic " + writings["base64 of user and password"].write(key) + "\r\nContent-Length: 2\r\n\r\nok"},
		"/folded":        {"HTTP/1.1 200 OK\r\nX: " + key[:8] + "\r\n " + key[8:] + "\r\nContent-Length: 2\r\n\r\nok"},
		"/chunks":        pieces(chunked(key[:5], key[5:], " ok")+"0\r\n\r\n", 3),
		"/chunks64":      pieces(chunked(pieces(writings["base64 one further"].write(key), 5)...)+"0\r\n\r\n", 7),
		"/extension":     {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;k=" + key + "\r\nok\r\n0\r\n\r\n"},
		"/trailer":       {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: " + key + "\r\n\r\n"},
		"/trailer-said":  {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-" + strings.ToLower(strings.NewReplacer("/", "", "+", "").Replace(key)) + "\r\n\r\n2\r\nok\r\n0\r\n\r\n"},
		"/trailer-new":   {chunked("ok") + "0\r\nX-Unsaid: " + writings["hex"].write(key) + "\r\n\r\n"},
		"/until-close":   {"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok" + key},
		"/http10":        {"HTTP/1.0 200 OK\r\n\r\nok" + key},
		"/end-of-stream": {"HTTP/1.1 200 OK\r\nContent-Length: " + fmt.Sprint(2+len(key)) + "\r\n\r\nok", key},
		"/cut":           {chunked("ok", key)},
		"/error":         {"HTTP/1.1 500 Oops\r\nContent-Length: " + fmt.Sprint(len(key)) + "\r\n\r\n", key},
		"/gzip":          {"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: " + fmt.Sprint(len(key)) + "\r\n\r\n", key},
		"/gzip-transfer": {"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + key},
		"/switch":        {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n" + key},
		"/not-http":      {key + "\r\n\r\n"},
		"/bad-header":    {"HTTP/1.1 200 OK\r\nX " + key + "\r\n\r\n"},
		"/bad-length":    {"HTTP/1.1 200 OK\r\nContent-Length: " + key + "\r\n\r\n"},
		"/bad-chunk":     {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + key + "\r\n"},
		"/unasked":       {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + key},
	}
	for name, w := range writings {
		answers["/w/"+strings.ReplaceAll(name, " ", "-")] = pieces("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<"+w.write(key)+">ok", 11)
	}
	port := startRaw(t, "api.test", func(r *http.Request) []string {
		if r.Header.Get("X-Api-Key") != key {
			return []string{"HTTP/1.1 400 no key\r\nContent-Length: 0\r\n\r\n"}
		}
		return answers[r.URL.Path]
	})
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", port), "127.0.0.1")}, keySecret("api.test", "x-api-key"), nil)
	for path := range answers {
		c := g.inside("api.test", port)
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", path, hostPort("api.test", port))
		got, err := io.ReadAll(c)
		if len(got) == 0 {
			t.Errorf("%s: nothing came: %v", path, err)
		}
		low := bytes.ToLower(got)
		for name, w := range writings {
			// What is left of base64 are the characters that it shares with its
			// neighbours.
			if written := w.write(key); bytes.Contains(low, bytes.ToLower([]byte(written[4:len(written)-4]))) {
				t.Errorf("%s, %s: %q", path, name, got)
			}
		}
		if bytes.Contains(got, []byte(" 400 ")) || strings.HasPrefix(path, "/w/") && !bytes.Contains(got, []byte("***")) {
			t.Errorf("%s: %q", path, got)
		}
	}
	for _, e := range g.events() {
		if s := fmt.Sprintf("%+v", e); strings.Contains(s, key) {
			t.Errorf("in the log: %s", s)
		}
	}
}
