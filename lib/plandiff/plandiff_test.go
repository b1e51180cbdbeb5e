package plandiff

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

func whole() *plan.Bottle {
	return &plan.Bottle{
		ID: "dev", Agent: "dev",
		Manifest: plan.ManifestRef{Name: "bottle.json", SHA256: plan.SHA256([]byte("m"))},
		Runtime:  plan.Runtime{Requested: "auto", Candidates: []plan.Candidate{{Engine: "smolvm", Why: "a"}, {Engine: "gvisor", Why: "b"}}},
		Image:    plan.Image{Kind: "reference", Source: "registry.example/tools:1"},
		User:     "agent", Home: "discard",
		Workspace: plan.Workspace{Path: "src", Mode: "scratch"},
		Mounts:    []plan.Mount{{Source: "~/data", Target: "/data", Mode: "ro"}, {Source: "empty", Target: "/data/keys", Mode: "ro"}},
		Hide:      []string{"*.pem", ".env"},
		Env:       []plan.EnvVar{{Name: "A", Value: "1"}},
		Files:     []plan.File{{Path: ".rc", Content: "x"}},
		Resources: plan.Resources{CPUs: 2, MemoryMiB: 100, Pids: 10, Enforcement: "watched"},
		Egress: plan.Policy{Proxy: "auto",
			Rules: []plan.Rule{{Host: "a.test", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: "exact", Addresses: []string{"10.0.0.1"}, Inspect: true,
				Requests: []string{"GET /a"}, RequestsFrom: "here", DLPAllow: []string{"jwt"}, DLPAllowFrom: "there", Why: "w", From: "f"}},
			Roots:    []plan.Root{{Path: "ca.pem", SHA256: plan.SHA256([]byte("ca"))}},
			Mitmdump: &plan.Mitmdump{Addons: []plan.Addon{{Path: "a.py", SHA256: plan.SHA256([]byte("a"))}}}},
		Secrets: []plan.Secret{{Name: "K", From: "command", Command: []string{"pass"}, GuestCanRead: "never",
			Inject: []plan.Injection{{Host: "a.test", Header: "authorization", Format: "Bearer {}"}}}},
		Command: []string{"sh"},
	}
}

func compare(t *testing.T, a, b *plan.Bottle) []Clause {
	t.Helper()
	out, err := Compare(a, b)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range out {
		if !slices.Contains([]string{policy.Narrows, policy.Same, policy.Widens}, c.Verdict) || !strings.HasPrefix(c.Path, "bottle.") {
			t.Errorf("%+v", c)
		}
		if _, err := plan.Encode(c); err != nil {
			t.Error(err)
		}
	}
	return out
}

// leaves calls fn for every value inside v that is no struct, pointer or list.
func leaves(v reflect.Value, at string, fn func(string, reflect.Value)) {
	switch v.Kind() {
	case reflect.Pointer:
		leaves(v.Elem(), at, fn)
	case reflect.Struct:
		for i := range v.NumField() {
			leaves(v.Field(i), at+"."+v.Type().Field(i).Name, fn)
		}
	case reflect.Slice:
		for i := range v.Len() {
			leaves(v.Index(i), fmt.Sprintf("%s[%d]", at, i), fn)
		}
		if v.Len() == 0 {
			panic(at + " is empty: nothing in it is tested")
		}
	default:
		fn(at, v)
	}
}

