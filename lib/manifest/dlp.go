package manifest

import (
	"slices"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// dlp reads the exceptions from data loss prevention: which of its rules do not
// count for which host of the allowlist.
func (l *loader) dlp(n node, rs *rules) {
	first := map[string]string{}
	for _, e := range l.list(n) {
		ms, ok := l.object(e, "host", "allow")
		if !ok {
			continue
		}
		host, okHost := l.required(e, ms, "host")
		allow, okAllow := l.required(e, ms, "allow")
		if !okHost || !okAllow {
			continue
		}
		var r plan.Rule
		okHost = l.host(host, &r, policy.Normalize)
		ids := l.dlpRules(allow)
		if !okHost || len(ids) == 0 {
			continue
		}
		key := r.Host + r.CIDR
		switch from, again := first[key]; {
		case again:
			l.bad(e, "conflicting_rules", "%s stands in %s already", "name all rules of a host in one entry", quote(key), from)
		case rs.count(key) == 0:
			l.bad(host, "not_allowed", "%s is no entry of the allowlist", rs.suggest(key), quote(key))
		default:
			first[key] = l.from(e)
			for rule := range rs.of(key) {
				rule.DLPAllow, rule.DLPAllowFrom = ids, l.from(allow)
			}
		}
	}
}

// dlpRules reads names of rules. In the plan they are sorted: their order means
// nothing.
func (l *loader) dlpRules(n node) []string {
	nodes := l.list(n)
	if kind(n) == "an array" && len(nodes) == 0 {
		l.bad(n, "unknown_dlp_rule", "is empty", `name the rules that do not count, or remove the entry`)
	}
	var ids []string
	for _, e := range nodes {
		id, ok := l.str(e)
		if !ok {
			continue
		}
		err := policy.CheckDLPRule(id)
		switch {
		case err != nil:
			if near := nearest(id, policy.DLPRules()); near != "" {
				err = fault.As(err).WithHint("did you mean %q?", near)
			}
			l.badErr(e, err)
		case slices.Contains(ids, id):
			l.bad(e, "bad_value", "%s stands twice", "keep one of the two", quote(id))
		default:
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}
