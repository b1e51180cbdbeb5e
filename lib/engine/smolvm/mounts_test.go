//go:build linux

package smolvm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/mountns"
)

// looking gives an engine whose smolvm tells, at each start, what is where it was
// told that the image is, and tries to change it as a guest could.
func looking(t *testing.T, s *engine.Spec) (e *Engine, seen func() string) {
	t.Helper()
	dir := t.TempDir()
	monitor := monitorFor(t, s.Workspace, s.Binds[0].Source)
	script := fmt.Sprintf(`#!/bin/sh
cd %q || exit 1
case "$1 $2" in
--version*) echo smolvm 1.9.1 ;;
"machine ls") echo '[]' ;;
"machine data-dir") echo %q ;;
"machine status") cat status ;;
"machine start")
	{
		cat rootfs/bin/tool
		echo " $(ls rootfs)"
		for f in new bin/new; do
			touch rootfs/$f 2>/dev/null && echo "made $f"
		done
		(echo changed >rootfs/bin/tool) 2>/dev/null && echo changed
		rm -f rootfs/bin/tool 2>/dev/null && echo removed
		chmod 777 rootfs/bin/tool 2>/dev/null && echo chmod
		mount -o remount,bind,rw rootfs 2>/dev/null && [ "$(id -u)" != 0 ] && echo remounted
	} >>%[3]q/seen
	;;
esac
exit 0
`, ownDir(s.Dir), vmDir(s), dir)
	if err := os.MkdirAll(ownDir(s.Dir), 0o700); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		filepath.Join(dir, "smolvm"): script, filepath.Join(ownDir(s.Dir), "status"): statusJSON(s.ID, "running", monitor.Pid),
	} {
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return New([]string{noDrop, "PATH=" + os.Getenv("PATH"), "BOTTLE_SMOLVM=" + filepath.Join(dir, "smolvm")}), func() string {
		b, err := os.ReadFile(filepath.Join(dir, "seen"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

// canMount skips where the host lets nobody mount, which is what the copy is for.
func canMount(t *testing.T, self string) {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("/bin/true")
	if err := mountns.Attach(cmd, self, []mountns.Bind{{Source: dir, Target: dir, ReadOnly: true}}); err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("NOT RUN: nothing can be mounted here: %v %s", err, out)
	}
}

// The monitor has the image that bottles share, and can change nothing in it; the
// host has an empty folder there. A restart is the same.
func TestImageIsShared(t *testing.T) {
	s := newSpec(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	canMount(t, self)
	s.Self = self
	e, seen := looking(t, s)
	if _, err := e.Start(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	const want = "original bin\n"
	if got := seen(); got != want {
		t.Errorf("at the start: %q", got)
	}
	if !isEmpty(rootfsDir(s.Dir)) {
		t.Error("the host has something in place of the image")
	}
	c, err := e.client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := startMachine(t.Context(), c, s); err != nil {
		t.Fatal(err)
	}
	if got := seen(); got != want+want {
		t.Errorf("at the second start: %q", got)
	}
	// What was left at the place of the image, by a guest that was started by hand and
	// so without it, is no image.
	if err := os.MkdirAll(rootfsDir(s.Dir)+"/bin", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(rootfsDir(s.Dir)+"/bin/tool", []byte("planted"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := startMachine(t.Context(), c, s); err != nil {
		t.Fatal(err)
	}
	if got := seen(); got != want+want+want {
		t.Errorf("at the third start: %q", got)
	}
	if b, err := os.ReadFile(s.Rootfs + "/bin/tool"); err != nil || string(b) != "original" {
		t.Errorf("the shared image was changed: %q, %v", b, err)
	}
	if err := e.Delete(t.Context(), refOf(s)); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.Rootfs + "/bin/tool"); err != nil {
		t.Errorf("the image went with the bottle: %v", err)
	}
}

// Where nothing can be mounted the bottle has a copy, once; what made no copy is
// not covered up.
func TestImageIsCopiedWhereNothingCanBeMounted(t *testing.T) {
	dir := t.TempDir()
	refused := filepath.Join(dir, "refused")
	if err := os.WriteFile(refused, []byte("#!/bin/sh\necho 'in-mounts: mounts of its own: operation not permitted' >&2\nexit 125\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, self := range map[string]string{"a mount is refused": refused, "a namespace is refused": filepath.Join(dir, "none"), "nobody mounts": ""} {
		t.Run(name, func(t *testing.T) {
			s := newSpec(t)
			s.Self = self
			log, err := os.Create(filepath.Join(t.TempDir(), "log"))
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			s.Log = log
			e, seen := looking(t, s)
			if _, err := e.Start(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			if got := seen(); !strings.HasPrefix(got, "original bin\nmade new\n") {
				t.Errorf("%q", got)
			}
			if b, err := os.ReadFile(s.Rootfs + "/bin/tool"); err != nil || string(b) != "original" {
				t.Errorf("the shared image was changed: %q, %v", b, err)
			}
			said, err := os.ReadFile(log.Name())
			if err != nil || (strings.Count(string(said), "the image is copied") == 1) != (self != "") {
				t.Errorf("log: %q, %v", said, err)
			}
			c, err := e.client(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := startMachine(t.Context(), c, s); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(rootfsDir(s.Dir) + "/new"); err != nil {
				t.Errorf("it was copied again: %v", err)
			}
		})
	}
}

// What a start tells of the monitor's process is believed where it is this
// machine's; else smolvm is asked.
func TestMonitorThatTheStartTells(t *testing.T) {
	s := newSpec(t)
	if err := os.MkdirAll(ownDir(s.Dir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := (machineRecord{Name: s.ID, DataDir: vmDir(s)}).save(s.Dir); err != nil {
		t.Fatal(err)
	}
	ours := play(t, "_boot-vm", vmDir(s)+"/boot-config.json").Process.Pid
	other := play(t, "_boot-vm", vmDir(s)+"-other/boot-config.json").Process.Pid
	time.Sleep(100 * time.Millisecond) // until each has its argv
	for said, asked := range map[int]bool{ours: false, other: true, 0: true} {
		e, f := scripted(t, version("1.9.1"), answer(0, statusJSON(s.ID, "running", ours), "", "machine", "status", "--name", s.ID, "--json"))
		c, err := e.client(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		recorded := 0
		s.Record = func(_ string, pid int) error { recorded = pid; return nil }
		pid, err := recordMonitor(t.Context(), c, s, said)
		if pid != ours || recorded != ours || err != nil || strings.Contains(f.Calls(t), `"status"`) != asked {
			t.Errorf("%d (of %d): %d, recorded %d, %v\n%s", said, ours, pid, recorded, err, f.Calls(t))
		}
	}
}
