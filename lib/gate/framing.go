package gate

import (
	"bytes"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Limits of a request's head and of the lines inside a chunked body.
const (
	maxHead    = 64 << 10
	maxHeaders = 200
	maxChunk   = 16 // hex digits of a chunk size
)

// framing follows the bytes that a client sends over one HTTP/1 connection and
// refuses what two parsers could read differently: both lengths, doubled
// lengths, folded or bare-LF lines, blanks before a colon, control characters,
// odd chunks (RFC 9112 sections 2.2, 5, 6.3, 7.1, 11.2). net/http accepts some
// of these and repairs them silently, so it only gets to see bytes that have
// passed here. The zero value is ready.
type framing struct {
	state state
	buf   []byte // the head, chunk line or trailer so far
	left  int64  // bytes to come in the body or chunk
}

type state int

const (
	inHead state = iota
	inBody
	inChunkSize
	inChunk
	inChunkEnd
	inTrailer
	inTunnel // after a CONNECT everything is opaque
)

// idle tells if the next byte would begin a request.
func (f *framing) idle() bool { return f.state == inHead && len(f.buf) == 0 }

// feed takes the next bytes of the connection. It returns how many of them are
// in order, and why not more. Those of an incomplete head (see open) are not to
// be passed on yet.
func (f *framing) feed(p []byte) (int, *Refusal) {
	for n := 0; n < len(p); {
		switch f.state {
		case inTunnel:
			return len(p), nil
		case inBody, inChunk:
			step := int(min(f.left, int64(len(p)-n)))
			n += step
			if f.left -= int64(step); f.left == 0 {
				f.endOfData()
			}
		default:
			if bad := f.take(p[n]); bad != nil {
				return n, bad
			}
			n++
		}
	}
	return len(p), nil
}

func (f *framing) endOfData() {
	if f.state == inBody {
		f.state = inHead
		return
	}
	f.state = inChunkEnd
}

// take adds one byte of a head, a chunk line or a trailer.
func (f *framing) take(c byte) *Refusal {
	last := byte(0)
	if len(f.buf) > 0 {
		last = f.buf[len(f.buf)-1]
	}
	switch {
	case c == '\n' && last != '\r', last == '\r' && c != '\n':
		return badRequest("a line has to end in CR LF")
	case c < 0x20 && c != '\t' && c != '\r' && c != '\n', c == 0x7f:
		return badRequest("a control character is in the head of the request")
	case len(f.buf) == maxHead:
		return &Refusal{Status: http.StatusRequestHeaderFieldsTooLarge, Code: "head_too_large",
			Reason: "the head of a request may have " + strconv.Itoa(maxHead) + " bytes"}
	}
	f.buf = append(f.buf, c)
	if c == '\n' {
		bad := f.line()
		if bad != nil {
			f.buf = f.buf[:len(f.buf)-1]
		}
		return bad
	}
	switch {
	case f.state == inChunkSize && len(f.buf) > maxChunk+1:
		return badRequest("a chunk size is too long, or has an extension")
	case f.state == inChunkEnd && c != '\r':
		return badRequest("a chunk is longer than its size")
	}
	return nil
}

// open is how many of the bytes taken belong to a head that is not complete.
func (f *framing) open() int {
	if f.state == inHead {
		return len(f.buf)
	}
	return 0
}

// line acts on a line that has just been completed.
func (f *framing) line() *Refusal {
	switch f.state {
	case inChunkEnd:
		f.next(inChunkSize)
	case inChunkSize:
		size, err := strconv.ParseUint(string(f.buf[:len(f.buf)-2]), 16, 63)
		if err != nil || !isHex(f.buf[0]) {
			return badRequest("a chunk size is not hexadecimal")
		}
		f.next(inChunk)
		if f.left = int64(size); size == 0 {
			f.next(inTrailer)
		}
	case inTrailer:
		if !endOfFields(f.buf) {
			return nil
		}
		fields, bad := parseFields(f.buf)
		if bad != nil {
			return bad
		}
		for _, x := range fields {
			if x.is("content-length") || x.is("transfer-encoding") || x.is("host") {
				return badRequest("the trailer has a field that belongs into the head")
			}
		}
		f.next(inHead)
	case inHead:
		// The first line is looked at as soon as it is there: other protocols
		// have no second one, and would wait for an answer.
		if bytes.IndexByte(f.buf, '\n') == len(f.buf)-1 {
			return new(head).requestLine(string(f.buf[:len(f.buf)-2]))
		}
		if bytes.HasSuffix(f.buf, []byte("\r\n\r\n")) {
			return f.endOfHead()
		}
	}
	return nil
}

func (f *framing) next(s state) {
	f.state = s
	f.buf = f.buf[:0]
	if cap(f.buf) > 8<<10 {
		f.buf = nil
	}
}

func endOfFields(b []byte) bool {
	return len(b) == 2 || bytes.HasSuffix(b, []byte("\r\n\r\n"))
}

func (f *framing) endOfHead() *Refusal {
	h, bad := parseHead(f.buf)
	if bad != nil {
		return bad
	}
	switch {
	case h.method == http.MethodConnect:
		f.next(inTunnel)
	case h.chunked:
		f.next(inChunkSize)
	case h.length > 0:
		f.next(inBody)
		f.left = h.length
	default:
		f.next(inHead)
	}
	return nil
}

// head is what framing needs to know of a request.
type head struct {
	method, target, host string
	http10               bool
	chunked              bool
	length               int64 // -1 without one
}

func parseHead(b []byte) (head, *Refusal) {
	h := head{length: -1}
	line, rest, _ := bytes.Cut(b, []byte("\r\n"))
	if bad := h.requestLine(string(line)); bad != nil {
		return h, bad
	}
	fields, bad := parseFields(rest)
	if bad != nil {
		return h, bad
	}
	hosts := 0
	for _, x := range fields {
		switch {
		case x.is("host"):
			hosts++
			h.host = x.value
		case x.is("expect") && !strings.EqualFold(x.value, "100-continue"):
			return h, badRequest("Expect may be 100-continue")
		case x.is("content-length"):
			n, ok := digits(x.value)
			if !ok || h.length >= 0 {
				return h, badRequest("Content-Length has to be one decimal number")
			}
			h.length = n
		case x.is("transfer-encoding"):
			if h.chunked || h.http10 || !strings.EqualFold(x.value, "chunked") {
				return h, badRequest("Transfer-Encoding may be chunked, once, in HTTP/1.1")
			}
			h.chunked = true
		}
	}
	switch {
	case h.chunked && h.length >= 0:
		return h, badRequest("a request may have Content-Length or Transfer-Encoding and not both")
	case hosts > 1:
		return h, badRequest("a request may have one Host header")
	case hosts == 0 && !h.http10 && h.method != http.MethodConnect:
		return h, badRequest("the Host header is missing")
	case h.method == http.MethodConnect && (h.chunked || h.length > 0):
		return h, badRequest("CONNECT has no body")
	}
	if _, _, ok := cutPort(h.host); hosts == 1 && !ok {
		return h, badRequest("the Host header is malformed")
	}
	if hosts == 1 {
		return h, h.checkHost()
	}
	return h, nil
}

func (h *head) requestLine(line string) *Refusal {
	parts := strings.Split(line, " ")
	if len(parts) != 3 {
		return badRequest("the request line has to be method, target and version with single blanks")
	}
	h.method, h.target = parts[0], parts[1]
	switch parts[2] {
	case "HTTP/1.1":
	case "HTTP/1.0":
		h.http10 = true
	default:
		return badRequest("the gate speaks HTTP/1.1")
	}
	if !isToken(h.method) || len(h.method) > 32 {
		return badRequest("the method is no token")
	}
	if h.target == "" || strings.ContainsFunc(h.target, func(r rune) bool { return r < 0x21 || r > 0x7e || r == '#' }) {
		return badRequest("the target has a character that no target has")
	}
	address := h.target
	if h.method == http.MethodConnect && !strings.HasPrefix(address, "/") {
		address = "http://" + address
	}
	if _, err := url.ParseRequestURI(address); err != nil {
		return badRequest("the target is no address")
	}
	return nil
}

// checkHost holds the Host header against the authority of an absolute-form
// target: origins choose the site by the one, the gate decides by the other (RFC
// 9112 section 3.2.2). CONNECT's Host goes nowhere, and Node's http.request
// puts the proxy's own name there.
func (h *head) checkHost() *Refusal {
	scheme, rest, absolute := strings.Cut(h.target, "://")
	if !absolute || strings.HasPrefix(h.target, "/") || h.method == http.MethodConnect {
		return nil
	}
	authority := rest
	if i := strings.IndexAny(rest, "/?"); i >= 0 {
		authority = rest[:i]
	}
	port := map[string]string{"http": "80", "https": "443"}[strings.ToLower(scheme)]
	if sameAuthority(authority, h.host, port) {
		return nil
	}
	host, _, _ := cutPort(authority)
	return &Refusal{Status: http.StatusForbidden, Code: "host_mismatch", Host: host,
		Reason: "the Host header names another host than the target",
		Hint:   "send the same host in both"}
}

// sameAuthority compares host[:port] with host[:port].
func sameAuthority(a, b, defaultPort string) bool {
	ah, ap, aok := cutPort(a)
	bh, bp, bok := cutPort(b)
	if ap == "" {
		ap = defaultPort
	}
	if bp == "" {
		bp = defaultPort
	}
	return aok && bok && canonical(ah) == canonical(bh) && ap == bp
}

// cutPort takes host[:port] apart. An IPv6 address has to be in brackets, which
// are not part of the result.
func cutPort(s string) (host, port string, ok bool) {
	if strings.HasPrefix(s, "[") {
		host, port, ok = strings.Cut(s[1:], "]")
		if !ok || !strings.Contains(host, ":") || !isHost(host) {
			return host, "", false
		}
		if port == "" {
			return host, "", true
		}
		port, ok = strings.CutPrefix(port, ":")
		return host, port, ok && isPort(port)
	}
	host, port, more := strings.Cut(s, ":")
	return host, port, isHost(host) && !strings.HasSuffix(host, "..") && (!more || isPort(port))
}

// isHost tells if s has the characters of names and addresses. The policy says
// more about it; this keeps other parsers from seeing two things in one host.
func isHost(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || strings.IndexByte("-._:%*", c) >= 0) {
			return false
		}
	}
	return s != ""
}

