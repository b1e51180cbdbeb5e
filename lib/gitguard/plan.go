// Package gitguard keeps a guest from running code on the host through git, and
// from reading or changing files of the workspace that are not for it.
//
// git on the host executes what a repository's folder says: hooks, and commands
// named in its configuration. Editors and prompts run it all the time. So
// before a bottle starts, Plan pins every file of a repository that git
// executes or takes configuration from (read-only mounts over what exists, the
// folder itself a mount so that it can't be renamed away), and while the bottle
// runs, Watch takes away at once what appears and didn't exist: a pinned name,
// a replaced .git, a new repository anywhere in the workspace (with .git or as
// a bare one), a symlink or a FIFO inside .git. Sweep does it once more when the
// bottle has ended.
//
// What remains is the time between the appearance of such a file and its
// removal, around a millisecond, and programs of the workspace itself (make,
// npm, direnv), which nobody runs by running git. docs/security.md says so.
//
// In a workspace whose .git is a file (a linked worktree, a submodule checked
// out by itself) the repository lies elsewhere and is not in the guest: git
// doesn't work there.
package gitguard

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
)

// Limits. A workspace beyond them is refused: a guard that looked at a part of
// it would only look like one.
const (
	MaxRepositories = 256
	MaxHidden       = 1000
	MaxEntries      = 4 << 20
)

// pinned are the names inside a git folder that git executes or takes
// configuration from, other repositories included (gitrepository-layout(5)).
// remotes and branches name what a plain "git fetch" talks to.
var pinned = []string{
	"branches", "commondir", "config", "config.worktree", "hooks", "info/attributes", "modules", "remotes", "worktrees",
}

// Options say what to guard.
type Options struct {
	Workspace string   // absolute, without symlinks; of scratch the private copy
	Mode      string   // rw | ro | scratch; only rw reaches the host's files
	Hide      []string // base-name patterns (path.Match)
	// Conceal are files that are hidden whatever their name, if they lie in the
	// workspace: those that secrets come from. Absolute.
	Conceal []string
	// ReadOnly are files that the guest must not change, if they lie in the
	// workspace: the manifest. Absolute.
	ReadOnly []string
	// Writable are the folders and files outside the workspace that the guest may
	// change: the read-write mounts. Absolute, without symlinks.
	Writable []string
	// EmptyFile and EmptyDir are mounted over what is hidden. They must be
	// empty, read-only and reachable for the engine.
	EmptyFile, EmptyDir string
	// Home is the user's home: its git configuration may set a core.hooksPath
	// that leads into the workspace. May be empty.
	Home string
}

// Guard is a plan and what it knows of the workspace at the start.
type Guard struct {
	// Binds belong into engine.Spec.Binds, in this order, behind the mounts of
	// the plan.
	Binds []engine.Bind
	// Hidden are the covered paths, relative to the workspace.
	Hidden []string

	opts  Options
	hide  names
	known map[id]bool     // .git entries, git folders, symlinks in them
	repos map[id]*gitDir  // git folders
	bares []string        // paths of bare repositories
	outer map[string]bool // paths that configurations name: nothing new may stand there

	pins  map[string]*pin // covered files, by path in the workspace
	cover func(engine.Bind) error
	jobs  chan<- job
	file  string      // of Persist
	shut  map[id]bool // folders that could not be entered
	over  bool        // the guest has ended

	mu    sync.Mutex
	aside asideFolder
}

// gitDir is one git folder: a .git, or a bare repository.
type gitDir struct {
	absent map[string]bool // pinned names that did not exist
	pinned map[string]bool // those that did
	todo   string          // git-rebase-todo at the start
}

// id is a file's identity while it exists.
type id struct{ dev, ino uint64 }

func idOf(fi fs.FileInfo) id {
	st := fi.Sys().(*syscall.Stat_t)
	return id{uint64(st.Dev), st.Ino}
}

// Finding is one thing that was taken away or noticed.
type Finding struct {
	Path    string `json:"path"` // relative to the workspace
	What    string `json:"what"`
	MovedTo string `json:"moved_to,omitempty"` // empty: it is still there
}

func (f Finding) String() string {
	s := f.Path + ": " + f.What
	if f.MovedTo != "" {
		s += "; moved to " + f.MovedTo
	}
	return s
}

