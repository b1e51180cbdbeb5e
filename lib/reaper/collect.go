package reaper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/orphan"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

// Sources are the resources outside the state folder; each may be nil.
type Sources struct {
	// Machines lists the machines that were made for bottles of this state
	// folder, DeleteMachine ends one of them by name (one that is gone, or is
	// another machine by now, is success).
	Machines      func(ctx context.Context) ([]orphan.VM, error)
	DeleteMachine func(ctx context.Context, name string) error
	// Bases lists the prepared machines whose folders are in dir, with the bottles
	// that are copies of each; one that is used for life is not kept by age.
	// RemoveBase removes the one in a folder, unless it is in use.
	Bases      func(dir string, bottles []*state.Bottle) ([]orphan.Prepared, error)
	BaseLife   time.Duration
	RemoveBase func(ctx context.Context, dir string) error
	// StaleCache names what dead packers left in the image cache, SweepCache
	// removes all of that.
	StaleCache func() ([]string, error)
	SweepCache func() error
	// Packers are processes that make packs of images, EndPacker ends one and
	// removes its folder.
	Packers   func() []orphan.Packer
	EndPacker func(ctx context.Context, p orphan.Packer) error
}

// Collect looks at the world for lib/orphan. It changes nothing. What can't be
// looked at is in the error; the facts hold all the rest.
func Collect(ctx context.Context, root *state.Root, now time.Time, minAge time.Duration, src Sources) (orphan.Facts, error) {
	f := facts(root, now, minAge)
	var errs []error
	bottles, err := root.List()
	errs = append(errs, err)
	for _, b := range bottles {
		errs = append(errs, addBottle(&f, root, b))
	}
	f.RunDirs, err = runDirs(root)
	errs = append(errs, err)
	if src.Machines != nil {
		f.Machines, err = src.Machines(ctx)
		errs = append(errs, err)
		for _, m := range f.Machines {
			if m.Maker != nil {
				see(&f, *m.Maker)
			}
		}
	}
	if src.Bases != nil {
		f.BaseLife = src.BaseLife
		f.Bases, err = src.Bases(root.Warm(), bottles)
		errs = append(errs, err)
	}
	if src.StaleCache != nil {
		f.Cache, err = src.StaleCache()
		errs = append(errs, err)
	}
	if src.Packers != nil {
		f.Packers = src.Packers()
		for _, p := range f.Packers {
			if now, err := state.Identify(p.For.PID); err == nil {
				f.Seen[p.For.PID] = now
			}
		}
	}
	return f, errors.Join(errs...)
}

func facts(root *state.Root, now time.Time, minAge time.Duration) orphan.Facts {
	f := orphan.Facts{Now: now, MinAge: minAge, UID: os.Geteuid(), Seen: map[int]plan.Process{}}
	if self, err := state.Identify(os.Getpid()); err == nil {
		f.BootID = self.BootID
	}
	return f
}