// TestNothingIsOverlooked: whatever member of a plan is changed, there is a
// clause about it. A member that is new in lib/plan is in this test by itself.
func TestNothingIsOverlooked(t *testing.T) {
	n := 0
	leaves(reflect.ValueOf(whole()).Elem(), "bottle", func(at string, _ reflect.Value) {
		n++
		b := whole()
		leaves(reflect.ValueOf(b).Elem(), "bottle", func(here string, v reflect.Value) {
			if here != at {
				return
			}
			switch v.Kind() {
			case reflect.String:
				v.SetString(v.String() + "x")
			case reflect.Int:
				v.SetInt(v.Int() + 1)
			case reflect.Bool:
				v.SetBool(!v.Bool())
			default:
				t.Fatalf("%s: %s", here, v.Kind())
			}
		})
		if strings.Contains(at, "Egress.Rules") { // a rule that is no rule is an error
			out, err := Compare(whole(), b)
			if err == nil && len(out) == 0 && !strings.HasSuffix(at, "From") { // which line it stands in says nothing
				t.Errorf("%s was changed, and nothing is said of it", at)
			}
			return
		}
		if out := compare(t, whole(), b); len(out) == 0 {
			t.Errorf("%s was changed, and nothing is said of it", at)
		}
	})
	if n < 45 {
		t.Errorf("%d members were changed", n)
	}
	if out := compare(t, whole(), whole()); len(out) != 0 || Verdict(out) != policy.Same {
		t.Errorf("a plan differs from itself: %+v", out)
	}
}

// TestUnknownWidens: what the comparison does not know is not taken for
// narrower.
func TestUnknownWidens(t *testing.T) {
	type later struct {
		Path  string `json:"path"`
		Trust bool   `json:"trust"`
	}
	d := &diff{}
	d.unknown("workspace", later{"a", false}, later{"b", false}, "Path")
	if len(d.clauses) != 0 {
		t.Errorf("%+v", d.clauses)
	}
	d.unknown("workspace", later{"a", false}, later{"b", true}, "Path")
	if len(d.clauses) != 1 || d.clauses[0].Verdict != policy.Widens || d.clauses[0].Path != "bottle.workspace.trust" {
		t.Errorf("%+v", d.clauses)
	}
}

