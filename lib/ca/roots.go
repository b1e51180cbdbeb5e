package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
)

// bundles are where systems keep their trusted roots in one file.
var bundles = []string{
	"/etc/ssl/certs/ca-certificates.crt",                // Debian, Ubuntu, Alpine, Arch
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", // Fedora, RHEL
	"/etc/pki/tls/certs/ca-bundle.crt",                  // older Fedora, RHEL
	"/etc/ssl/ca-bundle.pem",                            // openSUSE
	"/etc/ssl/cert.pem",                                 // Alpine, macOS, BSD
	"/usr/local/etc/openssl/cert.pem",                   // Homebrew
	"/opt/homebrew/etc/openssl@3/cert.pem",
}

// SystemRoots is the host's bundle of trusted roots as PEM: the file that
// SSL_CERT_FILE names, or else the first of the usual places that has any
// certificate. It is passed on as it is, unparsed, since every start of a
// bottle reads it; only a file with keys in it is reduced to its certificates.
// A host without any is a fault (78), as is a SSL_CERT_FILE that cannot be used.
func SystemRoots() ([]byte, error) {
	return systemRoots(os.Getenv("SSL_CERT_FILE"), bundles)
}

func systemRoots(file string, places []string) ([]byte, error) {
	if file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fault.New(fault.Host, "no_system_roots", "SSL_CERT_FILE: %w", err).
				WithHint("unset SSL_CERT_FILE, or let it name a PEM file")
		}
		if b = bundle(b); len(b) == 0 {
			return nil, fault.New(fault.Host, "no_system_roots", "SSL_CERT_FILE: %s holds no certificate", file).
				WithHint("unset SSL_CERT_FILE, or let it name a PEM file")
		}
		return b, nil
	}
	for _, p := range places {
		b, err := os.ReadFile(filepath.Clean(p))
		if err != nil {
			continue
		}
		if b = bundle(b); len(b) > 0 {
			return b, nil
		}
	}
	return nil, fault.New(fault.Host, "no_system_roots", "no trusted roots found in %s", strings.Join(places, ", ")).
		WithHint("install the package ca-certificates, or set SSL_CERT_FILE")
}

// bundle gives text if it can be a guest's, what of it can be, or nothing.
func bundle(text []byte) []byte {
	if bytes.Contains(text, []byte("PRIVATE KEY-----")) {
		return Certificates(text)
	}
	begin := bytes.Index(text, []byte("-----BEGIN CERTIFICATE-----"))
	if begin < 0 {
		return nil
	}
	// The first one tells a bundle from a text that only looks like one.
	if block, _ := pem.Decode(text[begin:]); block == nil {
		return nil
	} else if _, err := x509.ParseCertificate(block.Bytes); err != nil {
		return Certificates(text)
	}
	return append(bytes.TrimRight(text, "\n"), '\n')
}

// Certificates keeps the certificates of a PEM text that parse, and nothing
// else of it: comments, keys and broken blocks do not reach a guest's bundle.
func Certificates(text []byte) []byte {
	var out bytes.Buffer
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return out.Bytes()
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			continue
		}
		// Writing to a bytes.Buffer cannot fail.
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes})
	}
}
