package probe

import (
	"bytes"
	"net/textproto"
	"strconv"
	"strings"
)

// request is one message in a stream, read by the letter of RFC 9112.
type request struct {
	line, host string
	raw        []byte // head and body; with an anomaly, all the rest of the stream
	// anomaly says where two servers could read the message differently: that
	// is where smuggling starts.
	anomaly string
}

// requestHeads finds what any server could take for the head of a request: a
// line that ends in HTTP/1.x, up to the next empty line.
func requestHeads(data []byte) []string {
	var heads []string
	text := strings.ReplaceAll(string(data), "\r\n", "\n")
	for {
		i := strings.Index(text, " HTTP/1.")
		if i < 0 {
			return heads
		}
		start := strings.LastIndexByte(text[:i], '\n') + 1
		end := strings.Index(text[i:], "\n\n")
		if end < 0 {
			return heads
		}
		heads = append(heads, text[start:i+end+1])
		text = text[i+end+2:]
	}
}

// parseStream reads what a server got, strictly. It ends with the first anomaly.
func parseStream(data []byte) []request {
	var requests []request
	for len(data) > 0 {
		req, rest := parseRequest(data)
		if req.line == "" {
			break
		}
		req.raw = data[:len(data)-len(rest)]
		if req.anomaly != "" {
			req.raw = data
			return append(requests, req)
		}
		requests = append(requests, req)
		data = rest
	}
	return requests
}

// parseRequest reads the first message. Without the end of a head it has no line.
func parseRequest(data []byte) (req request, rest []byte) {
	end := bytes.Index(data, []byte("\r\n\r\n"))
	if lf := bytes.Index(data, []byte("\n\n")); lf >= 0 && (end < 0 || lf < end) {
		return request{line: "?", anomaly: "bare line feeds end a head"}, nil
	}
	if end < 0 {
		return request{}, nil
	}
	rest = data[end+4:]
	lines := strings.Split(string(data[:end]), "\r\n")
	req.line = lines[0]
	if req.line == "" {
		req.line = "?"
	}
	var lengths, encodings, hosts []string
	for i, l := range lines {
		if strings.ContainsAny(l, "\r\n\x00") {
			req.anomaly = "a bare CR, LF or NUL in a head"
			return req, nil
		}
		if i == 0 {
			continue
		}
		if l != "" && (l[0] == ' ' || l[0] == '\t') {
			req.anomaly = "a folded header line"
			return req, nil
		}
		name, value, ok := strings.Cut(l, ":")
		if !ok || name == "" || strings.ContainsAny(name, " \t") {
			req.anomaly = "a header line that is none: " + strconv.Quote(l)
			return req, nil
		}
		value = strings.Trim(value, " \t")
		switch textproto.CanonicalMIMEHeaderKey(name) {
		case "Content-Length":
			lengths = append(lengths, value)
		case "Transfer-Encoding":
			encodings = append(encodings, value)
		case "Host":
			hosts = append(hosts, value)
		}
	}
	if len(hosts) > 0 {
		req.host = hosts[0]
	}
	switch {
	case len(hosts) > 1:
		req.anomaly = "two Host headers"
	case len(lengths) > 0 && len(encodings) > 0:
		req.anomaly = "both Content-Length and Transfer-Encoding"
	case len(lengths) > 1:
		req.anomaly = "two Content-Length headers"
	case len(encodings) > 1 || len(encodings) == 1 && !strings.EqualFold(encodings[0], "chunked"):
		req.anomaly = "a Transfer-Encoding that is not chunked: " + strconv.Quote(strings.Join(encodings, ", "))
	case len(encodings) == 1 && strings.HasSuffix(req.line, "HTTP/1.0"):
		req.anomaly = "chunked in HTTP/1.0"
	case len(lengths) == 1:
		n, err := strconv.ParseUint(lengths[0], 10, 31)
		if err != nil || strings.HasPrefix(lengths[0], "+") {
			req.anomaly = "a Content-Length that is no number: " + strconv.Quote(lengths[0])
			return req, nil
		}
		rest = rest[min(int(n), len(rest)):]
	case len(encodings) == 1:
		rest, req.anomaly = skipChunks(rest)
	}
	return req, rest
}

func skipChunks(data []byte) (rest []byte, anomaly string) {
	for {
		end := bytes.Index(data, []byte("\r\n"))
		if end < 0 {
			return nil, ""
		}
		line := string(data[:end])
		n, err := strconv.ParseUint(line, 16, 31)
		if err != nil {
			return nil, "a chunk's size line that is no plain number: " + strconv.Quote(line)
		}
		data = data[end+2:]
		if n == 0 {
			// Trailers, up to an empty line.
			for {
				end := bytes.Index(data, []byte("\r\n"))
				if end < 0 {
					return nil, ""
				}
				line := data[:end]
				data = data[end+2:]
				if len(line) == 0 {
					return data, ""
				}
				name, _, _ := bytes.Cut(line, []byte(":"))
				switch strings.ToLower(string(name)) {
				case "host", "content-length", "transfer-encoding":
					return nil, "a trailer that belongs into the head: " + strconv.Quote(string(line))
				}
			}
		}
		if uint64(len(data)) < n+2 {
			return nil, ""
		}
		if string(data[n:n+2]) != "\r\n" {
			return nil, "a chunk that is longer than its size"
		}
		data = data[n+2:]
	}
}
