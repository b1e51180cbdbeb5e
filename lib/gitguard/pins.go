package gitguard

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
)

// A mount over a file holds only as long as that file: when somebody on the
// host replaces it by renaming another over it, as editors and git itself do,
// the guest's kernel drops the mount (measured with gVisor: it revalidates what
// it has cached) and the guest reaches the new file. So every covered file is
// watched by its identity. A replaced one is covered again, through the engine
// (OnLost); and a configuration of git is compared with that of the start,
// since the guest may have been quick: anything in it that is more than a new
// branch or another user name is set aside and the old text put back.

// pin is one covered file of the workspace.
type pin struct {
	bind engine.Bind
	id   id
	// What git reads is compared and put back.
	restore  bool
	config   bool // its text is a configuration
	text     []byte
	mode     uint32
	uid, gid int
	lost     bool
	ours     bool // what stands there is what we put back, and covered
}

const (
	maxPinned = 1 << 20 // bytes of a text
	maxPins   = 10_000
)

// addPin remembers a covered file by its path in the workspace.
func (g *Guard) addPin(rel string, b engine.Bind, restore bool) {
	var st unix.Stat_t
	abs := path.Join(g.opts.Workspace, rel)
	if unix.Lstat(abs, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return
	}
	p := &pin{bind: b, id: idOfStat(&st), mode: uint32(st.Mode) & 0o777, uid: int(st.Uid), gid: int(st.Gid)}
	if restore && st.Size <= maxPinned {
		text, err := os.ReadFile(abs)
		p.restore, p.text = err == nil, text
		p.config = path.Base(rel) == "config" || path.Base(rel) == "config.worktree"
	}
	g.pins[rel] = p
}

// OnLost says how to cover a path again while the bottle runs: fn mounts
// b.Source (or, for b.Source the file itself, the path on itself) read-only over
// b.Target in the guest. Without it a lost cover is only reported.
func (g *Guard) OnLost(fn func(b engine.Bind) error) { g.cover = fn }

// pinned looks at a covered file; false means that the path is none. Inode
// numbers are used again, so that an event counts as a replacement by itself.
func (s *scan) pinned(pl place, name, rel string) bool {
	p := s.pins[rel]
	if p == nil {
		return false
	}
	var st unix.Stat_t
	if unix.Fstatat(pl.fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return true // missing judges those, at the end
	}
	now := idOfStat(&st)
	lost := now != p.id || s.renamed && !p.ours
	p.ours = p.ours && !lost
	p.id = now
	if p.restore && s.compare(pl, name, rel, p, &st) {
		lost = true
	}
	if lost {
		p.lost = true
		s.covered(rel, p.bind, "it was replaced on the host, which uncovered it")
	}
	return true
}

// compare checks what git reads against what it was; true means that it was put
// back.
func (s *scan) compare(pl place, name, rel string, p *pin, st *unix.Stat_t) bool {
	text, ok := readAt(pl.fd(), name, st)
	if ok && (bytes.Equal(text, p.text) || p.config && harmlessChange(p.text, text)) {
		p.text = text
		return false
	}
	s.take(pl, name, "git on the host takes configuration from it, and it changed while the bottle runs; the text of before was put back")
	s.putBack(pl, name, rel, p)
	return true
}

func (s *scan) putBack(pl place, name, rel string, p *pin) {
	now, err := writeAt(pl.fd(), name, p)
	if err != nil {
		s.findings(Finding{Path: rel, What: "the text of before could not be put back: " + err.Error()})
		return
	}
	p.id, p.ours = now, true
}

// missing puts back what git reads and is not there any more.
func (s *scan) missing() {
	for _, rel := range slices.Sorted(maps.Keys(s.pins)) {
		p := s.pins[rel]
		if !p.restore {
			continue
		}
		pl, err := s.openRoot()
		if err != nil {
			return
		}
		if pl, ok := s.descend(pl, path.Dir(rel)); ok {
			var st unix.Stat_t
			if errors.Is(unix.Fstatat(pl.fd(), path.Base(rel), &st, unix.AT_SYMLINK_NOFOLLOW), unix.ENOENT) {
				s.findings(Finding{Path: rel, What: "it was removed while the bottle ran and was put back"})
				s.putBack(pl, path.Base(rel), rel, p)
			}
			pl.dir.Close()
		}
	}
}

// changed tells of files that were the user's to change, but for a moment the
// guest's too.
func (s *scan) changed() {
	for _, rel := range slices.Sorted(maps.Keys(s.pins)) {
		if p := s.pins[rel]; p.lost && !p.restore && p.bind.Source == path.Join(s.opts.Workspace, rel) {
			s.findings(Finding{Path: rel, What: "it was replaced while the bottle ran; look at it before you use it again"})
		}
	}
}

