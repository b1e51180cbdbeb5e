package policy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
)

func TestNormalizeAccepts(t *testing.T) {
	for _, tt := range []struct{ in, want, class string }{
		{"api.example.com", "api.example.com", "exact"},
		{"API.Example.COM", "api.example.com", "exact"},
		{"api.example.com.", "api.example.com", "exact"},
		{"intranet", "intranet", "exact"},
		{"a_b.example.com", "a_b.example.com", "exact"},
		{"r3---sn-abc.example.com", "r3---sn-abc.example.com", "exact"},
		{"3com.example", "3com.example", "exact"},
		{"0xcafe.example", "0xcafe.example", "exact"},
		{"bücher.example", "xn--bcher-kva.example", "exact"},
		{"BÜCHER.example.", "xn--bcher-kva.example", "exact"},
		{"xn--bcher-kva.example", "xn--bcher-kva.example", "exact"},
		{"XN--BCHER-KVA.example", "xn--bcher-kva.example", "exact"},
		{"例え.テスト", "xn--r8jz45g.xn--zckzah", "exact"},
		{"a。example", "a.example", "exact"},
		{"*.example.org", "*.example.org", "wildcard"},
		{"*.Example.ORG.", "*.example.org", "wildcard"},
		{"*.bücher.example", "*.xn--bcher-kva.example", "wildcard"},
		{"*.example.co.uk", "*.example.co.uk", "wildcard"},
		{"*.web.de", "*.web.de", "wildcard"},
		{"8.8.8.8", "8.8.8.8/32", "ipv4"},
		{"8.8.8.8.", "8.8.8.8/32", "ipv4"},
		{"2606:4700::1111", "2606:4700::1111/128", "ipv6"},
		{"2606:4700:0:0:0:0:0:1111", "2606:4700::1111/128", "ipv6"},
		{"8.8.8.0/24", "8.8.8.0/24", "cidr"},
		{"10.0.0.0/8", "10.0.0.0/8", "private"},
		{"10.1.2.3", "10.1.2.3/32", "private"},
		{"127.0.0.1", "127.0.0.1/32", "private"},
		{"::1", "::1/128", "private"},
		{"fd12:3456::/32", "fd12:3456::/32", "private"},
		{"169.254.0.0/16", "169.254.0.0/16", "private"},
		{"100.64.0.7/32", "100.64.0.7/32", "cgnat"},
		{"100.64.0.0/10", "100.64.0.0/10", "cgnat"},
		{"fd7a:115c:a1e0::1", "fd7a:115c:a1e0::1/128", "cgnat"},
		{strings.Repeat("a", 63) + ".example", strings.Repeat("a", 63) + ".example", "exact"},
	} {
		e, err := Normalize(tt.in)
		if err != nil {
			t.Errorf("Normalize(%q): %v", tt.in, err)
			continue
		}
		if got := e.Host + e.CIDR(); got != tt.want || e.Class != tt.class {
			t.Errorf("Normalize(%q) = %s %s, want %s %s", tt.in, got, e.Class, tt.want, tt.class)
		}
	}
}

