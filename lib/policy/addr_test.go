package policy

import (
	"net/netip"
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
)

func TestCheckAddr(t *testing.T) {
	local := []netip.Addr{
		netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1"),
		netip.MustParseAddr("93.184.216.10"), netip.MustParseAddr("10.0.0.5"),
		netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("2606:4700::10"),
	}
	name := &plan.Rule{Host: "a.example"}
	pinned := func(a ...string) *plan.Rule { return &plan.Rule{Host: "a.example", Addresses: a} }
	cidr := func(c string) *plan.Rule { return &plan.Rule{CIDR: c} }
	for _, tt := range []struct {
		rule *plan.Rule
		ip   string
		want string
	}{
		{name, "93.184.216.34", ""},
		{name, "2606:4700::1111", ""},
		{nil, "93.184.216.34", ""},
		{nil, "10.0.0.1", "private_address"},
		{name, "10.0.0.1", "private_address"},
		{name, "172.16.0.1", "private_address"},
		{name, "172.32.0.1", ""},
		{name, "192.168.1.1", "private_address"},
		{name, "100.64.0.1", "private_address"},
		{name, "100.128.0.1", ""},
		{name, "127.0.0.1", "loopback_address"},
		{name, "127.9.9.9", "loopback_address"},
		{name, "::1", "loopback_address"},
		{name, "0.0.0.0", "unspecified_address"},
		{name, "0.1.2.3", "unspecified_address"},
		{name, "::", "unspecified_address"},
		{name, "169.254.1.1", "link_local_address"},
		{name, "fe80::2", "link_local_address"},
		{name, "fe80::2%eth0", "link_local_address"},
		{name, "fd00::1", "private_address"},
		{name, "fec0::1", "private_address"},
		{name, "224.0.0.251", "multicast_address"},
		{name, "ff02::1", "multicast_address"},
		{name, "240.0.0.1", "reserved_address"},
		{name, "255.255.255.255", "reserved_address"},
		{name, "198.18.0.1", "reserved_address"},
		{name, "192.0.2.1", "reserved_address"},
		{name, "192.88.99.1", "reserved_address"},
		{name, "2001:db8::1", "reserved_address"},
		{name, "3fff::1", "reserved_address"},
		{name, "100::1", "reserved_address"},
		{name, "4000::1", "reserved_address"},
		{name, "5f00::1", "reserved_address"},
		{name, "169.254.169.254", "metadata_address"},
		{name, "fd00:ec2::254", "metadata_address"},
		{name, "fe80::a9fe:a9fe", "metadata_address"},
		{name, "fe80::a9fe:a9fe%eth0", "metadata_address"},
		{name, "100.100.100.200", "metadata_address"},
		{name, "168.63.129.16", "metadata_address"},

		// the host itself
		{name, "93.184.216.10", "own_address"},
		{name, "2606:4700::10", "own_address"},
		{name, "10.0.0.5", "own_address"},
		{cidr("93.184.216.0/24"), "93.184.216.10", "own_address"},
		{cidr("93.184.216.10/32"), "93.184.216.10", ""},
		{cidr("10.0.0.0/8"), "10.0.0.5", "own_address"},
		{cidr("10.0.0.5/32"), "10.0.0.5", ""},
		{pinned("10.0.0.5"), "10.0.0.5", ""},

		{name, "fe80::1", "own_address"},
		{name, "fe80::1%eth1", "own_address"},

		// named by the rule
		{pinned("127.0.0.1"), "127.0.0.1", ""},
		{pinned("127.0.0.1"), "127.0.0.2", "loopback_address"},
		{pinned("127.0.0.1"), "::ffff:127.0.0.1", ""},
		{pinned("10.0.0.1", "::1"), "::1", ""},
		{pinned("169.254.169.254"), "169.254.169.254", "metadata_address"},
		{pinned("0.0.0.0"), "0.0.0.0", "unspecified_address"},
		{pinned("224.0.0.1"), "224.0.0.1", "multicast_address"},
		{cidr("10.0.0.0/8"), "10.9.9.9", ""},
		{cidr("10.0.0.0/8"), "192.168.0.1", "private_address"},
		{cidr("100.64.0.7/32"), "100.64.0.7", ""},
		{cidr("100.64.0.0/10"), "100.100.100.200", "metadata_address"},
		{cidr("169.254.0.0/16"), "169.254.169.254", "metadata_address"},
		{cidr("127.0.0.0/8"), "127.0.0.1", ""},
		// a range that is wider than the private block opens none of it
		{cidr("0.0.0.0/0"), "10.0.0.1", "private_address"},
		{cidr("172.0.0.0/8"), "172.16.0.1", "private_address"},
		{cidr("172.0.0.0/8"), "172.1.0.1", ""},

		// IPv6 that carries IPv4
		{name, "::ffff:10.0.0.1", "private_address"},
		{name, "::ffff:93.184.216.34", ""},
		{name, "::10.0.0.1", "private_address"},
		{name, "::93.184.216.34", ""},
		{name, "::ffff:0:10.0.0.1", "private_address"},
		{name, "64:ff9b::10.0.0.1", "private_address"},
		{name, "64:ff9b::169.254.169.254", "metadata_address"},
		{name, "64:ff9b::93.184.216.34", ""},
		{name, "64:ff9b::93.184.216.10", "own_address"},
		{name, "64:ff9b:1::10.0.0.1", "private_address"},
		{name, "64:ff9b:1:a9fe:a9:fe00::", "metadata_address"},
		{name, "2002:a00:1::1", "private_address"},
		{name, "2002:a9fe:a9fe::1", "metadata_address"},
		{name, "2002:5db8:d822::1", ""},
		{name, "2001:0:5db8:d822:0:0:f5ff:fffe", "private_address"}, // Teredo client 10.0.0.1
		{name, "2001:0:a00:1::a247:27dd", "private_address"},        // Teredo server 10.0.0.1
		{name, "2001:0:5db8:d822::a247:27dd", ""},
		{name, "2606:4700::5efe:a00:1", "private_address"}, // ISATAP
		{name, "2606:4700::200:5efe:a00:1", "private_address"},
		{name, "2606:4700::5efe:5db8:d822", ""},
		// what is carried cannot be opened: write the IPv4 address
		{cidr("10.0.0.0/8"), "64:ff9b::10.0.0.1", "private_address"},
		{pinned("64:ff9b::a00:1"), "64:ff9b::a00:1", "private_address"},
	} {
		err := CheckAddr(tt.rule, netip.MustParseAddr(tt.ip), local)
		if got := codeOf(err); got != tt.want {
			t.Errorf("CheckAddr(%+v, %s) = %q, want %q (%v)", tt.rule, tt.ip, got, tt.want, err)
		}
	}
}

// Whatever the reading of an address, nothing that leads to metadata passes.
func FuzzCheckAddrNeverMetadata(f *testing.F) {
	f.Add([]byte{169, 254, 169, 254})
	f.Add(make([]byte, 16))
	rules := []*plan.Rule{nil, {Host: "a.example"}, {CIDR: "169.254.0.0/16"}, {CIDR: "::/0"}, {CIDR: "fd00::/8"}}
	f.Fuzz(func(t *testing.T, b []byte) {
		ip, ok := netip.AddrFromSlice(b)
		if !ok {
			return
		}
		_, isMeta := metadata[ip.Unmap()]
		for _, r := range rules {
			err := CheckAddr(r, ip, nil)
			if isMeta && codeOf(err) != "metadata_address" {
				t.Fatalf("CheckAddr(%v, %s) = %v", r, ip, err)
			}
			if err == nil && r != nil && r.Host != "" && !ip.Unmap().IsGlobalUnicast() {
				if len(carried(ip)) == 0 {
					t.Fatalf("CheckAddr passes %s for a name", ip)
				}
			}
		}
	})
}
