package manifest

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/tailscale/hujson"

	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

func compileSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("bottle.schema.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("bottle.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// instance reads a manifest for the schema; ok is false for what is no JSON.
func instance(text []byte) (v any, ok bool) {
	std, err := hujson.Standardize(append(bytes.Clone(text), '\n'))
	if err != nil {
		return nil, false
	}
	v, err = jsonschema.UnmarshalJSON(bytes.NewReader(std))
	return v, err == nil
}

// goodManifests are the examples, the starter, and the one with every field.
func goodManifests(t *testing.T) []string {
	t.Helper()
	names := []string{"testdata/full.json", "../../cmd/bottle-plan/cli/starter.json"}
	examples, err := filepath.Glob("../../examples/*/bottle.json")
	if err != nil || len(examples) < 4 {
		t.Fatalf("examples: %v, %v", examples, err)
	}
	return append(names, examples...)
}

func TestSchemaAcceptsGoodManifests(t *testing.T) {
	s := compileSchema(t)
	for _, name := range goodManifests(t) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		v, ok := instance(text)
		if !ok {
			t.Errorf("%s is no JSON", name)
			continue
		}
		if err := s.Validate(v); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		m := load(t, string(text))
		for _, a := range m.Agents() {
			b, err := m.Plan(a)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if _, err := policy.Compile(b.Egress.Rules); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// Schema and loader refuse the same manifests, but for what a schema cannot
// say; each such case is marked.
func TestSchemaRefusesWhatLoadRefuses(t *testing.T) {
	s := compileSchema(t)
	refused := 0
	for _, tt := range problems(t) {
		v, ok := instance([]byte(tt.text()))
		if !ok {
			continue
		}
		err := s.Validate(v)
		if err == nil && !tt.SchemaPasses {
			t.Errorf("%s: the schema passes %s", tt.Name, tt.text())
		}
		if err != nil && tt.SchemaPasses {
			t.Errorf("%s: marked as beyond a schema, but it refuses: %v", tt.Name, err)
		}
		if err != nil {
			refused++
		}
	}
	if refused < 80 {
		t.Errorf("only %d refusals were compared", refused)
	}
}

// What the schema repeats from the code is the same there.
func TestSchemaLists(t *testing.T) {
	var s struct {
		Defs struct {
			Name struct {
				Not struct{ Enum []string }
			}
			Bottle struct {
				Properties map[string]json.RawMessage
			}
			Env struct {
				PropertyNames struct {
					Not struct{ Enum []string }
				}
			}
			Egress struct {
				Properties struct {
					Presets struct {
						Items struct{ Enum []string }
					}
				}
			}
		} `json:"$defs"`
	}
	if err := json.Unmarshal(Schema, &s); err != nil {
		t.Fatal(err)
	}
	for name, pair := range map[string][2][]string{
		"verbs":   {plan.Verbs, s.Defs.Name.Not.Enum},
		"presets": {policy.PresetNames(), s.Defs.Egress.Properties.Presets.Items.Enum},
		"fixed":   {fixed, s.Defs.Env.PropertyNames.Not.Enum},
	} {
		if d := cmp.Diff(pair[0], pair[1]); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
	if n := len(s.Defs.Bottle.Properties); n != 11 {
		t.Errorf("a bottle has %d properties", n)
	}
}
