package pipelock

import (
	"net/netip"
	"slices"
)

// defaultInternal is pipelock's own list of addresses that it never dials
// (2.3.0). Writing "internal" replaces that list, so it has to be repeated.
var defaultInternal = []string{
	"0.0.0.0/8", "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",
	"169.254.0.0/16", "100.64.0.0/10", "224.0.0.0/4",
	"::1/128", "fc00::/7", "fe80::/10", "ff00::/8",
}

// moreInternal is what that list leaves open and the gate does not (lib/policy).
var moreInternal = []string{
	"192.0.0.0/24",     // IETF protocol assignments, RFC 6890
	"192.0.2.0/24",     // documentation, RFC 5737
	"192.88.99.0/24",   // 6to4 relays, RFC 7526
	"198.18.0.0/15",    // benchmarks, RFC 2544
	"198.51.100.0/24",  // documentation
	"203.0.113.0/24",   // documentation
	"240.0.0.0/4",      // reserved, and broadcast
	"168.63.129.16/32", // Azure's host agent: metadata behind a public address
	"::/96",            // unspecified and v4-compatible, RFC 4291
	"::ffff:0:0:0/96",  // v4-translated, RFC 2765
	"64:ff9b:1::/48",   // local NAT64, RFC 8215
	"100::/64",         // discard, RFC 6666
	"2001::/23",        // IETF protocol assignments; Teredo, which holds a v4 address
	"2001:db8::/32",    // documentation, RFC 3849
	"2002::/16",        // 6to4, which holds a v4 address; retired by RFC 7526
	"3fff::/20",        // documentation, RFC 9637
	"4000::/2",         // not given out
	"8000::/1",         // not given out, and all private and link-local blocks
}

// nat64 is the well-known prefix of RFC 6052. Behind DNS64 every v4-only name
// resolves into it, so only the translations of special v4 addresses are shut.
const nat64 = "64:ff9b::"

var specialPrefixes = parseAll(specialRanges())

// specialRanges is the list that pipelock is given as "internal".
func specialRanges() []string {
	all := slices.Concat(defaultInternal, moreInternal)
	base := netip.MustParseAddr(nat64).As16()
	for _, s := range all {
		p := netip.MustParsePrefix(s)
		if !p.Addr().Is4() {
			continue
		}
		v4, v6 := p.Addr().As4(), base
		copy(v6[12:], v4[:])
		all = append(all, netip.PrefixFrom(netip.AddrFrom16(v6), 96+p.Bits()).String())
	}
	return all
}

func parseAll(ranges []string) []netip.Prefix {
	out := make([]netip.Prefix, len(ranges))
	for i, s := range ranges {
		out[i] = netip.MustParsePrefix(s)
	}
	return out
}

// special tells whether pipelock refuses to dial a.
func special(a netip.Addr) bool {
	a = a.Unmap()
	return slices.ContainsFunc(specialPrefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}