// Plan looks at a workspace before its bottle starts. Faults: 65 git_symlink (a
// .git or a pinned name is a symbolic link, which no mount can hold) and in_git
// (the guest would be given the inside of a repository), 74, and 78
// workspace_too_big, too_many_repositories, too_many_hidden.
func Plan(o Options) (*Guard, error) {
	if err := apart(o); err != nil {
		return nil, err
	}
	g := newGuard(o)
	p := planner{Guard: g, covered: map[string]bool{}}
	if err := p.walk(); err != nil {
		return nil, err
	}
	if o.Mode == "rw" {
		for _, rel := range p.found {
			if err := p.repository(rel); err != nil {
				return nil, err
			}
		}
		if err := p.governed(); err != nil {
			return nil, err
		}
	}
	for _, abs := range o.Conceal {
		if err := p.conceal(abs); err != nil {
			return nil, err
		}
	}
	sort.SliceStable(p.hidden, func(i, j int) bool { return p.hidden[i].Target < p.hidden[j].Target })
	g.Binds = append(p.binds, p.hidden...)
	for _, b := range g.Binds {
		if b.ReadOnly {
			rel, _ := inside(engine.GuestWorkspace, b.Target)
			g.addPin(rel, b, b.Source == filepath.Join(o.Workspace, rel))
		}
	}
	for _, abs := range o.ReadOnly {
		if b, ok := Manifest(o.Workspace, abs); ok {
			g.Binds = append(g.Binds, b)
			rel, _ := inside(engine.GuestWorkspace, b.Target)
			g.addPin(rel, b, false)
		}
	}
	return g, nil
}

// apart refuses to give the guest a part of a git folder by another way: a
// manifest that names .git/hooks as its workspace, or as a mount.
func apart(o Options) error {
	dirs := o.Writable
	if o.Mode == "rw" {
		dirs = append([]string{filepath.Dir(o.Workspace)}, dirs...)
		if strings.EqualFold(filepath.Base(o.Workspace), ".git") {
			dirs[0] = o.Workspace
		}
	}
	for _, dir := range dirs {
		for p := dir; p != "/" && p != "."; p = filepath.Dir(p) {
			if strings.EqualFold(filepath.Base(p), ".git") || isBare(p) {
				return fault.New(fault.Data, "in_git", "the guest would write in the git folder %s, whose hooks and settings the host executes", p).
					WithHint("mount it with mode ro, or give the guest the repository as its workspace")
			}
		}
	}
	return nil
}

func newGuard(o Options) *Guard {
	return &Guard{opts: o, hide: newNames(o.Hide), known: map[id]bool{}, repos: map[id]*gitDir{}, outer: map[string]bool{},
		pins: map[string]*pin{}, shut: map[id]bool{}}
}

// Manifest gives the read-only mount for a file that lies in the workspace and
// has to stay as it is.
func Manifest(workspace, file string) (engine.Bind, bool) {
	real, err := filepath.EvalSymlinks(file)
	if err != nil {
		return engine.Bind{}, false
	}
	rel, ok := inside(workspace, real)
	if !ok || rel == "." {
		return engine.Bind{}, false
	}
	return bind(workspace, rel, true), true
}

func bind(workspace, rel string, readOnly bool) engine.Bind {
	return engine.Bind{Source: filepath.Join(workspace, rel), Target: path.Join(engine.GuestWorkspace, rel), ReadOnly: readOnly}
}

// inside gives a clean path relative to dir, if it is dir or below it.
func inside(dir, p string) (string, bool) {
	rel, err := filepath.Rel(dir, p)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", false
	}
	return rel, true
}

type planner struct {
	*Guard
	found   []string // .git entries and bare repositories, relative
	binds   []engine.Bind
	hidden  []engine.Bind
	covered map[string]bool
	entries int
}

// walk finds repositories and files to hide. It never follows a symlink.
func (p *planner) walk() error {
	root := filepath.Clean(p.opts.Workspace)
	below := strings.TrimSuffix(root, "/") + "/"
	return filepath.WalkDir(root, func(abs string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
			return p.shutOut(abs)
		}
		if err != nil {
			return fault.New(fault.IO, "read_failed", "looking at the workspace: %w", err)
		}
		if p.entries++; p.entries > MaxEntries {
			return fault.New(fault.Host, "workspace_too_big", "the workspace %s holds more than %d files", root, MaxEntries).
				WithHint("choose a smaller folder as workspace.path")
		}
		if abs == root {
			return nil
		}
		rel := strings.TrimPrefix(abs, below)
		if d.IsDir() && strings.Count(rel, "/") >= maxDepth {
			return fault.New(fault.Host, "workspace_too_deep", "the workspace %s holds folders within folders, more than %d of them", root, maxDepth).
				WithHint("choose another folder as workspace.path")
		}
		switch {
		case strings.EqualFold(d.Name(), ".git"):
			p.found = append(p.found, rel)
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.Name() == "HEAD" && isBare(filepath.Dir(abs)):
			p.found = append(p.found, filepath.Dir(rel))
		}
		if p.hide.match(d.Name()) {
			return p.cover(rel, d)
		}
		return nil
	})
}

