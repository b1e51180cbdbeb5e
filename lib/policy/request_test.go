package policy

import (
	"net/url"
	"path"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

func requestRule(t testing.TB, entries ...string) *plan.Rule {
	t.Helper()
	r := rule(t, "api.example.com")
	r.Inspect, r.Requests, r.RequestsFrom = true, entries, "bottle.json:3:4 bottles.dev.egress.inspect[0]"
	if _, err := Compile([]plan.Rule{r}); err != nil {
		t.Fatal(err)
	}
	return &r
}

func TestDecideRequest(t *testing.T) {
	r := requestRule(t, "GET /repos/*", "POST /graphql", "PUT /repos/{owner}/{repo}/contents/*",
		"DELETE /users/*/keys", "* /any", "PATCH /%C3%BC%20x", "GET /")
	for _, tt := range []struct {
		method, target string
		want           int // -1: request_not_allowed; -2: ambiguous_path
	}{
		{"GET", "/repos/a", 0},
		{"GET", "/repos/a/b/c/", 0},
		{"GET", "/repos/", 0},
		{"GET", "/repos", -1},
		{"GET", "/repos?x=/repos/a", -1},
		{"GET", "/repos/a?per_page=1&x=../..", 0},
		{"GET", "/repos/a?", 0},
		{"GET", "/repos/caf%C3%A9", 0},
		{"GET", "/repos/caf%c3%a9", 0},
		{"GET", "/repos/a%20b", 0},
		{"GET", "/repos/a@b:c,d=e!$&'()*+~", 0},
		{"HEAD", "/repos/a", 0},
		{"get", "/repos/a", -1},
		{"GET ", "/repos/a", -1},
		{"POST", "/repos/a", -1},
		{"GET", "/REPOS/a", -1},
		{"GET", "/reposx/a", -1},
		{"GET", "/", 6},
		{"POST", "/graphql", 1},
		{"POST", "/graphql/", -1},
		{"HEAD", "/graphql", -1},
		{"GET", "/graphql", -1},
		{"POST", "/graphql?query=x", 1},
		{"PUT", "/repos/o/r/contents/a/b", 2},
		{"PUT", "/repos/o/r/contents", -1},
		{"PUT", "/repos/o/contents/a", -1},
		{"PUT", "/repos/o/r/x/contents/a", -1},
		{"DELETE", "/users/me/keys", 3},
		{"DELETE", "/users/me/you/keys", -1},
		{"DELETE", "/users/me/keys/1", -1},
		{"OPTIONS", "/any", 4},
		{"PROPFIND", "/any", 4},
		{"PATCH", "/%C3%BC%20x", 5},
		{"PATCH", "/%c3%bc%20x", 5},
		// What servers read in different ways.
		{"GET", "/repos/../user", -2},
		{"GET", "/repos/..", -2},
		{"GET", "/repos/./x", -2},
		{"GET", "/repos/.../x", -2},
		{"GET", "/repos/..%20/x", -2},
		{"GET", "/repos/%2e%2e/user", -2},
		{"GET", "/repos/.%2E/user", -2},
		{"GET", "/repos/a%2fb", -2},
		{"GET", "/repos/a%2F..%2F..%2Fuser", -2},
		{"GET", "/repos/a%5cb", -2},
		{"GET", `/repos/..\user`, -2},
		{"GET", "/repos/%252e%252e/user", -2},
		{"GET", "/repos//user", -2},
		{"GET", "//repos/a", -2},
		{"GET", "/repos/a//", -2},
		{"GET", "/repos/a;b=c", -2},
		{"GET", "/repos/..;/user", -2},
		{"GET", "/repos/a%3Bb", -2},
		{"GET", "/repos/a%3f", -2},
		{"GET", "/repos/a%23", -2},
		{"GET", "/repos/a%00", -2},
		{"GET", "/repos/a%0d%0a", -2},
		{"GET", "/repos/a%7f", -2},
		{"GET", "/%72epos/a", -2},
		{"GET", "/repos/a%7Eb", -2},
		{"GET", "/repos/%c0%ae%c0%ae/user", -2}, // overlong
		{"GET", "/repos/%e0%80%af", -2},
		{"GET", "/repos/%ff", -2},
		{"GET", "/repos/%ed%a0%80", -2},                   // surrogate
		{"GET", "/repos/%ef%bc%8f..", -2},                 // fullwidth solidus
		{"GET", "/repos/%ef%bc%8e%ef%bc%8e/x", -2},        // fullwidth full stops
		{"GET", "/repos/%e2%88%95", -2},                   // division slash
		{"GET", "/repos/%c2%85", -2},                      // NEL
		{"GET", "/repos/%u002e%u002e/x", -2},              // IIS
		{"GET", "/repos/a%", -2},                          //
		{"GET", "/repos/a%2", -2},                         //
		{"GET", "/repos/a%zz", -2},                        //
		{"GET", "/repos/a b", -2},                         //
		{"GET", "/repos/a|b", -2},                         //
		{"GET", "/repos/\xc3\xbc", -2},                    // raw UTF-8
		{"GET", "repos/a", -2},                            //
		{"GET", "", -2},                                   //
		{"GET", "*", -2},                                  //
		{"GET", "https://api.example.com/repos/a", -2},    //
		{"GET", "/repos/a#b", -2},                         //
		{"GET", "/repos/{owner}", -2},                     //
		{"GET", "/repos/" + strings.Repeat("x", 5000), 0}, //
	} {
		d := DecideRequest(r, tt.method, tt.target)
		want := RequestDecision{Allow: tt.want >= 0, Index: max(tt.want, -1), Code: Allowed}
		switch tt.want {
		case -1:
			want.Code = "request_not_allowed"
		case -2:
			want.Code = "ambiguous_path"
		}
		if d.Allow != want.Allow || d.Index != want.Index || d.Code != want.Code {
			t.Errorf("%s %q: got %+v, want %+v", tt.method, tt.target, d, want)
		}
		if d.Allow != (d.Reason == "" && d.Hint == "") {
			t.Errorf("%s %q: reason and hint %q %q", tt.method, tt.target, d.Reason, d.Hint)
		}
	}
}

// TestDecideRequestEveryPath: an entry for every path needs no reading of it, so
// that a registry with escaped slashes in its names can be held to GET.
func TestDecideRequestEveryPath(t *testing.T) {
	r := requestRule(t, "GET /*", "POST /x")
	for _, target := range []string{"/@scope%2fname", "/a//b/../c;d", "/", "/%00"} {
		if d := DecideRequest(r, "GET", target); !d.Allow || d.Index != 0 {
			t.Errorf("GET %s: %+v", target, d)
		}
		if d := DecideRequest(r, "PUT", target); d.Allow {
			t.Errorf("PUT %s: %+v", target, d)
		}
	}
	if d := DecideRequest(&plan.Rule{}, "DELETE", "/a//b"); !d.Allow || d.Index != -1 {
		t.Errorf("a rule without requests: %+v", d)
	}
}

// TestDecideRequestHint: what the answer says to add is what it takes.
func TestDecideRequestHint(t *testing.T) {
	r := requestRule(t, "GET /a")
	d := DecideRequest(r, "POST", "/b/%c3%bc?token=SECRET")
	if want := `add "POST /b/%C3%BC" to the requests of api.example.com in the manifest`; d.Hint != want {
		t.Errorf("hint %q, want %q", d.Hint, want)
	}
	if strings.Contains(d.Reason+d.Hint, "SECRET") {
		t.Errorf("the query is in %q %q", d.Reason, d.Hint)
	}
	if !strings.Contains(d.Reason, "bottle.json:3:4 bottles.dev.egress.inspect[0]") {
		t.Errorf("no provenance in %q", d.Reason)
	}
	more := requestRule(t, "GET /a", "POST /b/%C3%BC")
	if d := DecideRequest(more, "POST", "/b/%c3%bc"); !d.Allow {
		t.Errorf("the hinted entry does not take the request: %+v", d)
	}
	for _, method := range []string{"TRACE", "post", "M-SEARCH", "X_Y"} {
		if d := DecideRequest(r, method, "/b"); d.Allow || d.Hint == "" {
			t.Errorf("%s: %+v", method, d)
		}
	}
	if d := DecideRequest(r, "GET", "/"+strings.Repeat("x", 2000)); len(d.Reason) > 500 || len(d.Hint) > 500 {
		t.Errorf("%d bytes of reason, %d of hint", len(d.Reason), len(d.Hint))
	}
}

func TestNormalizeRequest(t *testing.T) {
	for _, tt := range []struct{ in, want, hint string }{
		{"GET /repos/*", "GET /repos/*", ""},
		{"GET /repos/**", "GET /repos/*", ""},
		{"GET /**", "GET /*", ""},
		{"* /", "* /", ""},
		{"M-SEARCH /a/*/b/{c.d-e_f}", "M-SEARCH /a/*/b/{c.d-e_f}", ""},
		{"GET /%c3%bc/{x}", "GET /%C3%BC/{x}", ""},
		{"GET /a/", "GET /a/", ""},

		{"get /a", "", "write GET"},
		{"/a", "", `"GET /repos/*"`},
		{"GET", "", `"GET /repos/*"`},
		{"GET  /a", "", `"GET /repos/*"`},
		{"GET /a b", "", `"GET /repos/*"`},
		{" /a", "", `"GET /repos/*"`},
		{"G?T /a", "", `"GET /repos/*"`},
		{"GET a", "", `"GET /a"`},
		{"GET https://api.example.com/a", "", `"GET /a"`},
		{"GET /a?b", "", `"GET /a"`},
		{"GET /a#b", "", `"GET /a"`},
		{"TRACE /a", "", "remove the entry"},
		{"CONNECT /a", "", "remove the entry"},
		{"GET /a*", "", "whole segments"},
		{"GET /a/**/b", "", "whole segments"},
		{"GET /a{b}", "", "whole segments"},
		{"GET /{}", "", "whole segments"},
		{"GET /{a/b}", "", "whole segments"},
		{"GET /{ü}", "", "whole segments"},
		{"GET /a/../b", "", "as clients send it"},
		{"GET /a//b", "", "as clients send it"},
		{"GET /a%2fb", "", "as clients send it"},
		{"GET /ü", "", "as clients send it"},
		{"GET /" + strings.Repeat("x", 2000), "", "a * at the end"},
	} {
		got, err := NormalizeRequest(tt.in)
		if got != tt.want || (err == nil) != (tt.hint == "") {
			t.Errorf("%q: %q, %v", tt.in, got, err)
			continue
		}
		if err == nil {
			if again, err := NormalizeRequest(got); again != got || err != nil {
				t.Errorf("%q: not stable: %q, %v", tt.in, again, err)
			}
			continue
		}
		if f := fault.As(err); f.Exit != fault.Data || f.Code != "bad_request_entry" || !strings.Contains(f.Hint, tt.hint) {
			t.Errorf("%q: %d %s %q", tt.in, f.Exit, f.Code, f.Hint)
		}
	}
}

func TestCompileRequests(t *testing.T) {
	for _, tt := range []struct {
		change func(*plan.Rule)
		want   string
	}{
		{func(r *plan.Rule) { r.Inspect = false }, "need a rule that is inspected"},
		{func(r *plan.Rule) { r.RequestsFrom = "" }, "stand together"},
		{func(r *plan.Rule) { r.Requests = nil }, "stand together"},
		{func(r *plan.Rule) { r.Requests = []string{"GET /a", "GET /a"} }, "stands twice"},
		{func(r *plan.Rule) { r.Requests = []string{"GET /%c3%bc"} }, "has to be written"},
		{func(r *plan.Rule) { r.Requests = []string{"GET"} }, "no method and path"},
		{func(r *plan.Rule) { r.Requests = make([]string, MaxRequests+1) }, "more than 200"},
		{func(r *plan.Rule) { r.Verdict, r.Protocol, r.Inspect = "deny", "any", false }, "no requests"},
	} {
		r := *requestRule(t, "GET /a")
		tt.change(&r)
		if _, err := Compile([]plan.Rule{r}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v, want %q", err, tt.want)
		}
	}
	a, b := *requestRule(t, "GET /a"), *requestRule(t, "GET /b")
	if _, err := Compile([]plan.Rule{a, b}); err == nil || fault.As(err).Code != "conflicting_rules" {
		t.Errorf("two readings of one host: %v", err)
	}
}

// FuzzDecideRequest: whatever is allowed below /pub/ stays there however often a
// server decodes it, cleans it, cuts parameters off and turns backslashes round.
func FuzzDecideRequest(f *testing.F) {
	for _, s := range []string{"/pub/a", "/pub/%2e%2e/x", "/pub/..;/x", `/pub/..\x`, "/pub/%252e%252e%252fx", "/pub/a%20b", "/pub/%c3%bc"} {
		f.Add(s)
	}
	r := requestRule(f, "GET /pub/*")
	f.Fuzz(func(t *testing.T, target string) {
		if !DecideRequest(r, "GET", target).Allow {
			return
		}
		p, _, _ := strings.Cut(target, "?")
		for range 3 {
			segments := strings.FieldsFunc(strings.ReplaceAll(p, `\`, "/"), func(r rune) bool { return r == '/' })
			for i, s := range segments {
				segments[i], _, _ = strings.Cut(strings.Trim(s, " "), ";")
			}
			if clean := path.Clean("/" + strings.Join(segments, "/")); clean != "/pub" && !strings.HasPrefix(clean, "/pub/") {
				t.Fatalf("%q is allowed and may be read as %q", target, clean)
			}
			var err error
			if p, err = url.PathUnescape(p); err != nil {
				t.Fatalf("%q is allowed and is no path: %v", target, err)
			}
			if strings.ContainsAny(p, "\x00\r\n") {
				t.Fatalf("%q is allowed and holds controls", target)
			}
		}
	})
}

func BenchmarkDecideRequest(b *testing.B) {
	entries := make([]string, MaxRequests)
	for i := range entries {
		entries[i] = "GET /repos/{owner}/x" + strings.Repeat("y", i)
	}
	r := requestRule(b, entries...)
	for b.Loop() {
		DecideRequest(r, "GET", "/repos/bottle-tools/bottle/contents/README.md")
	}
}
