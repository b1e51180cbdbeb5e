package plan

import (
	"strings"
	"testing"
)

func TestForms(t *testing.T) {
	for _, tt := range []struct {
		name string
		is   func(string) bool
		yes  []string
		no   []string
	}{
		{"id", isID, []string{"a", "0", "a-b", "claude", strings.Repeat("a", 40)},
			[]string{"", "-a", "A", "a_b", "a.b", "ä", "a b", "a\n", strings.Repeat("a", 41), "a\x00"}},
		{"digest", isSHA, []string{"sha256:" + strings.Repeat("0a", 32)},
			[]string{"", "sha256:", strings.Repeat("0a", 32), "sha256:" + strings.Repeat("0A", 32), "sha256:" + strings.Repeat("0a", 33), "sha512:" + strings.Repeat("0a", 32)}},
		{"header", isHeader, []string{"x-api-key", "authorization", "x_y", "a.b", "!#$%&'*+-.^_`|~"},
			[]string{"", "X-Api-Key", "a b", "a:", "a\r", "ä", "a(b"}},
		{"variable", ValidEnvName, []string{"A", "_", "a1", "PATH_2"}, []string{"", "1A", "A-B", "A B", "A=", "Ä", "A\n"}},
		{"vm id", func(s string) bool { _, ok := SplitVMID(s); return ok },
			[]string{"a-01234567", "a-b-deadbeef", strings.Repeat("a", 40) + "-00000000"},
			[]string{"", "a", "-00000000", "a-0000000", "a-000000000", "a-0000000G", "a-DEADBEEF", "A-00000000", "../x-00000000", strings.Repeat("a", 41) + "-00000000"}},
	} {
		for _, s := range tt.yes {
			if !tt.is(s) {
				t.Errorf("%s: %q is refused", tt.name, s)
			}
		}
		for _, s := range tt.no {
			if tt.is(s) {
				t.Errorf("%s: %q is accepted", tt.name, s)
			}
		}
	}
}
