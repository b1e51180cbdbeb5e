//go:build linux

package gvisor

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/runsc"
)

const allIDs = "         0          0 4294967295\n"

func TestMapIDs(t *testing.T) {
	spare := func(m []runsc.IDMapping) int {
		for _, x := range m {
			if x.ContainerID == 0 {
				return x.HostID
			}
		}
		return -1
	}
	plain, err := mapIDs("a-1", "agent", 1001, 1001, 1002, allIDs, allIDs)
	if err != nil || !reflect.DeepEqual(plain.uids, one(1000, 1001)) || !reflect.DeepEqual(plain.gids, one(1000, 1002)) || plain.user != (runsc.User{UID: 1000, GID: 1000}) {
		t.Errorf("plain user: %+v, %v", plain, err)
	}
	root, err := mapIDs("a-1", "root", 0, 1001, 1002, allIDs, allIDs)
	if err != nil || !reflect.DeepEqual(root.uids, one(0, 1001)) || root.user != (runsc.User{}) {
		t.Errorf("user root: %+v, %v", root, err)
	}
	a, err := mapIDs("a-1", "agent", 0, 0, 0, allIDs, allIDs)
	if err != nil {
		t.Fatal(err)
	}
	b, err := mapIDs("a-2", "agent", 0, 0, 0, allIDs, allIDs)
	if err != nil {
		t.Fatal(err)
	}
	if x, y := spare(a.uids), spare(b.uids); x == y || x < spareBase || x >= 0x80000000 {
		t.Errorf("spare ids %d and %d: want two from the unassigned range", x, y)
	}
	few, err := mapIDs("a-1", "agent", 0, 65535, 5, "0 100000 65536\n", "0 100000 65536\n")
	if err != nil || spare(few.uids) != 65534 || spare(few.gids) != 65535 {
		t.Errorf("in a container with few ids: %+v, %v", few, err)
	}
	_, err = mapIDs("a-1", "agent", 0, 0, 0, "0 1000 1\n", "0 1000 1\n")
	if f := fault.As(err); f == nil || f.Exit != fault.Host || f.Code != "no_user_ids" {
		t.Errorf("with a single id: %v", err)
	}
}

