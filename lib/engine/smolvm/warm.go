package smolvm

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engine/smolvm/runner"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/worktree"
)

// A prepared machine ("base") is one that has booted the image with a helper that
// waits, and nothing else: it was made for no bottle, has no workspace, home, CA
// or gate, and stands still once it was copied. A warm bottle is a copy of it.
//
// smolvm gives a copy the folders and the socket of its base, by their paths. So
// those of a base are empty places, and the copy's monitor runs in a mount
// namespace in which they are the bottle's own (package mountns). Its rootfs,
// which the copies share, is read-only there.
//
//	<state>/warm/<key>/base.json   what is known of it
//	                   lock        held (flock) by who makes, copies or removes it
//	                   smolvm/     as in a bottle's folder: its machine.json, and
//	                               its rootfs, the image
//	<run>/w<key>/base              leads to that folder, for who finds this one
//	             gate/             where a copy has its gate's folder
//	             <n>/              where it has its nth folder
const (
	baseFile   = "base.json"
	basePrefix = "bottle-warm-"
	// BaseLife is how long a base is kept that nobody uses.
	BaseLife  = 24 * time.Hour
	lockPoll  = 100 * time.Millisecond
	closePoll = 2 * time.Millisecond
)

// Base is a prepared machine, and base.json.
type Base struct {
	Format  string       `json:"format_version"`
	Name    string       `json:"name"` // of the machine
	UID     int          `json:"uid"`
	Version string       `json:"version"` // of smolvm
	Slots   string       `json:"slots"`   // the folder of its empty places
	Monitor plan.Process `json:"monitor"` // zero until it runs
	ColdMS  int64        `json:"cold_ms"` // creation to started, of this machine when it booted as any other
	WarmMS  int64        `json:"warm_ms"` // copy to ready, of the last bottle
	UsedAt  time.Time    `json:"used_at"` // when it was last made or copied
	dir     string
}

// Dir is its folder.
func (b *Base) Dir() string { return b.dir }

// Alive tells whether its monitor runs.
func (b *Base) Alive() bool { return state.Alive(b.Monitor) }

// slower tells that a copy took longer than a boot.
func (b *Base) slower() bool { return b.WarmMS >= b.ColdMS && b.WarmMS > 0 }

func (b *Base) rootfs() string    { return rootfsDir(b.dir) }
func (b *Base) gateDir() string   { return filepath.Join(b.Slots, "gate") }
func (b *Base) slot(i int) string { return filepath.Join(b.Slots, strconv.Itoa(i)) }
func (b *Base) save() error {
	raw, err := json.Marshal(b)
	if err != nil {
		return err
	}
	tmp := filepath.Join(b.dir, baseFile+".new")
	if err := writeSynced(tmp, raw); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(b.dir, baseFile))
}

// Bases lists the prepared machines below dir. One without a readable record has
// no name.
func Bases(dir string) ([]*Base, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	var all []*Base
	for _, e := range entries {
		if e.IsDir() {
			all = append(all, loadBase(filepath.Join(dir, e.Name())))
		}
	}
	return all, nil
}

func loadBase(dir string) *Base {
	b := new(Base)
	raw, err := os.ReadFile(filepath.Join(dir, baseFile))
	if err != nil || json.Unmarshal(raw, b) != nil || b.UID != os.Geteuid() || b.Name != basePrefix+filepath.Base(dir) {
		b = new(Base)
	}
	b.dir = dir
	return b
}

// notMeasured is the first release with which no warm start was tried, up to
// smolvm.SinceBranch.
var notMeasured = smolvm.Version{1, 10, 0}

const installMeasured = "install 1.32.2 (bottle-vm doctor --install smolvm)"

