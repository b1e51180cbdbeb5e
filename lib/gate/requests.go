package gate

import (
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/policy"
)

// Headers by which frameworks and load balancers let a client say something else
// than its request line and its Host do, in the spelling of spelling().
var (
	methodOverrides = []string{"x-http-method-override", "x-http-method", "x-method-override", "x-method"}
	pathOverrides   = []string{"x-original-url", "x-rewrite-url", "x-original-uri", "x-forwarded-uri", "x-forwarded-path",
		"x-forwarded-prefix", "x-http-path-override", "x-http-destinationurl", "x-envoy-original-path"}
	hostOverrides = []string{"x-forwarded-host", "x-forwarded-server", "x-original-host", "x-host", "x-http-host-override", "forwarded"}
)

// methodParameters do the same in a query (Rails, Symfony, method-override).
var methodParameters = append([]string{"-method"}, methodOverrides...)

// limit holds a request against the requests of its rule, as it will leave: what
// net/http made of the target is what it writes.
func (t *tunnel) limit(r *http.Request) *Refusal {
	if len(t.Rule.Requests) == 0 {
		return nil
	}
	path := r.URL.EscapedPath()
	if path == "" {
		path = "/"
	}
	if d := policy.DecideRequest(t.Rule, r.Method, path); !d.Allow {
		return refused(d.Code, t.host, t.port, d.Reason, d.Hint)
	}
	for name := range r.Header {
		if s := spelling(name); slices.Contains(methodOverrides, s) || slices.Contains(pathOverrides, s) {
			return refused("override_refused", t.host, t.port,
				"header "+name+" asks for another method or path than the request line, which is what the host's requests are about",
				"ask for it in the request line")
		}
	}
	if name := overridingParameter(r.URL.RawQuery); name != "" {
		return refused("override_refused", t.host, t.port,
			"parameter "+name+" asks for another method than the request line, which is what the host's requests are about",
			"ask for it in the request line")
	}
	return nil
}

// overridingParameter gives the name of a query's parameter that says a method.
func overridingParameter(query string) string {
	for part := range strings.FieldsFuncSeq(query, func(r rune) bool { return r == '&' || r == ';' || r == '?' }) {
		raw, _, _ := strings.Cut(part, "=")
		name, err := url.QueryUnescape(raw)
		if err != nil {
			name = raw
		}
		if s := spelling(name); slices.Contains(methodParameters, s) {
			return s
		}
	}
	return ""
}

// overriddenHost refuses headers that name another host than the one that was
// checked: an origin behind a load balancer may go by them.
func overriddenHost(r *http.Request, t *tunnel) *Refusal {
	for name, values := range r.Header {
		s := spelling(name)
		if !slices.Contains(hostOverrides, s) {
			continue
		}
		for _, v := range values {
			if s == "forwarded" {
				v = forwardedHost(v, t.authority())
			}
			if !sameAuthority(strings.TrimSpace(v), t.authority(), "") {
				return refused("host_mismatch", t.host, t.port, "header "+name+" names another host than the request is for",
					"leave that header out")
			}
		}
	}
	return nil
}

// forwardedHost is the host of a Forwarded header (RFC 7239), own if it names
// none, and what matches no host if it names several.
func forwardedHost(v, own string) string {
	host, found := own, 0
	for part := range strings.FieldsFuncSeq(v, func(r rune) bool { return r == ';' || r == ',' }) {
		name, value, _ := strings.Cut(part, "=")
		if strings.EqualFold(strings.TrimSpace(name), "host") {
			host = strings.Trim(strings.TrimSpace(value), `"`)
			found++
		}
	}
	if found > 1 {
		return ""
	}
	return host
}
