//go:build linux

package gvisor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/runsc"
	"github.com/bottle-tools/bottle/lib/state"
)

// endLimit is how long a killed process may take to go.
const endLimit = 10 * time.Second

// Alive tells whether the guest still runs.
func (e *Engine) Alive(_ context.Context, r engine.Ref) (bool, error) {
	rec, err := loadRecord(r.Dir)
	return err == nil && state.Alive(rec.Sandbox), err
}

// Delete ends the guest and removes what was made of it. It needs nothing but
// r's folders, goes on past errors, and may be called again.
//
// Processes are killed by the identity that Start recorded. Those of a start
// that was cut short before it could record them are told by the --root that
// they were given, a folder that only this user can name its own.
func (e *Engine) Delete(ctx context.Context, r engine.Ref) error {
	rec, err := loadRecord(r.Dir)
	errs := []error{err}
	root := filepath.Join(r.RunDir, "r")
	for _, p := range []plan.Process{rec.Sandbox, rec.Gofer} {
		errs = append(errs, end(p))
	}
	for _, p := range processesOf(root) {
		errs = append(errs, end(p))
	}
	errs = append(errs,
		unmountBelow(root),
		removeCgroups(r.ID, rec.Cgroups),
		removeTree(root),
	)
	for _, d := range workDirs(r.ID, r.Dir, r.RunDir) {
		errs = append(errs, removeTree(d))
	}
	if err := errors.Join(errs...); err == nil {
		// The record goes last: until then Delete can be tried again.
		errs = append(errs, os.RemoveAll(filepath.Join(r.Dir, recordName)), os.RemoveAll(filepath.Join(r.Dir, recordName+".new")))
	}
	if err := errors.Join(errs...); err != nil {
		return fault.New(fault.IO, "engine_delete", "deleting sandbox %s: %w", r.ID, err)
	}
	return nil
}

func end(p plan.Process) error {
	if !state.Alive(p) {
		return nil
	}
	if err := state.Signal(p, unix.SIGKILL); err != nil {
		return err
	}
	if !state.Await(p, endLimit) {
		return fmt.Errorf("process %d does not end", p.PID)
	}
	return nil
}

// processesOf finds runsc's processes that were started with --root=root.
func processesOf(root string) []plan.Process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []plan.Process
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		p, err := state.Identify(pid)
		if err != nil {
			continue
		}
		// Read after the identity: a pid that was given away meanwhile does not
		// match it any more.
		cmdline, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err == nil && isOurs(cmdline, root) {
			out = append(out, p)
		}
	}
	return out
}

// isOurs looks at a command line, NUL-separated, as in /proc/PID/cmdline.
func isOurs(cmdline []byte, root string) bool {
	args := strings.Split(string(bytes.TrimSuffix(cmdline, []byte{0})), "\x00")
	switch filepath.Base(args[0]) {
	case runsc.Name, "runsc", "runsc-sandbox", "runsc-gofer":
	default:
		return false
	}
	for _, a := range args[1:] {
		if a == "--root="+root {
			return true
		}
	}
	return false
}

// unmountBelow takes away mounts below dir: runsc pins a network namespace in
// its state folder when it runs as root.
func unmountBelow(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 5 {
			continue
		}
		at := unescape.Replace(f[4])
		if !under(at, dir) {
			continue
		}
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", at, err))
		}
	}
	return errors.Join(errs...)
}

// unescape undoes the octal escapes of mountinfo (proc(5)).
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// removeTree removes a folder of ours; links in it are not followed.
func removeTree(dir string) error {
	parent, err := os.OpenRoot(filepath.Dir(dir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	fi, err := parent.Lstat(filepath.Base(dir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// In a folder that others can write too, the name may be somebody else's.
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return nil
	}
	return parent.RemoveAll(filepath.Base(dir))
}

// Usage asks the guest's kernel what it uses. Pids counts threads, the helper's
// too.
func (e *Engine) Usage(ctx context.Context, r engine.Ref) (engine.Usage, error) {
	rs, err := e.runsc(r.RunDir)
	if err != nil {
		return engine.Usage{}, err
	}
	st, err := rs.Stats(ctx, r.ID)
	if err != nil {
		return engine.Usage{}, asFault(err)
	}
	return engine.Usage{MemoryBytes: st.MemoryBytes, Pids: max(0, st.Pids-helperTasks)}, nil
}

// checkLimit is how long a throw-away guest may take; a good host takes 0.2 s.
const checkLimit = 20 * time.Second

// Check boots a guest in dir, an empty folder of the caller's, runs true in it
// and clears it away.
func (e *Engine) Check(ctx context.Context, dir string) (err error) {
	if err := e.Available(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	run, err := os.MkdirTemp("", "bottle-check-")
	if err != nil {
		return asFault(err)
	}
	defer os.RemoveAll(run)
	workspace := filepath.Join(dir, "workspace")
	if err := os.Mkdir(workspace, 0o700); err != nil {
		return asFault(err)
	}
	b := &plan.Bottle{User: "root"}
	s := &engine.Spec{ID: "check", Bottle: b, Dir: dir, RunDir: run, Workspace: workspace,
		HostUID: os.Geteuid(), HostGID: os.Getegid()}
	// The helper has no part in this: a plain file takes its place.
	s.GuestHelper = filepath.Join(dir, "helper")
	if err := writeNew(s.GuestHelper, nil); err != nil {
		return asFault(err)
	}
	ref := engine.Ref{ID: s.ID, Dir: dir, RunDir: run, Bottle: b}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkLimit)
		defer cancel()
		err = errors.Join(err, e.Delete(clean, ref), os.RemoveAll(workspace), os.Remove(s.GuestHelper))
	}()
	if _, err := e.boot(ctx, s, []string{"/bin/sleep", "60"}); err != nil {
		return err
	}
	status, err := e.Exec(ctx, ref, engine.ExecRequest{Argv: []string{"/bin/true"}, Dir: "/"})
	if err != nil {
		return err
	}
	if status != 0 {
		return fault.New(fault.Unavailable, "engine_failed", "a guest was started, but /bin/true in it ended with %d", status)
	}
	return nil
}
