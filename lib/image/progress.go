package image

import (
	"fmt"
	"io"
	"strconv"
	"time"
)

// progress writes a line when work has taken a second, and every five seconds
// from then on. It is quiet about work that is done sooner.
type progress struct {
	w       io.Writer
	now     func() time.Time
	what    string
	start   time.Time
	next    time.Time
	entries int64
	bytes   int64
	said    bool
}

func newProgress(o Options, what string) *progress {
	t := o.Now()
	return &progress{w: o.Progress, now: o.Now, what: what, start: t, next: t.Add(time.Second)}
}

// step counts work done. Asking the clock is cheap beside a system call.
func (p *progress) step(entries, bytes int64) {
	p.entries += entries
	p.bytes += bytes
	p.tick()
}

func (p *progress) tick() {
	if t := p.now(); !t.Before(p.next) {
		p.next = t.Add(5 * time.Second)
		p.say(t)
	}
}

func (p *progress) done() {
	if p.said {
		p.say(p.now())
	}
}

func (p *progress) say(t time.Time) {
	p.said = true
	took := t.Sub(p.start).Round(100 * time.Millisecond)
	if p.entries == 0 && p.bytes == 0 {
		fmt.Fprintf(p.w, "%s: %s\n", p.what, took)
		return
	}
	fmt.Fprintf(p.w, "%s: %d entries, %s, %s\n", p.what, p.entries, mib(p.bytes), took)
}

func mib(n int64) string { return strconv.FormatInt(n>>20, 10) + " MiB" }

// quote makes a name safe to print; names of archives are not ours.
func quote(s string) string {
	if len(s) > 200 {
		s = s[:200] + "…"
	}
	return strconv.Quote(s)
}
