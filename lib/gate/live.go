package gate

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// ruleset is what the gate decides by at one time: the plan's rules, and those
// that were added while the bottle runs.
type ruleset struct {
	*policy.Overlay
	added []live.Rule
	ends  bool // one of added has an end
	hold  bool // nothing goes through the upstream proxy
}

func (g *Gate) newRuleset(added []live.Rule, hold bool) (*ruleset, error) {
	o, err := policy.NewOverlay(g.matcher, live.Plain(added))
	if err != nil {
		return nil, err
	}
	ends := slices.ContainsFunc(added, func(r live.Rule) bool { return r.Ends != live.Instant{} })
	return &ruleset{o, added, ends, hold}, nil
}

// rules gives what holds now. A rule whose time is over decides nothing, even
// where the timer that takes it out is late.
func (g *Gate) rules() *ruleset {
	r := g.current.Load()
	if r.ends && slices.ContainsFunc(r.added, func(a live.Rule) bool { return a.Over(g.clock()) }) {
		g.expire()
		r = g.current.Load()
	}
	return r
}

// expire takes out the rules whose time is over, and cuts what only they
// allowed. The keeper, which gave them, tells of it in the log (Apply).
func (g *Gate) expire() {
	g.changing.Lock()
	defer g.changing.Unlock()
	r := g.current.Load()
	now := g.clock()
	hold, over := live.Split(r.added, now)
	if len(over) > 0 {
		// What was compiled together compiles in parts.
		if next, err := g.newRuleset(hold, r.hold); err == nil {
			g.enforce(next)
		}
	}
	g.watchEnds(now)
}

// watchEnds sets the timer for the next end of a rule; changing is held.
func (g *Gate) watchEnds(now live.Instant) {
	if g.ending != nil {
		g.ending.Stop()
		g.ending = nil
	}
	if d, some := live.Wait(g.current.Load().added, now); some && !g.isClosed() {
		g.ending = time.AfterFunc(d, g.expire)
	}
}

func (g *Gate) isClosed() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.closed
}

// Apply puts other rules on top of those of the plan, in place of the ones that
// are there, and returns when they are in force: what they do not allow any more
// is cut. Each change is a line of the audit log. What is opened is written down
// first; what is closed is closed first.
//
// An update that cannot be applied, and a log that cannot be written, are a
// fault, and then nothing is open that was not before.
func (g *Gate) Apply(u live.Update) (live.Applied, error) {
	g.changing.Lock()
	defer g.changing.Unlock()
	now := g.clock()
	hold, _ := live.Split(u.Rules, now)
	next, err := g.newRuleset(hold, u.Hold)
	if err != nil {
		return live.Applied{}, err
	}
	narrows := !slices.ContainsFunc(u.Changes, func(c live.Change) bool { return c.Opens() })
	cut := 0
	if narrows {
		cut = g.enforce(next)
	}
	for _, c := range u.Changes {
		if !g.write(changeEvent(c)) {
			return live.Applied{}, fault.New(fault.IO, "audit_failed", "the change could not be written to the audit log").
				WithHint("make room on the host's disk and start the bottle anew")
		}
	}
	if !narrows {
		cut = g.enforce(next)
	}
	g.watchEnds(now)
	a := live.Applied{Seq: u.Seq, Cut: cut}
	if u.Report {
		a.RulesSHA256 = policy.RulesSHA256(g.cfg.Bottle.Egress.Rules)
		a.LiveSHA256 = policy.RulesSHA256(live.Plain(next.added))
	}
	return a, nil
}

func changeEvent(c live.Change) audit.Event {
	r := &c.Rule
	e := audit.Event{Event: audit.KindChange, Code: c.What, Verdict: r.Verdict, Host: r.Host + r.CIDR,
		Protocol: r.Protocol, From: r.From, Reason: r.Why, By: &c.By, Until: r.Until}
	if len(r.Ports) > 0 {
		e.Port = r.Ports[0]
	}
	return e
}

// enforce makes next the rules, and cuts what they do not allow. A connection
// that comes about meanwhile looks at the rules after it is listed (follow), so
// that none is missed.
func (g *Gate) enforce(next *ruleset) int {
	g.current.Store(next)
	var gone []*flow
	for _, f := range g.flows.all() {
		if why := g.judge(next, f); why != nil {
			// All are told why before the first is closed: a request finds its
			// upstream connection gone, and answers with the reason.
			f.cancel(why)
			gone = append(gone, f)
		}
	}
	for _, f := range gone {
		f.sever()
	}
	return len(gone)
}

