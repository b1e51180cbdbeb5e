// Package pipelock is the one adapter to pipelock, the egress proxy that can
// stand behind a bottle's gate: yaml.go and derive.go are a pure producer of
// its configuration, run.go is the only place that executes the program.
//
// Written against pipelock 2.3 (configuration schema of the 2.2 line and
// later, which refuses unknown keys); testscripts/transcripts/pipelock holds
// recordings of how that version answers.
//
// Division of work. The gate stays in front and decides first: pipelock knows
// no ports, its "*.x" also matches x itself, and it cannot pin a name to an
// address. pipelock is the second, independent look at what the gate lets
// through over TLS and plain HTTP: allowlist, SNI, addresses at dial time, and
// secrets in URLs, headers and bodies that travel in the clear. See Carries for
// what goes through it and what leaves from the gate.
package pipelock

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"go.yaml.in/yaml/v3"
)

// MaxHosts is how many allowlist entries pipelock is given at most: it scans
// its list linearly for every request (0.7 ms CPU for a short list, 2 ms at
// 10,000 entries, 13 ms at 100,000).
const MaxHosts = 2000

// The numbers that differ from pipelock's defaults, which are made for a
// fetch tool and not for an agent's whole traffic.
const (
	requestTimeoutSeconds  = 300
	maxURLLength           = 8192
	maxRequestsPerMinute   = 6000 // per registrable domain, tunnels count; 60 by default
	entropyThreshold       = 5.5  // bits a character; hashes in URLs stay below
	subdomainEntropy       = 5.0
	maxTunnelSeconds       = 86400 // default 300 would cut long model streams
	idleTimeoutSeconds     = 900
	maxBodyBytes           = 1 << 20 // its scan costs seconds of CPU per MiB
	maxResponseMB          = 64      // a longer plain-HTTP answer is cut off
	maxServerSentEventSize = 1 << 20
)

// config is the part of pipelock's configuration that the bottle tools write.
// The fields marked "run" are absent from the policy in a document and are set
// by RunYAML.
type config struct {
	Version      int      `yaml:"version"`
	Mode         string   `yaml:"mode"`    // only strict enforces api_allowlist
	Enforce      bool     `yaml:"enforce"` // false would log and let pass
	Explain      bool     `yaml:"explain_blocks"`
	Agent        string   `yaml:"default_agent_identity"`      // run: the instance
	BindAgent    bool     `yaml:"bind_default_agent_identity"` // else a header sets the logged agent
	APIAllowlist []string `yaml:"api_allowlist"`
	// Internal replaces pipelock's default list, of which it is a superset.
	Internal     []string     `yaml:"internal"`
	FetchProxy   fetchProxy   `yaml:"fetch_proxy"`
	ForwardProxy forwardProxy `yaml:"forward_proxy"`
	WebSocket    onOff        `yaml:"websocket_proxy"` // its /ws endpoint; wss through CONNECT needs none
	DLP          dlp          `yaml:"dlp"`
	RequestBody  requestBody  `yaml:"request_body_scanning"`
	Response     response     `yaml:"response_scanning"`
	TLS          onOff        `yaml:"tls_interception"` // the gate inspects; pipelock's takes seconds a MiB
	Taint        onOff        `yaml:"taint"`
	Logging      logging      `yaml:"logging"`
	Metrics      string       `yaml:"metrics_listen,omitempty"` // run
	KillSwitch   *killSwitch  `yaml:"kill_switch,omitempty"`    // run
	Emit         *emit        `yaml:"emit,omitempty"`           // run
}

type onOff struct {
	Enabled bool `yaml:"enabled"`
}

type fetchProxy struct {
	Listen         string     `yaml:"listen,omitempty"` // run
	TimeoutSeconds int        `yaml:"timeout_seconds"`
	MaxResponseMB  int        `yaml:"max_response_mb"`
	Monitoring     monitoring `yaml:"monitoring"`
}

type monitoring struct {
	MaxURLLength         int      `yaml:"max_url_length"`
	EntropyThreshold     float64  `yaml:"entropy_threshold"`
	SubdomainEntropy     float64  `yaml:"subdomain_entropy_threshold"`
	MaxRequestsPerMinute int      `yaml:"max_requests_per_minute"`
	Blocklist            []string `yaml:"blocklist"`
}

type forwardProxy struct {
	Enabled            bool `yaml:"enabled"`
	MaxTunnelSeconds   int  `yaml:"max_tunnel_seconds"`
	IdleTimeoutSeconds int  `yaml:"idle_timeout_seconds"`
	SNIVerification    bool `yaml:"sni_verification"`
}

type dlp struct {
	ScanEnv         bool `yaml:"scan_env"` // of pipelock's own environment, which is empty
	IncludeDefaults bool `yaml:"include_defaults"`
}

type requestBody struct {
	Enabled      bool   `yaml:"enabled"`
	Action       string `yaml:"action"`
	MaxBodyBytes int    `yaml:"max_body_bytes"`
	ScanHeaders  bool   `yaml:"scan_headers"`
	HeaderMode   string `yaml:"header_mode"`
}

