package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// direct takes everything out of a shell's environment that leads to the proxy.
const direct = "unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY no_proxy NO_PROXY NODE_USE_ENV_PROXY\n"

// TestNames has clients that know nothing of proxies reach what is allowed, by
// its name, and nothing else.
func TestNames(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		u := newUpstream(t, "allowed.test", "b.wild.test", "denied.test")
		w.Write("upstream.crt", u.ca)
		db := newPostgres(t)
		web := newPlain(t)
		w.Manifest(fmt.Sprintf(`"runtime":"gvisor","egress":{"proxy":"builtin","roots":["upstream.crt"],"allow":[
			{"host":"allowed.test","ports":[%d],"addresses":["127.0.0.1"]},
			{"host":"*.wild.test","ports":[%d],"addresses":["127.0.0.1"]},
			{"host":"inspected.test","ports":[%d],"addresses":["127.0.0.1"]},
			{"host":"plain.test","ports":[%d],"protocol":"http","addresses":["127.0.0.1"]},
			{"host":"db.test","ports":[%d],"protocol":"tcp","addresses":["127.0.0.1"]}],
			"inspect":["inspected.test"]}`, u.port, u.port, u.port, web, db))
		id := w.Up()
		checkClients(t, w, id, u, web, db)
		checkNoName(t, w, id, u)
		checkOwnPort(t, w, id, u)
		r := w.Do(nil, "bottle-vm", "down", "--report", id)
		has(t, "down --report", r.Stderr, "denied nowhere.test (not_in_allowlist)", `add "nowhere.test" to egress.allow`)
	})
}

func checkClients(t *testing.T, w *harness.World, id string, u *upstream, web, db int) {
	t.Helper()
	tlsURL := fmt.Sprintf("https://allowed.test:%d/x", u.port)
	for _, c := range []struct{ program, script, want string }{
		{"curl", "curl -sS -m 20 " + tlsURL, "served allowed.test/x"},
		{"curl", "curl -6 -sS -m 20 " + tlsURL, "served allowed.test/x"},
		{"curl", "curl -4 -sS -m 20 " + tlsURL, "served allowed.test/x"},
		{"curl", fmt.Sprintf("curl -sS -m 20 https://b.wild.test:%d/w", u.port), "served b.wild.test/w"},
		{"curl", fmt.Sprintf("curl -sS -m 20 http://plain.test:%d/p", web), "plain plain.test"},
		{"python3", fmt.Sprintf(`python3 -c 'import http.client as h; c = h.HTTPSConnection("allowed.test", %d, timeout=20); c.request("GET", "/py"); print(c.getresponse().read())'`, u.port), "served allowed.test/py"},
		{"python3", fmt.Sprintf(`python3 -c 'import http.client as h; c = h.HTTPConnection("plain.test", %d, timeout=20); c.request("GET", "/py"); print(c.getresponse().read())'`, web), "plain plain.test"},
		{"node", fmt.Sprintf(`NODE_EXTRA_CA_CERTS=/workspace/upstream.crt node -e 'fetch("%s").then(r => r.text()).then(console.log)'`, tlsURL), "served allowed.test/x"},
		// The one TLS client that comes with a runtime of Java and no compiler.
		{"keytool", fmt.Sprintf("keytool -printcert -sslserver allowed.test:%d", u.port), "CN=allowed.test"},
		{"psql", fmt.Sprintf("psql -w -At 'host=db.test port=%d user=u dbname=d connect_timeout=20' -c 'select 1'", db), "answer of the database"},
	} {
		t.Run(c.program, func(t *testing.T) {
			if _, err := exec.LookPath(c.program); err != nil {
				t.Skipf("SKIPPED: no %s on this machine: what it does without proxy variables is not tried", c.program)
			}
			if r := w.Exec(id, direct+c.script); r.Code != 0 || !contains(r.Out, c.want) {
				t.Errorf("%s\n%+v\n%s", c.script, r, w.OK("cat "+w.State+"/bottle/audit/*"))
			}
		})
	}
	// With the variables everything is as ever, and both ways can be mixed.
	if r := w.Exec(id, fmt.Sprintf("curl -sS -m 20 https://inspected.test:%d/i; %s curl -sS -m 20 https://inspected.test:%d/i", u.port, direct, u.port)); !contains(r.Out, "inspected.test") {
		// Its certificate is not for that name: what matters is who refused.
		has(t, "an inspected host, through both ways", r.Out, "upstream_", "upstream_")
	}
}

