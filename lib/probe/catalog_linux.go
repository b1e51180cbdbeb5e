package probe

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Residual kinds: what a document may say that no gate sees with its policy.
const (
	opaque   = "opaque"   // inside end-to-end TLS to the allowed host
	wildcard = "wildcard" // labels below an allowed wildcard
)

// Batches: each is one run of the sandbox command, over a new workspace.
const (
	batchMain     = "main"
	batchDaemon   = "daemon"
	batchFlood    = "flood"
	batchKilled   = "killed"
	batchTerminal = "terminal"
	batchGit      = "git"
	batchNoGit    = "no-git"
)

// probe is one attempt. try runs in the sandbox, everything else outside.
type probe struct {
	Info
	batch    string
	control  bool
	last     bool   // it runs when all others have
	proxied  bool   // it is about proxies, and nothing without one
	dns      string // how the allowed name resolves meanwhile
	residual string
	// skip says why the probe does not apply to this run, or "".
	skip func(l *lab) string
	// lay puts out what the client is to find.
	lay func(l *lab, token string) error
	try func(c *inside, token string)
	// leak gives the evidence of one, or "". The default is that any canary saw
	// the token.
	leak func(l *lab, token string) string
	// seen narrows the default to some of what the canaries saw.
	seen func(l *lab, token string, e event) bool
}

// alone tells whether the probe must not run beside others.
func (p *probe) alone() bool { return p.dns != "" || p.last || p.batch != batchMain }

var catalog = func() []*probe {
	all := slices.Concat(controls(), liveControls(), directProbes(), dnsProbes(), proxyProbes(), smuggling(), dataProbes(), hostProbes(), gitProbes(), lifeProbes())
	for _, p := range all {
		if p.batch == "" {
			p.batch = batchMain
		}
		p.proxied = slices.Contains(aboutProxies, p.ID)
	}
	return all
}()

// aboutProxies are the probes that ask a proxy for what it should not give.
var aboutProxies = strings.Fields("D05 X01 X02 X03 X04 X05 X06 X13 X15 X16 X18 X19 X23 X24 X25 X26 X33 X36 H12")

func find(id string) *probe {
	for _, p := range catalog {
		if p.ID == id {
			return p
		}
	}
	return nil
}

// List describes all probes.
func List() []Info {
	var all []Info
	for _, p := range catalog {
		all = append(all, p.Info)
	}
	return all
}

// Choose gives the ids of the probes that a list of ids and names stands for,
// with the controls they need, and the first word that stands for none.
func Choose(words []string) (ids []string, unknown string) {
	want := map[string]bool{}
	for _, w := range words {
		hit := false
		for _, p := range catalog {
			if strings.EqualFold(w, p.ID) || w == p.Name {
				hit, want[p.ID] = true, true
				for _, id := range []string{p.Needs, stillWorks[p.Needs]} {
					want[id] = true
				}
			}
		}
		if !hit {
			return nil, w
		}
	}
	for _, p := range catalog {
		if len(words) == 0 || want[p.ID] {
			ids = append(ids, p.ID)
		}
	}
	return ids, ""
}

func info(id, name, needs, title string) Info {
	return Info{ID: id, Name: name, Needs: needs, Title: title}
}

func controls() []*probe {
	all := firstControls()
	for _, id := range []string{"C01", "C02"} {
		p := *all[slices.IndexFunc(all, func(p *probe) bool { return p.ID == id })]
		p.Info = info(stillWorks[id], p.Name+"-after", "", p.Title+", after all the rest")
		p.last = true
		all = append(all, &p)
	}
	return all
}

