package gitguard

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Limits of what is kept. A guest that makes repositories in a loop must not
// fill the host's disk with them.
const (
	maxAside     = 500
	maxCopy      = 256 << 20 // bytes to another file system, for one entry
	harmlessHead = "HEAD.set-aside"
)

// asideFolder is where things are moved to; it is made when the first is.
type asideFolder struct {
	make  func() (string, error)
	path  string
	dir   *os.File
	count int
}

var errFlood = errors.New("too many")

// KeepIn says where things are set aside: folder is called once, when there is
// something (state.Root.Aside).
func (g *Guard) KeepIn(folder func() (string, error)) { g.aside.make = folder }

func (a *asideFolder) open() error {
	if a.dir != nil {
		return nil
	}
	if a.make == nil {
		return errors.New("no folder to set it aside into")
	}
	p, err := a.make()
	if err != nil {
		return err
	}
	a.dir, err = os.OpenFile(p, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	a.path = p
	return err
}

// take moves an entry of the folder fd away, at once, and gives where it is now.
// On another file system it gets a harmless name first and is copied then.
func (a *asideFolder) take(fd int, name, rel string) (string, error) {
	if a.count >= maxAside {
		if err := removeAt(fd, name, 0); err != nil {
			return "", err
		}
		return "", fmt.Errorf("removed, because %d things were set aside already", maxAside)
	}
	if err := a.open(); err != nil {
		// Better out of git's sight here than armed.
		return a.rename(fd, name, rel, err)
	}
	to := a.free(rel)
	err := unix.Renameat(fd, name, int(a.dir.Fd()), to)
	if errors.Is(err, unix.EXDEV) {
		err = a.copyAway(fd, name, to)
		if errors.Is(err, errFlood) {
			return a.rename(fd, name, rel, nil)
		}
	}
	if err != nil {
		return "", err
	}
	return filepath.Join(a.path, to), disarmAt(int(a.dir.Fd()), to, 0)
}

// free gives a name that nothing in the folder has: an earlier process may have
// put things there.
func (a *asideFolder) free(rel string) string {
	for {
		a.count++
		to := fmt.Sprintf("%03d-%s", a.count, slug(rel))
		var st unix.Stat_t
		if unix.Fstatat(int(a.dir.Fd()), to, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			return to
		}
	}
}

// notes is the file beside what was set aside that says what it is: it stays
// when the bottle and its log are gone.
const notes = "findings.txt"

// note is best effort: the finding is reported all the same.
func (a *asideFolder) note(f Finding) {
	if a.dir == nil {
		return
	}
	fd, err := unix.Openat(int(a.dir.Fd()), notes, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return
	}
	file := os.NewFile(uintptr(fd), notes)
	_, _ = fmt.Fprintf(file, "%s %q: %s; moved to %q\n", time.Now().UTC().Format(time.RFC3339), f.Path, f.What, f.MovedTo)
	_ = file.Close()
}

// rename gives an entry a name in its own folder that means nothing to git.
func (a *asideFolder) rename(fd int, name, rel string, why error) (string, error) {
	to := harmless(name)
	if err := unix.Renameat(fd, name, fd, to); err != nil {
		return "", err
	}
	return filepath.Join("the workspace as "+filepath.Dir(rel), to), errors.Join(why, disarmAt(fd, to, 0))
}

func harmless(name string) string {
	return "set-aside-" + strings.TrimLeft(name, ".") + "-" + rand.Text()[:8]
}

func (a *asideFolder) copyAway(fd int, name, to string) error {
	tmp := harmless(name)
	if err := unix.Renameat(fd, name, fd, tmp); err != nil {
		return err
	}
	left := int64(maxCopy)
	err := copyAt(fd, tmp, int(a.dir.Fd()), to, &left, 0)
	if err != nil {
		_ = removeAt(int(a.dir.Fd()), to, 0)
		// Nothing is lost: it goes back under its name for the caller to rename.
		return errors.Join(err, unix.Renameat(fd, tmp, fd, name))
	}
	return removeAt(fd, tmp, 0)
}

// slug makes a path a file name that is safe to print and to type.
func slug(rel string) string {
	s := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.' {
			return r
		}
		return '_'
	}, rel)
	if len(s) > 80 {
		s = s[len(s)-80:]
	}
	return s
}