// checkWarm refuses what cannot be copied.
func checkWarm(c *smolvm.Client, s *engine.Spec, vs []smolvm.Volume, euid int) error {
	switch {
	case !mountsOfItsOwn:
		return refuse("warm_host", "", "leave --warm out", "a warm start needs mount namespaces, which only Linux has")
	case c.Version.Less(smolvm.SinceFork):
		return refuse("warm_version", "", "leave --warm out, or "+installMeasured, "smolvm %s cannot copy a machine as a warm start needs it; %s can", c.Version, smolvm.SinceFork)
	case !c.Version.Less(notMeasured) && c.Version.Less(smolvm.SinceBranch):
		return refuse("warm_version", "", "leave --warm out, or "+installMeasured, "a warm start was measured with smolvm 1.9 and %s, and this is %s", smolvm.SinceBranch, c.Version)
	case euid != 0 && c.Version.Less(smolvm.SinceBranch):
		// Its monitor has to be in a user namespace, from where that of 1.9.1 may not
		// open the memory of the machine (krun_start_enter says EINVAL).
		return refuse("warm_user", "", "leave --warm out, or "+installMeasured,
			"with smolvm %s only root can start a copy: a plain user's may not map the memory of the machine that it is a copy of", c.Version)
	}
	keys, err := filepath.Glob(filepath.Join(s.Rootfs, "etc/ssh/ssh_host_*_key"))
	if err != nil {
		return err
	}
	if len(keys) > 0 {
		// smolvm renews them in each copy, from the random numbers that all copies
		// have in common.
		return refuse("warm_image", "image", "leave --warm out, or take the keys out of the image",
			"the image has SSH host keys (%s): copies of one machine would have the same", strings.TrimPrefix(keys[0], s.Rootfs))
	}
	b, err := baseOf(c, s, vs)
	if err != nil {
		return err
	}
	if b.slower() {
		return refuse("warm_slower", "", "leave --warm out; bottle-gc forgets the measurement when the machine was not used for a day",
			"a copy of %s took %d ms here and booting it %d ms", b.Name, b.WarmMS, b.ColdMS)
	}
	return nil
}

// baseOf gives the base of a bottle, whether it is there or not. Its key is of all
// that it is made of.
func baseOf(c *smolvm.Client, s *engine.Spec, vs []smolvm.Volume) (*Base, error) {
	helper, err := fileDigest(s.GuestHelper)
	if err != nil {
		return nil, err
	}
	type folder struct {
		Guest    string
		ReadOnly bool
	}
	what := struct {
		State, Smolvm, Bin, Image, Helper string
		CPUs, MemoryMiB                   int
		Folders                           []folder
	}{stateTag(filepath.Dir(s.Warm.Dir)), c.Version.String(), c.Bin, s.Warm.Image, helper, s.Bottle.Resources.CPUs, s.Bottle.Resources.MemoryMiB, nil}
	for _, v := range vs {
		what.Folders = append(what.Folders, folder{v.Guest, v.ReadOnly})
	}
	raw, err := json.Marshal(what)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(raw)
	key := hex.EncodeToString(sum[:6])
	b := loadBase(filepath.Join(s.Warm.Dir, key))
	if b.Name == "" {
		b.Name, b.Version, b.UID, b.Format = basePrefix+key, c.Version.String(), os.Geteuid(), plan.FormatVersion
		b.Slots = filepath.Join(filepath.Dir(s.RunDir), "w"+key)
	}
	return b, nil
}

func fileDigest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), err
}

// lock waits for its turn.
func (b *Base) lock(ctx context.Context) (*os.File, error) {
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return nil, err
	}
	for {
		f, err := b.tryLock()
		if err != nil || f != nil {
			return f, err
		}
		if err := sleep(ctx, lockPoll); err != nil {
			return nil, err
		}
	}
}

// tryLock gives nil when another holds it.
func (b *Base) tryLock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(b.dir, "lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
		// The folder may have been removed, and made anew, meanwhile.
		held, herr := f.Stat()
		there, terr := os.Stat(f.Name())
		if herr == nil && terr == nil && os.SameFile(held, there) {
			return f, nil
		}
	}
	f.Close()
	if err == nil || errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, err
}

// Locked tells whether somebody makes, copies or removes it right now.
func (b *Base) Locked() bool {
	if _, err := os.Lstat(filepath.Join(b.dir, "lock")); err != nil {
		return false
	}
	f, err := b.tryLock()
	if f != nil {
		f.Close()
	}
	return err == nil && f == nil
}

