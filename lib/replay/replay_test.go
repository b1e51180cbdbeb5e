package replay

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// write makes an audit log as a gate does.
func write(t testing.TB, events ...audit.Event) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := audit.Open(path, audit.Options{Bottle: "dev-00000000"})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		if err := l.Write(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t testing.TB, events ...audit.Event) *Log {
	t.Helper()
	l := &Log{}
	if err := l.Read(write(t, events...)); err != nil {
		t.Fatal(err)
	}
	return l
}

// event reads "allow tls host:port", "deny CODE host:port", "error tls host:port",
// and with a fourth and fifth word a request.
func event(s string) audit.Event {
	w := strings.Fields(s)
	e := audit.Event{Event: audit.KindConnect, Verdict: w[0], Code: w[1]}
	i := strings.LastIndexByte(w[2], ':')
	e.Host = w[2][:i]
	fmt.Sscan(w[2][i+1:], &e.Port)
	if w[0] != audit.Deny {
		e.Code, e.Protocol, e.From = policy.Allowed, w[1], "bottle.json:1:1 bottles.dev.egress.allow[0]"
	}
	if w[0] == audit.Failed {
		e.Code = "upstream_unreachable"
	}
	if len(w) > 4 {
		e.Event, e.Method, e.Path = audit.KindRequest, w[3], w[4]
	}
	if e.Port == 0 {
		e.Event = audit.KindLookup
	}
	return e
}

func events(list ...string) (out []audit.Event) {
	for _, s := range list {
		out = append(out, event(s))
	}
	return out
}

// planOf makes a plan of the members of a manifest's bottle.
func planOf(t testing.TB, members string) *plan.Bottle {
	t.Helper()
	return load(t, `{"format_version":"1.0","bottles":{"dev":{`+members+`}},"agents":{"a":{"bottle":"dev","command":["a"]}}}`)
}

