package probe

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"time"
)

var discardLog = log.New(io.Discard, "", 0)

// authority signs for whatever name a client asks a canary server for.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	ech  []tls.EncryptedClientHelloKey

	mu     sync.Mutex
	leaves map[string]*tls.Certificate
}

// material is an authority on its way to another process of the laboratory.
type material struct {
	Cert, Key, ECHConfig, ECHKey []byte
}

func newMaterial(publicName string) (material, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return material{}, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "bottle-probe canaries"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return material{}, err
	}
	raw, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return material{}, err
	}
	ech, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return material{}, err
	}
	return material{Cert: der, Key: raw, ECHConfig: echConfig(ech.PublicKey().Bytes(), publicName), ECHKey: ech.Bytes()}, nil
}

// echConfig is one ECHConfig of draft-ietf-tls-esni: X25519, HKDF-SHA256,
// AES-128-GCM.
func echConfig(public []byte, name string) []byte {
	var b []byte
	b = append(b, 1, 0, 0x20) // id, KEM
	b = binary.BigEndian.AppendUint16(b, uint16(len(public)))
	b = append(b, public...)
	b = append(b, 0, 4, 0, 1, 0, 1) // one suite
	b = append(b, 0, byte(len(name)))
	b = append(b, name...)
	b = append(b, 0, 0)
	out := []byte{0xfe, 0x0d}
	out = binary.BigEndian.AppendUint16(out, uint16(len(b)))
	return append(out, b...)
}

// echList is the form in which a client is given configurations.
func echList(config []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(config))), config...)
}

func (m material) authority() (*authority, error) {
	cert, err := x509.ParseCertificate(m.Cert)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParseECPrivateKey(m.Key)
	if err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key, leaves: map[string]*tls.Certificate{},
		ech: []tls.EncryptedClientHelloKey{{Config: m.ECHConfig, PrivateKey: m.ECHKey, SendAsRetry: true}}}, nil
}

func (m material) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Cert})
}

// config is for one connection to dst; look is told of every hello.
func (a *authority) config(dst string, look func(*tls.ClientHelloInfo)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, EncryptedClientHelloKeys: a.ech,
		GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			look(h)
			name := h.ServerName
			if name == "" {
				name, _, _ = net.SplitHostPort(dst)
			}
			return a.leaf(name)
		},
	}
}

func (a *authority) leaf(name string) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.leaves[name]; c != nil {
		return c, nil
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip, err := netip.ParseAddr(name); err == nil {
		tmpl.IPAddresses = []net.IP{ip.Unmap().AsSlice()}
	} else {
		tmpl.DNSNames = []string{name}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &a.key.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	c := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: a.key}
	if len(a.leaves) < 1000 {
		a.leaves[name] = c
	}
	return c, nil
}
