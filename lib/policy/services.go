package policy

import (
	"slices"
	"strings"
)

// Service is a port of a host, and the protocol of the rule that opens it.
type Service struct {
	Port     int    `json:"port"`
	Protocol string `json:"protocol"` // tls | http | ssh | tcp
}

// usualPort is what a decision about a name alone is made for: the port decides
// nothing but the hint.
const usualPort = 443

// Services gives what is open of a name, sorted by port, and the decision that
// speaks for it: the first port's, or the refusal where nothing is. An address
// is no name and refused as BadHost: nobody has to look it up.
func (m *Matcher) Services(name string) ([]Service, Decision) {
	return services(name, m.Decide, m.portsOf)
}

// Services is Matcher.Services over both lists.
func (o *Overlay) Services(name string) ([]Service, Decision) {
	return services(name, o.Decide, func(name string) []int { return append(o.base.portsOf(name), o.live.portsOf(name)...) })
}

func services(name string, decide func(string, int) Decision, portsOf func(string) []int) ([]Service, Decision) {
	d := decide(name, usualPort)
	name, ip, f := parseHost(name)
	if d.Code == BadHost || f != nil {
		return nil, d
	}
	if ip.IsValid() {
		return nil, Decision{Index: -1, Code: BadHost, Reason: ip.String() + " is an address and no name"}
	}
	var open []Service
	first := d
	ports := portsOf(name)
	slices.Sort(ports)
	for _, p := range slices.Compact(ports) {
		now := decide(name, p)
		if len(open) == 0 {
			first = now
		}
		if now.Allow {
			open = append(open, Service{p, now.Rule.Protocol})
		}
	}
	return open, first
}

// portsOf lists the ports of all allow rules that are about a name, in no order,
// some more than once.
func (m *Matcher) portsOf(name string) []int {
	var all []int
	walk := func(first int32, ok bool) {
		if !ok {
			return
		}
		for i := first; i >= 0; i = m.allow.next[i] {
			all = append(all, m.rules[i].Ports...)
		}
	}
	first, ok := m.allow.exact[name]
	walk(first, ok)
	for rest := name; ; {
		_, below, more := strings.Cut(rest, ".")
		if !more {
			break
		}
		first, ok := m.allow.wildcard[below]
		walk(first, ok)
		rest = below
	}
	return all
}
