package manifest

import (
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/bottle-tools/bottle/lib/plan"
)

// Compiled when it is first needed: every start of a tool would pay for it.
var headerName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile("^[a-z0-9!#$%&'*+.^_`|~-]+$") })

// framing are the headers that say where a request starts, ends and goes:
// no secret belongs there, and injecting one would break the gate's own reading
// of the request.
var framing = []string{
	"connection", "content-encoding", "content-length", "content-type", "expect", "host", "keep-alive",
	"proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "via",
}

// secrets reads the secret-flow table. It marks the rules of the hosts that get
// one as inspected.
func (l *loader) secrets(n node, user string, rs *rules) []plan.Secret {
	ms, _ := l.mapping(n)
	taken := map[string]string{} // host and header -> secret
	out := []plan.Secret{}
	for _, m := range ms {
		if !l.secretName(m, user) {
			continue
		}
		out = append(out, l.secret(m, rs, taken))
	}
	slices.SortFunc(out, func(a, b plan.Secret) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// secretName checks a secret's name, which is also the variable that holds its
// placeholder: it must not take the place of one that the bottle needs.
func (l *loader) secretName(m member, user string) bool {
	if !l.envName(m) {
		return false
	}
	if slices.ContainsFunc(base(user), func(v plan.EnvVar) bool { return v.Name == m.name }) {
		l.bad(m.node, "bad_secret", "%s is a variable of the bottle", "give the secret another name", m.name)
		return false
	}
	return true
}

func (l *loader) secret(m member, rs *rules, taken map[string]string) plan.Secret {
	s := plan.Secret{Name: m.name, Inject: []plan.Injection{}, GuestCanRead: "never"}
	ms, ok := l.object(m.node, "from", "inject")
	if !ok {
		return s
	}
	if e, ok := l.required(m.node, ms, "from"); ok {
		s.From, s.Command = l.source(e)
	}
	e, ok := l.required(m.node, ms, "inject")
	if !ok {
		return s
	}
	nodes := l.list(e)
	if kind(e) == "an array" && len(nodes) == 0 {
		l.bad(e, "bad_secret", "is empty", `say where the value goes, such as { "host": "api.example.com", "header": "authorization", "format": "Bearer {}" }`)
	}
	for _, in := range nodes {
		inj, ok := l.injection(in, rs)
		if !ok {
			continue
		}
		key := inj.Host + " " + inj.Header
		if other, twice := taken[key]; twice {
			l.bad(in, "bad_secret", "header %s of %s is injected already, by secret %s", "one header carries one secret", inj.Header, inj.Host, other)
			continue
		}
		taken[key] = m.name
		s.Inject = append(s.Inject, inj)
	}
	slices.SortFunc(s.Inject, func(a, b plan.Injection) int {
		return strings.Compare(a.Host+" "+a.Header, b.Host+" "+b.Header)
	})
	return s
}

// source reads where a secret's value is found: "env:NAME", "file:PATH", or
// { "command": [...] }.
func (l *loader) source(n node) (from string, command []string) {
	if n.v.Value.Kind() == '{' {
		ms, ok := l.object(n, "command")
		if !ok {
			return "", nil
		}
		if c, ok := l.required(n, ms, "command"); ok {
			return "command", l.command(c)
		}
		return "", nil
	}
	if n.v.Value.Kind() != '"' {
		l.wrongType(n, `"env:NAME", "file:PATH" or { "command": [...] }`)
		return "", nil
	}
	s, ok := l.str(n)
	if !ok {
		return "", nil
	}
	where, rest, _ := strings.Cut(s, ":")
	switch where {
	case "env":
		if !plan.ValidEnvName(rest) {
			l.bad(n, "bad_secret", "env: is followed by no name of a variable", "write env: and the name, such as env:API_KEY")
		}
		return s, nil
	case "file":
		if badPath(rest) != "" {
			l.bad(n, "bad_secret", "file: is followed by no path", "write file: and a path, relative to the manifest or starting with / or ~/")
			return s, nil
		}
		return "file:" + cleanPath(rest), nil
	case "command":
		l.bad(n, "bad_secret", "a command is not written as one string", `write { "command": ["program", "argument"] }`)
		return "", nil
	}
	// What stands here may be the secret itself: it is not repeated.
	l.bad(n, "bad_secret", "says not where the value is found", `write "env:NAME", "file:PATH" or { "command": [...] }; never the value itself`)
	return "", nil
}

func (l *loader) injection(n node, rs *rules) (plan.Injection, bool) {
	var in plan.Injection
	ms, ok := l.object(n, "host", "header", "format")
	if !ok {
		return in, false
	}
	host, ok1 := l.required(n, ms, "host")
	header, ok2 := l.required(n, ms, "header")
	if !ok1 || !ok2 {
		return in, false
	}
	var okHost, okHeader bool
	in.Host, okHost = l.injectionHost(host, rs)
	in.Header, okHeader = l.injectionHeader(header)
	okFormat := true
	if f, ok := ms.get("format"); ok {
		in.Format, okFormat = l.format(f)
	}
	return in, okHost && okHeader && okFormat
}

// injectionHost takes only a host that the allowlist names exactly, for tls: a
// secret must not go where a wildcard leads, nor in the clear. The gate has to
// read what goes there, so the host is inspected.
func (l *loader) injectionHost(n node, rs *rules) (string, bool) {
	var r plan.Rule
	if !l.host(n, &r, normalizeExact) {
		return "", false
	}
	if !rs.markInspected(r.Host) {
		l.bad(n, "not_allowed", "%s is not allowed as an exact tls host", rs.suggest(r.Host), quote(r.Host))
		return "", false
	}
	return r.Host, true
}

func (l *loader) injectionHeader(n node) (string, bool) {
	s, ok := l.str(n)
	if !ok {
		return "", false
	}
	h := strings.ToLower(s)
	switch {
	case !headerName().MatchString(h):
		l.bad(n, "bad_header", "%s is no header name", "write a name such as x-api-key or authorization", quote(s))
	case slices.Contains(framing, h):
		l.bad(n, "bad_header", "%s is about the request itself and carries no secret", "use the header that the service reads its key from", quote(s))
	default:
		return h, true
	}
	return "", false
}

func (l *loader) format(n node) (string, bool) {
	s, ok := l.str(n)
	if !ok {
		return "", false
	}
	l.noSecretValue(n, s)
	if strings.Count(s, "{}") != 1 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) || s != strings.TrimSpace(s) {
		l.bad(n, "bad_format", "holds {} not exactly once, or characters that no header has", `write something like "Bearer {}"`)
		return "", false
	}
	if s == "{}" {
		return "", true
	}
	return s, true
}
