package gitguard

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// maxDepth of folders that are looked into, in open descriptors. What is deeper
// is refused at the start and set aside when it appears: git goes down until a
// path has 4096 bytes.
const maxDepth = 512

// maxShut bounds what is remembered of folders that could not be entered.
const maxShut = 10_000

// place is a folder of the workspace that is being looked at. All access goes
// through the open folder and never follows a symlink: the guest may swap
// anything at any time.
type place struct {
	dir  *os.File
	rel  string
	repo *gitDir // the git folder it belongs to, or nil
	sub  string  // relative to that git folder, "." for itself
	deep int
}

func (pl place) fd() int { return int(pl.dir.Fd()) }

// openRoot opens the workspace itself.
func (g *Guard) openRoot() (place, error) {
	fd, err := unix.Open(g.opts.Workspace, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil || g.isShut(fd) {
		// Closing it to the guard must not be a way past it.
		again, oerr := g.unshut(unix.AT_FDCWD, g.opts.Workspace, true)
		if err == nil {
			unix.Close(fd)
		}
		fd, err = again, oerr
	}
	if err != nil {
		return place{}, fault.New(fault.IO, "read_failed", "opening the workspace: %w", err)
	}
	return g.at(os.NewFile(uintptr(fd), g.opts.Workspace), place{}, "."), nil
}

// at completes the place of an opened folder below parent.
func (g *Guard) at(f *os.File, parent place, name string) place {
	pl := place{dir: f, rel: path.Join(parent.rel, name), deep: parent.deep + 1}
	if parent.repo != nil {
		pl.repo, pl.sub = parent.repo, path.Join(parent.sub, name)
	}
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) == nil {
		if r := g.repos[idOfStat(&st)]; r != nil {
			pl.repo, pl.sub = r, "."
		}
	}
	return pl
}

func idOfStat(st *unix.Stat_t) id { return id{uint64(st.Dev), st.Ino} }

// enter opens a folder below pl, or nil where there is none any more.
func (g *Guard) enter(pl place, name string) (place, bool) {
	fd, err := unix.Openat(pl.fd(), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch {
	case err == nil && g.isShut(fd):
		unix.Close(fd)
		fd, err = g.unshut(pl.fd(), name, g.over)
	case errors.Is(err, unix.EACCES):
		fd, err = g.unshut(pl.fd(), name, g.over)
	}
	if err != nil {
		return place{}, false
	}
	return g.at(os.NewFile(uintptr(fd), name), pl, name), true
}

// A plain user's guard has the rights of the guest and no more: in a folder
// that is shut (chmod 0300, say) the guest can make a repository, and git on the
// host use it, where the guard cannot look.

// isShut tells whether its owner's rights don't let the guard look into a folder
// that it could open.
func (g *Guard) isShut(fd int) bool {
	var st unix.Stat_t
	return os.Geteuid() != 0 && unix.Fstat(fd, &st) == nil && closed(&st)
}

func closed(st *unix.Stat_t) bool { return int(st.Uid) == os.Geteuid() && st.Mode&0o500 != 0o500 }

// unshut opens a folder of ours that is shut, if anyone can pass it, or whenever
// must is set. One that nobody can pass is remembered: its next change of mode
// brings it back.
func (g *Guard) unshut(dir int, name string, must bool) (int, error) {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err != nil:
		return -1, err
	case !closed(&st):
		return -1, unix.EACCES // another user's, which the guest cannot change either
	case !must && st.Mode&0o100 == 0 && len(g.shut) < maxShut:
		g.shut[idOfStat(&st)] = true
		return -1, unix.EACCES
	}
	return unlock(dir, name)
}

// loosen makes what is to be moved movable: a folder that may not be written
// can't lose an entry, nor change its parent.
func loosen(pl place, name string) {
	for _, n := range []string{".", name} {
		if fd, err := unlock(pl.fd(), n); err == nil {
			unix.Close(fd)
		}
	}
}

// descend goes down a path, closing what it leaves.
func (g *Guard) descend(pl place, rel string) (place, bool) {
	if rel == "." {
		return pl, true
	}
	for part := range strings.SplitSeq(rel, "/") {
		sub, ok := g.enter(pl, part)
		pl.dir.Close()
		if !ok {
			return place{}, false
		}
		pl = sub
	}
	return pl, true
}

// scan is one look at the workspace, or at a part of it.
type scan struct {
	*Guard
	final    bool        // also at what is too much for every time: git's objects
	appeared bool        // what it looks at is new, or was written to
	renamed  bool        // it is new for certain
	watch    func(place) // called with every folder that is worth watching
	findings func(Finding)
}

// folder looks at everything in a folder and below. It closes nothing.
func (s *scan) folder(pl place) {
	if s.watch != nil {
		s.watch(pl)
	}
	if pl.repo != nil && pl.sub == "." {
		s.todo(pl)
	}
	for {
		// In small steps: a guest can make a folder as large as it likes.
		entries, err := pl.dir.ReadDir(1024)
		for _, e := range entries {
			s.entry(pl, e.Name(), e.Type())
		}
		if err != nil || len(entries) == 0 {
			return
		}
	}
}

