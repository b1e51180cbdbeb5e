package smolvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
)

// Delete ends the machine and removes all that was made for it. Idempotent.
func (e *Engine) Delete(ctx context.Context, r engine.Ref) error {
	if _, err := os.Lstat(ownDir(r.Dir)); errors.Is(err, fs.ErrNotExist) {
		return nil // Start makes it first: without it there never was a machine
	}
	c, err := e.client(ctx)
	if err != nil {
		// What smolvm keeps of it only smolvm can remove, but the guest ends now.
		_, kerr := killMonitors(ctx, notedDir(r.ID, r.Dir))
		return join(err, killCalls(ctx, r.ID), kerr)
	}
	mine := func(m smolvm.Machine) (bool, error) { return true, ours(m, tagOf(r.Dir)) }
	if err := e.remove(ctx, c, r.ID, r.Dir, mine); err != nil {
		return err
	}
	return state.RemoveAll(ownDir(r.Dir))
}

// remove deletes the machine and then every monitor that still has its files:
// smolvm 1.9.1 and 1.32.2 lose sight of a monitor whose start was cut off, say
// "Deleted", and leave it running. meant tells whether the machine that smolvm
// has under this name is the one; another is not touched. The name could still
// become another machine's between that question and the deletion: smolvm
// deletes by name alone, and takes no name that exists.
func (e *Engine) remove(ctx context.Context, c *smolvm.Client, id, dir string, meant func(smolvm.Machine) (bool, error)) error {
	var errs []error
	m, err := c.MachineStatus(ctx, id)
	if err == nil {
		if yes, err := meant(m); !yes || err != nil {
			return err
		}
	}
	// A call that a killed keeper has left would go on and boot what is deleted.
	errs = append(errs, killCalls(ctx, id))
	dirs := dataDirs(ctx, c, id, dir)
	switch {
	case errors.Is(err, smolvm.ErrNotFound):
	case err != nil:
		errs = append(errs, err)
	default:
		gone := func(err error) bool { return err == nil || errors.Is(err, smolvm.ErrNotFound) }
		if err := c.MachineDelete(ctx, id); !gone(err) {
			// A monitor that still writes into the folder that smolvm is removing
			// ("Directory not empty"): once it is gone, smolvm can.
			if _, kerr := killMonitors(ctx, dirs); kerr != nil {
				errs = append(errs, err, kerr)
			} else if err := c.MachineDelete(ctx, id); !gone(err) {
				errs = append(errs, err)
			}
		}
	}
	_, err = killMonitors(ctx, dirs)
	return join(append(errs, err)...)
}

// dataDirs gives smolvm's folders for the machine: as it says now, and as was
// noted before the start.
func dataDirs(ctx context.Context, c *smolvm.Client, id, dir string) []string {
	var dirs []string
	if d, err := c.MachineDataDir(ctx, id); err == nil {
		dirs = append(dirs, d)
	}
	return append(dirs, notedDir(id, dir)...)
}

// notedDir gives the folder that was noted before the start, if one was.
func notedDir(id, dir string) []string {
	if dir == "" {
		return nil
	}
	if d := readRecord(dir, id).DataDir; filepath.IsAbs(d) && filepath.Dir(d) != "/" {
		return []string{d}
	}
	return nil
}

// killCalls ends the calls of smolvm that make or start the machine.
func killCalls(ctx context.Context, id string) error {
	var errs []error
	for _, pid := range processes() {
		if !callFor(pid, id) {
			continue
		}
		err := killProcess(ctx, pid, func() bool {
			if !callFor(pid, id) {
				return false
			}
			if group, err := unix.Getpgid(pid); err == nil && group == pid {
				_ = unix.Kill(-pid, unix.SIGKILL) // its helpers; itself is held
			}
			return true
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("smolvm's process %d: %w", pid, err))
		}
	}
	return join(errs...)
}

// callFor tells whether pid is "smolvm machine create|start --name ID …" or
// "smolvm machine fork --golden BASE --name ID …", which newer ones call "branch
// --from BASE". An id is random, so nobody else's is.
func callFor(pid int, id string) bool {
	argv := argvOf(pid)
	if len(argv) > 2 && argv[1] == inMountsVerb {
		argv = argv[2:] // about to become smolvm
	}
	if len(argv) > 1 && argv[1] != "machine" {
		argv = argv[1:] // a script, behind its interpreter
	}
	if len(argv) > 6 && argv[1] == "machine" && (argv[2] == "fork" && argv[3] == "--golden" || argv[2] == "branch" && argv[3] == "--from") {
		argv = append([]string{argv[0], "machine", "start"}, argv[5:]...)
	}
	return len(argv) > 4 && argv[1] == "machine" && (argv[2] == "create" || argv[2] == "start") &&
		argv[3] == "--name" && argv[4] == id && ownProcess(pid)
}

// killMonitors ends the guest monitors whose files are in one of dirs, and gives
// how many there were.
func killMonitors(ctx context.Context, dirs []string) (int, error) {
	var errs []error
	killed := 0
	for _, pid := range processes() {
		if !monitorOf(pid, dirs) {
			continue
		}
		killed++
		// The pid may be another's by the time it is held: look again.
		if err := killProcess(ctx, pid, func() bool { return monitorOf(pid, dirs) }); err != nil {
			errs = append(errs, fmt.Errorf("guest monitor %d: %w", pid, err))
		}
	}
	return killed, join(errs...)
}

// join is errors.Join on one line.
func join(errs ...error) error {
	var all error
	for _, err := range errs {
		switch {
		case err == nil:
		case all == nil:
			all = err
		default:
			all = fmt.Errorf("%w; and %w", all, err)
		}
	}
	return all
}

// monitorOf tells whether pid is "… _boot-vm DIR/boot-config.json" with DIR in
// dirs, the form in which smolvm starts a guest's monitor.
func monitorOf(pid int, dirs []string) bool {
	argv := argvOf(pid)
	if len(argv) < 3 || argv[1] != "_boot-vm" {
		return false
	}
	for _, d := range dirs {
		if filepath.Dir(argv[2]) == filepath.Clean(d) {
			return true
		}
	}
	return false
}

// monitorIn gives this user's guest monitor whose files are in one of dirs, 0 if
// there is none, or more than one.
func monitorIn(dirs []string) int {
	found := 0
	for _, pid := range processes() {
		if !monitorOf(pid, dirs) || !ownProcess(pid) {
			continue
		}
		if found > 0 {
			return 0
		}
		found = pid
	}
	return found
}

// waitEnd blocks until the guest's monitor has ended.
func waitEnd(ctx context.Context, pid int) error {
	if pid <= 0 {
		return fault.New(fault.Unavailable, "smolvm_no_pid", "smolvm does not tell the process of its guest").WithHint("%s", smolvm.InstallHint)
	}
	return waitProcess(ctx, pid)
}
