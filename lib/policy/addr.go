package policy

import (
	"net/netip"
	"slices"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// space is one block of addresses that is not the public internet.
type space struct {
	prefix netip.Prefix
	name   string
	code   string
	// named: a rule that names the address may open it. The others cannot be
	// opened at all.
	named bool
}

func block(cidr, name, code string, named bool) space {
	return space{netip.MustParsePrefix(cidr), name, code, named}
}

// special are the blocks of the IANA special-purpose registries (RFC 6890 and
// successors). The first that holds an address counts.
var special = []space{
	block("0.0.0.0/8", "unspecified", "unspecified_address", false),
	block("10.0.0.0/8", "private", "private_address", true),
	block("100.64.0.0/10", "shared (CGNAT)", "private_address", true),
	block("127.0.0.0/8", "loopback", "loopback_address", true),
	block("169.254.0.0/16", "link-local", "link_local_address", true),
	block("172.16.0.0/12", "private", "private_address", true),
	block("192.0.0.0/24", "reserved", "reserved_address", true),
	block("192.0.2.0/24", "documentation", "reserved_address", true),
	block("192.88.99.0/24", "6to4 relay", "reserved_address", false),
	block("192.168.0.0/16", "private", "private_address", true),
	block("198.18.0.0/15", "benchmarking", "reserved_address", true),
	block("198.51.100.0/24", "documentation", "reserved_address", true),
	block("203.0.113.0/24", "documentation", "reserved_address", true),
	block("224.0.0.0/4", "multicast", "multicast_address", false),
	block("240.0.0.0/4", "reserved", "reserved_address", false),

	block("::/128", "unspecified", "unspecified_address", false),
	block("::1/128", "loopback", "loopback_address", true),
	block("fe80::/10", "link-local", "link_local_address", true),
	block("fec0::/10", "site-local", "private_address", true),
	block("fc00::/7", "private", "private_address", true),
	block("ff00::/8", "multicast", "multicast_address", false),
	block("2001:2::/48", "benchmarking", "reserved_address", true),
	block("2001:db8::/32", "documentation", "reserved_address", true),
	block("3fff::/20", "documentation", "reserved_address", true),
	block("2001::/23", "reserved", "reserved_address", false),
}

// global6 is what is given out of IPv6 for the public internet.
var global6 = netip.MustParsePrefix("2000::/3")

// cgnat are the blocks in which Tailscale gives addresses.
var cgnat = []netip.Prefix{
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("fd7a:115c:a1e0::/48"),
}

// transition are the blocks of IPv6 whose addresses carry IPv4 ones. They count
// as what they carry.
var transition = []space{
	block("::/96", "IPv4-compatible", "", false),
	block("::ffff:0:0/96", "IPv4-mapped", "", false),
	block("::ffff:0:0:0/96", "IPv4-translated", "", false),
	block("64:ff9b::/96", "NAT64", "", false),
	block("64:ff9b:1::/48", "local NAT64", "", false),
	block("2001::/32", "Teredo", "", false),
	block("2002::/16", "6to4", "", false),
}

// metadata are the addresses at which cloud providers hand out credentials of
// the machine, and the like. Nothing opens them.
var metadata = map[netip.Addr]string{
	netip.MustParseAddr("169.254.169.254"): "AWS, Google, Azure, OpenStack and others",
	netip.MustParseAddr("169.254.170.2"):   "AWS ECS",
	netip.MustParseAddr("169.254.170.23"):  "AWS EKS",
	netip.MustParseAddr("169.254.0.23"):    "Tencent",
	netip.MustParseAddr("169.254.42.42"):   "Scaleway",
	netip.MustParseAddr("100.100.100.200"): "Alibaba",
	netip.MustParseAddr("192.0.0.192"):     "Oracle",
	netip.MustParseAddr("168.63.129.16"):   "Azure",
	netip.MustParseAddr("fd00:ec2::254"):   "AWS",
	netip.MustParseAddr("fd00:ec2::23"):    "AWS EKS",
	netip.MustParseAddr("fd20:ce::254"):    "Google",
	netip.MustParseAddr("fd00:42::42"):     "Scaleway",
	netip.MustParseAddr("fe80::a9fe:a9fe"): "OpenStack",
}

// CheckAddr tells if a connection that rule allows may go to ip. local are the
// addresses of the host's own interfaces. The error is a fault with exit 1 and
// one of the codes metadata_address, unspecified_address, multicast_address,
// reserved_address, private_address, loopback_address, link_local_address,
// own_address.
//
// Public addresses pass. Private ones pass only where the rule names them: by
// its addresses, or by a range that lies within the private block itself, so
// that a wide public range opens none by accident. The host's own addresses
// have to be named one by one. Metadata addresses never pass, nor does an IPv6
// address that carries an IPv4 address which would not.
func CheckAddr(rule *plan.Rule, ip netip.Addr, local []netip.Addr) error {
	ip = ip.WithZone("").Unmap()
	if f := neverReachable(ip); f != nil {
		return f
	}
	for _, inner := range carried(ip) {
		if f := checkPublic(inner, local); f != nil {
			return refused(f.Code, "%s carries an IPv4 address: %s", ip, f.Msg)
		}
	}
	f := checkPublic(ip, local)
	if f == nil || names(rule, ip, f.Code) {
		return nil
	}
	return f
}

// neverReachable is a fault for an address that no rule can open.
func neverReachable(ip netip.Addr) *fault.Error {
	if who, ok := metadata[ip]; ok {
		return refused("metadata_address", "%s is a cloud metadata address (%s)", ip, who)
	}
	if s := specialOf(ip); s != nil && !s.named {
		return refused(s.code, "%s is not public (%s)", ip, s.name)
	}
	return nil
}

// checkPublic is a fault for an address that is not on the public internet or
// belongs to the host.
func checkPublic(ip netip.Addr, local []netip.Addr) *fault.Error {
	if f := neverReachable(ip); f != nil {
		return f
	}
	if s := specialOf(ip); s != nil {
		// The host's own private address is the host first of all.
		if s.code != "loopback_address" && isLocal(ip, local) {
			return ownAddress(ip)
		}
		return refused(s.code, "%s is not public (%s)", ip, s.name).
			WithHint(`a host with such an address is opened by "addresses": [%q] in its entry`, ip)
	}
	if isLocal(ip, local) {
		return ownAddress(ip)
	}
	return nil
}

func ownAddress(ip netip.Addr) *fault.Error {
	return refused("own_address", "%s is an address of the host itself", ip).
		WithHint(`it is opened by "addresses": [%q] in the host's entry`, ip)
}

func isLocal(ip netip.Addr, local []netip.Addr) bool {
	return slices.ContainsFunc(local, func(l netip.Addr) bool { return l.WithZone("").Unmap() == ip })
}

// names tells if rule opens ip, which is not public, on purpose.
func names(rule *plan.Rule, ip netip.Addr, code string) bool {
	if rule == nil {
		return false
	}
	for _, a := range rule.Addresses {
		if p, err := netip.ParseAddr(a); err == nil && p == ip {
			return true
		}
	}
	p, err := netip.ParsePrefix(rule.CIDR)
	if err != nil || !p.Contains(ip) {
		return false
	}
	if code == "own_address" {
		return p.IsSingleIP()
	}
	s := specialOf(ip)
	return s != nil && within(p, s.prefix)
}

// specialOf gives the special block that holds ip, or nil for a public address.
func specialOf(ip netip.Addr) *space {
	if transitionOf(ip) != nil {
		return nil
	}
	for i := range special {
		if special[i].prefix.Contains(ip) {
			return &special[i]
		}
	}
	if ip.Is6() && !global6.Contains(ip) {
		return &space{global6, "reserved", "reserved_address", false}
	}
	return nil
}

// transitionOf gives the block of transition that holds ip, or nil.
func transitionOf(ip netip.Addr) *space {
	if !ip.Is6() || ip == netip.IPv6Unspecified() || ip == netip.IPv6Loopback() {
		return nil
	}
	for i := range transition {
		if transition[i].prefix.Contains(ip) {
			return &transition[i]
		}
	}
	return nil
}

// carried gives the IPv4 addresses that are inside an IPv6 address, as routers
// and tunnels would take them out of it. A block with several readings gives
// all of them.
func carried(ip netip.Addr) []netip.Addr {
	if !ip.Is6() {
		return nil
	}
	b := ip.As16()
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte(b[i : i+4])) }
	if t := transitionOf(ip); t != nil {
		switch t.name {
		case "6to4":
			return []netip.Addr{at(2)}
		case "Teredo":
			client := netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]})
			return []netip.Addr{at(4), client}
		case "local NAT64":
			return localNAT64(b)
		}
		return []netip.Addr{at(12)}
	}
	// ISATAP (RFC 5214 section 6.1): the interface identifier tells.
	if b[8]&^0x02 == 0 && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe {
		return []netip.Addr{at(12)}
	}
	return nil
}

