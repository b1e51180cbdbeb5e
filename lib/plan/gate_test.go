package plan

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/fault"
)

func TestGateRefuses(t *testing.T) {
	for _, tt := range []struct{ name, in, code string }{
		{"empty", "", "empty_input"},
		{"blank", " \n\t\n", "empty_input"},
		{"array", "[]", "not_an_object"},
		{"null", "null", "not_an_object"},
		{"word", "hello", "bad_json"},
		{"word that begins like null", "nonsense", "bad_json"},
		{"duplicate member", `{"format_version":"1.0","bottle":{},"bottle":{}}`, "duplicate_member"},
		{"duplicate through an escape", `{"format_version":"1.0","x-a":1,"x-\u0061":2}`, "duplicate_member"},
		{"duplicate deep inside what nobody owns", `{"format_version":"1.0","x-a":[{"b":{"c":1,"c":2}}]}`, "duplicate_member"},
		{"case variant of a section", `{"format_version":"1.0","Bottle":{}}`, "case_variant"},
		{"case variant through an escape", `{"format_version":"1.0","\u0042ottle":{}}`, "case_variant"},
		{"case variant that only encoding/json folds", `{"format_version":"1.0","bottle":{"hoſt":1}}`, "unknown_member"},
		{"kelvin sign", "{\"format_version\":\"1.0\",\"pac\u212a\":{}}", "case_variant"},
		{"long s", "{\"format_version\":\"1.0\",\"diagno\u017ftics\":[]}", "case_variant"},
		{"case variant inside bottle", `{"format_version":"1.0","bottle":{"egress":{"rules":[{"Verdict":"allow"}]}}}`, "case_variant"},
		{"unknown member inside bottle", `{"format_version":"1.0","bottle":{"sudo":true}}`, "unknown_member"},
		{"case variant inside vm", `{"format_version":"1.0","vm":{"ID":"x"}}`, "case_variant"},
		{"null in a section", `{"format_version":"1.0","bottle":{"hide":null}}`, "null"},
		{"trailing brace", `{"format_version":"1.0"}}`, "trailing_data"},
		{"trailing document", `{"format_version":"1.0"} {"x"`, "trailing_data"},
		{"bad utf-8", "{\"format_version\":\"1.0\",\"x-a\":\"\xff\xfe\"}", "bad_json"},
		{"lone surrogate", `{"format_version":"1.0","x-a":"\ud800"}`, "bad_json"},
		{"truncated", `{"format_version":"1.0","x-a":[1,`, "bad_json"},
		{"number beyond float64", `{"format_version":"1.0","x-a":1e999}`, "bad_number"},
		{"deep", `{"format_version":"1.0","x-a":` + strings.Repeat("[", 60000) + strings.Repeat("]", 60000) + "}", "too_deep"},
		{"no version", `{"bottle":{}}`, "no_version"},
		{"version of another major", `{"format_version":"9.0"}`, "bad_version"},
		{"version that is a number", `{"format_version":1.0}`, "no_version"},
		{"version without minor", `{"format_version":"1"}`, "bad_version"},
		{"byte order mark", "\ufeff{\"format_version\":\"1.0\"}", "bad_json"},
		{"comment", `{"format_version":"1.0"/**/}`, "bad_json"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Gate([]byte(tt.in))
			if err == nil {
				t.Fatalf("accepted")
			}
			e := fault.As(err)
			if e.Exit != fault.Data || e.Code != tt.code {
				t.Errorf("exit %d, code %s (%v); want 65, %s", e.Exit, e.Code, err, tt.code)
			}
		})
	}
}

func TestGateSize(t *testing.T) {
	big := []byte(`{"format_version":"1.0","x-a":"` + strings.Repeat("a", MaxBytes) + `"}`)
	if e := fault.As(Gate(big)); e == nil || e.Code != "too_large" {
		t.Errorf("got %v, want too_large", e)
	}
}

func TestGateAccepts(t *testing.T) {
	for _, in := range []string{
		`{"format_version":"1.0"}`,
		`{"format_version":"1.7","x-note":{"a":null,"A":1}}`,
		"  {\n \"format_version\" : \"1.0\",\n \"unknown-section\" : [1, 2e3, -0.5, \"\\ud83d\\ude00\"] }\n",
		`{"format_version":"1.0","vm":{"id":"a-00000000","new_member":1}}`,
	} {
		if err := Gate([]byte(in)); err != nil {
			t.Errorf("%s: %v", in, err)
		}
	}
}

