package probe

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// newRepositories are the probes that bring a repository of their own into the
// workspace, so that none has to be there.
var newRepositories = []string{"G09", "G10", "G13"}

// planting is a probe that leaves something in the workspace for the host's git
// to run. fired is the command line for it: it makes a file that only the host
// can make.
func planting(id, name, batch, title string, plant func(repo, fired string)) *probe {
	return &probe{Info: info(id, name, "C03", title), batch: batch,
		skip: func(l *lab) string {
			switch {
			case l.git == "":
				return "the host has no git"
			case l.o.Plain && !slices.Contains(newRepositories, id):
				return "it takes a repository in the workspace, which --plain leaves out"
			}
			return ""
		},
		try: func(c *inside, token string) {
			plant(c.Workspace, fmt.Sprintf("touch %s/fired-%s", c.Outside, token))
		},
		leak: func(l *lab, token string) string {
			if _, err := os.Lstat(filepath.Join(l.dir, "outside", "fired-"+token)); err == nil {
				return "the host's git ran what the sandbox had left"
			}
			return ""
		}}
}

func script(path, fired string) {
	_ = os.MkdirAll(filepath.Dir(path), 0o755)
	_ = os.WriteFile(path, []byte("#!/bin/sh\n"+fired+"\n"), 0o755)
	_ = os.Chmod(path, 0o755)
}

func put(path, text string) {
	_ = os.MkdirAll(filepath.Dir(path), 0o755)
	_ = os.WriteFile(path, []byte(text), 0o644)
}

// bareRepo is a git folder made by hand, whose configuration runs a command.
func bareRepo(dir, config string) {
	put(filepath.Join(dir, "HEAD"), "ref: refs/heads/main\n")
	put(filepath.Join(dir, "config"), "[core]\n\trepositoryformatversion = 0\n\tbare = false\n"+config)
	_ = os.MkdirAll(filepath.Join(dir, "refs/heads"), 0o755)
	_ = os.MkdirAll(filepath.Join(dir, "objects"), 0o755)
}

// monitor makes each git status run a command.
func monitor(fired string) string {
	return fmt.Sprintf("[core]\n\tfsmonitor = \"%s; false\"\n", fired)
}

// hookNames are those that status, add, commit and checkout run.
var hookNames = []string{"pre-commit", "prepare-commit-msg", "commit-msg", "post-commit", "post-checkout", "post-index-change", "reference-transaction", "pre-auto-gc", "fsmonitor-watchman"}

