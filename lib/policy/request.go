package policy

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Codes of DecideRequest.
const (
	RequestNotAllowed = "request_not_allowed"
	AmbiguousPath     = "ambiguous_path"
)

// Limits of a rule's requests.
const (
	MaxRequests   = 200
	maxRequestLen = 1024
)

// RequestDecision is the answer about one HTTP request to a host that Decide has
// allowed already. Index is the entry of Rule.Requests that allows it, -1 if the
// rule has none.
type RequestDecision struct {
	Allow  bool
	Index  int
	Code   string
	Reason string // one sentence, lower case, for people; never holds the query
	Hint   string // what would change the answer; empty if allowed
}

// DecideRequest holds a request against the requests of an allow rule. target is
// what stands in the request line of HTTP/1, a path and perhaps a query, which
// takes no part. A rule without requests allows every one.
//
// Entries are matched byte for byte against the path as it was sent, in which
// only the hex digits of escapes are made upper case. Nothing is decoded, since
// servers differ in how often and in what order they do that: a path that two of
// them could read differently (see canonicalPath) is AmbiguousPath, unless an
// entry allows the method for every path.
//
// GET stands for HEAD too, which is GET without the body.
func DecideRequest(r *plan.Rule, method, target string) RequestDecision {
	if len(r.Requests) == 0 {
		return RequestDecision{Allow: true, Index: -1, Code: Allowed}
	}
	sent, _, _ := strings.Cut(target, "?")
	path, ambiguous := canonicalPath(sent)
	for i, entry := range r.Requests {
		m, p, _ := strings.Cut(entry, " ")
		if matchMethod(m, method) && (p == "/*" || ambiguous == "" && matchPath(p, path)) {
			return RequestDecision{Allow: true, Index: i, Code: Allowed}
		}
	}
	if ambiguous != "" {
		return RequestDecision{Index: -1, Code: AmbiguousPath,
			Reason: "servers read the path of the request in different ways: " + ambiguous,
			Hint:   fmt.Sprintf("send the path in its plain form; only an entry such as %q, for every path, lets it pass", "GET /*")}
	}
	return RequestDecision{Index: -1, Code: RequestNotAllowed,
		Reason: fmt.Sprintf("%s is allowed for certain requests only, and %s %s is none of them (%s)", r.Host+r.CIDR, clip(method), clip(path), r.RequestsFrom),
		Hint:   howToAllowRequest(r, method, path)}
}

func clip(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// howToAllowRequest gives the entry to add, if the request can be one.
func howToAllowRequest(r *plan.Rule, method, path string) string {
	entry, err := NormalizeRequest(method + " " + path)
	if err != nil {
		return fault.As(err).Hint
	}
	if len(entry) > 300 {
		return fmt.Sprintf("add an entry for it to the requests of %s in the manifest; a * at its end stands for the rest of a path", r.Host+r.CIDR)
	}
	return fmt.Sprintf("add %q to the requests of %s in the manifest", entry, r.Host+r.CIDR)
}

func matchMethod(entry, method string) bool {
	return entry == method || entry == "*" || entry == "GET" && method == "HEAD"
}

// matchPath compares segment by segment. A * at the end is the rest of the path,
// of any depth and perhaps empty; elsewhere it is one segment, as {name} is
// anywhere.
func matchPath(entry, path string) bool {
	for {
		e, entryRest, entryMore := strings.Cut(entry, "/")
		if e == "*" && !entryMore {
			return true
		}
		p, pathRest, pathMore := strings.Cut(path, "/")
		one := e == "*" || strings.HasPrefix(e, "{")
		if one && p == "" || !one && e != p || entryMore != pathMore {
			return false
		}
		if !entryMore {
			return true
		}
		entry, path = entryRest, pathRest
	}
}

// canonicalPath gives a path with the hex digits of its escapes in upper case,
// or says why servers could take it for different resources: some decode escapes
// before they look for slashes and dots, some twice; some take a backslash for a
// slash, cut segments at a semicolon, drop empty segments, or map characters to
// their like in ASCII. RFC 3986 has no use for what is refused here.
func canonicalPath(s string) (path, ambiguous string) {
	if !strings.HasPrefix(s, "/") {
		return "", "it does not begin with /"
	}
	var decoded strings.Builder
	upper := []byte(nil) // s with upper-case escapes, if there is a lower-case one
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c != '%' {
			if c != '/' && !isPathChar(c) {
				return "", fmt.Sprintf("it holds %q unescaped", c)
			}
			decoded.WriteByte(c)
			continue
		}
		if i+2 >= len(s) || !isHexDigit(s[i+1]) || !isHexDigit(s[i+2]) {
			return "", "it holds a % that begins no escape"
		}
		esc := strings.ToUpper(s[i : i+3])
		if esc != s[i:i+3] {
			if upper == nil {
				upper = []byte(s)
			}
			copy(upper[i:], esc)
		}
		b := hexValue(esc[1])<<4 | hexValue(esc[2])
		if isUnreserved(b) || b < 0x20 || b == 0x7f || strings.IndexByte(`/\%;?#`, b) >= 0 {
			return "", "it holds " + esc
		}
		decoded.WriteByte(b)
		i += 2
	}
	if why := ambiguousText(decoded.String()); why != "" {
		return "", why
	}
	if upper != nil {
		return string(upper), ""
	}
	return s, ""
}

