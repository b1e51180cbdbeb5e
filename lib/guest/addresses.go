package guest

import (
	"net/netip"
	"slices"

	"github.com/bottle-tools/bottle/lib/plan"
)

// own is what a guest means by itself.
var own = netip.MustParsePrefix("127.0.0.0/8")

// MaxAddresses bounds the blocks that a guest takes for its own: each one is
// looked at for every packet.
const MaxAddresses = 256

// Addresses gives what a policy opens by address, as far as a guest can take it
// for its own: not loopback, which in a guest means the guest, nor a block
// around it; of IPv6 single addresses, since its loopback device stands for no
// block; the first MaxAddresses. The rest is reached through the proxy
// variables.
func Addresses(rules []plan.Rule) []Address {
	var out []Address
	at := map[string]int{}
	for _, r := range rules {
		p, err := netip.ParsePrefix(r.CIDR)
		if err != nil || r.Verdict != "allow" || p.Overlaps(own) || p.Addr().IsLoopback() || p.Addr().Is6() && !p.IsSingleIP() {
			continue
		}
		i, ok := at[r.CIDR]
		if !ok {
			if len(out) == MaxAddresses {
				continue
			}
			i = len(out)
			at[r.CIDR] = i
			out = append(out, Address{CIDR: r.CIDR})
		}
		for _, port := range r.Ports {
			out[i].Services = append(out[i].Services, Service{Port: port, Protocol: r.Protocol})
		}
	}
	for i := range out {
		slices.SortFunc(out[i].Services, func(a, b Service) int { return a.Port - b.Port })
	}
	return out
}
