package smolvm

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/smolvm/smolvmtest"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/testscripts/fakesmolvm"
)

const transcripts = "../../../testscripts/transcripts/smolvm"

// Which versions can make a pack of a local image, as their recorded help says.
func TestPackName(t *testing.T) {
	recs, err := fakesmolvm.Load(transcripts)
	if err != nil {
		t.Fatal(err)
	}
	name := func(v string) (string, error) {
		for _, r := range recs {
			if r.Version == v && strings.Join(r.Argv, " ") == "smolvm pack create --help" {
				e, _ := scripted(t, version(v), answer(0, r.Stdout, "", "pack", "create", "--help"))
				return e.PackName(t.Context())
			}
		}
		t.Fatalf("no help of %s is recorded", v)
		return "", nil
	}
	if got, err := name("1.32.2"); err != nil || !strings.HasPrefix(got, "smolvm-1.32.2-") || filepath.Ext(got) != ".smolmachine" {
		t.Errorf("%q, %v", got, err)
	}
	_, err = name("1.9.1")
	wantFault(t, err, fault.Host, "smolvm_pack", "1.9.1", "--smolmachine")
}

func packArgv(rootfs, dir string) []string {
	return []string{"pack", "create", "--image", rootfs + "/", "-o", dir + "/pack", "--staging-dir", dir, "--error-format", "json"}
}

func TestPack(t *testing.T) {
	rootfs, dir := t.TempDir(), t.TempDir()
	e, f := scripted(t, version("1.32.2"), answer(0, "Packed\n", "", packArgv(rootfs, dir)...))
	got, err := e.Pack(t.Context(), rootfs, dir)
	if err != nil || got != dir+"/pack.smolmachine" {
		t.Errorf("%q, %v\n%s", got, err, f.Calls(t))
	}
	for _, tt := range []struct {
		stderr, code string
		exit         int
	}{
		{`{"error":{"code":"SMOLVM_ERROR","message":"agent operation failed: register layer: No space left on device (os error 28)"}}`, "smolvm_disk_full", fault.CantCreate},
		{`{"error":{"code":"SMOLVM_ERROR","message":"agent operation failed: wait for ready: agent did not become ready within 30 seconds: no boot progress for 30 seconds"}}`, "smolvm_boot", fault.Host},
		{`{"error":{"code":"SMOLVM_ERROR","message":"agent operation failed: pull image: broken tar"}}`, "smolvm_failed", fault.Unavailable},
	} {
		e, _ := scripted(t, version("1.32.2"), answer(1, "Starting agent VM...\n", tt.stderr+"\n", packArgv(rootfs, dir)...))
		_, err := e.Pack(t.Context(), rootfs, dir)
		said := strings.Split(tt.stderr, "failed: ")
		wantFault(t, err, tt.exit, tt.code, strings.TrimSuffix(said[len(said)-1], `"}}`))
	}
}

// From a pack no root file system is copied, and what a Smolfile would say is said
// by flags; no variable is among them.
func TestStartFromPack(t *testing.T) {
	s := newSpec(t)
	s.Pack = filepath.Join(s.RunDir, "x.smolmachine")
	argv := []string{"machine", "create", "--name", s.ID, "--cpus", "1", "--mem", "512", "--label", "owner=bottle", "--label", "bottle-state=" + tagOf(s.Dir), "--from", s.Pack,
		"-v", s.Dir + "/smolvm/guest:/opt/bottle:ro", "-v", s.Workspace + ":/workspace", "-v", s.Binds[0].Source + ":/opt/extra:ro",
		"--mount-socket", s.GateSocket + ":/run/bottle/gate.sock", "--error-format", "json",
		"--", "/opt/bottle/guest", "init", "/opt/bottle/config.json"}
	json := []string{"--error-format", "json"}
	monitor := monitorFor(t, s.Workspace, s.Binds[0].Source)
	e, f := scripted(t, version("1.32.2"),
		answer(0, created, "", argv...),
		answer(0, vmDir(s)+"\n", "", append([]string{"machine", "data-dir", "--name", s.ID}, json...)...),
		answer(0, "", starting, append([]string{"machine", "start", "--name", s.ID}, json...)...),
		answer(0, statusJSON(s.ID, "running", monitor.Pid), "", append([]string{"machine", "status", "--name", s.ID, "--json"}, json...)...),
		answer(0, "", "", awaits(s.ID, "--error-format", "json")...),
	)
	if _, err := e.Start(t.Context(), s); err != nil {
		t.Fatalf("%v\n%s", err, f.Calls(t))
	}
	for _, p := range []string{rootfsDir(s.Dir), smolfilePath(s.Dir)} {
		if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", p, err)
		}
	}
}

// A pack that smolvm does not take is named, with what to do about it.
func TestPackIsBroken(t *testing.T) {
	recs, err := fakesmolvm.Load(transcripts)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(recs, func(r fakesmolvm.Record) bool { return r.Name == "pk1322-from-junk" })
	if i < 0 {
		t.Fatal("not recorded")
	}
	err = explainPack(&smolvm.Error{Kind: smolvm.ErrFailed, Op: "machine create", Exit: *recs[i].Exit, Stderr: recs[i].Stderr}, "/c/x.smolmachine")
	wantFault(t, err, fault.Unavailable, "smolvm_pack_refused", "/c/x.smolmachine", "too small to contain footer", "remove that file")
	for _, other := range []error{&smolvm.Error{Kind: smolvm.ErrAlreadyExists}, &smolvm.Error{Kind: smolvm.ErrDiskFull}, context.Canceled} {
		if got := explainPack(other, "/c/x"); got != other {
			t.Errorf("%v", got)
		}
	}
	if e := (&smolvm.Error{Kind: smolvm.ErrFailed}); explainPack(e, "") != error(e) {
		t.Error("a pack is named where there is none")
	}
}

