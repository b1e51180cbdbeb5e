package cli

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/tidwall/gjson"
)

// bottle is a valid policy section.
func bottle(rules ...plan.Rule) *plan.Bottle {
	if rules == nil {
		rules = []plan.Rule{}
	}
	return &plan.Bottle{
		ID: "claude", Agent: "claude",
		Manifest:  plan.ManifestRef{Name: "bottle.json", SHA256: plan.SHA256(nil)},
		Runtime:   plan.Runtime{Requested: "auto", Candidates: []plan.Candidate{{Engine: "gvisor", Why: "test"}}},
		Image:     plan.Image{Kind: "host"},
		User:      "agent",
		Home:      "discard",
		Workspace: plan.Workspace{Path: ".", Mode: "rw"},
		Egress:    plan.Policy{Proxy: "builtin", Rules: rules},
		Command:   []string{"true"},
	}
}

func allow(host string, port int, protocol string) plan.Rule {
	class := "exact"
	if strings.HasPrefix(host, "*.") {
		class = "wildcard"
	}
	return plan.Rule{Host: host, Ports: []int{port}, Protocol: protocol, Verdict: "allow", Class: class, From: "test"}
}

func pinned(r plan.Rule, addresses ...string) plan.Rule {
	r.Addresses = addresses
	return r
}

func document(t *testing.T, b *plan.Bottle) string {
	t.Helper()
	d, err := plan.New(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(d.Line()) + "\n"
}

// run runs the command as a value.
func run(stdin string, args ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	p := &tool.Proc{
		Name: "bottle-egress", Args: args, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errs,
		Getenv: func(string) string { return "" }, Now: time.Now,
	}
	status = Run(context.Background(), p)
	return status, out.String(), errs.String()
}

func TestFilter(t *testing.T) {
	b := bottle(allow("api.example.com", 443, "tls"))
	in := strings.Replace(document(t, b), "}\n", `,"x-mine":{"a":1.0, "b":"\u00e9"}}`+"\n", 1)
	status, out, errs := run(in)
	if status != 0 || errs != "" {
		t.Fatalf("%d %s", status, errs)
	}
	want, err := pipelock.Derive(b)
	if err != nil {
		t.Fatal(err)
	}
	got := gjson.Parse(out)
	for path, v := range map[string]string{
		"egress.pipelock.yaml":   want.Pipelock.YAML,
		"egress.pipelock.sha256": want.Pipelock.SHA256,
		"egress.rules_sha256":    want.RulesSHA256,
		"egress.residual.0":      want.Residual[0],
	} {
		if got.Get(path).String() != v {
			t.Errorf("%s is %q, want %q", path, got.Get(path), v)
		}
	}
	if !strings.Contains(out, `"x-mine":{"a":1.0,"b":"\u00e9"}`) {
		t.Errorf("what is not ours was changed: %s", out)
	}
	if i, j := strings.Index(out, `"egress":{"rules`), strings.Index(out, `"x-mine"`); i > j {
		t.Error("the section stands behind those of others")
	}
	// Once more: nothing changes.
	if status, again, errs := run(out); status != 0 || again != out || errs != "" {
		t.Errorf("not idempotent: %d %s\n%s\n%s", status, errs, out, again)
	}
	// An edit of what is derived is undone, and said.
	edited := strings.Replace(out, `mode: strict`, `mode: audit`, 1)
	status, out, errs = run(edited)
	if status != 0 || !strings.Contains(errs, "warning: claude: the egress section differed") ||
		gjson.Get(out, "egress.pipelock.yaml").String() != want.Pipelock.YAML || gjson.Get(out, "diagnostics.0.code").String() != "egress_recomputed" {
		t.Errorf("%d %s %s", status, errs, out)
	}
}

func TestFilterSeveral(t *testing.T) {
	good, bad := document(t, bottle(allow("a.example", 443, "tls"))), document(t, bottle(allow("*.com", 443, "tls")))
	failed := `{"format_version":"1.0","error":{"stage":"plan","code":"no_manifest","exit":66,"message":"no such file"}}` + "\n"
	status, out, errs := run(good + bad + failed + good)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if status != 66 || len(lines) != 4 {
		t.Fatalf("%d, %d lines: %s", status, len(lines), errs)
	}
	for i, want := range []string{"", "too_broad", "no_manifest", ""} {
		if got := gjson.Get(lines[i], "error.code").String(); got != want {
			t.Errorf("line %d: error %q, want %q", i, got, want)
		}
		if has := gjson.Get(lines[i], "egress").Exists(); has != (want == "") {
			t.Errorf("line %d: egress %v", i, has)
		}
	}
	if lines[2]+"\n" != failed {
		t.Errorf("the failure of an earlier stage was changed: %s", lines[2])
	}
	if strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "error: bottle.egress.rules[0].host: ") {
		t.Errorf("stderr: %q", errs)
	}
}

func TestBadRules(t *testing.T) {
	for host, where := range map[string]string{
		"*": ".host", "*.com": ".host", "https://a.example": ".host", "a.example:443": ".host", "a.example/x": ".host",
		"a.*.example": ".host", "": "", "A.example": "", "10.0.0.1": "",
	} {
		for _, verb := range [][]string{nil, {"yaml"}, {"serve", "--listen", "tcp:127.0.0.1:0"}} {
			status, out, errs := run(document(t, bottle(allow("good.example", 443, "tls"), allow(host, 443, "tls"))), verb...)
			if status != fault.Data || !strings.Contains(errs, "bottle.egress.rules[1]"+where+": ") {
				t.Errorf("%q %q: %d %s", verb, host, status, errs)
			}
			if verb == nil != strings.Contains(out, `"error":{"stage":"egress"`) {
				t.Errorf("%q %q: stdout %s", verb, host, out)
			}
		}
	}
}