// warmUp starts s as a copy of its base, which it prepares where there is none.
func (e *Engine) warmUp(ctx context.Context, c *smolvm.Client, s *engine.Spec) (pid int, name string, err error) {
	vs, err := volumes(s)
	if err != nil {
		return 0, "", err
	}
	b, err := baseOf(c, s, vs)
	if err != nil {
		return 0, "", err
	}
	lock, err := b.lock(ctx)
	if err != nil {
		return 0, "", fault.New(fault.IO, "lock_failed", "the prepared machine: %w", err)
	}
	defer lock.Close()
	if b, err = baseOf(c, s, vs); err != nil { // as it is now
		return 0, "", err
	}
	if b.Alive() {
		pid, err = e.copyBase(ctx, c, s, vs, b)
		if !errors.Is(err, errLost) {
			return pid, b.Name, err
		}
	}
	if err := e.renew(ctx, c, s, vs, b); err != nil {
		return 0, "", err
	}
	pid, err = e.copyBase(ctx, c, s, vs, b)
	return pid, b.Name, err
}

// renew prepares the machine, in place of what is left of it.
func (e *Engine) renew(ctx context.Context, c *smolvm.Client, s *engine.Spec, vs []smolvm.Volume, b *Base) error {
	if copies := b.copies(s.ID); len(copies) > 0 {
		// They read its image, and would lose it.
		return refuse("warm_in_use", "", "leave --warm out, or remove them with bottle-vm down first",
			"the prepared machine %s does not run any more, and %s are copies of it", b.Name, strings.Join(copies, ", "))
	}
	if err := e.clear(ctx, c, b); err != nil {
		return err
	}
	err := e.makeBase(ctx, c, s, vs, b)
	if err == nil {
		return nil
	}
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
	defer cancel()
	return join(fmt.Errorf("preparing a machine: %w", explainBoot(err, e.getenv, spoke(dataDirs(clean, c, b.Name, b.dir)))), e.clear(clean, c, b))
}

// copies are the bottles that are copies of it, or are about to be; but for the
// one with this id.
func (b *Base) copies(but string) (ids []string) {
	bottles := filepath.Join(filepath.Dir(filepath.Dir(b.dir)), "bottles")
	entries, err := os.ReadDir(bottles)
	if err != nil {
		return nil
	}
	name := basePrefix + filepath.Base(b.dir) // its record may be unreadable
	for _, e := range entries {
		if id := e.Name(); id != but && BaseOf(filepath.Join(bottles, id), id) == name {
			ids = append(ids, id)
		}
	}
	return ids
}

// clear removes the machine and what it was made of, and leaves the folder.
func (e *Engine) clear(ctx context.Context, c *smolvm.Client, b *Base) error {
	mine := func(m smolvm.Machine) (bool, error) { return true, ours(m, tagOf(b.dir)) }
	if err := e.remove(ctx, c, b.Name, b.dir, mine); err != nil {
		return err
	}
	b.Monitor, b.ColdMS, b.WarmMS = plan.Process{}, 0, 0
	return join(state.RemoveAll(ownDir(b.dir)), state.RemoveAll(b.Slots))
}