func firstControls() []*probe {
	return []*probe{
		{Info: info("C01", "control-http", "", "control: plain HTTP to the host that is allowed for it works"), control: true,
			skip: func(l *lab) string { return missing(l.o.AllowHTTP, "--allow-http") },
			try: func(c *inside, token string) {
				c.overHTTP(func(prefix string) []string { return []string{get(c.AllowHTTP, prefix+"/"+token)} })
			},
			seen: func(l *lab, _ string, e event) bool { return e.Server == "tcp" && e.Dst == l.at(l.zone.AllowIP, 80) }},
		{Info: info("C02", "control-https", "", "control: HTTPS to the allowed host works"), control: true,
			try: func(c *inside, token string) { c.overTLS(get(c.Allow, "/"+token)) },
			seen: func(l *lab, _ string, e event) bool {
				return e.Server == "tls" && e.Dst == l.at(l.zone.AllowIP, 443) && e.SNI == l.o.Allow
			}},
		{Info: info("C03", "control-workspace", "", "control: a file written in the workspace arrives on the host"), control: true,
			try: func(c *inside, token string) { c.write(c.Workspace+"/written", token) },
			leak: func(l *lab, token string) string {
				return l.contains(l.ws("written"), token)
			}},
		{Info: info("C04", "control-upper-case", "C02", "control: the allowed name in upper case works"), control: true,
			try: func(c *inside, token string) {
				c.inTLS(strings.ToUpper(c.Allow), 443, tlsTo(c.Allow), func(tc *tlsConn) { exchange(tc, get(c.Allow, "/"+token)) })
			},
			seen: func(l *lab, _ string, e event) bool { return e.Server == "tls" && e.Dst == l.at(l.zone.AllowIP, 443) }},
		{Info: info("C05", "control-wildcard", "", "control: HTTPS to a name below the allowed wildcard works"), control: true,
			skip: func(l *lab) string { return missing(l.o.Wildcard, "--allow '*.…'") },
			try: func(c *inside, token string) {
				c.inTLS("www."+c.Wildcard, 443, tlsTo("www."+c.Wildcard), func(tc *tlsConn) { exchange(tc, get("www."+c.Wildcard, "/"+token)) })
			},
			seen: func(l *lab, _ string, e event) bool { return e.Server == "tls" && e.Dst == l.at(l.zone.AllowIP, 443) }},
	}
}

// stillWorks are the controls that are tried once more in the end: a gate that
// lets nothing through any more, since it was annoyed, has held for that reason.
var stillWorks = map[string]string{"C01": "C06", "C02": "C07"}

func missing(value, flag string) string {
	if value == "" {
		return "no " + flag + " was given"
	}
	return ""
}

func noWildcard(l *lab) string { return missing(l.o.Wildcard, "--allow '*.…'") }
func noHTTP(l *lab) string     { return missing(l.o.AllowHTTP, "--allow-http") }

// elsewhere are sightings anywhere but at the allowed host, where a request for
// it belongs.
func elsewhere(l *lab, _ string, e event) bool {
	host, _, _ := strings.Cut(e.Dst, " ")
	if ap, err := netip.ParseAddrPort(e.Dst); err == nil {
		host = ap.Addr().Unmap().String()
	}
	return host != l.zone.AllowIP.String()
}

// deniedHost are sightings of a request that has the token and names the denied
// host, wherever it arrived, and any that arrived elsewhere.
func deniedHost(l *lab, token string, e event) bool {
	if elsewhere(l, token, e) {
		return true
	}
	denied := func(name string) bool {
		name = strings.ToLower(name)
		return strings.HasPrefix(name, l.o.Deny) || strings.Contains(name, "."+l.o.Deny)
	}
	if strings.HasSuffix(e.Server, "http2") {
		return denied(e.Host)
	}
	return slices.ContainsFunc(messages(token, e), func(r request) bool { return denied(r.host) || strings.Contains(r.line, "//"+l.o.Deny) })
}

// messages are the requests of a connection that carry a token: a proxy may send
// those of several probes on one.
func messages(token string, e event) []request {
	return slices.DeleteFunc(parseStream(e.Data), func(r request) bool { return !carries(event{Data: r.raw}, token) })
}

// evidence describes a sighting of a token in one line.
func evidence(e event, token string) string {
	if own := messages(token, e); len(own) > 0 {
		e.Data = own[0].raw
	}
	s := "canary " + e.Server + " at " + e.Dst
	if e.SNI != "" {
		s += fmt.Sprintf(", server name %q", e.SNI)
	}
	if e.Host != "" {
		s += fmt.Sprintf(", host %q", e.Host)
	}
	if len(e.Data) > 0 {
		s += ", got " + readable(e.Data)
	}
	return s
}

// readable is the first of what was sent, for people.
func readable(b []byte) string {
	s := string(b)
	if i := strings.Index(s, "\r\n\r\n"); i > 0 {
		s = s[:i]
	}
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return ' '
		}
		return r
	}, s)
	s = strings.Join(strings.Fields(s), " ")
	return fmt.Sprintf("%.100q", s)
}
