package gitguard

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
)

// names is a set of base-name patterns, sorted by how fast they can be told:
// the walk asks for every file of the workspace.
type names struct {
	exact  map[string]bool
	suffix map[string]bool // of "*.pem": ".pem"
	globs  []string
}

func newNames(patterns []string) names {
	n := names{exact: map[string]bool{}, suffix: map[string]bool{}}
	for _, p := range patterns {
		switch rest, star := strings.CutPrefix(p, "*"); {
		case !strings.ContainsAny(p, `*?[\`):
			n.exact[p] = true
		case star && strings.LastIndexByte(rest, '.') == 0 && !strings.ContainsAny(rest, `*?[\`):
			n.suffix[rest] = true
		default:
			n.globs = append(n.globs, p)
		}
	}
	return n
}

func (n names) match(name string) bool {
	if n.exact[name] || n.suffix[path.Ext(name)] {
		return true
	}
	for _, p := range n.globs {
		if ok, _ := path.Match(p, name); ok {
			return true
		}
	}
	return false
}

// cover hides one entry of the workspace. Of a symlink that stays in the
// workspace its target is hidden; one that leads out leads nowhere in the guest.
func (p *planner) cover(rel string, d fs.DirEntry) error {
	switch {
	case d.Type()&fs.ModeSymlink != 0:
		return p.conceal(filepath.Join(p.opts.Workspace, rel))
	case d.IsDir():
		if err := p.mask(rel, p.opts.EmptyDir); err != nil {
			return err
		}
		return fs.SkipDir
	case d.Type().IsRegular():
		return p.mask(rel, p.opts.EmptyFile)
	}
	return nil
}

// conceal hides what abs leads to, if that lies in the workspace.
func (p *planner) conceal(abs string) error {
	real, err := filepath.EvalSymlinks(abs)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.New(fault.IO, "read_failed", "looking at %s: %w", abs, err)
	}
	rel, ok := inside(p.opts.Workspace, real)
	if !ok || rel == "." {
		return nil
	}
	fi, err := os.Lstat(real)
	if err != nil {
		return fault.New(fault.IO, "read_failed", "looking at %s: %w", abs, err)
	}
	if fi.IsDir() {
		return p.mask(rel, p.opts.EmptyDir)
	}
	return p.mask(rel, p.opts.EmptyFile)
}

func (p *planner) mask(rel, empty string) error {
	if p.covered[rel] {
		return nil
	}
	if len(p.covered) == MaxHidden {
		return fault.New(fault.Host, "too_many_hidden", "more than %d files of the workspace match the patterns of hide", MaxHidden).
			WithHint("make the patterns narrower, or choose a smaller folder as workspace.path")
	}
	p.covered[rel] = true
	p.Hidden = append(p.Hidden, rel)
	p.hidden = append(p.hidden, engine.Bind{Source: empty, Target: path.Join(engine.GuestWorkspace, rel), ReadOnly: true})
	return nil
}
