//go:build linux

package gvisor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/bottle-tools/bottle/lib/drift"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/runsc"
	"github.com/bottle-tools/bottle/lib/state"
)

var _ engine.Verifier = (*Engine)(nil)

// Sockets is the one by which runsc gives orders to the sandbox.
func (e *Engine) Sockets(r engine.Ref) []string {
	return []string{runsc.Runsc{Root: filepath.Join(r.RunDir, "r")}.ControlSocket(r.ID)}
}

// Programs is runsc, which the keeper starts to ask for a guest's use.
func (e *Engine) Programs() []string {
	path, err := e.find()
	if err != nil {
		return nil
	}
	return []string{path}
}

// Verify looks at the sandbox and its file server.
func (e *Engine) Verify(r engine.Running, f *drift.Findings) {
	rs, err := e.runsc(r.RunDir)
	if err != nil {
		f.Unknown("sandbox: program", "bottle-runsc", err)
		return
	}
	rec, err := loadRecord(r.Dir)
	if err != nil {
		f.Unknown("sandbox", "the engine's record", err)
		return
	}
	v := &verifying{Running: r, f: f, runsc: rs, rec: rec}
	for _, p := range []struct {
		role, verb string
		process    plan.Process
		listens    []string
	}{
		{RoleSandbox, "boot", rec.Sandbox, []string{"unix " + rs.ControlSocket(r.ID)}},
		{RoleGofer, "gofer", rec.Gofer, nil},
	} {
		if !state.Alive(p.process) {
			f.Drift(p.role, "running", "not running")
			continue
		}
		v.process(p.role, p.verb, p.process.PID, p.listens)
	}
	v.configuration()
	v.limits()
	if state.Alive(rec.Sandbox) {
		v.sandboxMounts(rec.Sandbox.PID)
	}
	if state.Alive(rec.Gofer) {
		v.goferMounts(rec.Gofer.PID)
		v.guestFolder(rec.Gofer.PID)
	}
}

type verifying struct {
	engine.Running
	f     *drift.Findings
	runsc runsc.Runsc
	rec   record
}

// startTime is runsc's own variable: when it was started.
const startTime = "RUNSC_START_TIME_NANOS"

// process looks at what confines one of the two processes.
func (v *verifying) process(role, verb string, pid int, listens []string) {
	drift.CheckProgram(v.f, v.Proc, role, pid, v.runsc.Path)
	drift.CheckEnv(v.f, v.Proc, role, pid, []string{startTime})
	drift.CheckSockets(v.f, v.Proc, role, pid, listens)
	if argv, err := v.Proc.Argv(pid); err != nil {
		v.f.Unknown(role+": arguments", "runsc's", err)
	} else {
		wrong := v.runsc.CheckArgv(argv, verb, runsc.RunOptions{InternalCgroups: v.Bottle.Resources.Pids > 0})
		for _, name := range slices.Sorted(maps.Keys(wrong)) {
			w := wrong[name]
			v.f.Drift(role+": flag "+name, orAbsent(w[0]), orAbsent(w[1]))
		}
		if len(argv) > 0 && argv[len(argv)-1] != v.ID {
			v.f.Drift(role+": arguments", v.ID, argv[len(argv)-1])
		}
	}
	status, err := v.Proc.Status(pid)
	if err != nil {
		v.f.Unknown(role+": seccomp and privileges", "filtered, none new", err)
	} else {
		v.f.Equal(role+": seccomp", "2", status["Seccomp"])
		v.f.Equal(role+": no_new_privs", "1", status["NoNewPrivs"])
	}
	for _, kind := range []string{"user", "net", "mnt", "pid", "ipc", "uts"} {
		own, err := v.Proc.Namespace(pid, kind)
		host, err2 := v.Proc.Namespace(v.Keeper, kind)
		if err := errors.Join(err, err2); err != nil {
			v.f.Unknown(role+": namespace "+kind, "its own", err)
		} else if own == host {
			v.f.Drift(role+": namespace "+kind, "its own", "the host's")
		}
	}
	if devices, err := v.Proc.Devices(pid); err != nil {
		v.f.Unknown(role+": network devices", "lo", err)
	} else {
		v.f.Only(role+": network device", []string{"lo"}, devices)
	}
	v.users(role, pid)
}

