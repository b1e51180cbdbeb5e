package plan

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Forms are checked by hand and not by regexp: five patterns cost every tool
// half a millisecond at its start.

const (
	lowerLetters = "abcdefghijklmnopqrstuvwxyz"
	upperLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	digits       = "0123456789"
	hexDigits    = digits + "abcdef"
	// tchar is RFC 9110's, in lower case.
	tchar = lowerLetters + digits + "!#$%&'*+-.^_`|~"
)

// only tells whether s has no character outside set.
func only(s, set string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return !strings.ContainsRune(set, r) }) < 0
}

// isID: [a-z0-9][a-z0-9-]{0,39}
func isID(s string) bool {
	return len(s) >= 1 && len(s) <= 40 && s[0] != '-' && only(s, lowerLetters+digits+"-")
}

// isSHA: sha256:[0-9a-f]{64}
func isSHA(s string) bool {
	sum, ok := strings.CutPrefix(s, "sha256:")
	return ok && len(sum) == 64 && only(sum, hexDigits)
}

// isHeader: a field name of RFC 9110 in lower case.
func isHeader(s string) bool { return s != "" && only(s, tchar) }

// Verbs are the words that no bottle may be called, because they stand where
// an id stands on some command line.
var Verbs = []string{
	"up", "exec", "cp", "ls", "status", "logs", "diff", "stop", "down", "trust", "verify", "doctor",
	"run", "start", "shell", "gc", "plan", "check", "init", "schema", "sign", "yaml", "serve", "explain",
	"allow", "deny", "log", "learn", "replay", "keeper", "help", "version",
}

// CheckID refuses what is no bottle id.
func CheckID(id string) error {
	if !isID(id) {
		return fault.New(fault.Data, "bad_id", "%q is no bottle id", id).
			WithHint("use 1 to 40 of a-z, 0-9 and -, not starting with -")
	}
	if slices.Contains(Verbs, id) {
		return fault.New(fault.Data, "bad_id", "%q is a verb of the tools and cannot name a bottle", id)
	}
	return nil
}

// SplitVMID takes <bottle.id>-<8 hex> apart; ok is false for anything else.
func SplitVMID(id string) (bottle string, ok bool) {
	i := strings.LastIndexByte(id, '-')
	if i < 0 || len(id)-i-1 != 8 || !only(id[i+1:], hexDigits) || !isID(id[:i]) {
		return "", false
	}
	return id[:i], true
}

// ValidEnvName tells whether s can be the name of an environment variable.
func ValidEnvName(s string) bool {
	return s != "" && !strings.Contains(digits, s[:1]) && only(s, lowerLetters+upperLetters+digits+"_")
}

