//go:build linux

package smolvm

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/smolvm/smolvmtest"
)

// eachReal runs f with an engine of each pinned version, whose home is home.
func eachReal(t *testing.T, home func(*testing.T) string, f func(*testing.T, *Engine, *smolvm.Client, string)) {
	for _, v := range []string{"1.9.1", "1.32.2"} {
		t.Run(v, func(t *testing.T) {
			dir := home(t)
			e := New([]string{"HOME=" + dir, "PATH=/usr/bin:/bin", "BOTTLE_SMOLVM=" + smolvmtest.Real(t, v), noDrop})
			c, err := e.client(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			f(t, e, c, dir)
		})
	}
}

// A disk that is full, when a machine is made and when it starts: one error that
// says so, and once there is room again gc clears what is left.
func TestRealFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT RUN: only root mounts a small disk")
	}
	small := func(t *testing.T) string {
		dir := t.TempDir()
		if err := unix.Mount("small", dir, "tmpfs", 0, "size=1m"); err != nil {
			t.Skipf("NOT RUN: no small disk: %v", err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		return dir
	}
	eachReal(t, small, func(t *testing.T, e *Engine, c *smolvm.Client, home string) {
		s := newSpec(t)
		fill := filepath.Join(home, "fill")
		full := func() {
			t.Helper()
			f, err := os.Create(fill)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for err == nil {
				_, err = f.Write(make([]byte, 1<<10))
			}
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
		}
		spec := smolvm.CreateSpec{CPUs: 1, MemMiB: 256, Labels: ownLabels(tagOf(s.Dir))}
		full()
		err := c.MachineCreate(t.Context(), s.ID, spec)
		t.Log(err)
		wantFault(t, err, fault.CantCreate, "smolvm_disk_full")
		if err := os.Remove(fill); err != nil {
			t.Fatal(err)
		}
		if err := c.MachineCreate(t.Context(), s.ID, spec); err != nil {
			t.Fatal(err)
		}
		full()
		err = c.MachineStart(t.Context(), s.ID)
		t.Log(err)
		wantFault(t, err, fault.CantCreate, "smolvm_disk_full")
		if err := os.Remove(fill); err != nil {
			t.Fatal(err)
		}
		root := filepath.Dir(filepath.Dir(s.Dir))
		left, err := e.Owned(t.Context(), root)
		if err != nil || len(left) != 1 || left[0].Name != s.ID || left[0].Created.IsZero() {
			t.Fatalf("%+v, %v", left, err)
		}
		for range 2 {
			if err := e.DeleteOwned(t.Context(), root, left[0]); err != nil {
				t.Error(err)
			}
		}
		if left, err := e.Owned(t.Context(), root); err != nil || len(left) != 0 {
			t.Errorf("%+v, %v", left, err)
		}
	})
}

// Machines of others, one with a bottle's name and half of our labels, are
// neither listed nor deleted; one that was made anew is not the one that was seen.
func TestRealForeignMachines(t *testing.T) {
	home := func(t *testing.T) string { return t.TempDir() }
	eachReal(t, home, func(t *testing.T, e *Engine, c *smolvm.Client, _ string) {
		s := newSpec(t)
		root := filepath.Dir(filepath.Dir(s.Dir))
		make := func(name string, labels ...smolvm.Label) {
			t.Helper()
			if err := c.MachineCreate(t.Context(), name, smolvm.CreateSpec{CPUs: 1, MemMiB: 256, Labels: labels}); err != nil {
				t.Fatal(err)
			}
		}
		owner := smolvm.Label{Key: labelOwner, Value: ownerValue}
		make("dev-00000001")
		make(s.ID, owner)
		make("dev-00000002", owner, smolvm.Label{Key: labelState, Value: stateTag("/elsewhere")})
		make("dev-00000003", ownLabels(tagOf(s.Dir))...)
		if err := stage(s, nil); err != nil {
			t.Fatal(err)
		}
		wantFault(t, e.Delete(t.Context(), refOf(s)), fault.NoPerm, "smolvm_foreign_machine")
		list, err := e.Owned(t.Context(), root)
		if err != nil || len(list) != 1 || list[0].Name != "dev-00000003" {
			t.Fatalf("%+v, %v", list, err)
		}
		old := list[0]
		old.Created = old.Created.Add(-1e9)
		if err := e.DeleteOwned(t.Context(), root, old); err != nil {
			t.Error(err)
		}
		if all, err := c.MachineLs(t.Context()); err != nil || len(all) != 4 {
			t.Errorf("%+v, %v", all, err)
		}
		if err := e.DeleteOwned(t.Context(), root, list[0]); err != nil {
			t.Error(err)
		}
		for _, n := range []string{"dev-00000001", "dev-00000002", s.ID} {
			if err := c.MachineDelete(t.Context(), n); err != nil {
				t.Errorf("%s was touched: %v", n, err)
			}
		}
	})
}

// Whatever stands in a path reaches smolvm as it is: a colon, a comma, what looks
// like a flag or a mode, a line break.
func TestRealPaths(t *testing.T) {
	home := func(t *testing.T) string { return t.TempDir() }
	eachReal(t, home, func(t *testing.T, e *Engine, c *smolvm.Client, _ string) {
		for _, name := range []string{"a:b", "x:ro", "x,y", "-v", "--net", "line\nbreak", "$(touch x)", "a=b", "ü"} {
			s := newSpec(t)
			s.Workspace = filepath.Join(s.RunDir, name)
			if err := os.Mkdir(s.Workspace, 0o777); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(s.Workspace, 0o777); err != nil {
				t.Fatal(err)
			}
			s.Binds = []engine.Bind{{Source: s.Workspace, Target: "/opt/x", ReadOnly: true}}
			if err := e.Prepare(t.Context(), s); err != nil {
				t.Errorf("%q: %v", name, err)
				continue
			}
			if err := errors.Join(stage(s, nil), os.Mkdir(rootfsDir(s.Dir), 0o755)); err != nil {
				t.Fatal(err)
			}
			vs, err := volumes(s)
			if err != nil {
				t.Fatal(err)
			}
			spec, err := createSpec(s, vs)
			if err == nil {
				err = c.MachineCreate(t.Context(), s.ID, spec)
			}
			if err != nil {
				t.Errorf("%q: %v", name, err)
				continue
			}
			if m, err := c.MachineStatus(t.Context(), s.ID); err != nil || m.Network {
				t.Errorf("%q: %+v, %v", name, m, err)
			}
			if err := e.Delete(t.Context(), refOf(s)); err != nil {
				t.Errorf("%q: %v", name, err)
			}
		}
	})
}
