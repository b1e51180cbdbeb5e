package probe

import (
	"strings"
	"testing"
)

func TestParseStream(t *testing.T) {
	const ok = "GET /a HTTP/1.1\r\nHost: a.test\r\n\r\n"
	for _, c := range []struct{ name, data, hosts, anomaly string }{
		{"two in a row", ok + "POST /b HTTP/1.1\r\nHost: b.test\r\nContent-Length: 3\r\n\r\nxyz" + ok, "a.test b.test a.test", ""},
		{"a request as body", "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 36\r\n\r\nGET /t HTTP/1.1\r\nHost: denied.test\r\n\r\n", "a.test", ""},
		{"chunks", "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nxyz\r\n0\r\nTr: 1\r\n\r\n" + ok, "a.test a.test", ""},
		{"no end yet", "GET / HTTP/1.1\r\nHost: a.te", "", ""},
		{"both", "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "a.test", "both"},
		{"two lengths", "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0\r\nContent-Length: 9\r\n\r\n", "a.test", "two Content-Length"},
		{"sign", "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: +3\r\n\r\nabc", "a.test", "no number"},
		{"two hosts", "GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n", "a.test", "two Host"},
		{"folded", "GET / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding:\r\n chunked\r\n\r\n", "", "folded"},
		{"bare lf", "GET / HTTP/1.1\nHost: a.test\n\nGET /b HTTP/1.1\r\n\r\n", "", "bare line feeds"},
		{"lf in a line", "GET / HTTP/1.1\r\nX: a\nHost: b.test\r\n\r\n", "", "bare CR"},
		{"space", "GET / HTTP/1.1\r\nHost : a.test\r\n\r\n", "", "a header line that is none"},
		{"almost chunked", "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: xchunked\r\n\r\n", "a.test", "not chunked"},
		{"chunk extension", "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\n\r\n", "a.test", "size line"},
		{"long chunk", "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n", "a.test", "longer than its size"},
		{"http 1.0", "POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "a.test", "HTTP/1.0"},
	} {
		var hosts []string
		anomaly := ""
		for _, r := range parseStream([]byte(c.data)) {
			if r.host != "" {
				hosts = append(hosts, r.host)
			}
			anomaly = r.anomaly
		}
		if got := strings.Join(hosts, " "); got != c.hosts || (anomaly != "") != (c.anomaly != "") || !strings.Contains(anomaly, c.anomaly) {
			t.Errorf("%s: hosts %q, anomaly %q", c.name, got, anomaly)
		}
	}
}

// FuzzParseStream: whatever arrives, the parts are what came, in order.
func FuzzParseStream(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		n := 0
		for _, r := range parseStream(data) {
			if n+len(r.raw) > len(data) || string(data[n:n+len(r.raw)]) != string(r.raw) {
				t.Fatalf("%q is not at %d of %q", r.raw, n, data)
			}
			n += len(r.raw)
		}
	})
}

func TestCarried(t *testing.T) {
	const token = "bpabcdefgh"
	for _, key := range []string{awsKey(token), githubToken(token)} {
		if !carries(event{Data: []byte("X-Note: " + key)}, token) {
			t.Errorf("%s is not recognised", key)
		}
	}
	if len(awsKey(token)) != 20 || len(githubToken(token)) != 40 {
		t.Error("the credentials do not have their usual form")
	}
	for _, c := range []struct {
		data string
		want bool
	}{
		{"1\r\nb\r\n1\r\np\r\n1\r\nx\r\n0\r\n\r\n", true},
		{"data=dG9rZW49YnB4\r\ndata=bm8=", true},
		{"data=bm8=&data=dG9rZW49YnB4", true},
		{"data=bm8=", false},
		{"b-p-x", false},
	} {
		if got := carried([]byte(c.data), "bpx"); got != c.want {
			t.Errorf("%q: %v", c.data, got)
		}
	}
}
