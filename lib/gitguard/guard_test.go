package gitguard

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
)

// fixture is a workspace with a repository, and an attacker's program that
// leaves a trace when git on the host runs it.
type fixture struct {
	t                   *testing.T
	top, ws, aside, hit string
	payload             string
	env                 []string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("SKIPPED: git is not installed, so that the guard is not shown to hold against it")
	}
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, top: top, ws: filepath.Join(top, "ws"), aside: filepath.Join(top, "aside"),
		hit: filepath.Join(top, "hit"), payload: filepath.Join(top, "payload")}
	f.env = append(os.Environ(), "HOME="+top, "GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b",
		"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b", "GIT_TERMINAL_PROMPT=0")
	f.mkdir(f.ws)
	f.mkdir(f.aside)
	f.write(f.payload, "#!/bin/sh\necho hit >>"+f.hit+"\nexit 1\n")
	if err := os.Chmod(f.payload, 0o755); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) mkdir(p string) {
	f.t.Helper()
	if err := os.MkdirAll(p, 0o755); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) write(p, content string) {
	f.t.Helper()
	if !filepath.IsAbs(p) {
		p = filepath.Join(f.ws, p)
	}
	f.mkdir(filepath.Dir(p))
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) git(dir string, args ...string) string {
	f.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env = filepath.Join(f.ws, dir), f.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		f.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// try runs git without caring for its status, and tells whether the attacker's
// program ran.
func (f *fixture) try(dir string, args ...string) bool {
	f.t.Helper()
	_ = os.Remove(f.hit)
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env = dir, f.env
	_, _ = cmd.CombinedOutput()
	_, err := os.Stat(f.hit)
	return err == nil
}

func (f *fixture) repo() {
	f.git(".", "init", "-q")
	f.write("a.txt", "a\n")
	f.git(".", "add", ".")
	f.git(".", "commit", "-qm", "one")
}

func (f *fixture) plan(change ...func(*Options)) *Guard {
	f.t.Helper()
	o := Options{Workspace: f.ws, Mode: "rw", Home: f.top, EmptyFile: "/empty/file", EmptyDir: "/empty/dir"}
	for _, c := range change {
		c(&o)
	}
	g, err := Plan(o)
	if err != nil {
		f.t.Fatal(err)
	}
	g.KeepIn(func() (string, error) { return f.aside, nil })
	return g
}

func (f *fixture) evilRepo(dir string) {
	f.git(".", "init", "-q", dir)
	f.git(dir, "config", "core.fsmonitor", f.payload)
}

// attacks are what a guest can do in spite of the mounts: everything else in
// .git is mounted read-only over what exists. run is where and what a person on
// the host runs then.
var attacks = []struct {
	name  string
	setUp func(*fixture)
	do    func(*fixture)
	dir   string
	args  []string
	path  string // of the finding
}{
	{name: "commondir", setUp: (*fixture).repo, path: ".git/commondir", do: func(f *fixture) {
		f.evilRepo("x")
		if err := os.Rename(filepath.Join(f.ws, "x/.git"), filepath.Join(f.ws, "x/common")); err != nil {
			f.t.Fatal(err)
		}
		f.write(".git/commondir", "../x/common\n")
	}},
	{name: "config.worktree", path: ".git/config.worktree", setUp: func(f *fixture) {
		f.repo()
		f.git(".", "config", "extensions.worktreeConfig", "true")
	}, do: func(f *fixture) {
		f.write(".git/config.worktree", "[core]\n\tfsmonitor = "+f.payload+"\n")
	}},
	{name: "no .git before", setUp: func(f *fixture) { f.write("a.txt", "a") }, path: ".git", do: func(f *fixture) { f.evilRepo(".") }},
	{name: ".git file", setUp: func(f *fixture) { f.write("a.txt", "a") }, path: ".git", do: func(f *fixture) {
		f.evilRepo("x")
		f.mkdir(filepath.Join(f.ws, "y"))
		if err := os.Rename(filepath.Join(f.ws, "x/.git"), filepath.Join(f.ws, "y/data")); err != nil {
			f.t.Fatal(err)
		}
		f.write(".git", "gitdir: y/data\n")
	}},
	{name: "nested repository by gitlink", setUp: (*fixture).repo, path: "sub/.git", do: func(f *fixture) {
		f.mkdir(filepath.Join(f.ws, "sub"))
		f.evilRepo("sub")
		f.write("sub/f", "x")
		f.try(f.ws, "-C", "sub", "-c", "core.fsmonitor=false", "add", "f")
		f.try(f.ws, "-C", "sub", "-c", "core.fsmonitor=false", "commit", "-qm", "x")
		f.git(".", "-c", "core.fsmonitor=false", "add", "sub")
		_ = os.Remove(f.hit)
	}},
	{name: "bare repository in a folder", setUp: (*fixture).repo, path: "docs/HEAD", dir: "docs", do: func(f *fixture) {
		f.evilRepo("x")
		if err := os.Rename(filepath.Join(f.ws, "x/.git"), filepath.Join(f.ws, "docs")); err != nil {
			f.t.Fatal(err)
		}
		f.git("docs", "config", "core.bare", "false")
		f.git("docs", "config", "core.worktree", f.ws+"/docs")
	}},
	{name: "bare repository as the workspace", setUp: func(f *fixture) { f.write("a.txt", "a") }, path: "HEAD", do: func(f *fixture) {
		f.evilRepo("x")
		for _, n := range []string{"HEAD", "objects", "refs", "config"} {
			if err := os.Rename(filepath.Join(f.ws, "x/.git", n), filepath.Join(f.ws, n)); err != nil {
				f.t.Fatal(err)
			}
		}
		f.write("config", "[core]\n\trepositoryformatversion = 0\n\tbare = false\n\tworktree = "+f.ws+"\n\tfsmonitor = "+f.payload+"\n")
	}},
	{name: "attributes with info renamed", path: ".git/info/attributes", args: []string{"-c", "filter.x.clean=PAYLOAD", "add", "b.txt"}, setUp: func(f *fixture) {
		f.repo()
		if err := os.RemoveAll(filepath.Join(f.ws, ".git/info")); err != nil {
			f.t.Fatal(err)
		}
	}, do: func(f *fixture) {
		f.write(".git/info/attributes", "*.txt filter=x\n")
		f.write("b.txt", "b")
	}},
	{name: "hooks that did not exist", path: ".git/hooks", args: []string{"checkout", "-qb", "next"}, setUp: func(f *fixture) {
		f.repo()
		if err := os.RemoveAll(filepath.Join(f.ws, ".git/hooks")); err != nil {
			f.t.Fatal(err)
		}
	}, do: func(f *fixture) { f.hook(".git/hooks/post-checkout") }},
	{name: "hooks folder of the configuration", path: "ci/hooks", args: []string{"checkout", "-qb", "next"}, setUp: func(f *fixture) {
		f.repo()
		f.git(".", "config", "core.hooksPath", "ci/hooks")
	}, do: func(f *fixture) { f.hook("ci/hooks/post-checkout") }},
	{name: "hooks folder of the configuration, replaced", path: "ci/hooks", args: []string{"checkout", "-qb", "next"}, setUp: func(f *fixture) {
		f.repo()
		f.write("ci/hooks/pre-commit", "#!/bin/sh\n")
		f.git(".", "config", "core.hooksPath", "ci/hooks")
	}, do: func(f *fixture) {
		if err := os.Rename(filepath.Join(f.ws, "ci"), filepath.Join(f.ws, "ci2")); err != nil {
			f.t.Fatal(err)
		}
		f.hook("ci/hooks/post-checkout")
	}},
	{name: "included configuration", path: ".gitshared", setUp: func(f *fixture) {
		f.repo()
		f.git(".", "config", "include.path", "../.gitshared")
	}, do: func(f *fixture) { f.write(".gitshared", "[core]\n\tfsmonitor = "+f.payload+"\n") }},
	{name: "linked worktree of the host", path: ".git/worktrees", dir: "../linked", setUp: (*fixture).repo, do: func(f *fixture) {
		f.git(".", "worktree", "add", "-q", f.top+"/linked")
		f.git(".", "config", "extensions.worktreeConfig", "true")
		f.write(".git/worktrees/linked/config.worktree", "[core]\n\tfsmonitor = "+f.payload+"\n")
	}},
	{name: "nested repository too deep to look into", path: deepest, dir: deepest + "/r", setUp: (*fixture).repo, do: func(f *fixture) {
		f.mkdir(filepath.Join(f.ws, deepest))
		f.evilRepo(deepest + "/r")
	}},
	{name: "rebase with commands behind a tab", path: ".git/rebase-merge", args: []string{"rebase", "--continue"}, setUp: (*fixture).repo, do: func(f *fixture) {
		f.try(f.ws, "-c", "sequence.editor=printf 'break\\nx\\t"+f.payload+"\\n' >", "rebase", "-i", "--root")
	}},
	{name: "rebase with commands", path: ".git/rebase-merge", args: []string{"rebase", "--continue"}, setUp: (*fixture).repo, do: func(f *fixture) {
		f.try(f.ws, "-c", "sequence.editor=printf 'break\\nexec "+f.payload+"\\n' >", "rebase", "-i", "--root")
	}},
}

// deepest is a folder one level below what is looked into.
var deepest = strings.Repeat("d/", maxDepth-1) + "d"

func (f *fixture) hook(rel string) {
	f.t.Helper()
	f.write(rel, "#!/bin/sh\necho hit >>"+f.hit+"\n")
	if err := os.Chmod(filepath.Join(f.ws, rel), 0o755); err != nil {
		f.t.Fatal(err)
	}
}

func command(f *fixture, args []string) []string {
	if args == nil {
		return []string{"status"}
	}
	out := slices.Clone(args)
	for i := range out {
		out[i] = strings.ReplaceAll(out[i], "PAYLOAD", f.payload)
	}
	return out
}

// Every attack works against a git without the guard, and none behind a sweep.
func TestSweepDisarms(t *testing.T) {
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			for _, guarded := range []bool{false, true} {
				f := newFixture(t)
				a.setUp(f)
				g := f.plan()
				a.do(f)
				if guarded {
					found, err := g.Sweep()
					if err != nil {
						t.Fatal(err)
					}
					if !slices.ContainsFunc(found, func(n Finding) bool { return n.Path == a.path && n.MovedTo != "" }) {
						t.Errorf("findings %v, want one for %s", found, a.path)
					}
					if again, err := g.Sweep(); len(again) != 0 || err != nil {
						t.Errorf("a second sweep found %v (%v)", again, err)
					}
				}
				if hit := f.try(filepath.Join(f.ws, a.dir), command(f, a.args)...); hit == guarded {
					t.Errorf("guarded %v: git ran the guest's program: %v", guarded, hit)
				}
				if guarded {
					f.lookAround()
				}
			}
		})
	}
}