// job is one path to cover in the running guest.
type job struct {
	rel, why string
	bind     engine.Bind
}

const maxJobs = 64

// covering starts what covers paths, beside the watch: a call into the guest
// takes tens of milliseconds, and a guest that asks for many of them must not
// hold up the rest. The report it gives may be called from both.
func (g *Guard) covering(report func(Finding)) (safe func(Finding), stop func()) {
	var one sync.Mutex
	safe = func(f Finding) {
		one.Lock()
		defer one.Unlock()
		report(f)
	}
	if g.cover == nil {
		return safe, func() {}
	}
	jobs, done := make(chan job, maxJobs), make(chan struct{})
	g.jobs = jobs
	go func() {
		defer close(done)
		for j := range jobs {
			what := j.why + "; it is covered again"
			if err := g.cover(j.bind); err != nil {
				what = fmt.Sprintf("%s, and the guest can reach it: covering it failed: %s", j.why, err)
			}
			safe(Finding{Path: j.rel, What: what})
		}
	}()
	return safe, func() {
		g.jobs = nil
		close(jobs)
		<-done
	}
}

// covered has a path covered and reported.
func (s *scan) covered(rel string, b engine.Bind, why string) {
	if s.final {
		return // no guest left to cover it from
	}
	select {
	case s.jobs <- job{rel, why, b}: // nil: there is nothing that covers
	default:
		s.findings(Finding{Path: rel, What: why + ", and the guest can reach it"})
	}
}

// appears covers something new whose name is one to hide.
func (s *scan) appears(rel string, mode fs.FileMode) {
	b := engine.Bind{Source: s.opts.EmptyFile, Target: path.Join(engine.GuestWorkspace, rel), ReadOnly: true}
	if mode.IsDir() {
		b.Source = s.opts.EmptyDir
	} else if !mode.IsRegular() {
		return
	}
	if len(s.pins) < maxPins {
		s.addPin(rel, b, false)
	}
	s.covered(rel, b, "its name is one to hide, and it appeared while the bottle runs")
}

func readAt(fd int, name string, st *unix.Stat_t) ([]byte, bool) {
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxPinned {
		return nil, false
	}
	in, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, false
	}
	f := os.NewFile(uintptr(in), name)
	defer f.Close()
	text := limited(f)
	return []byte(text), len(text) < maxPinned
}

// writeAt makes the file new beside its place and renames it there.
func writeAt(fd int, name string, p *pin) (id, error) {
	tmp := harmless(name) + rand.Text()[:8]
	out, err := unix.Openat(fd, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, p.mode)
	if err != nil {
		return id{}, err
	}
	f := os.NewFile(uintptr(out), tmp)
	_, err = f.Write(p.text)
	err = errors.Join(err, f.Chmod(fs.FileMode(p.mode)))
	if os.Geteuid() == 0 {
		err = errors.Join(err, f.Chown(p.uid, p.gid))
	}
	var st unix.Stat_t
	err = errors.Join(err, unix.Fstat(out, &st), f.Close())
	if err == nil {
		err = unix.Renameat(fd, tmp, fd, name)
	}
	if err != nil {
		_ = unix.Unlinkat(fd, tmp, 0)
		return id{}, err
	}
	return idOfStat(&st), nil
}

// harmlessChange tells whether two texts of a git configuration differ only in
// what a checkout or a push on the host writes and nothing is executed or
// fetched by: branches that follow a remote of before, and the user's name.
func harmlessChange(before, after []byte) bool {
	// Where lines go on, git and we might not agree on what a comment ends.
	for line := range bytes.Lines(after) {
		if bytes.HasSuffix(bytes.TrimSpace(line), []byte(`\`)) {
			return false
		}
	}
	old, now := parseEntries(string(before)), parseEntries(string(after))
	remotes := map[string]bool{".": true}
	for _, e := range old {
		if name, ok := strings.CutPrefix(e.section, "remote."); ok {
			remotes[name] = true
		}
	}
	plain := func(e entry) bool {
		switch {
		case e.section == "user":
			return e.key == "name" || e.key == "email"
		case strings.HasPrefix(e.section, "branch."):
			return e.key == "merge" || e.key == "rebase" || e.key == "remote" && remotes[e.value]
		}
		return false
	}
	return slices.Equal(slices.DeleteFunc(old, plain), slices.DeleteFunc(now, plain))
}
