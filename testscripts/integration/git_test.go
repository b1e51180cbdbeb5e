package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// attacks are what a guest can do to make the host's next git command run
// something. Each script runs in the guest, in a repository; what it plants
// would write the file /workspace/pwned on the host.
var attacks = []struct{ name, script string }{
	{"hook", `mkdir -p .git/hooks; printf '#!/bin/sh\ntouch HOSTDIR/pwned\n' >.git/hooks/post-index-change; chmod +x .git/hooks/post-index-change; cp .git/hooks/post-index-change .git/hooks/pre-commit`},
	{"config", `printf '[core]\n\tfsmonitor = "touch HOSTDIR/pwned; false"\n' >>.git/config; git config core.fsmonitor 'touch HOSTDIR/pwned; false'`},
	{"config replaced", `printf '[core]\n\tfsmonitor = "touch HOSTDIR/pwned; false"\n' >new; mv -f new .git/config; rm -f .git/config; cp new .git/config`},
	{"config.worktree", `printf '[core]\n\tfsmonitor = "touch HOSTDIR/pwned; false"\n' >.git/config.worktree; git config extensions.worktreeConfig true`},
	{"commondir", `mkdir -p evil/objects evil/refs; cp -r .git/refs .git/objects evil/; printf '[core]\n\trepositoryformatversion = 0\n\tfsmonitor = "touch HOSTDIR/pwned; false"\n' >evil/config; echo ../evil >.git/commondir`},
	{"replaced .git", `mv .git old; cp -r old .git; git init -q fresh; rm -rf .git; mv fresh/.git .git; printf '[core]\n\tfsmonitor = "touch HOSTDIR/pwned; false"\n' >>.git/config`},
	{".git file", `git init -q sub; printf '[core]\n\tfsmonitor = "touch HOSTDIR/pwned; false"\n' >>sub/.git/config; rm -rf .git; echo 'gitdir: sub/.git' >.git`},
	{"nested repository", `git init -q nested; printf '[core]\n\tfsmonitor = "touch HOSTDIR/pwned; false"\n' >>nested/.git/config`},
}

// TestGitGuard lets a guest try each attack, and runs git on the host while the
// bottle runs and when it is gone.
func TestGitGuard(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		for _, a := range attacks {
			inner := *w
			t.Run(a.name, func(t *testing.T) {
				inner.T = t
				inner.Dir = filepath.Join(filepath.Dir(w.Dir), "w-"+strings.ReplaceAll(a.name, " ", "-"))
				attack(t, &inner, a.script)
			})
		}
	})
}

func attack(t *testing.T, w *harness.World, script string) {
	t.Helper()
	w.Manifest(plain)
	w.OK("git init -q . && printf one >f && git add f && git -c user.name=a -c user.email=a@b commit -qm one")
	id := w.Up()
	// Honest work goes on.
	r := w.Exec(id, "printf two >f; git -c user.name=b -c user.email=b@c commit -qam two && git log --oneline | wc -l")
	if r.Code != 0 || strings.TrimSpace(r.Out) != "2" {
		t.Errorf("a commit in the guest: %+v", r)
	}
	w.Exec(id, strings.ReplaceAll(script, "HOSTDIR", w.Dir))
	// docs/security.md: what appears is set aside at once, in about a millisecond.
	// It is done in order, so that what came last tells when all is.
	if r := w.Exec(id, "mkdir last; echo x >last/.git; echo done"); r.Out != "done\n" { // it may be gone before it is written
		t.Errorf("%+v", r)
	}
	harness.Eventually(t, harness.Limit, func() string {
		if _, err := os.Lstat(filepath.Join(w.Dir, "last", ".git")); err == nil {
			return "last/.git is not set aside"
		}
		return ""
	})
	for _, when := range []string{"while the bottle runs", "afterwards"} {
		for _, dir := range []string{".", "nested", "sub", "fresh"} {
			if _, err := os.Stat(filepath.Join(w.Dir, dir)); err == nil {
				w.Sh("cd " + dir + " && git status; git add -A; git diff; git log -1; true")
			}
		}
		if _, err := os.Lstat(filepath.Join(w.Dir, "pwned")); err == nil {
			t.Fatalf("%s, git on the host ran the guest's code", when)
		}
		if when == "while the bottle runs" {
			w.Down(id)
		}
	}
	if got := w.OK("git log --oneline | wc -l"); strings.TrimSpace(got) != "2" && !contains(script, "rm -rf .git") {
		t.Errorf("the repository was hurt: %q", got)
	}
	if raw, _ := os.ReadFile(filepath.Join(w.Dir, ".git", "config")); contains(string(raw), "fsmonitor") {
		t.Errorf(".git/config: %s", raw)
	}
}