// lookAround runs git in every folder of what was set aside, as somebody does
// who wants to see it.
func (f *fixture) lookAround() {
	f.t.Helper()
	_ = filepath.WalkDir(f.aside, func(p string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == "objects" || d.Name() == "hooks") {
			return filepath.SkipDir
		}
		if err == nil && d.IsDir() && f.try(p, "status") {
			f.t.Errorf("git status in %s ran the guest's program", p)
		}
		return nil
	})
}

func watch(t *testing.T, g *Guard) (findings chan Finding, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	findings = make(chan Finding, 1000)
	done := make(chan error, 1)
	go func() { done <- g.Watch(ctx, func(f Finding) { findings <- f }) }()
	stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("watch: %v", err)
		}
	}
	return findings, stop
}

func await(t *testing.T, findings chan Finding, path string) Finding {
	t.Helper()
	for {
		select {
		case f := <-findings:
			if f.Path == path {
				return f
			}
		case <-time.After(time.Minute):
			t.Fatalf("no finding for %s", path)
		}
	}
}

// The watch takes the same things away while the bottle runs, in folders that
// it has never seen too.
func TestWatchDisarms(t *testing.T) {
	for _, a := range attacks {
		if strings.HasPrefix(a.name, "rebase with commands") {
			continue // the guest may rebase; the sweep judges what is left of it
		}
		t.Run(a.name, func(t *testing.T) {
			f := newFixture(t)
			a.setUp(f)
			g := f.plan()
			var took Finding
			// The attack is made elsewhere and moved in piece by piece by
			// another process in real life; here git itself may lose a race
			// against the guard while it prepares the attack, so that the watch
			// starts when it is there, and looks at all there is.
			a.do(f)
			findings, stop := watch(t, g)
			took = await(t, findings, a.path)
			stop()
			if took.MovedTo == "" {
				t.Errorf("%v was left in place", took)
			}
			if f.try(filepath.Join(f.ws, a.dir), command(f, a.args)...) {
				t.Error("git ran the guest's program")
			}
		})
	}
}

