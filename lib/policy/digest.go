package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/plan"
)

// RulesSHA256 is the digest of a list of rules, "sha256:<64 hex>": over their
// compact JSON, one a line, in order.
func RulesSHA256(rules []plan.Rule) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	h := sha256.New()
	for i := range rules {
		b.Reset()
		// A Rule is strings, numbers and lists of them: this cannot fail.
		if err := enc.Encode(&rules[i]); err != nil {
			panic(err)
		}
		h.Write(b.Bytes())
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// residualNames bounds how many hosts one sentence of Residual names.
const residualNames = 5

// blind lists what the gate does not see or hold, by kind of allow rule, in the
// order of Residual.
var blind = []struct {
	of   func(r *plan.Rule) bool
	text string
}{
	{func(r *plan.Rule) bool { return r.Protocol == "tls" && !r.Inspect && r.Host != "" },
		"TLS is end to end: only the server name is seen; paths, bodies and the Host header inside are not"},
	{func(r *plan.Rule) bool { return r.Protocol == "tls" && r.CIDR != "" },
		"TLS is end to end and an address has no server name: nothing inside is seen, the Host header neither"},
	{func(r *plan.Rule) bool { return len(r.Requests) > 0 },
		"requests are held to method and path; queries and bodies take no part, nor does what a server reads in them, such as another method"},
	{func(r *plan.Rule) bool { return r.Class == ClassWildcard },
		"the labels below the wildcard are chosen by the guest and can carry data to whoever answers for that name"},
	{func(r *plan.Rule) bool { return r.Protocol == "http" },
		"plain HTTP: whoever is on the way can read and change it"},
	{func(r *plan.Rule) bool { return slices.Contains(r.DLPAllow, EveryDLPRule) },
		"what leaves is not looked through for secrets (egress.dlp)"},
	{func(r *plan.Rule) bool { return len(r.DLPAllow) > 0 && !slices.Contains(r.DLPAllow, EveryDLPRule) },
		"some of what looks like a key may leave (egress.dlp)"},
	{func(r *plan.Rule) bool { return r.Protocol == "ssh" },
		"SSH is end to end: only the banner is seen"},
	{func(r *plan.Rule) bool { return r.Protocol == "tcp" },
		"raw TCP: nothing in the stream is understood"},
	{func(r *plan.Rule) bool {
		return r.Class == ClassPrivate || r.Class == ClassCGNAT || len(r.Addresses) > 0
	},
		"reaches an address that is named in the manifest, which may be on the host or its networks"},
}

// Residual says in sentences what the gate cannot see under this policy, so
// that nobody takes an allowlist for more than it is. The order is fixed; an
// empty list means that every request is seen whole.
func Residual(p plan.Policy) []string {
	out := []string{}
	for _, b := range blind {
		var hosts []string
		for i := range p.Rules {
			if r := &p.Rules[i]; r.Verdict == "allow" && b.of(r) {
				hosts = append(hosts, r.Host+r.CIDR)
			}
		}
		if len(hosts) > 0 {
			out = append(out, some(hosts)+": "+b.text)
		}
	}
	return out
}

func some(hosts []string) string {
	if n := len(hosts) - residualNames; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(hosts[:residualNames], ", "), n)
	}
	return strings.Join(hosts, ", ")
}

// ResidualOfSecrets is the same about secrets: what the search of answers cannot
// hold.
func ResidualOfSecrets(secrets []plan.Secret) []string {
	var hosts []string
	for _, s := range secrets {
		for _, in := range s.Inject {
			if !slices.Contains(hosts, in.Host) {
				hosts = append(hosts, in.Host)
			}
		}
	}
	if len(hosts) == 0 {
		return nil
	}
	slices.Sort(hosts)
	return []string{some(hosts) + ": answers are searched for the secret in its usual writings; a host that writes it in another way gives it to the guest"}
}
