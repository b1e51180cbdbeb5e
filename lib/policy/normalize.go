// Package policy decides what may leave a bottle. It is pure: it resolves no
// name, opens no connection and reads no clock, so that the same rules give the
// same answer in a plan, in `explain`, in a replay and at the gate.
//
// The order of things at the gate: Matcher.Decide on what the client asked for,
// then one resolution, then Matcher.CheckAddr on every address of the answer,
// then a dial to an address that was checked.
package policy

import (
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Classes of a rule, for people who review a plan (plan.Rule.Class).
const (
	ClassExact    = "exact"
	ClassWildcard = "wildcard"
	ClassIPv4     = "ipv4"    // one public address
	ClassIPv6     = "ipv6"    // one public address
	ClassCIDR     = "cidr"    // several addresses, not all of them private
	ClassPrivate  = "private" // private, loopback, link-local or otherwise not global
	ClassCGNAT    = "cgnat"   // 100.64.0.0/10 and fd7a:115c:a1e0::/48, where Tailscale lives
)

// Limits of a name, RFC 1035 section 2.3.4.
const (
	maxName  = 253
	maxLabel = 63
)

// The widest ranges an allow rule may open. Anything wider is `*` by another
// name.
const (
	minBits4 = 8
	minBits6 = 16
)

// Entry is one normalised allowlist entry: exactly one of Host and Prefix is
// set. Host is lower-case ASCII without a trailing dot, "*." in front for
// everything below it. Prefix is masked; a single address has all its bits.
type Entry struct {
	Host   string
	Prefix netip.Prefix
	Class  string
}

// CIDR is Prefix as text, or "" for an entry that is a name.
func (e Entry) CIDR() string {
	if e.Host != "" {
		return ""
	}
	return e.Prefix.String()
}

// Normalize reads an entry that is to allow something: a name, a wildcard, an
// address, or a range in CIDR form. What cannot be enforced exactly as written,
// or opens so much that it is no allowlist, is a fault (65) whose hint holds the
// corrected form.
//
// An IPv4-mapped IPv6 address (::ffff:192.0.2.1) is refused and not rewritten:
// a rule has to read as what it reaches.
func Normalize(s string) (Entry, error) {
	e, err := NormalizeDeny(s)
	if err != nil {
		return Entry{}, err
	}
	if err := checkAllowed(e, s); err != nil {
		return Entry{}, err
	}
	return e, nil
}

// NormalizeDeny reads an entry that is to deny something. It takes the forms of
// Normalize, and also those that would be too broad to allow.
func NormalizeDeny(s string) (Entry, error) {
	if e, ok := plainName(s); ok {
		return e, nil
	}
	if f := misshapen(s); f != nil {
		return Entry{}, f
	}
	if strings.Contains(s, "/") {
		return parseCIDR(s)
	}
	base, wildcard := strings.CutPrefix(s, "*.")
	if strings.Contains(base, "*") {
		return Entry{}, innerStar(s, base)
	}
	name, ip, f := parseHost(base)
	if f == nil && !ip.IsValid() {
		name, f = toASCII(base)
	}
	if f == nil && !ip.IsValid() && !isASCII(base) {
		// Mapping may turn letters into digits: look at the outcome again.
		name, ip, f = parseHost(name)
	}
	switch {
	case f != nil:
		return Entry{}, f
	case ip.IsValid() && wildcard:
		return Entry{}, badHost("%s: an address has nothing below it", quote(s)).
			WithHint("write %q, or a range such as %q", ip, "192.0.2.0/24")
	case ip.IsValid():
		p := netip.PrefixFrom(ip, ip.BitLen())
		return Entry{Prefix: p, Class: classOf(p)}, nil
	case wildcard:
		return Entry{Host: "*." + name, Class: ClassWildcard}, nil
	}
	return Entry{Host: name, Class: ClassExact}, nil
}

// plainName is the short way for what nearly every entry is: a name that is
// normal already.
func plainName(s string) (Entry, bool) {
	base, wildcard := strings.CutPrefix(s, "*.")
	if !normalName(base) || strings.Contains(base, "xn--") {
		return Entry{}, false
	}
	if wildcard {
		return Entry{Host: s, Class: ClassWildcard}, true
	}
	return Entry{Host: s, Class: ClassExact}, true
}

// normalName tells if s is a name as parseHost would return it.
func normalName(s string) bool {
	if len(s) == 0 || len(s) > maxName {
		return false
	}
	start := 0
	for i := 0; i <= len(s); i++ {
		if i < len(s) && s[i] != '.' {
			if c := s[i]; !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return false
			}
			continue
		}
		if n := i - start; n == 0 || n > maxLabel || s[start] == '-' || s[i-1] == '-' {
			return false
		}
		if i == len(s) && numeric(s[start:]) {
			return false
		}
		start = i + 1
	}
	return true
}