func checkNoName(t *testing.T, w *harness.World, id string, u *upstream) {
	t.Helper()
	if r := w.Exec(id, direct+"getent ahosts nowhere.test"); r.Code != 2 || r.Out != "" {
		t.Errorf("a name that is not allowed resolves: %+v", r)
	}
	if r := w.Exec(id, direct+"getent ahosts wild.test"); r.Code != 2 || r.Out != "" {
		t.Errorf("the apex of a wildcard resolves: %+v", r)
	}
	if r := w.Exec(id, "getent ahostsv4 allowed.test"); r.Code != 0 || !strings.HasPrefix(r.Out, "127.64.") {
		t.Errorf("%+v", r)
	}
	// Another port of an allowed name is not there, and an address is nobody's.
	if r := w.Exec(id, fmt.Sprintf("%scurl -sS -m 20 https://allowed.test:%d/", direct, u.port+1)); r.Code != 7 {
		t.Errorf("another port: %+v", r)
	}
	if r := w.Exec(id, direct+"curl -sS -m 20 https://192.0.2.7/"); r.Code != 7 {
		t.Errorf("an address: %+v", r)
	}
	// Whoever names another host in the handshake is refused as in any tunnel,
	// and told so.
	r := w.Exec(id, fmt.Sprintf("%scurl -sS -m 20 --connect-to denied.test:%d:allowed.test:%d https://denied.test:%d/", direct, u.port, u.port, u.port))
	if r.Code != 35 || !contains(r.Stderr, "access denied") {
		t.Errorf("fronting: %+v", r)
	}
	// The helper has kept one capability, for low ports, and gives none away.
	if r := w.Exec(id, "grep -h CapEff /proc/1/status /proc/self/status"); r.Out != "CapEff:\t0000000000000400\nCapEff:\t0000000000000000\n" {
		t.Errorf("capabilities of the helper, and of the agent: %+v", r)
	}
	log := w.OK("cat " + w.State + "/bottle/audit/*")
	has(t, "audit log", log, `"event":"lookup"`, `"host":"nowhere.test"`, `"code":"sni_mismatch"`)
}

// checkOwnPort: what the agent serves itself on a port that the policy names
// for another host.
func checkOwnPort(t *testing.T, w *harness.World, id string, u *upstream) {
	t.Helper()
	for _, host := range []string{"127.0.0.1", "0.0.0.0"} {
		script := fmt.Sprintf(`getent hosts allowed.test >/dev/null; cd /tmp; echo mine >own
python3 -m http.server --bind %s %d >/dev/null 2>&1 & p=$!
for i in $(seq 100); do curl -sS -m 5 http://127.0.0.1:%d/own 2>/dev/null && break; sleep .1; done; kill $p`, host, u.port, u.port)
		if r := w.Exec(id, direct+script); r.Out != "mine\n" {
			t.Errorf("a server of the agent's own on %s: %+v", host, r)
		}
	}
}

// newPlain is an HTTP server on loopback.
func newPlain(t *testing.T) int {
	t.Helper()
	return listen(t, func(c net.Conn) {
		buf := make([]byte, 4096)
		var got []byte
		for !bytes.Contains(got, []byte("\r\n\r\n")) {
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			got = append(got, buf[:n]...)
		}
		_, rest, _ := bytes.Cut(got, []byte("\r\nHost: "))
		host, _, _ := bytes.Cut(rest, []byte(":"))
		body := "plain " + string(host) + "\n"
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	})
}

// listen serves each connection to a port of loopback with f, which gives the
// port.
func listen(t *testing.T, f func(net.Conn)) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
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
				c.SetDeadline(time.Now().Add(30 * time.Second))
				f(c)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// newPostgres speaks as much of PostgreSQL's protocol (version 3) as a client
// needs that logs in without a password and asks one thing.
func newPostgres(t *testing.T) int {
	t.Helper()
	return listen(t, func(c net.Conn) {
		for {
			start, err := pgStart(c)
			if err != nil {
				return
			}
			if binary.BigEndian.Uint32(start) == 3<<16 {
				break
			}
			c.Write([]byte("N")) // neither TLS nor GSSAPI
		}
		ready := pgMessage('Z', "I")
		c.Write(append(append(pgMessage('R', "\x00\x00\x00\x00"), pgMessage('S', "server_version\x0015.0\x00")...), ready...))
		for {
			var head [5]byte
			if _, err := io.ReadFull(c, head[:]); err != nil {
				return
			}
			if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head[1:]))-4); err != nil || head[0] != 'Q' {
				return
			}
			text := "answer of the database"
			c.Write(bytes.Join([][]byte{
				pgMessage('T', "\x00\x01x\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x19\xff\xff\xff\xff\xff\xff\x00\x00"),
				pgMessage('D', "\x00\x01\x00\x00\x00"+string(rune(len(text)))+text), pgMessage('C', "SELECT 1\x00"), ready,
			}, nil))
		}
	})
}

func pgStart(c net.Conn) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n < 8 || n > 4096 {
		return nil, fmt.Errorf("a start packet of %d bytes", n)
	}
	body := make([]byte, n-4)
	_, err := io.ReadFull(c, body)
	return body, err
}

func pgMessage(kind byte, body string) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(body)+4)), body...)
}
