package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
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

// Residual says in sentences what the gate cannot see under this policy, so
// that nobody takes an allowlist for more than it is. The order is fixed; an
// empty list means that every request is seen whole.
func Residual(p plan.Policy) []string {
	var opaque, wild, clear, ssh, raw, private []string
	for i := range p.Rules {
		r := &p.Rules[i]
		if r.Verdict != "allow" {
			continue
		}
		host := r.Host + r.CIDR
		switch {
		case r.Protocol == "tls" && !r.Inspect:
			opaque = append(opaque, host)
		case r.Protocol == "http":
			clear = append(clear, host)
		case r.Protocol == "ssh":
			ssh = append(ssh, host)
		case r.Protocol == "tcp":
			raw = append(raw, host)
		}
		if r.Class == ClassWildcard {
			wild = append(wild, host)
		}
		if r.Class == ClassPrivate || r.Class == ClassCGNAT || len(r.Addresses) > 0 {
			private = append(private, host)
		}
	}
	out := []string{}
	say := func(hosts []string, text string) {
		if len(hosts) > 0 {
			out = append(out, some(hosts)+": "+text)
		}
	}
	say(opaque, "TLS is end to end: only the server name is seen; paths, bodies and the Host header inside are not")
	say(wild, "the labels below the wildcard are chosen by the guest and can carry data to whoever answers for that name")
	say(clear, "plain HTTP: whoever is on the way can read and change it")
	say(ssh, "SSH is end to end: only the banner is seen")
	say(raw, "raw TCP: nothing in the stream is understood")
	say(private, "reaches an address that is named in the manifest, which may be on the host or its networks")
	return out
}

func some(hosts []string) string {
	if n := len(hosts) - residualNames; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(hosts[:residualNames], ", "), n)
	}
	return strings.Join(hosts, ", ")
}
