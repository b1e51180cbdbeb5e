package manifest

import (
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// hidden are the base names that no guest sees in its workspace, because they
// usually hold keys. A manifest adds to them, and takes one out with "!".
var hidden = []string{
	"*.jks", "*.kdbx", "*.key", "*.keystore", "*.p12", "*.pem", "*.pfx", "*.ppk",
	".env", ".env.*", ".envrc", ".git-credentials", ".netrc", ".npmrc", ".pgpass", ".pypirc", ".vault-token",
	"id_dsa", "id_ecdsa", "id_ed25519", "id_rsa",
}

// Bounds of resources: more than any host has, and far from overflow.
const (
	maxCPUs      = 1024
	maxMemoryMiB = 16 << 20
	maxPids      = 4 << 20
)

func (l *loader) bottle(n node) *bottle {
	b := &bottle{
		runtime:   "auto",
		image:     plan.Image{Kind: "host"},
		user:      "agent",
		home:      "discard",
		workspace: plan.Workspace{Path: ".", Mode: "rw"},
		hide:      hidden,
		mounts:    []plan.Mount{},
		files:     []plan.File{},
		egress:    plan.Policy{Proxy: "auto", Rules: []plan.Rule{}, Roots: []plan.Root{}},
		secrets:   []plan.Secret{},
	}
	ms, ok := l.object(n, "runtime", "image", "user", "home", "workspace", "hide", "mounts", "env", "resources", "egress", "secrets")
	if !ok {
		return b
	}
	var env []plan.EnvVar
	for _, m := range ms {
		switch m.name {
		case "runtime":
			b.runtime = l.enum(m.node, "auto", "smolvm", "gvisor")
		case "image":
			b.image = l.image(m.node)
		case "user":
			b.user = l.enum(m.node, "agent", "root")
		case "home":
			b.home = l.enum(m.node, "discard", "keep")
		case "workspace":
			b.workspace = l.workspace(m.node)
		case "hide":
			b.hide = l.hide(m.node)
		case "mounts":
			b.mounts = l.mounts(m.node)
		case "env":
			env = l.env(m.node)
		case "resources":
			b.resources = l.resources(m.node)
		}
	}
	// These need what stands above, wherever it stands in the file.
	var presets []*policy.Preset
	rs := newRules(0)
	if e, ok := ms.get("egress"); ok {
		b.egress, presets, rs = l.egress(e)
	}
	if s, ok := ms.get("secrets"); ok {
		b.secrets = l.secrets(s, b.user, rs)
	}
	if e, ok := ms.get("egress"); ok { // a secret makes its host an inspected one
		l.seesSomething(e, &b.egress)
	}
	if e, ok := ms.get("env"); ok {
		l.secretInEnv(e, env, b)
	}
	b.applyPresets(presets)
	b.env = merge(b.env, env)
	return b
}

func (b *bottle) applyPresets(presets []*policy.Preset) {
	for _, p := range presets {
		b.env = merge(b.env, p.Env)
		if b.user == "root" {
			b.env = merge(b.env, p.RootEnv)
		}
		b.files = append(b.files, p.Files...)
	}
	slices.SortFunc(b.files, func(x, y plan.File) int { return strings.Compare(x.Path, y.Path) })
}

// merge lays the variables of b over those of a and sorts them by name.
func merge(a, b []plan.EnvVar) []plan.EnvVar {
	out := make([]plan.EnvVar, 0, len(a)+len(b))
	for _, v := range a {
		if !slices.ContainsFunc(b, func(w plan.EnvVar) bool { return w.Name == v.Name }) {
			out = append(out, v)
		}
	}
	out = append(out, b...)
	slices.SortFunc(out, func(x, y plan.EnvVar) int { return strings.Compare(x.Name, y.Name) })
	return out
}

// hostPath reads a path on the host: relative to the manifest's folder,
// absolute, or below the home of whoever runs the bottle (~/…).
func (l *loader) hostPath(n node) (p string, ok bool) {
	s, ok := l.text(n)
	if !ok {
		return "", false
	}
	if why := badPath(s); why != "" {
		l.bad(n, "bad_path", "%s %s", "write it relative to the manifest's folder, absolute, or as ~/…", quote(s), why)
		return "", false
	}
	return cleanPath(s), true
}

// folder is hostPath for what the guest will see: never the whole host.
func (l *loader) folder(n node) (p string, ok bool) {
	if p, ok = l.hostPath(n); p == "/" {
		l.bad(n, "bad_path", "%s is the whole host", "name the folder that the agent needs", quote(p))
		return "", false
	}
	return p, ok
}

// badPath says what is wrong with a path, or nothing.
func badPath(s string) string {
	switch {
	case s == "":
		return "is empty"
	case strings.ContainsFunc(s, fault.Control):
		return "holds control characters"
	case strings.HasPrefix(s, "~") && s != "~" && !strings.HasPrefix(s, "~/"):
		return "names another user's home"
	case strings.Contains(s, "$"):
		return "holds a variable, and none is expanded"
	}
	return ""
}

func cleanPath(s string) string {
	if rest, ok := strings.CutPrefix(s, "~/"); ok {
		return strings.TrimSuffix("~/"+path.Clean(rest), "/.")
	}
	whole := s
	if s = path.Clean(s); strings.HasPrefix(s, "~") && whole != "~" {
		return "./" + s // a name that starts with ~, and no home
	}
	return s
}

// reference is the form of an image reference (distribution/reference): an
// optional registry, a path in lower case, an optional tag and digest.
var reference = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^([A-Za-z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$`)
})

func (l *loader) image(n node) plan.Image {
	s, ok := l.text(n)
	switch {
	case !ok || s == "host":
		return plan.Image{Kind: "host"}
	case s == "." || s == ".." || s == "~" || strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../") || strings.HasPrefix(s, "/") || strings.HasPrefix(s, "~"):
		p, _ := l.hostPath(n)
		return plan.Image{Kind: "path", Source: p}
	case strings.Contains(s, "://"):
		l.bad(n, "bad_image", "%s is a URL", "write a reference such as registry.example/name@sha256:…, or a path that starts with ./", quote(s))
	case !reference().MatchString(s):
		l.bad(n, "bad_image", "%s is no image", `write "host", a path that starts with ./ ../ / or ~/, or a reference such as registry.example/name@sha256:…`, quote(s))
	}
	return plan.Image{Kind: "reference", Source: s}
}

func (l *loader) workspace(n node) plan.Workspace {
	w := plan.Workspace{Path: ".", Mode: "rw"}
	ms, _ := l.object(n, "path", "mode")
	if p, ok := ms.get("path"); ok {
		w.Path, _ = l.folder(p)
	}
	if m, ok := ms.get("mode"); ok {
		w.Mode = l.enum(m, "rw", "ro", "scratch")
	}
	return w
}

func (l *loader) hide(n node) []string {
	out := slices.Clone(hidden)
	for _, e := range l.list(n) {
		s, ok := l.text(e)
		if !ok {
			continue
		}
		if shown, ok := strings.CutPrefix(s, "!"); ok {
			i := slices.Index(out, shown)
			if i < 0 {
				l.bad(e, "bad_pattern", "%s is not on the built-in list", "the list: "+strings.Join(hidden, " "), quote(shown))
				continue
			}
			out = slices.Delete(out, i, i+1)
			continue
		}
		_, err := path.Match(s, "x")
		switch {
		case strings.Contains(s, "/"):
			l.bad(e, "bad_pattern", "%s has a folder in it", "patterns are about base names, in every folder", quote(s))
		case err != nil:
			l.bad(e, "bad_pattern", "%s is no pattern", "*, ? and [a-z] are understood", quote(s))
		case strings.Trim(s, "*") == "" || s == "." || s == "..":
			l.bad(e, "bad_pattern", "%s hides the whole workspace", "name what is to be hidden", quote(s))
		default:
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// guestOwn are the guest folders that the tools fill themselves.
var guestOwn = []string{"/workspace", "/opt/bottle", "/run/bottle", "/proc", "/dev", "/sys"}

func (l *loader) mounts(n node) []plan.Mount {
	out := []plan.Mount{}
	for _, e := range l.list(n) {
		ms, ok := l.object(e, "source", "target", "mode")
		if !ok {
			continue
		}
		m := plan.Mount{Mode: "ro"}
		if s, ok := l.required(e, ms, "source"); ok {
			m.Source, _ = l.folder(s)
		}
		if t, ok := l.required(e, ms, "target"); ok {
			m.Target = l.mountTarget(t)
		}
		if s, ok := ms.get("mode"); ok {
			m.Mode = l.enum(s, "ro", "rw")
		}
		if slices.ContainsFunc(out, func(o plan.Mount) bool { return o.Target == m.Target && m.Target != "" }) {
			l.bad(e, "bad_mount", "%s is mounted twice", "keep one of the two", quote(m.Target))
			continue
		}
		out = append(out, m)
	}
	// A folder has to be mounted before what lies below it.
	slices.SortFunc(out, func(a, b plan.Mount) int { return strings.Compare(a.Target, b.Target) })
	return out
}

func (l *loader) mountTarget(n node) string {
	s, ok := l.text(n)
	if !ok {
		return ""
	}
	clean := path.Clean(s)
	switch {
	case !strings.HasPrefix(s, "/"):
		l.bad(n, "bad_mount", "%s is not an absolute path", "targets are paths in the guest, such as /opt/claude", quote(s))
	case clean == "/":
		l.bad(n, "bad_mount", "the root of the guest comes from the image", "set image instead")
	case slices.ContainsFunc(guestOwn, func(own string) bool { return clean == own || strings.HasPrefix(clean, own+"/") }):
		l.bad(n, "bad_mount", "%s lies in a folder that the bottle fills itself", "choose a target outside "+strings.Join(guestOwn, ", "), quote(s))
	}
	return clean
}

func (l *loader) resources(n node) plan.Resources {
	var r plan.Resources
	ms, _ := l.object(n, "cpus", "memory_mib", "pids", "enforcement")
	limit := func(name string, max int) int {
		v, ok := ms.get(name)
		if !ok {
			return 0
		}
		i, _ := l.integer(v, 1, max)
		return i
	}
	r.CPUs = limit("cpus", maxCPUs)
	r.MemoryMiB = limit("memory_mib", maxMemoryMiB)
	r.Pids = limit("pids", maxPids)
	if e, ok := ms.get("enforcement"); ok {
		r.Enforcement = l.enum(e, "watched")
	}
	return r
}

// rootFile reads a file of certificates that the gate is to trust. Its bytes
// are pinned by digest: what the gate trusts is what was reviewed.
func (l *loader) rootFile(n node) (plan.Root, bool) {
	p, ok := l.hostPath(n)
	if !ok {
		return plan.Root{}, false
	}
	data, err := l.read(p)
	if err != nil {
		l.badErr(n, err)
		return plan.Root{}, false
	}
	if !strings.Contains(string(data), "-----BEGIN CERTIFICATE-----") {
		l.bad(n, "bad_root", "%s holds no certificate", "name a file in PEM form", quote(p))
		return plan.Root{}, false
	}
	if strings.Contains(string(data), "PRIVATE KEY-----") {
		l.bad(n, "bad_root", "%s holds a private key beside the certificate", "name a file with the certificate alone", quote(p))
		return plan.Root{}, false
	}
	return plan.Root{Path: p, SHA256: plan.SHA256(data)}, true
}

// ReadFailed is what read of Load returns for a file that is not there (66), or
// that cannot be read.
func ReadFailed(p string, missing bool, err error) error {
	if missing {
		return fault.New(fault.NoInput, "no_file", "%s is not there: %w", quote(p), err).
			WithHint("paths are relative to the manifest's folder")
	}
	return fault.New(fault.NoInput, "unreadable_file", "%s cannot be read: %w", quote(p), err)
}