// response stays enabled: disabling it makes a hit of the patterns that cannot
// be switched off a block instead of a warning (measured on 2.3.0).
type response struct {
	Enabled      bool         `yaml:"enabled"`
	Action       string       `yaml:"action"`
	SSEStreaming sseStreaming `yaml:"sse_streaming"`
}

type sseStreaming struct {
	Enabled       bool   `yaml:"enabled"`
	Action        string `yaml:"action"`
	MaxEventBytes int    `yaml:"max_event_bytes"`
}

type logging struct {
	Format         string `yaml:"format"`
	Output         string `yaml:"output"`
	IncludeAllowed bool   `yaml:"include_allowed"`
	IncludeBlocked bool   `yaml:"include_blocked"`
}

type killSwitch struct {
	SentinelFile string `yaml:"sentinel_file"`
}

type emit struct {
	InstanceID string `yaml:"instance_id"`
}

// Carries tells whether traffic of an allow rule goes through pipelock. What it
// cannot hold leaves from the gate, which checks and dials it itself:
//
//   - protocol ssh and tcp: pipelock closes what does not start with TLS;
//   - names pinned by addresses: pipelock resolves by itself;
//   - ranges: pipelock's list takes single addresses only;
//   - private, loopback and other special addresses: pipelock could open them
//     only by ssrf.ip_allowlist, on every port and for every allowed name that
//     resolves there, which is more than the rule says;
//   - http rules with requests: pipelock follows redirects by itself, to paths
//     that no request of the rule may name.
func Carries(r plan.Rule) bool {
	if r.Verdict != "allow" || (r.Protocol != "tls" && r.Protocol != "http") || len(r.Addresses) > 0 {
		return false
	}
	if r.Protocol == "http" && len(r.Requests) > 0 {
		return false
	}
	if r.CIDR == "" {
		return true
	}
	p, err := netip.ParsePrefix(r.CIDR)
	return err == nil && p.IsSingleIP() && !special(p.Addr())
}

// YAML gives pipelock's configuration for the rules of b that it carries, as
// strict as pipelock can be made and deterministic: entries are sorted, and
// ports, files and identities are left to RunYAML.
//
// Errors are faults 65: a rule that is not normal (at
// bottle.egress.rules[i].host), no rule that pipelock carries (code
// allowlist_empty, as pipelock has no such configuration), more than MaxHosts
// of them (too_many_hosts), a deny rule that it cannot hold (range_with_ports).
func YAML(b *plan.Bottle) ([]byte, error) {
	c, err := configure(b.Egress.Rules)
	if err != nil {
		return nil, err
	}
	switch n := len(c.APIAllowlist); {
	case n == 0:
		return nil, errEmpty()
	case n > MaxHosts:
		return nil, errTooMany(n)
	}
	if i := unheld(b.Egress.Rules); i >= 0 {
		return nil, errUnheld(i, b.Egress.Rules)
	}
	return encode(c)
}

func errEmpty() *fault.Error {
	return fault.New(fault.Data, "allowlist_empty", "no allow rule goes through pipelock, and pipelock has no configuration that allows nothing").
		At("bottle.egress.rules").
		WithHint("allow a host over tls or http in the manifest; without one the gate denies everything and needs no proxy")
}

func errTooMany(n int) *fault.Error {
	return fault.New(fault.Data, "too_many_hosts", "%d hosts are more than the %d that pipelock is given, as it searches its list linearly for every request", n, MaxHosts).
		At("bottle.egress.rules").
		WithHint(`use "proxy": "builtin", which has no such limit, or replace hosts by a wildcard`)
}

// configure turns the rules into a configuration, without the limits on their
// number.
func configure(rules []plan.Rule) (config, error) {
	allow, deny, ranges := []string{}, []string{}, specialRanges()
	for i, r := range rules {
		entry, err := entry(r)
		if err != nil {
			return config{}, at(err, i, r)
		}
		switch {
		case Carries(r):
			allow = append(allow, entry)
		case r.Verdict != "deny" || len(r.Ports) > 0:
			// The gate's own business: pipelock knows no ports.
		case r.CIDR != "":
			ranges = append(ranges, r.CIDR)
		default:
			deny = append(deny, entry)
		}
	}
	allow = sorted(allow)
	return config{
		Version:      1,
		Mode:         "strict",
		Enforce:      true,
		Agent:        "bottle",
		BindAgent:    true,
		APIAllowlist: allow,
		Internal:     unique(ranges),
		FetchProxy: fetchProxy{
			TimeoutSeconds: requestTimeoutSeconds,
			MaxResponseMB:  maxResponseMB,
			Monitoring: monitoring{
				MaxURLLength:         maxURLLength,
				EntropyThreshold:     entropyThreshold,
				SubdomainEntropy:     subdomainEntropy,
				MaxRequestsPerMinute: maxRequestsPerMinute,
				Blocklist:            blocklist(sorted(deny), allow),
			},
		},
		ForwardProxy: forwardProxy{
			Enabled:            true,
			MaxTunnelSeconds:   maxTunnelSeconds,
			IdleTimeoutSeconds: idleTimeoutSeconds,
			SNIVerification:    true,
		},
		DLP:         dlp{IncludeDefaults: true},
		RequestBody: requestBody{Enabled: true, Action: "block", MaxBodyBytes: maxBodyBytes, ScanHeaders: true, HeaderMode: "all"},
		Response:    response{Enabled: true, Action: "warn", SSEStreaming: sseStreaming{Enabled: true, Action: "warn", MaxEventBytes: maxServerSentEventSize}},
		Logging:     logging{Format: "json", Output: "stdout", IncludeAllowed: true, IncludeBlocked: true},
	}, nil
}

