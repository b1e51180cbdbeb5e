package gate

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

const holder = "bottle-placeholder"

func withHolder(c *Config) {
	c.Bottle.Env = append(c.Bottle.Env, plan.EnvVar{Name: "KEY", Value: holder})
}

// TestPlaceholderMisplaced: the value goes into the one header of the one host.
// Where else a credential is expected to work, a placeholder is refused, and the
// answer says where it belongs; what only mentions it passes as it is.
func TestPlaceholderMisplaced(t *testing.T) {
	o, clear := startOrigin(t, true, echo, "api.test", "other.test"), startOrigin(t, false, echo)
	g := start(t, []plan.Rule{
		pin(allowHost("api.test", "tls", o.port), "127.0.0.1"),
		inspect(pin(allowHost("other.test", "tls", o.port), "127.0.0.1")),
		pin(allowHost("plain.test", "http", clear.port), "127.0.0.1"),
	}, keySecret("api.test", "x-api-key"), withHolder)
	basic := func(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }
	form := http.Header{"Content-Type": {"application/x-www-form-urlencoded; charset=utf-8"}}
	jsonBody := http.Header{"Content-Type": {"application/json"}}
	own := http.Header{"X-Api-Key": {holder}}
	for _, tt := range []struct {
		name, host, target string
		header             http.Header
		body               string
		refused            bool
		hint               string
	}{
		{"where it belongs", "api.test", "/", own, "", false, ""},
		{"an alias that is replaced", "api.test", "/", http.Header{"Authorization": {"Bearer " + holder}}, "", false, ""},
		{"another header", "api.test", "/", http.Header{"X-Token": {holder}}, "", true, `{ "host": "api.test", "header": "x-token" }`},
		{"another header too", "api.test", "/", http.Header{"X-Api-Key": {holder}, "X-Token": {"a " + holder}}, "", true, `"format": "a {}"`},
		{"a cookie", "api.test", "/", http.Header{"Cookie": {"a=b; key=" + holder}}, "", true, ""},
		{"another spelling", "api.test", "/", http.Header{"X_api_key": {holder}}, "", false, ""},
		{"another host", "other.test", "/", http.Header{"X-Api-Key": {holder}}, "", true, `{ "host": "other.test", "header": "x-api-key" }`},
		{"another host's authorization", "other.test", "/", http.Header{"Authorization": {"Bearer " + holder}}, "", true, `"header": "authorization", "format": "Bearer {}"`},
		{"basic", "other.test", "/", http.Header{"Authorization": {basic("user:" + holder)}}, "", true, `"format": "Basic {}"`},
		{"basic, one further", "other.test", "/", http.Header{"Authorization": {basic("users:" + holder)}}, "", true, ""},
		{"basic, two further", "other.test", "/", http.Header{"Authorization": {basic(holder + ":")}}, "", true, ""},
		{"a query", "api.test", "/?key=" + holder, own, "", true, "into a header and nowhere else"},
		{"a query, escaped", "api.test", "/?key=" + each("%%%02x")(holder), own, "", true, ""},
		{"a query, base64", "api.test", "/?key=" + url.QueryEscape(basic("x:"+holder)), own, "", true, ""},
		{"a path", "other.test", "/bot" + holder + "/send", nil, "", true, ""},
		{"plain HTTP", "plain.test", "/", http.Header{"X-Api-Key": {holder}}, "", true, "over TLS alone"},
		{"plain HTTP, a query", "plain.test", "/?k=" + holder, nil, "", true, ""},
		{"a form's field", "api.test", "/", form, "grant_type=x&client_secret=" + holder, true, "into a header"},
		{"a form's field, escaped", "other.test", "/", form, "client_secret=" + each("%%%02X")(holder), true, ""},
		{"a form that mentions it", "api.test", "/", form, "text=" + url.QueryEscape("my key is "+holder), false, ""},
		{"a form without it", "api.test", "/", form, "a=b", false, ""},
		{"a conversation", "api.test", "/", jsonBody, `{"messages":[{"content":"$ env\nKEY=` + holder + `"}]}`, false, ""},
		{"a conversation elsewhere", "other.test", "/", jsonBody, `{"text":"` + holder + `"}`, false, ""},
		{"a large form", "other.test", "/", form, "x=" + strings.Repeat("y", maxForm) + "&z=" + holder, false, ""},
		{"the proxy's own header", "plain.test", "/", http.Header{"Proxy-Authorization": {basic("x:" + holder)}}, "", false, ""},
	} {
		port, scheme, origin := o.port, "https", o
		if tt.host == "plain.test" {
			port, scheme, origin = clear.port, "http", clear
		}
		before := len(origin.log())
		method := "GET"
		if tt.body != "" {
			method = "POST"
		}
		req, err := http.NewRequest(method, scheme+"://"+hostPort(tt.host, port)+tt.target, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range tt.header {
			req.Header[k] = v
		}
		resp, err := g.client().Do(req)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		reached := len(origin.log()) > before
		if tt.refused {
			var f refusalBody
			_ = json.Unmarshal(b, &f)
			if resp.StatusCode != 403 || reached || f.Error.Code != "placeholder_misplaced" || !strings.Contains(f.Error.Hint, tt.hint) ||
				!strings.Contains(f.Error.Reason, "header x-api-key of api.test") {
				t.Errorf("%s: %s %s (reached: %v)", tt.name, resp.Status, b, reached)
			}
			continue
		}
		var e echoed
		if err := json.Unmarshal(b, &e); err != nil || resp.StatusCode != 200 || e.Body != tt.body {
			t.Errorf("%s: %s %.300s", tt.name, resp.Status, b)
		}
		if bytes.Contains(b, []byte(secretValue)) {
			t.Errorf("%s: the value came back: %s", tt.name, b)
		}
	}
	g.await("placeholder_misplaced", func(e audit.Event) bool {
		return e.Code == "placeholder_misplaced" && e.Verdict == "deny" && e.Host == "other.test"
	})
}

// TestPlaceholders: those of secrets alone, and none that is too short to tell.
func TestPlaceholders(t *testing.T) {
	b := &plan.Bottle{Env: []plan.EnvVar{{Name: "A", Value: "sk-placeholder"}, {Name: "B", Value: "x"}, {Name: "LANG", Value: "C.UTF-8-long"}},
		Secrets: []plan.Secret{{Name: "A"}, {Name: "B"}, {Name: "C"}}}
	if got := placeholders(b); len(got) != 1 || got[0].secret.Name != "A" {
		t.Errorf("%+v", got)
	}
}

// TestFormIsPassedOn: a form that was read to look at it arrives whole, also
// after the client asked whether it may send it.
func TestFormIsPassedOn(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test")
	g := start(t, []plan.Rule{pin(allowHost("api.test", "tls", o.port), "127.0.0.1")}, keySecret("api.test", "x-api-key"), withHolder)
	at := hostPort("api.test", o.port)
	c := g.inside("api.test", o.port)
	fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: %s\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 7\r\nExpect: 100-continue\r\n\r\n", at)
	line := make([]byte, len("HTTP/1.1 100 Continue\r\n\r\n"))
	if _, err := io.ReadFull(c, line); err != nil || !strings.Contains(string(line), " 100 ") {
		t.Fatalf("%q %v", line, err)
	}
	status, body, _ := raw(t, c, "a=b&c=d")
	if status != 200 || !strings.Contains(body, `"body":"a=b\u0026c=d"`) {
		t.Errorf("%d %s", status, body)
	}
	// One that ends early is the client's end, and no request.
	c = g.inside("api.test", o.port)
	before := len(o.log())
	fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: %s\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 7\r\n\r\na=", at)
	c.Close()
	g.await("client_gone", func(e audit.Event) bool { return e.Code == "client_gone" })
	if n := len(o.log()) - before; n != 0 {
		t.Errorf("%d requests reached the origin", n)
	}
}