func orAbsent(s string) string {
	if s == "" {
		return "absent"
	}
	return s
}

// users compares the ids that a process's namespace maps.
func (v *verifying) users(role string, pid int) {
	want, err := v.mapped()
	if err != nil {
		v.f.Unknown(role+": user ids", "the bottle's", err)
		return
	}
	got, err := v.Proc.UIDMap(pid)
	if err != nil {
		v.f.Unknown(role+": user ids", fmt.Sprint(want), err)
		return
	}
	var is []string
	for _, m := range got {
		is = append(is, fmt.Sprintf("%d is %d on the host (%d)", m.Inside, m.Outside, m.Count))
	}
	v.f.Same(role+": user id", want, is)
}

func (v *verifying) mapped() ([]string, error) {
	uids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return nil, err
	}
	gids, err := os.ReadFile("/proc/self/gid_map")
	if err != nil {
		return nil, err
	}
	ids, err := mapIDs(v.ID, v.Bottle.User, os.Geteuid(), v.VM.HostUID, os.Getegid(), string(uids), string(gids))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range ids.uids {
		out = append(out, fmt.Sprintf("%d is %d on the host (%d)", m.ContainerID, m.HostID, m.Size))
	}
	return out, nil
}

// configuration compares runsc's record of what it was asked for.
func (v *verifying) configuration() {
	saved, err := v.runsc.Saved(v.ID)
	if err != nil {
		v.f.Unknown("sandbox: configuration", "the plan's", err)
		return
	}
	s := saved.Spec
	v.f.Equal("sandbox: first process", engine.GuestHelper+" init", strings.Join(s.Process.Args, " "))
	v.f.Same("sandbox: variable of the guest", helperEnv(v.Bottle.Environ()), s.Process.Env)
	v.f.Equal("sandbox: noNewPrivileges", "true", strconv.FormatBool(s.Process.NoNewPrivileges))
	for _, set := range [][]string{s.Process.Capabilities.Bounding, s.Process.Capabilities.Permitted} {
		v.f.Only("sandbox: capability in the guest", helperCapabilities, set)
	}
	var types []string
	for _, n := range s.Linux.Namespaces {
		types = append(types, n.Type)
	}
	v.f.Same("sandbox: namespace", []string{"pid", "mount", "ipc", "uts", "user"}, types)
	var want, got []string
	for _, b := range v.binds() {
		want = append(want, mode(b.target, b.readOnly))
	}
	for _, m := range s.Mounts {
		if m.Type == "bind" {
			got = append(got, mode(m.Destination, slices.Contains(m.Options, "ro")))
		}
	}
	v.f.Same("sandbox: mount of its configuration", want, got)
}

func mode(target string, readOnly bool) string {
	if readOnly {
		return target + " read-only"
	}
	return target + " read-write"
}

// bind is one mount that the guest is to have.
type bind struct {
	target, source string // no source: the engine's own, in memory
	readOnly       bool
}

// binds are all that follow from what the keeper asked for, in mount order.
func (v *verifying) binds() []bind {
	var out []bind
	prepared := v.Shown.Rootfs == ""
	if prepared {
		for _, b := range systemBinds("/") {
			out = append(out, bind{b.Target, b.Source, b.ReadOnly})
		}
	}
	out = append(out, bind{engine.GuestDir, "", true}, bind{engine.GuestHelper, v.Shown.GuestHelper, true},
		bind{engine.GuestWorkspace, v.Shown.Workspace, v.Shown.ReadOnly})
	if v.Shown.Home != "" {
		out = append(out, bind{engine.GuestHome, v.Shown.Home, false})
	}
	for _, b := range v.Shown.Binds {
		target := path.Clean(b.Target)
		if prepared {
			top, rest, _ := strings.Cut(strings.TrimPrefix(target, "/"), "/")
			if link, err := os.Readlink("/" + top); err == nil && slices.Contains(hostRoots, top) && !path.IsAbs(link) {
				target = path.Join("/", link, rest)
			}
		}
		source := b.Source
		if source == os.DevNull {
			source = ""
		}
		out = append(out, bind{target, source, b.ReadOnly})
	}
	return out
}