func TestNormalizeRefuses(t *testing.T) {
	for _, tt := range []struct{ in, code, hint string }{
		{"", "bad_host", "host name"},
		{"*", "too_broad", "list the hosts"},
		{"*.", "too_broad", ""},
		{"*.com", "too_broad", "*.example.com"},
		{"*.COM.", "too_broad", "*.example.com"},
		{"*.co.uk", "too_broad", "*.example.co.uk"},
		{"*.com.au", "too_broad", ""},
		{"**.example.org", "bad_host", ""},
		{"a.*.example", "bad_host", ""},
		{"a.*.example.org", "bad_host", "*.example.org"},
		{"*a.example.org", "bad_host", "*.example.org"},
		{"api*.example.org", "bad_host", ""},
		{"*.*.example.org", "bad_host", ""},
		{"https://a.example", "bad_host", `write "a.example"`},
		{"https://a.example:8443/x?y", "bad_host", `{ "host": "a.example", "ports": [8443] }`},
		{"http://a.example/", "bad_host", `"protocol": "http"`},
		{"//a.example", "bad_host", `"a.example"`},
		{"a.example:443", "bad_host", `write "a.example"`},
		{"a.example:22", "bad_host", `{ "host": "a.example", "ports": [22] }`},
		{"a.example/x", "bad_host", `"a.example"`},
		{"a.example/", "bad_host", `"a.example"`},
		{"user@a.example", "bad_host", `"a.example"`},
		{"a.example?x", "bad_host", ""},
		{"a.example#x", "bad_host", ""},
		{`a.example\x`, "bad_host", ""},
		{" a.example", "bad_host", `write "a.example"`},
		{"a.example\n", "bad_host", `write "a.example"`},
		{"a b", "bad_host", "one host"},
		{"a.example\x00", "bad_host", ""},
		{"a.example,b.example", "bad_host", "one host"},
		{"a..example", "bad_host", "single dots"},
		{".example.com", "bad_host", ""},
		{"example.com..", "bad_host", ""},
		{".", "bad_host", ""},
		{"-a.example", "bad_host", ""},
		{"a-.example", "bad_host", ""},
		{strings.Repeat("a", 64) + ".example", "bad_host", "real name"},
		{strings.Repeat("a.", 127) + "a", "bad_host", ""},
		{"a!b.example", "bad_host", ""},
		{"xn--a.example", "bad_host", ""},
		{"a\u0000.example", "bad_host", ""},
		{"a\u200bb.example\u202e", "bad_host", ""},
		{"localhost", "bad_host", "addresses"},
		{"x.localhost", "bad_host", "addresses"},
		{"0x7f000001", "bad_host", `write "127.0.0.1"`},
		{"2130706433", "bad_host", `write "127.0.0.1"`},
		{"127.1", "bad_host", `write "127.0.0.1"`},
		{"0177.0.0.1", "bad_host", `write "127.0.0.1"`},
		{"127.0.0.0x1", "bad_host", `write "127.0.0.1"`},
		{"010.0.0.1", "bad_host", `write "8.0.0.1"`},
		{"1.2.3.4.5", "bad_host", ""},
		{"256.1.1.1", "bad_host", ""},
		{"example.0x1", "bad_host", ""},
		{"127。0。0。0x1", "bad_host", ""},
		{"*.1.2.3.4", "bad_host", `write "1.2.3.4"`},
		{"::ffff:127.0.0.1", "bad_host", `write "127.0.0.1"`},
		{"::ffff:0:0/96", "bad_cidr", ""},
		{"::ffff:10.0.0.0/104", "bad_cidr", `"10.0.0.0/8"`},
		{"fe80::1%eth0", "bad_host", "zone"},
		{"[::1]", "bad_host", `write "::1"`},
		{"[2606:4700::1]:8443", "bad_host", `"ports": [8443]`},
		{"10.0.0.1/8", "bad_cidr", `"10.0.0.0/8"`},
		{"10.0.0.0/33", "bad_cidr", ""},
		{"10.0.0.0/08", "bad_cidr", ""},
		{"10.0.0/8", "bad_cidr", ""},
		{"0.0.0.0/0", "too_broad", ""},
		{"128.0.0.0/1", "too_broad", ""},
		{"::/0", "too_broad", ""},
		{"2000::/3", "too_broad", ""},
		{"169.254.169.254", "metadata_address", "remove"},
		{"fd00:ec2::254", "metadata_address", ""},
		{"100.100.100.200", "metadata_address", ""},
		{"0.0.0.0", "unspecified_address", ""},
		{"::", "unspecified_address", ""},
		{"224.0.0.1", "multicast_address", ""},
		{"255.255.255.255", "reserved_address", ""},
		{"64:ff9b::a00:1", "bad_cidr", "IPv4"},
		{"2002:7f00:1::/48", "bad_cidr", "IPv4"},
		{"2001::/32", "bad_cidr", ""},
	} {
		e, err := Normalize(tt.in)
		if err == nil {
			t.Errorf("Normalize(%q) = %+v, want a refusal", tt.in, e)
			continue
		}
		f := fault.As(err)
		if f.Exit != fault.Data || f.Code != tt.code {
			t.Errorf("Normalize(%q): %d %s (%v), want 65 %s", tt.in, f.Exit, f.Code, err, tt.code)
		}
		if f.Hint == "" || !strings.Contains(f.Hint, tt.hint) {
			t.Errorf("Normalize(%q): hint %q does not hold %q", tt.in, f.Hint, tt.hint)
		}
		if strings.ContainsFunc(f.Error()+f.Hint, func(r rune) bool { return r < ' ' || r == 0x202e }) {
			t.Errorf("Normalize(%q): the message holds control characters: %q", tt.in, f.Error())
		}
	}
}

func TestNormalizeDenyTakesBroadEntries(t *testing.T) {
	for _, in := range []string{"*.com", "0.0.0.0/0", "169.254.169.254", "localhost", "64:ff9b::/96"} {
		if _, err := NormalizeDeny(in); err != nil {
			t.Errorf("NormalizeDeny(%q): %v", in, err)
		}
	}
	for _, in := range []string{"", "*", "https://a.example", "a.example:1", "127.1"} {
		if _, err := NormalizeDeny(in); err == nil {
			t.Errorf("NormalizeDeny(%q) passed", in)
		}
	}
}

func TestNormalizeAddress(t *testing.T) {
	for in, want := range map[string]string{"127.0.0.1": "127.0.0.1", "::1": "::1", "FD00::1": "fd00::1", "8.8.8.8": "8.8.8.8"} {
		ip, err := NormalizeAddress(in)
		if err != nil || ip != netip.MustParseAddr(want) {
			t.Errorf("NormalizeAddress(%q) = %v, %v", in, ip, err)
		}
	}
	for _, in := range []string{"", "localhost", "10.0.0.0/8", "10.0.0.1/32", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::ffff:1.2.3.4", "127.1", "64:ff9b::1"} {
		if ip, err := NormalizeAddress(in); err == nil {
			t.Errorf("NormalizeAddress(%q) = %v, want a refusal", in, ip)
		}
	}
}

// What is normal stays as it is, and is one of: a name the gate can match, or
// a masked range.
func FuzzNormalize(f *testing.F) {
	for _, s := range []string{"a.example", "*.b.example", "10.0.0.0/8", "::1", "0x7f.1", "bücher.example", "a。b", "https://x", "１２７.0.0.1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := Normalize(s)
		if err != nil {
			if fault.As(err).Exit != fault.Data {
				t.Fatalf("Normalize(%q): %v is not a fault of the input", s, err)
			}
			return
		}
		if (e.Host == "") == !e.Prefix.IsValid() {
			t.Fatalf("Normalize(%q) = %+v: not exactly one of host and range", s, e)
		}
		again, err := Normalize(e.Host + e.CIDR())
		if err != nil || again != e {
			t.Fatalf("Normalize(%q) = %+v, and again %+v, %v", s, e, again, err)
		}
		if e.Host == "" {
			return
		}
		base := strings.TrimPrefix(e.Host, "*.")
		if !normalName(base) {
			t.Fatalf("Normalize(%q) = %q, which is no normal name", s, e.Host)
		}
		if _, err := netip.ParseAddr(base); err == nil {
			t.Fatalf("Normalize(%q) = %q, an address as a name", s, e.Host)
		}
	})
}
