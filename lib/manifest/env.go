package manifest

import (
	"regexp"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/plan"
)

// Paths in the guest that variables point to.
const (
	guestPath   = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin"
	guestProxy  = "http://127.0.0.1:3128"
	guestNoProx = "localhost,127.0.0.1,::1"
	guestBundle = "/etc/ssl/certs/ca-certificates.crt" // the system's roots and the bottle's own
	guestCA     = "/opt/bottle/ca.pem"                 // the bottle's own alone
	placeholder = "bottle-placeholder"
)

// base are the variables that every bottle has.
func base(user string) []plan.EnvVar {
	home := "/home/agent"
	if user == "root" {
		home = "/root"
	}
	return []plan.EnvVar{
		{Name: "CURL_CA_BUNDLE", Value: guestBundle},
		{Name: "GIT_SSL_CAINFO", Value: guestBundle},
		{Name: "HOME", Value: home},
		{Name: "HTTPS_PROXY", Value: guestProxy},
		{Name: "HTTP_PROXY", Value: guestProxy},
		{Name: "LANG", Value: "C.UTF-8"},
		{Name: "NODE_EXTRA_CA_CERTS", Value: guestCA},
		{Name: "NODE_USE_ENV_PROXY", Value: "1"},
		{Name: "NO_PROXY", Value: guestNoProx},
		{Name: "PATH", Value: guestPath},
		{Name: "PIP_CERT", Value: guestBundle},
		{Name: "REQUESTS_CA_BUNDLE", Value: guestBundle},
		{Name: "SSL_CERT_FILE", Value: guestBundle},
		{Name: "TERM", Value: "xterm-256color"},
		{Name: "http_proxy", Value: guestProxy},
		{Name: "https_proxy", Value: guestProxy},
		{Name: "no_proxy", Value: guestNoProx},
	}
}

// fixed are the variables that a manifest cannot set: the bottle would not work
// with any other value. All others of base may be overridden; none of them
// holds the bottle shut, since a guest may set what it likes.
var fixed = []string{"HOME", "HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"}

func (l *loader) env(n node) []plan.EnvVar {
	ms, _ := l.mapping(n)
	out := make([]plan.EnvVar, 0, len(ms))
	for _, m := range ms {
		if !l.envName(m) {
			continue
		}
		v, ok := l.str(m.node)
		if !ok {
			continue
		}
		l.noSecretValue(m.node, v)
		out = append(out, plan.EnvVar{Name: m.name, Value: v})
	}
	slices.SortFunc(out, func(a, b plan.EnvVar) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// envName checks the name of a variable, of env or of a secret.
func (l *loader) envName(m member) bool {
	switch {
	case !plan.ValidEnvName(m.name):
		l.bad(m.node, "bad_env", "%s cannot name a variable", "letters, digits and _ make a name, and no digit comes first", quote(m.name))
	case slices.Contains(fixed, m.name):
		l.bad(m.node, "bad_env", "%s is set by the bottle", "remove it; NO_PROXY and the CA variables may be changed", m.name)
	default:
		return true
	}
	return false
}

// secretInEnv refuses a variable that is a secret's too: the guest would get
// the value of env where a placeholder belongs.
func (l *loader) secretInEnv(n node, env []plan.EnvVar, b *bottle) {
	if b == nil {
		return
	}
	for _, v := range env {
		if slices.ContainsFunc(b.secrets, func(s plan.Secret) bool { return s.Name == v.Name }) {
			l.bad(node{v: n.v, base: n.path(), name: v.Name}, "secret_in_env", "%s stands in env and in secrets", "remove it from env: the guest gets a placeholder, and the gate puts the value in", v.Name)
		}
	}
}

// keyForms are how well-known services write their keys: what has one of these
// forms is a key and no placeholder. mark is a part that every such key has: an
// expression is compiled only where it stands, since nearly no run needs any.
var keyForms = []struct{ what, mark, form string }{
	{"an Anthropic key", "sk-ant-", `sk-ant-[a-z0-9]+-[A-Za-z0-9_-]{20,}`},
	{"an OpenAI key", "sk-", `\bsk-((proj|svcacct|admin)-[A-Za-z0-9_-]{40,}|[A-Za-z0-9]{40,})`},
	{"a GitHub token", "gh", `gh[pousr]_[A-Za-z0-9]{36}`},
	{"a GitHub token", "github_pat_", `github_pat_[A-Za-z0-9_]{22,}`},
	{"a GitLab token", "glpat-", `glpat-[A-Za-z0-9_-]{20}`},
	{"an AWS key", "AKIA", `\bAKIA[A-Z0-9]{16}\b`},
	{"an AWS key", "ASIA", `\bASIA[A-Z0-9]{16}\b`},
	{"a Google key", "AIza", `AIza[A-Za-z0-9_-]{35}`},
	{"a Slack token", "xox", `xox[abeoprs]-[A-Za-z0-9-]{10,}`},
	{"a Stripe key", "k_live_", `[rs]k_live_[A-Za-z0-9]{16,}`},
	{"a package registry token", "npm_", `npm_[A-Za-z0-9]{36}`},
	{"a package registry token", "pypi-AgE", `pypi-AgE[A-Za-z0-9_-]{30,}`},
	{"a Hugging Face token", "hf_", `\bhf_[A-Za-z0-9]{30,}`},
	{"a private key", "PRIVATE KEY-----", `-----BEGIN [A-Z ]*PRIVATE KEY-----`},
	{"a signed token (JWT)", ".eyJ", `\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}`},
}

// noSecretValue refuses a key in the manifest: manifests are committed, and
// plans are printed. The message does not repeat it.
func (l *loader) noSecretValue(n node, s string) {
	if len(s) < 16 {
		return
	}
	for _, k := range keyForms {
		if strings.Contains(s, k.mark) && regexp.MustCompile(k.form).MatchString(s) {
			l.bad(n, "secret_value", "holds what looks like %s", `put it under secrets, such as "NAME": { "from": "env:NAME", "inject": [ … ] }, and revoke it if the manifest was shared`, k.what)
			return
		}
	}
}
