package manifest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

const pemFile = "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"

// files is the folder beside the manifest.
func files(path string) ([]byte, error) {
	switch path {
	case "dev-ca.pem", "~/other.pem":
		return []byte(pemFile), nil
	case "key.pem":
		return []byte(pemFile + "-----BEGIN PRIVATE KEY-----\n"), nil
	case "addon.py":
		return []byte("def request(flow): pass\n"), nil
	case "junk.pem":
		return []byte("junk"), nil
	}
	return nil, ReadFailed(path, true, fs.ErrNotExist)
}

func load(t testing.TB, text string) *Manifest {
	t.Helper()
	m, err := Load([]byte(text), "bottle.json", files)
	if err != nil {
		var all Problems
		errors.As(err, &all)
		for _, p := range all {
			t.Log(p, p.Hint)
		}
		t.Fatal(err)
	}
	return m
}

func planOf(t testing.TB, text, agent string) *plan.Bottle {
	t.Helper()
	b, err := load(t, text).Plan(agent)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// with wraps the inside of one bottle and an agent around it.
func with(bottle string) string {
	return `{"format_version":"1.0","bottles":{"dev":{` + bottle + `}},"agents":{"a":{"bottle":"dev","command":["true"]}}}`
}

func TestFullManifest(t *testing.T) {
	text, err := os.ReadFile("testdata/full.json")
	if err != nil {
		t.Fatal(err)
	}
	m := load(t, string(text))
	if got := strings.Join(m.Agents(), " "); got != "claude reviewer" {
		t.Errorf("agents: %s", got)
	}
	b, err := m.Plan("claude")
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile("testdata/full.plan.json", append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/full.plan.json")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.TrimSpace(string(want)), string(got)); d != "" {
		t.Errorf("plan differs (UPDATE=1 rewrites it):\n%s", d)
	}
}

func TestDefaults(t *testing.T) {
	b := planOf(t, with(``), "a")
	if b.ID != "a" || b.Agent != "a" || b.User != "agent" || b.Home != "discard" || b.Image.Kind != "host" ||
		b.Workspace != (plan.Workspace{Path: ".", Mode: "rw"}) || b.Egress.Proxy != "auto" || b.Resources != (plan.Resources{}) {
		t.Errorf("defaults: %+v", b)
	}
	if !slices.Contains(b.Hide, ".env") || !slices.IsSorted(b.Hide) {
		t.Errorf("hide: %v", b.Hide)
	}
	var engines []string
	for _, c := range b.Runtime.Candidates {
		engines = append(engines, c.Engine)
	}
	if strings.Join(engines, " ") != "smolvm gvisor" {
		t.Errorf("candidates: %v", engines)
	}
	raw, err := plan.Encode(b)
	if err != nil || strings.Contains(string(raw), "null") {
		t.Errorf("%v; something is null: %s", err, raw)
	}
	env := envOf(b)
	for name, want := range map[string]string{
		"HOME": "/home/agent", "HTTPS_PROXY": "http://127.0.0.1:3128", "https_proxy": "http://127.0.0.1:3128",
		"NODE_EXTRA_CA_CERTS": "/opt/bottle/ca.pem", "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt", "NODE_USE_ENV_PROXY": "1",
	} {
		if env[name] != want {
			t.Errorf("%s=%q, want %q", name, env[name], want)
		}
	}
}

func envOf(b *plan.Bottle) map[string]string {
	env := map[string]string{}
	for _, v := range b.Env {
		env[v.Name] = v.Value
	}
	return env
}

func TestEnvPrecedence(t *testing.T) {
	text := `{"format_version":"1.0","bottles":{"dev":{
		"user":"root",
		"env":{"LANG":"en_GB.UTF-8","A":"bottle","DISABLE_AUTOUPDATER":"0","PATH":"/x"},
		"egress":{"presets":["anthropic"],"allow":["api.example.com"]},
		"secrets":{
			"ANTHROPIC_API_KEY":{"from":"env:K","inject":[{"host":"api.anthropic.com","header":"X-Api-Key"}]},
			"OTHER":{"from":"env:O","inject":[{"host":"api.example.com","header":"Authorization","format":"Bearer {}"}]}}
	}},"agents":{"a":{"bottle":"dev","command":["true"],"env":{"A":"agent","B":""}}}}`
	b := planOf(t, text, "a")
	env := envOf(b)
	for name, want := range map[string]string{
		"LANG": "en_GB.UTF-8", "A": "agent", "B": "", "DISABLE_AUTOUPDATER": "0", "PATH": "/x", "HOME": "/root", "IS_SANDBOX": "1",
		"ANTHROPIC_API_KEY": "sk-ant-placeholder", "OTHER": "bottle-placeholder",
	} {
		if got, ok := env[name]; !ok || got != want {
			t.Errorf("%s=%q, want %q", name, got, want)
		}
	}
	if !slices.IsSortedFunc(b.Env, func(x, y plan.EnvVar) int { return strings.Compare(x.Name, y.Name) }) {
		t.Error("env is not sorted")
	}
	for _, r := range b.Egress.Rules {
		if !r.Inspect {
			t.Errorf("%s carries a secret and is not inspected", r.Host)
		}
	}
	if h := b.Secrets[0].Inject[0].Header; h != "x-api-key" {
		t.Errorf("header %q", h)
	}
	if _, ok := envOf(planOf(t, strings.Replace(text, `"user":"root",`, "", 1), "a"))["IS_SANDBOX"]; ok {
		t.Error("IS_SANDBOX is set for a plain user")
	}
}

func TestRules(t *testing.T) {
	b := planOf(t, with(`"egress":{
		"presets":["anthropic"],
		"allow":[
			"API.example.com.",
			{"host":"*.example.org","ports":[8443,443],"why":"artefacts"},
			{"host":"git.example.net","protocol":"ssh"},
			{"host":"plain.example","protocol":"http"},
			{"host":"api.anthropic.com","addresses":["127.0.0.1"]},
			{"cidr":"100.64.0.7/32","ports":[22],"protocol":"tcp"},
			"10.0.0.5", "api.example.com"
		],
		"deny":["telemetry.example.org",{"host":"*.com","ports":[8443]},{"cidr":"10.0.0.0/8"}],
		"inspect":["api.example.com"]}`), "a")
	var got []string
	for _, r := range b.Egress.Rules {
		from, _, _ := strings.Cut(r.From, " ")
		if from != "preset" {
			from = "manifest"
		}
		got = append(got, fmt.Sprint(r.Verdict, r.Host, r.CIDR, r.Ports, r.Protocol, r.Class, r.Addresses, r.Inspect, from))
	}
	want := []string{
		"allowapi.example.com[443]tlsexact[]truemanifest",
		"allow*.example.org[443 8443]tlswildcard[]falsemanifest",
		"allowgit.example.net[22]sshexact[]falsemanifest",
		"allowplain.example[80]httpexact[]falsemanifest",
		"allowapi.anthropic.com[443]tlsexact[127.0.0.1]falsemanifest",
		"allow100.64.0.7/32[22]tcpcgnat[]falsemanifest",
		"allow10.0.0.5/32[443]tlsprivate[]falsemanifest",
		"denytelemetry.example.org[]anyexact[]falsemanifest",
		"deny*.com[8443]anywildcard[]falsemanifest",
		"deny10.0.0.0/8[]anyprivate[]falsemanifest",
	}
	if d := cmp.Diff(want, squeeze(got)); d != "" {
		t.Error(d)
	}
	if from := b.Egress.Rules[1].From; from != "bottle.json:5:4 bottles.dev.egress.allow[1]" {
		t.Errorf("provenance: %s", from)
	}
}

// squeeze removes the spaces that fmt.Sprint puts between some operands.
func squeeze(in []string) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = strings.NewReplacer("] [", "][", "] true", "]true", "] false", "]false").Replace(s)
	}
	return out
}

