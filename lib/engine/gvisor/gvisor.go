//go:build linux

// Package gvisor is the embedded engine: gVisor's user-space kernel in a user
// namespace that maps the bottle's user and nobody else, no network device, and
// one passed socket, over which the keeper hands out a descriptor for each
// connection. It works for root and for a plain user with no set-up.
//
// On disk it keeps gvisor.json (what Delete needs) in Spec.Dir and runsc's state
// folder r in Spec.RunDir. What the guest is made of (an OCI bundle, a skeleton
// of a root folder, the helper's config) is small and short-lived, and goes to
// memory: for root a tmpfs that only the sandbox sees, else see workDirs.
package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/runsc"
	"github.com/bottle-tools/bottle/lib/state"
)

// Roles of the processes that Start records.
const (
	RoleStarter = "runsc" // ends when the guest is up
	RoleSandbox = "sandbox"
	RoleGofer   = "gofer"
)

const (
	recordName = "gvisor.json"
	openFiles  = 65536
	// maxLog bounds what the guest helper may write to the log, in bytes.
	maxLog = 1 << 20
	// maxSocketDir leaves room in a socket's path (108 bytes, unix(7)) for
	// runsc's own names.
	maxSocketDir = 60
)

// rootCapabilities are those of root inside of the guest; they mean nothing
// outside of it.
var rootCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT",
}

// Engine implements engine.Engine.
type Engine struct {
	getenv func(string) string
	exe    string
	find   func() (string, error)
}

var (
	_ engine.Engine = (*Engine)(nil)
	_ engine.Meter  = (*Engine)(nil)
)

// New makes the engine; exe is the running program, beside which bottle-runsc
// is looked for (may be "").
func New(getenv func(string) string, exe string) *Engine {
	return &Engine{getenv: getenv, exe: exe,
		find: sync.OnceValues(func() (string, error) { return runsc.Find(getenv, exe) })}
}

func (*Engine) Name() string                { return "gvisor" }
func (*Engine) Transport() engine.Transport { return engine.FD }

// Available tells whether bottle-runsc is there and this host has user
// namespaces for the caller.
func (e *Engine) Available(ctx context.Context) error {
	path, err := e.find()
	if err != nil {
		return err
	}
	if err := runsc.CheckStatic(path); err != nil {
		return err
	}
	if e.getenv(runsc.Variable) != "" { // not the one that was built with this program
		if _, err := (runsc.Runsc{Path: path, Root: "/nonexistent"}).Version(ctx); err != nil {
			return fault.New(fault.Unavailable, "engine_unfit", "%w", err).WithHint("unset %s, or let it name gVisor's runsc", runsc.Variable)
		}
	}
	return userNamespaces(os.ReadFile, os.Geteuid())
}

// userNamespaces looks at the switches that turn them off.
func userNamespaces(readFile func(string) ([]byte, error), euid int) error {
	switches := []struct{ file, off, who string }{
		{"/proc/sys/user/max_user_namespaces", "0", "all"},
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "plain users"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "plain users"},
	}
	for _, s := range switches {
		b, err := readFile(s.file)
		if err != nil || strings.TrimSpace(string(b)) != s.off || (euid == 0 && s.who != "all") {
			continue
		}
		return fault.New(fault.Host, "no_user_namespaces", "user namespaces are off for %s on this host (%s is %s)", s.who, s.file, s.off).
			WithHint("let root turn them on there, or run as root")
	}
	return nil
}

