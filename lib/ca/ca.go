// Package ca is the certificate authority of one bottle. Its guest trusts it,
// nobody else does, and by its name constraints it is good for nothing but the
// hosts that the gate inspects.
package ca

import (
	"container/list"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Lifetimes of what is issued.
const (
	leafLife = 24 * time.Hour
	// backdate tolerates a guest clock that is behind the host's, and
	// authorityBackdate one of the host's that is set back later on.
	backdate          = time.Hour
	authorityBackdate = 7 * 24 * time.Hour
	// renewBefore is how long before its end a cached leaf is made anew.
	renewBefore = time.Hour
	maxLeaves   = 512
)

// Authority signs leaf certificates for the inspected hosts of one bottle. It
// may be used by many goroutines.
type Authority struct {
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	hosts []string
	now   func() time.Time

	mu     sync.Mutex
	leaf   *ecdsa.PrivateKey // one key for all leaves: they live and die together
	cached map[string]*list.Element
	order  *list.List // most recently used first
}

type entry struct {
	host string
	cert *tls.Certificate
}

// New makes an authority named after the bottle (vm.id) that is valid from now
// for life. hosts are the inspected ones: exact names or "*.name", lower case.
//
// The certificate is ECDSA P-256, path length 0, for server authentication
// only, with critical name constraints (RFC 5280 section 4.2.1.10): these names
// and what is below them, since a constraint cannot say "exactly", and no IP
// address. Leaf is exact.
func New(name string, hosts []string, now time.Time, life time.Duration) (*Authority, error) {
	if len(hosts) == 0 {
		return nil, fault.New(fault.Bug, "ca_without_hosts", "an authority for no host is not needed")
	}
	hosts = slices.Compact(slices.Sorted(slices.Values(hosts)))
	for _, h := range hosts {
		if _, err := netip.ParseAddr(h); err == nil {
			return nil, fault.New(fault.Data, "inspect_address", "%s is an address and cannot be inspected", h).
				WithHint("inspect hosts by name")
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, internal(err)
	}
	template, err := authorityTemplate(name, hosts, now, life, &key.PublicKey)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, internal(err)
	}
	return load(der, key, hosts)
}

func authorityTemplate(name string, hosts []string, now time.Time, life time.Duration, pub *ecdsa.PublicKey) (*x509.Certificate, error) {
	id, err := keyID(pub)
	if err != nil {
		return nil, err
	}
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	everyIPv4 := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	everyIPv6 := &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	return &x509.Certificate{
		SerialNumber:                serial,
		Subject:                     pkix.Name{Organization: []string{"bottle"}, CommonName: "bottle " + name},
		NotBefore:                   now.Add(-authorityBackdate),
		NotAfter:                    now.Add(life),
		IsCA:                        true,
		BasicConstraintsValid:       true,
		MaxPathLenZero:              true,
		KeyUsage:                    x509.KeyUsageCertSign,
		ExtKeyUsage:                 []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		SubjectKeyId:                id,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         constraints(hosts),
		ExcludedIPRanges:            []*net.IPNet{everyIPv4, everyIPv6},
	}, nil
}

func constraints(hosts []string) []string {
	var names []string
	for _, h := range hosts {
		// RFC 5280 knows no leading dot; "example.org" covers what is below it.
		names = append(names, strings.TrimPrefix(h, "*."))
	}
	return slices.Compact(slices.Sorted(slices.Values(names)))
}

// keyID is SHA-1 of the public key's bits (RFC 5280 section 4.2.1.2, method 1).
// mitmproxy computes the authority key id of its leaves in this way whatever
// the CA says, and OpenSSL then finds no issuer if it differs.
func keyID(pub *ecdsa.PublicKey) ([]byte, error) {
	bits, err := pub.Bytes()
	if err != nil {
		return nil, internal(err)
	}
	sum := sha1.Sum(bits)
	return sum[:], nil
}

func serialNumber() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, internal(err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func load(der []byte, key *ecdsa.PrivateKey, hosts []string) (*Authority, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, internal(err)
	}
	leaf, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, internal(err)
	}
	return &Authority{cert: cert, key: key, hosts: hosts, now: time.Now, leaf: leaf,
		cached: make(map[string]*list.Element), order: list.New()}, nil
}

// Covers tells if host is one of the inspected hosts.
func (a *Authority) Covers(host string) bool {
	if strings.HasPrefix(host, "*") {
		return false
	}
	for _, h := range a.hosts {
		below, wildcard := strings.CutPrefix(h, "*")
		if host == h && !wildcard || wildcard && strings.HasSuffix(host, below) && len(host) > len(below) {
			return true
		}
	}
	return false
}

