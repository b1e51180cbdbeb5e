package smolvm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engine/smolvm/runner"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/smolfile"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/worktree"
)

// Below the bottle's state folder:
//
//	smolvm/machine.json   what Delete needs when smolvm knows nothing any more
//	smolvm/guest/         the guest's /opt/bottle: helper, config, CA, requests
//	smolvm/rootfs/        the image, unless there is a pack of it: an empty folder
//	                      where the guest's monitor sees the image, or a copy
//	smolvm/Smolfile       the machine, as far as a Smolfile can describe it
//
// smolvm attaches the folder of an image without the read-only flag of its file
// server (source of 1.9.1, src/agent/launcher.rs): a guest that is root in its
// kernel could write to it, and the cache is shared by bottles. So the monitor runs
// in a mount namespace in which the image cannot be written to; where a host has no
// such thing, the bottle has a copy. Guests keep what they change on a disk of their
// own in either case.
const requestsDir = "run"

func ownDir(dir string) string       { return filepath.Join(dir, "smolvm") }
func guestDir(dir string) string     { return filepath.Join(ownDir(dir), "guest") }
func rootfsDir(dir string) string    { return filepath.Join(ownDir(dir), "rootfs") }
func machineFile(dir string) string  { return filepath.Join(ownDir(dir), "machine.json") }
func smolfilePath(dir string) string { return filepath.Join(ownDir(dir), "Smolfile") }

// Polling of a guest that is slow to answer. On emulated hardware smolvm says
// "not running" for seconds after a start that worked. The first pause is probeFirst,
// each that follows twice as long, up to probePause.
const (
	probeTries   = 13
	probeFirst   = 100 * time.Millisecond
	probePause   = time.Second
	probeLimit   = 30 * time.Second
	cleanupLimit = 2 * time.Minute
)

// reportLimit is what a guest has to tell that it is ready, from when smolvm calls
// its machine started. One that takes longer is asked.
var reportLimit = 5 * time.Second

// machineRecord is machine.json.
type machineRecord struct {
	Name    string `json:"name"`
	DataDir string `json:"data_dir"` // smolvm's folder for this machine
	// Shown are the folders and the socket that it was created with.
	Shown []string `json:"shown"`
	Base  string   `json:"base,omitempty"` // the prepared machine that it is a copy of
	// Helper is what runs commands in it, once it is ready. Bottles of tools that knew
	// no copy have none.
	Helper string `json:"helper,omitempty"`
}

// shownBy lists what of the host a machine is given, and where that leads: the
// guest may leave a link in place of a folder inside of its workspace.
func shownBy(vs []smolvm.Volume, gateSocket string) []string {
	var all []string
	for _, v := range vs {
		real, err := filepath.EvalSymlinks(v.Host)
		if err != nil {
			real = "nothing"
		}
		all = append(all, v.String()+" ("+real+")")
	}
	return append(all, gateSocket)
}

// Start creates the machine, boots it with the guest helper as its workload,
// and returns when that has told that the guest is ready. On failure nothing is left.
func (e *Engine) Start(ctx context.Context, s *engine.Spec) (*engine.Started, error) {
	if err := e.Prepare(ctx, s); err != nil {
		return nil, err
	}
	c, err := e.client(ctx)
	if err != nil {
		return nil, err
	}
	e.note()
	pid, warm := 0, ""
	if s.Warm != nil {
		pid, warm, err = e.warmUp(ctx, c, s)
	} else {
		pid, err = e.bringUp(ctx, c, s)
	}
	if errors.Is(err, smolvm.ErrAlreadyExists) {
		return nil, join(err, state.RemoveAll(ownDir(s.Dir))) // the machine is not this one
	}
	if err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
		defer cancel()
		return nil, join(err, e.Delete(clean, engine.Ref{ID: s.ID, Dir: s.Dir}))
	}
	st := started(s, pid)
	st.Warm = warm
	return st, nil
}

func started(s *engine.Spec, pid int) *engine.Started {
	return &engine.Started{
		Enforcement: enforcement(s.Bottle.Resources),
		Wait:        func(ctx context.Context) error { return waitEnd(ctx, pid) },
	}
}