func (e *Engine) makeBase(ctx context.Context, c *smolvm.Client, s *engine.Spec, vs []smolvm.Volume, b *Base) error {
	b.UsedAt = time.Now().UTC()
	if err := b.save(); err != nil { // named before it is there
		return err
	}
	if err := os.MkdirAll(ownDir(b.dir), 0o700); err != nil {
		return err
	}
	if err := worktree.Copy(ctx, s.Rootfs, b.rootfs(), nil); err != nil {
		return err
	}
	spec := smolvm.CreateSpec{
		CPUs: s.Bottle.Resources.CPUs, MemMiB: s.Bottle.Resources.MemoryMiB, Labels: ownLabels(tagOf(b.dir)),
		Image:   b.rootfs() + "/",
		Sockets: []smolvm.Socket{{Host: filepath.Join(b.gateDir(), filepath.Base(s.GateSocket)), Guest: engine.GuestSocket}},
		Command: []string{engine.GuestHelper, "park"},
	}
	for i, v := range vs {
		spec.Volumes = append(spec.Volumes, smolvm.Volume{Host: b.slot(i), Guest: v.Guest, ReadOnly: v.ReadOnly})
	}
	if err := b.makeSlots(len(vs)); err != nil {
		return err
	}
	if err := copyFile(s.GuestHelper, filepath.Join(b.slot(0), filepath.Base(engine.GuestHelper)), 0o755); err != nil {
		return err
	}
	begun := time.Now()
	if err := c.MachineCreate(ctx, b.Name, spec); err != nil {
		return err
	}
	if err := remember(ctx, c, b.Name, b.dir, nil); err != nil {
		return err
	}
	// A boot as a bottle's first, to compare with: one that can be copied takes
	// longer.
	if err := startPatiently(ctx, c, b.Name, b.dir); err != nil {
		return err
	}
	b.ColdMS = time.Since(begun).Milliseconds()
	if err := helps(ctx, c, b.Name); err != nil {
		return err
	}
	if err := c.MachineStop(ctx, b.Name); err != nil {
		return err
	}
	if err := patiently(ctx, c, b.Name, b.dir, c.MachineStartForkable); err != nil {
		return err
	}
	if err := closeDataDir(b.Name, b.dir); err != nil {
		return err
	}
	if err := helps(ctx, c, b.Name); err != nil {
		return err
	}
	m, err := c.MachineStatus(ctx, b.Name)
	if err != nil {
		return err
	}
	if b.Monitor, err = state.Identify(m.PID); err != nil {
		return fault.New(fault.Unavailable, "smolvm_no_pid", "smolvm does not tell the process of its guest: %w", err).WithHint("%s", smolvm.InstallHint)
	}
	return b.save()
}

// helps makes sure that the helper waits in the machine.
func helps(ctx context.Context, c *smolvm.Client, name string) error {
	r, err := firstExec(ctx, c, name, "", engine.GuestHelper, "parked")
	if err == nil && r.Code != 0 {
		return fault.New(fault.Unavailable, "guest_failed", "the guest helper does not wait: status %d, %.200q", r.Code, r.Stderr).
			WithHint("the image has to be of this machine's architecture")
	}
	return err
}

func (b *Base) makeSlots(n int) error {
	errs := []error{os.MkdirAll(b.gateDir(), 0o700)}
	if err := os.Symlink(b.dir, filepath.Join(b.Slots, "base")); err != nil && !errors.Is(err, fs.ErrExist) {
		errs = append(errs, err)
	}
	for i := range n {
		errs = append(errs, os.MkdirAll(b.slot(i), 0o755))
	}
	return errors.Join(errs...)
}

// errLost is copyBase's error where smolvm does not know the base.
var errLost = errors.New("the prepared machine")

func (e *Engine) copyBase(ctx context.Context, c *smolvm.Client, s *engine.Spec, vs []smolvm.Volume, b *Base) (int, error) {
	if err := stage(s, vs); err != nil {
		return 0, err
	}
	// What it is a copy of is known before it is one: a base in use is kept.
	if err := (machineRecord{Name: s.ID, Base: b.Name}).save(s.Dir); err != nil {
		return 0, err
	}
	if err := b.makeSlots(len(vs)); err != nil { // tidied away meanwhile, perhaps
		return 0, err
	}
	b.UsedAt = time.Now().UTC()
	if err := b.save(); err != nil {
		return 0, err
	}
	pins, err := pin(elsewhere(vs, s.Dir))
	defer pins.close()
	if err != nil {
		return 0, err
	}
	begun := time.Now()
	closed := closeSoon(ctx, c, s.ID, readRecord(b.dir, b.Name).DataDir)
	s.ForgetReports() // of a copy before
	err = c.MachineFork(ctx, b.Name, s.ID, inMounts(s, vs, b))
	closed()
	if errors.Is(err, smolvm.ErrNotFound) {
		return 0, fmt.Errorf("%w: %w", errLost, err)
	}
	if err != nil {
		return 0, err
	}
	if err := remember(ctx, c, s.ID, s.Dir, shownBy(vs, s.GateSocket)); err != nil {
		return 0, err
	}
	pid, err := recordMonitor(ctx, c, s, monitorIn(notedDir(s.ID, s.Dir)))
	if err != nil {
		return 0, err
	}
	if err := adopt(ctx, c, s.ID); err != nil {
		return 0, err
	}
	inodes, err := isReady(ctx, c, s, pins.folders())
	if err != nil {
		return 0, err
	}
	b.WarmMS = time.Since(begun).Milliseconds()
	return pid, join(b.save(), pins.mounted(pid, inodes))
}