// Validate refuses a bottle section whose values are not of the forms that
// docs/pipeline.md gives. A document can have been edited between stages, so
// every stage validates again.
func (b *Bottle) Validate() error {
	v := validator{}
	if err := CheckID(b.ID); err != nil {
		v.add("id", "%s", fault.As(err).Msg)
	}
	v.want("agent", b.Agent != "", "is empty")
	v.want("manifest.name", b.Manifest.Name != "" && path.Base(b.Manifest.Name) == b.Manifest.Name, "is no file name")
	v.want("manifest.sha256", isSHA(b.Manifest.SHA256), "is not sha256:<64 hex>")
	v.oneOf("runtime.requested", b.Runtime.Requested, "auto", "smolvm", "gvisor")
	v.want("runtime.candidates", len(b.Runtime.Candidates) > 0, "is empty")
	for i, c := range b.Runtime.Candidates {
		v.oneOf(fmt.Sprintf("runtime.candidates[%d].engine", i), c.Engine, "smolvm", "gvisor")
	}
	v.oneOf("image.kind", b.Image.Kind, "host", "path", "reference")
	v.want("image.source", (b.Image.Kind == "host") == (b.Image.Source == ""), "does not fit image.kind")
	v.oneOf("user", b.User, "agent", "root")
	v.oneOf("home", b.Home, "discard", "keep")
	v.oneOf("workspace.mode", b.Workspace.Mode, "rw", "ro", "scratch")
	v.hostPath("workspace.path", b.Workspace.Path)
	for i, m := range b.Mounts {
		at := fmt.Sprintf("mounts[%d]", i)
		v.hostPath(at+".source", m.Source)
		v.want(at+".target", path.IsAbs(m.Target) && path.Clean(m.Target) == m.Target && m.Target != "/" && clean(m.Target), "is not a clean absolute guest path")
		for _, taken := range []string{"/workspace", "/opt/bottle", "/proc", "/dev", "/sys"} {
			v.want(at+".target", m.Target != taken && !strings.HasPrefix(m.Target, taken+"/"), "lies in "+taken+", which is not yours to mount on")
		}
		v.oneOf(at+".mode", m.Mode, "ro", "rw")
	}
	for i, h := range b.Hide {
		_, err := path.Match(h, "x")
		v.want(fmt.Sprintf("hide[%d]", i), h != "" && !strings.Contains(h, "/") && err == nil && clean(h), "is no base-name pattern")
	}
	seen := map[string]bool{}
	for i, e := range b.Env {
		at := fmt.Sprintf("env[%d]", i)
		v.want(at+".name", ValidEnvName(e.Name) && !seen[e.Name], "is no variable name, or stands twice")
		v.want(at+".value", !strings.Contains(e.Value, "\x00"), "holds a NUL byte")
		seen[e.Name] = true
	}
	for i, f := range b.Files {
		v.want(fmt.Sprintf("files[%d].path", i), f.Path != "" && !path.IsAbs(f.Path) && path.Clean(f.Path) == f.Path && f.Path != ".." && !strings.HasPrefix(f.Path, "../") && clean(f.Path), "is no path inside the home")
	}
	r := b.Resources
	v.want("resources", r.CPUs >= 0 && r.MemoryMiB >= 0 && r.Pids >= 0, "has a negative limit")
	v.oneOf("resources.enforcement", r.Enforcement, "", "watched")
	v.oneOf("egress.proxy", b.Egress.Proxy, "auto", "builtin", "pipelock")
	for i, r := range b.Egress.Roots {
		at := fmt.Sprintf("egress.roots[%d]", i)
		v.hostPath(at+".path", r.Path)
		v.want(at+".sha256", isSHA(r.SHA256), "is not sha256:<64 hex>")
	}
	if m := b.Egress.Mitmdump; m != nil {
		v.want("egress.mitmdump.addons", len(m.Addons) > 0, "is empty")
		for i, a := range m.Addons {
			at := fmt.Sprintf("egress.mitmdump.addons[%d]", i)
			v.hostPath(at+".path", a.Path)
			v.want(at+".sha256", isSHA(a.SHA256), "is not sha256:<64 hex>")
		}
	}
	names := map[string]bool{}
	for i, s := range b.Secrets {
		v.secret(fmt.Sprintf("secrets[%d]", i), s)
		v.want(fmt.Sprintf("secrets[%d].name", i), !names[s.Name], "stands twice")
		names[s.Name] = true
	}
	v.want("command", len(b.Command) > 0, "is empty")
	for i, c := range b.Command {
		v.want(fmt.Sprintf("command[%d]", i), !strings.Contains(c, "\x00") && (i > 0 || c != ""), "is empty or holds a NUL byte")
	}
	return v.err
}

func (v *validator) secret(at string, s Secret) {
	v.want(at+".name", ValidEnvName(s.Name), "is no variable name")
	kind, rest, _ := strings.Cut(s.From, ":")
	switch kind {
	case "env":
		v.want(at+".from", ValidEnvName(rest), "names no variable")
	case "file":
		v.hostPath(at+".from", rest)
	case "command":
		v.want(at+".from", rest == "" && len(s.Command) > 0, "has no command")
	default:
		v.add(at+".from", "is not env:NAME, file:PATH or command")
	}
	v.want(at+".command", kind == "command" || len(s.Command) == 0, "stands without from: command")
	v.want(at+".guest_can_read", s.GuestCanRead == "never", "is not never")
	for i, in := range s.Inject {
		v.want(fmt.Sprintf("%s.inject[%d].header", at, i), isHeader(in.Header), "is no header name in lowerLetters case")
		v.want(fmt.Sprintf("%s.inject[%d].host", at, i), in.Host != "", "is empty")
		v.want(fmt.Sprintf("%s.inject[%d].format", at, i), in.Format == "" || strings.Count(in.Format, "{}") == 1 && clean(in.Format), "holds {} not exactly once")
	}
}

type validator struct{ err error }

func (v *validator) add(at, format string, args ...any) {
	if v.err == nil { // the first is enough: a document is not written by hand
		v.err = fault.New(fault.Data, "bad_bottle", format, args...).At("bottle." + at).
			WithHint("docs/pipeline.md gives the form; edit the manifest rather than the document")
	}
}

func (v *validator) want(at string, ok bool, why string) {
	if !ok {
		v.add(at, "%s", why)
	}
}

func (v *validator) oneOf(at, got string, want ...string) {
	if !slices.Contains(want, got) {
		v.add(at, "%q is none of %s", got, strings.Join(want, ", "))
	}
}

func (v *validator) hostPath(at, p string) {
	v.want(at, p != "" && clean(p), "is empty or holds control characters")
}

// clean refuses control characters, which have no place in a path or pattern
// and can disguise what a person reads in a plan.
func clean(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f })
}
