package policy

import (
	"net/netip"
	"slices"
)

// region is a part of the address space that no prefix of a list cuts any
// further: what is in a prefix and in none of the longer ones below it.
type region struct {
	prefix netip.Prefix
	sample netip.Addr // one address of it
}

// regions cuts the address space at the borders of prefixes. A prefix that
// longer ones cover wholly has no region of its own.
func regions(prefixes []netip.Prefix) []region {
	slices.SortFunc(prefixes, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	prefixes = slices.Compact(prefixes)
	var out []region
	for i, p := range prefixes {
		// What lies in p follows it, the widest first.
		free, ok := p.Addr(), true
		for _, in := range prefixes[i+1:] {
			if !p.Overlaps(in) || in.Addr().Compare(free) > 0 {
				break
			}
			if in.Contains(free) {
				if free, ok = after(in); !ok || !p.Contains(free) {
					ok = false
					break
				}
			}
		}
		if ok {
			out = append(out, region{p, free})
		}
	}
	return out
}

// after is the first address behind a prefix; ok is false at the end of the
// address space.
func after(p netip.Prefix) (next netip.Addr, ok bool) {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	next = last.Next()
	return next, next.IsValid()
}

// borders are the prefixes at which addresses begin to be treated differently
// whatever the rules are.
func borders() []netip.Prefix {
	out := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0"), global6}
	for _, list := range [][]space{special, transition} {
		for _, s := range list {
			out = append(out, s.prefix)
		}
	}
	for ip := range metadata {
		out = append(out, netip.PrefixFrom(ip, ip.BitLen()))
	}
	return out
}