// Prepare refuses what this engine cannot hold here.
func (e *Engine) Prepare(ctx context.Context, s *engine.Spec) error {
	if s.Warm != nil {
		return fault.New(fault.Host, "warm_slower", "engine gvisor: a guest that is restored was measured to start more slowly than a new one").
			WithHint("leave --warm out; make bench measures both on this host (section warm)")
	}
	if err := e.Available(ctx); err != nil {
		return err
	}
	if len(filepath.Join(s.RunDir, "r")) > maxSocketDir {
		return fault.New(fault.Host, "run_dir_long", "%s is too long for sockets", s.RunDir).WithHint("set XDG_RUNTIME_DIR to a shorter folder")
	}
	if euid := os.Geteuid(); euid != 0 && (s.HostUID != euid || s.HostGID != os.Getegid()) {
		return fault.New(fault.Host, "host_uid", "the guest's files cannot belong to %d:%d when %d:%d runs it", s.HostUID, s.HostGID, euid, os.Getegid()).
			WithHint("run as the workspace's owner, or as root")
	}
	if err := checkSources(s); err != nil {
		return err
	}
	if s.Rootfs != "" && noexec(s.Rootfs) {
		return fault.New(fault.Host, "noexec", "%s is mounted noexec: no guest can have its root folder there", s.Rootfs).
			WithHint("set XDG_CACHE_HOME to a folder on another file system")
	}
	_, err := enforcement(s.Bottle.User, s.Bottle.Resources, ownCgroups())
	return err
}

func checkSources(s *engine.Spec) error {
	if fi, err := os.Stat(s.GuestHelper); err != nil || !fi.Mode().IsRegular() {
		return fault.New(fault.Unavailable, "helper_missing", "the guest helper %s is missing", s.GuestHelper).WithHint("run make")
	}
	for what, p := range map[string]string{"workspace": s.Workspace, "root file system": s.Rootfs, "home": s.Home} {
		if p == "" {
			continue
		}
		if fi, err := os.Stat(p); err != nil || !fi.IsDir() {
			return fault.New(fault.NoInput, "mount_missing", "%s %s is not a folder", what, p)
		}
	}
	return nil
}

// ownCgroups gives what a bottle's cgroup can be made below, which takes root.
func ownCgroups() cgroupParents {
	if os.Geteuid() != 0 {
		return cgroupParents{}
	}
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return cgroupParents{}
	}
	return findCgroups(cgroupMount, string(self))
}

// enforcement decides how each limit is held. Processes are counted by the
// guest's kernel, whose cgroups the guest's root can change or leave, those of
// a mount of its own too; CPUs are the sandbox's affinity where no cgroup holds
// them.
func enforcement(user string, r plan.Resources, p cgroupParents) (plan.Enforcement, error) {
	out := plan.Enforcement{Memory: "none", CPUs: "none", Pids: "none"}
	if r.Pids > 0 {
		switch {
		case user != "root":
			out.Pids = "engine"
		case r.Enforcement == "watched":
			out.Pids = "watched"
		default:
			return out, fault.New(fault.Host, "limit_unenforceable", "a limit of %d processes cannot be held: the guest's root could lift it", r.Pids).
				WithHint("set \"enforcement\": \"watched\" under resources (the keeper samples and ends the bottle), or \"user\": \"agent\"")
		}
	}
	if r.CPUs > 0 {
		out.CPUs = "engine"
		if p.cpu != "" {
			out.CPUs = "cgroup"
		}
	}
	if r.MemoryMiB > 0 {
		switch {
		case p.memory != "":
			out.Memory = "cgroup"
		case r.Enforcement == "watched":
			out.Memory = "watched"
		default:
			return out, fault.New(fault.Host, "limit_unenforceable", "a memory limit of %d MiB cannot be held here: no cgroup can be made", r.MemoryMiB).
				WithHint("set \"enforcement\": \"watched\" under resources (the keeper samples and ends the bottle), or run as root")
		}
	}
	return out, nil
}

// record is engine.json: what Delete and Alive need, from any process.
type record struct {
	Sandbox plan.Process `json:"sandbox"`
	Gofer   plan.Process `json:"gofer"`
	Cgroups []string     `json:"cgroups,omitempty"`
}

func (r record) save(dir string) error {
	p := filepath.Join(dir, recordName)
	if err := os.WriteFile(p+".new", runsc.Encode(r), 0o600); err != nil {
		return err
	}
	return os.Rename(p+".new", p)
}