// disarm goes over everything once more: while the bottle ran the guest could
// still reach a folder it had open.
func (a *asideFolder) disarm() error {
	if a.dir == nil {
		return nil
	}
	names, err := list(int(a.dir.Fd()))
	for _, n := range names {
		err = errors.Join(err, disarmAt(int(a.dir.Fd()), n.Name(), 0))
	}
	if err != nil {
		return fault.New(fault.IO, "aside_failed", "what was set aside in %s may still be a git repository: %w", a.path, err)
	}
	return nil
}

// disarmAt makes sure that git takes nothing in a tree for a repository, even
// when somebody stands in it to look.
func disarmAt(fd int, name string, depth int) error {
	in, err := unlock(fd, name)
	if err != nil {
		return nil // no folder
	}
	sub := os.NewFile(uintptr(in), name)
	defer sub.Close()
	if depth > maxDepth {
		return nil // nobody stands there, and it must not keep a bottle from ending
	}
	entries, err := list(int(sub.Fd()))
	for _, e := range entries {
		n := e.Name()
		if n == "HEAD" || strings.EqualFold(n, ".git") {
			to := harmlessHead
			if n != "HEAD" {
				to = harmless(n)
			}
			err = errors.Join(err, unix.Renameat(int(sub.Fd()), n, int(sub.Fd()), to))
			n = to
		}
		if e.IsDir() {
			err = errors.Join(err, disarmAt(int(sub.Fd()), n, depth+1))
		}
	}
	return err
}

func openDirAt(fd int, name string) (*os.File, error) {
	sub, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(sub), name), nil
}

// list reads a folder through a descriptor of its own, from its beginning.
func list(fd int) ([]fs.DirEntry, error) {
	d, err := openDirAt(fd, ".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.ReadDir(-1)
}

func removeAt(fd int, name string, depth int) error {
	err := unix.Unlinkat(fd, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if depth > maxDepth {
		return fmt.Errorf("%s is too deep to remove", name)
	}
	sub, oerr := openDirAt(fd, name)
	if oerr != nil {
		return err
	}
	defer sub.Close()
	entries, err := list(int(sub.Fd()))
	for _, e := range entries {
		err = errors.Join(err, removeAt(int(sub.Fd()), e.Name(), depth+1))
	}
	return errors.Join(err, unix.Unlinkat(fd, name, unix.AT_REMOVEDIR))
}

// copyAt copies folders, regular files and symlinks (as such).
func copyAt(fd int, name string, toFD int, to string, left *int64, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	switch uint32(st.Mode) & unix.S_IFMT {
	case unix.S_IFDIR:
		return copyDirAt(fd, name, toFD, to, left, depth)
	case unix.S_IFREG:
		return copyFileAt(fd, name, toFD, to, left)
	case unix.S_IFLNK:
		buf := make([]byte, 4096)
		n, err := unix.Readlinkat(fd, name, buf)
		if err != nil {
			return err
		}
		return unix.Symlinkat(string(buf[:n]), toFD, to)
	}
	return nil // FIFOs and sockets hold nothing
}

func copyDirAt(fd int, name string, toFD int, to string, left *int64, depth int) error {
	if depth > maxDepth {
		return errFlood
	}
	from, err := openDirAt(fd, name)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := unix.Mkdirat(toFD, to, 0o700); err != nil {
		return err
	}
	dst, err := openDirAt(toFD, to)
	if err != nil {
		return err
	}
	defer dst.Close()
	entries, err := list(int(from.Fd()))
	if err != nil {
		return err
	}
	for _, e := range entries {
		*left -= 4096
		err := copyAt(int(from.Fd()), e.Name(), int(dst.Fd()), e.Name(), left, depth+1)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

func copyFileAt(fd int, name string, toFD int, to string, left *int64) error {
	in, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	src := os.NewFile(uintptr(in), name)
	defer src.Close()
	out, err := unix.Openat(toFD, to, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	dst := os.NewFile(uintptr(out), to)
	n, err := io.Copy(dst, io.LimitReader(src, *left+1))
	*left -= n
	if err = errors.Join(err, dst.Close()); err == nil && *left < 0 {
		err = errFlood
	}
	return err
}