// enforcement: a microVM's processors and memory are what the host gave it.
func enforcement(r plan.Resources) plan.Enforcement {
	by := func(limit int) string {
		if limit > 0 {
			return "engine"
		}
		return "none"
	}
	return plan.Enforcement{Memory: by(r.MemoryMiB), CPUs: by(r.CPUs), Pids: "none"}
}

func (e *Engine) bringUp(ctx context.Context, c *smolvm.Client, s *engine.Spec) (pid int, err error) {
	vs, err := volumes(s)
	if err != nil {
		return 0, err
	}
	if err := stage(s, vs); err != nil {
		return 0, err
	}
	if err := placeImage(ctx, s); err != nil {
		return 0, err
	}
	spec, err := createSpec(s, vs)
	if err != nil {
		return 0, err
	}
	pins, err := pin(elsewhere(vs, s.Dir))
	defer pins.close()
	if err != nil {
		return 0, err
	}
	if err := c.MachineCreate(ctx, s.ID, spec); err != nil {
		return 0, explainPack(err, s.Pack)
	}
	if err := remember(ctx, c, s.ID, s.Dir, shownBy(vs, s.GateSocket)); err != nil {
		return 0, err
	}
	return e.boot(ctx, c, s, pins)
}

// boot starts the machine and waits until its helper is ready.
func (e *Engine) boot(ctx context.Context, c *smolvm.Client, s *engine.Spec, pins pins) (pid int, err error) {
	booted, err := startMachine(ctx, c, s)
	if err != nil {
		return 0, explainBoot(err, e.getenv, spoke(dataDirs(ctx, c, s.ID, s.Dir)))
	}
	if err := closeDataDir(s.ID, s.Dir); err != nil { // start may make it anew
		return 0, err
	}
	if pid, err = recordMonitor(ctx, c, s, booted); err != nil {
		return 0, err
	}
	inodes, err := isReady(ctx, c, s, pins.folders())
	if err != nil {
		return 0, err
	}
	// All folders are mounted by now.
	return pid, pins.mounted(pid, inodes)
}

// recordMonitor writes the process of the guest into the bottle's record. said is
// what the start told of it; smolvm is asked where that is not this guest's.
func recordMonitor(ctx context.Context, c *smolvm.Client, s *engine.Spec, said int) (pid int, err error) {
	pid = said
	if pid <= 0 || !monitorOf(pid, notedDir(s.ID, s.Dir)) || !ownProcess(pid) { // anybody may call himself so
		var m smolvm.Machine
		m, err = c.MachineStatus(ctx, s.ID)
		pid = m.PID
	}
	if err == nil && pid > 0 && s.Record != nil {
		err = s.Record("smolvm", pid)
	}
	return pid, err
}

// placeImage makes the folder that the machine has its image from, unless it has a
// pack of it.
func placeImage(ctx context.Context, s *engine.Spec) error {
	switch {
	case s.Pack != "":
		return nil
	case !mountsOfItsOwn || s.Self == "":
		return copyImage(ctx, s)
	}
	if err := os.Mkdir(rootfsDir(s.Dir), 0o700); err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "the place of the image: %w", err).
			WithHint("look at the disk that holds %s", s.Dir)
	}
	return nil
}

// startMachine boots the machine with its image: the shared one, or a copy where
// that cannot be mounted, which only trying tells. pid is the monitor's, as smolvm
// says; 0 where it does not.
func startMachine(ctx context.Context, c *smolvm.Client, s *engine.Spec) (pid int, err error) {
	start := func(launch smolvm.Launch) error {
		return patiently(ctx, c, s.ID, s.Dir, func(ctx context.Context, id string) (err error) {
			s.ForgetReports() // of a start that failed
			pid, err = c.MachineStartIn(ctx, id, launch)
			return err
		})
	}
	place := rootfsDir(s.Dir)
	if _, err := os.Lstat(place); mountsOfItsOwn && s.Self != "" && err == nil { // else there is a pack
		// Over whatever is there: a guest that somebody started by hand, without these
		// mounts, may have left something that looks like an image.
		err := start(withImage(s))
		why, ok := notMounted(err)
		if !ok {
			return pid, err
		}
		if isEmpty(place) {
			if s.Log != nil {
				fmt.Fprintf(s.Log, "the image is copied, since it cannot be mounted: %q\n", why)
			}
			if err := copyImage(ctx, s); err != nil {
				return 0, err
			}
		}
	}
	err = start(nil)
	return pid, err
}