func TestPassThroughByteForByte(t *testing.T) {
	in := `{"format_version":"1.0","x-b":{"n":1.50,"e":1E3,"u":"\u00e9\/"},"x-a":[ 1 ,2]}`
	d, err := Parse([]byte(in))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Set("pack", Pack{Digest: "host", Kind: "host"}); err != nil {
		t.Fatal(err)
	}
	want := `{"format_version":"1.0","pack":{"digest":"host","kind":"host","size_bytes":0,"cached":false},"x-b":{"n":1.50,"e":1E3,"u":"\u00e9\/"},"x-a":[1,2]}`
	if got := string(d.Line()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestReader(t *testing.T) {
	one, two := `{"format_version":"1.0","x-n":1}`, `{"format_version":"1.0","x-n":"} {"}`
	indented := "{\n  \"format_version\": \"1.0\",\n  \"x-n\": 3\n}"
	bad := `{"format_version":"1.0","x-n":1,"x-n":2}`
	r := NewReader(strings.NewReader(one + "\n\n" + indented + "\n" + bad + "\n" + two))
	var got []string
	for {
		d, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			got = append(got, fault.As(err).Code)
			continue
		}
		got = append(got, gjson.GetBytes(d.Line(), "x-n").Raw)
	}
	if want := `[1 3 duplicate_member "} {"]`; fmt.Sprint(got) != want {
		t.Errorf("got %v, want %s", got, want)
	}
	if _, err := NewReader(strings.NewReader("")).Next(); fault.As(err).Code != "empty_input" {
		t.Errorf("empty input: %v", err)
	}
}

// FuzzGate holds the promise of the gate: what it accepts, gjson and
// encoding/json read the same, leaf by leaf.
func FuzzGate(f *testing.F) {
	for _, s := range []string{
		`{"format_version":"1.0","a":[1,{"b":"c\n\u00e9"}],"d":true,"e":null,"f":-1.5e3}`,
		`{"format_version":"1.0","":{"":[[]]},"a.b":{"*":1,"#":2,"|":"@this"}}`,
		`{"format_version":"1.0","x":"\ud83d\ude00\u0000\b"}`,
		`{"format_version":"1.0","x":123456789012345678901234567890}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if Gate(b) != nil {
			return
		}
		var v any
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatalf("the gate accepts what encoding/json refuses: %v", err)
		}
		if !gjson.ValidBytes(b) {
			t.Fatal("the gate accepts what gjson refuses")
		}
		agree(t, "$", gjson.ParseBytes(b), v)
	})
}

func agree(t *testing.T, at string, g gjson.Result, v any) {
	t.Helper()
	switch v := v.(type) {
	case map[string]any:
		n := 0
		g.ForEach(func(k, child gjson.Result) bool {
			want, ok := v[k.String()]
			if !ok {
				t.Errorf("%s: gjson has member %q, encoding/json has not", at, k.String())
				return false
			}
			n++
			agree(t, at+"."+k.String(), child, want)
			return true
		})
		if n != len(v) {
			t.Errorf("%s: %d members in gjson, %d in encoding/json", at, n, len(v))
		}
	case []any:
		a := g.Array()
		if len(a) != len(v) {
			t.Fatalf("%s: %d elements in gjson, %d in encoding/json", at, len(a), len(v))
		}
		for i := range v {
			agree(t, fmt.Sprintf("%s[%d]", at, i), a[i], v[i])
		}
	case string:
		if g.Type != gjson.String || g.Str != v {
			t.Errorf("%s: gjson %q, encoding/json %q", at, g.Str, v)
		}
	case float64:
		if g.Type != gjson.Number || g.Num != v && !(math.IsNaN(g.Num) && math.IsNaN(v)) {
			t.Errorf("%s: gjson %v, encoding/json %v", at, g.Num, v)
		}
	case bool:
		if g.Bool() != v || g.Type != gjson.True && g.Type != gjson.False {
			t.Errorf("%s: gjson %v, encoding/json %v", at, g, v)
		}
	case nil:
		if g.Type != gjson.Null {
			t.Errorf("%s: gjson %v, encoding/json null", at, g)
		}
	}
}