func TestCommentsAndPositions(t *testing.T) {
	text := "// a comment with \"quotes\" and { brackets\n{\n  /* block\n   comment */ \"format_version\": \"1.0\",\n" +
		"  \"bottles\": {\"dev\": {\"user\": \"admin\",},},\n  \"agents\": {\"a\": {\"bottle\": \"dev\", \"command\": [\"x\",]}},\n} // the end"
	_, err := Load([]byte(text), "m.json", files)
	f := fault.As(err)
	if f == nil || !strings.HasPrefix(f.Error(), "m.json:5:31: bottles.dev.user: ") {
		t.Errorf("%v, want a problem at 5:30", err)
	}
	load(t, strings.Replace(text, "admin", "agent", 1))
}

func TestSameBytesSamePlan(t *testing.T) {
	text, err := os.ReadFile("testdata/full.json")
	if err != nil {
		t.Fatal(err)
	}
	var first string
	for range 20 {
		b := planOf(t, string(text), "claude")
		d, err := plan.Digest(b)
		if err != nil {
			t.Fatal(err)
		}
		if first == "" {
			first = d
		}
		if d != first {
			t.Fatalf("digest %s, before %s", d, first)
		}
	}
}

// A problem in every field: what is said, where, with which status.
func TestProblems(t *testing.T) {
	for _, tt := range problems(t) {
		t.Run(tt.Name, func(t *testing.T) {
			_, err := Load([]byte(tt.text()), "bottle.json", files)
			var all Problems
			if !errors.As(err, &all) {
				t.Fatalf("err = %v, want problems", err)
			}
			exit := tt.Exit
			if exit == 0 {
				exit = fault.Data
			}
			for _, p := range all {
				if p.Code != tt.Code {
					continue
				}
				if p.Exit != exit || !strings.Contains(p.Error(), tt.Where) || !strings.Contains(p.Error()+" "+p.Hint, tt.Says) {
					t.Errorf("%d %s (%s), want %d at %s saying %q", p.Exit, p, p.Hint, exit, tt.Where, tt.Says)
				}
				if !strings.HasPrefix(p.Where, "bottle.json") {
					t.Errorf("where is %q", p.Where)
				}
				if len(all) > 1 && !tt.Several {
					t.Errorf("one mistake, %d problems: %v", len(all), errors.Join(all.Unwrap()...))
				}
				return
			}
			t.Errorf("no %s among: %v", tt.Code, errors.Join(all.Unwrap()...))
		})
	}
}

