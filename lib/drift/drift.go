// Package drift is how a running bottle is compared with its plan: what the
// kernel says of processes (Proc), the checks that every process of a bottle has
// to pass, and the findings. lib/verify and the engines make use of it.
package drift

import (
	"fmt"
	"slices"
	"strings"
)

// Kinds of finding.
const (
	Drift   = "drift"   // the bottle is not what was planned
	Live    = "live"    // its owner changed it while it runs, on purpose
	Unknown = "unknown" // this could not be looked at
)

// Finding is one difference.
type Finding struct {
	Bottle   string `json:"bottle"` // vm.id
	Kind     string `json:"kind"`   // drift | live | unknown
	What     string `json:"what"`   // what was looked at: "sandbox: flag network", "mount /workspace"
	Expected string `json:"expected"`
	Found    string `json:"found"`
}

// Findings collects those of one bottle.
type Findings struct {
	Bottle string
	List   []Finding
}

func (f *Findings) add(kind, what, expected, found string) {
	f.List = append(f.List, Finding{f.Bottle, kind, clean(what), clean(expected), clean(found)})
}

// Drift notes a difference.
func (f *Findings) Drift(what, expected, found string) { f.add(Drift, what, expected, found) }

// Live notes what the bottle's owner changed.
func (f *Findings) Live(what, expected, found string) { f.add(Live, what, expected, found) }

// Unknown notes that something could not be looked at, and why. It is a finding
// all the same: what was not seen is not known to be right.
func (f *Findings) Unknown(what, expected string, err error) {
	f.add(Unknown, what, expected, "cannot be seen: "+err.Error())
}

// Equal notes a difference between two texts.
func (f *Findings) Equal(what, expected, found string) {
	if expected != found {
		f.Drift(what, expected, found)
	}
}

// Same notes what is missing from a set and what should not be in it.
func (f *Findings) Same(what string, expected, found []string) {
	for _, e := range expected {
		if !slices.Contains(found, e) {
			f.Drift(what, e, "missing")
		}
	}
	f.Only(what, expected, found)
}

// Only notes what should not be in a set.
func (f *Findings) Only(what string, allowed, found []string) {
	for _, got := range found {
		if !slices.Contains(allowed, got) {
			f.Drift(what, "absent", got)
		}
	}
}

// clean makes one bounded line of what a process may have chosen itself.
func clean(s string) string {
	const most = 1000
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f || r == 0xfffd {
			return '?'
		}
		return r
	}, s)
}

// Octal is a file's mode as people write it.
func Octal(mode uint32) string { return fmt.Sprintf("%04o", mode) }