// misshapen refuses what is no host at all, with the form that was meant.
func misshapen(s string) *fault.Error {
	switch {
	case s == "":
		return badHost("an empty entry").WithHint("write a host name, or remove the entry; what is not listed is denied")
	case s == "*" || s == "*.":
		return fault.New(fault.Data, "too_broad", "%s matches every host", quote(s)).
			WithHint("list the hosts the agent needs; what is not listed is denied")
	case strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f || r == 0xa0 || r == 0xfeff }):
		if t := strings.TrimSpace(s); t != s && !strings.ContainsAny(t, " \t\r\n") && isASCII(t) && t != "" {
			return badHost("%s has a space or control character", quote(s)).WithHint("write %q", t)
		}
		return badHost("%s has a space or control character", quote(s)).WithHint("write one host in each entry")
	case strings.ContainsAny(s, ",;"):
		return badHost("%s holds more than one host", quote(s)).WithHint("write one host in each entry")
	case strings.Contains(s, "://") || strings.HasPrefix(s, "//"):
		return badHost("%s is a URL, not a host", quote(s)).WithHint("%s", instead(s))
	case strings.Contains(s, "@"):
		return badHost("%s has a user name", quote(s)).WithHint("%s", instead("//"+s))
	case strings.ContainsAny(s, `\?#`):
		return badHost("%s has a path or query", quote(s)).WithHint("%s", instead("//"+s))
	case strings.Contains(s, "/"):
		if head, _, _ := strings.Cut(s, "/"); !looksLikeAddress(head) {
			return badHost("%s has a path", quote(s)).WithHint("%s; rules are about hosts and ports", instead("//"+s))
		}
	case strings.HasPrefix(s, "["):
		return badHost("%s has brackets", quote(s)).WithHint("%s", instead("//"+s))
	case strings.Contains(s, "%"):
		return badHost("%s has a zone or an escape", quote(s)).WithHint("write the plain name or address; zones are not supported")
	case strings.Count(s, ":") == 1:
		return badHost("%s has a port", quote(s)).WithHint("%s", instead("//"+s))
	}
	return nil
}

// instead gives the entry that was meant by a URL.
func instead(raw string) string {
	u, err := url.Parse(raw)
	if err != nil || u.Hostname() == "" {
		return "write the host name alone"
	}
	host := strings.ToLower(u.Hostname())
	port, err := strconv.Atoi(u.Port())
	if u.Scheme == "http" {
		if err != nil {
			port = 80
		}
		return fmt.Sprintf(`write { "host": %q, "ports": [%d], "protocol": "http" }`, host, port)
	}
	if err != nil || port == 443 {
		return fmt.Sprintf("write %q", host)
	}
	return fmt.Sprintf(`write { "host": %q, "ports": [%d] }`, host, port)
}

func innerStar(s, base string) *fault.Error {
	f := badHost("%s: a star may only stand for everything below a name, as in %q", quote(s), "*.example.org")
	if i := strings.LastIndex(base, "*"); i >= 0 {
		if _, rest, ok := strings.Cut(base[i:], "."); ok && strings.Contains(rest, ".") && isASCII(rest) {
			return f.WithHint("list the exact hosts, or write %q", "*."+strings.ToLower(rest))
		}
	}
	return f.WithHint("list the exact hosts")
}