// sandboxMounts: the sandbox itself sees nothing but an empty folder.
func (v *verifying) sandboxMounts(pid int) {
	mounts, err := v.Proc.Mounts(pid)
	if err != nil {
		v.f.Unknown("sandbox: mounts", "an empty folder in memory", err)
		return
	}
	for _, m := range mounts {
		if m.Point != "/" || m.Type != "tmpfs" || !m.ReadOnly() {
			v.f.Drift("sandbox: mount "+m.Point, "absent", m.Type+" "+m.Root)
		}
	}
}

// goferMounts compares what the file server can reach with what the guest was to
// be given. This is what the guest can reach at most.
func (v *verifying) goferMounts(pid int) {
	mounts, err := v.Proc.Mounts(pid)
	if err != nil {
		v.f.Unknown("mounts", "those of the plan", err)
		return
	}
	host, err := v.Proc.OwnMounts()
	if err != nil {
		v.f.Unknown("mounts", "those of the plan", err)
		return
	}
	explained := make([]bool, len(mounts))
	for i, m := range mounts {
		if m.Point == "/" {
			v.rootMount(m)
			explained[i] = true
		}
	}
	want := v.binds()
	for _, b := range want {
		at := lastAt(mounts, b.target)
		what := "mount " + b.target
		if at < 0 {
			v.f.Drift(what, orOwn(b.source), "absent")
			continue
		}
		m := mounts[at]
		explained[at] = true
		dev, root, err := identity(host, b.source)
		for i, x := range mounts { // what something else was laid over
			explained[i] = explained[i] || err == nil && x.Point == b.target && x.Dev == dev && strings.TrimSuffix(x.Root, "//deleted") == root
		}
		switch {
		case b.source == "":
			if m.Type != "tmpfs" {
				v.f.Drift(what, orOwn(b.source), m.Dev+" "+m.Root)
			}
		case err != nil:
			v.f.Unknown(what, b.source, err)
		case m.Dev != dev || strings.TrimSuffix(m.Root, "//deleted") != root:
			v.f.Drift(what, b.source, m.Dev+" "+m.Root)
		}
		if b.readOnly && !m.ReadOnly() || !b.readOnly && m.ReadOnly() && !noWrite(host, b.source) {
			v.f.Drift(what, mode(b.target, b.readOnly), mode(b.target, m.ReadOnly()))
		}
	}
	for i, m := range mounts {
		if !explained[i] && !v.below(host, want, m) {
			v.f.Drift("mount "+m.Point, "absent", m.Dev+" "+m.Root)
		}
	}
	v.private(mounts, host)
}

func orOwn(source string) string {
	if source == "" {
		return "the engine's own folder in memory"
	}
	return source
}

// rootMount is the guest's root folder: an image, or a skeleton in memory.
func (v *verifying) rootMount(m drift.Mount) {
	if !m.ReadOnly() {
		v.f.Drift("mount /", "read-only", "read-write")
	}
	if v.Shown.Rootfs == "" {
		if m.Type != "tmpfs" && !strings.HasSuffix(m.Root, "/rootfs") {
			v.f.Drift("mount /", "a skeleton", m.Dev+" "+m.Root)
		}
		return
	}
	host, err := v.Proc.OwnMounts()
	if err != nil {
		v.f.Unknown("mount /", v.Shown.Rootfs, err)
		return
	}
	dev, root, err := identity(host, v.Shown.Rootfs)
	if err != nil {
		v.f.Unknown("mount /", v.Shown.Rootfs, err)
		return
	}
	v.f.Equal("mount /", dev+" "+root, m.Dev+" "+m.Root)
}