func isPort(s string) bool {
	n, ok := digits(s)
	return ok && n > 0 && n <= 65535 && s[0] != '0'
}

// canonical is how a name is compared: lower case, without the trailing dot.
// Only ASCII is folded: the Kelvin sign is no k to whoever reads the bytes of a
// server name.
func canonical(host string) string {
	if strings.ContainsFunc(host, func(r rune) bool { return r >= utf8.RuneSelf }) {
		return host
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

type field struct{ name, value string }

func (f field) is(name string) bool { return strings.EqualFold(f.name, name) }

// parseFields reads header lines up to and including the empty line.
func parseFields(b []byte) ([]field, *Refusal) {
	var fields []field
	for {
		line, rest, _ := bytes.Cut(b, []byte("\r\n"))
		if len(line) == 0 {
			return fields, nil
		}
		b = rest
		name, value, ok := strings.Cut(string(line), ":")
		if !ok || !isToken(name) {
			return nil, badRequest("a header line is not name, colon, value, or is folded")
		}
		if len(fields) == maxHeaders {
			return nil, badRequest("a request may have " + strconv.Itoa(maxHeaders) + " header lines")
		}
		fields = append(fields, field{name, strings.Trim(value, " \t")})
	}
}

// isToken follows RFC 9110 section 5.6.2.
func isToken(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' {
			continue
		}
		if strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return s != ""
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

// digits reads a plain decimal number that fits in 18 digits.
func digits(s string) (int64, bool) {
	if s == "" || len(s) > 18 {
		return 0, false
	}
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}