// parseHost reads a name or an address, as written in a rule or sent by a
// client. Only ASCII letters are folded. A name is returned in lower case
// without its trailing dot; one that is not ASCII is returned as it is.
func parseHost(s string) (name string, ip netip.Addr, f *fault.Error) {
	if strings.Contains(s, ":") {
		ip, f = parseIPv6(s)
		return "", ip, f
	}
	name = strings.TrimSuffix(s, ".")
	if !isASCII(name) {
		return name, ip, nil
	}
	name = lowerASCII(name)
	if normalName(name) {
		return name, ip, nil
	}
	if name == "" || len(name) > maxName {
		return "", ip, badHost("%s is not 1 to %d characters long", quote(s), maxName).WithHint("write a host name")
	}
	labels := strings.Split(name, ".")
	if numeric(labels[len(labels)-1]) {
		ip, f = parseIPv4(name)
		return "", ip, f
	}
	for _, l := range labels {
		switch {
		case l == "":
			return "", ip, badHost("%s has an empty label", quote(s)).WithHint("write the name with single dots")
		case len(l) > maxLabel:
			return "", ip, badHost("%s has a label longer than %d characters", quote(s), maxLabel).WithHint("write the host's real name")
		case l[0] == '-' || l[len(l)-1] == '-':
			return "", ip, badHost("%s has a label that starts or ends with a hyphen", quote(s)).WithHint("write the host's real name")
		}
	}
	return "", ip, badHost("%s has a character that no host name has", quote(s)).
		WithHint("letters, digits, hyphens and dots make a name")
}

func parseIPv6(s string) (netip.Addr, *fault.Error) {
	ip, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return ip, badHost("%s is neither a name nor an address", quote(s)).
			WithHint("a port goes into \"ports\"; an IPv6 address is written like %q", "2001:db8::1")
	case ip.Zone() != "":
		return ip, badHost("%s has a zone", quote(s)).WithHint("zones are not supported; write the address of another interface")
	case ip.Is4In6():
		return ip, badHost("%s is an IPv4 address in IPv6 form", quote(s)).WithHint("write %q", ip.Unmap())
	}
	return ip, nil
}

// parseIPv4 reads a name whose last label is a number. Such a name is an
// address to resolvers in some form (0x7f.1, 2130706433, 010.0.0.1), and which
// one depends on the resolver: only the plain form is taken.
func parseIPv4(s string) (netip.Addr, *fault.Error) {
	ip, err := netip.ParseAddr(s)
	if err == nil {
		return ip, nil
	}
	f := badHost("%s is a number form of an address", quote(s))
	if v, ok := legacyIPv4(s); ok {
		return ip, f.WithHint("write %q", v)
	}
	return ip, f.WithHint("write four decimal numbers without leading zeros, such as %q", "192.0.2.1")
}

// legacyIPv4 reads the forms of inet_aton(3), for the hint of a refusal.
func legacyIPv4(s string) (netip.Addr, bool) {
	parts := strings.Split(s, ".")
	if len(parts) > 4 {
		return netip.Addr{}, false
	}
	var v uint64
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 0, 32)
		if err != nil || strings.Contains(p, "_") {
			return netip.Addr{}, false
		}
		last := i == len(parts)-1
		if !last && n > 255 || last && n >= 1<<(8*uint(5-len(parts))) {
			return netip.Addr{}, false
		}
		if last {
			v |= n
		} else {
			v |= n << (24 - 8*uint(i))
		}
	}
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}), true
}

func parseCIDR(s string) (Entry, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return Entry{}, fault.New(fault.Data, "bad_cidr", "%s is no range of addresses", quote(s)).
			WithHint("write an address and its prefix length, such as %q", "192.0.2.0/24")
	}
	if p.Addr().Is4In6() {
		f := fault.New(fault.Data, "bad_cidr", "%s is an IPv4 range in IPv6 form", quote(s))
		if p.Bits() >= 96 {
			return Entry{}, f.WithHint("write %q", netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96).Masked())
		}
		return Entry{}, f.WithHint("write the IPv4 range")
	}
	if p != p.Masked() {
		return Entry{}, fault.New(fault.Data, "bad_cidr", "%s has bits set behind the prefix", quote(s)).
			WithHint("write %q for the range, or %q for the one address", p.Masked(), p.Addr())
	}
	return Entry{Prefix: p, Class: classOf(p)}, nil
}

// toASCII gives a name in the form it has on the wire (IDNA2008, lookup
// profile). A name that is ASCII already is checked where it holds encoded
// labels.
func toASCII(s string) (string, *fault.Error) {
	s = strings.TrimSuffix(s, ".")
	if isASCII(s) {
		s = lowerASCII(s)
		if !strings.Contains(s, "xn--") {
			return s, nil
		}
	}
	a, err := idna.Lookup.ToASCII(s)
	if err == nil && a != s {
		// What was mapped has to stand by itself: invalid bytes are mapped too.
		_, err = idna.Lookup.ToASCII(a)
	}
	if err != nil || !utf8.ValidString(s) {
		return "", badHost("%s is not a valid international name", quote(s)).
			WithHint("write its ASCII form, which starts with xn--")
	}
	return a, nil
}

