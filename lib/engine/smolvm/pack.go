package smolvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
)

// packerVar is in the environment of what makes a pack: "smolvm pack create" boots
// a guest for it, and leaves that guest running when it is killed itself. The value
// is the identity of who asked for the pack.
const packerVar = "BOTTLE_PACKER"

// PackName is what the pack of a root file system is called in the cache, after
// its digest: smolvm's packs are not the same bytes every time, so they go by what
// they were made of and by which smolvm. It is a fault (78) where this smolvm packs
// registries' images alone.
func (e *Engine) PackName(ctx context.Context) (string, error) {
	if err := e.Available(ctx); err != nil {
		return "", err
	}
	c, err := e.client(ctx)
	if err != nil {
		return "", err
	}
	local, err := c.PacksLocalImages(ctx)
	if err != nil {
		return "", err
	}
	if !local {
		return "", fault.New(fault.Host, "smolvm_pack", "smolvm %s cannot make a .smolmachine of a local image", c.Version).
			WithHint("leave --smolmachine out: the root file system itself is used; or install a newer one with bottle-vm doctor --install smolvm")
	}
	return "smolvm-" + c.Version.String() + "-" + runtime.GOARCH + ".smolmachine", nil
}

// Pack makes a .smolmachine of a root file system, in dir, and gives its path. It
// boots a guest. What smolvm or that guest leave outside of dir when they fail or
// are cut off is cleared away.
func (e *Engine) Pack(ctx context.Context, rootfs, dir string) (string, error) {
	c, err := e.client(ctx)
	if err != nil {
		return "", err
	}
	self, err := state.Identify(os.Getpid())
	if err != nil {
		return "", fault.New(fault.Host, "no_proc", "this host does not tell process identities: %w", err)
	}
	packer := *c
	packer.Env = append(append([]string{}, c.Env...), packerVar+"="+writeIdentity(self))
	begun := guestMaker{since: time.Now()}
	packer.OnStart = func(pid int) { begun.pid = pid }
	out := filepath.Join(dir, "pack")
	err = packer.PackCreate(ctx, smolvm.PackSpec{Image: rootfs + "/", Output: out, StagingDir: dir})
	if err == nil {
		return out + ".smolmachine", nil
	}
	return "", join(explainBoot(err, e.getenv, false), e.endPack(begun, self))
}

// guestMaker is one "smolvm pack create".
type guestMaker struct {
	pid   int
	since time.Time
}

// named tells whether name is that of a guest which it has booted: smolvm calls
// them pack-PID-NANOSECONDS.
func (m guestMaker) named(name string) bool {
	rest, ok := strings.CutPrefix(name, fmt.Sprintf("pack-%d-", m.pid))
	nano, err := strconv.ParseInt(rest, 10, 64)
	return ok && err == nil && m.pid > 0 && nano >= m.since.UnixNano()
}

// endPack ends what packer still has running for a pack, and removes smolvm's
// folders of the guests that were booted for it.
func (e *Engine) endPack(by guestMaker, packer plan.Process) error {
	var errs []error
	for _, h := range e.PackHelpers() {
		if h.Packer == packer {
			errs = append(errs, e.EndPackHelper(h))
		}
	}
	names, err := filepath.Glob(filepath.Join(e.vmsDir(), "*", "name"))
	errs = append(errs, err)
	for _, path := range names {
		name, err := os.ReadFile(path)
		if err == nil && by.named(string(name)) {
			err = state.RemoveAll(filepath.Dir(path))
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return join(errs...)
}

// PackHelper is a process that makes a pack: smolvm, or the guest's monitor.
type PackHelper struct {
	Process plan.Process
	Packer  plan.Process // who asked for it
	Dir     string       // of the guest, if it is a monitor
}

// PackHelpers gives those of this user that run.
func (e *Engine) PackHelpers() []PackHelper {
	var all []PackHelper
	for _, pid := range processes() {
		packer, ok := packerOf(pid)
		if !ok || pid == os.Getpid() {
			continue
		}
		id, err := state.Identify(pid)
		if err != nil || !ownProcess(pid) {
			continue
		}
		h := PackHelper{Process: id, Packer: packer}
		if argv := argvOf(pid); len(argv) > 2 && argv[1] == "_boot-vm" && filepath.IsAbs(argv[2]) {
			h.Dir = filepath.Dir(argv[2])
		}
		all = append(all, h)
	}
	return all
}

// packerOf reads who asked for what pid does from its environment, in which its
// user can have written anything.
func packerOf(pid int) (plan.Process, bool) {
	for _, v := range environOf(pid) {
		if value, ok := strings.CutPrefix(v, packerVar+"="); ok {
			return readIdentity(value)
		}
	}
	return plan.Process{}, false
}

// EndPackHelper kills one and removes its guest's folder.
func (e *Engine) EndPackHelper(h PackHelper) error {
	if err := state.Kill(h.Process, 0); err != nil {
		return err
	}
	if h.Dir == "" || filepath.Dir(h.Dir) != e.vmsDir() {
		return nil
	}
	return state.RemoveAll(h.Dir)
}

// writeIdentity and readIdentity are the form of packerVar's value.
func writeIdentity(p plan.Process) string {
	return fmt.Sprintf("%d:%d:%s", p.PID, p.StartTime, p.BootID)
}

func readIdentity(s string) (p plan.Process, ok bool) {
	f := strings.SplitN(s, ":", 3)
	if len(f) != 3 {
		return p, false
	}
	var err1, err2 error
	p.PID, err1 = strconv.Atoi(f[0])
	p.StartTime, err2 = strconv.ParseUint(f[1], 10, 64)
	p.BootID = f[2]
	return p, err1 == nil && err2 == nil
}

// vmsDir is where smolvm keeps the folders of guests: below the user's cache
// folder, in 1.9.1 and 1.32.2.
func (e *Engine) vmsDir() string {
	cache := e.getenv("XDG_CACHE_HOME")
	if runtime.GOOS == "darwin" {
		cache = filepath.Join(e.getenv("HOME"), "Library", "Caches")
	} else if !filepath.IsAbs(cache) {
		cache = filepath.Join(e.getenv("HOME"), ".cache")
	}
	return filepath.Join(cache, "smolvm", "vms")
}