// isEmpty tells whether dir is a folder with nothing in it.
func isEmpty(dir string) bool {
	f, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	return errors.Is(err, io.EOF)
}

// copyImage gives the bottle an image of its own: all of it, or none.
func copyImage(ctx context.Context, s *engine.Spec) error {
	at, half := rootfsDir(s.Dir), rootfsDir(s.Dir)+".new"
	err := state.RemoveAll(half)
	if err == nil {
		err = worktree.Copy(ctx, s.Rootfs, half, nil)
	}
	if err == nil {
		if err = os.Remove(at); err == nil || errors.Is(err, os.ErrNotExist) { // the empty folder
			err = os.Rename(half, at)
		}
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	return fault.New(fault.CantCreate, "cannot_create", "the bottle's copy of the image: %w", cmp.Or(errors.Unwrap(err), err)).
		WithHint("look at the disk that holds %s, and whether you may read all of %s", s.Dir, s.Rootfs)
}

// explainPack tells what to do about a pack that smolvm does not take.
func explainPack(err error, pack string) error {
	if pack == "" || !errors.Is(err, smolvm.ErrFailed) {
		return err
	}
	return fault.New(fault.Unavailable, "smolvm_pack_refused", "no machine can be made from the pack %s: %w", pack, err).
		WithHint("remove that file: without it the image itself is used; bottle-pack --smolmachine makes it anew")
}

// elsewhere gives the volumes that are not in the bottle's own folder, where
// nobody else writes.
func elsewhere(vs []smolvm.Volume, dir string) []smolvm.Volume {
	var out []smolvm.Volume
	for _, v := range vs {
		if !inside(v.Host, dir) {
			out = append(out, v)
		}
	}
	return out
}

// exchanged is the fault for a folder that is not what was checked any more.
func exchanged(path, why string) error {
	return fault.New(fault.NoPerm, "smolvm_mount_changed", "%s was exchanged while the bottle was made: %s", path, why).
		WithHint("see what writes where it lies (another bottle's guest?), and start it again once that has ended")
}

// createSpec writes the Smolfile and gives what is left for the command line.
func createSpec(s *engine.Spec, vs []smolvm.Volume) (smolvm.CreateSpec, error) {
	workload := []string{engine.GuestHelper, "init", engine.GuestConfig}
	sockets := []smolvm.Socket{{Host: s.GateSocket, Guest: engine.GuestSocket}}
	if s.Pack != "" {
		// smolvm takes no Smolfile beside a pack. Variables do not go on an argv:
		// commands get them from the helper.
		return smolvm.CreateSpec{
			CPUs: s.Bottle.Resources.CPUs, MemMiB: s.Bottle.Resources.MemoryMiB,
			Labels: ownLabels(tagOf(s.Dir)), From: s.Pack, Volumes: vs, Sockets: sockets, Command: workload,
		}, nil
	}
	f := smolfile.FromPlan(s.Bottle)
	f.Entrypoint = workload
	for _, v := range vs {
		f.Volumes = append(f.Volumes, v.String())
	}
	text, err := f.TOML()
	if err != nil {
		return smolvm.CreateSpec{}, err
	}
	return smolvm.CreateSpec{
		Labels:   ownLabels(tagOf(s.Dir)),
		Image:    rootfsDir(s.Dir) + "/", // a folder, never a reference
		Smolfile: smolfilePath(s.Dir),
		Sockets:  sockets,
	}, os.WriteFile(smolfilePath(s.Dir), text, 0o600)
}

// stage makes the guest's /opt/bottle on the host, for a guest that gets vs.
func stage(s *engine.Spec, vs []smolvm.Volume) error {
	if err := writeGuestDir(s, elsewhere(vs, s.Dir)); err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "what the guest gets: %w", err).
			WithHint("look at the disk that holds %s", s.Dir)
	}
	return nil
}

// writeGuestDir writes it; told are the folders that the helper has to tell of.
func writeGuestDir(s *engine.Spec, told []smolvm.Volume) error {
	dir := guestDir(s.Dir)
	// Of a guest that was stopped: requests of commands that have ended with it.
	if err := state.RemoveAll(filepath.Join(dir, requestsDir)); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, requestsDir), 0o755); err != nil {
		return err
	}
	cfg, err := json.Marshal(guestConfig(s, told))
	if err != nil {
		return err
	}
	files := map[string][]byte{"config.json": cfg, path.Base(engine.GuestBundle): s.CABundle}
	if len(s.CACert) > 0 {
		files["ca.pem"] = s.CACert // NODE_EXTRA_CA_CERTS names it
		files[path.Base(engine.GuestTruststore)] = ca.Truststore(s.CABundle)
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	return copyFile(s.GuestHelper, filepath.Join(dir, filepath.Base(engine.GuestHelper)), 0o755)
}