// mistake is one entry of testdata/problems.json. It has a whole manifest, or
// the inside of a bottle, an egress, or a secret.
type mistake struct {
	Name, Manifest, Bottle, Egress, Secret string
	Code, Where, Says                      string
	Exit                                   int
	Several                                bool
	SchemaPasses                           bool // what a schema cannot say
}

func (p mistake) text() string {
	switch {
	case p.Bottle != "":
		return with(p.Bottle)
	case p.Egress != "":
		return with(`"egress":{` + p.Egress + `}`)
	case p.Secret != "":
		return with(`"egress":{"allow":["api.example.com","*.example.org",{"host":"p.example","protocol":"http"}]},"secrets":{` + p.Secret + `}`)
	}
	// JSON cannot hold the byte.
	return strings.ReplaceAll(p.Manifest, "@BAD@", "{\"\xff\":1}")
}

func problems(t *testing.T) []mistake {
	t.Helper()
	raw, err := os.ReadFile("testdata/problems.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []mistake
	if err := json.Unmarshal(raw, &all); err != nil {
		t.Fatal(err)
	}
	if len(all) < 100 {
		t.Fatalf("only %d problems", len(all))
	}
	return all
}

func TestHostileSizes(t *testing.T) {
	for name, tt := range map[string]struct {
		text string
		code string
	}{
		"100 MB":            {strings.Repeat(" ", 100<<20), "too_large"},
		"100,000 deep":      {strings.Repeat("[", 100_000), "too_deep"},
		"100,000 objects":   {strings.Repeat(`{"a":`, 100_000), "too_deep"},
		"millions of zeros": {`{"format_version":"1.0","x":[` + strings.Repeat("0,", 3_000_000) + `0]}`, "too_large"},
		"open string":       {`{"format_version": "` + strings.Repeat("[", 1000), "bad_syntax"},
		"deep in a comment": {"/*" + strings.Repeat("[", 1000) + "*/ 1 // " + strings.Repeat("[", 1000), "wrong_type"},
		"open comment":      {"/*" + strings.Repeat("[", 1000), "bad_syntax"},
		"many problems":     {`{"format_version":"1.0",` + strings.Repeat(`"x":1,`, 1000) + `}`, "duplicate_member"},
	} {
		_, err := Load([]byte(tt.text), "bottle.json", files)
		f := fault.As(err)
		if f == nil || f.Exit != fault.Data || f.Code != tt.code {
			t.Errorf("%s: %.200v, want 65 %s", name, err, tt.code)
		}
		var all Problems
		if errors.As(err, &all) && len(all) > maxProblems+1 {
			t.Errorf("%s: %d problems", name, len(all))
		}
	}
}

func TestManyHosts(t *testing.T) {
	hosts := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "%q,", fmt.Sprintf("h%d.example.com", i))
		}
		return b.String()
	}
	if _, err := Load([]byte(with(`"egress":{"proxy":"pipelock","allow":[`+hosts(2001)+`]}`)), "m", files); err == nil || fault.As(err).Code != "too_many_hosts" {
		t.Errorf("2001 hosts for pipelock: %v", err)
	}
	load(t, with(`"egress":{"proxy":"pipelock","allow":[`+hosts(2000)+`]}`))
	load(t, with(`"egress":{"proxy":"builtin","allow":[`+hosts(2001)+`]}`))
}

