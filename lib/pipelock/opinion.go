package pipelock

import (
	"net/netip"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Opinion is what pipelock's lists say about a host, before it resolves
// anything or looks at what is sent. Ports have no part in them.
type Opinion struct {
	Verdict string `json:"verdict"`         // allow | deny; none: pipelock has no configuration for this policy
	List    string `json:"list,omitempty"`  // that decided: api_allowlist | blocklist | internal
	Entry   string `json:"entry,omitempty"` // of that list, if there is one
}

// Says gives pipelock's opinion of a host under the configuration that Derive
// made (plan.PipelockYAML.YAML), matching as pipelock 2.3.0 does: without case
// and a trailing dot, "*.x" for x and all below it, addresses exactly. The
// fault (65) is for a text that is no such configuration.
func Says(yaml, host string) (Opinion, error) {
	c, err := decode([]byte(yaml))
	if err != nil {
		return Opinion{}, fault.New(fault.Data, "bad_pipelock_yaml", "the pipelock configuration in the document: %w", err).
			WithHint("let bottle-egress compute the egress section again")
	}
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	ip, err := netip.ParseAddr(host)
	isIP := err == nil
	if isIP {
		host = ip.String()
	}
	entry := matching(c.APIAllowlist, host, isIP)
	if entry == "" {
		return Opinion{Verdict: "deny", List: "api_allowlist"}, nil
	}
	if e := matching(c.FetchProxy.Monitoring.Blocklist, host, isIP); e != "" {
		return Opinion{Verdict: "deny", List: "blocklist", Entry: e}, nil
	}
	if isIP {
		for _, e := range c.Internal {
			if p, err := netip.ParsePrefix(e); err == nil && p.Contains(ip) {
				return Opinion{Verdict: "deny", List: "internal", Entry: e}, nil
			}
		}
	}
	return Opinion{Verdict: "allow", List: "api_allowlist", Entry: entry}, nil
}

// matching gives the first entry of a list that pipelock takes for host.
func matching(list []string, host string, isIP bool) string {
	for _, e := range list {
		base, wild := strings.CutPrefix(e, "*.")
		if e == host || wild && !isIP && (host == base || strings.HasSuffix(host, "."+base)) {
			return e
		}
	}
	return ""
}

// NotCarried says why traffic of an allow rule does not go through pipelock;
// "" if it does.
func NotCarried(r plan.Rule) string {
	switch {
	case Carries(r):
		return ""
	case r.Protocol == "ssh" || r.Protocol == "tcp":
		return "pipelock closes what does not start with TLS"
	case len(r.Addresses) > 0:
		return "pipelock resolves by itself, and the entry pins the addresses"
	}
	return "pipelock's list takes no ranges, and no private or special addresses"
}
