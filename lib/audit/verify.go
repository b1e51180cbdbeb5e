package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
)

// Report is what Verify found.
type Report struct {
	Files   int    `json:"files"`
	Lines   int    `json:"lines"`   // events
	Bottle  string `json:"bottle"`  // vm.id
	First   uint64 `json:"first"`   // seq of the oldest line; above 1 if files were dropped
	Dropped int    `json:"dropped"` // files that were removed for room, as the log itself says
	Torn    int    `json:"torn"`    // lines that a crash cut short, as a later line says
	Head    Head   `json:"head"`    // the last line: who has it from elsewhere can tell if the log was cut
	// Ended tells that the last line is that of a gate which ended in order. A
	// log without it may go on, end in a crash, or have been cut.
	Ended bool   `json:"ended"`
	Break *Break `json:"break,omitempty"` // the first one
}

// Break is where the chain does not hold.
type Break struct {
	File   string `json:"file"`
	Line   int    `json:"line"`
	Reason string `json:"reason"`
}

// Verify holds the log at path against its chain, over all its files. pin is
// the digest of a line that has to be there, "" for none. An error is about
// reading; what is wrong with the log is in the report.
func Verify(path, pin string) (Report, error) {
	r, err := OpenReader(path)
	if err != nil {
		return Report{}, err
	}
	defer r.Close()
	c := chain{pin: pin, found: pin == ""}
	for {
		l, err := r.Next()
		if err == io.EOF {
			return c.end(r), nil
		}
		if err != nil {
			return c.report, err
		}
		if c.take(l); c.report.Break != nil {
			return c.report, nil
		}
	}
}

// chain follows the lines of a log.
type chain struct {
	report Report
	file   string
	begins bool // its first event is to come
	pin    string
	found  bool
	odd    []Line // no events, since the last one
	// dropped are the last lines of removed files; origin is what the first line
	// of the log as it is links to, if that is none of them yet.
	origin Head
	first  Line
	known  bool
}

func (c *chain) broken(l Line, format string, args ...any) {
	if c.report.Break == nil {
		c.report.Break = &Break{l.File, l.Number, fmt.Sprintf(format, args...)}
	}
}

func (c *chain) take(l Line) {
	if l.File != c.file {
		c.file, c.begins = l.File, true
		c.report.Files++
	}
	if l.Torn {
		c.odd = append(c.odd, l)
		return
	}
	e := &l.Event
	last, begins := c.report.Head, c.begins
	c.begins = false
	switch {
	case c.report.Lines == 0:
		c.begin(l)
	case e.Seq != last.Seq+1:
		c.broken(l, "line %d of the log follows line %d: lines between them are missing, or stand twice", e.Seq, last.Seq)
	case e.Prev != last.SHA256:
		c.broken(l, "the line before it was changed: its digest is %s, and this line was written after %s", last.SHA256, e.Prev)
	case e.Bottle != c.report.Bottle:
		c.broken(l, "it is about bottle %q, and the log about %q", e.Bottle, c.report.Bottle)
	case begins != (e.Event == KindRotate):
		c.broken(l, "the files of the log are not those that its gate wrote")
	}
	c.account(l)
	if e.Event == KindDrop {
		c.report.Dropped++
		c.known = c.known || Head{e.LastSeq, e.Last} == c.origin
	}
	c.report.Lines++
	c.report.Head = Head{e.Seq, digest(append(l.Raw, '\n'))}
	c.found = c.found || c.report.Head.SHA256 == c.pin
	c.report.Ended = e.Event == KindStop
}

// begin takes the oldest line there is.
func (c *chain) begin(l Line) {
	e := &l.Event
	c.first, c.report.First, c.report.Bottle = l, e.Seq, e.Bottle
	c.origin = Head{e.Seq - 1, e.Prev}
	c.known = c.origin == Head{}
	if (e.Event == KindRotate) == c.known {
		c.broken(l, "a log begins with line 1, or with the first line of a file after one that was dropped")
	}
}

// account holds what stands between two events against what the later one says
// of it.
func (c *chain) account(l Line) {
	var bytes int64
	sum := sha256.New()
	for _, odd := range c.odd {
		bytes += int64(len(odd.Raw)) + 1
		sum.Write(odd.Raw)
		sum.Write([]byte("\n"))
	}
	t := l.Event.Torn
	switch {
	case len(c.odd) == 0 && t == nil:
		return
	case len(c.odd) == 0 && c.report.Lines == 0:
		return // it was at the end of a file that is gone
	case t == nil:
		c.broken(c.odd[0], "it is no event, and the line after it does not account for it")
	case t.Bytes != bytes || t.SHA256 != "sha256:"+hex.EncodeToString(sum.Sum(nil)):
		c.broken(l, "it accounts for %d bytes that a crash has left, and other ones stand before it", t.Bytes)
	default:
		c.report.Torn++
	}
	c.odd = nil
}

func (c *chain) end(r *Reader) Report {
	at := Line{File: r.name, Number: r.number}
	if rest := r.Rest(); len(rest) > 0 {
		at.Number++
		c.broken(at, "it is cut short (%d bytes): the gate ended while it wrote, or the file was cut", len(rest))
	}
	if len(c.odd) > 0 {
		c.broken(c.odd[0], "it is no event: the gate ended while it wrote, or the line was changed")
	}
	if c.report.Lines == 0 {
		c.broken(at, "the log has no line")
	}
	if c.report.Lines > 0 && !c.known {
		c.broken(c.first, "the lines before it are gone, and no line of the log says that they were dropped")
	}
	if !c.found {
		c.broken(at, "no line has the digest %s: the log was cut, or written anew", strings.TrimSpace(c.pin))
	}
	return c.report
}