func TestClauses(t *testing.T) {
	for _, tt := range []struct {
		name    string
		change  func(a, b *plan.Bottle)
		verdict string
		path    string // of the only clause; "" for none
	}{
		{"another name", func(_, b *plan.Bottle) { b.ID = "x" }, policy.Same, "id"},
		{"another name, and the home is kept", func(a, b *plan.Bottle) { a.Home, b.Home, b.Agent = "keep", "keep", "x" }, policy.Widens, "agent"},
		{"the manifest's bytes", func(_, b *plan.Bottle) { b.Manifest.SHA256 = plan.SHA256(nil) }, policy.Same, "manifest"},
		{"the preferred engine alone", func(_, b *plan.Bottle) { b.Runtime.Candidates = b.Runtime.Candidates[:1] }, policy.Narrows, "runtime"},
		{"the second engine alone", func(_, b *plan.Bottle) { b.Runtime.Candidates = b.Runtime.Candidates[1:] }, policy.Widens, "runtime"},
		{"a reason", func(_, b *plan.Bottle) { b.Runtime.Candidates[0].Why = "c" }, policy.Same, "runtime"},
		{"a digest for a tag", func(_, b *plan.Bottle) { b.Image.Source += "@sha256:" + strings.Repeat("0", 64) }, policy.Narrows, "image"},
		{"another tag", func(_, b *plan.Bottle) { b.Image.Source = "registry.example/tools:2" }, policy.Widens, "image"},
		{"a tag for a digest", func(a, _ *plan.Bottle) { a.Image.Source += "@sha256:" + strings.Repeat("0", 64) }, policy.Widens, "image"},
		{"the host's files", func(_, b *plan.Bottle) { b.Image = plan.Image{Kind: "host"} }, policy.Widens, "image"},
		{"root", func(_, b *plan.Bottle) { b.User = "root" }, policy.Widens, "user"},
		{"no root", func(a, _ *plan.Bottle) { a.User = "root" }, policy.Narrows, "user"},
		{"keep", func(_, b *plan.Bottle) { b.Home = "keep" }, policy.Widens, "home"},
		{"discard", func(a, _ *plan.Bottle) { a.Home = "keep" }, policy.Narrows, "home"},
		{"read-write", func(_, b *plan.Bottle) { b.Workspace.Mode = "rw" }, policy.Widens, "workspace.mode"},
		{"read-only", func(_, b *plan.Bottle) { b.Workspace.Mode = "ro" }, policy.Narrows, "workspace.mode"},
		{"a mode of later", func(_, b *plan.Bottle) { b.Workspace.Mode = "odd" }, policy.Widens, "workspace.mode"},
		{"a folder below", func(_, b *plan.Bottle) { b.Workspace.Path = "src/lib" }, policy.Narrows, "workspace.path"},
		{"the folder above", func(_, b *plan.Bottle) { b.Workspace.Path = "." }, policy.Widens, "workspace.path"},
		{"a folder beside", func(_, b *plan.Bottle) { b.Workspace.Path = "src2" }, policy.Widens, "workspace.path"},
		{"a folder out of it", func(a, b *plan.Bottle) { a.Workspace.Path, b.Workspace.Path = ".", "../x" }, policy.Widens, "workspace.path"},
		{"a folder of the home for the whole root", func(a, b *plan.Bottle) { a.Mounts[0].Source = "/" }, policy.Widens, `mounts["/data"].source`},
		{"an absolute folder for the manifest's", func(a, b *plan.Bottle) { a.Workspace.Path, b.Workspace.Path = ".", "/src" }, policy.Widens, "workspace.path"},
		{"written otherwise", func(_, b *plan.Bottle) { b.Workspace.Path = "./src/" }, policy.Same, "workspace.path"},
		{"a mount more", func(_, b *plan.Bottle) {
			b.Mounts = append(b.Mounts, plan.Mount{Source: "x", Target: "/x", Mode: "ro"})
		}, policy.Widens, `mounts["/x"]`},
		{"a mount that covered less", func(_, b *plan.Bottle) { b.Mounts = b.Mounts[:1] }, policy.Widens, `mounts["/data/keys"]`},
		{"a mount less", func(a, b *plan.Bottle) { a.Mounts, b.Mounts = a.Mounts[:1], nil }, policy.Narrows, `mounts["/data"]`},
		{"what covered a part of a kept home is gone", func(a, b *plan.Bottle) {
			a.Home, b.Home = "keep", "keep"
			a.Mounts, b.Mounts = []plan.Mount{{Source: "empty", Target: "/home/agent/.config", Mode: "ro"}}, nil
		}, policy.Widens, `mounts["/home/agent/.config"]`},
		{"what covered a part of a home that is not kept is gone", func(a, b *plan.Bottle) {
			a.Mounts, b.Mounts = []plan.Mount{{Source: "empty", Target: "/home/agent/.config", Mode: "ro"}}, nil
		}, policy.Narrows, `mounts["/home/agent/.config"]`},
		{"a host more that the addons read", func(a, b *plan.Bottle) {
			a.Secrets, b.Secrets = nil, nil
			for _, p := range []*plan.Bottle{a, b} {
				p.Egress.Rules[0].Requests, p.Egress.Rules[0].RequestsFrom = nil, ""
				p.Egress.Rules[0].Inspect = p == b
			}
		}, policy.Widens, "egress.rules"},
		{"what covered a part of a kept home is gone, as root", func(a, b *plan.Bottle) {
			a.Home, b.Home, a.User, b.User = "keep", "keep", "root", "root"
			a.Mounts, b.Mounts = []plan.Mount{{Source: "empty", Target: "/home/agent/.config", Mode: "ro"}}, nil
		}, policy.Widens, `mounts["/home/agent/.config"]`},
		{"mounts in another order", func(_, b *plan.Bottle) { slices.Reverse(b.Mounts) }, policy.Widens, "mounts"},
		{"a mount below the other", func(_, b *plan.Bottle) { b.Mounts[0].Source = "~/data/public" }, policy.Narrows, `mounts["/data"].source`},
		{"a read-write mount", func(_, b *plan.Bottle) { b.Mounts[0].Mode = "rw" }, policy.Widens, `mounts["/data"].mode`},
		{"a read-only mount", func(a, _ *plan.Bottle) { a.Mounts[0].Mode = "rw" }, policy.Narrows, `mounts["/data"].mode`},
		{"hide more", func(_, b *plan.Bottle) { b.Hide = append(b.Hide, "*.key") }, policy.Narrows, `hide["*.key"]`},
		{"hide less", func(_, b *plan.Bottle) { b.Hide = b.Hide[:1] }, policy.Widens, `hide[".env"]`},
		{"hide the same by another pattern", func(a, b *plan.Bottle) { a.Hide, b.Hide = []string{"a.pem", "*.pem"}, []string{"*.pem"} }, policy.Same, `hide["a.pem"]`},
		{"a variable", func(_, b *plan.Bottle) { b.Env[0].Value = "2" }, policy.Widens, `env["A"]`},
		{"a variable more", func(_, b *plan.Bottle) { b.Env = append(b.Env, plan.EnvVar{Name: "B"}) }, policy.Widens, `env["B"]`},
		{"a variable less", func(_, b *plan.Bottle) { b.Env = nil }, policy.Narrows, `env["A"]`},
		{"a file", func(_, b *plan.Bottle) { b.Files[0].Content = "y" }, policy.Widens, `files[".rc"]`},
		{"a file less", func(_, b *plan.Bottle) { b.Files = nil }, policy.Narrows, `files[".rc"]`},
		{"a lower limit", func(_, b *plan.Bottle) { b.Resources.CPUs = 1 }, policy.Narrows, "resources.cpus"},
		{"a higher limit", func(_, b *plan.Bottle) { b.Resources.MemoryMiB = 101 }, policy.Widens, "resources.memory_mib"},
		{"no limit", func(_, b *plan.Bottle) { b.Resources.Pids = 0 }, policy.Widens, "resources.pids"},
		{"a limit", func(a, _ *plan.Bottle) { a.Resources.Pids = 0 }, policy.Narrows, "resources.pids"},
		{"held by the kernel", func(_, b *plan.Bottle) { b.Resources.Enforcement = "" }, policy.Narrows, "resources.enforcement"},
		{"watched", func(a, _ *plan.Bottle) { a.Resources.Enforcement = "" }, policy.Widens, "resources.enforcement"},
		{"pipelock for auto", func(_, b *plan.Bottle) { b.Egress.Proxy = "pipelock" }, policy.Narrows, "egress.proxy"},
		{"builtin for auto", func(_, b *plan.Bottle) { b.Egress.Proxy = "builtin" }, policy.Widens, "egress.proxy"},
		{"auto for pipelock", func(a, _ *plan.Bottle) { a.Egress.Proxy = "pipelock" }, policy.Widens, "egress.proxy"},
		{"a root less", func(_, b *plan.Bottle) { b.Egress.Roots = nil }, policy.Narrows, "egress.roots"},
		{"a root more", func(a, _ *plan.Bottle) { a.Egress.Roots = nil }, policy.Widens, "egress.roots"},
		{"a root under another name", func(_, b *plan.Bottle) { b.Egress.Roots[0].Path = "b.pem" }, policy.Same, "egress.roots"},
		{"an addon less", func(_, b *plan.Bottle) { b.Egress.Mitmdump = nil }, policy.Widens, "egress.mitmdump"},
		{"an addon more", func(a, _ *plan.Bottle) { a.Egress.Mitmdump = nil }, policy.Widens, "egress.mitmdump"},
		{"another addon", func(_, b *plan.Bottle) { b.Egress.Mitmdump.Addons[0].SHA256 = plan.SHA256(nil) }, policy.Widens, "egress.mitmdump"},
		{"an addon under another name", func(_, b *plan.Bottle) { b.Egress.Mitmdump.Addons[0].Path = "b.py" }, policy.Same, "egress.mitmdump"},
		{"requests more", func(_, b *plan.Bottle) { b.Egress.Rules[0].Requests = []string{"GET /*"} }, policy.Widens, "egress.rules"},
		{"more of what looks like a key", func(_, b *plan.Bottle) { b.Egress.Rules[0].DLPAllow = []string{"github-pat", "jwt"} }, policy.Widens, "egress.rules"},
		{"bodies that nobody looks through", func(_, b *plan.Bottle) { b.Egress.Rules[0].DLPAllow = []string{"*"} }, policy.Widens, "egress.rules"},
		{"less of what looks like a key", func(_, b *plan.Bottle) { b.Egress.Rules[0].DLPAllow, b.Egress.Rules[0].DLPAllowFrom = nil, "" }, policy.Narrows, "egress.rules"},
		{"the word about a rule", func(_, b *plan.Bottle) { b.Egress.Rules[0].Why = "elsewhere" }, policy.Same, "egress.rules"},
		{"another home than the user's", func(a, b *plan.Bottle) { a.Env[0].Name, b.Env[0] = "HOME", plan.EnvVar{Name: "HOME", Value: "/root"} }, policy.Widens, `env["HOME"]`},
		{"a secret less", func(a, b *plan.Bottle) {
			a.Secrets = append(a.Secrets, plan.Secret{Name: "L", From: "env:L"})
		}, policy.Narrows, `secrets["L"]`},
		{"a secret more", func(a, b *plan.Bottle) {
			b.Secrets = append(b.Secrets, plan.Secret{Name: "L", From: "env:L"})
		}, policy.Widens, `secrets["L"]`},
		{"a secret from elsewhere", func(_, b *plan.Bottle) { b.Secrets[0].Command = []string{"sh"} }, policy.Widens, `secrets["K"].command`},
		{"a secret to another header too", func(_, b *plan.Bottle) {
			b.Secrets[0].Inject = append(b.Secrets[0].Inject, plan.Injection{Host: "a.test", Header: "x"})
		}, policy.Widens, `secrets["K"].inject["a.test x"]`},
		{"a secret to one header less", func(a, _ *plan.Bottle) {
			a.Secrets[0].Inject = append(a.Secrets[0].Inject, plan.Injection{Host: "a.test", Header: "x"})
		}, policy.Narrows, `secrets["K"].inject["a.test x"]`},
		{"another form of a secret", func(_, b *plan.Bottle) { b.Secrets[0].Inject[0].Format = "" }, policy.Widens, `secrets["K"].inject["a.test authorization"].format`},
		{"another command", func(_, b *plan.Bottle) { b.Command = []string{"sh", "-c", "x"} }, policy.Widens, "command"},
	} {
		a, b := whole(), whole()
		tt.change(a, b)
		out := compare(t, a, b)
		if len(out) != 1 || out[0].Verdict != tt.verdict || !strings.HasPrefix(out[0].Path, "bottle."+tt.path) {
			t.Errorf("%s: %+v, want one clause %s %s", tt.name, out, tt.path, tt.verdict)
		}
	}
}

