package gitguard

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Bounds of the watch. Folders beyond MaxWatches, and those for which the kernel
// has no watch left (fs.inotify.max_user_watches), are looked at from time to
// time instead.
const (
	MaxWatches = 20_000
	scanEvery  = 5 * time.Second
	scanShare  = 20 // a scan of all may take one part in so many of the time
)

const interest = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_ATTRIB | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK

// Watch sets aside what appears, at once, and reports it, until ctx ends. It
// first looks at everything, so that nothing that came before the watch is
// missed. What has to be covered again, or appears under a name to hide, is
// covered (OnLost) and reported with MovedTo empty.
func (g *Guard) Watch(ctx context.Context, report func(Finding)) error {
	if g.opts.Mode != "rw" {
		<-ctx.Done()
		return nil
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fault.New(fault.Host, "no_inotify", "watching the workspace: %w", err).
			WithHint("raise fs.inotify.max_user_instances")
	}
	report, done := g.covering(report)
	defer done()
	w := &watcher{Guard: g, events: os.NewFile(uintptr(fd), "inotify"), fd: fd, folders: map[int32]string{}, report: report}
	// The kernel takes 8 to 18 ms to close a watch; nobody has to wait for it.
	defer func() { go w.events.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = w.events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := w.all(); err != nil {
		return err
	}
	for ctx.Err() == nil {
		if err := w.round(ctx); err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

type watcher struct {
	*Guard
	events  *os.File
	fd      int
	folders map[int32]string // watch descriptor -> path when it was added
	full    bool             // some folders are not watched
	told    bool
	next    time.Time // of the next look at everything, if full
	report  func(Finding)
}

// all looks at everything and watches every folder it comes by.
func (w *watcher) all() error {
	w.full = false
	start := time.Now()
	if err := w.look(false, w.add, w.report); err != nil {
		return err
	}
	took := time.Since(start)
	w.next = time.Now().Add(max(scanEvery, scanShare*took))
	if w.full && !w.told {
		w.told = true
		w.report(Finding{Path: ".", What: fmt.Sprintf(
			"the workspace has more folders than can be watched (%d are); the rest is looked at every %s",
			len(w.folders), max(scanEvery, scanShare*took).Round(time.Second))})
	}
	return nil
}

// add watches the folder that is open, whatever its path means by now.
func (w *watcher) add(pl place) {
	if len(w.folders) >= MaxWatches {
		w.full = true
		return
	}
	mask := uint32(interest)
	if pl.repo != nil && (pl.sub == "." || pl.sub == "info") {
		mask |= unix.IN_MODIFY // of a configuration that lost its cover
	}
	wd, err := unix.InotifyAddWatch(w.fd, fmt.Sprintf("/proc/self/fd/%d", pl.fd()), mask)
	if err != nil {
		w.full = true
		return
	}
	w.folders[int32(wd)] = pl.rel
}

// round waits for events and serves them. A look at everything is due when
// events were lost, and from time to time while something is not watched.
func (w *watcher) round(ctx context.Context) error {
	var deadline time.Time
	if w.full {
		deadline = w.next
	}
	if err := w.events.SetReadDeadline(deadline); err != nil {
		return fault.New(fault.IO, "watch_failed", "watching the workspace: %w", err)
	}
	// The end of ctx sets a deadline too, and must not have been undone just now.
	if ctx.Err() != nil {
		return nil
	}
	buf := make([]byte, 64<<10)
	n, err := w.events.Read(buf)
	if ctx.Err() != nil {
		return nil // the sweep looks at all there is
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return w.all()
	}
	if err != nil {
		return fault.New(fault.IO, "watch_failed", "watching the workspace: %w", err)
	}
	lost := false
	for buf = buf[:n]; len(buf) >= unix.SizeofInotifyEvent; {
		wd := int32(binary.NativeEndian.Uint32(buf))
		mask := binary.NativeEndian.Uint32(buf[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[12:]))
		name := string(bytes.TrimRight(buf[unix.SizeofInotifyEvent:end], "\x00"))
		buf = buf[end:]
		switch {
		case mask&unix.IN_Q_OVERFLOW != 0:
			lost = true
		case mask&unix.IN_IGNORED != 0:
			delete(w.folders, wd)
		default:
			w.event(wd, name, mask)
		}
	}
	if lost {
		return w.all()
	}
	return nil
}

// event serves one. A folder that isn't where it was needs nothing here: its
// new place reports the move, and all of it is looked at then.
func (w *watcher) event(wd int32, name string, mask uint32) {
	rel, ok := w.folders[wd]
	if !ok || name == "" || mask&unix.IN_ISDIR == 0 && (mask&unix.IN_ATTRIB != 0 || !w.matters(rel, name)) {
		return
	}
	if mask&unix.IN_ATTRIB != 0 && len(w.shut) == 0 {
		return
	}
	pl, err := w.openRoot()
	if err != nil {
		return // the workspace itself is gone; the sweep will say so
	}
	if pl, ok = w.descend(pl, rel); !ok {
		return
	}
	defer pl.dir.Close()
	var st unix.Stat_t
	if unix.Fstatat(pl.fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return
	}
	if was := idOfStat(&st); mask&unix.IN_ATTRIB != 0 {
		if !w.shut[was] {
			return
		}
		delete(w.shut, was)
	}
	s := &scan{Guard: w.Guard, appeared: true, renamed: mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0, watch: w.add, findings: w.report}
	s.entry(pl, name, typeOf(&st))
}

// matters keeps the many files of a build from costing more than their event.
func (w *watcher) matters(rel, name string) bool {
	switch name {
	case "HEAD", "commondir", "objects", "refs":
		return true
	}
	return w.pins[path.Join(rel, name)] != nil || strings.EqualFold(name, ".git") || w.outer[path.Join(rel, name)] || w.hide.match(name) || w.inRepository(rel)
}

func (w *watcher) inRepository(rel string) bool {
	return strings.Contains("/"+strings.ToLower(rel)+"/", "/.git/") || len(w.repos) > 0 && w.bareAbove(rel)
}

// bareAbove tells whether the path lies in a bare repository of the start.
func (w *watcher) bareAbove(rel string) bool {
	for _, b := range w.bares {
		if rel == b || strings.HasPrefix(rel, b+"/") || b == "." {
			return true
		}
	}
	return false
}

func typeOf(st *unix.Stat_t) os.FileMode {
	switch uint32(st.Mode) & unix.S_IFMT {
	case unix.S_IFDIR:
		return os.ModeDir
	case unix.S_IFLNK:
		return os.ModeSymlink
	case unix.S_IFIFO:
		return os.ModeNamedPipe
	case unix.S_IFSOCK:
		return os.ModeSocket
	case unix.S_IFCHR, unix.S_IFBLK:
		return os.ModeDevice
	}
	return 0
}

// unlock opens a folder of ours, with all rights for us whatever its mode was.
func unlock(dir int, name string) (int, error) {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, err
	}
	if int(st.Uid) == os.Geteuid() && st.Mode&0o700 != 0o700 {
		if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), uint32(st.Mode)&0o7777|0o700); err != nil {
			return -1, err
		}
	}
	return unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}
