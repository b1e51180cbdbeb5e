package policy

import (
	"flag"
	"fmt"
	"go/format"
	"os"
	"sort"
	"strings"
	"testing"

	"golang.org/x/net/publicsuffix"
)

var update = flag.Bool("update", false, "rewrite suffix.go from golang.org/x/net/publicsuffix")

// candidates are the labels that registries use on the second level: all of one
// to three letters, and the longer ones in use.
func candidates() []string {
	var out []string
	var grow func(prefix string)
	grow = func(prefix string) {
		for c := 'a'; c <= 'z'; c++ {
			s := prefix + string(c)
			out = append(out, s)
			if len(s) < 3 {
				grow(s)
			}
		}
	}
	grow("")
	return append(out, strings.Fields(`gouv govt info asso firm mobi name coop museum aero school police
		arts store stor conf presse press muni nome idf tourism game games church club maori iwi geek kiwi
		health cri parliament hotel inc ltda`)...)
}

// suffixTable asks the Public Suffix List which two-label names under a country
// code are registries.
func suffixTable() map[string]string {
	table := make(map[string]string)
	labels := candidates()
	for a := 'a'; a <= 'z'; a++ {
		for b := 'a'; b <= 'z'; b++ {
			tld := string([]rune{a, b})
			if _, icann := publicsuffix.PublicSuffix(tld); !icann {
				continue
			}
			var found []string
			for _, l := range labels {
				name := l + "." + tld
				if s, icann := publicsuffix.PublicSuffix(name); icann && s == name {
					found = append(found, l)
				}
			}
			// A wildcard in the list (*.ck) makes every label a registry:
			// nothing there can be told apart by name.
			if len(found) > 0 && len(found) < 1000 {
				sort.Strings(found)
				table[tld] = strings.Join(found, " ")
			}
		}
	}
	return table
}

// The list is a large module that needs net; the policy package is to be pure,
// so it holds an extract, and this test holds the extract to the list.
func TestSecondLevelFollowsPublicSuffixList(t *testing.T) {
	want := suffixTable()
	if *update {
		var b strings.Builder
		b.WriteString("package policy\n\n// secondLevel are the registries' own names below a country code, from the\n// Public Suffix List as golang.org/x/net carries it. Written by\n// go test -run SecondLevel -update.\nvar secondLevel = map[string]string{\n")
		var tlds []string
		for k := range want {
			tlds = append(tlds, k)
		}
		sort.Strings(tlds)
		for _, k := range tlds {
			fmt.Fprintf(&b, "%q: %q,\n", k, want[k])
		}
		b.WriteString("}\n")
		src, err := format.Source([]byte(b.String()))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile("suffix.go", src, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if len(want) < 100 {
		t.Fatalf("the list has only %d country codes with second-level registries", len(want))
	}
	for k, v := range want {
		if secondLevel[k] != v {
			t.Errorf("%s: have %q, the list says %q; run go test -run SecondLevel -update", k, secondLevel[k], v)
		}
	}
	for k := range secondLevel {
		if _, ok := want[k]; !ok {
			t.Errorf("%s is not in the list any more", k)
		}
	}
}