// What stands twice in a hand-made document is seen twice.
func TestTwice(t *testing.T) {
	b := whole()
	b.Mounts = append(b.Mounts, plan.Mount{Source: "~", Target: "/data/keys", Mode: "rw"})
	if out := compare(t, whole(), b); Verdict(out) != policy.Widens || !slices.ContainsFunc(out, func(c Clause) bool { return c.Path == `bottle.mounts["/data/keys"]` }) {
		t.Errorf("%+v", out)
	}
}

// The home that comes with a user is no clause of its own: giving up root is not
// widened by it.
func TestUserAndHome(t *testing.T) {
	a, b := whole(), whole()
	a.User, a.Env[0] = "root", plan.EnvVar{Name: "HOME", Value: "/root"}
	b.Env[0] = plan.EnvVar{Name: "HOME", Value: "/home/agent"}
	if out := compare(t, a, b); len(out) != 2 || Verdict(out) != policy.Narrows {
		t.Errorf("%+v", out)
	}
}

func TestBadRules(t *testing.T) {
	b := whole()
	b.Egress.Rules[0].Class = "odd"
	if _, err := Compare(whole(), b); err == nil || !strings.Contains(err.Error(), "egress.rules[0]") {
		t.Error(err)
	}
}

func TestWholeBottles(t *testing.T) {
	if Verdict(Added(whole())) != policy.Widens || Verdict(Removed(whole())) != policy.Narrows {
		t.Error("a new bottle widens, and one that is gone narrows")
	}
}