// localNAT64 reads an address of 64:ff9b:1::/48, whose operator chooses the
// length of the prefix (RFC 6052 section 2.2; octet 8 is stepped over): 48, 56,
// 64 or 96 bits. The readings that fall on padding are left out.
func localNAT64(b [16]byte) []netip.Addr {
	last := netip.AddrFrom4([4]byte(b[12:]))
	var out []netip.Addr
	for _, a := range []netip.Addr{
		netip.AddrFrom4([4]byte{b[6], b[7], b[9], b[10]}),
		netip.AddrFrom4([4]byte{b[7], b[9], b[10], b[11]}),
		netip.AddrFrom4([4]byte(b[9:13])),
		last,
	} {
		if a.As4()[0] != 0 {
			out = append(out, a)
		}
	}
	if out == nil {
		out = append(out, last)
	}
	return out
}

// classOf sorts a range for people who review a plan.
func classOf(p netip.Prefix) string {
	for _, c := range cgnat {
		if within(p, c) {
			return ClassCGNAT
		}
	}
	for _, s := range special {
		if within(p, s.prefix) {
			return ClassPrivate
		}
	}
	switch {
	case !p.IsSingleIP():
		return ClassCIDR
	case p.Addr().Is4():
		return ClassIPv4
	}
	return ClassIPv6
}

// within tells if all of p lies in outer.
func within(p, outer netip.Prefix) bool {
	return p.Bits() >= outer.Bits() && outer.Contains(p.Addr())
}

func refused(code, format string, args ...any) *fault.Error {
	return fault.New(fault.No, code, format, args...)
}
