// Package trust keeps a cloned repository from doing things on the host: what a
// manifest wants beyond its own folder needs the user's word once, given with
// "bottle-vm trust".
//
// A grant holds for the manifest's digest, in its folder, and for exactly the
// wishes that it showed: the same bytes in another clone, a document that was
// edited between the stages, a script that changed, or a symlink that leads
// elsewhere by now, ask again.
package trust

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/state"
)

const (
	file      = "trust.json"
	maxScript = 16 << 20
)

// grants is trust.json.
type grants struct {
	Format    string  `json:"format_version"`
	Manifests []grant `json:"manifests"`
}

type grant struct {
	SHA256 string   `json:"sha256"`
	Dir    string   `json:"dir"` // resolved
	For    []string `json:"for"`
}

// Needed lists, one line each, what the bottle wants that lies outside the
// manifest's folder (symlinks resolved) or runs on the host: secrets from a
// command, mitmdump's addons, secret files, mounts, trust roots, an image and a workspace; mounts
// inside of it that no guard covers; variables of the caller's environment that
// go to a host no preset vouches for, and hidden files that are sent anywhere.
// Lines are sorted, name no value, and are what a grant is for. Errors are faults: a
// path that cannot be resolved (66), no home (78).
func Needed(b *plan.Bottle, at Place) ([]string, error) {
	n := needs{at: at}
	for _, s := range b.Secrets {
		if path, ok := strings.CutPrefix(s.From, "file:"); ok {
			n.file(s, path, b.Hide)
		}
		if name, ok := strings.CutPrefix(s.From, "env:"); ok {
			n.variable(s, name, &b.Egress)
		}
		if s.From == "command" {
			n.command(s)
		}
	}
	for _, m := range b.Mounts {
		n.mount(m, b)
	}
	for _, r := range b.Egress.Roots {
		n.outside("trust root", r.Path)
	}
	if m := b.Egress.Mitmdump; m != nil {
		for _, a := range m.Addons {
			n.lines = append(n.lines, fmt.Sprintf("mitmdump runs %s (%s), which reads and changes what inspected hosts are sent", a.Path, a.SHA256))
		}
	}
	if b.Image.Kind == "path" {
		n.outside("image", b.Image.Source)
	}
	n.outside("workspace ("+b.Workspace.Mode+")", b.Workspace.Path)
	slices.Sort(n.lines)
	return slices.Compact(n.lines), errors.Join(n.errs...)
}

type needs struct {
	at    Place
	lines []string
	errs  []error
}

func (n *needs) outside(what, p string) {
	real, inside, err := n.at.Real(p)
	if err != nil {
		n.errs = append(n.errs, err)
		return
	}
	if inside {
		return
	}
	line := fmt.Sprintf("%s %s", what, p)
	if abs, _ := n.at.Path(p); abs != real {
		line += " -> " + real
	}
	n.lines = append(n.lines, line)
}

// variable is a wish unless a preset vouches for where it goes: the environment
// of a shell holds many keys, and a manifest can name any of them, and any host.
func (n *needs) variable(s plan.Secret, name string, p *plan.Policy) {
	for _, in := range s.Inject {
		if !policy.Vouched(p, name, in.Host) {
			n.lines = append(n.lines, fmt.Sprintf("secret %s sends your $%s to %s, in header %s", s.Name, name, in.Host, in.Header))
		}
	}
}

// file is a wish outside of the manifest's folder, and inside of it where the
// file is one that is kept from guests: a key of yours in a checkout is not the
// manifest's to send.
func (n *needs) file(s plan.Secret, p string, hide []string) {
	real, inside, err := n.at.Real(p)
	if err != nil || !inside {
		n.outside("secret "+s.Name+" reads", p)
		return
	}
	if !n.hides(real, hide) {
		return
	}
	for _, in := range s.Inject {
		n.lines = append(n.lines, fmt.Sprintf("secret %s sends %s, which is hidden from the guest, to %s, in header %s", s.Name, p, in.Host, in.Header))
	}
}