// flow is one connection or request that was allowed, from the decision on, so
// that it can be cut when the rules change.
type flow struct {
	gate   *Gate
	host   string
	port   int
	rule   *plan.Rule
	ctx    context.Context // ends with the flow, or is cut with a *Refusal as its cause
	cancel context.CancelCauseFunc

	mu      sync.Mutex
	address netip.Addr // that was dialled; the zero one before, and through the proxy
	severed bool
	closers []func()
}

// onCut has close called when the flow is cut, before those who changed the
// rules are told that it is done; at once if it was cut already.
func (f *flow) onCut(close func()) {
	f.mu.Lock()
	now := f.severed
	if !now {
		f.closers = append(f.closers, close)
	}
	f.mu.Unlock()
	if now {
		close()
	}
}

// sever closes what belongs to a flow that was cancelled.
func (f *flow) sever() {
	f.mu.Lock()
	f.severed = true
	closers := f.closers
	f.closers = nil
	f.mu.Unlock()
	for _, c := range closers {
		c()
	}
}

// flowList is all flows of a gate.
type flowList struct {
	mu   sync.Mutex
	list map[*flow]struct{}
}

func (l *flowList) all() []*flow {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]*flow, 0, len(l.list))
	for f := range l.list {
		out = append(out, f)
	}
	return out
}

// follow lists a connection or request that rule allows. The rules are asked
// once more, since they may have changed after they were asked first.
func (g *Gate) follow(ctx context.Context, host string, port int, rule *plan.Rule) (*flow, *Refusal) {
	f := &flow{gate: g, host: host, port: port, rule: rule}
	f.ctx, f.cancel = context.WithCancelCause(ctx)
	g.flows.mu.Lock()
	g.flows.list[f] = struct{}{}
	g.flows.mu.Unlock()
	if why := g.judge(g.rules(), f); why != nil {
		f.end()
		return nil, why
	}
	return f, nil
}

// end takes the flow off the list. It may be called on nil and more than once.
func (f *flow) end() {
	if f == nil {
		return
	}
	f.gate.flows.mu.Lock()
	delete(f.gate.flows.list, f)
	f.gate.flows.mu.Unlock()
	f.cancel(nil)
}

// dialled notes where the flow leads, and asks the rules about that address:
// they may have changed since it was checked.
func (f *flow) dialled(c net.Conn) error {
	at, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return nil // of a test's own kind
	}
	f.mu.Lock()
	f.address = at.Addr().Unmap()
	f.mu.Unlock()
	if why := f.gate.judge(f.gate.rules(), f); why != nil {
		return why
	}
	return nil
}

// cut gives why the flow was cut, or nil.
func (f *flow) cut() *Refusal {
	var why *Refusal
	if f != nil && errors.As(context.Cause(f.ctx), &why) {
		return why
	}
	return nil
}

// judge tells why a flow may not go on under r, or nil.
func (g *Gate) judge(r *ruleset, f *flow) *Refusal {
	d := r.Decide(f.host, f.port)
	f.mu.Lock()
	address := f.address
	f.mu.Unlock()
	switch {
	case !d.Allow:
		return denied(d, f.host, f.port)
	case d.Rule.Protocol != f.rule.Protocol || d.Rule.Inspect != f.rule.Inspect || !slices.Equal(d.Rule.Addresses, f.rule.Addresses):
		return refused(codeRevoked, f.host, f.port, "the rule that allowed it was replaced by another one", "try again")
	case r.hold && g.leavesByProxy(f.rule):
		return proxyDown(f.host, f.port)
	case address.IsValid():
		if err := r.Denies(address, f.port); err != nil {
			why := fault.As(err)
			return refused(why.Code, f.host, f.port, f.host+": "+why.Msg, why.Hint)
		}
	}
	return nil
}

// codeRevoked is for what was allowed, and is not any more.
const codeRevoked = "revoked"

// revoked puts into the line that closes a flow why it was cut, if it was.
func revoked(e *audit.Event, f *flow) {
	if why := f.cut(); why != nil {
		e.Code, e.Reason = codeRevoked, why.Reason
	}
}

// followed is a connection of the gate's own transport: it may be idle, or serve
// several requests, and goes when its host or its address is denied.
type followed struct {
	net.Conn
	flow *flow
}

func (c *followed) Close() error {
	c.flow.end()
	return c.Conn.Close()
}
