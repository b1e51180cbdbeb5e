package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// upstream is a TLS server on loopback whose certificate comes from an
// authority of its own.
type upstream struct {
	*httptest.Server
	port int
	ca   string // PEM

	mu   sync.Mutex
	seen []http.Header
}

func newUpstream(t *testing.T, names ...string) *upstream {
	t.Helper()
	u := &upstream{}
	u.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		u.mu.Lock()
		u.seen = append(u.seen, r.Header.Clone())
		u.mu.Unlock()
		if r.URL.Path == "/mirror" { // gives a secret back, as careless servers do
			fmt.Fprintf(rw, "you sent %s", r.Header.Get("X-Api-Key"))
			return
		}
		fmt.Fprintf(rw, "served %s%s\n", strings.Split(r.Host, ":")[0], r.URL.Path)
	}))
	cert, ca := certificate(t, names)
	u.ca = ca
	u.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	u.StartTLS()
	t.Cleanup(u.Close)
	u.port = u.Listener.Addr().(*net.TCPAddr).Port
	return u
}

// certificate gives a leaf for names, and the authority it comes from.
func certificate(t *testing.T, names []string) (tls.Certificate, string) {
	t.Helper()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	caKey, leafKey := key(), key()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, leafKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: leafKey},
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}))
}

func (u *upstream) headers(name string) []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	var all []string
	for _, h := range u.seen {
		all = append(all, h.Values(name)...)
	}
	return all
}

// The value has no line in any file of the project that a leak could come from
// but this one.
const secretValue = "kv-" + "7f3c9d51-not-for-guests"

// egressWorld has allowed.test open, keyed.test with a secret, unkeyed.test with
// one that is missing.
func egressWorld(t *testing.T, w *harness.World, proxy string) *upstream {
	t.Helper()
	u := newUpstream(t, "allowed.test", "keyed.test", "unkeyed.test", "denied.test")
	w.Write("upstream.crt", u.ca)
	rule := func(host string) string {
		return fmt.Sprintf(`{"host":%q,"ports":[%d],"addresses":["127.0.0.1"]}`, host, u.port)
	}
	w.Manifest(`"runtime":"gvisor","egress":{"proxy":"` + proxy + `","roots":["upstream.crt"],"allow":[` +
		rule("allowed.test") + "," + rule("keyed.test") + "," + rule("unkeyed.test") + `]},
		"secrets":{
		"THE_KEY":{"from":"env:THE_KEY","inject":[{"host":"keyed.test","header":"x-api-key"}]},
		"NO_KEY":{"from":"env:NO_SUCH_KEY","inject":[{"host":"unkeyed.test","header":"authorization","format":"Bearer {}"}]}}`)
	w.Env = append(w.Env, "THE_KEY="+secretValue)
	// A key of the caller's goes where the manifest says only with a word of trust.
	if r := w.Sh("bottle-plan | bottle-vm up >/dev/null"); r.Code != 77 || !contains(r.Stderr, "secret THE_KEY sends your $THE_KEY to keyed.test") {
		t.Fatalf("untrusted: %+v", r)
	}
	w.OK("bottle-vm trust")
	return u
}

// get asks for a path from inside, and gives curl's status, the HTTP status and
// the body. Hosts that are inspected have the bottle's own certificate, which
// the guest trusts; others the upstream's.
func get(w *harness.World, id, host string, port int, path string, flags ...string) (curl int, status, body string) {
	r := w.Do(nil, "bottle-vm", append([]string{"exec", id, "--", "curl", "-sS", "-m", "10", "-w", "\n%{http_code} %{http_connect}",
		fmt.Sprintf("https://%s:%d%s", host, port, path)}, flags...)...)
	i := strings.LastIndexByte(r.Out, '\n')
	if i < 0 {
		return r.Code, "", r.Out + r.Stderr
	}
	return r.Code, r.Out[i+1:], r.Out[:i] + r.Stderr
}