func load(t testing.TB, text string) *plan.Bottle {
	t.Helper()
	m, err := manifest.Load([]byte(text), "bottle.json", nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	b, err := m.Plan("a")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReplay(t *testing.T) {
	for _, tt := range []struct {
		name, members string
		was           string
		address       string
		reason        string
		want          string // "now code", "" for no change
	}{
		{"still allowed", `"egress":{"allow":["a.test"]}`, "allow tls a.test:443", "", "", ""},
		{"still denied", `"egress":{"allow":["a.test"]}`, "deny not_in_allowlist b.test:443", "", "", ""},
		{"gone", `"egress":{}`, "allow tls a.test:443", "", "", "deny not_in_allowlist"},
		{"gone, and the network had failed", `"egress":{}`, "error tls a.test:443", "", "", "deny not_in_allowlist"},
		{"new", `"egress":{"allow":["b.test"]}`, "deny not_in_allowlist b.test:443", "", "", "allow allowed"},
		{"new by a wildcard", `"egress":{"allow":["*.b.test"]}`, "deny not_in_allowlist x.b.test:443", "", "", "allow allowed"},
		{"another port", `"egress":{"allow":[{"host":"b.test","ports":[8443]}]}`, "deny not_in_allowlist b.test:443", "", "", ""},
		{"denied by a rule", `"egress":{"allow":["a.test"],"deny":["a.test"]}`, "allow tls a.test:443", "", "", "deny denied_by_rule"},
		{"the address is denied", `"egress":{"allow":["a.test"],"deny":["93.184.0.0/16"]}`, "allow tls a.test:443", "93.184.216.34:443", "", "deny address_not_allowed"},
		{"another address is denied", `"egress":{"allow":["a.test"],"deny":["8.8.0.0/16"]}`, "allow tls a.test:443", "93.184.216.34:443", "", ""},
		{"the address was private, and is not pinned any more", `"egress":{"allow":["a.test"]}`, "allow tls a.test:443", "10.0.0.1:443", "", "deny address_not_allowed"},
		{"pinned elsewhere", `"egress":{"allow":[{"host":"a.test","addresses":["10.0.0.2"]}]}`, "allow tls a.test:443", "10.0.0.1:443", "", ""},
		{"pinned now", `"egress":{"allow":[{"host":"a.test","addresses":["10.0.0.2"]}]}`, "deny address_not_allowed a.test:443", "", "a.test: 10.0.0.2 is not public (private)", "allow allowed"},
		{"not pinned yet", `"egress":{"allow":["a.test"]}`, "deny address_not_allowed a.test:443", "", "a.test: 10.0.0.2 is not public (private)", ""},
		{"the deny of its address is gone", `"egress":{"allow":["a.test"]}`, "deny address_not_allowed a.test:443", "", "a.test: 8.8.8.8 is denied by 8.8.8.0/24 (x)", "allow allowed"},
		{"the deny of its address is there", `"egress":{"allow":["a.test"],"deny":["8.8.8.8"]}`, "deny address_not_allowed a.test:443", "", "a.test: 8.8.8.8 is denied by 8.8.8.0/24 (x)", ""},
		{"the address is open by itself", `"egress":{"allow":["10.0.0.2"]}`, "deny not_in_allowlist 10.0.0.2:443", "", "", "allow allowed"},
		{"http now", `"egress":{"allow":[{"host":"a.test","ports":[443],"protocol":"http"}]}`, "allow tls a.test:443", "", "", "deny wrong_protocol"},
		{"tcp now", `"egress":{"allow":[{"host":"a.test","ports":[443],"protocol":"tcp"}]}`, "allow tls a.test:443", "", "", ""},
		{"tls now", `"egress":{"allow":[{"host":"a.test","ports":[22]}]}`, "allow ssh a.test:22", "", "", "deny not_tls"},
		{"ssh now", `"egress":{"allow":[{"host":"a.test","ports":[443],"protocol":"ssh"}]}`, "allow tls a.test:443", "", "", "deny not_ssh"},
		{"no tcp any more", `"egress":{"allow":[{"host":"a.test","ports":[5432]}]}`, "allow tcp a.test:5432", "", "", "unknown "},
		{"plain HTTP was refused", `"egress":{"allow":[{"host":"a.test","protocol":"http"}]}`, "deny wrong_protocol a.test:80 GET /", "", "", "allow allowed"},
		{"plain HTTP is refused", `"egress":{"allow":[{"host":"a.test","ports":[80]}]}`, "deny wrong_protocol a.test:80 GET /", "", "", ""},
		{"plain HTTP of a host that is open for tls", `"egress":{"allow":[{"host":"a.test","ports":[80]}]}`, "deny not_in_allowlist a.test:80 GET /", "", "", ""},
		{"no server name, tcp now", `"egress":{"allow":[{"host":"a.test","ports":[443],"protocol":"tcp"}]}`, "deny sni_missing a.test:443", "", "", "allow allowed"},
		{"no server name", `"egress":{"allow":["a.test"]}`, "deny sni_missing a.test:443", "", "", ""},
		{"the request is not named", `"egress":{"allow":["a.test"],"inspect":[{"host":"a.test","requests":["GET /x"]}]}`, "allow tls a.test:443 GET /y", "", "", "deny request_not_allowed"},
		{"the request is named", `"egress":{"allow":["a.test"],"inspect":[{"host":"a.test","requests":["GET /x"]}]}`, "allow tls a.test:443 GET /x", "", "", ""},
		{"requests nobody saw", `"egress":{"allow":["a.test"],"inspect":[{"host":"a.test","requests":["GET /x"]}]}`, "allow tls a.test:443", "", "", "unknown "},
		{"the request was not named", `"egress":{"allow":["a.test"],"inspect":[{"host":"a.test","requests":["GET /*"]}]}`, "deny request_not_allowed a.test:443 GET /y", "", "", "allow allowed"},
		{"the request is still not named", `"egress":{"allow":["a.test"],"inspect":[{"host":"a.test","requests":["GET /z"]}]}`, "deny request_not_allowed a.test:443 GET /y", "", "", ""},
		{"nobody reads it any more", `"egress":{"allow":["a.test"]}`, "deny upgrade_refused a.test:443 GET /y", "", "", "allow allowed"},
		{"it is read as before", `"egress":{"allow":["a.test"],"inspect":["a.test"]}`, "deny upgrade_refused a.test:443 GET /y", "", "", ""},
		{"a name that was looked up", `"egress":{"allow":[{"host":"a.test","ports":[5432],"protocol":"tcp"}]}`, "deny not_in_allowlist a.test:0", "", "", "allow allowed"},
		{"a name that is not found", `"egress":{}`, "deny not_in_allowlist a.test:0", "", "", ""},
		{"an odd spelling", `"egress":{"allow":["127.0.0.1"]}`, "deny bad_host 127.1:443", "", "", ""},
	} {
		e := event(tt.was)
		e.Address, e.Reason = tt.address, tt.reason
		changed, err := Replay(read(t, e, e), planOf(t, tt.members))
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if len(changed) > 0 {
			got = changed[0].Now + " " + changed[0].NowCode
		}
		if got != tt.want || len(changed) > 1 || len(changed) == 1 && changed[0].Count != 2 {
			t.Errorf("%s: %+v, want %q", tt.name, changed, tt.want)
		}
	}
}

// What a gate decided under a policy, the same policy decides again.
func TestReplayOfTheSamePolicy(t *testing.T) {
	b := planOf(t, `"egress":{"allow":["a.test","*.b.test",{"host":"p.test","protocol":"http"},{"host":"s.test","protocol":"ssh"},{"host":"l.test","ports":[1],"protocol":"tcp","addresses":["127.0.0.1"]},"i.test"],"deny":["no.b.test","8.8.8.0/24"],"inspect":[{"host":"i.test","requests":["GET /x"]}]}`)
	m, err := policy.Compile(b.Egress.Rules)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	hosts := []string{"a.test", "x.b.test", "no.b.test", "b.test", "p.test", "s.test", "l.test", "8.8.8.8", "127.1", "i.test"}
	var list []audit.Event
	for range 500 {
		e := audit.Event{Event: audit.KindConnect, Host: hosts[rnd.IntN(len(hosts))], Port: []int{1, 22, 80, 443}[rnd.IntN(4)]}
		d := m.Foresee(e.Host, e.Port)
		e.Code, e.Verdict = d.Code, audit.Deny
		if d.Allow {
			e.Verdict, e.Protocol = audit.Allow, d.Rule.Protocol
			if d.Rule.Inspect {
				list = append(list, event("allow tls i.test:443 GET /x"), event("deny request_not_allowed i.test:443 POST /x"))
			}
		}
		list = append(list, e)
	}
	changed, err := Replay(read(t, list...), b)
	if err != nil || len(changed) > 0 {
		t.Errorf("%+v %v", changed, err)
	}
}

func TestReadRefuses(t *testing.T) {
	good := `{"time":"2026-11-25T00:00:00Z","bottle":"dev-00000000","seq":1,"event":"connect","verdict":"deny","code":"not_in_allowlist","host":"a.test","port":443}` + "\n"
	for _, tt := range []struct {
		name, text string
		code       string // "" for a log
		where      string
		unfinished bool
	}{
		{"a log", good, "", "", false},
		{"empty", "", "", "", false},
		{"a document", `{"format_version":"1.0"}` + "\n", "bad_audit_log", ":1", false},
		{"prose in the middle", good + "hello\n" + strings.Replace(good, `"seq":1`, `"seq":2`, 1), "bad_audit_log", ":2", false},
		{"prose at the end", good + "hello\n", "bad_audit_log", ":2", false},
		{"a line that a crash cut, and a gate that knows of it", good + `{"time":"20` + "\n" + strings.Replace(good, `"seq":1`, `"seq":2,"torn":{"bytes":12,"sha256":"x"}`, 1), "", "", false},
		{"a line without its end", good + `{"time":"20`, "", "", true},
		{"no verdict", strings.Replace(good, `"deny"`, `"maybe"`, 1), "bad_audit_log", ":1", false},
		{"no protocol", strings.Replace(good, `"port"`, `"protocol":"odd","port"`, 1), "bad_audit_log", ":1", false},
		{"no port", strings.Replace(good, `443`, `70000`, 1), "bad_audit_log", ":1", false},
	} {
		path := filepath.Join(t.TempDir(), "audit.jsonl")
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		l := &Log{}
		err := l.Read(path)
		f := fault.As(err)
		switch {
		case tt.code == "" && err != nil, tt.code != "" && (f == nil || f.Code != tt.code || f.Exit != fault.Data || !strings.HasSuffix(f.Where, tt.where)):
			t.Errorf("%s: %v, want %s %s", tt.name, err, tt.code, tt.where)
		case (len(l.Unfinished) > 0) != tt.unfinished:
			t.Errorf("%s: unfinished %q", tt.name, l.Unfinished)
		}
	}
	l := &Log{}
	if f := fault.As(l.Read(filepath.Join(t.TempDir(), "none"))); f == nil || f.Exit != fault.NoInput {
		t.Errorf("%+v", f)
	}
}

func TestNeverUsed(t *testing.T) {
	b := planOf(t, `"egress":{"allow":["a.test",{"host":"b.test","ports":[443,8443]},"*.w.test","x.w.test",{"host":"p.test","protocol":"http","requests":["GET /a","POST /b"]}],"deny":["d.test","e.test","8.8.8.0/24"]}`)
	l := read(t, events("allow tls a.test:443", "deny port_not_allowed a.test:80", "allow tls b.test:8443", "allow tls x.w.test:443", "deny denied_by_rule d.test:443", "allow http p.test:80 GET /a")...)
	list, err := NeverUsed(l, b)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, u := range list {
		got = append(got, fmt.Sprintf("%s ports %v requests %q note %v", u.Rule.Host+u.Rule.CIDR, u.Ports, u.Requests, u.Note != ""))
	}
	want := []string{
		"b.test ports [443] requests [] note false",
		"*.w.test ports [] requests [] note false",
		`p.test ports [] requests ["POST /b"] note false`,
		"e.test ports [] requests [] note false",
		"8.8.8.0/24 ports [] requests [] note true",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
}

// apply is RFC 7396, section 2.
func apply(target, patch any) any {
	p, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	t, ok := target.(map[string]any)
	if !ok {
		t = map[string]any{}
	}
	for k, v := range p {
		if v == nil {
			delete(t, k)
			continue
		}
		t[k] = apply(t[k], v)
	}
	return t
}

// patched applies what was learned to a manifest.
func patched(t testing.TB, text string, entries []Entry) string {
	t.Helper()
	var doc any
	if err := json.Unmarshal([]byte(text), &doc); err != nil {
		t.Fatal(err)
	}
	raw, err := plan.Encode(map[string]any{"bottles": map[string]any{"dev": map[string]any{"egress": map[string]any{"allow": entries}}}})
	if err != nil {
		t.Fatal(err)
	}
	var p any
	if err := json.Unmarshal(raw, &p); err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(apply(doc, p))
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestLearn(t *testing.T) {
	pinned := event("allow http ollama.test:11434")
	pinned.Address = "127.0.0.1:11434"
	preset := event("allow tls api.anthropic.com:443")
	preset.From = "preset anthropic"
	l := read(t, append(events(
		"allow tls a.test:443", "allow tls a.test:443", "deny not_in_allowlist b.test:443", "deny port_not_allowed a.test:8443",
		"deny not_in_allowlist git.test:22", "deny not_in_allowlist plain.test:80 GET /", "error tls down.test:443", "allow ssh s.test:22", "allow tcp 10.0.0.5:5432",
		"deny not_in_allowlist looked.test:0", "deny not_in_allowlist a.test:0",
		// What is not to be proposed.
		"deny not_in_allowlist 169.254.169.254:80", "deny bad_host 0x7f.1:443", "deny denied_by_rule bad.test:443", "deny not_in_allowlist localhost:80",
		"deny wrong_protocol a.test:443 GET /", "deny sni_mismatch a.test:443", "deny upstream_unresolvable typo.test:443", "deny not_in_allowlist no..dots:443", "deny not_in_allowlist ::ffff:10.0.0.1:443",
	), pinned, preset)...)
	lesson, err := Learn(l, Options{})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := plan.Encode(lesson.Allow)
	if err != nil {
		t.Fatal(err)
	}
	want := `[{"cidr":"10.0.0.5/32","ports":[5432],"protocol":"tcp","why":"asked for once: 1 allowed, 0 denied"},` +
		`{"host":"a.test","ports":[443,8443],"why":"asked for 3 times: 2 allowed, 1 denied"},` +
		`{"host":"b.test","ports":[443],"why":"asked for once: 0 allowed, 1 denied"},` +
		`{"host":"down.test","ports":[443],"why":"asked for once: 1 allowed, 0 denied"},` +
		`{"host":"git.test","ports":[22],"protocol":"ssh","why":"asked for once: 0 allowed, 1 denied"},` +
		`{"host":"looked.test","ports":[443],"why":"looked up once and never connected to; the port is a guess"},` +
		`{"host":"ollama.test","ports":[11434],"protocol":"http","addresses":["127.0.0.1"],"why":"asked for once: 1 allowed, 0 denied"},` +
		`{"host":"plain.test","ports":[80],"protocol":"http","why":"asked for once: 0 allowed, 1 denied"},` +
		`{"host":"s.test","ports":[22],"protocol":"ssh","why":"asked for once: 1 allowed, 0 denied"}]`
	if string(raw) != want {
		t.Errorf("%s\nwant %s", raw, want)
	}
	remarks := strings.Join(lesson.Remarks, "\n")
	for _, text := range []string{"169.254.169.254", "metadata", `"0x7f.1"`, `"bad.test" (once) is not proposed: an entry of deny`, `"localhost"`, "port 443 was spoken to in plain HTTP", "sni_mismatch", `"typo.test"`, `"no..dots"`, `"::ffff:10.0.0.1"`,
		"preset anthropic opens", "10.0.0.5 port 5432 is proposed, and is no public address"} {
		if !strings.Contains(remarks, text) {
			t.Errorf("no word about %s:\n%s", text, remarks)
		}
	}
	if name := BottleName(l, nil); name != "dev" {
		t.Errorf("the bottle is %q", name)
	}
}

// TestLearnWithPlan: what the manifest would be refused without is kept, and
// what its deny entries are about is not proposed.
func TestLearnWithPlan(t *testing.T) {
	const text = `{"format_version":"1.0","bottles":{"dev":{"egress":{"presets":["anthropic"],"allow":["api.test","seen.test","*.w.test",{"host":"p.test","protocol":"http","requests":["GET /a"],"why":"the mirror"}],"deny":["bad.test"],"inspect":["seen.test","*.w.test"]},` +
		`"secrets":{"K":{"from":"env:K","inject":[{"host":"api.test","header":"k"}]}}}},"agents":{"a":{"bottle":"dev","command":["a"]}}}`
	b := load(t, text)
	l := read(t, events("allow tls seen.test:443", "deny not_in_allowlist bad.test:443", "deny not_in_allowlist api.anthropic.com:443", "allow http p.test:80 GET /a")...)
	lesson, err := Learn(l, Options{Plan: b})
	if err != nil {
		t.Fatal(err)
	}
	var hosts []string
	for _, e := range lesson.Allow {
		hosts = append(hosts, e.Host)
		if e.Host == "p.test" && (!slices.Equal(e.Requests, []string{"GET /a"}) || !strings.HasPrefix(e.Why, "the mirror (")) {
			t.Errorf("%+v", e)
		}
	}
	if !slices.Equal(hosts, []string{"*.w.test", "api.test", "p.test", "seen.test"}) {
		t.Errorf("%q", hosts)
	}
	if name := BottleName(&Log{}, b); name != "dev" {
		t.Errorf("the bottle is %q", name)
	}
	load(t, patched(t, text, lesson.Allow))
	// Without the plan the manifest is refused: that is what --plan is for.
	lesson, err = Learn(l, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := manifest.Load([]byte(patched(t, text, lesson.Allow)), "bottle.json", nil); err == nil {
		t.Error("a secret goes to a host that is not allowed any more")
	}
}

func TestLearnWildcards(t *testing.T) {
	l := read(t, events("allow tls a.w.test:443", "allow tls b.w.test:443", "allow tls c.w.test:8443", "allow tls w.test:443", "allow tls a.co.uk:443", "allow tls b.co.uk:443", "allow tls one.x.test:443")...)
	for n, want := range map[int]string{0: "a.co.uk a.w.test b.co.uk b.w.test c.w.test one.x.test w.test", 2: "*.w.test a.co.uk b.co.uk c.w.test one.x.test w.test", 3: "a.co.uk a.w.test b.co.uk b.w.test c.w.test one.x.test w.test"} {
		lesson, err := Learn(l, Options{Wildcards: n})
		if err != nil {
			t.Fatal(err)
		}
		var hosts []string
		for _, e := range lesson.Allow {
			hosts = append(hosts, e.Host)
		}
		if got := strings.Join(hosts, " "); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

// TestLearnSender: what an addon of mitmdump makes of a request is not what the
// guest asked for, and a request that it passes on is one.
func TestLearnSender(t *testing.T) {
	first, again, made := event("allow tls a.test:443"), event("allow tls a.test:443"), event("deny not_in_allowlist collector.test:443")
	again.Sender, made.Sender = "mitmdump", "mitmdump"
	lesson, err := Learn(read(t, first, again, made), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(lesson.Allow) != 1 || lesson.Allow[0].Host != "a.test" || !strings.HasPrefix(lesson.Allow[0].Why, "asked for once") {
		t.Errorf("%+v", lesson.Allow)
	}
	if len(lesson.Remarks) != 1 || !strings.Contains(lesson.Remarks[0], `"collector.test" (once) is not proposed: mitmdump asked for it`) {
		t.Errorf("%q", lesson.Remarks)
	}
}

// TestLearnWildcardsKeepRequests: what holds one host to some requests is not
// lost in a wildcard, nor put on the others.
func TestLearnWildcardsKeepRequests(t *testing.T) {
	const text = `{"format_version":"1.0","bottles":{"dev":{"egress":{"allow":[{"host":"p.w.test","protocol":"http","requests":["GET /a"]},{"host":"q.w.test","protocol":"http"},{"host":"r.w.test","protocol":"http"}]}}},"agents":{"a":{"bottle":"dev","command":["a"]}}}`
	l := read(t, events("allow http p.w.test:80 GET /a", "allow http q.w.test:80 GET /", "allow http r.w.test:80 GET /")...)
	for range 20 { // entries are made in no order
		lesson, err := Learn(l, Options{Plan: load(t, text), Wildcards: 2})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range lesson.Allow {
			if (e.Host == "p.w.test") != (len(e.Requests) > 0) {
				t.Fatalf("%+v", lesson.Allow)
			}
		}
		if len(lesson.Allow) != 2 || lesson.Allow[0].Host != "*.w.test" || lesson.Allow[1].Host != "p.w.test" {
			t.Fatalf("%+v", lesson.Allow)
		}
	}
}

// TestLearnServes: whatever a log holds, the patch applies, the manifest is
// good, what was allowed is allowed, and what is proposed was asked for.
func TestLearnServes(t *testing.T) {
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	rnd := rand.New(rand.NewPCG(seed, 3))
	pick := func(of ...string) string { return of[rnd.IntN(len(of))] }
	const text = `{"format_version":"1.0","bottles":{"dev":{"egress":{"allow":["old.test"],"deny":["no.test","*.never.test"]}}},"agents":{"a":{"bottle":"dev","command":["a"]}}}`
	for range 200 {
		var list []audit.Event
		for range 1 + rnd.IntN(30) {
			host := pick("a.test", "b.test", "x.a.test", "no.test", "x.never.test", "10.0.0.1", "93.184.216.34", "169.254.169.254", "127.1", "localhost", "xn--bcher-kva.example", "*.odd", "a b", "ÄÖ.test", "2a00::1", "64:ff9b::1", "")
			port := pick("22", "80", "443", "8443", "0")
			e := event("deny not_in_allowlist x:" + port)
			e.Host = host
			switch rnd.IntN(5) {
			case 0:
				e.Verdict, e.Code, e.Protocol = audit.Allow, policy.Allowed, pick("tls", "http", "ssh", "tcp")
				e.Address = pick("10.0.0.1:443", "93.184.216.34:443", "")
			case 1:
				e.Code = pick("sni_mismatch", "wrong_protocol", "denied_by_rule", "port_not_allowed", "address_not_allowed")
			case 2:
				e.Event, e.Method, e.Path = audit.KindRequest, "GET", "/"
			}
			if port == "0" && e.Event != audit.KindLookup {
				continue
			}
			list = append(list, e)
		}
		l := read(t, list...)
		lesson, err := Learn(l, Options{Wildcards: rnd.IntN(2) * 2})
		if err != nil {
			t.Fatal(err)
		}
		b := load(t, patched(t, text, lesson.Allow))
		m, err := policy.Compile(b.Egress.Rules)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range l.Decisions {
			if d.Port == 0 || d.Verdict != audit.Allow && d.Code != policy.NotInAllowlist {
				continue
			}
			now := m.Decide(d.Host, d.Port)
			if _, err := policy.Normalize(d.Host); err != nil || now.Code == policy.BadHost {
				continue // no entry can open it
			}
			if denied := d.Host == "no.test" || d.Host == "x.never.test"; now.Allow == denied {
				t.Fatalf("%+v: %+v\n%+v", d, now, lesson.Allow)
			}
		}
		for _, e := range lesson.Allow {
			asked := slices.ContainsFunc(l.Decisions, func(d Decision) bool {
				return d.Host == e.Host || d.Host+"/32" == e.CIDR || d.Host+"/128" == e.CIDR || strings.HasPrefix(e.Host, "*.") && strings.HasSuffix(d.Host, e.Host[1:])
			})
			if !asked {
				t.Fatalf("%+v was never asked for", e)
			}
		}
	}
}

// FuzzLog: whatever bytes are called an audit log, they are refused with a
// place, or what is learned of them makes a good manifest.
func FuzzLog(f *testing.F) {
	const line = `{"bottle":"dev-00000000","seq":1,"event":"connect","verdict":"deny","code":"not_in_allowlist","host":"a.test","port":443}` + "\n"
	for _, s := range []string{"", "\n", line, line + line, strings.Replace(line, "a.test", `\u0000`, 1), strings.Replace(line, "443", "0", 1), strings.Replace(line, "a.test", "10.0.0.1", 1),
		strings.Replace(line, `"deny","code":"not_in_allowlist"`, `"allow","protocol":"odd","address":"[::1]:443"`, 1), strings.Replace(line, "connect", "request", 1),
		strings.Replace(line, `"deny","code":"not_in_allowlist"`, `"allow","protocol":"http","address":"10.0.0.1:80"`, 1), line + "x", "{}\n" + line} {
		f.Add(s)
	}
	const text = `{"format_version":"1.0","bottles":{"dev":{"egress":{"presets":["anthropic"],"allow":["api.test"],"inspect":["api.test"],"deny":["no.test"]}}},"agents":{"a":{"bottle":"dev","command":["a"]}}}`
	b := load(f, text)
	f.Fuzz(func(t *testing.T, s string) {
		l := &Log{}
		if err := l.ReadStream(strings.NewReader(s), "stdin"); err != nil {
			if e := fault.As(err); e.Exit != fault.Data || !strings.HasPrefix(e.Where, "stdin:") {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		for _, o := range []Options{{Plan: b}, {Plan: b, Wildcards: 2}} {
			lesson, err := Learn(l, o)
			if err != nil {
				t.Fatal(err)
			}
			load(t, patched(t, text, lesson.Allow))
		}
		if _, err := Replay(l, b); err != nil {
			t.Fatal(err)
		}
		if _, err := NeverUsed(l, b); err != nil {
			t.Fatal(err)
		}
	})
}
