package sidecar

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/plan"
)

// TestDigest: what Start lays out has the digest that follows from the plan, and
// whatever is changed there has not, or is said.
func TestDigest(t *testing.T) {
	code := []byte("addons = []\n")
	addons := []plan.Addon{{Path: "./a/one.py", SHA256: plan.SHA256(code)}}
	const listen = "127.0.0.1:4711"
	o := Options{Dir: t.TempDir(), Addons: []Addon{{"one.py", code}}, Auth: NewAuth(), BackAuth: NewAuth(), Authority: []byte("k"), BackCA: []byte("c")}
	laid, err := lay(&o, netip.MustParseAddrPort(listen))
	if err != nil {
		t.Fatal(err)
	}
	planned, err := Planned(addons)
	if err != nil || planned != laid {
		t.Errorf("planned %s (%v), laid %s", planned, err, laid)
	}
	if is, err := Digest(o.Dir, addons, listen); err != nil || is != laid {
		t.Errorf("%s (%v), want %s", is, err, laid)
	}
	config := func(from, to string) func(string) string {
		return func(s string) string { return strings.Replace(s, from, to, 1) }
	}
	for name, c := range map[string]struct {
		file string
		edit func(string) string
	}{
		"an option":           {"config.yaml", config(`"ssl_insecure":false`, `"ssl_insecure":true`)},
		"an option more":      {"config.yaml", config("{", `{"ignore_hosts":["."],`)},
		"a script more":       {"config.yaml", config(`"scripts":[`, `"scripts":["/tmp/x.py",`)},
		"another port":        {"config.yaml", config("4711", "4712")},
		"another host":        {"config.yaml", config("127.0.0.1", "0.0.0.0")},
		"another authority":   {"config.yaml", config("back.pem", "other.pem")},
		"no configuration":    {"config.yaml", func(string) string { return "x" }},
		"another addon":       {"addon-0/one.py", func(s string) string { return s + "#" }},
		"a file beside of it": {"addon-0/colorsys.py", func(string) string { return "x" }},
	} {
		path := filepath.Join(o.Dir, "conf", c.file)
		before, missing := os.ReadFile(path)
		if err := os.WriteFile(path, []byte(c.edit(string(before))), 0o600); err != nil {
			t.Fatal(err)
		}
		if is, err := Digest(o.Dir, addons, listen); err == nil && is == laid {
			t.Errorf("%s is not seen", name)
		}
		if missing != nil {
			os.Remove(path)
		} else if err := os.WriteFile(path, before, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