// entry looks at one entry. mode holds type bits only.
func (s *scan) entry(pl place, name string, mode fs.FileMode) {
	rel := path.Join(pl.rel, name)
	if s.pinned(pl, name, rel) {
		return
	}
	switch {
	case strings.EqualFold(name, ".git"):
		if s.isNew(pl, name) {
			s.take(pl, name, "a git repository that did not exist before")
			return
		}
	case s.outer[rel]:
		if s.isNew(pl, name) {
			s.take(pl, name, "git on the host is configured to use it, and it did not exist before")
			return
		}
	}
	if pl.repo == nil {
		s.bare(pl, name)
		if s.appeared && s.hide.match(name) && !slices.Contains(s.Hidden, rel) {
			s.appears(rel, mode)
			return
		}
	} else if s.inGit(pl, name, mode) {
		return
	}
	if !mode.IsDir() {
		return
	}
	if pl.deep >= maxDepth {
		s.take(pl, name, "it is too deep to be looked into")
		return
	}
	sub, ok := s.enter(pl, name)
	if !ok {
		return
	}
	s.folder(sub)
	sub.dir.Close()
}

// isNew tells whether the entry exists and did not at the start.
func (s *scan) isNew(pl place, name string) bool {
	var st unix.Stat_t
	err := unix.Fstatat(pl.fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && !s.known[idOfStat(&st)]
}

// bare takes the HEAD away from a folder that has become a bare repository.
func (s *scan) bare(pl place, name string) {
	if name != "HEAD" && name != "commondir" && name != "objects" && name != "refs" {
		return
	}
	has := func(n string) bool {
		var st unix.Stat_t
		return unix.Fstatat(pl.fd(), n, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
	}
	if has("HEAD") && (has("commondir") || has("objects") && has("refs")) {
		s.take(pl, "HEAD", "it made its folder a bare git repository")
	}
}

// inGit looks at an entry of a git folder; true means that there is nothing to
// enter.
func (s *scan) inGit(pl place, name string, mode fs.FileMode) bool {
	sub := path.Join(pl.sub, name)
	switch {
	case pl.repo.absent[sub]:
		s.take(pl, name, "git on the host takes configuration or code from it, and it did not exist before")
		return true
	case pl.repo.pinned[sub]: // a read-only mount in the guest
		if s.isNew(pl, name) {
			s.take(pl, name, "git on the host takes configuration or code from it, and it was replaced")
		}
		return true
	case risky(mode):
		if s.isNew(pl, name) {
			s.take(pl, name, "git on the host would follow it or hang on it")
		}
		return true
	case sub == "objects":
		return !s.final
	}
	return false
}

// todo takes a rebase away that would run commands when it is continued, if it
// is not the one of the start.
func (s *scan) todo(pl place) {
	if !s.final {
		return // a rebase under way in the guest is its own business
	}
	dir, ok := s.enter(pl, "rebase-merge")
	if !ok {
		return
	}
	defer dir.dir.Close()
	fd, err := unix.Openat(dir.fd(), todoFile, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), todoFile)
	defer f.Close()
	if text := limited(f); text != pl.repo.todo && runsCommands(text) {
		s.take(pl, "rebase-merge", "continuing this rebase on the host would run commands")
	}
}

const (
	todoFile = "git-rebase-todo"
	maxTodo  = 1 << 20
)

func readTodo(gitDir string) string {
	f, err := os.OpenFile(path.Join(gitDir, "rebase-merge", todoFile), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	return limited(f)
}

func limited(f *os.File) string {
	raw, err := io.ReadAll(io.LimitReader(f, maxTodo))
	if err != nil {
		return ""
	}
	return string(raw)
}

func runsCommands(todo string) bool {
	for line := range strings.Lines(todo) {
		if words := strings.Fields(line); len(words) > 0 && (words[0] == "exec" || words[0] == "x") {
			return true
		}
	}
	return len(todo) == maxTodo
}

// Sweep looks at the whole workspace once, when the bottle has ended (or where
// nothing can be watched): what Watch would have taken away is taken away. That
// the workspace is no folder any more is no error.
func (g *Guard) Sweep() ([]Finding, error) {
	if g.opts.Mode != "rw" {
		return nil, nil
	}
	g.over = true
	var all []Finding
	if err := g.look(true, nil, func(f Finding) { all = append(all, f) }); err != nil && !g.noWorkspace() {
		return all, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.aside.disarm(); err != nil {
		return all, err
	}
	if g.file != "" {
		if err := os.Remove(g.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return all, fault.New(fault.IO, "remove_failed", "%w", err)
		}
	}
	return all, nil
}

// noWorkspace tells whether there is nothing to look at any more: whoever has
// removed the folder, or put something else in its place, has taken it out of
// reach of the path, too.
func (g *Guard) noWorkspace() bool {
	fi, err := os.Lstat(g.opts.Workspace)
	return errors.Is(err, fs.ErrNotExist) || err == nil && !fi.IsDir()
}

func (g *Guard) look(final bool, watch func(place), report func(Finding)) error {
	pl, err := g.openRoot()
	if err != nil {
		return err
	}
	defer pl.dir.Close()
	s := &scan{Guard: g, final: final, watch: watch, findings: report}
	s.folder(pl)
	if final {
		s.missing()
		s.changed()
	}
	return nil
}

// take sets an entry aside and reports it.
func (s *scan) take(pl place, name, what string) {
	s.mu.Lock()
	moved, err := s.aside.take(pl.fd(), name, path.Join(pl.rel, name))
	if errors.Is(err, unix.EACCES) {
		loosen(pl, name)
		moved, err = s.aside.take(pl.fd(), name, path.Join(pl.rel, name))
	}
	s.mu.Unlock()
	if errors.Is(err, fs.ErrNotExist) {
		return // gone by itself
	}
	if err != nil {
		what += "; it could not be set aside: " + err.Error()
	}
	f := Finding{Path: path.Join(pl.rel, name), What: what, MovedTo: moved}
	s.aside.note(f)
	s.findings(f)
}
