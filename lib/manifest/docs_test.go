package manifest

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/policy"
)

// Every manifest on the page about manifests is good, for loader and schema.
func TestDocsManifests(t *testing.T) {
	page, err := os.ReadFile("../../docs/manifest.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?ms)^```json\n(.*?)^```$").FindAllSubmatch(page, -1)
	if len(blocks) < 4 {
		t.Fatalf("only %d manifests on the page", len(blocks))
	}
	s := compileSchema(t)
	for _, b := range blocks {
		m := load(t, string(b[1]))
		for _, a := range m.Agents() {
			if _, err := m.Plan(a); err != nil {
				t.Errorf("%v in\n%s", err, b[1])
			}
		}
		v, ok := instance(b[1])
		if !ok {
			t.Errorf("no JSON: %s", b[1])
			continue
		}
		if err := s.Validate(v); err != nil {
			t.Errorf("%v in\n%s", err, b[1])
		}
	}
}

// What the page lists is what the code has.
func TestDocsLists(t *testing.T) {
	raw, err := os.ReadFile("../../docs/manifest.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(raw)
	for _, h := range hidden {
		if !regexp.MustCompile(`(?m)^    (.* )?` + regexp.QuoteMeta(h) + `( .*)?$`).MatchString(page) {
			t.Errorf("the built-in list on the page lacks %s", h)
		}
	}
	for _, p := range policy.PresetNames() {
		if !strings.Contains(page, "| `"+p+"` |") {
			t.Errorf("the page lacks preset %s", p)
		}
	}
	for _, v := range base("agent") {
		if !strings.Contains(page, v.Name) && !strings.Contains(page, strings.ToUpper(v.Name)) {
			t.Errorf("the page lacks variable %s", v.Name)
		}
	}
}