func gitProbes() []*probe {
	return []*probe{
		planting("S09", "git-hook", batchGit, "planting .git/hooks", func(repo, fired string) {
			for _, h := range hookNames {
				script(filepath.Join(repo, ".git/hooks", h), fired)
			}
		}),
		planting("S10", "git-config", batchGit+"-config", "core.fsmonitor, filters and the like in .git/config", func(repo, fired string) {
			appended(filepath.Join(repo, ".git/config"), monitor(fired)+fmt.Sprintf("[diff]\n\texternal = \"%s; true\"\n[filter \"x\"]\n\tclean = \"%s; cat\"\n[core]\n\tpager = \"%s; cat\"\n", fired, fired, fired))
			put(filepath.Join(repo, ".gitattributes"), "* filter=x\n")
			appended(filepath.Join(repo, "README"), "changed")
		}),
		planting("G01", "git-commondir", batchGit+"-commondir", "a commondir that leads to a repository of the sandbox's making", func(repo, fired string) {
			bareRepo(filepath.Join(repo, "evil"), monitor(fired))
			put(filepath.Join(repo, ".git/commondir"), "../evil\n")
		}),
		planting("G02", "git-replaced", batchGit+"-replaced", ".git moved away, another in its place", func(repo, fired string) {
			_ = os.Rename(filepath.Join(repo, ".git"), filepath.Join(repo, "git-away"))
			_ = os.RemoveAll(filepath.Join(repo, ".git"))
			bareRepo(filepath.Join(repo, ".git"), monitor(fired))
		}),
		planting("G03", "git-file", batchGit+"-file", ".git replaced by a file that leads elsewhere", func(repo, fired string) {
			bareRepo(filepath.Join(repo, "evil"), monitor(fired))
			if os.Rename(filepath.Join(repo, ".git"), filepath.Join(repo, "git-away")) != nil {
				_ = os.RemoveAll(filepath.Join(repo, ".git"))
			}
			put(filepath.Join(repo, ".git"), "gitdir: evil\n")
		}),
		planting("G04", "git-symlink", batchGit+"-symlink", ".git replaced by a symlink", func(repo, fired string) {
			bareRepo(filepath.Join(repo, "evil"), monitor(fired))
			if os.Rename(filepath.Join(repo, ".git"), filepath.Join(repo, "git-away")) != nil {
				_ = os.RemoveAll(filepath.Join(repo, ".git"))
			}
			_ = os.Symlink("evil", filepath.Join(repo, ".git"))
		}),
		planting("G05", "git-config-worktree", batchGit+"-worktree-config", "config.worktree", func(repo, fired string) {
			put(filepath.Join(repo, ".git/config.worktree"), monitor(fired))
			appended(filepath.Join(repo, ".git/config"), "[extensions]\n\tworktreeConfig = true\n")
		}),
		planting("G06", "git-modules", batchGit+"-modules", "a submodule whose repository lies in .git/modules", func(repo, fired string) {
			bareRepo(filepath.Join(repo, ".git/modules/sub"), monitor(fired))
			put(filepath.Join(repo, "sub/.git"), "gitdir: ../.git/modules/sub\n")
		}),
		planting("G07", "git-worktrees", batchGit+"-worktrees", "a linked worktree, and the host's own git worktree folder", func(repo, fired string) {
			put(filepath.Join(repo, ".git/worktrees/w/HEAD"), "ref: refs/heads/main\n")
			put(filepath.Join(repo, ".git/worktrees/w/commondir"), "../../../evil\n")
			put(filepath.Join(repo, ".git/worktrees/w/gitdir"), filepath.Join(repo, "sub/.git")+"\n")
			bareRepo(filepath.Join(repo, "evil"), monitor(fired))
			put(filepath.Join(repo, "sub/.git"), "gitdir: ../.git/worktrees/w\n")
		}),
		attributes(planting("G08", "git-attributes", batchGit+"-attributes", "info/attributes, which chooses filters for files", nil)),
		planting("G09", "git-nested", batchGit+"-nested", "a new repository in a folder of the workspace", func(repo, fired string) {
			bareRepo(filepath.Join(repo, "sub/.git"), monitor(fired))
		}),
		planting("G10", "git-init", batchNoGit, "a new .git in a workspace that had none", func(repo, fired string) {
			bareRepo(filepath.Join(repo, ".git"), monitor(fired))
			for _, h := range hookNames {
				script(filepath.Join(repo, ".git/hooks", h), fired)
			}
		}),
		planting("G11", "git-user-config", batchGit+"-user", "the user's own git settings", func(repo, fired string) {
			for _, p := range []string{"../home/.gitconfig", "../home/.config/git/config"} {
				put(filepath.Join(repo, p), monitor(fired))
			}
		}),
		included(planting("G12", "git-include", batchGit+"-include", "a file of the workspace that the user's git settings include, and their hooks folder", func(repo, fired string) {
			put(filepath.Join(repo, "tools/shared.gitconfig"), monitor(fired))
			for _, h := range hookNames {
				script(filepath.Join(repo, "tools/hooks", h), fired)
			}
		})),
		planting("G13", "git-bare", batchGit+"-bare", "a folder of the workspace that is a bare repository by itself", func(repo, fired string) {
			bareRepo(filepath.Join(repo, "sub"), strings.Replace(monitor(fired), "[core]", "[core]\n\tworktree = ..", 1))
		}),
	}
}

func attributes(p *probe) *probe {
	p.try = func(c *inside, token string) {
		put(filepath.Join(c.Workspace, ".git/info/attributes"), "* filter="+token+"\n")
	}
	p.leak = func(l *lab, token string) string { return l.contains(l.ws(".git/info/attributes"), token) }
	return p
}

// included gives the host's user settings that name files of the workspace.
func included(p *probe) *probe {
	p.lay = func(l *lab, _ string) error {
		if err := l.lay(l.ws("tools/shared.gitconfig"), "[user]\n\tname = Shared\n"); err != nil {
			return err
		}
		if err := l.lay(l.ws("tools/hooks/README"), "hooks of all\n"); err != nil {
			return err
		}
		return l.lay(filepath.Join(l.dir, "home/.gitconfig"), fmt.Sprintf("[include]\n\tpath = %s\n[core]\n\thooksPath = %s\n", l.ws("tools/shared.gitconfig"), l.ws("tools/hooks")))
	}
	return p
}