func loadRecord(dir string) (record, error) {
	var r record
	b, err := os.ReadFile(filepath.Join(dir, recordName))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return record{}, fault.New(fault.IO, "engine_record", "the engine's record: %w", err)
	}
	return r, nil
}

func (e *Engine) runsc(runDir string) (runsc.Runsc, error) {
	path, err := e.find()
	return runsc.Runsc{Path: path, Root: filepath.Join(runDir, "r")}, err
}

// Start boots the guest. It takes s.Guest over and closes it.
func (e *Engine) Start(ctx context.Context, s *engine.Spec) (*engine.Started, error) {
	if s.Guest == nil {
		return nil, fault.New(fault.Bug, "bug", "gvisor: no socket for the guest")
	}
	defer s.Guest.Close()
	return e.boot(ctx, s, []string{engine.GuestHelper, "init"})
}

func (e *Engine) boot(ctx context.Context, s *engine.Spec, args []string) (*engine.Started, error) {
	r, err := e.runsc(s.RunDir)
	if err != nil {
		return nil, err
	}
	parents := ownCgroups()
	held, err := enforcement(s.Bottle.User, s.Bottle.Resources, parents)
	if err != nil {
		return nil, err
	}
	if err := makeDir(r.Root); err != nil {
		return nil, asFault(err)
	}
	groups := parents.plan(s.ID, s.Bottle.Resources)
	rec := record{Cgroups: groups.dirs}
	if len(rec.Cgroups) > 0 { // named before they are there
		if err := rec.save(s.Dir); err != nil {
			return nil, asFault(err)
		}
	}
	if err := groups.create(parents, s.Bottle.Resources); err != nil {
		return nil, fault.New(fault.Host, "limit_unenforceable", "the bottle's limits cannot be set: %w", err)
	}
	out, err := guestLog(s.Log)
	if err != nil {
		return nil, asFault(err)
	}
	defer out.Close()
	err = onThread(func() error { return launch(ctx, r, s, groups, args, out, &rec) })
	if err != nil {
		return nil, asFault(err)
	}
	if err := rec.save(s.Dir); err != nil {
		return nil, asFault(err)
	}
	wait := func(ctx context.Context) error {
		if err := await(ctx, rec.Sandbox); err != nil {
			return err
		}
		return groups.verdict(s.Bottle.Resources)
	}
	return &engine.Started{Enforcement: held, Wait: wait}, nil
}

func note(s *engine.Spec, role string, pid int) error {
	if s.Record == nil {
		return nil
	}
	return s.Record(role, pid)
}

// workDirs are where a plain user's bottle may be built, best first: a folder in
// memory is ten times faster than one on disk. The first that can be made is
// used; Delete looks at all.
func workDirs(id, dir, runDir string) []string {
	shm := filepath.Join("/dev/shm", fmt.Sprintf("bottle-%d-%s", os.Geteuid(), id))
	disk := filepath.Join(dir, "gvisor")
	if inMemory(runDir) {
		return []string{filepath.Join(runDir, "g"), shm, disk}
	}
	return []string{shm, filepath.Join(runDir, "g"), disk}
}