// closeSoon closes smolvm's folder of a machine that is about to be copied as
// soon as it is there: before its sockets are, which come with the boot. The
// folder cannot be closed before, since smolvm makes it anew. beside is the folder
// of another machine.
func closeSoon(ctx context.Context, c *smolvm.Client, id, beside string) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	all := filepath.Dir(beside)
	before := names(all)
	go func() {
		defer close(done)
		for sleep(ctx, closePoll) == nil {
			for name := range names(all) {
				if before[name] {
					continue
				}
				// Whose it is smolvm knows a moment later.
				if d, err := c.MachineDataDir(ctx, id); err == nil && filepath.Clean(d) == filepath.Join(all, name) {
					_ = os.Chmod(d, 0o700) // looked at again after the start
					return
				}
			}
		}
	}()
	return func() { cancel(); <-done }
}

func names(dir string) map[string]bool {
	entries, _ := os.ReadDir(dir)
	all := make(map[string]bool, len(entries))
	for _, e := range entries {
		all[e.Name()] = true
	}
	return all
}

// adopt makes the copy the bottle's own. The seed goes by the command's input: what
// is in an argument or a file others can read.
func adopt(ctx context.Context, c *smolvm.Client, id string) error {
	in, err := adoption(id)
	if err != nil {
		return err
	}
	r, err := firstExec(ctx, c, id, in, runner.LocalHelper, "adopt")
	if err == nil && r.Code != 0 {
		return fault.New(fault.Unavailable, "guest_failed", "the copied guest did not become a bottle: status %d, %.200q", r.Code, r.Stderr).
			WithHint("leave --warm out; bottle-vm doctor tells what works here")
	}
	return err
}

func adoption(id string) (string, error) {
	var b [guest.SeedSize + 32]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	boot := b[guest.SeedSize+16:]
	boot[6], boot[8] = boot[6]&0x0f|0x40, boot[8]&0x3f|0x80 // a random UUID's version and variant
	raw, err := json.Marshal(guest.Adoption{
		Hostname: id, UnixNano: time.Now().UnixNano(), Seed: b[:guest.SeedSize],
		MachineID: hex.EncodeToString(b[guest.SeedSize : guest.SeedSize+16]),
		BootID:    fmt.Sprintf("%x-%x-%x-%x-%x", boot[:4], boot[4:6], boot[6:8], boot[8:10], boot[10:]),
	})
	return string(raw), err
}

// RemoveBase ends a prepared machine that no bottle is a copy of any more, and
// removes what was kept of it. One that is in use stays, without an error.
func (e *Engine) RemoveBase(ctx context.Context, dir string) error {
	b := loadBase(dir)
	lock, err := b.tryLock()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.New(fault.IO, "lock_failed", "the prepared machine: %w", err)
	}
	if lock == nil {
		return nil
	}
	defer lock.Close()
	b = loadBase(dir)
	if len(b.copies("")) > 0 {
		return nil // since it was looked at
	}
	if b.Name != "" {
		c, err := e.client(ctx)
		if err != nil {
			return err
		}
		if err := e.clear(ctx, c, b); err != nil {
			return err
		}
	}
	return state.RemoveAll(dir)
}
