package keeper

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gateproc"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

const (
	applyLimit = 2 * time.Second  // a gate that takes longer is replaced
	proxyLimit = 10 * time.Second // a reload takes 20 ms, a restart 0.3 s
)

// liveRules are the rules that were added to this bottle. The keeper holds them,
// so that they outlive a gate; each gate is given them before it is given a
// connection.
type liveRules struct {
	k     *keeper
	clock func() live.Instant

	mu     sync.Mutex // one change at a time
	rules  []live.Rule
	untold []live.Change // not in the audit log yet: there was no gate to write them
	base   *policy.Matcher
	ending *time.Timer
}

// newLive begins with the denies of the run before.
func newLive(k *keeper) *liveRules {
	l := &liveRules{k: k, clock: live.Now}
	l.rules, _ = live.Split(k.cfg.Denied, l.clock())
	return l
}

// change does what the user uid asks for. It returns the rules that were added
// or taken back, and how many connections that cut.
func (l *liveRules) change(c control.Change, uid int) (changed []live.Rule, cut int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dropEnded()
	if err := l.k.running(); err != nil {
		return nil, 0, err
	}
	next, changes := slices.Clone(l.rules), []live.Change(nil)
	switch {
	case len(c.Add) > 0 && (len(c.Revert) > 0 || c.All):
		return nil, 0, badChange("adds and takes back at once")
	case len(c.Add) > 0:
		next, changes, err = l.add(next, c, uid)
	default:
		next, changes, err = revert(next, c, uid)
	}
	if err != nil {
		return nil, 0, err
	}
	if cut, err = l.put(next, changes); err != nil {
		return nil, 0, err
	}
	for _, ch := range changes {
		changed = append(changed, ch.Rule)
	}
	return changed, cut, nil
}

func badChange(format string, args ...any) error {
	return fault.New(fault.Data, "bad_rule", format, args...)
}

func (l *liveRules) add(next []live.Rule, c control.Change, uid int) ([]live.Rule, []live.Change, error) {
	if c.For < 0 || c.For > live.MaxFor {
		return nil, nil, badChange("rules hold for at most %s", live.MaxFor)
	}
	now, wall := l.clock(), l.k.now().UTC()
	var changes []live.Change
	for _, r := range c.Add {
		if n := len(r.Ports); n > 1 || n == 0 && r.Verdict == "allow" || r.Inspect || len(r.Requests) > 0 {
			return nil, nil, badChange("%s: a rule that is added while a bottle runs has one port and is never inspected", r.Host+r.CIDR)
		}
		a := live.Rule{Rule: r, By: uid, Since: wall.Format(time.RFC3339)}
		a.From = fmt.Sprintf("live %s by uid %d", r.Verdict, uid)
		if c.For > 0 {
			a.Ends, a.Until = now.After(c.For), wall.Add(c.For).Format(time.RFC3339)
			a.From += " until " + a.Until
		}
		if err := l.admit(&r, next); err != nil {
			return nil, nil, err
		}
		what := live.Added
		if i := slices.IndexFunc(next, func(old live.Rule) bool { return live.Same(&old, &a) }); i >= 0 {
			what = live.Replaced
			next = slices.Delete(next, i, i+1)
		}
		next = append(next, a)
		changes = append(changes, live.Change{What: what, Rule: a, By: uid})
	}
	if len(next) > live.MaxRules {
		return nil, nil, fault.New(fault.Data, "too_many_rules", "a bottle takes at most %d rules while it runs", live.MaxRules).
			WithHint("take some back with bottle-egress revert, or put them into the manifest")
	}
	return next, changes, nil
}

// admit checks a rule as a manifest's is checked, and that it has an effect.
func (l *liveRules) admit(r *plan.Rule, before []live.Rule) error {
	if _, err := policy.Compile([]plan.Rule{*r}); err != nil {
		return fault.As(err).At("")
	}
	if r.Verdict != "allow" {
		return nil
	}
	if l.base == nil {
		m, err := policy.Compile(l.k.plan.Egress.Rules)
		if err != nil {
			return err
		}
		l.base = m
	}
	o, err := policy.NewOverlay(l.base, live.Plain(before))
	if err != nil {
		return err
	}
	return o.Admit(r)
}