// shutOut refuses a folder that is not to be entered, but is ours: the guest has
// our rights, so it can change that. What belongs to others stays closed to it.
func (p *planner) shutOut(abs string) error {
	var st unix.Stat_t
	if os.Geteuid() == 0 || unix.Lstat(abs, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || !closed(&st) {
		return nil
	}
	return fault.New(fault.Host, "workspace_shut", "%s cannot be looked into, and the guest could open it", abs).
		WithHint("chmod u+rx %s", abs)
}

// isBare tells whether git takes the folder for a repository when it stands in
// it: a HEAD, and objects and refs of its own or of a common folder.
func isBare(dir string) bool {
	has := func(name string) bool { _, err := os.Lstat(filepath.Join(dir, name)); return err == nil }
	return has("HEAD") && (has("commondir") || has("objects") && has("refs"))
}

func (p *planner) repository(rel string) error {
	abs := filepath.Join(p.opts.Workspace, rel)
	fi, err := os.Lstat(abs)
	if err != nil {
		return fault.New(fault.IO, "read_failed", "looking at %s: %w", abs, err)
	}
	if fi.Mode()&fs.ModeSymlink != 0 {
		return symlinked(abs)
	}
	p.known[idOf(fi)] = true
	if !fi.IsDir() { // it says where the repository is
		p.binds = append(p.binds, bind(p.opts.Workspace, rel, true))
		return p.configured(configs(abs), path.Dir(rel))
	}
	if len(p.repos) == MaxRepositories {
		return fault.New(fault.Host, "too_many_repositories", "the workspace %s holds more than %d git repositories", p.opts.Workspace, MaxRepositories).
			WithHint("choose a smaller folder as workspace.path")
	}
	return p.pin(rel, fi)
}

// pin mounts a git folder and, over it, what git executes or is configured by.
func (p *planner) pin(rel string, fi fs.FileInfo) error {
	ws := p.opts.Workspace
	dir := &gitDir{absent: map[string]bool{}, pinned: map[string]bool{}, todo: readTodo(filepath.Join(ws, rel))}
	p.repos[idOf(fi)] = dir
	if rel != "." {
		p.binds = append(p.binds, bind(ws, rel, false))
	}
	// A mount of its own keeps info from being renamed with its attributes.
	info, err := os.Lstat(filepath.Join(ws, rel, "info"))
	switch {
	case err == nil && info.Mode()&fs.ModeSymlink != 0:
		return symlinked(filepath.Join(ws, rel, "info"))
	case err == nil && info.IsDir():
		p.binds = append(p.binds, bind(ws, path.Join(rel, "info"), false))
	}
	for _, name := range pinned {
		abs := filepath.Join(ws, rel, name)
		fi, err := os.Lstat(abs)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
			dir.absent[name] = true
		case err != nil:
			return fault.New(fault.IO, "read_failed", "looking at %s: %w", abs, err)
		case fi.Mode()&fs.ModeSymlink != 0:
			return symlinked(abs)
		default:
			dir.pinned[name], p.known[idOf(fi)] = true, true
			p.binds = append(p.binds, bind(ws, path.Join(rel, name), true))
		}
	}
	p.rememberLinks(filepath.Join(ws, rel))
	worktree := path.Dir(rel)
	if !strings.EqualFold(path.Base(rel), ".git") {
		worktree = rel
		p.bares = append(p.bares, rel)
	}
	return p.configured([]string{filepath.Join(ws, rel, "config"), filepath.Join(ws, rel, "config.worktree")}, worktree)
}

