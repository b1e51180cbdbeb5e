package gate

import (
	"bytes"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/plan"
)

// minPlaceholder is the shortest placeholder that is looked for: a shorter one,
// which only a document by hand has, would be found in innocent headers.
const minPlaceholder = 8

// maxForm is how much of a form is read to look at its fields.
const maxForm = 64 << 10

// placeholder is what the guest holds in place of a secret's value.
type placeholder struct {
	value  string
	finder *finder
	secret *plan.Secret
}

// placeholders are those of b's secrets. Secrets may share one.
func placeholders(b *plan.Bottle) []placeholder {
	var out []placeholder
	for i := range b.Secrets {
		s := &b.Secrets[i]
		at := slices.IndexFunc(b.Env, func(v plan.EnvVar) bool { return v.Name == s.Name })
		if at < 0 || len(b.Env[at].Value) < minPlaceholder {
			continue
		}
		value := b.Env[at].Value
		out = append(out, placeholder{value, newFinder([]string{value}), s})
	}
	return out
}

// misplaced refuses a request that carries a placeholder where a credential is
// expected to work and the gate puts none: it could only fail, far away and with
// no word about why, and where a client sends a placeholder it would send a key.
// The headers that are going to be replaced are not looked at.
//
// Bodies are not searched for it. An agent's conversation quotes its environment,
// and every later request of it repeats the quotation: it would be refused for
// ever. A placeholder opens nothing, and is passed as it is. Only a form in which
// one field is the placeholder and nothing else, as in an exchange of tokens, is
// a credential.
func (g *Gate) misplaced(r *http.Request, t *tunnel, replaced map[string]bool) *Refusal {
	if len(g.holders) == 0 {
		return nil
	}
	for i := range g.holders {
		p := &g.holders[i]
		for name, values := range r.Header {
			if replaced[spelling(name)] || slices.Contains(hopByHop, name) {
				continue
			}
			if i := slices.IndexFunc(values, p.finder.contains); i >= 0 {
				return p.refuse(t, "header "+strings.ToLower(name), p.injection(t.host, name, values[i]))
			}
		}
		if p.finder.contains(r.URL.RequestURI()) {
			return p.refuse(t, "the address", "")
		}
	}
	field, p, err := g.formField(r)
	switch {
	case err != nil:
		// The rest of the exchange finds the same error where it belongs.
		return nil
	case p != nil:
		return p.refuse(t, "field "+field+" of the form", "")
	}
	return nil
}

// formField gives the field of a form that is a placeholder. The body can be read
// from its beginning afterwards.
func (g *Gate) formField(r *http.Request) (string, *placeholder, error) {
	kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if kind != "application/x-www-form-urlencoded" || r.ContentLength <= 0 || r.ContentLength > maxForm {
		return "", nil, nil
	}
	form, err := io.ReadAll(r.Body)
	r.Body = &rejoined{ReadCloser: r.Body, r: io.MultiReader(bytes.NewReader(form), failing{err})}
	if err != nil {
		return "", nil, err
	}
	for part := range strings.SplitSeq(string(form), "&") {
		name, raw, _ := strings.Cut(part, "=")
		value, err := url.QueryUnescape(raw)
		if err != nil {
			continue
		}
		for i := range g.holders {
			if value == g.holders[i].value {
				return spelling(name), &g.holders[i], nil
			}
		}
	}
	return "", nil, nil
}

// rejoined is a body that was read already.
type rejoined struct {
	io.ReadCloser
	r io.Reader
}

func (b *rejoined) Read(p []byte) (int, error) { return b.r.Read(p) }

// failing repeats the error that ended a look ahead, if there was one.
type failing struct{ err error }

func (f failing) Read([]byte) (int, error) {
	if f.err == nil {
		return 0, io.EOF
	}
	return 0, f.err
}

// refuse tells where the placeholder stands and where it belongs. entry is what
// would have to be added to the secret's inject, "" if nothing can be.
func (p *placeholder) refuse(t *tunnel, where, entry string) *Refusal {
	var goes []string
	for _, in := range p.secret.Inject {
		goes = append(goes, "header "+in.Header+" of "+in.Host)
	}
	reason := fmt.Sprintf("%s holds the placeholder of secret %s, whose value goes into %s and nowhere else", where, p.secret.Name, strings.Join(goes, ", "))
	hint := "send it there; a secret is put into a header and nowhere else"
	switch {
	case t.scheme != "https":
		hint = "send it there; a secret is put into requests over TLS alone"
	case entry != "":
		hint = fmt.Sprintf("send it there, or, if %s is meant to get the secret, add %s to secrets.%s.inject in the manifest", t.host, entry, p.secret.Name)
	}
	return refused("placeholder_misplaced", t.host, t.port, reason, hint)
}

// injection is the entry that would put the secret where a client has put the
// placeholder.
func (p *placeholder) injection(host, header, value string) string {
	entry := fmt.Sprintf(`{ "host": %q, "header": %q`, host, strings.ToLower(header))
	format := strings.Replace(value, p.value, "{}", 1)
	switch {
	case value == p.value:
		return entry + " }"
	case strings.HasPrefix(strings.ToLower(value), "basic "):
		// Base64 of name and key together: only the whole of it can be injected.
		return entry + `, "format": "Basic {}" } for a secret that is base64 of "user:key"`
	case len(format) < 80 && strings.Count(format, "{}") == 1 && strings.IndexFunc(format, func(r rune) bool { return r < ' ' || r > '~' }) < 0:
		return entry + fmt.Sprintf(`, "format": %q }`, format)
	}
	return ""
}