// guestConfig is the helper's; told are the folders that it has to tell of.
func guestConfig(s *engine.Spec, told []smolvm.Volume) *guest.Config {
	c := s.GuestConfig(userOf(s.Bottle.User))
	c.Transport, c.Copy = guest.TransportUnix, runner.LocalHelper
	c.Relays[0].Socket = engine.GuestSocket
	for _, v := range told {
		c.Folders = append(c.Folders, v.Guest)
	}
	return c
}

func userOf(name string) guest.User {
	uid, gid := agentIDs(os.Geteuid(), os.Getegid())
	return engine.GuestUserOf(name, uid, gid)
}

// agentIDs are those of the guest's agent. smolvm's file server passes them
// through as they are, so they are those of the workspace's owner, who runs it;
// for root they are the usual ones, and Prepare refuses a workspace to write to.
func agentIDs(euid, egid int) (uid, gid int) {
	if euid == 0 {
		return engine.GuestUID, engine.GuestUID
	}
	return euid, egid
}

func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// remember writes where smolvm keeps the machine before it is started (a monitor
// whose start was cut off is found by nothing else), and closes that folder.
func remember(ctx context.Context, c *smolvm.Client, id, dir string, shown []string) error {
	data, err := c.MachineDataDir(ctx, id)
	if err != nil {
		return err
	}
	if data = filepath.Clean(data); data == dir || inside(dir, data) || filepath.Dir(data) == "/" {
		// Its mode is about to be changed.
		return dataDirFault(id, fmt.Errorf("%s is no folder of one machine", data))
	}
	rec := readRecord(dir, id)
	rec.DataDir, rec.Shown, rec.Helper = data, shown, runner.LocalHelper
	if err := rec.save(dir); err != nil {
		return err
	}
	// smolvm makes it at the start, open to all, with the sockets in it: those
	// would be open for as long as the guest boots.
	if err := os.MkdirAll(data, 0o700); err != nil {
		return dataDirFault(id, err)
	}
	return closeDataDir(id, dir)
}

// readRecord gives an empty record where there is none of this machine.
func readRecord(dir, id string) machineRecord {
	var rec machineRecord
	if b, err := os.ReadFile(machineFile(dir)); err != nil || json.Unmarshal(b, &rec) != nil || rec.Name != id {
		return machineRecord{Name: id}
	}
	return rec
}

func (m machineRecord) save(dir string) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	tmp := machineFile(dir) + ".new"
	err = writeSynced(tmp, b)
	if err == nil {
		err = os.Rename(tmp, machineFile(dir))
	}
	if err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "the machine's record: %w", err).
			WithHint("look at the disk that holds %s", dir)
	}
	return nil
}

// BaseOf gives the prepared machine that the bottle with this state folder is a
// copy of, "" if it is none.
func BaseOf(dir, id string) string { return readRecord(dir, id).Base }

func dataDirFault(id string, err error) error {
	return fault.New(fault.IO, "smolvm_data_dir", "smolvm's folder of the machine cannot be closed to others: %w", err).
		WithHint("look at it with: smolvm machine data-dir --name %s", id)
}