// governed pins what is configured elsewhere: by the repositories that the
// workspace is a part of, and for all of the user's.
func (p *planner) governed() error {
	worktrees := []string{"."}
	for _, rel := range p.found {
		worktrees = append(worktrees, path.Dir(rel))
	}
	ws := filepath.Clean(p.opts.Workspace)
	for dir := ws; dir != filepath.Dir(dir); {
		dir = filepath.Dir(dir)
		entry := filepath.Join(dir, ".git")
		if _, err := os.Lstat(entry); err != nil {
			continue
		}
		rel, err := filepath.Rel(ws, dir)
		if err != nil {
			return fault.New(fault.Bug, "bug", "%w", err)
		}
		if err := p.configured(configs(entry), rel); err != nil {
			return err
		}
		worktrees = append(worktrees, rel)
	}
	own := []string{"/etc/gitconfig"}
	if p.opts.Home != "" {
		own = append(own, filepath.Join(p.opts.Home, ".gitconfig"), filepath.Join(p.opts.Home, ".config/git/config"))
	}
	for _, rel := range worktrees {
		if err := p.configured(own, rel); err != nil {
			return err
		}
	}
	return nil
}

// configs are the configurations that hold for a .git entry. One that is a file
// names the git folder of a linked worktree or a submodule, which may share that
// of another (gitrepository-layout(5)).
func configs(entry string) []string {
	dir := entry
	if to, ok := strings.CutPrefix(firstLine(entry), "gitdir: "); ok {
		dir = expand(to, filepath.Dir(entry), "")
	}
	common := dir
	if to := firstLine(filepath.Join(dir, "commondir")); to != "" {
		common = expand(to, dir, "")
	}
	return []string{filepath.Join(common, "config"), filepath.Join(dir, "config.worktree")}
}

// firstLine of a small regular file, or "".
func firstLine(file string) string {
	fi, err := os.Lstat(file)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() > maxConfig {
		return ""
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(raw), "\n")
	return strings.TrimSpace(line)
}

func symlinked(abs string) error {
	return fault.New(fault.Data, "git_symlink", "%s is a symbolic link, which cannot be kept from being replaced", abs).
		WithHint("put the file or folder itself there (for hooks: git config core.hooksPath)")
}

// rememberLinks notes symlinks and FIFOs that a git folder has already.
func (p *planner) rememberLinks(gitDir string) {
	_ = filepath.WalkDir(gitDir, func(abs string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if risky(d.Type()) {
			if fi, err := d.Info(); err == nil {
				p.known[idOf(fi)] = true
			}
		}
		return nil
	})
}

// risky are the kinds of file that git must not meet in its folder: it writes
// through symlinks (logs/HEAD, COMMIT_EDITMSG) and hangs on FIFOs. A socket is
// its own file-system monitor's.
func risky(mode fs.FileMode) bool {
	return mode&(fs.ModeSymlink|fs.ModeNamedPipe|fs.ModeDevice|fs.ModeCharDevice) != 0
}

// configured pins what the configuration names inside the workspace: a hooks
// folder and included files. worktree is where relative hooks paths start.
func (p *planner) configured(files []string, worktree string) error {
	ws := p.opts.Workspace
	seen := map[string]bool{}
	for len(files) > 0 && len(seen) < 100 {
		file := files[0]
		files = files[1:]
		if seen[file] {
			continue
		}
		seen[file] = true
		hooks, includes := readConfig(file)
		for _, h := range hooks {
			abs := expand(h, filepath.Join(ws, worktree), p.opts.Home)
			targets := []string{abs}
			// husky's folder _ only calls the scripts beside it.
			if filepath.Base(abs) == "_" {
				targets = []string{filepath.Dir(abs), abs}
			}
			for _, t := range targets {
				if err := p.pinOuter(t); err != nil {
					return err
				}
			}
		}
		for _, inc := range includes {
			abs := expand(inc, filepath.Dir(file), p.opts.Home)
			if err := p.pinOuter(abs); err != nil {
				return err
			}
			files = append(files, abs)
		}
	}
	return nil
}

// pinOuter pins a path outside the git folders, or has its appearance watched.
func (p *planner) pinOuter(abs string) error {
	ws := p.opts.Workspace
	rel, ok := inside(ws, abs)
	if !ok || rel == "." {
		return nil
	}
	real, err := filepath.EvalSymlinks(abs)
	if errors.Is(err, fs.ErrNotExist) {
		p.outer[rel] = true
		return nil
	}
	if err != nil {
		return fault.New(fault.IO, "read_failed", "looking at %s: %w", abs, err)
	}
	if real != abs {
		return symlinked(abs)
	}
	if fi, err := os.Lstat(abs); err == nil && (fi.IsDir() || strings.Contains(rel, "/")) {
		// A folder above it can be renamed, and another put in its place.
		p.outer[rel], p.known[idOf(fi)] = true, true
	}
	b := bind(ws, rel, true)
	if !slices.Contains(p.binds, b) {
		p.binds = append(p.binds, b)
	}
	return nil
}