// lastAt is the topmost mount on a path.
func lastAt(mounts []drift.Mount, point string) int {
	for i, m := range slices.Backward(mounts) {
		if m.Point == point {
			return i
		}
	}
	return -1
}

// identity gives the device of a path of the host and its place there.
func identity(host []drift.Mount, p string) (dev, root string, err error) {
	if p == "" {
		return "", "", nil
	}
	best := -1
	for i, m := range host {
		if under(p, m.Point) && (best < 0 || len(m.Point) >= len(host[best].Point)) {
			best = i
		}
	}
	if best < 0 {
		return "", "", errors.New("it is on no mount of this host")
	}
	m := host[best]
	return m.Dev, path.Join(m.Root, strings.TrimPrefix(p, m.Point)), nil
}

// noWrite tells if the host itself has the path on a read-only mount.
func noWrite(host []drift.Mount, p string) bool {
	best := drift.Mount{}
	for _, m := range host {
		if under(p, m.Point) && len(m.Point) >= len(best.Point) {
			best = m
		}
	}
	return best.ReadOnly()
}

// below tells if a mount came along with a bind: binds are recursive, so that a
// mount of the host below a source is there too, at the same place.
func (v *verifying) below(host []drift.Mount, want []bind, m drift.Mount) bool {
	for _, b := range slices.Backward(want) {
		if b.source == "" || m.Point == b.target || !under(m.Point, b.target) {
			continue
		}
		at := path.Join(b.source, strings.TrimPrefix(m.Point, b.target))
		return slices.ContainsFunc(host, func(h drift.Mount) bool { return h.Point == at && h.Dev == m.Dev && h.Root == m.Root })
	}
	return false
}

// private: no mount leads into the folders that hold the bottle's own state,
// where sockets, records and the proxy's home lie.
func (v *verifying) private(mounts, host []drift.Mount) {
	open := []string{filepath.Join(v.Dir, "empty-file"), filepath.Join(v.Dir, "empty-dir"), filepath.Join(v.Dir, "workspace")}
	for _, dir := range []string{v.Dir, v.RunDir} {
		dev, root, err := identity(host, dir)
		if err != nil {
			v.f.Unknown("mounts", "nothing of "+dir, err)
			continue
		}
		for _, m := range mounts {
			inside := under(m.Root, root) && !slices.ContainsFunc(open, func(p string) bool {
				_, r, err := identity(host, p)
				return err == nil && under(m.Root, r)
			})
			if m.Dev == dev && (inside || under(root, m.Root) && m.Root != "/") {
				v.f.Drift("mount "+m.Point, "nothing of "+dir, m.Dev+" "+m.Root)
			}
		}
	}
}

// guestFolder looks at the engine's own folder in the guest: the certificate of
// the bottle's authority may be there, and no key.
func (v *verifying) guestFolder(gofer int) {
	dir := v.Proc.Root(gofer, engine.GuestDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		v.f.Unknown("guest folder", "certificates, and no key", err)
		return
	}
	for _, e := range entries {
		v.f.Only("guest folder", guestFiles, []string{e.Name()})
		if e.Name() == path.Base(engine.GuestHelper) {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			v.f.Unknown("guest folder: "+e.Name(), "no key", err)
		} else if bytes.Contains(content, []byte("PRIVATE KEY")) {
			v.f.Drift("guest folder: "+e.Name(), "no key", "a private key")
		}
	}
	v.processLimit(filepath.Join(dir, path.Base(engine.GuestConfig)))
}

// processLimit is what the guest's first process was told to set.
func (v *verifying) processLimit(file string) {
	what, want := "limit of processes", strconv.Itoa(pidsMax(v.Bottle.Resources.Pids))
	var c guest.Config
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil {
		v.f.Unknown(what, want, err)
		return
	}
	v.f.Equal(what, want, strconv.Itoa(c.PidsMax))
}

