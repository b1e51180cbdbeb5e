package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/plan"
)

// HowToUninspect says what gets a client to an inspected host whose certificate
// it does not take: of the manifest, and of the client. The gate tells it, and
// so does the summary at a bottle's end.
func HowToUninspect(b *plan.Bottle, host string) string {
	const trust = "let it trust /opt/bottle/ca.pem"
	var secrets []string
	for _, s := range b.Secrets {
		if slices.ContainsFunc(s.Inject, func(in plan.Injection) bool { return in.Host == host }) {
			secrets = append(secrets, s.Name)
		}
	}
	if len(secrets) > 0 {
		return fmt.Sprintf("%s; %s is inspected because of the secret %s, which the client would need itself otherwise",
			trust, host, strings.Join(secrets, ", "))
	}
	entry := host
	for _, r := range b.Egress.Rules {
		if r.Verdict != "allow" || !r.Inspect {
			continue
		}
		if r.Host == host {
			entry = host
			break
		}
		if covers(r.Host, host) {
			entry = r.Host
		}
	}
	return fmt.Sprintf("%s, or take %q out of egress.inspect in the manifest", trust, entry)
}