// blocklist drops the denied wildcards whose apex is allowed: pipelock's "*.x"
// means x as well, ours does not, and a name that the policy allows has to
// work. The gate enforces what is dropped here.
func blocklist(deny, allow []string) []string {
	allowed := make(map[string]bool, len(allow))
	for _, a := range allow {
		allowed[a] = true
	}
	reachable := func(apex string) bool {
		if allowed[apex] {
			return true
		}
		for _, parent, ok := strings.Cut(apex, "."); ok; _, parent, ok = strings.Cut(parent, ".") {
			if allowed["*."+parent] {
				return true
			}
		}
		return false
	}
	return slices.DeleteFunc(deny, func(d string) bool {
		apex, wild := strings.CutPrefix(d, "*.")
		return wild && reachable(apex)
	})
}

// entry gives a rule as pipelock's lists want it, and refuses all that pipelock
// would take without a word and then never match: it does not check its lists.
func entry(r plan.Rule) (string, error) {
	switch {
	case (r.Host == "") == (r.CIDR == ""):
		return "", errors.New("a rule names either a host or a cidr")
	case r.Host != "":
		return r.Host, checkHost(r.Host)
	}
	p, err := netip.ParsePrefix(r.CIDR)
	switch {
	case err != nil:
		return "", fmt.Errorf("%q is not a range such as 192.0.2.0/24", r.CIDR)
	case p != p.Masked() || p.String() != r.CIDR || p.Addr().Is4In6():
		return "", fmt.Errorf("%q is not in its normal form", r.CIDR)
	case p.Bits() == 0:
		return "", fmt.Errorf("%q is every address there is", r.CIDR)
	}
	return p.Addr().String(), nil
}

// checkHost accepts a normal host name, which may start with "*.": lower case
// ASCII labels of letters, digits, hyphens and underscores.
func checkHost(host string) error {
	name, wild := strings.CutPrefix(host, "*.")
	labels := strings.Split(name, ".")
	switch {
	case len(name) > 253:
		return fmt.Errorf("%q is longer than the 253 characters of a host name", host)
	case wild && len(labels) < 2:
		return fmt.Errorf("%q is a whole top-level domain", host)
	case isNumber(labels[len(labels)-1]):
		return fmt.Errorf("%q is not a host name; an address goes into cidr", host)
	}
	for _, l := range labels {
		if !isLabel(l) {
			return fmt.Errorf("%q is not a normal host name (lower case, no scheme, port, path or inner *)", host)
		}
	}
	return nil
}

// isNumber tells whether resolvers, and pipelock, read a name that ends in this
// label as an address in one of its number forms.
func isNumber(l string) bool {
	if hex, ok := strings.CutPrefix(l, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return strings.Trim(l, "0123456789") == ""
}

func isLabel(l string) bool {
	if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
		return false
	}
	return strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-_") == ""
}

func at(err error, i int, r plan.Rule) error {
	field := "host"
	if r.CIDR != "" {
		field = "cidr"
	}
	return fault.New(fault.Data, "egress_rule", "%w", err).
		At(fmt.Sprintf("bottle.egress.rules[%d].%s", i, field)).
		WithHint("change the manifest and plan again; bottle-plan writes rules in their normal form")
}

func sorted(s []string) []string {
	slices.Sort(s)
	return slices.Compact(s)
}

// unique keeps the order, which groups the ranges as they are written.
func unique(s []string) []string {
	seen := make(map[string]bool, len(s))
	return slices.DeleteFunc(s, func(x string) bool {
		dup := seen[x]
		seen[x] = true
		return dup
	})
}

func encode(c config) ([]byte, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(c); err != nil {
		return nil, fault.New(fault.Bug, "bug", "pipelock yaml: %w", err)
	}
	if err := e.Close(); err != nil {
		return nil, fault.New(fault.Bug, "bug", "pipelock yaml: %w", err)
	}
	return b.Bytes(), nil
}

// decode reads back what encode wrote, as strictly as pipelock reads it:
// unknown and duplicate keys, other types and a second document are errors.
func decode(y []byte) (config, error) {
	var c config
	d := yaml.NewDecoder(bytes.NewReader(y))
	d.KnownFields(true)
	if err := d.Decode(&c); err != nil {
		return c, err
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return c, errors.New("more than one YAML document")
	}
	return c, nil
}
