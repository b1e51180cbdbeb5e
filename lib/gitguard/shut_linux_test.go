package gitguard

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// plainUser is who owns nothing and passes every check of a mode.
const plainUser = 65534

// asPlainUser runs fn with the rights of a plain user: root passes every door.
func asPlainUser(t *testing.T, fn func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		fn()
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: this thread ends with the goroutine
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, err := unix.RawSyscall(call, plainUser, plainUser, plainUser); err != 0 {
				t.Errorf("becoming a plain user: %v", err)
				return
			}
		}
		fn()
	}()
	<-done
}

// shutFixture is a workspace of the plain user's with a file in it.
func shutFixture(t *testing.T) *fixture {
	top, err := os.MkdirTemp("", "shut")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("chmod", "-R", "u+rwx", top).Run()
		os.RemoveAll(top)
	})
	f := &fixture{t: t, top: top, ws: filepath.Join(top, "ws"), aside: filepath.Join(top, "aside")}
	f.write("a.txt", "a")
	f.mkdir(f.aside)
	if os.Geteuid() == 0 {
		if err := exec.Command("chown", "-R", "65534:65534", top).Run(); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (f *fixture) chmod(rel string, mode os.FileMode) {
	f.t.Helper()
	if err := os.Chmod(filepath.Join(f.ws, rel), mode); err != nil {
		f.t.Error(err)
	}
}

// A folder that the guest can pass and the guard cannot read hides nothing.
func TestShutFolders(t *testing.T) {
	for name, do := range map[string]func(*fixture){
		"no reading": func(f *fixture) { f.write("d/.git/HEAD", ""); f.chmod("d", 0o300) },
		"no passing": func(f *fixture) { f.write("d/.git/HEAD", ""); f.chmod("d", 0o600) },
		"neither":    func(f *fixture) { f.write("d/.git/HEAD", ""); f.chmod("d", 0) },
		"no writing": func(f *fixture) { f.write("d/.git/HEAD", ""); f.chmod("d/.git", 0o500); f.chmod("d", 0o500) },
		"workspace":  func(f *fixture) { f.write("d/.git/HEAD", ""); f.chmod(".", 0o300) },
	} {
		t.Run(name, func(t *testing.T) {
			f := shutFixture(t)
			asPlainUser(t, func() {
				g := f.plan()
				do(f)
				found, err := g.Sweep()
				if err != nil || !slices.ContainsFunc(found, func(n Finding) bool { return n.Path == "d/.git" && n.MovedTo != "" }) {
					t.Errorf("%v, %v", found, err)
				}
			})
		})
	}
}

// The same while the guest runs: what is opened again is looked at, and what is
// made behind the door too.
func TestShutFoldersAreWatched(t *testing.T) {
	f := shutFixture(t)
	asPlainUser(t, func() {
		g := f.plan()
		f.mkdir(filepath.Join(f.ws, "early"))
		found, stop := watchAsPlainUser(t, g)
		defer stop()
		settle := func() { time.Sleep(50 * time.Millisecond) }
		settle()
		f.chmod("early", 0o300)
		f.mkdir(filepath.Join(f.ws, "early/.git"))
		await(t, found, "early/.git")
		if err := os.Mkdir(filepath.Join(f.ws, "late"), 0); err != nil {
			t.Error(err)
		}
		settle()
		f.chmod("late", 0o700)
		settle()
		f.mkdir(filepath.Join(f.ws, "late/.git"))
		await(t, found, "late/.git")
		f.chmod(".", 0o300)
		f.mkdir(filepath.Join(f.ws, "later/.git"))
		await(t, found, "later/.git")
	})
}

func watchAsPlainUser(t *testing.T, g *Guard) (chan Finding, func()) {
	found := make(chan Finding, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go asPlainUser(t, func() { done <- g.Watch(ctx, func(f Finding) { found <- f }) })
	return found, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("watch: %v", err)
		}
	}
}

// A folder of ours that is shut before the start is refused: the guest has our
// rights and would open it.
func TestShutBefore(t *testing.T) {
	f := shutFixture(t)
	asPlainUser(t, func() {
		f.write("d/.env", "secret")
		f.chmod("d", 0)
		_, err := Plan(Options{Workspace: f.ws, Mode: "rw", Hide: []string{".env"}})
		if err == nil || fault.As(err).Code != "workspace_shut" {
			t.Errorf("%v", err)
		}
	})
}
