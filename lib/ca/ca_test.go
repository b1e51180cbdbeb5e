package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

var start = time.Now().Truncate(time.Second)

func authority(t testing.TB, hosts ...string) *Authority {
	t.Helper()
	a, err := New("dev-01234567", hosts, start, 7*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func verify(a *Authority, leaf *x509.Certificate, host string, at time.Time) error {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(a.CertPEM())
	_, err := leaf.Verify(x509.VerifyOptions{DNSName: host, Roots: pool, CurrentTime: at})
	return err
}

func TestLeaf(t *testing.T) {
	a := authority(t, "api.example.com", "*.example.org")
	for _, host := range []string{"api.example.com", "x.example.org", "a.b.example.org"} {
		c, err := a.Leaf(host)
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(a, c.Leaf, host, start); err != nil {
			t.Errorf("%s: %v", host, err)
		}
		if again, _ := a.Leaf(host); again != c {
			t.Errorf("%s is not cached", host)
		}
	}
	for _, host := range []string{"example.org", "xexample.org", ".example.org", "*.example.org", "example.com", "x.api.example.com", "127.0.0.1", ""} {
		if c, err := a.Leaf(host); err == nil {
			t.Errorf("%q got a certificate for %v", host, c.Leaf.DNSNames)
		}
	}
}

// Whoever steals the key can sign for the inspected hosts and nothing else.
func TestConstraintsHold(t *testing.T) {
	a := authority(t, "api.example.com")
	if !a.cert.PermittedDNSDomainsCritical || a.cert.MaxPathLen != 0 || !a.cert.IsCA {
		t.Errorf("%+v", a.cert)
	}
	forge := func(names []string, ips []net.IP, isCA bool) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "forged"},
			NotBefore: start.Add(-time.Minute), NotAfter: start.Add(time.Hour),
			DNSNames: names, IPAddresses: ips, IsCA: isCA, BasicConstraintsValid: true,
		}, a.cert, &a.leaf.PublicKey, a.key)
		if err != nil {
			t.Fatal(err)
		}
		c, _ := x509.ParseCertificate(der)
		return c
	}
	if err := verify(a, forge([]string{"api.example.com"}, nil, false), "api.example.com", start); err != nil {
		t.Fatalf("control: %v", err)
	}
	for name, c := range map[string]*x509.Certificate{
		"other.example.com": forge([]string{"other.example.com"}, nil, false),
		"example.com":       forge([]string{"example.com"}, nil, false),
		"api.example.com":   forge([]string{"api.example.com", "bank.example"}, nil, false),
		"127.0.0.1":         forge(nil, []net.IP{net.IPv4(127, 0, 0, 1)}, false),
		"::1":               forge(nil, []net.IP{net.IPv6loopback}, false),
	} {
		if err := verify(a, c, name, start); err == nil {
			t.Errorf("%s: a forged certificate for %v %v passed", name, c.DNSNames, c.IPAddresses)
		}
	}
}

