package fault

import "testing"

func TestLine(t *testing.T) {
	for in, want := range map[string]string{
		"plain, grün ✓":                 "plain, grün ✓",
		"a\nb\tc\r\n":                   "a b c",
		"\x1b[31mred\x00\x7f":           "?[31mred??",
		"\u009b2J\u0085":                "?2J?",
		"\xff":                          "\ufffd",
		"a\u2028b\u2029c":               "a b c",
		"x\u202etxt.exe\u2066y":         "x?txt.exe?y",
		"  kept in front, not behind  ": "  kept in front, not behind",
	} {
		if got := Line(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