// mount is a wish even inside of the manifest's folder when it goes past what
// guards a workspace: its hidden files, and what git on the host executes.
func (n *needs) mount(m plan.Mount, b *plan.Bottle) {
	what := "mount at " + m.Target + " (" + m.Mode + ") shows the guest"
	real, inside, err := n.at.Real(m.Source)
	if err != nil || !inside {
		n.outside(what, m.Source)
		return
	}
	workspace, _, err := n.at.Real(b.Workspace.Path)
	if err != nil {
		return // said of the workspace itself
	}
	// A part of the workspace at its own place is covered like all of it.
	rel, err := filepath.Rel(workspace, real)
	covered := err == nil && Within(workspace, real) && m.Target == path.Join(engine.GuestWorkspace, filepath.ToSlash(rel))
	switch {
	case covered && (m.Mode == "ro" || b.Workspace.Mode == "rw"):
	case m.Mode == "rw":
		n.lines = append(n.lines, fmt.Sprintf("mount at %s (rw) lets the guest change, without a guard over git, %s", m.Target, m.Source))
	case !covered && n.hides(real, b.Hide):
		n.lines = append(n.lines, fmt.Sprintf("%s %s, with files in it that are hidden in the workspace", what, m.Source))
	}
}

// maxLook bounds the search for hidden names; a larger folder counts as one
// that has some.
const maxLook = 100_000

// hides tells whether a name below the manifest's folder on the way to real, or
// below real, is one to hide.
func (n *needs) hides(real string, patterns []string) bool {
	hidden := func(name string) bool {
		return slices.ContainsFunc(patterns, func(p string) bool { ok, _ := path.Match(p, name); return ok })
	}
	base, err := filepath.EvalSymlinks(n.at.Base)
	if err != nil {
		return true
	}
	rel, _ := filepath.Rel(base, real)
	if slices.ContainsFunc(strings.Split(rel, "/"), hidden) {
		return true
	}
	seen := 0
	found := errors.New("found")
	return filepath.WalkDir(real, func(p string, d fs.DirEntry, err error) error {
		if seen++; seen > maxLook || err == nil && p != real && hidden(d.Name()) {
			return found
		}
		return nil
	}) != nil
}

// command is always a wish. Files of the manifest's folder that it names are
// pinned by content: the guest may be able to write them, and the manifest's
// digest does not cover them.
func (n *needs) command(s plan.Secret) {
	line := fmt.Sprintf("secret %s runs %q", s.Name, s.Command)
	argv, err := n.at.Command(s.Command)
	if err != nil {
		n.errs = append(n.errs, err)
		return
	}
	for i, abs := range argv {
		if isPath(i, s.Command[i]) {
			line += fmt.Sprintf(" (%s is %s)", s.Command[i], n.at.Scripts.digest(abs))
		}
	}
	n.lines = append(n.lines, line)
}

// Scripts are files that commands of secrets name and that a guest could write,
// by their absolute paths, as they were read. One that was not there is nil.
type Scripts map[string][]byte

// ReadScripts reads those of b: a guest that runs in the same folder could
// exchange them after the user's word was looked for, so that what was read is
// both what has to be trusted and what is run. What a grant cannot pin, a folder
// or a file that is too large, is not among them.
func ReadScripts(b *plan.Bottle, at Place) (Scripts, error) {
	out := Scripts{}
	reach := Reach(b, at)
	for _, s := range b.Secrets {
		argv, err := at.Command(s.Command)
		if err != nil {
			return nil, err
		}
		for i, abs := range argv {
			if !isPath(i, s.Command[i]) || !reached(reach, abs) {
				continue
			}
			content, err := ReadFile(abs, maxScript)
			switch {
			case errors.Is(err, fs.ErrNotExist):
				out[abs] = nil
			case err == nil:
				out[abs] = append([]byte{}, content...) // not nil
			}
		}
	}
	if len(out) > 0 { // copies are run there
		return out, Temp(reach)
	}
	return out, nil
}

// reached tells if a path leads through one of the folders, by itself or by a
// link.
func reached(reach []string, abs string) bool {
	names := []string{abs}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		names = append(names, real)
	}
	if dir, err := filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
		names = append(names, filepath.Join(dir, filepath.Base(abs)))
	}
	return slices.ContainsFunc(names, func(name string) bool {
		return slices.ContainsFunc(reach, func(dir string) bool { return Within(dir, name) })
	})
}