func TestMarshal(t *testing.T) {
	a := authority(t, "api.example.com", "*.example.org")
	text, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(text, []byte("-----BEGIN EC PRIVATE KEY-----")) {
		t.Error("the key is not in SEC 1 form")
	}
	b, err := Unmarshal(text)
	if err != nil {
		t.Fatal(err)
	}
	c, err := b.Leaf("x.example.org")
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(a, c.Leaf, "x.example.org", start); err != nil {
		t.Errorf("the guest, which trusts the first one: %v", err)
	}
	if b.Covers("example.org") {
		t.Error("covers the apex after a restart")
	}
	other, _ := authority(t, "h.example").Marshal()
	_, rest, _ := bytes.Cut(other, []byte("-----END CERTIFICATE-----"))
	cert, _, _ := bytes.Cut(text, []byte("-----END CERTIFICATE-----"))
	mixed := append(append(cert, "-----END CERTIFICATE-----"...), rest...)
	for name, bad := range map[string][]byte{
		"empty": nil, "no key": a.CertPEM(), "garbage": []byte("x"), "key of another": mixed,
		"cut": text[:len(text)-40],
	} {
		_, err := Unmarshal(bad)
		if f := fault.As(err); err == nil || f.Code != "bad_ca" || strings.Contains(err.Error(), "BEGIN") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// mitmproxy computes a leaf's authority key id as SHA-1 of the CA's public key.
func TestSubjectKeyID(t *testing.T) {
	a := authority(t, "api.example.com")
	bits, _ := a.cert.PublicKey.(*ecdsa.PublicKey).Bytes()
	if sum := sha1.Sum(bits); !bytes.Equal(a.cert.SubjectKeyId, sum[:]) {
		t.Errorf("%x", a.cert.SubjectKeyId)
	}
}

func TestLifetimes(t *testing.T) {
	a := authority(t, "api.example.com")
	clock := start
	a.now = func() time.Time { return clock }
	first, err := a.Leaf("api.example.com")
	if err != nil {
		t.Fatal(err)
	}
	clock = start.Add(23*time.Hour + 30*time.Minute)
	second, err := a.Leaf("api.example.com")
	if err != nil || second == first {
		t.Fatalf("not renewed: %v", err)
	}
	if err := verify(a, second.Leaf, "api.example.com", clock.Add(20*time.Hour)); err != nil {
		t.Error(err)
	}
	clock = a.NotAfter().Add(-time.Minute)
	last, err := a.Leaf("api.example.com")
	if err != nil || last.Leaf.NotAfter.After(a.NotAfter()) {
		t.Fatalf("%v", err)
	}
	clock = a.NotAfter()
	if _, err := a.Leaf("api.example.com"); err == nil || fault.As(err).Code != "ca_expired" {
		t.Errorf("an expired authority signed: %v", err)
	}
}

// Whatever the clock does, what is handed out is valid by it, or nothing is.
func TestClockJumps(t *testing.T) {
	a := authority(t, "api.example.com")
	clock := start
	a.now = func() time.Time { return clock }
	for _, d := range []time.Duration{0, 3 * time.Hour, -5 * time.Hour, 26 * time.Hour, -6 * 24 * time.Hour, time.Minute, 12 * time.Hour, 0} {
		clock = start.Add(d)
		if !clock.Before(a.NotAfter()) {
			continue
		}
		leaf, err := a.Leaf("api.example.com")
		if err != nil {
			t.Fatalf("%v: %v", d, err)
		}
		if err := verify(a, leaf.Leaf, "api.example.com", clock); err != nil {
			t.Errorf("%v: %v", d, err)
		}
	}
	clock = start.Add(-8 * 24 * time.Hour)
	if _, err := a.Leaf("api.example.com"); err == nil || fault.As(err).Code != "ca_not_yet_valid" || fault.As(err).Exit != fault.Unavailable {
		t.Errorf("%v", err)
	}
	clock = start
	if _, err := a.Leaf("api.example.com"); err != nil {
		t.Errorf("the clock is right again: %v", err)
	}
}

func TestCacheIsBounded(t *testing.T) {
	a := authority(t, "*.example.org")
	for i := range maxLeaves + 50 {
		if _, err := a.Leaf(fmt.Sprintf("h%d.example.org", i)); err != nil {
			t.Fatal(err)
		}
	}
	if len(a.cached) != maxLeaves || a.order.Len() != maxLeaves {
		t.Errorf("%d %d", len(a.cached), a.order.Len())
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := New("x", nil, start, time.Hour); err == nil {
		t.Error("no hosts")
	}
	if _, err := New("x", []string{"192.0.2.1"}, start, time.Hour); err == nil || fault.As(err).Exit != fault.Data {
		t.Errorf("address: %v", err)
	}
}

// The libraries that clients in the guest are built on, through their tools.
func TestOpenSSLVerifies(t *testing.T) {
	bin, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("SKIPPED: openssl is not installed; certificates were checked against Go only")
	}
	a := authority(t, "api.example.com")
	c, err := a.Leaf("api.example.com")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	root, leaf := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "leaf.pem")
	os.WriteFile(root, a.CertPEM(), 0o600)
	os.WriteFile(leaf, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), 0o600)
	out, err := exec.Command(bin, "verify", "-x509_strict", "-CAfile", root, "-purpose", "sslserver", "-verify_hostname", "api.example.com", leaf).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestSystemRoots(t *testing.T) {
	dir := t.TempDir()
	a := authority(t, "api.example.com")
	good := filepath.Join(dir, "good.pem")
	key, _ := a.Marshal()
	os.WriteFile(good, append([]byte("# comment\n-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), key...), 0o600)
	empty := filepath.Join(dir, "empty.pem")
	os.WriteFile(empty, []byte("nothing"), 0o600)
	missing := filepath.Join(dir, "missing.pem")

	for _, c := range []struct {
		name, env string
		places    []string
		ok        bool
	}{
		{"first that has any", "", []string{missing, empty, good}, true},
		{"env wins", good, []string{empty}, true},
		{"env missing", missing, []string{good}, false},
		{"env empty", empty, []string{good}, false},
		{"none", "", []string{missing, empty}, false},
	} {
		b, err := systemRoots(c.env, c.places)
		if c.ok && (err != nil || !bytes.Equal(b, a.CertPEM())) {
			t.Errorf("%s: %v\n%s", c.name, err, b)
		}
		if f := fault.As(err); !c.ok && (err == nil || f.Exit != fault.Host || f.Hint == "") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func BenchmarkLeaf(b *testing.B) {
	a := authority(b, "*.example.org")
	var c *tls.Certificate
	for i := 0; b.Loop(); i++ {
		c, _ = a.Leaf(fmt.Sprintf("h%d.example.org", i))
	}
	_ = c
}

// TestTruststore: Java's own tool reads what is written for Java.
func TestTruststore(t *testing.T) {
	a, b := authority(t, "api.example.com"), authority(t, "*.example.org")
	store := Truststore(slices.Concat([]byte("# roots\n"), a.CertPEM(), b.CertPEM()))
	if !bytes.Equal(store, Truststore(slices.Concat(a.CertPEM(), b.CertPEM()))) {
		t.Error("the same roots make another file")
	}
	if n := binary.BigEndian.Uint32(store[8:]); n != 2 || !bytes.Contains(store, a.cert.Raw) || !bytes.Contains(store, b.cert.Raw) {
		t.Errorf("%d certificates", n)
	}
	bin, err := exec.LookPath("keytool")
	if err != nil {
		t.Skip("SKIPPED: Java is not installed, so its truststore was not read by it")
	}
	file := filepath.Join(t.TempDir(), "cacerts")
	if err := os.WriteFile(file, store, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(bin, "-list", "-rfc", "-keystore", file, "-storepass", TruststorePassword).CombinedOutput()
	for _, cert := range []*x509.Certificate{a.cert, b.cert} {
		line := base64.StdEncoding.EncodeToString(cert.Raw)[:64]
		if err != nil || !bytes.Contains(out, []byte(line)) {
			t.Errorf("%v\n%s", err, out)
		}
	}
	store[len(store)-30] ^= 1
	os.WriteFile(file, store, 0o600)
	if out, err := exec.Command(bin, "-list", "-keystore", file, "-storepass", TruststorePassword).CombinedOutput(); err == nil {
		t.Errorf("a broken file is read: %s", out)
	}
}
