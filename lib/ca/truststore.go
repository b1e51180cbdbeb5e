package ca

import (
	"bytes"
	"crypto/sha1"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"unicode/utf16"
)

// JKS, the Java KeyStore: written down in the sources of OpenJDK alone
// (sun.security.provider.JavaKeyStore).
const (
	jksMagic       = 0xfeedfeed
	jksVersion     = 2
	jksCertificate = 2 // a trusted certificate, without a key
	jksSalt        = "Mighty Aphrodite"
	// TruststorePassword is Java's own for its truststore. It keeps nothing
	// secret; a few programs want to give it.
	TruststorePassword = "changeit"
)

// Truststore gives the certificates of a PEM text as Java reads its trusted
// roots, in the format that every version of it knows (JKS). Java reads no PEM
// and no variable that names one.
func Truststore(roots []byte) []byte {
	var entries bytes.Buffer
	var n uint32
	for {
		var block *pem.Block
		if block, roots = pem.Decode(roots); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		n++
		entries.Write(binary.BigEndian.AppendUint32(nil, jksCertificate))
		jksText(&entries, fmt.Sprintf("bottle-%d", n))
		entries.Write(make([]byte, 8)) // when it was added: the same file for the same roots
		jksText(&entries, "X.509")
		entries.Write(binary.BigEndian.AppendUint32(nil, uint32(len(block.Bytes))))
		entries.Write(block.Bytes)
	}
	var out []byte
	for _, v := range []uint32{jksMagic, jksVersion, n} {
		out = binary.BigEndian.AppendUint32(out, v)
	}
	out = append(out, entries.Bytes()...)
	// The digest tells a broken file; it needs no secret.
	h := sha1.New()
	for _, c := range utf16.Encode([]rune(TruststorePassword)) {
		h.Write(binary.BigEndian.AppendUint16(nil, c))
	}
	h.Write([]byte(jksSalt))
	h.Write(out)
	return h.Sum(out)
}

// jksText writes ASCII as DataOutputStream.writeUTF does.
func jksText(b *bytes.Buffer, s string) {
	b.Write(binary.BigEndian.AppendUint16(nil, uint16(len(s))))
	b.WriteString(s)
}