func TestEgress(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		u := egressWorld(t, w, "builtin")
		up := w.Sh("bottle-plan | bottle-vm up -o doc.json")
		if up.Code != 0 || !contains(up.Stderr, "secret NO_KEY is missing") {
			t.Fatalf("up: %+v", up)
		}
		doc := w.Read("doc.json")
		id := gjson.Get(doc, "vm.id").Str

		if code, status, body := get(w, id, "allowed.test", u.port, "/x", "--cacert", "/workspace/upstream.crt"); code != 0 || status != "200 200" || !contains(body, "served allowed.test/x") {
			t.Errorf("allowed: %d %s %s", code, status, body)
		}
		checkDenied(t, w, id, u)
		checkSecrets(t, w, id, u)
		// A client without a proxy comes to the gate by the guest's own names, and
		// to nothing else: neither by another name nor by the address.
		if code, status, _ := get(w, id, "allowed.test", u.port, "/x", "--cacert", "/workspace/upstream.crt", "--noproxy", "*"); code != 0 || status != "200 000" {
			t.Errorf("without a proxy: %d %s", code, status)
		}
		if code, _, _ := get(w, id, "denied.test", u.port, "/x", "-k", "--noproxy", "*"); code != 6 { // curl(1): couldn't resolve host
			t.Errorf("a denied name without a proxy: %d", code)
		}
		if code, _, _ := get(w, id, "127.0.0.1", u.port, "/x", "-k", "--noproxy", "*"); code != 7 { // curl(1): failed to connect
			t.Errorf("the upstream's own address: %d", code)
		}
		r := w.Exec(id, "cat /proc/net/dev /proc/net/route; ls /sys/class/net 2>&1")
		if contains(r.Out, "eth") {
			t.Errorf("the guest has a network device: %s", r.Out)
		}

		audit := w.OK("bottle-vm logs --audit " + id)
		for _, want := range []string{`"host":"allowed.test"`, `"host":"denied.test"`, `"verdict":"deny"`, `"verdict":"allow"`} {
			if !contains(audit, want) {
				t.Errorf("the audit log has no %s:\n%s", want, audit)
			}
		}
		for _, line := range strings.Split(strings.TrimSpace(audit), "\n") {
			if !gjson.Valid(line) {
				t.Errorf("audit: not JSON: %s", line)
			}
		}
		for what, text := range map[string]string{"document": doc, "audit log": audit, "logs": w.OK("bottle-vm logs " + id)} {
			if contains(text, secretValue) {
				t.Errorf("the secret is in the %s", what)
			}
		}
		for _, p := range w.Processes() {
			if contains(p, secretValue) {
				t.Errorf("the secret is in an argument list: %s", p)
			}
		}
		r = w.Sh("bottle-vm down --report " + id)
		has(t, "down --report", r.Stderr, "denied denied.test:"+strconv.Itoa(u.port), "denied unkeyed.test")
	})
}

func checkDenied(t *testing.T, w *harness.World, id string, u *upstream) {
	t.Helper()
	// A CONNECT that is refused: curl 56, and the body has the reason.
	r := w.Exec(id, fmt.Sprintf(`printf 'CONNECT denied.test:%d HTTP/1.1\r\nHost: denied.test:%d\r\n\r\n' >/tmp/q; curl -sS -m 10 -o /tmp/body -w '%%{http_connect}' https://denied.test:%d/; echo "|$?"; curl -sS -m 10 http://denied.test:%d/`, u.port, u.port, u.port, u.port))
	has(t, "denied CONNECT", r.Out, "403|56")
	body := r.Out[strings.Index(r.Out, "\n")+1:]
	if !gjson.Valid(body) || !contains(body, "denied.test") || gjson.Get(body, "error").Exists() == false && gjson.Get(body, "code").Exists() == false {
		t.Errorf("the 403 of a denied request is no JSON with host and reason: %q", body)
	}
	for _, host := range []string{"169.254.169.254", "127.0.0.1", "localhost", "[::1]"} {
		r := w.Exec(id, fmt.Sprintf(`curl -sS -m 10 --noproxy '' -o /dev/null -w '%%{http_code}' http://%s:%d/`, host, u.port))
		if contains(r.Out, "200") {
			t.Errorf("%s is reachable: %+v", host, r)
		}
	}
}