// Documents that no stage may trust.
func TestBadDocuments(t *testing.T) {
	raw := strings.TrimSpace(document(t, bottle(allow("a.example", 443, "tls"))))
	open := raw[:len(raw)-1]
	for name, doc := range map[string]string{
		"duplicate": open + `,"bottle":{}}`, "case": open + `,"Bottle":{}}`, "trailing": raw + ` {"x"`,
		"deep": open + `,"x-a":` + strings.Repeat("[", 60000) + strings.Repeat("]", 60000) + "}", "utf8": open + ",\"x-a\":\"\xff\xfe\"}",
		"version": strings.Replace(raw, `"1.0"`, `"9.0"`, 1), "no version": strings.Replace(raw, `"format_version":"1.0",`, "", 1),
		"array": "[]", "empty": "", "null": "null", "no bottle": `{"format_version":"1.0"}`,
		"unknown in policy": strings.Replace(raw, `"verdict":"allow"`, `"verdict":"allow","verdict_":1`, 1),
		"wrong type":        strings.Replace(raw, `"ports":[443]`, `"ports":"443"`, 1),
	} {
		for _, verb := range [][]string{nil, {"yaml"}, {"serve", "--listen", "tcp:127.0.0.1:0"}} {
			if status, _, errs := run(doc+"\n", verb...); status != fault.Data || strings.Count(errs, "error: ") != 1 {
				t.Errorf("%q %s: %d %s", verb, name, status, errs)
			}
		}
	}
}

func TestYAMLVerb(t *testing.T) {
	b := bottle(allow("a.example", 443, "tls"))
	want, err := pipelock.YAML(b)
	if err != nil {
		t.Fatal(err)
	}
	if status, out, errs := run(document(t, b), "yaml"); status != 0 || out != string(want) || errs != "" {
		t.Errorf("%d %q %s", status, errs, out)
	}
	many := make([]plan.Rule, pipelock.MaxHosts+1)
	for i := range many {
		many[i] = allow(fmt.Sprintf("h%d.example", i), 443, "tls")
	}
	failed := `{"format_version":"1.0","error":{"stage":"plan","code":"no_manifest","exit":66,"message":"no such file","hint":"make one"}}` + "\n"
	for name, c := range map[string]struct {
		in     string
		status int
		text   string
	}{
		"nothing allowed": {document(t, bottle()), fault.Data, "no allow rule goes through pipelock"},
		"ssh only":        {document(t, bottle(allow("a.example", 22, "ssh"))), fault.Data, "no allow rule goes through pipelock"},
		"too many":        {document(t, bottle(many...)), fault.Data, "more than the 2000"},
		"two documents":   {document(t, b) + document(t, b), fault.Data, "more than one document"},
		"earlier failure": {failed, fault.NoInput, "no such file; make one"},
	} {
		if status, out, errs := run(c.in, "yaml"); status != c.status || out != "" || !strings.Contains(errs, c.text) {
			t.Errorf("%s: %d %q %s", name, status, out, errs)
		}
	}
	// The filter takes what has no YAML.
	for _, in := range []string{document(t, bottle()), document(t, bottle(many...))} {
		if status, out, errs := run(in); status != 0 || gjson.Get(out, "egress.pipelock").Exists() || !gjson.Get(out, "egress.rules_sha256").Exists() {
			t.Errorf("%d %s", status, errs)
		}
	}
}

func TestUsage(t *testing.T) {
	doc := document(t, bottle())
	for _, c := range []struct {
		args []string
		text string
	}{
		{[]string{"explian", "a.example"}, `unknown verb "explian"`},
		{[]string{"explain"}, "explain takes one host"},
		{[]string{"nonsense"}, `unknown verb "nonsense"`},
		{[]string{"yaml", "x"}, `unexpected argument "x"`},
		{[]string{"--nope"}, "nope"},
		{[]string{"serve"}, "--listen is missing"},
		{[]string{"serve", "--listen", "/tmp/x.sock"}, "neither unix:PATH nor tcp:ADDRESS:PORT"},
		{[]string{"serve", "--listen", "unix:"}, "neither"},
		{[]string{"serve", "--listen", "tcp:0.0.0.0:3128"}, "loopback only"},
		{[]string{"serve", "--listen", "tcp:[::]:3128"}, "loopback only"},
		{[]string{"serve", "--listen", "tcp:localhost:3128"}, "no address and port"},
		{[]string{"serve", "--listen", "tcp:127.0.0.1:70000"}, "no address and port"},
		{[]string{"serve", "--listen", "tcp:127.0.0.1"}, "no address and port"},
		{[]string{"serve", "--listen", "unix:/" + strings.Repeat("x", 120)}, "longer than"},
		{[]string{"serve", "--keeper", "--listen", "tcp:127.0.0.1:0"}, "--keeper takes no other flag"},
		{[]string{"serve", "--listen", "tcp:127.0.0.1:0", "--ca-cert", "/tmp/x"}, "no host of claude is inspected"},
	} {
		if status, out, errs := run(doc, c.args...); status != fault.Usage || out != "" || !strings.Contains(errs, c.text) {
			t.Errorf("%q: %d %q %s", c.args, status, out, errs)
		}
	}
}