// Leaf gives a certificate for host, from a bounded cache. A host that is not
// inspected is a fault (70), as is an authority that has expired, or that has not
// begun by a clock that was set back (69): its certificate stands in the guest as
// it is, and a renewed one would not be trusted there.
func (a *Authority) Leaf(host string) (*tls.Certificate, error) {
	if !a.Covers(host) {
		return nil, fault.New(fault.Bug, "ca_not_covered", "%s is not an inspected host", host)
	}
	now := a.now()
	if !now.Before(a.cert.NotAfter) {
		return nil, fault.New(fault.Unavailable, "ca_expired", "the bottle's certificate authority ended on %s",
			a.cert.NotAfter.UTC().Format(time.RFC3339)).WithHint("start the bottle anew")
	}
	if now.Before(a.cert.NotBefore) {
		return nil, fault.New(fault.Unavailable, "ca_not_yet_valid", "the bottle's certificate authority begins on %s, and it is %s now",
			a.cert.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)).WithHint("set the host's clock right, or start the bottle anew")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if e, ok := a.cached[host]; ok {
		cert := e.Value.(*entry).cert
		good := now.Add(renewBefore).Before(cert.Leaf.NotAfter) || cert.Leaf.NotAfter.Equal(a.cert.NotAfter)
		if good && !now.Before(cert.Leaf.NotBefore) { // the clock may have been set back
			a.order.MoveToFront(e)
			return cert, nil
		}
		a.drop(e)
	}
	cert, err := a.issue(host, now)
	if err != nil {
		return nil, err
	}
	a.cached[host] = a.order.PushFront(&entry{host, cert})
	if a.order.Len() > maxLeaves {
		a.drop(a.order.Back())
	}
	return cert, nil
}

func (a *Authority) drop(e *list.Element) {
	delete(a.cached, a.order.Remove(e).(*entry).host)
}

func (a *Authority) issue(host string, now time.Time) (*tls.Certificate, error) {
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	end := now.Add(leafLife)
	if end.After(a.cert.NotAfter) {
		end = a.cert.NotAfter
	}
	begin := now.Add(-backdate)
	if begin.Before(a.cert.NotBefore) {
		begin = a.cert.NotBefore
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		// X.520 bounds a common name at 64 characters; clients look at DNSNames.
		Subject:               pkix.Name{CommonName: host[:min(len(host), 64)]},
		NotBefore:             begin,
		NotAfter:              end,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:              []string{host},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, a.leaf.Public(), a.key)
	if err != nil {
		return nil, internal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, internal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: crypto.Signer(a.leaf), Leaf: leaf}, nil
}

// CertPEM is the certificate alone: what the guest is to trust.
func (a *Authority) CertPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// NotAfter is when the authority ends.
func (a *Authority) NotAfter() time.Time { return a.cert.NotAfter }

// Marshal gives certificate and key (SEC 1, which Go, OpenSSL, mitmproxy and
// pipelock all read) as PEM, for the keeper to hold over a restart of the gate.
func (a *Authority) Marshal() ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(a.key)
	if err != nil {
		return nil, internal(err)
	}
	block := &pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw, Headers: nil}
	hosts := &pem.Block{Type: hostsBlock, Bytes: []byte(strings.Join(a.hosts, "\n"))}
	return slices.Concat(pem.EncodeToMemory(block), pem.EncodeToMemory(hosts),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})), nil
}

// hostsBlock carries the exact hosts, which the constraints cannot tell from
// what is below them. Other readers of PEM skip a block they do not know.
const hostsBlock = "BOTTLE INSPECTED HOSTS"

// Unmarshal reads what Marshal wrote.
func Unmarshal(b []byte) (*Authority, error) {
	var der []byte
	var hosts []string
	var key *ecdsa.PrivateKey
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		switch block.Type {
		case "CERTIFICATE":
			der = block.Bytes
		case hostsBlock:
			hosts = strings.Split(string(block.Bytes), "\n")
		case "EC PRIVATE KEY":
			var err error
			if key, err = x509.ParseECPrivateKey(block.Bytes); err != nil {
				return nil, broken()
			}
		}
	}
	if der == nil || key == nil || len(hosts) == 0 {
		return nil, broken()
	}
	a, err := load(der, key, hosts)
	if err != nil || !key.PublicKey.Equal(a.cert.PublicKey) {
		return nil, broken()
	}
	return a, nil
}

// broken never wraps a parser's error: it might quote the key.
func broken() error {
	return fault.New(fault.Data, "bad_ca", "the bottle's certificate authority cannot be read").
		WithHint("start the bottle anew")
}

func internal(err error) error {
	return fault.New(fault.Bug, "ca_failed", "certificate authority: %w", err)
}
