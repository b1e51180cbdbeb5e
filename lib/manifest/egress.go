package manifest

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// MaxPipelockHosts is how many hosts pipelock is given at most: it goes through
// its list one by one for each request.
const MaxPipelockHosts = 2000

// rules collects the rules of one bottle. The allow rules of one host (or
// range) are chained: last finds the newest, before the one before it, -1 none.
type rules struct {
	list   []plan.Rule
	last   map[string]int32
	before []int32
}

func newRules(size int) *rules {
	return &rules{
		list:   make([]plan.Rule, 0, size),
		last:   make(map[string]int32, size),
		before: make([]int32, 0, size),
	}
}

// of goes through the allow rules of a host.
func (rs *rules) of(key string) iter.Seq[*plan.Rule] {
	return func(yield func(*plan.Rule) bool) {
		i, ok := rs.last[key]
		for ok && i >= 0 && yield(&rs.list[i]) {
			i = rs.before[i]
		}
	}
}

func (rs *rules) count(key string) (n int) {
	for range rs.of(key) {
		n++
	}
	return n
}

// opened gives the allow rule of a host that has the port, or nil.
func (rs *rules) opened(key string, port int) *plan.Rule {
	for r := range rs.of(key) {
		if slices.Contains(r.Ports, port) {
			return r
		}
	}
	return nil
}

func (l *loader) egress(n node) (plan.Policy, []*policy.Preset, *rules) {
	p := plan.Policy{Proxy: "auto", Rules: []plan.Rule{}, Roots: []plan.Root{}}
	ms, ok := l.object(n, "proxy", "presets", "allow", "deny", "inspect", "dlp", "roots", "mitmdump")
	if !ok {
		return p, nil, newRules(0)
	}
	if e, ok := ms.get("proxy"); ok {
		p.Proxy = l.enum(e, "auto", "builtin", "pipelock")
	}
	var entries []node
	if e, ok := ms.get("allow"); ok {
		entries = l.list(e)
	}
	rs := newRules(len(entries))
	for _, e := range entries {
		l.allow(e, rs)
	}
	var presets []*policy.Preset
	if e, ok := ms.get("presets"); ok {
		presets = l.presets(e, rs)
	}
	allowed := len(rs.list)
	if e, ok := ms.get("deny"); ok {
		for _, entry := range l.list(e) {
			l.deny(entry, rs)
		}
	}
	if e, ok := ms.get("inspect"); ok {
		l.inspect(e, rs)
	}
	if e, ok := ms.get("dlp"); ok {
		l.dlp(e, rs)
	}
	if e, ok := ms.get("roots"); ok {
		p.Roots = l.roots(e)
	}
	if e, ok := ms.get("mitmdump"); ok {
		p.Mitmdump = l.mitmdump(e)
	}
	if p.Proxy == "pipelock" && allowed > MaxPipelockHosts {
		l.bad(n, "too_many_hosts", "%d hosts are more than pipelock takes (%d)", `set "proxy" to "builtin", or allow fewer hosts`, allowed, MaxPipelockHosts)
	}
	p.Rules = rs.list
	return p, presets, rs
}

// allow reads one entry of the allowlist: a string, or an object.
func (l *loader) allow(n node, rs *rules) {
	r := plan.Rule{Verdict: "allow", Protocol: "tls", From: l.from(n)}
	if n.v.Value.Kind() != '{' {
		if !l.host(n, &r, policy.Normalize) {
			return
		}
		r.Ports = defaultPorts["tls"]
		l.addRule(n, r, rs)
		return
	}
	ms, ok := l.object(n, "host", "cidr", "ports", "protocol", "addresses", "requests", "why")
	if !ok || !l.ruleTarget(n, ms, &r, policy.Normalize) {
		return
	}
	if e, ok := ms.get("protocol"); ok {
		r.Protocol = l.enum(e, policy.Protocols...)
	}
	r.Ports = l.ports(n, ms, r.Protocol)
	if e, ok := ms.get("requests"); ok {
		if r.Protocol != "http" {
			l.bad(e, "bad_entry", "requests stand in an entry of protocol http, or of egress.inspect",
				fmt.Sprintf(`write it in egress.inspect: { "host": %q, "requests": [ … ] }`, r.Host))
			return
		}
		r.Requests, r.RequestsFrom = l.requests(e)
	}
	if e, ok := ms.get("addresses"); ok {
		r.Addresses = l.addresses(e, &r)
	}
	if e, ok := ms.get("why"); ok {
		r.Why, _ = l.text(e)
	}
	if len(r.Ports) > 0 {
		l.addRule(n, r, rs)
	}
}

