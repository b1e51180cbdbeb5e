package policy

import (
	"net/netip"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// AddressNotAllowed is the code of a host that is allowed and leads to an
// address that is not.
const AddressNotAllowed = "address_not_allowed"

// Foresee is Decide, and CheckAddr on those addresses that are known without
// asking anybody: the host itself where it is an address, and those that the
// rule pins. It is what the gate does, as far as that follows from the rules
// alone. What a name will resolve to, and which addresses the host has, only
// the gate knows when it is asked.
func (m *Matcher) Foresee(host string, port int) Decision {
	d := m.Decide(host, port)
	if !d.Allow {
		return d
	}
	for _, ip := range KnownAddresses(d.Rule, host) {
		if err := m.CheckAddr(d.Rule, ip, port, nil); err != nil {
			f := fault.As(err)
			d.Allow, d.Code, d.Reason, d.Hint = false, AddressNotAllowed, host+": "+f.Msg, f.Hint
			return d
		}
	}
	return d
}

// KnownAddresses are the addresses to which host leads under rule, none if the
// name has to be resolved.
func KnownAddresses(rule *plan.Rule, host string) []netip.Addr {
	if ip, err := netip.ParseAddr(strings.TrimSuffix(host, ".")); err == nil {
		return []netip.Addr{ip}
	}
	var ips []netip.Addr
	for _, a := range rule.Addresses {
		if ip, err := netip.ParseAddr(a); err == nil {
			ips = append(ips, ip)
		}
	}
	return ips
}

// Hostname gives one host as programs ask for it: an international name in the
// form that it has on the wire, everything else as it stands. It is a fault
// (65), with the form that was meant, for what is no host at all (a URL, a
// wildcard, a range). Spellings of an address that the gate refuses are no
// fault: Decide has the answer.
func Hostname(s string) (string, error) {
	if f := misshapen(s); f != nil {
		return "", f
	}
	if strings.ContainsAny(s, "*/") {
		return "", badHost("%s is more than one host", quote(s)).WithHint("name one of them")
	}
	if isASCII(s) {
		return s, nil
	}
	a, f := toASCII(s)
	if f != nil {
		return "", f
	}
	return a, nil
}

// Inspected tells if the gate reads what rule lets through to host: the rule
// says so, or a secret goes there.
func Inspected(rule *plan.Rule, host string, secrets []plan.Secret) bool {
	return rule.Protocol == "tls" && (rule.Inspect || len(Injections(secrets, host)) > 0)
}

// Injections are the headers of host that carry a secret, by its name.
func Injections(secrets []plan.Secret, host string) []NamedInjection {
	var out []NamedInjection
	for i := range secrets {
		for _, in := range secrets[i].Inject {
			if in.Host == host {
				out = append(out, NamedInjection{secrets[i].Name, in.Header, in.Format})
			}
		}
	}
	return out
}

// NamedInjection is one header of a host and the secret that goes into it.
type NamedInjection struct {
	Name   string `json:"name"`
	Header string `json:"header"`
	Format string `json:"format,omitempty"` // {} stands for the value; empty: the value alone
}