// checkAllowed refuses what is fine to deny and too much to allow.
func checkAllowed(e Entry, s string) error {
	if e.Host == "" {
		return checkAllowedPrefix(e.Prefix, s)
	}
	if e.Host == "localhost" || strings.HasSuffix(e.Host, ".localhost") {
		return badHost("%s is the bottle itself when an agent asks for it", quote(s)).
			WithHint(`give the host's service a name of its own: { "host": "local.example", "ports": [8080], "protocol": "http", "addresses": ["127.0.0.1"] }`)
	}
	base, wildcard := strings.CutPrefix(e.Host, "*.")
	if wildcard && publicSuffix(base) {
		return fault.New(fault.Data, "too_broad", "%s covers names that anyone can register", quote(s)).
			WithHint("write a name below it, such as %q", "*.example."+base)
	}
	return nil
}

func checkAllowedPrefix(p netip.Prefix, s string) error {
	if p.IsSingleIP() {
		if f := neverReachable(p.Addr()); f != nil {
			return fault.New(fault.Data, f.Code, "%s can never be reached: %s", quote(s), f.Msg).
				WithHint("remove the entry")
		}
	}
	least := minBits4
	if p.Addr().Is6() {
		least = minBits6
	}
	if p.Bits() < least {
		return fault.New(fault.Data, "too_broad", "%s is wider than /%d", quote(s), least).
			WithHint("write the ranges that the agent needs")
	}
	for _, t := range transition {
		if t.prefix.Overlaps(p) && p != loopback6 {
			return fault.New(fault.Data, "bad_cidr", "%s lies in %s (%s), which carries IPv4 addresses", quote(s), t.prefix, t.name).
				WithHint("write the IPv4 address that it stands for")
		}
	}
	return nil
}

// loopback6 lies in ::/96 and carries no IPv4 address all the same.
var loopback6 = netip.PrefixFrom(netip.IPv6Loopback(), 128)

// CheckPort is a fault (65) for a port that does not exist.
func CheckPort(port int) error {
	if port < 1 || port > 65535 {
		return fault.New(fault.Data, "bad_port", "port %d does not exist", port).WithHint("ports go from 1 to 65535")
	}
	return nil
}

// NormalizeAddress reads one member of a rule's addresses, which pin a name's
// resolution: a single address in plain form, private ones included.
func NormalizeAddress(s string) (netip.Addr, error) {
	e, err := NormalizeDeny(s)
	if err != nil {
		return netip.Addr{}, err
	}
	if e.Host != "" || !e.Prefix.IsSingleIP() || strings.Contains(s, "/") {
		return netip.Addr{}, fault.New(fault.Data, "bad_address", "%s is not an IP address", quote(s)).
			WithHint("write an address such as %q", "127.0.0.1")
	}
	if err := checkAllowedPrefix(e.Prefix, s); err != nil {
		return netip.Addr{}, err
	}
	return e.Prefix.Addr(), nil
}

// publicSuffix tells if names below base are sold or given to anyone: a single
// label, or one of the registries' own second-level names.
func publicSuffix(base string) bool {
	name, tld, ok := strings.Cut(base, ".")
	if !ok {
		return true
	}
	return strings.Contains(" "+secondLevel[tld]+" ", " "+name+" ")
}

// numeric tells if resolvers take a label for a number (WHATWG URL, "ends in a
// number").
func numeric(label string) bool {
	if hex, ok := strings.CutPrefix(label, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return label != "" && strings.Trim(label, "0123456789") == ""
}

func looksLikeAddress(s string) bool {
	return strings.Contains(s, ":") || s != "" && strings.Trim(s, "0123456789.") == ""
}

func isASCII(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// lowerASCII folds A to Z and nothing else: a fold of Unicode would make two
// different names one.
func lowerASCII(s string) string {
	for i := 0; i < len(s); i++ {
		if 'A' <= s[i] && s[i] <= 'Z' {
			b := []byte(s)
			for ; i < len(b); i++ {
				if 'A' <= b[i] && b[i] <= 'Z' {
					b[i] += 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return s
}

func badHost(format string, args ...any) *fault.Error {
	return fault.New(fault.Data, "bad_host", format, args...)
}

// quote shows what was written, with nothing that could act on a terminal, cut
// where it is too long to be read.
func quote(s string) string {
	if len(s) > 80 {
		return strconv.QuoteToASCII(s[:77]) + "…"
	}
	return strconv.QuoteToGraphic(s)
}
