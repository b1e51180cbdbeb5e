package gate

import (
	"encoding/base64"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// credentials are headers by which APIs take the same key. Where one of them is
// injected the others are the client's attempt at the same thing (an agent
// sends x-api-key or Authorization by the variable it was given), so all of
// them are removed.
var credentials = []string{"authorization", "x-api-key", "api-key", "x-goog-api-key"}

// minSecret is the shortest value that can be looked for in answers without
// finding it everywhere.
const minSecret = 4

// minDecoded is the same of what a value encodes, which may not be meant as a
// text at all.
const minDecoded = 8

// injector puts secrets into requests to one host.
type injector struct {
	secrets []*secret
	remove  map[string]bool // spellings whose client copies go
	mask    *finder         // for answers
}

// secret is one value and the headers of this host that may carry it.
type secret struct {
	name, value string
	ok          bool
	headers     []plan.Injection
}

// InspectedHosts are the hosts of b whose TLS the gate terminates: the entries
// marked inspect, and those that a secret is injected into. Wildcards keep their
// form. This is what the bottle's CA is made for.
func InspectedHosts(b *plan.Bottle) []string {
	var hosts []string
	for _, r := range b.Egress.Rules {
		if r.Inspect && r.Verdict == "allow" && r.Host != "" {
			hosts = append(hosts, r.Host)
		}
	}
	for _, s := range b.Secrets {
		for _, i := range s.Inject {
			hosts = append(hosts, i.Host)
		}
	}
	slices.Sort(hosts)
	return slices.Compact(hosts)
}

func injectors(secrets []plan.Secret, values map[string]string) (map[string]*injector, error) {
	m := make(map[string]*injector)
	for _, s := range secrets {
		byHost := make(map[string]*secret)
		for _, i := range s.Inject {
			if i.Host == "" || !isToken(i.Header) || i.Format != "" && strings.Count(i.Format, "{}") != 1 || !headerValue(i.Format) {
				return nil, fault.New(fault.Data, "bad_injection", "secret %s: an injection has a host, a header, and {} once in its format", s.Name)
			}
			x := byHost[i.Host]
			if x == nil {
				value, ok := values[s.Name]
				x = &secret{name: s.Name, value: value, ok: ok && value != ""}
				byHost[i.Host] = x
				in := m[i.Host]
				if in == nil {
					in = &injector{remove: make(map[string]bool)}
					m[i.Host] = in
				}
				in.secrets = append(in.secrets, x)
			}
			x.headers = append(x.headers, i)
		}
	}
	for _, in := range m {
		in.prepare()
	}
	return m, nil
}

func (in *injector) prepare() {
	var values []string
	for _, s := range in.secrets {
		values = append(values, s.value)
		values = append(values, decodings(s.value)...)
		for _, h := range s.headers {
			name := spelling(h.Header)
			in.remove[name] = true
			if slices.Contains(credentials, name) {
				for _, c := range credentials {
					in.remove[c] = true
				}
			}
		}
	}
	in.mask = newFinder(values)
}

// decodings are what a host may make of a value before it repeats it: of a
// credential for Basic, which is base64, user and password, and the password.
func decodings(value string) []string {
	b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(value, "="))
	text := string(b)
	if err != nil || len(text) < minDecoded || !utf8.ValidString(text) || !headerValue(text) {
		return nil
	}
	out := []string{text}
	if _, password, ok := strings.Cut(text, ":"); ok && len(password) >= minDecoded {
		out = append(out, password)
	}
	return out
}

// check tells why the host cannot be served, if a value is missing.
func (in *injector) check(host string, port int) *Refusal {
	for _, s := range in.secrets {
		switch {
		case !s.ok:
			return refused("secret_missing", host, port, "secret "+s.name+" has no value, and "+host+" is only reached with it",
				"give the value where the manifest's secrets."+s.name+".from says, and start the bottle anew")
		case len(s.value) < minSecret || !headerValue(s.value):
			return refused("secret_invalid", host, port, "the value of secret "+s.name+" is too short or no header can hold it",
				"look at where the manifest's secrets."+s.name+".from points to")
		}
	}
	return nil
}

// apply replaces every client copy of the headers, and gives the names of the
// secrets that went in. Of several headers for one secret the one that the
// client used is taken, or else the first.
func (in *injector) apply(h http.Header) []string {
	chosen := make([]plan.Injection, len(in.secrets))
	for i, s := range in.secrets {
		chosen[i] = s.headers[0]
		for _, x := range s.headers {
			if len(h.Values(x.Header)) > 0 {
				chosen[i] = x
				break
			}
		}
	}
	for name := range h {
		if in.remove[spelling(name)] {
			delete(h, name)
		}
	}
	var names []string
	for i, s := range in.secrets {
		value := s.value
		if f := chosen[i].Format; f != "" {
			value = strings.Replace(f, "{}", value, 1)
		}
		h.Set(chosen[i].Header, value)
		names = append(names, s.name)
	}
	return names
}

// spelling is what several names of a header have in common. Servers behind CGI
// conventions take _ and - for the same, some of them whatever is no letter or
// digit (lighttpd; Apache before 2.4).
func spelling(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(name))
}

// headerValue tells if s can be a header's value as it stands.
func headerValue(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 && r != '\t' || r == 0x7f }) && strings.TrimSpace(s) == s
}
