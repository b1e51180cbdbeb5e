//go:build linux

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// enough is the number of rounds from which a median is taken for a claim.
const enough = 10

// stat is a sample in short: milliseconds, or the unit of its row.
type stat struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	N      int     `json:"n"`
}

// summary of a sample; the median of an even number is the mean of the middle two.
func summary(sample []float64) *stat {
	if len(sample) == 0 {
		return nil
	}
	s := slices.Sorted(slices.Values(sample))
	n := len(s)
	return &stat{Median: (s[(n-1)/2] + s[n/2]) / 2, Min: s[0], Max: s[n-1], N: n}
}

func (s *stat) String() string {
	if s == nil {
		return "-"
	}
	return fmt.Sprintf("%s (%s..%s)", short(s.Median), short(s.Min), short(s.Max))
}

// short prints three digits, and no fewer before the point.
func short(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.4f", v)
}

// milliseconds of one call.
func milliseconds(fn func() error) (float64, error) {
	start := time.Now()
	err := fn()
	return float64(time.Since(start).Nanoseconds()) / 1e6, err
}

// Verdicts of a row.
const (
	met     = "ok"
	missed  = "MISSED"
	skipped = "SKIPPED"
	failed  = "FAILED"
	info    = ""
)

// row is one line of the table, and one of the JSON lines.
type row struct {
	Kind    string  `json:"kind"` // "row"
	Name    string  `json:"name"`
	Unit    string  `json:"unit,omitempty"`
	Ours    *stat   `json:"ours,omitempty"`
	Against string  `json:"against,omitempty"` // what stands beside it
	Beside  *stat   `json:"beside,omitempty"`
	Ratio   float64 `json:"ratio,omitempty"` // of the medians
	Target  string  `json:"target,omitempty"`
	Verdict string  `json:"verdict,omitempty"`
	Why     string  `json:"why,omitempty"`
}

// limit is a target: value of the row at most bound, or at least.
type limit struct {
	text    string
	bound   float64
	value   func(ours, beside *stat) float64
	atLeast bool
}

func medianAtMost(text string, most float64) *limit {
	return &limit{text, most, func(o, _ *stat) float64 { return o.Median }, false}
}

func medianAtLeast(text string, least float64) *limit {
	return &limit{text, least, func(o, _ *stat) float64 { return o.Median }, true}
}

func addsAtMost(text string, most float64) *limit {
	return &limit{text, most, func(o, b *stat) float64 { return o.Median - b.Median }, false}
}

func ratioAtMost(text string, most float64) *limit {
	return &limit{text, most, func(o, b *stat) float64 { return o.Median / b.Median }, false}
}

func ratioAtLeast(text string, least float64) *limit {
	return &limit{text, least, func(o, b *stat) float64 { return o.Median / b.Median }, true}
}

// newRow judges a sample. beside may be empty.
func newRow(name, unit string, ours []float64, against string, beside []float64, l *limit) row {
	r := row{Kind: "row", Name: name, Unit: unit, Ours: summary(ours), Against: against, Beside: summary(beside)}
	if r.Ours != nil && r.Beside != nil && r.Beside.Median > 0 {
		r.Ratio = r.Ours.Median / r.Beside.Median
	}
	if l == nil {
		return r
	}
	r.Target = l.text
	if r.Ours == nil {
		r.Verdict, r.Why = failed, "nothing was measured"
		return r
	}
	got := l.value(r.Ours, r.Beside)
	r.Verdict = met
	switch {
	case l.atLeast && got < l.bound:
		r.Verdict, r.Why = missed, fmt.Sprintf("%s, wanted at least %s", short(got), short(l.bound))
	case !l.atLeast && got > l.bound:
		r.Verdict, r.Why = missed, fmt.Sprintf("%s, wanted at most %s", short(got), short(l.bound))
	}
	return r
}

// table of rows for people, columns padded to their widest cell.
func table(rows []row) string {
	lines := [][]string{{"", "bottle: median (min..max)", "beside it", "ratio", "target", ""}}
	for _, r := range rows {
		line := []string{r.Name, cell(r.Ours, r.Unit), cell(r.Beside, r.Unit), "", r.Target, r.Verdict}
		if r.Against != "" && r.Beside != nil {
			line[2] = r.Against + " " + line[2]
		}
		if r.Ratio > 0 {
			line[3] = fmt.Sprintf("%.2f", r.Ratio)
		}
		if r.Why != "" {
			line[5] += ": " + r.Why
		}
		lines = append(lines, line)
	}
	width := make([]int, len(lines[0]))
	for _, l := range lines {
		for i, c := range l {
			width[i] = max(width[i], len(c))
		}
	}
	var b strings.Builder
	for _, l := range lines {
		var out strings.Builder
		for i, c := range l {
			fmt.Fprintf(&out, "%-*s  ", width[i], c)
		}
		b.WriteString(strings.TrimRight(out.String(), " ") + "\n")
	}
	return b.String()
}

func cell(s *stat, unit string) string {
	if s == nil {
		return ""
	}
	return s.String() + " " + unit
}