// ambiguousText looks at a path once its escapes are decoded. None of these
// stands for a slash.
func ambiguousText(s string) string {
	if !utf8.ValidString(s) {
		return "its escapes are no UTF-8"
	}
	if i := strings.IndexFunc(s, looksLikeASCII); i >= 0 {
		r, _ := utf8.DecodeRuneInString(s[i:])
		return fmt.Sprintf("it holds %U, which some take for an ASCII character", r)
	}
	rest := s[1:]
	for {
		segment, after, more := strings.Cut(rest, "/")
		switch {
		case segment == "" && more:
			return "it holds an empty segment (//)"
		case segment != "" && strings.Trim(segment, ". ") == "":
			return "it holds a segment of dots"
		case !more:
			return ""
		}
		rest = after
	}
}

// looksLikeASCII: controls beyond ASCII, and characters that best-fit mappings
// and compatibility decomposition turn into slashes, dots and the like.
func looksLikeASCII(r rune) bool {
	return r >= 0x80 && r < 0xa0 || r >= 0xff01 && r <= 0xff5e ||
		slices.Contains([]rune{0x2024, 0x2025, 0x2026, 0x2044, 0x2215, 0x2216, 0x29f5, 0x29f8, 0x29f9, 0xfe52, 0xfe54, 0xfe68, 0xfe6a}, r)
}

// isPathChar is pchar of RFC 3986 but for ";", which begins parameters on some
// servers, and without escapes.
func isPathChar(c byte) bool {
	return isUnreserved(c) || strings.IndexByte("!$&'()*+,=:@", c) >= 0
}

func isUnreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0
}

