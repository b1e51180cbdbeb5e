// Package reaper ends bottles and what is left of them, for down and gc: it
// collects the facts that lib/orphan judges, and removes what it is told to.
//
// Everything here is idempotent, goes on past errors and reports all of them.
// A process is only ever signalled by its whole identity, and a folder is only
// removed when nothing that its record names is alive and nothing is mounted
// below it.
package reaper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gitguard"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

// Time limits. Nothing waits that long in a healthy world: ends of processes
// are awaited, not polled.
const (
	KeeperGrace = 10 * time.Second // for a keeper that takes its bottle down itself
	LockWait    = 10 * time.Second // for another down or gc at the same bottle
	lockPoll    = 5 * time.Millisecond
)

// Remove ends a bottle and removes all of it: keeper (SIGTERM, on which it
// cleans up by itself; then SIGKILL), recorded processes, what the engine knows,
// mounts, folders. rec may be nil for a folder without a readable record.
// engines gives an engine by name, or nil for one that this host does not have.
//
// A bottle that is not there is success. Errors are faults, joined: 75 for a
// bottle that is still being made by another process, or is locked; 74 for what
// could not be removed. What could not be ended keeps its record, so that the
// next try still finds it.
func Remove(ctx context.Context, root *state.Root, b *state.Bottle, rec *state.Record, engines func(name string) engine.Engine) error {
	if rec != nil && rec.UID != os.Geteuid() {
		return fault.New(fault.NoPerm, "not_yours", "bottle %s belongs to uid %d", b.ID, rec.UID)
	}
	if err := endKeeper(b, rec); err != nil {
		return err
	}
	if err := endSuccessor(b); err != nil {
		return err
	}
	lock, err := lockBottle(ctx, b)
	if errors.Is(err, fs.ErrNotExist) {
		return removeRunDir(root, b, rec) // the keeper, or another down, was first
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	// The keeper may have recorded more while it was ending.
	if now, err := b.Load(); err == nil {
		rec = now
	}
	if err := makerAtWork(b, rec); err != nil {
		return err
	}
	errs := []error{endProcesses(b, rec), engineDelete(ctx, b, rec, engines)}
	for _, dir := range folders(root, b, rec) {
		errs = append(errs, unmountBelow(dir))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := sweep(root, b, rec); err != nil {
		return err
	}
	// The record goes last: it is what the next try starts from.
	if err := removeRunDir(root, b, rec); err != nil {
		return err
	}
	return removeFolder(b, rec)
}

// removeFolder tries again when another down has just made a new lock file in
// the folder: that one removes it too.
func removeFolder(b *state.Bottle, rec *state.Record) (err error) {
	for range 100 {
		if err = b.Remove(rec); !errors.Is(err, syscall.ENOTEMPTY) {
			break
		}
	}
	return err
}

// endKeeper ends the keeper and sees that nobody is just making the bottle.
func endKeeper(b *state.Bottle, rec *state.Record) error {
	if rec == nil || rec.Keeper == nil {
		return makerAtWork(b, rec)
	}
	if err := state.Kill(*rec.Keeper, KeeperGrace); err != nil {
		return failed(b, "ending its keeper", err)
	}
	return nil
}

// endSuccessor ends the keeper to which the one that has ended was just giving the
// bottle, to start its guest again: that would hold it, and run it, from now on.
func endSuccessor(b *state.Bottle) error {
	rec, err := b.Load()
	if err != nil || rec.UID != os.Geteuid() || rec.Phase == state.Starting && rec.Keeper == nil {
		return nil // what is there is judged below
	}
	next := slices.Clone(rec.Processes)
	if rec.Keeper != nil {
		next = append(next, state.Child{Role: "keeper", Process: *rec.Keeper})
	}
	for _, c := range next {
		if c.Role != "keeper" || c.PID == os.Getpid() {
			continue
		}
		if err := state.Kill(c.Process, KeeperGrace); err != nil {
			return failed(b, "ending its keeper", err)
		}
	}
	return nil
}

// makerAtWork refuses to pull a bottle away from under the up that is making
// it, unless that is us.
func makerAtWork(b *state.Bottle, rec *state.Record) error {
	if rec == nil || rec.Phase != state.Starting || rec.Keeper != nil || rec.Creator.PID == os.Getpid() || !state.Alive(rec.Creator) {
		return nil
	}
	return fault.New(fault.TempFail, "being_born", "bottle %s is just being made by process %d", b.ID, rec.Creator.PID).
		WithHint("try again in a moment, or end that process: it takes the bottle back")
}

func lockBottle(ctx context.Context, b *state.Bottle) (*os.File, error) {
	for end := time.Now().Add(LockWait); ; {
		lock, err := b.Lock()
		if err == nil {
			return lock, stillThere(b, lock)
		}
		if f := fault.As(err); f.Exit != fault.TempFail || time.Now().After(end) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

// stillThere tells a lock from that of a folder which was removed while we
// waited for it.
func stillThere(b *state.Bottle, lock *os.File) error {
	held, err := lock.Stat()
	if err == nil {
		var now fs.FileInfo
		if now, err = os.Lstat(b.Path("lock")); err == nil && os.SameFile(held, now) {
			return nil
		}
	}
	lock.Close()
	return errors.Join(fs.ErrNotExist, err)
}

// endProcesses kills what the record names, all at once: the guest's memory and
// the gate's need no farewell when the bottle goes.
func endProcesses(b *state.Bottle, rec *state.Record) error {
	if rec == nil {
		return nil
	}
	children := slices.Clone(rec.Processes)
	if rec.Keeper != nil { // one that was recorded while we looked
		children = append(children, state.Child{Role: "keeper", Process: *rec.Keeper})
	}
	errs := make([]error, len(children))
	var all sync.WaitGroup
	for i, c := range children {
		if c.PID == os.Getpid() {
			continue
		}
		all.Go(func() {
			if err := state.Kill(c.Process, 0); err != nil {
				errs[i] = failed(b, "ending its "+c.Role, err)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

func engineDelete(ctx context.Context, b *state.Bottle, rec *state.Record, engines func(string) engine.Engine) error {
	if rec == nil || rec.Engine == "" || engines == nil {
		return nil
	}
	e := engines(rec.Engine)
	if e == nil {
		return nil
	}
	ref := engine.Ref{ID: b.ID, Dir: b.Dir, RunDir: rec.RunDir, Bottle: policy(b)}
	if err := e.Delete(ctx, ref); err != nil {
		return fmt.Errorf("bottle %s: engine %s: %w", b.ID, rec.Engine, err)
	}
	return nil
}

// sweep is the last look at the workspace, which a keeper that was killed could
// not take any more. After a reboot nothing can be told from its identity.
func sweep(root *state.Root, b *state.Bottle, rec *state.Record) error {
	self, err := state.Identify(os.Getpid())
	if err != nil || rec == nil || rec.Keeper == nil || rec.Keeper.BootID != self.BootID {
		return nil
	}
	g, err := gitguard.Resume(b.Path(gitguard.StateFile))
	if err != nil || g == nil {
		return err
	}
	g.KeepIn(func() (string, error) { return root.Aside(b.ID) })
	// What it finds is noted beside what it set aside.
	_, err = g.Sweep()
	return err
}

// policy is the bottle section of the stored document, if there is one.
func policy(b *state.Bottle) *plan.Bottle {
	d, err := b.Document()
	if err != nil || d == nil {
		return nil
	}
	p, err := d.Bottle()
	if err != nil {
		return nil
	}
	return p
}

// folders are those that are about to be removed.
func folders(root *state.Root, b *state.Bottle, rec *state.Record) []string {
	return []string{b.Dir, runDir(root, b, rec)}
}

// runDir is the bottle's folder for sockets: the record's, if it is where it
// may be, or the one that state.Create would have made.
func runDir(root *state.Root, b *state.Bottle, rec *state.Record) string {
	if rec != nil && filepath.Dir(rec.RunDir) == root.RunDir {
		return rec.RunDir
	}
	return filepath.Join(root.RunDir, b.ID[len(b.ID)-8:])
}

func removeRunDir(root *state.Root, b *state.Bottle, rec *state.Record) error {
	return removeSockets(root, runDir(root, b, rec))
}

// removeSockets removes a folder below the runtime folder, which must be ours:
// it may lie in /tmp.
func removeSockets(root *state.Root, dir string) error {
	fi, err := os.Lstat(root.RunDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.New(fault.IO, "remove_failed", "%w", err)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); !fi.IsDir() || ok && int(st.Uid) != os.Geteuid() || fi.Mode().Perm()&0o022 != 0 {
		return fault.New(fault.NoPerm, "bad_state_dir", "%s is not a folder of yours alone", root.RunDir).
			WithHint("remove it, or set XDG_RUNTIME_DIR")
	}
	if err := unmountBelow(dir); err != nil {
		return err
	}
	if err := state.RemoveAll(dir); err != nil {
		return fault.New(fault.IO, "remove_failed", "removing %s: %w", dir, err)
	}
	return nil
}

func failed(b *state.Bottle, what string, err error) error {
	return fault.New(fault.IO, "remove_failed", "bottle %s: %s: %w", b.ID, what, err).
		WithHint("bottle-gc --apply tries again")
}