func revert(next []live.Rule, c control.Change, uid int) ([]live.Rule, []live.Change, error) {
	var changes []live.Change
	drop := func(match func(*live.Rule) bool) (some bool) {
		next = slices.DeleteFunc(next, func(r live.Rule) bool {
			if !match(&r) {
				return false
			}
			changes = append(changes, live.Change{What: live.Reverted, Rule: r, By: uid})
			some = true
			return true
		})
		return some
	}
	if c.All {
		drop(func(*live.Rule) bool { return true })
		return next, changes, nil
	}
	for _, t := range c.Revert {
		if !drop(t.Names) {
			return nil, nil, fault.New(fault.No, "no_such_rule", "no rule about %s was added to this bottle", t).
				WithHint("bottle-egress rules lists those that were; what the plan says cannot be taken back")
		}
	}
	return next, changes, nil
}

// put makes next the rules. What is opened is opened behind the gate first, and
// what is closed at the gate first, so that there is never more open than either
// of the two says; mu is held.
func (l *liveRules) put(next []live.Rule, changes []live.Change) (cut int, err error) {
	if len(changes) == 0 {
		return 0, nil
	}
	policy, moves, err := l.k.proxy.policyFor(next)
	if err != nil {
		return 0, err
	}
	if !moves {
		return l.tell(next, changes, false)
	}
	ctx, cancel := context.WithTimeout(context.Background(), proxyLimit)
	defer cancel()
	if slices.ContainsFunc(changes, func(c live.Change) bool { return c.Opens() }) {
		before, _, _ := l.k.proxy.policyFor(l.rules)
		if err := l.k.proxy.update(ctx, policy); err != nil {
			l.k.proxy.prefer(before)
			return 0, err
		}
		if cut, err = l.tell(next, changes, false); err != nil {
			// What stands behind a closed gate opens nothing.
			_ = l.k.proxy.update(ctx, before)
		}
		return cut, err
	}
	// The gate sees the names of what goes through the proxy, and not the
	// addresses: for a range, the proxy has to have learnt of it.
	hold := slices.ContainsFunc(changes, func(c live.Change) bool { return c.What == live.Added && c.Rule.CIDR != "" })
	if cut, err = l.tell(next, changes, hold); err != nil {
		return cut, err
	}
	if err := l.k.proxy.update(ctx, policy); err != nil {
		// It is down, or runs with the new policy: never with the old one.
		l.k.logf("pipelock: %v", err)
	}
	if hold {
		_, err = l.tell(next, nil, false)
	}
	return cut, err
}

// tell gives the gate its rules. A gate that does not answer is replaced, and
// the next one begins with them.
func (l *liveRules) tell(next []live.Rule, changes []live.Change, hold bool) (int, error) {
	before := l.rules
	l.rules = next
	l.watchEnds()
	l.untold = append(l.untold, changes...)
	p := l.k.gate.get()
	if p == nil {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), applyLimit)
	defer cancel()
	a, err := p.Apply(ctx, live.Update{Rules: next, Changes: l.untold, Hold: hold})
	switch {
	case err == nil:
		l.untold = nil
		return a.Cut, nil
	case fault.As(err).Code == "gate_failed":
		l.k.logf("%v; it is replaced", err)
		l.k.gate.restart()
		return 0, nil
	}
	// It has said no. What was to be closed stays on the list for the next gate.
	if slices.ContainsFunc(changes, func(c live.Change) bool { return c.Opens() }) {
		l.rules, l.untold = before, l.untold[:len(l.untold)-len(changes)]
		l.watchEnds()
	}
	return 0, err
}

// adopt gives a gate the rules before it is given connections.
func (l *liveRules) adopt(ctx context.Context, p *gateproc.Process) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.rules)+len(l.untold) > 0 {
		if _, err := p.Apply(ctx, live.Update{Rules: l.rules, Changes: l.untold}); err != nil {
			return err
		}
		l.untold = nil
	}
	l.k.gate.set(p)
	l.watchEnds()
	return nil
}