// addBottle adds one folder. A record of another user or of a later version of
// the tools is left alone, the latter with an error.
func addBottle(f *orphan.Facts, root *state.Root, b *state.Bottle) error {
	fi, err := os.Lstat(b.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // removed in this moment
	}
	if err != nil {
		return fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	ob := orphan.Bottle{ID: b.ID, Dir: b.Dir, Changed: fi.ModTime()}
	ob.UID, ob.Inode = ownerInode(fi)
	rec, err := b.Load()
	switch {
	case errors.Is(err, state.ErrNotFound):
		return nil
	case errors.Is(err, state.ErrNoRecord):
		ob.NoRecord = "it has no record that can be read: what made it died before it could write one"
	case err != nil && fault.As(err).Code == "not_yours":
		ob.UID = -1
	case err != nil:
		return fmt.Errorf("bottle %s: %w", b.ID, err)
	case !strings.HasPrefix(rec.Format, "1."):
		return fault.New(fault.Data, "bad_record", "bottle %s: record of format %q, which this version does not know", b.ID, rec.Format).
			WithHint("use the bottle-gc that belongs to the bottle-vm which made it")
	default:
		ob.Record = record(f, rec)
		if fi, err := os.Lstat(b.Path("record.json")); err == nil {
			ob.Changed = fi.ModTime()
		}
	}
	if run := runDir(root, b, rec); isDir(run) {
		ob.RunDir = run
	}
	// Asking for the lock takes it for a moment, which must not happen to a
	// keeper that is about to take it: only where nobody can be.
	if rec != nil && !rec.Live() && !(rec.Phase == state.Starting && state.Alive(rec.Creator)) ||
		rec == nil && f.Now.Sub(ob.Changed) >= f.MinAge {
		ob.Locked = locked(b)
	}
	ob.Mounts, err = mountsBelow(b.Dir)
	f.Bottles = append(f.Bottles, ob)
	return err
}

func record(f *orphan.Facts, rec *state.Record) *orphan.Record {
	r := &orphan.Record{UID: rec.UID, Starting: rec.Phase == state.Starting, Stopping: rec.Phase == state.Stopping,
		Creator: rec.Creator, Owner: rec.Owner, Keeper: rec.Keeper, PlanSHA256: rec.PlanSHA256}
	ask := []plan.Process{rec.Creator}
	for _, p := range []*plan.Process{rec.Owner, rec.Keeper} {
		if p != nil {
			ask = append(ask, *p)
		}
	}
	for _, c := range rec.Processes {
		r.Processes = append(r.Processes, orphan.Child{Role: c.Role, Process: c.Process})
		ask = append(ask, c.Process)
	}
	for _, p := range ask {
		see(f, p)
	}
	return r
}

// see notes what process has the pid of p now.
func see(f *orphan.Facts, p plan.Process) {
	if now, err := state.Identify(p.PID); err == nil {
		f.Seen[p.PID] = now
	}
}

// locked tells whether somebody holds the bottle's lock. It makes no file.
func locked(b *state.Bottle) bool {
	fd, err := syscall.Open(b.Path("lock"), syscall.O_RDWR|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(fd)
	return errors.Is(syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB), syscall.EWOULDBLOCK)
}

// runDirs lists the folders for sockets. The place may be shared by several
// state folders of the same user, so a folder in which somebody answers is in
// use, whoever that is.
func runDirs(root *state.Root) ([]orphan.RunDir, error) {
	fi, err := os.Lstat(root.RunDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	if uid, _ := ownerInode(fi); uid != os.Geteuid() || !fi.IsDir() {
		return nil, nil // another user's; state.Create refuses it
	}
	entries, err := os.ReadDir(root.RunDir)
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	var all []orphan.RunDir
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || !fi.IsDir() {
			continue
		}
		d := orphan.RunDir{Path: filepath.Join(root.RunDir, e.Name()), Changed: fi.ModTime()}
		d.UID, d.Inode = ownerInode(fi)
		d.InUse = answered(d.Path) || prepared(d.Path)
		all = append(all, d)
	}
	return all, nil
}

// prepared tells whether dir is that of a prepared machine in some state folder.
func prepared(dir string) bool {
	base := filepath.Join(dir, "base")
	fi, err := os.Lstat(base)
	return err == nil && fi.Mode()&fs.ModeSymlink != 0 && isDir(base+"/.")
}

// answered tells whether a process listens on a socket below dir.
func answered(dir string) bool {
	used := false
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Type() != fs.ModeSocket {
			return nil
		}
		conn, err := net.DialTimeout("unix", path, 100*time.Millisecond)
		if err == nil {
			conn.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
			used = true
			return fs.SkipAll
		}
		return nil
	})
	return used
}

func ownerInode(fi fs.FileInfo) (uid int, inode uint64) {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid), st.Ino
	}
	return -1, 0
}

func isDir(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && fi.IsDir()
}
