package gate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Limits of a ClientHello. Post-quantum key shares make about 2 KiB; session
// tickets some more.
const (
	maxHello   = 32 << 10
	maxRecord  = 16<<10 + 256
	maxRecords = 64 << 10 // all records up to its end, headers included
)

// TLS numbers, RFC 8446 and RFC 9849.
const (
	recordCCS         = 20
	recordAlert       = 21
	recordHandshake   = 22
	recordData        = 23
	typeClientHello   = 1
	typeServerHello   = 2
	extServerName     = 0
	extECH            = 0xfe0d
	extESNI           = 0xffce
	alertAccessDenied = 49
)

// hello is what the gate looks at in a ClientHello.
type hello struct {
	sni    string
	hasSNI bool
	ech    bool
}

// helloError says why a ClientHello was refused.
type helloError struct{ code, reason string }

func (e *helloError) Error() string { return e.reason }

func badHello(format string, args ...any) error {
	return &helloError{"bad_client_hello", fmt.Sprintf(format, args...)}
}

// readHello reads records up to the end of one ClientHello, however many it is
// split over, and returns it with the bytes it came in. With second set, as
// after a HelloRetryRequest, change_cipher_spec and early data may precede it.
func readHello(r io.Reader, second bool) (raw []byte, h hello, err error) {
	var msg []byte
	for {
		at := len(raw)
		if raw, err = readMore(r, raw, 5); err != nil {
			return raw, h, err
		}
		kind, size := raw[at], int(binary.BigEndian.Uint16(raw[at+3:]))
		skip := second && len(msg) == 0 && (kind == recordCCS || kind == recordData)
		switch {
		case kind != recordHandshake && !skip || raw[at+1] != 3 || raw[at+2] > 4:
			return raw, h, &helloError{"not_tls", "the client did not begin with a TLS handshake"}
		case size == 0 || size > maxRecord || len(raw)+size > maxRecords:
			return raw, h, badHello("a TLS record of %d bytes", size)
		}
		if raw, err = readMore(r, raw, size); err != nil {
			return raw, h, err
		}
		if skip {
			continue
		}
		msg = append(msg, raw[len(raw)-size:]...)
		done, err := wholeHello(msg)
		if err != nil {
			return raw, h, err
		}
		if done {
			h, err = parseHello(msg[4:])
			return raw, h, err
		}
	}
}

func readMore(r io.Reader, raw []byte, n int) ([]byte, error) {
	at := len(raw)
	raw = append(raw, make([]byte, n)...)
	got, err := io.ReadFull(r, raw[at:])
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		err = &helloError{"no_client_hello", "the client ended the connection before its TLS handshake"}
	}
	return raw[:at+got], err
}

// wholeHello tells if msg holds one whole ClientHello and nothing else.
func wholeHello(msg []byte) (bool, error) {
	if msg[0] != typeClientHello {
		return false, badHello("the first handshake message is no ClientHello")
	}
	if len(msg) < 4 {
		return false, nil
	}
	size := int(msg[1])<<16 | int(msg[2])<<8 | int(msg[3])
	switch {
	case size > maxHello:
		return false, badHello("a ClientHello of %d bytes; %d are allowed", size, maxHello)
	case len(msg) > 4+size:
		return false, badHello("bytes follow the ClientHello in its record")
	}
	return len(msg) == 4+size, nil
}

// parser takes a TLS structure apart; it stays empty once something is short.
type parser struct {
	b   []byte
	bad bool
}

func (p *parser) take(n int) []byte {
	if p.bad || n > len(p.b) {
		p.bad, p.b = true, nil
		return nil
	}
	head := p.b[:n]
	p.b = p.b[n:]
	return head
}

// number reads a big-endian number of the given bytes.
func (p *parser) number(bytes int) (n int) {
	for _, c := range p.take(bytes) {
		n = n<<8 | int(c)
	}
	return n
}

// vector reads what is preceded by its length in the given bytes.
func (p *parser) vector(bytes int) *parser {
	v := &parser{b: p.take(p.number(bytes))}
	v.bad = p.bad
	return v
}

func (p *parser) more() bool { return len(p.b) > 0 }

// ended tells if all was read and nothing was missing.
func (p *parser) ended() bool { return !p.bad && len(p.b) == 0 }

// parseHello reads the body of a ClientHello, RFC 8446 section 4.1.2.
func parseHello(b []byte) (h hello, err error) {
	p := &parser{b: b}
	p.take(2 + 32) // version, random
	p.vector(1)    // session id
	p.vector(2)    // cipher suites
	p.vector(1)    // compression methods
	if p.bad {
		return h, badHello("the ClientHello is cut short")
	}
	if !p.more() {
		return h, nil
	}
	list := p.vector(2)
	if !p.ended() {
		return h, badHello("the extensions of the ClientHello have a wrong length")
	}
	seen := make(map[int]bool)
	for list.more() {
		kind, data := list.number(2), list.vector(2)
		switch {
		case list.bad:
			return h, badHello("an extension of the ClientHello is cut short")
		case seen[kind]:
			return h, badHello("an extension of the ClientHello is there twice")
		}
		seen[kind] = true
		if err := h.extension(kind, data); err != nil {
			return h, err
		}
	}
	return h, nil
}

func (h *hello) extension(kind int, data *parser) error {
	switch kind {
	case extECH, extESNI:
		h.ech = true
	case extServerName:
		// Exactly one name of type host_name, RFC 6066 section 3.
		list := data.vector(2)
		host := list.number(1) == 0
		name := list.vector(2)
		if !data.ended() || !host || !list.ended() || !name.more() {
			return badHello("the server name of the ClientHello is malformed")
		}
		h.sni, h.hasSNI = string(name.b), true
	}
	return nil
}

// retryRandom marks a ServerHello as a HelloRetryRequest, RFC 8446 section 4.1.3.
const retryRandom = "\xcf\x21\xad\x74\xe5\x9a\x61\x11\xbe\x1d\x8c\x02\x1e\x65\xb8\x91" +
	"\xc2\xa2\x11\x16\x7a\xbb\x8c\x5e\x07\x9e\x09\xe2\xc8\xa8\x33\x9c"

// serverStart is how many bytes of the server's first record tell if it is a
// HelloRetryRequest: record header, message header, version, random.
const serverStart = 5 + 4 + 2 + 32

// isRetry tells if the server asks for a second ClientHello.
func isRetry(b []byte) bool {
	return len(b) >= serverStart && b[0] == recordHandshake && b[5] == typeServerHello &&
		string(b[11:serverStart]) == retryRandom
}

// alert is a fatal TLS alert record.
func alert(description byte) []byte {
	return []byte{recordAlert, 3, 3, 0, 2, 2, description}
}