func isHexDigit(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

// hexValue takes a digit in upper case.
func hexValue(c byte) byte {
	if c >= 'A' {
		return c - 'A' + 10
	}
	return c - '0'
}

// NormalizeRequest reads an entry of requests, "METHOD /path", and gives its
// normal form: escapes in upper case, a "**" at the end as "*". What could not
// be matched exactly as written is a fault (65) with the form that was meant.
func NormalizeRequest(s string) (string, error) {
	method, path, ok := strings.Cut(s, " ")
	switch {
	case len(s) > maxRequestLen:
		return "", badRequestEntry("an entry has at most %d bytes", maxRequestLen).WithHint("a * at the end stands for the rest of a path")
	case !ok || strings.ContainsAny(path, " \t"):
		return "", badRequestEntry("%s is no method and path", quote(s)).WithHint("write them with one blank, such as %q", "GET /repos/*")
	}
	if err := checkMethod(s, method); err != nil {
		return "", err
	}
	if err := checkPathForm(s, method, path); err != nil {
		return "", err
	}
	segments := strings.Split(path, "/")
	if last := len(segments) - 1; segments[last] == "**" {
		segments[last] = "*"
	}
	// With a plain segment for each wildcard it has to be a path that a request
	// can have.
	plain := slices.Clone(segments)
	for i, seg := range segments {
		switch {
		case isWildcard(seg):
			plain[i] = "x"
		case strings.ContainsAny(seg, "*{}"):
			return "", badRequestEntry("%s: %s is no wildcard", quote(s), quote(seg)).
				WithHint("* and {name} are whole segments; a * at the end is the rest of the path")
		}
	}
	canonical, ambiguous := canonicalPath(strings.Join(plain, "/"))
	if ambiguous != "" {
		return "", badRequestEntry("%s: servers read the path in different ways: %s", quote(s), ambiguous).
			WithHint("write the path as clients send it, with single slashes and without needless escapes")
	}
	for i, seg := range strings.Split(canonical, "/") {
		if !isWildcard(segments[i]) {
			segments[i] = seg
		}
	}
	return method + " " + strings.Join(segments, "/"), nil
}

// isWildcard tells if a segment of an entry is * or {name}, which is how API
// references write a variable segment.
func isWildcard(seg string) bool {
	name, ok := strings.CutPrefix(seg, "{")
	if !ok {
		return seg == "*"
	}
	name, ok = strings.CutSuffix(name, "}")
	return ok && name != "" && strings.IndexFunc(name, func(r rune) bool { return r > 0x7e || !isUnreserved(byte(r)) }) < 0
}

func checkMethod(s, method string) error {
	upper := strings.ToUpper(method)
	switch {
	case method == "*":
		return nil
	case method == "" || len(method) > 32 || strings.Trim(upper, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-") != "":
		return badRequestEntry("%s does not begin with a method", quote(s)).WithHint("write it like %q; * is every method", "GET /repos/*")
	case method != upper:
		return badRequestEntry("%s: methods are upper case", quote(s)).WithHint("write %s", upper)
	case slices.Contains([]string{"CONNECT", "TRACE", "TRACK"}, method):
		return badRequestEntry("%s is refused on every host", method).WithHint("remove the entry")
	}
	return nil
}

func checkPathForm(s, method, path string) error {
	scheme, rest, isURL := strings.Cut(path, "://")
	switch {
	case isURL && !strings.Contains(scheme, "/"):
		_, below, _ := strings.Cut(rest, "/")
		return badRequestEntry("%s has a URL where a path belongs", quote(s)).WithHint("write %q; the host is named beside it", method+" /"+below)
	case !strings.HasPrefix(path, "/"):
		return badRequestEntry("%s: a path begins with /", quote(s)).WithHint("write %q", method+" /"+path)
	case strings.ContainsAny(path, "?#"):
		return badRequestEntry("%s has a query, which takes no part", quote(s)).WithHint("write %q", method+" "+path[:strings.IndexAny(path, "?#")])
	}
	return nil
}

func badRequestEntry(format string, args ...any) *fault.Error {
	return fault.New(fault.Data, "bad_request_entry", format, args...)
}

// checkRequests is the strict reading of a rule's requests.
func checkRequests(r *plan.Rule) error {
	switch {
	case len(r.Requests) == 0 && r.RequestsFrom == "":
		return nil
	case len(r.Requests) == 0 || r.RequestsFrom == "":
		return badRule("requests and requests_from stand together")
	case !r.Inspect && r.Protocol != "http":
		return badRule("requests need a rule that is inspected, or of protocol http: no others are read")
	case len(r.Requests) > MaxRequests:
		return badRule("more than %d requests are named", MaxRequests)
	}
	for i, s := range r.Requests {
		n, err := NormalizeRequest(s)
		switch {
		case err != nil:
			return err
		case n != s:
			return badRule("request %s has to be written %q", quote(s), n)
		case slices.Contains(r.Requests[:i], s):
			return badRule("request %s stands twice", quote(s))
		}
	}
	return nil
}
