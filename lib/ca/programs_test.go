package ca

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// forge signs what somebody with the authority's key would want. via signs it
// through an authority of the thief's own.
func forge(t *testing.T, a *Authority, name string, via bool) *tls.Certificate {
	t.Helper()
	issuer, chain := a.cert, [][]byte{a.cert.Raw}
	template := func(cn string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: cn},
			NotBefore: start.Add(-time.Minute), NotAfter: start.Add(time.Hour), BasicConstraintsValid: true}
	}
	if via {
		ca := template("thief")
		ca.IsCA, ca.KeyUsage = true, x509.KeyUsageCertSign
		der, err := x509.CreateCertificate(rand.Reader, ca, a.cert, a.key.Public(), a.key)
		if err != nil {
			t.Fatal(err)
		}
		if issuer, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		chain = append([][]byte{der}, chain...)
	}
	leaf := template(name)
	leaf.DNSNames, leaf.KeyUsage, leaf.ExtKeyUsage = []string{name}, x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, leaf, issuer, a.leaf.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: append([][]byte{der}, chain...), PrivateKey: a.leaf}
}

// TestProgramsHoldConstraints: the programs that agents run take the gate's
// certificates, and hold the authority to its constraints, so that a stolen key
// is good for the inspected hosts and nothing else.
func TestProgramsHoldConstraints(t *testing.T) {
	a := authority(t, "good.test", "*.wild.test")
	forged := map[string]*tls.Certificate{"bank.test": forge(t, a, "bank.test", false), "via.wild.test": forge(t, a, "via.wild.test", true)}
	var requests atomic.Int64
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { requests.Add(1) }))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		if c := forged[h.ServerName]; c != nil {
			return c, nil
		}
		return a.Leaf(h.ServerName)
	}}
	s.StartTLS()
	t.Cleanup(s.Close)
	port := strconv.Itoa(s.Listener.Addr().(*net.TCPAddr).Port)

	dir := t.TempDir()
	roots, store := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "cacerts")
	os.WriteFile(roots, a.CertPEM(), 0o600)
	os.WriteFile(store, Truststore(a.CertPEM()), 0o600)
	java := filepath.Join(dir, "Reach.java")
	os.WriteFile(java, []byte(`
import javax.net.ssl.*;
public class Reach { public static void main(String[] a) throws Exception {
  SSLSocket s = (SSLSocket) ((SSLSocketFactory) SSLSocketFactory.getDefault()).createSocket(new java.net.Socket("127.0.0.1", Integer.parseInt(a[1])), a[0], Integer.parseInt(a[1]), true);
  SSLParameters p = s.getSSLParameters(); p.setEndpointIdentificationAlgorithm("HTTPS"); s.setSSLParameters(p);
  s.getOutputStream().write(("GET / HTTP/1.1\r\nHost: " + a[0] + "\r\nConnection: close\r\n\r\n").getBytes());
  System.out.println(new String(s.getInputStream().readAllBytes()));
}}`), 0o600)
	python := `import sys,ssl,socket
s=ssl.create_default_context().wrap_socket(socket.create_connection(('127.0.0.1',int(sys.argv[2]))),server_hostname=sys.argv[1])
s.sendall(b'GET / HTTP/1.1\r\nHost: '+sys.argv[1].encode()+b'\r\nConnection: close\r\n\r\n')
while True:
  b=s.recv(4096)
  if not b: break
  sys.stdout.write(b.decode())`
	node := `const [h,p]=process.argv.slice(1);const s=require('tls').connect({host:'127.0.0.1',port:p,servername:h},()=>
		s.write('GET / HTTP/1.1\r\nHost: '+h+'\r\nConnection: close\r\n\r\n'));s.pipe(process.stdout)`
	for name, argv := range map[string]func(host string) []string{
		"curl": func(h string) []string {
			return []string{"curl", "-sS", "-q", "--cacert", roots, "--resolve", h + ":" + port + ":127.0.0.1", "https://" + h + ":" + port + "/"}
		},
		"openssl": func(h string) []string {
			return []string{"openssl", "s_client", "-quiet", "-verify_return_error", "-verify_hostname", h, "-servername", h, "-CAfile", roots, "-connect", "127.0.0.1:" + port}
		},
		"python": func(h string) []string { return []string{"python3", "-c", python, h, port} },
		"node":   func(h string) []string { return []string{"node", "-e", node, h, port} },
		"git": func(h string) []string {
			return []string{"git", "-c", "http.curloptResolve=" + h + ":" + port + ":127.0.0.1", "ls-remote", "https://" + h + ":" + port + "/r.git"}
		},
		"java": func(h string) []string {
			return []string{"java", "-Djavax.net.ssl.trustStore=" + store, java, h, port}
		},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(argv("x")[0]); err != nil {
				t.Skipf("SKIPPED: %s is not installed, so it was not seen to hold the constraints", name)
			}
			for _, c := range []struct {
				host  string
				taken bool
			}{{"good.test", true}, {"a.wild.test", true}, {"bank.test", false}, {"via.wild.test", false}} {
				if name == "java" && strings.HasSuffix(c.host, ".wild.test") {
					continue // it is slow, and says nothing new
				}
				before := requests.Load()
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				v := argv(c.host)
				cmd := exec.CommandContext(ctx, v[0], v[1:]...)
				cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "SSL_CERT_FILE=" + roots, "NODE_EXTRA_CA_CERTS=" + roots,
					"GIT_SSL_CAINFO=" + roots, "GIT_CONFIG_NOSYSTEM=1", "LC_ALL=C"}
				cmd.Stdin = strings.NewReader(fmt.Sprintf("GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", c.host))
				out, _ := cmd.CombinedOutput()
				cancel()
				taken := requests.Load() > before
				if name == "java" && !c.taken && taken {
					t.Logf("%s: Java does not look at the constraints of a trust anchor", c.host)
					continue
				}
				if taken != c.taken {
					t.Errorf("%s: taken %v, want %v:\n%s", c.host, taken, c.taken, out)
				}
			}
		})
	}
}