func (s Scripts) digest(abs string) string {
	content, ok := s[abs]
	switch {
	case !ok:
		return digest(abs)
	case content == nil:
		return "absent"
	}
	return plan.SHA256(content)
}

// digest of a regular file that is small enough to be a script or a tool, or
// what else there is, which a grant cannot pin and its reader should know.
func digest(path string) string {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "absent"
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() || fi.Size() > maxScript {
		return "no file whose content could be checked"
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "unreadable"
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// Check refuses (77, not_trusted) a bottle that wants what has not been granted.
// manifest is the path for the hint, as the user would type it.
func Check(root *state.Root, b *plan.Bottle, at Place, manifest string) error {
	wanted, err := Needed(b, at)
	if err != nil || len(wanted) == 0 {
		return err
	}
	all, err := load(root)
	if err != nil {
		return err
	}
	dir, err := filepath.EvalSymlinks(at.Base)
	if err != nil {
		return fault.New(fault.NoInput, "no_input", "the manifest's folder: %w", err)
	}
	var missing []string
	for _, w := range wanted {
		if !slices.ContainsFunc(all.Manifests, func(g grant) bool {
			return g.SHA256 == b.Manifest.SHA256 && g.Dir == dir && slices.Contains(g.For, w)
		}) {
			missing = append(missing, w)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fault.New(fault.NoPerm, "not_trusted", "%s asks for what needs your word, and you have not trusted it: %s",
		b.Manifest.Name, strings.Join(missing, "; ")).
		WithHint("read it, and if you agree: bottle-vm trust -m %s", quote(manifest))
}

// Add grants what the bottles of one manifest want. It returns the lines that
// are granted now, for the user to see; none means that there was nothing to
// trust, and nothing is written.
func Add(root *state.Root, at Place, bottles ...*plan.Bottle) ([]string, error) {
	var lines []string
	var sum string
	for _, b := range bottles {
		if sum != "" && sum != b.Manifest.SHA256 {
			return nil, fault.New(fault.Usage, "usage", "the bottles come from two manifests")
		}
		sum = b.Manifest.SHA256
		l, err := Needed(b, at)
		if err != nil {
			return nil, err
		}
		lines = append(lines, l...)
	}
	slices.Sort(lines)
	lines = slices.Compact(lines)
	if len(lines) == 0 {
		return nil, nil
	}
	dir, err := filepath.EvalSymlinks(at.Base)
	if err != nil {
		return nil, fault.New(fault.NoInput, "no_input", "the manifest's folder: %w", err)
	}
	err = root.Update(file, func(old []byte) ([]byte, error) {
		all, err := decode(old)
		if err != nil {
			return nil, err
		}
		// One grant a folder: an older version of the manifest is not trusted
		// any more once the user has looked at a newer one.
		all.Manifests = slices.DeleteFunc(all.Manifests, func(g grant) bool { return g.Dir == dir })
		all.Manifests = append(all.Manifests, grant{sum, dir, lines})
		raw, err := json.Marshal(all)
		if err != nil {
			return nil, fault.New(fault.Bug, "bug", "encoding trust: %w", err)
		}
		return append(raw, '\n'), nil
	})
	if err != nil {
		return nil, err
	}
	return lines, nil
}

func load(root *state.Root) (*grants, error) {
	raw, err := root.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return decode(raw)
}

func decode(raw []byte) (*grants, error) {
	all := &grants{Format: "1.0"}
	if len(bytes.TrimSpace(raw)) == 0 {
		return all, nil
	}
	if err := json.Unmarshal(raw, all); err != nil || !strings.HasPrefix(all.Format, "1.") {
		return nil, fault.New(fault.Data, "bad_trust", "trust.json in the state folder cannot be read").
			WithHint("remove it and trust your manifests again")
	}
	return all, nil
}

// quote makes s one word of a POSIX shell.
func quote(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+,:@%=", r))
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