func TestEnforcement(t *testing.T) {
	cg := cgroupParents{memory: "/m", cpu: "/c"}
	for _, c := range []struct {
		name    string
		r       plan.Resources
		p       cgroupParents
		want    plan.Enforcement
		refused bool
	}{
		{"none", plan.Resources{}, cg, plan.Enforcement{Memory: "none", CPUs: "none", Pids: "none"}, false},
		{"cgroup", plan.Resources{CPUs: 1, MemoryMiB: 1, Pids: 1}, cg, plan.Enforcement{Memory: "cgroup", CPUs: "cgroup", Pids: "engine"}, false},
		{"without", plan.Resources{CPUs: 1, Pids: 1}, cgroupParents{}, plan.Enforcement{Memory: "none", CPUs: "engine", Pids: "engine"}, false},
		{"watched", plan.Resources{MemoryMiB: 1, Enforcement: "watched"}, cgroupParents{}, plan.Enforcement{Memory: "watched", CPUs: "none", Pids: "none"}, false},
		{"a cgroup is better than watching", plan.Resources{MemoryMiB: 1, Enforcement: "watched"}, cg, plan.Enforcement{Memory: "cgroup", CPUs: "none", Pids: "none"}, false},
		{"refused", plan.Resources{MemoryMiB: 1}, cgroupParents{}, plan.Enforcement{}, true},
	} {
		got, err := enforcement("agent", c.r, c.p)
		if c.refused {
			if f := fault.As(err); f == nil || f.Exit != fault.Host || f.Code != "limit_unenforceable" {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
}

// The guest's root can leave the group in which its processes are counted.
func TestEnforcementForRoot(t *testing.T) {
	_, err := enforcement("root", plan.Resources{Pids: 1}, cgroupParents{})
	if f := fault.As(err); f == nil || f.Exit != fault.Host || f.Code != "limit_unenforceable" {
		t.Errorf("not watched: %v", err)
	}
	got, err := enforcement("root", plan.Resources{Pids: 1, Enforcement: "watched"}, cgroupParents{})
	if want := (plan.Enforcement{Memory: "none", CPUs: "none", Pids: "watched"}); err != nil || got != want {
		t.Errorf("watched: %+v, %v", got, err)
	}
}

func TestVerdict(t *testing.T) {
	for content, want := range map[string]bool{
		"oom_kill_disable 0\nunder_oom 0\noom_kill 0\n": false,
		"oom_kill_disable 1\nunder_oom 0\noom_kill 2\n": true,
	} {
		v1 := cgroupTree(t, map[string]string{"memory.oom_control": content})
		v2 := cgroupTree(t, map[string]string{"memory.events": "low 0\noom 1\n" + content})
		for _, dir := range []string{v1, v2} {
			set := cgroupSet{dirs: []string{t.TempDir(), dir}}
			if err := set.verdict(plan.Resources{MemoryMiB: 7}); (err != nil) != want {
				t.Errorf("%q: %v", content, err)
			}
		}
	}
}

// cgroupTree makes a folder that looks like /sys/fs/cgroup.
func cgroupTree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFindCgroups(t *testing.T) {
	v1 := cgroupTree(t, map[string]string{"memory/cgroup.procs": "", "memory/own/cgroup.procs": "", "cpu,cpuacct/cgroup.procs": ""})
	self := "5:memory:/own\n4:cpu,cpuacct:/elsewhere/in/the/host\n3:pids:/\n0::/\n"
	if got, want := findCgroups(v1, self), (cgroupParents{memory: v1 + "/memory/own", cpu: v1 + "/cpu,cpuacct"}); got != want {
		t.Errorf("v1: %+v, want %+v", got, want)
	}
	if got := findCgroups(v1, "5:memory:/../../etc\n"); got.memory != v1+"/memory" {
		t.Errorf("a path that leaves the mount: %+v", got)
	}
	v2 := cgroupTree(t, map[string]string{"cgroup.controllers": "cpuset cpu io memory pids\n"})
	if got, want := findCgroups(v2, "0::/user.slice\n"), (cgroupParents{memory: v2, cpu: v2, v2: true}); got != want {
		t.Errorf("v2: %+v", got)
	}
	if got := findCgroups(t.TempDir(), self); got != (cgroupParents{}) {
		t.Errorf("nothing mounted: %+v", got)
	}
	set := cgroupParents{memory: v2, cpu: v2, v2: true}.plan("a-1", plan.Resources{MemoryMiB: 1, CPUs: 1})
	if !slices.Equal(set.dirs, []string{v2 + "/bottle-a-1"}) {
		t.Errorf("one group holds both under v2: %v", set.dirs)
	}
}

func TestCgroupLimits(t *testing.T) {
	r := plan.Resources{MemoryMiB: 300, CPUs: 2}
	v1 := cgroupTree(t, map[string]string{"memory.limit_in_bytes": "", "cpu.cfs_period_us": "", "cpu.cfs_quota_us": ""})
	if err := limit(v1, true, true, false, r); err != nil {
		t.Fatal(err)
	}
	v2 := cgroupTree(t, map[string]string{"memory.max": "", "memory.swap.max": "", "cpu.max": ""})
	if err := limit(v2, true, true, true, r); err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]string{v1 + "/memory.limit_in_bytes": "314572800", v1 + "/cpu.cfs_quota_us": "200000", v1 + "/cpu.cfs_period_us": "100000",
		v2 + "/memory.max": "314572800", v2 + "/memory.swap.max": "0", v2 + "/cpu.max": "200000 100000"} {
		if b, err := os.ReadFile(p); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v; want %q", p, b, err, want)
		}
	}
	if err := limit(t.TempDir(), true, false, false, r); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a controller that is missing: %v", err)
	}
}

func TestRemoveCgroupsOnlyItsOwn(t *testing.T) {
	dir := t.TempDir() + "/bottle-a-1"
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// Neither outside of the cgroup tree nor another bottle's.
	if err := removeCgroups("a-1", []string{dir, cgroupMount + "/bottle-b-2", cgroupMount + "/x/../../../.." + dir}); err != nil {
		t.Error(err)
	}
	if !isDir(dir) {
		t.Error("a folder elsewhere was removed")
	}
}

