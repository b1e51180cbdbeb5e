// Package plan is the document that travels through the pipe: its gate, its
// typed sections, its version rule, and the stream it comes in.
//
// The wire form is one compact JSON object a line. Members, in order:
// format_version, bottle (bottle-plan), egress (bottle-egress), pack
// (bottle-pack), vm (bottle-vm), diagnostics, x-… (anyone's), error. Every
// section has one owner; what a stage does not own passes through byte for
// byte. docs/pipeline.md is the normative text.
package plan

import "strings"

// FormatVersion is what this version of the tools writes. Readers accept any
// minor of the same major.
const FormatVersion = "1.0"

// Limits of a document, checked before any parser is trusted.
const (
	MaxBytes = 64 << 20
	MaxDepth = 1000
	MaxInt   = 1<<53 - 1
)

// Bottle is the section that people review and edit: the policy. It is
// deterministic: no time, no random id, no host name, no absolute path of the
// machine that planned it. Paths are relative to the manifest's folder, or
// start with ~ (the home of whoever runs up) or / (written so in the manifest).
type Bottle struct {
	ID        string      `json:"id"`    // [a-z0-9][a-z0-9-]{0,39}, not a verb
	Agent     string      `json:"agent"` // name of the agent in the manifest
	Manifest  ManifestRef `json:"manifest"`
	Runtime   Runtime     `json:"runtime"`
	Image     Image       `json:"image"`
	User      string      `json:"user"` // agent | root
	Home      string      `json:"home"` // discard | keep
	Workspace Workspace   `json:"workspace"`
	Mounts    []Mount     `json:"mounts"`
	Hide      []string    `json:"hide"` // base-name globs, built-in list included
	Env       []EnvVar    `json:"env"`  // sorted by name; never a secret's value
	Files     []File      `json:"files"`
	Resources Resources   `json:"resources"`
	Egress    Policy      `json:"egress"`
	Secrets   []Secret    `json:"secrets"`
	Command   []string    `json:"command"`
}

// Environ is Env in the form of execve(2): NAME=VALUE.
func (b *Bottle) Environ() []string {
	env := make([]string, len(b.Env))
	for i, e := range b.Env {
		env[i] = e.Name + "=" + e.Value
	}
	return env
}

// ManifestRef names the manifest a plan came from: base name and the SHA-256 of
// its bytes, as "sha256:<64 hex>".
type ManifestRef struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
}

// Runtime is the wish and the engines that could serve it, best first.
type Runtime struct {
	Requested  string      `json:"requested"` // auto | smolvm | gvisor
	Candidates []Candidate `json:"candidates"`
}

type Candidate struct {
	Engine string `json:"engine"`
	Why    string `json:"why"`
}

// Image says where the root file system comes from. bottle-plan only sorts by
// form; what a path holds (rootfs folder, docker-archive, OCI layout) is found
// by bottle-pack.
type Image struct {
	Kind   string `json:"kind"`             // host | path | reference
	Source string `json:"source,omitempty"` // empty for host
}

// Pinned tells whether the image is one and no other: a reference has to hold a
// digest. A path is whatever lies there, which no plan can pin.
func (i Image) Pinned() bool {
	return i.Kind != "reference" || isSHA(i.Source[strings.LastIndexByte(i.Source, '@')+1:])
}

// Workspace is the folder the agent works in, at /workspace in the guest.
type Workspace struct {
	Path string `json:"path"`
	Mode string `json:"mode"` // rw | ro | scratch
}

// Mount is one more host folder or file in the guest.
type Mount struct {
	Source string `json:"source"`
	Target string `json:"target"` // absolute guest path
	Mode   string `json:"mode"`   // ro | rw
}

type EnvVar struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// File is a small text file that is laid into the guest's home before the agent
// starts, if the home does not have it yet (an agent's first-run settings).
type File struct {
	Path    string `json:"path"` // relative to the guest's home
	Content string `json:"content"`
}

// Resources are limits; zero means none. Enforcement "" asks for a cgroup and
// refuses without one; "watched" lets the keeper sample and kill.
type Resources struct {
	CPUs        int    `json:"cpus,omitzero"`
	MemoryMiB   int    `json:"memory_mib,omitzero"`
	Pids        int    `json:"pids,omitzero"`
	Enforcement string `json:"enforcement,omitempty"`
}

// Policy is what may leave the bottle.
type Policy struct {
	Proxy string `json:"proxy"` // auto | builtin | pipelock
	Rules []Rule `json:"rules"`
	Roots []Root `json:"roots"`
	// Mitmdump reads the requests of inspected hosts on their way; nil: nothing does.
	Mitmdump *Mitmdump `json:"mitmdump,omitempty"`
}

// Mitmdump is the inspection sidecar: mitmproxy's mitmdump, with addons of the
// user's own, in their order.
type Mitmdump struct {
	Addons []Addon `json:"addons"`
}

// Addon is a Python file that runs on the host, pinned by content.
type Addon struct {
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
}