// host reads a string as the target of a rule.
func (l *loader) host(n node, r *plan.Rule, normalize func(string) (policy.Entry, error)) bool {
	s, ok := l.str(n)
	if !ok {
		return false
	}
	e, err := normalize(s)
	if err != nil {
		l.badErr(n, err)
		return false
	}
	r.Host, r.CIDR, r.Class = e.Host, e.CIDR(), e.Class
	return true
}

// ruleTarget reads the one of host and cidr that an entry has.
func (l *loader) ruleTarget(n node, ms members, r *plan.Rule, normalize func(string) (policy.Entry, error)) bool {
	host, isHost := ms.get("host")
	cidr, isCIDR := ms.get("cidr")
	if isHost == isCIDR {
		l.bad(n, "bad_entry", "an entry has either a host or a cidr", `write "host" for a name, "cidr" for addresses`)
		return false
	}
	if isHost {
		return l.host(host, r, normalize)
	}
	if !l.host(cidr, r, normalize) {
		return false
	}
	if r.Host != "" {
		l.bad(cidr, "bad_cidr", "%s is a name", fmt.Sprintf(`write "host": %q`, r.Host), quote(r.Host))
		return false
	}
	return true
}

// defaultPorts are those of a protocol; tcp has none. Rules share them: nobody
// changes the ports of a rule.
var defaultPorts = map[string][]int{"tls": {443}, "http": {80}, "ssh": {22}}

func (l *loader) ports(n node, ms members, protocol string) []int {
	e, ok := ms.get("ports")
	if !ok {
		if protocol == "tcp" {
			l.bad(n, "bad_entry", "protocol tcp has no port of its own", `add "ports"`)
		}
		return defaultPorts[protocol]
	}
	nodes := l.list(e)
	if kind(e) == "an array" && len(nodes) == 0 {
		l.bad(e, "bad_port", "is empty", "name the ports, or remove the member to get the default")
	}
	var out []int
	for _, p := range nodes {
		text := ""
		if p.v.Value.Kind() == '0' {
			text = string(p.v.Pack())
		}
		v, err := strconv.Atoi(strings.TrimSpace(text))
		switch {
		case text == "":
			l.wrongType(p, "a whole number")
		case err != nil || policy.CheckPort(v) != nil:
			l.bad(p, "bad_port", "%s is no port", "ports go from 1 to 65535", quote(strings.TrimSpace(text)))
		case slices.Contains(out, v):
			l.bad(p, "bad_port", "port %d stands twice", "keep one of the two", v)
		default:
			out = append(out, v)
		}
	}
	slices.Sort(out)
	return out
}