func inMemory(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// noexec tells whether dir is mounted so. In its user namespace runsc has to
// keep that flag, which for the root folder it does not.
func noexec(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Flags&unix.ST_NOEXEC != 0
}

func makeWorkDir(s *engine.Spec) (string, error) {
	var errs []error
	for _, d := range workDirs(s.ID, s.Dir, s.RunDir) {
		if noexec(filepath.Dir(d)) {
			errs = append(errs, fault.New(fault.Host, "noexec", "%s is mounted noexec", filepath.Dir(d)))
			continue
		}
		err := os.Mkdir(d, 0o700)
		if err == nil {
			return d, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// build makes everything below work that the guest is made of, and plans its
// mounts.
func build(work string, s *engine.Spec) (layout, error) {
	l := layout{rootfs: s.Rootfs}
	if s.Rootfs == "" {
		l = layout{rootfs: filepath.Join(work, "rootfs"), prepared: true, binds: systemBinds("/")}
		if err := makeDir(l.rootfs); err != nil {
			return layout{}, err
		}
		if err := makeSkeleton(l.rootfs, s, ownership{s.HostUID, s.HostGID}); err != nil {
			return layout{}, err
		}
	}
	ours, empty := filepath.Join(work, "guest"), filepath.Join(work, "empty")
	if err := writeGuestDir(ours, s, l.prepared); err != nil {
		return layout{}, err
	}
	if err := writeNew(empty, nil); err != nil {
		return layout{}, err
	}
	return l, planBinds(s, &l, ours, empty)
}

// prepare builds the bundle and gives its folder. For root it is visible to the
// calling thread only, and what it starts.
func prepare(s *engine.Spec, r runsc.Runsc, args []string) (string, error) {
	var work string
	var err error
	if os.Geteuid() == 0 {
		work, err = privateFolder(s, r.Path)
	} else {
		work, err = makeWorkDir(s)
	}
	if err != nil {
		return "", err
	}
	l, err := build(work, s)
	if err != nil {
		return "", err
	}
	if os.Geteuid() == 0 {
		if err := bindAll(&l, work); err != nil {
			return "", err
		}
	}
	config, err := config(s, l, args)
	if err != nil {
		return "", err
	}
	return work, os.WriteFile(filepath.Join(work, "config.json"), runsc.Encode(config), 0o600)
}

// launch starts the sandbox, on a thread of its own, and notes in rec what runs.
func launch(ctx context.Context, r runsc.Runsc, s *engine.Spec, groups cgroupSet, args []string, out *os.File, rec *record) error {
	work, err := prepare(s, r, args)
	if err != nil {
		return err
	}
	// Should the keeper be killed in the middle, so is the starter; what it has
	// started by then is found by its --root.
	attr := &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	group, err := groups.join(attr)
	if err != nil {
		return err
	}
	if group != nil {
		defer group.Close()
	}
	if s.Bottle.Resources.CPUs > 0 {
		if err := setAffinity(s.Bottle.Resources.CPUs, s.ID); err != nil {
			return err
		}
	}
	pidFile := filepath.Join(work, "pid")
	if err := r.Run(ctx, runsc.RunOptions{
		ID: s.ID, Bundle: work, PIDFile: pidFile, Pass: s.Guest, Output: out, SysProcAttr: attr,
		InternalCgroups: s.Bottle.Resources.Pids > 0,
		Started:         func(pid int) error { return note(s, RoleStarter, pid) },
	}); err != nil {
		return err
	}
	if rec.Sandbox, err = readPID(pidFile); err != nil {
		return fault.New(fault.Unavailable, "engine_died", "the sandbox ended as it was started: %w", err)
	}
	if err := note(s, RoleSandbox, rec.Sandbox.PID); err != nil {
		return err
	}
	gofer, err := r.Gofer(s.ID)
	if err != nil {
		return fault.New(fault.Unavailable, "engine_died", "runsc has no record of the sandbox: %w", err)
	}
	if rec.Gofer, err = state.Identify(gofer); err != nil {
		return fault.New(fault.Unavailable, "engine_died", "the sandbox's file server ended as it was started: %w", err)
	}
	return note(s, RoleGofer, gofer)
}

func config(s *engine.Spec, l layout, args []string) (*runsc.Spec, error) {
	uidMap, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return nil, err
	}
	gidMap, err := os.ReadFile("/proc/self/gid_map")
	if err != nil {
		return nil, err
	}
	ids, err := mapIDs(s.ID, s.Bottle.User, os.Geteuid(), s.HostUID, s.HostGID, string(uidMap), string(gidMap))
	if err != nil {
		return nil, err
	}
	return runsc.NewSpec(runsc.Container{
		Hostname: s.ID, Rootfs: l.rootfs, Args: args, Env: helperEnv(s.Env), User: ids.user,
		Capabilities: helperCapabilities, UIDs: ids.uids, GIDs: ids.gids, Binds: l.binds,
		OpenFiles: openFiles, InternalCgroups: s.Bottle.Resources.Pids > 0, WorkingDirectory: "/",
	}), nil
}

// helperCapabilities are those of the first process. With the last one it gives
// the guest addresses of its own; it drops all but CAP_NET_BIND_SERVICE.
var helperCapabilities = append(slices.Clone(rootCapabilities), "CAP_NET_ADMIN")

// helperEnv starts the helper with one processor of the Go runtime: every thread
// that it does without costs the sandbox a process less, 10 ms of a start. The
// helper takes the others once it is ready.
func helperEnv(env []string) []string { return mergeEnv(env, []string{"GOMAXPROCS=1"}) }

// setAffinity confines the calling thread, and what it forks, to n of its
// CPUs; id spreads bottles over them.
func setAffinity(n int, id string) error {
	var have, want unix.CPUSet
	if err := unix.SchedGetaffinity(0, &have); err != nil {
		return fmt.Errorf("cpus: %w", err)
	}
	var cpus []int
	for i := range len(have) * 64 {
		if have.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	start := 0
	for _, c := range id {
		start += int(c)
	}
	for i := range min(n, len(cpus)) {
		want.Set(cpus[(start+i)%len(cpus)])
	}
	if err := unix.SchedSetaffinity(0, &want); err != nil {
		return fmt.Errorf("cpus: %w", err)
	}
	return nil
}

// guestLog gives a pipe whose content goes to log, as far as maxLog and with
// control characters taken out: the writer is inside of the guest.
func guestLog(log *os.File) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	var sink io.Writer = io.Discard
	var own *os.File
	if log != nil {
		fd, err := unix.FcntlInt(log.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			r.Close()
			w.Close()
			return nil, err
		}
		own = os.NewFile(uintptr(fd), log.Name())
		sink = own
	}
	go func() {
		defer r.Close()
		if own != nil {
			defer own.Close()
		}
		copyLog(sink, r)
	}()
	return w, nil
}

func copyLog(w io.Writer, r io.Reader) {
	buf := make([]byte, 4096)
	left := maxLog
	for {
		n, err := r.Read(buf)
		if n > left {
			n = left
		}
		for i, c := range buf[:n] {
			if (c < ' ' && c != '\n' && c != '\t') || c == 0x7f {
				buf[i] = '?'
			}
		}
		if n > 0 {
			w.Write(buf[:n])
			left -= n
		}
		if err != nil {
			return
		}
	}
}

func readPID(file string) (plan.Process, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return plan.Process{}, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return plan.Process{}, err
	}
	return state.Identify(pid)
}

// await blocks until p has ended or ctx is done.
func await(ctx context.Context, p plan.Process) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd: %w", err)
	}
	defer unix.Close(fd)
	if !state.Alive(p) {
		return nil
	}
	stop, wake, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stop.Close()
	defer wake.Close()
	cancel := context.AfterFunc(ctx, func() { wake.Write([]byte{0}) })
	defer cancel()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(stop.Fd()), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("poll: %w", err)
		case fds[0].Revents != 0:
			return nil
		}
		return context.Cause(ctx)
	}
}

// asFault gives runsc's failures and those of the file system their exit status.
func asFault(err error) error {
	var f *fault.Error
	var r *runsc.Error
	switch {
	case errors.As(err, &f):
		return err
	case errors.As(err, &r):
		return fault.New(fault.Unavailable, "engine_failed", "%w", err).WithHint("bottle-vm doctor tells what works on this host")
	case errors.Is(err, exec.ErrNotFound):
		return fault.New(fault.Unavailable, "engine_missing", "%w", err).WithHint("run make")
	}
	return fault.New(fault.CantCreate, "cannot_create", "%w", err)
}