func nano(n int64) string { return strconv.FormatInt(n, 10) }

func TestPackersIdentity(t *testing.T) {
	self, err := state.Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := readIdentity(writeIdentity(self)); !ok || got != self {
		t.Errorf("%+v, %v", got, ok)
	}
	for _, bad := range []string{"", "1", "1:2", "x:2:b", "1:x:b"} {
		if _, ok := readIdentity(bad); ok {
			t.Errorf("%q is an identity", bad)
		}
	}
	now := time.Now()
	m := guestMaker{pid: 12, since: now}
	later := now.Add(time.Second).UnixNano()
	for name, want := range map[string]bool{
		"pack-12-" + nano(later): true, "pack-12-" + nano(now.Add(-time.Second).UnixNano()): false,
		"pack-1-" + nano(later): false, "pack-123-" + nano(later): false, "pack-12-x": false, "dev-0123abcd": false, "": false,
	} {
		if m.named(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
	if (guestMaker{since: now}).named("pack-0-" + nano(later)) {
		t.Error("a call that was never started has a guest")
	}
}

// The real thing, cut off: the guest that it has booted is ended, and its folder
// is removed. smolvm itself leaves both.
func TestRealCutOffPackLeavesNothing(t *testing.T) {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		t.Skipf("NOT RUN: no guest is booted where /dev/kvm cannot be opened: %v", err)
	} else {
		f.Close()
	}
	home, rootfs := t.TempDir(), t.TempDir()
	e := New([]string{"HOME=" + home, "PATH=/usr/bin:/bin", "BOTTLE_SMOLVM=" + smolvmtest.Real(t, "1.9.1"), noDrop})
	if err := e.Available(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, round := range []string{"first", "again"} {
		t.Run(round, func(t *testing.T) {
			ctx, cut := context.WithCancel(t.Context())
			defer cut()
			dir := t.TempDir()
			ended := make(chan error, 1)
			go func() { _, err := e.Pack(ctx, rootfs, dir); ended <- err }()
			for monitorsBelow(home) == 0 {
				select {
				case err := <-ended:
					t.Skipf("NOT RUN: the pack ended before it could be cut off: %v", err)
				case <-time.After(10 * time.Millisecond):
				}
			}
			helpers := e.PackHelpers()
			self, _ := state.Identify(os.Getpid())
			guests := 0
			for _, h := range helpers {
				if h.Packer != self {
					t.Errorf("another's: %+v", h)
				}
				if h.Dir != "" {
					guests++
				}
			}
			if guests != 1 || len(helpers) < 2 {
				t.Errorf("smolvm and one guest make it: %+v", helpers)
			}
			cut()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
			if n := monitorsBelow(home); n != 0 || len(e.PackHelpers()) != 0 {
				t.Errorf("%d monitors are left, %+v", n, e.PackHelpers())
			}
			if left, _ := filepath.Glob(filepath.Join(home, ".cache/smolvm/vms/*")); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// A helper whose packer is gone is ended by what bottle-gc calls.
func TestEndPackHelper(t *testing.T) {
	home := t.TempDir()
	e := New([]string{"HOME=" + home})
	vm := filepath.Join(home, ".cache/smolvm/vms/0123")
	other := filepath.Join(home, "elsewhere")
	for _, d := range []string{vm, other} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	gone := plan.Process{PID: os.Getpid(), StartTime: 1, BootID: "another"} // not us: nothing is killed
	for _, d := range []string{vm, other, ""} {
		if err := e.EndPackHelper(PackHelper{Process: gone, Dir: d}); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(vm); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the guest's folder is left: %v", err)
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("a folder that is not smolvm's: %v", err)
	}
}

// What another user's processes claim counts for nothing, for root neither: who
// writes of itself that it packs would have a folder of root's guests removed.
func TestPackHelpersOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT RUN: it takes root to be another user")
	}
	if runtime.GOOS != "linux" {
		t.Skip("NOT RUN: only this user's processes are listed here")
	}
	home := t.TempDir()
	e := New([]string{"HOME=" + home})
	raw, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	top, err := os.MkdirTemp("", "bp-") // where others may get to
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	if err := os.Chmod(top, 0o711); err != nil {
		t.Fatal(err)
	}
	// /proc gives what runs a program that it cannot read to root.
	program := filepath.Join(top, "sleep")
	if err := os.WriteFile(program, raw, 0o711); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"open": "/bin/sleep", "not dumpable": program} {
		for _, uid := range []int{0, 65534} {
			c := exec.Command(path, "60")
			c.Env = []string{packerVar + "=1:1:gone"}
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			found := slices.ContainsFunc(e.PackHelpers(), func(h PackHelper) bool { return h.Process.PID == c.Process.Pid })
			_ = c.Process.Kill()
			_ = c.Wait()
			if found != (uid == 0) {
				t.Errorf("%s, of uid %d: found %v", name, uid, found)
			}
		}
	}
}
