package gate

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// certificate is what an origin shows.
func (o *origin) certificate(t testing.TB) *x509.Certificate {
	t.Helper()
	c, err := o.TLS.GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// pinned is a client that trusts what a guest trusts, and beyond that takes
// nothing but one certificate.
func (g *rig) pinned(cert *x509.Certificate) *http.Client {
	c := g.client()
	c.Transport.(*http.Transport).TLSClientConfig.VerifyPeerCertificate = func(raw [][]byte, _ [][]*x509.Certificate) error {
		if string(raw[0]) != string(cert.Raw) {
			return errors.New("not the pinned certificate")
		}
		return nil
	}
	return c
}

// TestClientThatPins: an inspected host fails for it, the log says why and what
// to do, and it works once that is done.
func TestClientThatPins(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	rule := pin(allowHost("api.test", "tls", o.port), "127.0.0.1")
	at := "https://" + hostPort("api.test", o.port) + "/"

	g := start(t, []plan.Rule{inspect(rule)}, nil, nil)
	if resp, err := g.pinned(o.certificate(t)).Get(at); err == nil {
		t.Fatalf("the pin does not hold: %s", resp.Status)
	}
	e := g.await("guest_rejects_ca", func(e audit.Event) bool { return e.Code == "guest_rejects_ca" })
	if e.Event != "close" || e.ID == 0 || e.Host != "api.test" || e.Port != o.port || !strings.Contains(e.Reason, "alert: bad certificate") {
		t.Errorf("%+v", e)
	}
	if len(o.log()) > 0 {
		t.Errorf("%v", o.log())
	}

	g = start(t, []plan.Rule{rule}, nil, nil)
	resp, err := g.pinned(o.certificate(t)).Get(at)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("not inspected: %v %v", resp, err)
	}
	resp.Body.Close()
}

// TestProgramsThatPin are programs that agents run, which end the connection in
// their own ways.
func TestProgramsThatPin(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	rule := pin(allowHost("api.test", "tls", o.port), "127.0.0.1")
	at := hostPort("api.test", o.port)
	dir := t.TempDir()
	both, outside := filepath.Join(dir, "both.pem"), filepath.Join(dir, "outside.pem")
	os.WriteFile(outside, world().pem, 0o600)
	spki := sha256.Sum256(o.certificate(t).RawSubjectPublicKeyInfo)
	key := "sha256//" + base64.StdEncoding.EncodeToString(spki[:])
	python := `import sys,urllib.request;print(urllib.request.urlopen(sys.argv[1]).read().decode())`
	// Its pin is looked at once the handshake is over.
	node := `const [h,p,pin]=process.argv.slice(1);const u=new URL(process.env.https_proxy);
		require('http').request({host:u.hostname,port:u.port,method:'CONNECT',path:h+':'+p}).on('connect',(r,s)=>{
		const t=require('tls').connect({socket:s,servername:h,ca:require('fs').readFileSync(process.env.SSL_CERT_FILE)},()=>{
		const have=require('crypto').createHash('sha256').update(t.getPeerX509Certificate().publicKey.export({type:'spki',format:'der'})).digest('base64');
		if('sha256//'+have!==pin){console.log('pin');t.destroy();return}
		t.write('GET /n HTTP/1.1\r\nHost: '+h+':'+p+'\r\nConnection: close\r\n\r\n')});t.pipe(process.stdout)}).end()`
	busy := defaultLimits
	busy.rejects = patience // it hangs up at once, and starts slowly where others compute
	for name, c := range map[string]struct {
		roots string
		argv  []string
	}{
		"curl with a pinned key":        {both, []string{"curl", "-sS", "-q", "--pinnedpubkey", key, "https://" + at + "/"}},
		"node with a pinned key":        {both, []string{"node", "-e", node, "api.test", strings.TrimPrefix(at, "api.test:"), key}},
		"curl with authorities of its":  {outside, []string{"curl", "-sS", "-q", "--cacert", outside, "https://" + at + "/"}},
		"python, authorities of its":    {outside, []string{"python3", "-c", python, "https://" + at + "/"}},
		"wget with authorities of its":  {outside, []string{"wget", "-q", "-O", "-", "--ca-certificate", outside, "https://" + at + "/"}},
		"openssl, authorities of its":   {outside, []string{"openssl", "s_client", "-verify_return_error", "-servername", "api.test", "-connect", at, "-CAfile", outside}},
		"git, with authorities of its ": {outside, []string{"git", "ls-remote", "https://" + at + "/r.git"}},
	} {
		t.Run(name, func(t *testing.T) {
			bin, err := exec.LookPath(c.argv[0])
			if err != nil {
				t.Skipf("SKIPPED: %s is not installed, so the gate was not tried with it", c.argv[0])
			}
			run := func(r plan.Rule) (*rig, string) {
				g := start(t, []plan.Rule{r}, nil, func(cfg *Config) { cfg.limits = &busy })
				pems := world().pem
				if g.ca != nil {
					pems = append(g.ca.CertPEM(), pems...)
				}
				os.WriteFile(both, pems, 0o600)
				proxy := g.tcp()
				argv := c.argv
				if argv[0] == "openssl" {
					argv = append(argv[:len(argv):len(argv)], "-proxy", proxy)
				}
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				cmd := exec.CommandContext(ctx, bin, argv[1:]...)
				cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "SSL_CERT_FILE=" + c.roots, "CURL_CA_BUNDLE=" + c.roots,
					"GIT_SSL_CAINFO=" + c.roots, "GIT_CONFIG_NOSYSTEM=1", "LC_ALL=C", "https_proxy=http://" + proxy}
				cmd.Stdin = strings.NewReader("GET /s HTTP/1.1\r\nHost: " + at + "\r\nConnection: close\r\n\r\n")
				out, _ := cmd.CombinedOutput()
				return g, string(out)
			}
			before := len(o.log())
			g, out := run(inspect(rule))
			e := g.await("guest_rejects_ca", func(e audit.Event) bool { return e.Code == "guest_rejects_ca" })
			if e.Event != "close" || e.Host != "api.test" || len(o.log()) != before {
				t.Errorf("%+v\n%s", e, out)
			}
			g, out = run(rule)
			if len(o.log()) == before {
				t.Errorf("not inspected: %s\n%v", out, g.events())
			}
			for _, e := range g.events() {
				if e.Code == "guest_rejects_ca" {
					t.Errorf("not inspected: %+v", e)
				}
			}
		})
	}
}