func TestWatchIsQuick(t *testing.T) {
	f := newFixture(t)
	f.repo()
	g := f.plan()
	findings, stop := watch(t, g)
	defer stop()
	f.write("warm/.git", "x")
	await(t, findings, "warm/.git")

	var worst time.Duration
	for i, p := range []string{".git/commondir", "new/deep/er/.git", "warm/up/.git", ".git/logs/refs/x", ".git/refs/heads/y", "b/HEAD"} {
		var start time.Time
		switch {
		case i == 3 || i == 4:
			f.mkdir(filepath.Dir(filepath.Join(f.ws, p)))
			start = time.Now()
			if err := os.Symlink("/etc/passwd", filepath.Join(f.ws, p)); err != nil {
				t.Fatal(err)
			}
		case i == 5:
			f.mkdir(f.ws + "/b/objects")
			f.mkdir(f.ws + "/b/refs")
			start = time.Now()
			f.write(p, "ref: refs/heads/main\n")
		default:
			start = time.Now()
			f.write(p, "../evil\n")
		}
		got := await(t, findings, p)
		took := time.Since(start)
		if _, err := os.Lstat(filepath.Join(f.ws, p)); err == nil || got.MovedTo == "" {
			t.Errorf("%s is still there: %v", p, got)
		}
		worst = max(worst, took)
	}
	t.Logf("worst %s", worst)
	if worst > 10*time.Second { // about a millisecond on a quiet machine
		t.Errorf("took %s", worst)
	}
	// A folder that is renamed stays watched, under its new name.
	if err := os.Rename(f.ws+"/warm", f.ws+"/cold"); err != nil {
		t.Fatal(err)
	}
	f.write("cold/up/.git", "x")
	await(t, findings, "cold/up/.git")
	// One that comes as a whole is looked into.
	f.mkdir(f.top + "/outside/a/b")
	f.write(f.top+"/outside/a/b/.git", "x")
	if err := os.Rename(f.top+"/outside", f.ws+"/came"); err != nil {
		t.Fatal(err)
	}
	await(t, findings, "came/a/b/.git")
}