// limits compares cgroups and CPUs with the plan.
func (v *verifying) limits() {
	r := v.Bottle.Resources
	held := v.VM.Enforcement
	for _, l := range []struct {
		what, held string
		asked      bool
	}{{"memory", held.Memory, r.MemoryMiB > 0}, {"cpus", held.CPUs, r.CPUs > 0}, {"processes", held.Pids, r.Pids > 0}} {
		if l.asked == (l.held == "none" || l.held == "") {
			v.f.Drift("limit of "+l.what, strconv.FormatBool(l.asked), l.held)
		}
		if l.held == "watched" && !v.Watches {
			v.f.Drift("limit of "+l.what, "watched by the keeper", "not watched")
		}
	}
	for _, p := range []struct {
		role    string
		process plan.Process
	}{{RoleSandbox, v.rec.Sandbox}, {RoleGofer, v.rec.Gofer}} {
		if !state.Alive(p.process) {
			continue
		}
		v.cpus(p.role, p.process.PID)
		v.groups(p.role, p.process.PID)
	}
	for _, dir := range v.rec.Cgroups {
		v.group(dir)
	}
}

// cpus compares the processors that a process may run on.
func (v *verifying) cpus(role string, pid int) {
	n := v.Bottle.Resources.CPUs
	if n == 0 {
		return
	}
	status, err := v.Proc.Status(pid)
	if err != nil {
		v.f.Unknown(role+": processors", strconv.Itoa(n), err)
		return
	}
	if got := count(status["Cpus_allowed_list"]); got > n {
		v.f.Drift(role+": processors", strconv.Itoa(n), status["Cpus_allowed_list"])
	}
}

// count gives how many numbers a list such as 0-3,8 has.
func count(list string) (n int) {
	for part := range strings.SplitSeq(list, ",") {
		lo, hi, ok := strings.Cut(part, "-")
		a, err := strconv.Atoi(lo)
		b := a
		if ok {
			b, err = strconv.Atoi(hi)
		}
		if err == nil {
			n += b - a + 1
		}
	}
	return n
}

// groups: the processes are in the bottle's cgroups.
func (v *verifying) groups(role string, pid int) {
	if len(v.rec.Cgroups) == 0 {
		return
	}
	got, err := v.Proc.Cgroups(pid)
	if err != nil {
		v.f.Unknown(role+": cgroups", cgroupName(v.ID), err)
		return
	}
	in := 0
	for _, g := range got {
		if slices.Contains(strings.Split(g, "/"), cgroupName(v.ID)) {
			in++
		}
	}
	if in < len(v.rec.Cgroups) {
		v.f.Drift(role+": cgroups", strings.Join(v.rec.Cgroups, " "), strings.Join(got, " "))
	}
}

// group compares the numbers of one cgroup.
func (v *verifying) group(dir string) {
	r := v.Bottle.Resources
	want := map[string]string{}
	if r.MemoryMiB > 0 && v.VM.Enforcement.Memory == "cgroup" {
		bytes := strconv.FormatInt(int64(r.MemoryMiB)<<20, 10)
		want["memory.max"], want["memory.limit_in_bytes"] = bytes, bytes
	}
	if r.CPUs > 0 && v.VM.Enforcement.CPUs == "cgroup" {
		quota := strconv.Itoa(r.CPUs * cpuPeriod)
		want["cpu.max"], want["cpu.cfs_quota_us"] = quota+" "+strconv.Itoa(cpuPeriod), quota
		want["cpu.cfs_period_us"] = strconv.Itoa(cpuPeriod)
	}
	some := false
	for name, value := range want {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // the other version, or another controller's group
		}
		some = true
		if err != nil {
			v.f.Unknown("cgroup: "+name, value, err)
			continue
		}
		v.f.Equal("cgroup: "+name, value, strings.TrimSpace(string(b)))
	}
	if !some {
		v.f.Drift("cgroup "+dir, "limits", "none, or it is gone")
	}
}
