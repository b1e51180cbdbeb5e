package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/tidwall/gjson"
	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// TestVerify: a bottle is as it was planned, until somebody tampers with it; then
// verify says with what.
func TestVerify(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.OK("git init -q . && mkdir data && echo x > data/x && echo secret > .env")
		limits := `"resources":{"cpus":1,"pids":200},`
		if w.Root() {
			limits = `"resources":{"cpus":1,"memory_mib":1024,"pids":200},`
		}
		w.Manifest(`"runtime":"gvisor",` + limits + `"mounts":[{"source":"data","target":"/opt/data","mode":"ro"}],
			"egress":{"proxy":"builtin","allow":["seen.test"],"inspect":["seen.test"]}`)
		id := w.Up()
		dir, sandbox, gofer := w.State+"/bottle/bottles/"+id, roleProcess(t, w, id, "sandbox"), roleProcess(t, w, id, "gofer")
		clean := func(when string) {
			t.Helper()
			if r := w.Sh("bottle-vm verify " + id); r.Code != 0 || r.Out+r.Stderr != "" {
				t.Errorf("%s: %+v", when, r)
			}
		}
		// finds expects exactly these, each as "kind what" and perhaps a part of
		// what was found.
		finds := func(when string, wants ...[2]string) {
			t.Helper()
			r := w.Sh("bottle-vm verify " + id)
			lines := strings.Split(strings.TrimSpace(r.Out), "\n")
			if r.Code != 1 || len(lines) != len(wants) {
				t.Errorf("%s: %d findings, want %d: %+v", when, len(lines), len(wants), r)
				return
			}
			for i, want := range wants {
				g := gjson.Parse(lines[i])
				if got := g.Get("kind").Str + " " + g.Get("what").Str; !strings.HasPrefix(got, want[0]) || !contains(g.Get("found").Str, want[1]) || g.Get("bottle").Str != id {
					t.Errorf("%s: %s, want %q", when, lines[i], want)
				}
			}
		}
		clean("fresh")
		if r := w.Exec(id, "echo y > new; git status; sleep 0.1 & cat .env; true"); r.Code != 0 {
			t.Fatalf("%+v", r)
		}
		clean("used")

		edit := func(name, from, to string) (undo func()) {
			t.Helper()
			path := filepath.Join(dir, name)
			before := w.Read(path)
			after := strings.Replace(before, from, to, 1)
			if before == after {
				t.Fatalf("%s has no %q", name, from)
			}
			if err := os.WriteFile(path, []byte(after), 0o600); err != nil {
				t.Fatal(err)
			}
			return func() { os.WriteFile(path, []byte(before), 0o600) }
		}
		undo := edit("document.json", `"seen.test","ports":[443]`, `"else.test","ports":[443]`)
		finds("an edited policy", [2]string{"drift document: digest of bottle"}, [2]string{"drift document: digest of the whole"},
			[2]string{"drift document: egress"}, [2]string{"drift gate: rules", "sha256:"})
		undo()
		undo = edit("document.json", `"format_version"`, `"format_version":"1.0","format_version"`)
		finds("a document that is none", [2]string{"drift document", "duplicate member"})
		undo()
		undo = edit(engineMounts, `"/opt/data"`, `"/opt/other"`)
		finds("another record of mounts", [2]string{"drift mount /opt/data"}, [2]string{"drift mount /opt/other"},
			[2]string{"drift sandbox: mount of its configuration", "missing"}, [2]string{"drift sandbox: mount of its configuration", "/opt/data"},
			[2]string{"drift mount /opt/other", "absent"}, [2]string{"drift mount /opt/data"})
		undo()

		w.OK("bottle-egress deny --bottle " + id + " --for 1h seen.test")
		finds("a live rule", [2]string{"live gate: deny seen.test", "added by uid " + fmt.Sprint(w.UID())})
		w.OK("bottle-egress revert --bottle " + id + " --all")

		stray := filepath.Join(gjson.Get(w.Read(dir+"/record.json"), "run_dir").Str, "stray")
		w.Write(stray, "")
		finds("a file beside the sockets", [2]string{"drift runtime folder", stray})
		os.Remove(stray)
		if err := os.Chmod(dir, 0o750); err != nil {
			t.Fatal(err)
		}
		finds("a folder that others can read", [2]string{"drift mode of " + dir, "0750"})
		os.Chmod(dir, 0o700)

		var all unix.CPUSet
		for i := range runtime.NumCPU() {
			all.Set(i)
		}
		if runtime.NumCPU() > 1 {
			one := new(unix.CPUSet)
			if err := unix.SchedGetaffinity(sandbox, one); err != nil {
				t.Fatal(err)
			}
			if err := unix.SchedSetaffinity(sandbox, &all); err != nil {
				t.Fatal(err)
			}
			finds("more processors", [2]string{"drift sandbox: processors"})
			unix.SchedSetaffinity(sandbox, one)
		}

		egress := filepath.Join(w.Bin, "bottle-egress")
		w.T.Logf("replacing %s", egress)
		if os.Geteuid() == 0 {
			replaced(t, egress, func() {
				finds("another program in place", [2]string{"drift gate: program", ".running"})
			})
			if err := inMounts(gofer, func() error { return unix.Mount("/etc/alternatives", "/opt/data", "", unix.MS_BIND, "") }); err != nil {
				t.Fatal(err)
			}
			finds("something else over a mount", [2]string{"drift mount /opt/data", "/etc/alternatives"})
			if err := inMounts(gofer, func() error { return unix.Unmount("/opt/data", unix.MNT_DETACH) }); err != nil {
				t.Fatal(err)
			}
			if err := inMounts(gofer, func() error { return unix.Mount("/usr/share", "/mnt", "", unix.MS_BIND, "") }); err != nil {
				t.Fatal(err)
			}
			finds("one mount more", [2]string{"drift mount /mnt", "/usr/share"})
			if err := inMounts(gofer, func() error { return unix.Unmount("/mnt", unix.MNT_DETACH) }); err != nil {
				t.Fatal(err)
			}
			if err := inMounts(gofer, func() error {
				return unix.Mount("", "/opt/data", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RELATIME, "")
			}); err != nil {
				t.Fatal(err)
			}
			finds("a mount that can be written", [2]string{"drift mount /opt/data", "read-write"})
			if err := inMounts(gofer, func() error {
				return unix.Mount("", "/opt/data", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RELATIME, "")
			}); err != nil {
				t.Fatal(err)
			}
		}
		if w.Root() {
			for _, g := range gjson.Get(w.Read(dir+"/gvisor.json"), "cgroups").Array() {
				for _, name := range []string{"memory.max", "memory.limit_in_bytes"} {
					file := filepath.Join(g.Str, name)
					before, err := os.ReadFile(file)
					if err != nil {
						continue
					}
					// Less, not more: version 1 also counts swap, and holds the two in order.
					if err := os.WriteFile(file, []byte("805306368"), 0o600); err != nil {
						t.Fatal(err)
					}
					finds("another limit of memory", [2]string{"drift cgroup: memory.", "805306368"})
					os.WriteFile(file, before, 0o600)
				}
			}
		}
		clean("put right again")
		if r := w.Sh("bottle-vm status " + id + " | jq -c '{vm:{id}}' >/dev/null; bottle-vm stop " + id + "; bottle-vm verify " + id); r.Code != 69 || !contains(r.Stderr, "is not running") {
			t.Errorf("a stopped bottle: %+v", r)
		}
	})
}

// engineMounts is where the keeper notes what the guest was given.
const engineMounts = "mounts.json"

// replaced puts a copy in the place of a program while f runs.
func replaced(t *testing.T, path string, f func()) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".running"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.Rename(path+".running", path); err != nil {
			t.Fatal(err)
		}
	}()
	if err := os.WriteFile(path, raw, 0o755); err != nil {
		t.Fatal(err)
	}
	f()
}

// inMounts runs f in the mount namespace of a process, on a thread that ends
// with it.
func inMounts(pid int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(ns)
			root, err := unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(root)
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return err
			}
			if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Fchdir(root); err != nil {
				return err
			}
			if err := unix.Chroot("."); err != nil {
				return err
			}
			return f()
		}()
	}()
	return <-done
}