// denies are what a bottle that is stopped takes along when it is started again:
// what was allowed for a run is not.
func (l *liveRules) denies() []live.Rule {
	return slices.DeleteFunc(l.list(), func(r live.Rule) bool { return r.Verdict != "deny" })
}

// list gives the rules that hold now.
func (l *liveRules) list() []live.Rule {
	l.mu.Lock()
	defer l.mu.Unlock()
	hold, _ := live.Split(l.rules, l.clock())
	return hold
}

// report asks the gate what it decides by.
func (l *liveRules) report() (live.Applied, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.k.gate.get()
	if p == nil {
		return live.Applied{}, fault.New(fault.Unavailable, "gate_failed", "there is no gate at the moment")
	}
	ctx, cancel := context.WithTimeout(context.Background(), applyLimit)
	defer cancel()
	a, err := p.Apply(ctx, live.Update{Rules: l.rules, Changes: l.untold, Report: true})
	if err == nil {
		l.untold = nil
	}
	return a, err
}

// expire takes out the rules whose time is over. The gate has stopped to go by
// them already; it writes the lines for its log, and pipelock learns of it.
func (l *liveRules) expire() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.k.running() == nil {
		l.dropEnded()
	}
}

func (l *liveRules) dropEnded() {
	hold, over := live.Split(l.rules, l.clock())
	// One by one, as an allow and a deny go different ways (put).
	for i, r := range over {
		next := slices.Concat(hold, over[i+1:])
		if _, err := l.put(next, []live.Change{{What: live.Expired, Rule: r, By: r.By}}); err != nil {
			l.k.logf("a rule that is over: %v", err)
		}
	}
	l.watchEnds()
}

// watchEnds sets the timer for the next end of a rule.
func (l *liveRules) watchEnds() {
	if l.ending != nil {
		l.ending.Stop()
		l.ending = nil
	}
	if d, some := live.Wait(l.rules, l.clock()); some && l.k.running() == nil {
		l.ending = time.AfterFunc(max(d, time.Millisecond), l.expire)
	}
}

// running is a fault unless the guest runs.
func (k *keeper) running() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.phase == stopped || k.handing {
		return fault.New(fault.Unavailable, "not_running", "bottle %s is not running (%s)", k.cfg.ID, k.phase)
	}
	return nil
}

// policyFor gives pipelock's configuration with rules on top of the plan's, and
// tells if it is another one than it runs with. Without pipelock it is not.
func (p *proxyKeeper) policyFor(rules []live.Rule) (yaml []byte, moves bool, err error) {
	if p.prog == nil {
		return nil, false, nil
	}
	b := *p.k.plan
	b.Egress.Rules = slices.Concat(b.Egress.Rules, live.Plain(rules))
	if yaml, err = pipelock.YAML(&b); err != nil {
		return nil, false, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return yaml, string(yaml) != string(p.opts.Policy), nil
}

// update gives pipelock another policy: by a reload, which it confirms, or by a
// restart where it refuses one. When it fails pipelock is down, and comes back
// with the policy that prefer names.
func (p *proxyKeeper) update(ctx context.Context, policy []byte) error {
	p.prefer(policy)
	p.mu.Lock()
	proc := p.proc
	p.mu.Unlock()
	err := proc.Reload(ctx, policy)
	if err == nil {
		return nil
	}
	p.k.logf("pipelock does not take the new policy as it runs, and is restarted: %v", err)
	_ = proc.Stop()
	for {
		p.mu.Lock()
		next := p.proc
		p.mu.Unlock()
		if next != proc {
			return nil
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.Unavailable, "proxy_unhealthy", "pipelock does not come back with the new policy: %w", ctx.Err())
		case <-p.quit:
			return fault.New(fault.Unavailable, "not_running", "the bottle ends")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// prefer is the policy that pipelock is started with the next time.
func (p *proxyKeeper) prefer(policy []byte) {
	p.mu.Lock()
	p.opts.Policy = policy
	p.mu.Unlock()
}