// Rule is one line of the allowlist. Exactly one of Host and CIDR is set. deny
// wins over allow; what no rule names is denied.
type Rule struct {
	Host      string   `json:"host,omitempty"`      // lower case ASCII; "*." prefix is any depth below, not the apex
	CIDR      string   `json:"cidr,omitempty"`      // a single address is /32 or /128
	Ports     []int    `json:"ports"`               // sorted; empty on a deny rule: every port
	Protocol  string   `json:"protocol"`            // tls | http | ssh | tcp; "any" on a deny rule
	Verdict   string   `json:"verdict"`             // allow | deny
	Class     string   `json:"class"`               // exact | wildcard | ipv4 | ipv6 | cidr | private | cgnat
	Addresses []string `json:"addresses,omitempty"` // pins resolution; may be private
	Inspect   bool     `json:"inspect"`
	// Requests are the HTTP requests that an inspected or http rule allows, as
	// "METHOD /path" (policy.NormalizeRequest); without any it allows all.
	Requests     []string `json:"requests,omitempty"`
	RequestsFrom string   `json:"requests_from,omitempty"` // provenance of Requests
	// DLPAllow are the rules of data loss prevention (lib/dlp) by which requests
	// under this rule are not refused; "*" stands for all, and for not looking.
	DLPAllow     []string `json:"dlp_allow,omitempty"`
	DLPAllowFrom string   `json:"dlp_allow_from,omitempty"`
	Why          string   `json:"why,omitempty"`
	From         string   `json:"from"` // provenance: "bottle.json:12:9 bottles.dev.egress.allow[0]" or "preset anthropic"
}

// Root is an extra upstream trust root for the gate, pinned by content.
type Root struct {
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
}

// Secret is a row of the secret-flow table. The value is in no document.
type Secret struct {
	Name         string      `json:"name"` // also the variable that holds a placeholder in the guest
	From         string      `json:"from"` // env:NAME | file:PATH | command
	Command      []string    `json:"command,omitempty"`
	Inject       []Injection `json:"inject"`
	GuestCanRead string      `json:"guest_can_read"` // always "never"
}

// Injection is the one header of the one host that may carry a secret. Format
// holds "{}" where the value goes ("Bearer {}"); empty means the value alone.
type Injection struct {
	Host   string `json:"host"`
	Header string `json:"header"` // lower case
	Format string `json:"format,omitempty"`
}

// Signature is one signature of the bottle section by an SSH key, armoured
// (PROTOCOL.sshsig): what Digest digests, in namespace sign.Namespace.
type Signature struct {
	SSH string `json:"ssh"`
}

// Egress is derived from Bottle.Egress by bottle-egress. up recomputes it and
// refuses a document in which it differs.
type Egress struct {
	Pipelock    *PipelockYAML `json:"pipelock,omitempty"` // absent where pipelock cannot express the policy
	RulesSHA256 string        `json:"rules_sha256"`
	Residual    []string      `json:"residual"` // what this policy cannot see
}

type PipelockYAML struct {
	YAML   string `json:"yaml"`
	SHA256 string `json:"sha256"`
}

// Pack is derived by bottle-pack.
type Pack struct {
	Digest    string `json:"digest"` // "sha256:<hex>" of the packed content; "host" for image host
	Kind      string `json:"kind"`   // host | rootfs | docker-archive | oci-layout | reference
	SizeBytes int64  `json:"size_bytes"`
	Cached    bool   `json:"cached"`
	Smolfile  string `json:"smolfile,omitempty"` // TOML text for engine smolvm
}

// Process is an identity that survives pid reuse: pid alone never is one.
type Process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // clock ticks since boot, /proc/PID/stat field 22
	BootID    string `json:"boot_id"`    // /proc/sys/kernel/random/boot_id
}

// VM is written by bottle-vm up.
type VM struct {
	ID          string      `json:"id"` // <bottle.id>-<8 hex>
	Runtime     string      `json:"runtime"`
	RuntimeWhy  string      `json:"runtime_why"`
	HostUID     int         `json:"host_uid"` // the uid on the host that the guest's writes carry
	StateDir    string      `json:"state_dir"`
	Keeper      Process     `json:"keeper"`
	Gate        GateRef     `json:"gate"`
	Proxy       ProxyRef    `json:"proxy"`
	Sidecar     *SidecarRef `json:"sidecar,omitempty"`
	Enforcement Enforcement `json:"enforcement"`
	Signed      []Signer    `json:"signed,omitempty"` // whose signatures were asked for and found good
	Warm        string      `json:"warm,omitempty"`   // the prepared machine that it is a copy of
	StartedAt   string      `json:"started_at"`       // RFC 3339, UTC
}

// Signer is who has signed a plan: a principal of the allowed signers, and the
// key, as in "ED25519 SHA256:…".
type Signer struct {
	Name string `json:"name"`
	Key  string `json:"key"`
}

type GateRef struct {
	Process
	AuditLog string `json:"audit_log"`
}

type ProxyRef struct {
	Name            string `json:"name"` // builtin | pipelock
	RunConfigSHA256 string `json:"run_config_sha256,omitempty"`
}

// SidecarRef is what reads the requests of inspected hosts, and its digest of
// program settings and addons.
type SidecarRef struct {
	Name            string `json:"name"` // mitmdump
	RunConfigSHA256 string `json:"run_config_sha256"`
}

// Enforcement says how each limit is held: none | cgroup | engine | watched.
type Enforcement struct {
	Memory string `json:"memory"`
	CPUs   string `json:"cpus"`
	Pids   string `json:"pids"`
}

// Diagnostic is a remark for later stages and for people. Append-only.
type Diagnostic struct {
	Stage    string `json:"stage"`
	Severity string `json:"severity"` // info | warning
	Code     string `json:"code"`
	Message  string `json:"message"`
	Path     string `json:"path,omitempty"`
}

// Failure is the error of a stage as data, so that a pipe fails properly under
// a shell without pipefail. Later stages forward it and exit with Exit.
type Failure struct {
	Stage   string `json:"stage"`
	Code    string `json:"code"`
	Exit    int    `json:"exit"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}