func TestCleanPath(t *testing.T) {
	for in, want := range map[string]string{
		".": ".", "./": ".", "a/": "a", "./a//b/../c": "a/c", "../a": "../a", "/": "/", "//x/": "/x",
		"~": "~", "~/": "~", "~/.": "~", "~/a/": "~/a", "~/../x": "~/../x", "~/./.ssh": "~/.ssh", "./~x": "./~x", "./~": "./~",
	} {
		if got := cleanPath(in); got != want {
			t.Errorf("cleanPath(%q) = %q, want %q", in, got, want)
		}
		if got := cleanPath(cleanPath(in)); got != want {
			t.Errorf("cleanPath(%q) is not stable: %q", in, got)
		}
	}
}

func TestUnknownAgent(t *testing.T) {
	_, err := load(t, with("")).Plan("b")
	if f := fault.As(err); f == nil || f.Exit != fault.Usage || !strings.Contains(f.Hint, "a") {
		t.Errorf("%v", err)
	}
}

// A secret's value that someone writes into the manifest is in no message.
func TestSecretsAreNotRepeated(t *testing.T) {
	key := "sk-ant-api03-" + strings.Repeat("A1b2", 10)
	for _, text := range []string{
		with(`"env":{"K":"` + key + `"}`),
		with(`"secrets":{"K":{"from":"` + key + `","inject":[]}}`),
		with(`"secrets":{"K":{"from":"env:` + key + `","inject":[]}}`),
		with(`"egress":{"allow":["h.example"]},"secrets":{"K":{"from":"env:K","inject":[{"host":"h.example","header":"a","format":"Bearer ` + key + `"}]}}`),
	} {
		_, err := Load([]byte(text), "m", files)
		var all Problems
		if !errors.As(err, &all) {
			t.Fatalf("%v", err)
		}
		for _, p := range all {
			if strings.Contains(p.Error()+p.Hint, key) {
				t.Errorf("the message repeats the key: %s", p)
			}
		}
	}
}

func TestKeyForms(t *testing.T) {
	x := strings.Repeat("A1b2C3d4", 10)
	up := strings.ToUpper(x)
	for _, key := range []string{
		"sk-ant-api03-" + x, "sk-" + x, "sk-proj-" + x, "ghp_" + x[:36], "github_pat_" + x, "glpat-" + x[:20],
		"AKIA" + up[:16], "ASIA" + up[:16], "AIza" + x[:35], "xoxb-" + x, "sk_live_" + x, "rk_live_" + x,
		"npm_" + x[:36], "pypi-AgE" + x, "hf_" + x, "-----BEGIN OPENSSH PRIVATE KEY-----", "eyJ" + x + ".eyJ" + x + "." + x,
		"Authorization: Bearer sk-ant-api03-" + x,
	} {
		_, err := Load([]byte(with(fmt.Sprintf(`"env":{"K":%q}`, key))), "m", files)
		if f := fault.As(err); f == nil || f.Code != "secret_value" {
			t.Errorf("%q: %v", key, err)
		}
	}
	for _, fine := range []string{
		"sk-ant-placeholder", "sk-placeholder", "bottle-placeholder", "task-" + x, "AKIAEXAMPLE", "https://example.com/" + x,
		"fix the tests in lib/risk-assessment-and-more-words-that-go-on-and-on", "-----BEGIN CERTIFICATE-----",
	} {
		load(t, with(fmt.Sprintf(`"env":{"K":%q}`, fine)))
	}
}

func FuzzLoad(f *testing.F) {
	for _, name := range []string{"testdata/full.json"} {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	more, _ := filepath.Glob("../../examples/*/bottle.json")
	for _, name := range more {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Load(b, "bottle.json", files)
		if err != nil {
			if e := fault.As(err); e.Exit != fault.Data && e.Exit != fault.NoInput {
				t.Fatalf("%v is not a fault of the input", err)
			}
			return
		}
		for _, a := range m.Agents() {
			p, err := m.Plan(a)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := plan.Digest(p); err != nil {
				t.Fatal(err)
			}
			// What is planned is what the gate takes.
			if _, err := policy.Compile(p.Egress.Rules); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func BenchmarkLoadTypical(b *testing.B) {
	text, err := os.ReadFile("testdata/full.json")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		planOf(b, string(text), "claude")
	}
}

func BenchmarkLoad100k(b *testing.B) {
	var plainHosts, objects strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&plainHosts, "%q,", fmt.Sprintf("h%d.example%d.com", i, i%1000))
		fmt.Fprintf(&objects, "{\"host\":%q,\"ports\":[443,8443],\"why\":\"x\"},\n", fmt.Sprintf("h%d.example%d.com", i, i%1000))
	}
	for name, hosts := range map[string]string{"one line": plainHosts.String(), "objects": objects.String()} {
		text := with(`"egress":{"allow":[` + hosts + `]}`)
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				p := planOf(b, text, "a")
				if _, err := plan.Encode(p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