func checkSecrets(t *testing.T, w *harness.World, id string, u *upstream) {
	t.Helper()
	if code, status, body := get(w, id, "keyed.test", u.port, "/y", "-H", "x-api-key: placeholder-of-the-guest"); code != 0 || status != "200 200" {
		t.Errorf("keyed: %d %s %s", code, status, body)
	}
	if got := u.headers("X-Api-Key"); len(got) != 1 || got[0] != secretValue {
		t.Errorf("the upstream saw x-api-key %q, want the secret, once", got)
	}
	// A server that gives the key back does not give it to the guest.
	if _, _, body := get(w, id, "keyed.test", u.port, "/mirror"); contains(body, secretValue) {
		t.Errorf("a reflected secret reached the guest: %s", body)
	}
	code, status, body := get(w, id, "unkeyed.test", u.port, "/z")
	if code != 0 || !strings.HasPrefix(status, "403") || !contains(body, "secret_missing") {
		t.Errorf("missing secret: %d %s %s", code, status, body)
	}
	r := w.Exec(id, "env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; grep -raE 'not-for-gues[t]s' /workspace /home /tmp /run /etc /opt 2>/dev/null")
	if contains(r.Out, secretValue) {
		t.Errorf("the guest can read the secret:\n%s", r.Out)
	}
	if !contains(r.Out, "THE_KEY=") {
		t.Errorf("the guest has no placeholder:\n%s", r.Out)
	}
}

// TestGateDies kills the gate and then asks again: nothing may pass meanwhile,
// and it works again within a second.
func TestGateDies(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		u := egressWorld(t, w, "builtin")
		w.OK("bottle-plan | bottle-vm up -o doc.json")
		id := gjson.Get(w.Read("doc.json"), "vm.id").Str
		pid := int(gjson.Get(w.Read("doc.json"), "vm.gate.pid").Int())
		if pid == 0 {
			t.Fatalf("no vm.gate.pid in %s", w.Read("doc.json"))
		}
		restarts(t, w, id, u, pid)
	})
}

func restarts(t *testing.T, w *harness.World, id string, u *upstream, pid int) {
	t.Helper()
	works := func() bool {
		code, status, body := get(w, id, "allowed.test", u.port, "/again", "--cacert", "/workspace/upstream.crt")
		return code == 0 && strings.HasPrefix(status, "200") && contains(body, "served allowed.test/again")
	}
	if !works() {
		t.Fatal("the way out does not work before the kill")
	}
	// A secret is injected by the next gate, too, with a certificate that the
	// guest still trusts.
	for round := range 2 {
		killed := time.Now()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// Whatever is answered while it is away, the denied host is not served.
		if code, status, _ := get(w, id, "denied.test", u.port, "/"); code == 0 && strings.HasPrefix(status, "200") {
			t.Error("with the gate dead a denied host was served")
		}
		for !works() {
			if time.Since(killed) > harness.Limit {
				t.Fatalf("round %d: no way out %s after the kill; status %s", round, harness.Limit, w.OK("bottle-vm status "+id))
			}
		}
		if took := time.Since(killed); took > 5*time.Second+slack() {
			t.Errorf("round %d: the way out was back after %s", round, took)
		}
		if code, status, body := get(w, id, "keyed.test", u.port, "/y"); code != 0 || !strings.HasPrefix(status, "200") {
			t.Errorf("round %d: injection after a restart: %d %s %s", round, code, status, body)
		}
		if pid = gatePid(t, w); pid == 0 {
			break
		}
	}
}

// slack is more than the seconds on a machine with other work to do.
func slack() time.Duration {
	raw, err := os.ReadFile("/proc/loadavg")
	load, _, _ := strings.Cut(string(raw), " ")
	if v, ferr := strconv.ParseFloat(load, 64); err == nil && ferr == nil && v > 3 {
		return 20 * time.Second
	}
	return 0
}

// gatePid finds the gate that runs now.
func gatePid(t *testing.T, w *harness.World) int {
	t.Helper()
	var found []string
	for _, p := range w.Processes() {
		pid, cmd, _ := strings.Cut(p, " ")
		if contains(cmd, "bottle-egress") {
			found = append(found, pid)
		}
	}
	if len(found) != 1 {
		t.Errorf("gates: %q", found)
		return 0
	}
	pid, _ := strconv.Atoi(found[0])
	return pid
}
