package gate

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/guest"
)

// Bounds of what a guest can have written by asking for names. What goes past
// them is counted: a refused lookup lets nothing out, so that no line of its own
// is owed to it, and a program that searches for names must not push the
// decisions out of the log.
const (
	lookupLines  = 60 // a minute
	lookupWindow = time.Minute
	lookupAgain  = 10 * time.Minute // until the same name is written again
	lookupNames  = 1024             // that are remembered for it
	longestName  = 255              // a name in DNS is no longer
)

// lookups keeps the lines about refused names few.
type lookups struct {
	mu      sync.Mutex
	seen    map[string]time.Time
	began   time.Time // of the present window
	lines   int
	dropped int
}

// admit tells whether a refused name gets a line now, and how many went
// without one in the window that has just ended.
func (l *lookups) admit(name string, now time.Time) (ok bool, dropped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.began) >= lookupWindow {
		dropped = l.dropped
		l.began, l.lines, l.dropped = now, 0, 0
	}
	if at, known := l.seen[name]; known && now.Sub(at) < lookupAgain {
		return false, dropped
	}
	if l.lines == lookupLines {
		l.dropped++
		return false, dropped
	}
	l.lines++
	if l.seen == nil || len(l.seen) >= lookupNames {
		l.seen = make(map[string]time.Time)
	}
	l.seen[name] = now
	return true, dropped
}

// isLookup knows the one request that is about the gate and goes nowhere.
func isLookup(r *http.Request) bool {
	return r.Method == http.MethodGet && r.URL.Host == "" && r.URL.Path == guest.LookupPath
}

// lookupName tells the guest's resolver what is open of a name. Nothing is
// resolved and nothing leaves: it is the policy that answers.
func (g *Gate) lookupName(w http.ResponseWriter, r *http.Request) {
	name := canonical(r.URL.Query().Get("name"))
	open, d := g.rules().Services(name)
	if !d.Allow {
		if len(name) > longestName { // it is remembered
			name = strings.Clone(name[:longestName])
		}
		f := denied(d, name, 0)
		g.denyLookup(f)
		f.write(w, r.ContentLength != 0)
		return
	}
	var answer guest.Lookup
	for _, s := range open {
		answer.Services = append(answer.Services, guest.Service{Port: s.Port, Protocol: s.Protocol})
	}
	body, err := json.Marshal(answer)
	if err != nil {
		panic(fmt.Sprintf("gate: numbers and words: %v", err))
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body)
}

// denyLookup writes a refused name down, within the bounds.
func (g *Gate) denyLookup(f *Refusal) {
	ok, dropped := g.lookups.admit(f.Host, time.Now())
	if dropped > 0 {
		g.write(manyLookups(g.newEvent(audit.KindLookup, "", 0), dropped))
	}
	if !ok {
		g.stats.denied.Add(1)
		return
	}
	g.deny(f, g.newEvent(audit.KindLookup, f.Host, 0))
}

// endLookups accounts for the names of the last window.
func (g *Gate) endLookups() {
	g.lookups.mu.Lock()
	n := g.lookups.dropped
	g.lookups.dropped = 0
	g.lookups.mu.Unlock()
	if n > 0 {
		g.write(manyLookups(g.newEvent(audit.KindLookup, "", 0), n))
	}
}

func manyLookups(e audit.Event, n int) audit.Event {
	e.Verdict, e.Code = audit.Deny, "too_many_names"
	e.Reason = fmt.Sprintf("%d lookups of further names were refused and are not listed", n)
	return e
}