func TestCheckTarget(t *testing.T) {
	for _, good := range []string{"/opt/claude", "/workspace/.git", "/etc/ssl/x", "/home/agent/.cache", "/procs", "/run/x"} {
		if err := checkTarget(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "/", "//", "x", "/proc", "/proc/sys", "/sys/fs", "/dev/null", "/opt/bottle", "/opt/bottle/guest", "/opt", "/opt/x/../../proc", "/workspace", "/workspace/"} {
		if f := fault.As(checkTarget(bad)); f == nil || f.Exit != fault.Data || f.Code != "mount_target" {
			t.Errorf("%q: %v", bad, f)
		}
	}
}

// What a later mount covers is not what the next one lies on.
func TestMountpointLastWins(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"rootfs", "a/sub", "b"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	l := layout{rootfs: dir + "/rootfs", prepared: true, binds: []runsc.Bind{
		{Source: dir + "/a", Target: "/m"}, {Source: dir + "/b", Target: "/m/sub"}, {Source: dir + "/b", Target: "/m"}, {Source: dir + "/b", Target: "/m/sub"}}}
	for i := range 3 {
		if err := l.mountpoint(i); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
	if f := fault.As(l.mountpoint(3)); f == nil || f.Code != "mountpoint_missing" {
		t.Errorf("below a covered mount: %v", f)
	}
	if _, err := os.Stat(dir + "/b/sub"); err == nil {
		t.Error("a mountpoint was made in a source")
	}
}

func TestMergeEnv(t *testing.T) {
	got := mergeEnv([]string{"A=1", "B=2", "A=3"}, []string{"C=", "B=9"})
	if want := []string{"A=3", "B=9", "C="}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestProcessUsers(t *testing.T) {
	ref := engine.Ref{Bottle: &plan.Bottle{User: "agent"}}
	for name, want := range map[string]int{"": 1000, "agent": 1000, "root": 0} {
		p, err := process(ref, engine.ExecRequest{Argv: []string{"x"}, User: name})
		if err != nil || p.User.UID != want || p.Cwd != "/workspace" || (len(p.Capabilities.Effective) > 0) != (want == 0) {
			t.Errorf("%q: %+v, %v", name, p, err)
		}
	}
	for _, q := range []engine.ExecRequest{{User: "nobody"}, {Dir: "relative"}} {
		if _, err := process(ref, q); fault.As(err).Exit != fault.Usage {
			t.Errorf("%+v: %v", q, err)
		}
	}
}

func TestUserNamespaces(t *testing.T) {
	host := func(files map[string]string) func(string) ([]byte, error) {
		return func(name string) ([]byte, error) {
			if s, ok := files[filepath.Base(name)]; ok {
				return []byte(s), nil
			}
			return nil, fs.ErrNotExist
		}
	}
	for _, c := range []struct {
		files map[string]string
		euid  int
		ok    bool
	}{
		{nil, 1000, true},
		{map[string]string{"max_user_namespaces": "1000\n", "unprivileged_userns_clone": "1\n"}, 1000, true},
		{map[string]string{"max_user_namespaces": "0\n"}, 0, false},
		{map[string]string{"unprivileged_userns_clone": "0\n"}, 1000, false},
		{map[string]string{"unprivileged_userns_clone": "0\n"}, 0, true},
		{map[string]string{"apparmor_restrict_unprivileged_userns": "1\n"}, 1000, false},
	} {
		err := userNamespaces(host(c.files), c.euid)
		if (err == nil) != c.ok || (err != nil && fault.As(err).Exit != fault.Host) {
			t.Errorf("%v as %d: %v", c.files, c.euid, err)
		}
	}
}

func TestIsOurs(t *testing.T) {
	line := func(args ...string) []byte { return []byte(strings.Join(args, "\x00") + "\x00") }
	for _, c := range []struct {
		line []byte
		want bool
	}{
		{line("runsc-sandbox", "--root=/run/b/r", "boot"), true},
		{line("runsc-gofer", "--x", "--root=/run/b/r"), true},
		{line("/usr/bin/bottle-runsc", "--root=/run/b/r", "exec"), true},
		{line("runsc-sandbox", "--root=/run/b/r2"), false},
		{line("grep", "--root=/run/b/r"), false},
		{line("runsc-sandbox", "boot", "--rootx=/run/b/r"), false},
		{nil, false},
	} {
		if got := isOurs(c.line, "/run/b/r"); got != c.want {
			t.Errorf("%q: %v", c.line, got)
		}
	}
}

func TestCopyLogIsBoundedAndPrintable(t *testing.T) {
	var out bytes.Buffer
	copyLog(&out, strings.NewReader("a\x1b[2Jb\n"+strings.Repeat("x", 2*maxLog)))
	if out.Len() != maxLog || !strings.HasPrefix(out.String(), "a?[2Jb\n") {
		t.Errorf("%d bytes, %q", out.Len(), out.String()[:10])
	}
}

// A warm start was measured to be slower here, and is not offered: with or
// without a runsc.
func TestWarmIsRefused(t *testing.T) {
	err := New(func(string) string { return "" }, "").Prepare(context.Background(), &engine.Spec{Warm: &engine.Warm{}})
	if f := fault.As(err); f == nil || f.Exit != fault.Host || f.Code != "warm_slower" || f.Hint == "" {
		t.Errorf("got %v", err)
	}
}