// closeDataDir takes smolvm's folder for the machine from other local users: in
// it smolvm leaves the agent's socket, mode 0777, behind which is guest root.
func closeDataDir(id, dir string) error {
	for _, d := range notedDir(id, dir) {
		fi, err := os.Lstat(d)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil && !fi.IsDir() {
			err = fmt.Errorf("%s is not a folder", d)
		}
		if err == nil && fi.Mode().Perm()&0o077 != 0 {
			err = os.Chmod(d, 0o700)
		}
		if err != nil {
			return dataDirFault(id, err)
		}
	}
	return nil
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// bootTries bounds the starts of a machine that does not get ready in the time
// that smolvm gives it.
const bootTries = 4

// startPatiently boots the machine. smolvm itself gives up after 30 seconds, which
// a slow or busy host takes, and about one start in three was seen to fail with
// "boot process exited (code 0)" where a second one worked. So the latter gets a
// second try, and a guest that was seen to run, and was late, a few: each finds
// more of what it reads in the host's memory. One that never said anything is not
// tried again: where KVM cannot run a guest, it never is ready.
func startPatiently(ctx context.Context, c *smolvm.Client, id, dir string) error {
	return patiently(ctx, c, id, dir, c.MachineStart)
}

func patiently(ctx context.Context, c *smolvm.Client, id, dir string, start func(context.Context, string) error) error {
	for try := 1; ; try++ {
		err := start(ctx, id)
		late := errors.Is(err, smolvm.ErrNotReady) && try < bootTries && spoke(dataDirs(ctx, c, id, dir))
		if !late && (!errors.Is(err, smolvm.ErrBootExited) || try > 1) {
			return err
		}
		if _, kerr := killMonitors(ctx, dataDirs(ctx, c, id, dir)); kerr != nil {
			return join(err, kerr)
		}
	}
}

// spoke tells whether the guest whose monitor has its files in one of dirs has
// written to its console: then its kernel runs, and what it runs does.
func spoke(dirs []string) bool {
	for _, d := range dirs {
		if fi, err := os.Stat(filepath.Join(d, "agent-console.log")); err == nil && fi.Size() > 0 {
			return true
		}
	}
	return false
}

// isReady waits until the guest's helper has told by the gate's socket that it
// relays: smolvm has dropped sockets that it was asked for without a word ("machine
// create --from", its fix 746). A guest that tells nothing is asked why. inodes are
// the numbers that it tells of folders.
func isReady(ctx context.Context, c *smolvm.Client, s *engine.Spec, folders []string) (inodes []uint64, err error) {
	if s.Reports == nil {
		return probe(ctx, c, s.ID, folders)
	}
	late := time.NewTimer(reportLimit)
	defer late.Stop()
	told := func(r guest.Report) ([]uint64, error) {
		if r.Failed != "" {
			return nil, fault.New(fault.Unavailable, "guest_failed", "the guest helper could not set the guest up: %s", r.Failed).
				WithHint("see that the image is whole, and what it said with: smolvm machine logs")
		}
		return r.Inodes, nil
	}
	select {
	case r := <-s.Reports:
		return told(r)
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-late.C:
	}
	inodes, err = probe(ctx, c, s.ID, folders)
	if err == nil {
		return inodes, nil
	}
	select {
	case r := <-s.Reports: // meanwhile, and it knows why
		return told(r)
	default:
		return nil, err
	}
}

// probe asks by a command, and tells what is wrong where the guest is not ready.
func probe(ctx context.Context, c *smolvm.Client, id string, folders []string) (inodes []uint64, err error) {
	r, err := firstExec(ctx, c, id, "", append([]string{engine.GuestHelper, "await", engine.GuestProxy, engine.GuestSocket}, folders...)...)
	switch {
	case err != nil:
		return nil, err
	case r.Code == runner.NoGate:
		return nil, fault.New(fault.Unavailable, "gate_socket_missing", "the guest runs, but the gate's socket is not in it: %.200q", r.Stderr).
			WithHint("this smolvm (%s) did not do what --mount-socket asks for; install another version, or use runtime gvisor", c.Version)
	case r.Code != 0:
		return nil, fault.New(fault.Unavailable, "guest_failed", "the guest helper did not get ready: status %d, %.200q", r.Code, r.Stderr).
			WithHint("see what it said with: smolvm machine logs; the image has to be of this machine's architecture")
	}
	for _, n := range strings.Fields(string(r.Stdout)) {
		ino, err := strconv.ParseUint(n, 10, 64)
		if err != nil {
			break // the guest says nothing that could be of a folder
		}
		inodes = append(inodes, ino)
	}
	return inodes, nil
}

// firstExec runs a command, with stdin as its input, in a guest that has just been
// started, and waits for one that smolvm does not know as running yet.
func firstExec(ctx context.Context, c *smolvm.Client, id, stdin string, argv ...string) (smolvm.Result, error) {
	pause := probeFirst
	for try := 1; ; try++ {
		o := smolvm.ExecOptions{Limit: probeLimit}
		if stdin != "" {
			o.Stdin = strings.NewReader(stdin)
		}
		r, err := c.MachineExec(ctx, id, o, argv...)
		if !errors.Is(err, smolvm.ErrNotRunning) || try == probeTries {
			return r, err
		}
		if serr := sleep(ctx, pause); serr != nil {
			return r, join(err, serr)
		}
		pause = min(2*pause, probePause)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// explainBoot turns a boot that failed into a fault that says what to do.
func explainBoot(err error, getenv func(string) string, spoke bool) error {
	var e *smolvm.Error
	boot := []error{smolvm.ErrNotReady, smolvm.ErrBootExited, smolvm.ErrKVM, smolvm.ErrTimeout}
	if !errors.As(err, &e) || !slices.Contains(boot, e.Kind) {
		return err
	}
	if spoke && e.Kind == smolvm.ErrNotReady {
		return fault.New(fault.Host, "smolvm_slow", "guests run here, but too slowly for smolvm, which gives up after half a minute: %w", err).
			WithHint("try again when the machine has less to do, or use runtime gvisor")
	}
	return fault.New(fault.Host, "smolvm_boot", "no guest boots here: %w", err).
		WithHint("%s", bootHint(e, os.Geteuid(), kvmMode(), getenv("SMOLVM_VM_UID_DROP") == "off"))
}

// kvmMode gives /dev/kvm's permissions, 0 if there is none.
func kvmMode() os.FileMode {
	fi, err := os.Stat("/dev/kvm")
	if err != nil {
		return 0
	}
	return fi.Mode().Perm()
}

func bootHint(e *smolvm.Error, euid int, kvm os.FileMode, dropOff bool) string {
	switch {
	case runtime.GOOS != "linux":
		return "run the same by hand to see more: smolvm machine run"
	case kvm == 0:
		return "there is no /dev/kvm: load the KVM module (kvm_intel, kvm_amd), or use runtime gvisor"
	case euid == 0 && !dropOff && kvm&0o006 != 0o006:
		return "as root, smolvm gives each guest's monitor a user id of its own (2000000 and up), who may not open /dev/kvm: " +
			"run it as a plain user in the group of /dev/kvm, or give those ids access, or set SMOLVM_VM_UID_DROP=off; or use runtime gvisor"
	case e.Kind == smolvm.ErrKVM:
		return "KvmOpen(Error(13)) means that you may not open /dev/kvm: join its group (usually kvm) and log in again; or use runtime gvisor"
	case e.Kind == smolvm.ErrTimeout:
		return "smolvm neither gave up nor came to an end: on a slow machine its first start may still be unpacking what it comes with; " +
			"let one end by hand (smolvm machine create --name first; smolvm machine start --name first), or use runtime gvisor"
	}
	return "/dev/kvm is there, but a guest does not get ready: a paravirtual KVM (kvm_pvm, nested in some clouds) never executes it; use runtime gvisor"
}

// Check boots a throw-away guest with one processor and runs a command in it.
// dir is not written to: smolvm keeps its machines where it always does.
func (e *Engine) Check(ctx context.Context, dir string) (err error) {
	c, err := e.client(ctx)
	if err != nil {
		return err
	}
	if err := checkVersion(c); err != nil {
		return err
	}
	marker, err := newMarker()
	if err != nil {
		return err
	}
	id, tag := "bottle-check-"+marker[:8], ""
	if root, err := state.Open(e.getenv); err == nil {
		tag = stateTag(root.Dir) // bottle-gc of this state folder finds what a killed check leaves
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
		defer cancel()
		err = join(err, e.remove(clean, c, id, dir, func(m smolvm.Machine) (bool, error) { return true, ours(m, tag) }))
	}()
	spec := smolvm.CreateSpec{CPUs: 1, MemMiB: 256, Labels: append(ownLabels(tag), maker()...)}
	if err := c.MachineCreate(ctx, id, spec); err != nil {
		return err
	}
	if err := startPatiently(ctx, c, id, dir); err != nil {
		return explainBoot(err, e.getenv, spoke(dataDirs(ctx, c, id, dir)))
	}
	r, err := firstExec(ctx, c, id, "", "true")
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("true ended with %d", r.Code)
	}
	if err != nil {
		return fault.New(fault.Host, "smolvm_boot", "a guest boots here, but runs no command: %w", err).WithHint("use runtime gvisor")
	}
	return nil
}
