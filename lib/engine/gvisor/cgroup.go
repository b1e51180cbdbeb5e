//go:build linux

package gvisor

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/plan"
)

const cgroupMount = "/sys/fs/cgroup"

// period of the CPU quota, in µs: the kernel's default.
const cpuPeriod = 100000

// cgroupParents are folders below which a cgroup of our own can be made, "" for
// a controller that is not there. They are equal under cgroup v2.
type cgroupParents struct {
	memory, cpu string
	v2          bool
}

// findCgroups looks below mount (cgroupMount) for the caller's own cgroups;
// self is /proc/self/cgroup. Under v1 a bottle nests below the caller, so that
// the caller's own limits hold for it too. Under v2 a group that has processes
// cannot have children with controllers, so it goes below the root.
func findCgroups(mount, self string) cgroupParents {
	if b, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers")); err == nil {
		p := cgroupParents{v2: true}
		for _, c := range strings.Fields(string(b)) {
			switch c {
			case "memory":
				p.memory = mount
			case "cpu":
				p.cpu = mount
			}
		}
		return p
	}
	var p cgroupParents
	sc := bufio.NewScanner(strings.NewReader(self))
	for sc.Scan() {
		f := strings.SplitN(sc.Text(), ":", 3)
		if len(f) != 3 {
			continue
		}
		for _, c := range strings.Split(f[1], ",") {
			switch c {
			case "memory":
				p.memory = ownFolder(mount, f[1], c, f[2])
			case "cpu":
				p.cpu = ownFolder(mount, f[1], c, f[2])
			}
		}
	}
	return p
}

// ownFolder finds where hierarchy (such as "cpu,cpuacct") is mounted; some
// systems only have a link by the controller's name. In a container the path
// may mean something outside of it.
func ownFolder(mount, hierarchy, controller, own string) string {
	for _, name := range []string{hierarchy, controller} {
		root := filepath.Join(mount, name)
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		if at := filepath.Join(root, filepath.Clean("/"+own)); isDir(at) {
			return at
		}
		return root
	}
	return ""
}

func isDir(p string) bool {
	fi, err := os.Stat(p)
	return err == nil && fi.IsDir()
}

// cgroupSet is the cgroups of one bottle.
type cgroupSet struct {
	dirs []string
	v2   bool
}

// plan names the folders that r needs: they are recorded before they are made.
func (p cgroupParents) plan(id string, r plan.Resources) cgroupSet {
	set := cgroupSet{v2: p.v2}
	add := func(parent string) {
		d := filepath.Join(parent, cgroupName(id))
		if len(set.dirs) == 0 || set.dirs[0] != d {
			set.dirs = append(set.dirs, d)
		}
	}
	if r.MemoryMiB > 0 && p.memory != "" {
		add(p.memory)
	}
	if r.CPUs > 0 && p.cpu != "" {
		add(p.cpu)
	}
	return set
}

func cgroupName(id string) string { return "bottle-" + id }

// create makes the folders and sets the limits.
func (c cgroupSet) create(p cgroupParents, r plan.Resources) error {
	for _, d := range c.dirs {
		if c.v2 {
			enableControllers(filepath.Dir(d))
		}
		if err := os.Mkdir(d, 0o755); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
		if err := limit(d, filepath.Dir(d) == p.memory, filepath.Dir(d) == p.cpu, c.v2, r); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// enableControllers is best effort: limit finds out.
func enableControllers(parent string) {
	for _, c := range []string{"+memory", "+cpu"} {
		_ = writeCgroup(filepath.Join(parent, "cgroup.subtree_control"), c)
	}
}

func limit(dir string, memory, cpu, v2 bool, r plan.Resources) error {
	bytes := strconv.FormatInt(int64(r.MemoryMiB)<<20, 10)
	quota := r.CPUs * cpuPeriod
	if memory && r.MemoryMiB > 0 {
		name, swap := "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
		swapLimit := bytes // v1 counts memory and swap together
		if v2 {
			name, swap, swapLimit = "memory.max", "memory.swap.max", "0"
		}
		if err := writeCgroup(filepath.Join(dir, name), bytes); err != nil {
			return err
		}
		// Not there on hosts without swap accounting.
		if err := writeCgroup(filepath.Join(dir, swap), swapLimit); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	if cpu && r.CPUs > 0 {
		if v2 {
			return writeCgroup(filepath.Join(dir, "cpu.max"), fmt.Sprintf("%d %d", quota, cpuPeriod))
		}
		if err := writeCgroup(filepath.Join(dir, "cpu.cfs_period_us"), strconv.Itoa(cpuPeriod)); err != nil {
			return err
		}
		return writeCgroup(filepath.Join(dir, "cpu.cfs_quota_us"), strconv.Itoa(quota))
	}
	return nil
}

// verdict is an error if the kernel has killed for want of memory in one of the
// groups: then that is why the guest ended.
func (c cgroupSet) verdict(r plan.Resources) error {
	for _, d := range c.dirs {
		for _, name := range []string{"memory.events", "memory.oom_control"} { // v2, v1
			b, err := os.ReadFile(filepath.Join(d, name))
			if err != nil {
				continue // another controller's group
			}
			for line := range strings.Lines(string(b)) {
				if f := strings.Fields(line); len(f) == 2 && f[0] == "oom_kill" && f[1] != "0" {
					return fmt.Errorf("the kernel killed processes of it at its memory limit of %d MiB", r.MemoryMiB)
				}
			}
		}
	}
	return nil
}

// writeCgroup never creates: a file that is missing is a controller that is.
func writeCgroup(name, value string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// join puts the calling thread (v1) into the groups, so that what it forks is
// born there. Under v2 attr does it instead, and the file has to stay open
// until the fork.
func (c cgroupSet) join(attr *unix.SysProcAttr) (*os.File, error) {
	if len(c.dirs) == 0 {
		return nil, nil
	}
	if c.v2 {
		f, err := os.Open(c.dirs[0])
		if err != nil {
			return nil, err
		}
		attr.UseCgroupFD, attr.CgroupFD = true, int(f.Fd())
		return f, nil
	}
	for _, d := range c.dirs {
		if err := writeCgroup(filepath.Join(d, "tasks"), "0"); err != nil {
			return nil, fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil, nil
}

// removeCgroups removes the groups in dirs that can be id's and no other's.
func removeCgroups(id string, dirs []string) error {
	var errs []error
	for _, d := range dirs {
		if filepath.Base(d) != cgroupName(id) || !strings.HasPrefix(filepath.Clean(d), cgroupMount+"/") {
			continue
		}
		errs = append(errs, removeCgroup(d))
	}
	return errors.Join(errs...)
}

// removeCgroup waits a little: a killed process leaves its group some time
// after it is gone.
func removeCgroup(dir string) error {
	for try := 0; ; try++ {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || try == 100 {
			return fmt.Errorf("cgroup %s: %w", dir, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