func (l *loader) addresses(n node, r *plan.Rule) []string {
	if r.CIDR != "" {
		l.bad(n, "bad_entry", "addresses pin a name, and this entry has none", `remove "addresses", or write "host"`)
		return nil
	}
	nodes := l.list(n)
	if kind(n) == "an array" && len(nodes) == 0 {
		l.bad(n, "bad_address", "is empty", "name the addresses, or remove the member to resolve the name")
	}
	var ips []netip.Addr
	for _, e := range nodes {
		s, ok := l.str(e)
		if !ok {
			continue
		}
		ip, err := policy.NormalizeAddress(s)
		switch {
		case err != nil:
			l.badErr(e, err)
		case slices.Contains(ips, ip):
			l.bad(e, "bad_address", "%s stands twice", "keep one of the two", ip)
		default:
			ips = append(ips, ip)
		}
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	out := make([]string, len(ips))
	for i, ip := range ips {
		out[i] = ip.String()
	}
	return out
}

// addRule takes an allow rule in. What an earlier entry has opened already in
// the same way is left out; two entries that want different things of one
// endpoint are refused.
func (l *loader) addRule(n node, r plan.Rule, rs *rules) {
	key := r.Host + r.CIDR
	if _, again := rs.last[key]; !again {
		rs.add(r)
		return
	}
	var ports []int
	for _, p := range r.Ports {
		old := rs.opened(key, p)
		if old == nil {
			ports = append(ports, p)
			continue
		}
		if old.Protocol != r.Protocol || !slices.Equal(old.Addresses, r.Addresses) || !slices.Equal(old.Requests, r.Requests) {
			l.bad(n, "conflicting_rules", "contradicts %s about %s port %d", "keep one of the two", old.From, key, p)
			return
		}
	}
	if len(ports) == 0 {
		return
	}
	if rs.count(key) == policy.MaxPerHost {
		l.bad(n, "too_many_entries", "%s has more than %d entries", "put the ports of a host into one entry", key, policy.MaxPerHost)
		return
	}
	r.Ports = ports
	rs.add(r)
}

func (rs *rules) add(r plan.Rule) {
	key := r.Host + r.CIDR
	before, ok := rs.last[key]
	if !ok {
		before = -1
	}
	rs.last[key] = int32(len(rs.list))
	rs.list = append(rs.list, r)
	rs.before = append(rs.before, before)
}

// presets adds their rules. An entry of allow takes the place of a preset's
// rule for the same host and port: that is how a host of a preset is pinned to
// an address.
func (l *loader) presets(n node, rs *rules) []*policy.Preset {
	var out []*policy.Preset
	for _, e := range l.list(n) {
		name, ok := l.str(e)
		if !ok {
			continue
		}
		p, ok := policy.PresetByName(name)
		if !ok {
			hint := "the presets are " + strings.Join(policy.PresetNames(), ", ")
			if k := nearest(name, policy.PresetNames()); k != "" {
				hint = fmt.Sprintf("did you mean %q?", k)
			}
			l.bad(e, "unknown_preset", "there is no preset %s", hint, quote(name))
			continue
		}
		if slices.Contains(out, p) {
			l.bad(e, "bad_value", "preset %s stands twice", "keep one of the two", name)
			continue
		}
		out = append(out, p)
		for _, pr := range p.Rules {
			if rs.opened(pr.Host, 443) == nil {
				rs.add(plan.Rule{Host: pr.Host, Ports: []int{443}, Protocol: "tls", Verdict: "allow",
					Class: policy.ClassExact, Why: pr.Why, From: "preset " + p.Name})
			}
		}
	}
	return out
}

func (l *loader) deny(n node, rs *rules) {
	r := plan.Rule{Verdict: "deny", Protocol: "any", Ports: []int{}, From: l.from(n)}
	if n.v.Value.Kind() != '{' {
		if l.host(n, &r, policy.NormalizeDeny) {
			rs.list = append(rs.list, r)
		}
		return
	}
	ms, ok := l.object(n, "host", "cidr", "ports", "why")
	if !ok || !l.ruleTarget(n, ms, &r, policy.NormalizeDeny) {
		return
	}
	if _, ok := ms.get("ports"); ok {
		r.Ports = l.ports(n, ms, "any")
	}
	if e, ok := ms.get("why"); ok {
		r.Why, _ = l.text(e)
	}
	// A list of ports that could not be read must not become "every port".
	if _, ok := ms.get("ports"); ok && len(r.Ports) == 0 {
		return
	}
	rs.list = append(rs.list, r)
}

// inspect marks the tls rules of hosts whose traffic the gate is to read, and
// says which requests of theirs are allowed.
func (l *loader) inspect(n node, rs *rules) {
	first := map[string]string{}
	for _, e := range l.list(n) {
		var r plan.Rule
		if !l.inspectEntry(e, &r) {
			continue
		}
		switch from, again := first[r.Host]; {
		case again:
			l.bad(e, "conflicting_rules", "%s stands in %s already", "keep one of the two", quote(r.Host), from)
		case !rs.markInspected(r.Host):
			l.bad(e, "not_allowed", "%s is not a tls host of the allowlist", rs.suggest(r.Host), quote(r.Host+r.CIDR))
		default:
			first[r.Host] = l.from(e)
			rs.limit(r.Host, r.Requests, r.RequestsFrom)
		}
	}
}

// inspectEntry reads an entry: a string, or an object.
func (l *loader) inspectEntry(n node, r *plan.Rule) bool {
	if n.v.Value.Kind() != '{' {
		return l.host(n, r, policy.Normalize)
	}
	ms, ok := l.object(n, "host", "requests")
	if !ok {
		return false
	}
	if e, ok := ms.get("requests"); ok {
		r.Requests, r.RequestsFrom = l.requests(e)
	}
	e, ok := l.required(n, ms, "host")
	return ok && l.host(e, r, policy.Normalize)
}

// requests reads the HTTP requests that a rule allows, and where they stand. In
// the plan they are sorted: their order means nothing.
func (l *loader) requests(n node) (list []string, from string) {
	nodes := l.list(n)
	switch {
	case kind(n) == "an array" && len(nodes) == 0:
		l.bad(n, "bad_request_entry", "is empty", "name the requests, remove the member to allow every one, or take the host out of egress.allow")
	case len(nodes) > policy.MaxRequests:
		l.bad(n, "bad_request_entry", "holds more than %d entries", "a * at the end stands for the rest of a path", policy.MaxRequests)
		return nil, ""
	}
	for _, e := range nodes {
		s, ok := l.str(e)
		if !ok {
			continue
		}
		r, err := policy.NormalizeRequest(s)
		switch {
		case err != nil:
			l.badErr(e, err)
		case slices.Contains(list, r):
			l.bad(e, "bad_request_entry", "%s stands twice", "keep one of the two", quote(r))
		default:
			list = append(list, r)
		}
	}
	slices.Sort(list)
	return list, l.from(n)
}

// markInspected sets inspect on the tls rules of a host, and tells if there are
// any.
func (rs *rules) markInspected(host string) bool {
	found := false
	for r := range rs.of(host) {
		if host != "" && r.Protocol == "tls" {
			r.Inspect, found = true, true
		}
	}
	return found
}

// limit sets the requests of the tls rules of a host.
func (rs *rules) limit(host string, requests []string, from string) {
	for r := range rs.of(host) {
		if r.Protocol == "tls" {
			r.Requests, r.RequestsFrom = requests, from
		}
	}
}

// suggestFrom bounds the search for a host that was meant.
const suggestFrom = 1000

func (rs *rules) suggest(host string) string {
	var hosts []string
	for i := range rs.list {
		if r := &rs.list[i]; r.Verdict == "allow" && r.Protocol == "tls" && r.Host != "" && len(hosts) < suggestFrom {
			hosts = append(hosts, r.Host)
		}
	}
	if h := nearest(host, hosts); h != "" {
		return fmt.Sprintf("did you mean %q?", h)
	}
	return fmt.Sprintf("add %q to egress.allow", host)
}

func (l *loader) roots(n node) []plan.Root {
	out := []plan.Root{}
	for _, e := range l.list(n) {
		r, ok := l.rootFile(e)
		if ok && slices.ContainsFunc(out, func(o plan.Root) bool { return o.Path == r.Path }) {
			l.bad(e, "bad_root", "%s stands twice", "keep one of the two", quote(r.Path))
			continue
		}
		if ok {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b plan.Root) int { return strings.Compare(a.Path, b.Path) })
	return out
}

// mitmdump reads the sidecar: the addons in the order in which they are run.
func (l *loader) mitmdump(n node) *plan.Mitmdump {
	m := &plan.Mitmdump{Addons: []plan.Addon{}}
	ms, ok := l.object(n, "addons")
	if !ok {
		return m
	}
	list, ok := l.required(n, ms, "addons")
	if !ok {
		return m
	}
	nodes := l.list(list)
	if kind(list) == "an array" && len(nodes) == 0 {
		l.bad(list, "bad_addon", "is empty", `name a Python file with an addon, or remove "mitmdump"`)
	}
	for _, e := range nodes {
		p, ok := l.hostPath(e)
		if !ok {
			continue
		}
		data, err := l.read(p)
		switch {
		case err != nil:
			l.badErr(e, err)
		case !strings.HasSuffix(p, ".py"):
			l.bad(e, "bad_addon", "%s is no Python file", "name a file that ends in .py: mitmdump loads addons by that", quote(p))
		case slices.ContainsFunc(m.Addons, func(a plan.Addon) bool { return a.Path == p }):
			l.bad(e, "bad_addon", "%s stands twice", "keep one of the two", quote(p))
		default:
			m.Addons = append(m.Addons, plan.Addon{Path: p, SHA256: plan.SHA256(data)})
		}
	}
	return m
}

// seesSomething refuses a sidecar that no request would ever reach.
func (l *loader) seesSomething(n node, p *plan.Policy) {
	if p.Mitmdump != nil && len(p.Mitmdump.Addons) > 0 && !slices.ContainsFunc(p.Rules, func(r plan.Rule) bool { return r.Inspect }) {
		l.bad(n, "bad_addon", "mitmdump sees inspected hosts only, and none is", `name one in "inspect", or remove "mitmdump"`)
	}
}