// TestNotAboutTheCertificate: other ends of a handshake are called otherwise.
func TestNotAboutTheCertificate(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	quick := defaultLimits
	quick.rejects = 1 // whatever comes after the handshake is late
	for name, c := range map[string]struct {
		do   func(*testing.T, *rig, *tls.Config)
		code string
	}{
		"HTTP/2 alone": {func(t *testing.T, g *rig, cfg *tls.Config) {
			cfg.NextProtos = []string{"h2"}
			_, _, c := g.connect(hostPort("api.test", o.port))
			if tls.Client(c, cfg).Handshake() == nil {
				t.Error("HTTP/2 was taken")
			}
		}, "guest_needs_http2"},
		"a client that says no more": {func(t *testing.T, g *rig, cfg *tls.Config) {
			_, _, c := g.connect(hostPort("api.test", o.port))
			c.Write(clientHello(t, cfg))
			g.await("guest_handshake_failed", func(e audit.Event) bool { return e.Code == "guest_handshake_failed" })
		}, "guest_handshake_failed"},
		"a connection ahead of need": {func(t *testing.T, g *rig, cfg *tls.Config) {
			_, _, c := g.connect(hostPort("api.test", o.port))
			tc := tls.Client(c, cfg)
			if err := tc.Handshake(); err != nil {
				t.Fatal(err)
			}
			tc.Close()
		}, ""},
		"a connection that was used": {func(t *testing.T, g *rig, cfg *tls.Config) {
			c := g.inside("api.test", o.port)
			if status, body, _ := raw(t, c, "GET / HTTP/1.1\r\nHost: "+hostPort("api.test", o.port)+"\r\n\r\n"); status != 200 {
				t.Errorf("%d %s", status, body)
			}
			c.Close()
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			g := start(t, []plan.Rule{inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1"))}, nil, func(cfg *Config) {
				l := quick
				if c.code == "guest_handshake_failed" {
					l.handshake = 300 * time.Millisecond
				}
				cfg.limits = &l
			})
			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM(g.ca.CertPEM())
			c.do(t, g, &tls.Config{ServerName: "api.test", RootCAs: pool})
			if c.code != "" {
				if e := g.await(c.code, func(e audit.Event) bool { return e.Code == c.code }); e.Event != "close" || e.Reason == "" {
					t.Errorf("%+v", e)
				}
			}
			time.Sleep(20 * time.Millisecond)
			for _, e := range g.events() {
				if e.Code == "guest_rejects_ca" {
					t.Errorf("%+v", e)
				}
			}
		})
	}
}

func TestHowToUninspect(t *testing.T) {
	b := &plan.Bottle{Egress: plan.Policy{Rules: []plan.Rule{inspect(allowHost("*.wild.test", "tls", 443)), inspect(allowHost("api.test", "tls", 443))}},
		Secrets: keySecret("key.test", "x-api-key")}
	for host, want := range map[string]string{
		"api.test": `take "api.test" out of egress.inspect`, "a.wild.test": `take "*.wild.test" out of egress.inspect`, "key.test": "because of the secret KEY",
	} {
		if got := policy.HowToUninspect(b, host); !strings.Contains(got, want) || !strings.Contains(got, "/opt/bottle/ca.pem") {
			t.Errorf("%s: %s", host, got)
		}
	}
}