// What a guest does with git all day is no finding.
func TestOrdinaryWork(t *testing.T) {
	f := newFixture(t)
	f.repo()
	g := f.plan()
	findings, stop := watch(t, g)
	f.git(".", "checkout", "-qb", "feature/x")
	for _, n := range []string{"one", "two", "three"} {
		f.write(n+"/HEAD", n)
		f.git(".", "add", ".")
		f.git(".", "commit", "-qm", n)
	}
	f.git(".", "tag", "v1")
	f.git(".", "stash", "list")
	f.git(".", "rebase", "-q", "HEAD~2")
	f.git(".", "checkout", "-q", "-")
	f.git(".", "merge", "-q", "feature/x")
	f.git(".", "gc", "-q")
	f.git(".", "fsck")
	time.Sleep(50 * time.Millisecond)
	stop()
	swept, err := g.Sweep()
	if err != nil {
		t.Fatal(err)
	}
	close(findings)
	for n := range findings {
		swept = append(swept, n)
	}
	if len(swept) != 0 {
		t.Errorf("findings: %v", swept)
	}
}

// git on the host writes through symlinks in its folder.
func TestSymlinksInGit(t *testing.T) {
	f := newFixture(t)
	f.repo()
	g := f.plan()
	target := filepath.Join(f.top, "bashrc")
	f.write(target, "")
	for _, p := range []string{"logs/HEAD", "COMMIT_EDITMSG"} {
		_ = os.Remove(filepath.Join(f.ws, ".git", p))
		if err := os.Symlink(target, filepath.Join(f.ws, ".git", p)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(f.ws, ".git/MERGE_MSG"), 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := g.Sweep()
	if err != nil || len(found) != 3 {
		t.Fatalf("findings %v, %v", found, err)
	}
	f.write("b.txt", "b")
	f.git(".", "add", ".")
	f.git(".", "commit", "-qm", "$(touch x)")
	if b, err := os.ReadFile(target); err != nil || len(b) != 0 {
		t.Errorf("git wrote %q through a symlink (%v)", b, err)
	}
}

// Nothing of a folder is touched through a symlink that stands in for it.
func TestSymlinkedFolders(t *testing.T) {
	f := newFixture(t)
	f.repo()
	g := f.plan()
	f.evilRepo("../elsewhere")
	if err := os.Symlink("../elsewhere", filepath.Join(f.ws, "sub")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(".", filepath.Join(f.ws, "self")); err != nil {
		t.Fatal(err)
	}
	if found, err := g.Sweep(); len(found) != 0 || err != nil {
		t.Errorf("findings %v, %v", found, err)
	}
	if _, err := os.Stat(filepath.Join(f.top, "elsewhere/.git/config")); err != nil {
		t.Error(err)
	}
}

func targets(binds []engine.Bind) (out []string) {
	for _, b := range binds {
		mode := " rw"
		if b.ReadOnly {
			mode = " ro"
		}
		out = append(out, strings.TrimPrefix(b.Target, engine.GuestWorkspace+"/")+mode)
	}
	return out
}

func TestPins(t *testing.T) {
	f := newFixture(t)
	f.repo()
	f.evilRepo("vendor/lib")
	f.git(".", "worktree", "add", "-q", "tree")
	f.git(".", "config", "core.hooksPath", ".husky/_")
	f.write(".husky/_/h", "")
	f.git(".", "init", "-q", "--bare", "srv.git")
	f.write("bottle.json", "{}")
	g := f.plan(func(o *Options) { o.ReadOnly = []string{f.ws + "/bottle.json", f.top + "/payload"} })
	got := targets(g.Binds)
	want := []string{
		".git rw", ".git/info rw", ".git/branches ro", ".git/config ro", ".git/hooks ro", ".git/worktrees ro", ".husky ro", ".husky/_ ro",
		"srv.git rw", "srv.git/info rw", "srv.git/branches ro", "srv.git/config ro", "srv.git/hooks ro",
		"tree/.git ro",
		"vendor/lib/.git rw", "vendor/lib/.git/info rw", "vendor/lib/.git/branches ro", "vendor/lib/.git/config ro", "vendor/lib/.git/hooks ro",
		"bottle.json ro",
	}
	if !slices.Equal(got, want) {
		t.Errorf("binds\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, b := range g.Binds {
		if _, err := os.Lstat(b.Source); err != nil {
			t.Errorf("a mount of nothing would make it on the host: %v", err)
		}
	}
	if found, err := g.Sweep(); len(found) != 0 || err != nil {
		t.Errorf("what was there at the start is no finding: %v, %v", found, err)
	}
	for _, mode := range []string{"ro", "scratch"} {
		if g := f.plan(func(o *Options) { o.Mode = mode }); len(g.Binds) != 0 {
			t.Errorf("mode %s: binds %v", mode, targets(g.Binds))
		}
	}
}

func TestInsideOfGitIsRefused(t *testing.T) {
	f := newFixture(t)
	f.repo()
	f.git(".", "init", "-q", "--bare", "store.git")
	for _, tc := range []struct {
		workspace string
		mode      string
		writable  []string
		refused   bool
	}{
		{".", "rw", nil, false},
		{".", "rw", []string{".git"}, true},
		{".", "rw", []string{".git/info"}, true},
		{".", "rw", []string{"store.git"}, true},
		{".", "rw", []string{"store.git/hooks"}, true},
		{".", "scratch", []string{".git/hooks"}, true},
		{".git", "rw", nil, true},
		{".git/hooks", "rw", nil, true},
		{".git/hooks", "ro", nil, false},
		{"store.git", "rw", nil, false}, // guarded like any other
		{"store.git/hooks", "rw", nil, true},
	} {
		o := Options{Workspace: filepath.Join(f.ws, tc.workspace), Mode: tc.mode}
		for _, w := range tc.writable {
			o.Writable = append(o.Writable, filepath.Join(f.ws, w))
		}
		_, err := Plan(o)
		if refused := err != nil && fault.As(err).Code == "in_git"; refused != tc.refused {
			t.Errorf("%v: %v", tc, err)
		}
	}
}

// A hooks folder in the workspace counts whoever names it: the repository that
// the workspace is a part of, the main one of a linked worktree, or the user.
func TestHooksNamedElsewhere(t *testing.T) {
	for name, tc := range map[string]struct {
		workspace, want string
		setUp           func(*fixture)
	}{
		"enclosing repository": {"pkg", ".husky", func(f *fixture) { f.git(".", "config", "core.hooksPath", "pkg/.husky") }},
		"linked worktree": {"../linked", "pkg/.husky", func(f *fixture) {
			f.git(".", "config", "core.hooksPath", "pkg/.husky")
			f.git(".", "worktree", "add", "-q", f.top+"/linked")
		}},
		"part of a linked worktree": {"../linked/pkg", ".husky", func(f *fixture) {
			f.git(".", "config", "core.hooksPath", "pkg/.husky")
			f.git(".", "worktree", "add", "-q", f.top+"/linked")
		}},
		"the user's, nested repository": {".", "pkg/.husky", func(f *fixture) {
			f.git("pkg", "init", "-q")
			f.write(f.top+"/.gitconfig", "[core]\n\thooksPath = .husky\n")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.write("pkg/.husky/pre-commit", "#!/bin/sh\n")
			f.repo()
			tc.setUp(f)
			ws := filepath.Join(f.ws, tc.workspace)
			g, err := Plan(Options{Workspace: ws, Mode: "rw", Home: f.top})
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Contains(g.Binds, bind(ws, tc.want, true)) {
				t.Errorf("not pinned: %v", targets(g.Binds))
			}
		})
	}
}

func TestSymlinkIsRefused(t *testing.T) {
	for _, name := range []string{".git", ".git/hooks", ".git/config", ".git/info"} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.repo()
			old, moved := filepath.Join(f.ws, name), filepath.Join(f.top, "moved")
			if err := errors.Join(os.Rename(old, moved), os.Symlink(moved, old)); err != nil {
				t.Fatal(err)
			}
			_, err := Plan(Options{Workspace: f.ws, Mode: "rw"})
			if e := fault.As(err); err == nil || e.Exit != fault.Data || e.Code != "git_symlink" || !strings.Contains(e.Msg, name) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestHide(t *testing.T) {
	f := newFixture(t)
	f.repo()
	for _, p := range []string{".env", "a/.env.local", "a/b/key.pem", "certs.d/x.txt", "plain.txt", "secrets/inner.txt", "ref/real.txt", ".git/refs/heads/x.pem", "token"} {
		f.write(p, "secret")
	}
	for link, to := range map[string]string{"link.pem": "ref/real.txt", "out.pem": f.payload, "loop.pem": "loop.pem", "gone.pem": "nowhere"} {
		if err := os.Symlink(to, filepath.Join(f.ws, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(f.ws, "loop.pem")); err != nil {
		t.Fatal(err)
	}
	g := f.plan(func(o *Options) {
		o.Mode = "ro"
		o.Hide = []string{".env*", "*.pem", "certs.d"}
		o.Conceal = []string{f.ws + "/token", f.payload, f.ws + "/absent"}
	})
	want := []string{".env ro", "a/.env.local ro", "a/b/key.pem ro", "certs.d ro", "ref/real.txt ro", "token ro"}
	if got := targets(g.Binds); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	for _, b := range g.Binds {
		want := "/empty/file"
		if strings.HasSuffix(b.Target, "certs.d") {
			want = "/empty/dir"
		}
		if b.Source != want || !b.ReadOnly {
			t.Errorf("%+v", b)
		}
	}
}

func TestNames(t *testing.T) {
	patterns := []string{".env", ".env.*", "*.pem", "*.tar.gz", "id_?sa", "[ab]*", `\\*x`, "*", "*rc", "*."}
	for i := range patterns { // each pattern alone agrees with path.Match
		n := newNames(patterns[i : i+1])
		for _, name := range []string{".env", ".env.a", "x.env", "a.pem", ".pem", "pem", "x.tar.gz", "x.gz", "id_rsa", "id_dsa", "b", "*x", "x", "npmrc", "x."} {
			want, err := path.Match(patterns[i], name)
			if err != nil || n.match(name) != want {
				t.Errorf("%q %q: %v (%v)", patterns[i], name, !want, err)
			}
		}
	}
}

func TestHiddenNamesThatAppear(t *testing.T) {
	f := newFixture(t)
	f.write(".env", "old")
	g := f.plan(func(o *Options) { o.Hide = []string{".env*"} })
	findings, stop := watch(t, g)
	defer stop()
	f.write("warm/.git", "x")
	await(t, findings, "warm/.git")
	f.write("app/.env.local", "TOKEN=1")
	if got := await(t, findings, "app/.env.local"); got.MovedTo != "" || !strings.Contains(got.What, "guest can reach it") {
		t.Errorf("%v", got)
	}
	if _, err := os.Stat(filepath.Join(f.ws, "app/.env.local")); err != nil {
		t.Error("a file of the user's was taken away")
	}
}

// replace does what editors and git do: a new file is renamed over the old.
func (f *fixture) replace(rel, content string) {
	f.t.Helper()
	tmp := filepath.Join(f.ws, filepath.Dir(rel), "new~")
	f.write(tmp, content)
	if err := os.Rename(tmp, filepath.Join(f.ws, rel)); err != nil {
		f.t.Fatal(err)
	}
}

// A mount in the guest is lost when the host replaces the file below it.
func TestLostCovers(t *testing.T) {
	f := newFixture(t)
	f.repo()
	f.git(".", "remote", "add", "origin", "https://example.com/x.git")
	f.write(".env", "old")
	f.write("bottle.json", "{}")
	g := f.plan(func(o *Options) {
		o.Hide = []string{".env*"}
		o.ReadOnly = []string{f.ws + "/bottle.json"}
	})
	covers := make(chan string, 100)
	g.OnLost(func(b engine.Bind) error {
		covers <- b.Source + " " + b.Target
		return nil
	})
	// A file in a folder that is new is met twice, by its event and by the look
	// into the folder, and may be covered twice.
	twice := "/empty/file /workspace/app/.env.new"
	covered := func(want string) {
		t.Helper()
		for {
			select {
			case got := <-covers:
				if got == twice && want != twice {
					continue
				}
				if got != want {
					t.Errorf("covered %q, want %q", got, want)
				}
				return
			case <-time.After(time.Minute):
				t.Fatalf("not covered: %q", want)
			}
		}
	}
	findings, stop := watch(t, g)
	f.write("warm/.git", "x")
	await(t, findings, "warm/.git")

	f.replace(".env", "new")
	covered("/empty/file /workspace/.env")
	await(t, findings, ".env")
	f.replace(".env", "newer")
	covered("/empty/file /workspace/.env")
	f.replace("bottle.json", "{ }")
	covered(f.ws + "/bottle.json /workspace/bottle.json")
	f.write("app/.env.new", "x")
	covered(twice)

	config := f.ws + "/.git/config /workspace/.git/config"
	f.git(".", "config", "branch.main.remote", "origin")
	covered(config)
	f.git(".", "config", "user.name", "somebody")
	covered(config)
	if out := f.git(".", "config", "branch.main.remote"); out != "origin\n" {
		t.Errorf("an ordinary change was taken back: %q", out)
	}
	before, err := os.ReadFile(f.ws + "/.git/config")
	if err != nil {
		t.Fatal(err)
	}
	for _, evil := range []string{
		"[core]\n\tfsmonitor = " + f.payload + "\n",
		"[core]\n\t# x \\\n\tfsmonitor = " + f.payload + "\n",
		"[user]\n\tname = a # x \\\n[core] fsmonitor = " + f.payload + "\n",
		"[branch \"main\"]\n\tremote = ext::" + f.payload + "\n",
		"[remote \"origin\"]\n\turl = https://evil.example/x.git\n",
		"[user]\n\tname = a\n\tsigningkey = x\n",
	} {
		f.replace(".git/config", string(before)+evil)
		covered(config)
		if now, err := os.ReadFile(f.ws + "/.git/config"); err != nil || string(now) != string(before) {
			t.Errorf("after %q: %q (%v)", evil, now, err)
		}
		if f.try(f.ws, "status") {
			t.Errorf("git ran the guest's program after %q", evil)
		}
	}
	// Written in place, as a guest does that was quick.
	file, err := os.OpenFile(f.ws+"/.git/config", os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.WriteString("[core]\n\tfsmonitor = " + f.payload + "\n")
	if err := errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
	covered(config)
	stop()

	if err := os.Remove(f.ws + "/.git/config"); err != nil {
		t.Fatal(err)
	}
	found, err := g.Sweep()
	if err != nil || len(found) != 2 || found[0].Path != ".git/config" || found[1].Path != "bottle.json" {
		t.Errorf("%v, %v", found, err)
	}
	if now, err := os.ReadFile(f.ws + "/.git/config"); err != nil || string(now) != string(before) {
		t.Errorf("at the end: %q (%v)", now, err)
	}
}

// A guest that makes names to hide in a loop holds up nothing else.
func TestCoversDoNotHoldUp(t *testing.T) {
	f := newFixture(t)
	f.repo()
	g := f.plan(func(o *Options) { o.Hide = []string{"*.pem"} })
	release := make(chan struct{})
	g.OnLost(func(engine.Bind) error { <-release; return errors.New("no") })
	findings, stop := watch(t, g)
	f.write("warm/.git", "x")
	await(t, findings, "warm/.git")
	for i := range 3 * maxJobs {
		f.write(filepath.Join("k", strings.Repeat("k", i+1)+".pem"), "")
	}
	f.write(".git/commondir", "x")
	await(t, findings, ".git/commondir")
	close(release)
	stop()
}

func TestTooMuch(t *testing.T) {
	f := newFixture(t)
	for i := range MaxHidden + 1 {
		f.write(filepath.Join("keys", strings.Repeat("k", 1+i%50)+string(rune('a'+i/50))+".pem"), "")
	}
	_, err := Plan(Options{Workspace: f.ws, Mode: "rw", Hide: []string{"*.pem"}})
	if e := fault.As(err); err == nil || e.Exit != fault.Host || e.Code != "too_many_hidden" {
		t.Errorf("%v", err)
	}
	g := newFixture(t)
	for i := range MaxRepositories + 1 {
		g.mkdir(filepath.Join(g.ws, strings.Repeat("r", 1+i%50)+string(rune('a'+i/50)), ".git"))
	}
	_, err = Plan(Options{Workspace: g.ws, Mode: "rw"})
	if e := fault.As(err); err == nil || e.Exit != fault.Host || e.Code != "too_many_repositories" {
		t.Errorf("%v", err)
	}
}

// A guest that makes repositories in a loop fills no disk.
func TestFlood(t *testing.T) {
	f := newFixture(t)
	g := f.plan()
	for i := range maxAside + 20 {
		f.write(filepath.Join("d", strings.Repeat("x", 1+i%50)+string(rune('a'+i/50)), ".git"), "gitdir: x")
	}
	found, err := g.Sweep()
	if err != nil || len(found) != maxAside+20 {
		t.Fatalf("%d findings, %v", len(found), err)
	}
	kept, err := os.ReadDir(f.aside)
	if err != nil || len(kept) != maxAside+1 { // and the notes
		t.Errorf("%d kept, %v", len(kept), err)
	}
	if out, _ := exec.Command("find", f.ws, "-name", ".git").Output(); len(out) != 0 {
		t.Errorf("left: %s", out)
	}
}

func TestAsideOnAnotherFileSystem(t *testing.T) {
	f := newFixture(t)
	shm, err := os.MkdirTemp("/dev/shm", "gitguard-test-")
	if err != nil {
		t.Skipf("SKIPPED: no second file system: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	f.aside = shm
	g := f.plan()
	f.evilRepo("x")
	found, err := g.Sweep()
	if err != nil || len(found) != 1 || !strings.HasPrefix(found[0].MovedTo, shm) {
		t.Fatalf("%v, %v", found, err)
	}
	if b, err := os.ReadFile(filepath.Join(found[0].MovedTo, "config")); err != nil || !strings.Contains(string(b), f.payload) {
		t.Errorf("%q, %v", b, err)
	}
	if left, _ := os.ReadDir(filepath.Join(f.ws, "x")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	f.lookAround()
}

// The process that watched was killed; another one sweeps.
func TestResume(t *testing.T) {
	f := newFixture(t)
	f.repo()
	f.git(".", "config", "core.hooksPath", "ci/hooks")
	f.evilRepo("vendor/lib")
	first := f.plan()
	file := filepath.Join(f.top, "guard.json")
	if err := first.Persist(file); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", fi, err)
	}
	f.write(".git/commondir", "x")
	f.write("sub/.git", "x")
	f.write("ci/hooks/pre-commit", "x")
	f.write(".git/config", "[core]\n\tfsmonitor = "+f.payload+"\n")
	g, err := Resume(file)
	if err != nil {
		t.Fatal(err)
	}
	g.KeepIn(func() (string, error) { return f.aside, nil })
	found, err := g.Sweep()
	var paths []string
	for _, n := range found {
		paths = append(paths, n.Path)
	}
	slices.Sort(paths)
	if want := []string{".git/commondir", ".git/config", "ci/hooks", "sub/.git"}; err != nil || !slices.Equal(paths, want) {
		t.Errorf("%q, %v", paths, err)
	}
	if f.try(f.ws, "status") {
		t.Error("git ran the guest's program")
	}
	if text, err := os.ReadFile(filepath.Join(f.aside, "findings.txt")); err != nil || strings.Count(string(text), "\n") != 4 {
		t.Errorf("%s (%v)", text, err)
	}
	if g, err := Resume(file); g != nil || err != nil {
		t.Errorf("a sweep that is done is not done again: %v, %v", g, err)
	}
}

func TestParseConfig(t *testing.T) {
	hooks, includes := parseConfig("[core]\n\thooksPath = .husky/_ ; why\n[Core] HOOKSPATH=\"a b#c\"\r\n[include]\npath = ../x\\\ny\n" +
		"[includeIf \"gitdir:~/a]b/\"]\n path = z # c\n[other]\n path = no\n hooksPath = no\n[core \"sub\"]\n hooksPath = no\n[broken\npath=1\n")
	if !slices.Equal(hooks, []string{".husky/_", "a b#c"}) || !slices.Equal(includes, []string{"../xy", "z"}) {
		t.Errorf("%q %q", hooks, includes)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add("[core]\nhooksPath=x\n[include]path=\"y\\")
	f.Fuzz(func(t *testing.T, s string) { parseConfig(s) })
}

// A workspace that was removed, or exchanged for something else, keeps no bottle
// from being removed.
func TestSweepWithoutAWorkspace(t *testing.T) {
	for what, exchange := range map[string]func(ws string) error{
		"gone":      func(string) error { return nil },
		"a symlink": func(ws string) error { return os.Symlink("/", ws) },
		"a file":    func(ws string) error { return os.WriteFile(ws, nil, 0o600) },
	} {
		t.Run(what, func(t *testing.T) {
			ws := filepath.Join(t.TempDir(), "ws")
			if err := os.Mkdir(ws, 0o700); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "guard.json")
			g, err := Plan(Options{Workspace: ws, Mode: "rw"})
			if err != nil {
				t.Fatal(err)
			}
			if err := g.Persist(file); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.Rename(ws, ws+".real"), exchange(ws)); err != nil {
				t.Fatal(err)
			}
			if found, err := g.Sweep(); len(found) != 0 || err != nil {
				t.Errorf("%v, %v", found, err)
			}
			if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it would be swept again: %v", err)
			}
		})
	}
}
