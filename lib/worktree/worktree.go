// Package worktree makes the private copy of a workspace that mode scratch
// works on, and tells how it differs from the original. It is the one place
// that runs git diff.
package worktree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Copy makes dst, which must not exist, a copy of the folder src: files (by
// reflink where the file system can), folders, symbolic links as links, modes.
// Sockets, devices and pipes are left out, and so is what skip says. Symbolic
// links are never followed.
func Copy(ctx context.Context, src, dst string, skip func(rel string) bool) error {
	root, err := os.OpenRoot(src)
	if err != nil {
		return readFailed(err)
	}
	defer root.Close()
	if err := os.Mkdir(dst, 0o700); err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "the private workspace: %w", err)
	}
	out, err := os.OpenRoot(dst)
	if err != nil {
		return readFailed(err)
	}
	defer out.Close()
	type dirMode struct {
		path string
		mode fs.FileMode
	}
	var dirs []dirMode
	err = fs.WalkDir(root.FS(), ".", func(rel string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || rel == "." {
			return err
		}
		if skip != nil && skip(rel) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := root.Lstat(rel)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone since: an editor at work
		}
		if err != nil {
			return err
		}
		switch {
		case info.IsDir():
			dirs = append(dirs, dirMode{rel, info.Mode().Perm()})
			return out.Mkdir(rel, 0o700)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := root.Readlink(rel)
			if err != nil {
				return err
			}
			return out.Symlink(target, rel)
		case info.Mode().IsRegular():
			return copyFile(root, out, rel, info)
		}
		return nil
	})
	if err != nil {
		return copyFailed(err)
	}
	for i := len(dirs) - 1; i >= 0; i-- { // children first: a parent may lose its write bit
		if err := out.Chmod(dirs[i].path, dirs[i].mode); err != nil {
			return copyFailed(err)
		}
	}
	if fi, err := root.Stat("."); err == nil {
		return os.Chmod(dst, fi.Mode().Perm())
	}
	return nil
}

func copyFile(from, to *os.Root, rel string, info fs.FileInfo) error {
	in, err := from.Open(rel)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := to.OpenFile(rel, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if clone(out, in) != nil {
		_, err = io.Copy(out, in)
	}
	err = errors.Join(err, out.Chmod(info.Mode().Perm()), out.Close())
	if err == nil {
		err = to.Chtimes(rel, info.ModTime(), info.ModTime()) // or make and git see everything as changed
	}
	return err
}

// Chown gives the tree to uid and gid, without following a link: root copies
// for the user that the guest is mapped to.
func Chown(dir string, uid, gid int) error {
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	})
	if err != nil {
		return copyFailed(err)
	}
	return nil
}

func copyFailed(err error) error {
	var f *fault.Error
	if errors.As(err, &f) || errors.Is(err, context.Canceled) {
		return err
	}
	return fault.New(fault.IO, "copy_failed", "copying the workspace: %w", err).
		WithHint("mode scratch needs room for a second copy, and files that you may read")
}

func readFailed(err error) error {
	return fault.New(fault.NoInput, "no_workspace", "the workspace cannot be read: %w", err)
}

// Diff writes the changes from the folder before to the folder after as a
// patch that "git apply" takes; what lies in a .git is left out. Both are untrusted trees: git runs outside of
// any repository, without configuration, attributes, textconv or external diff.
func Diff(ctx context.Context, before, after string, w io.Writer) (changed bool, err error) {
	git, err := findGit()
	if err != nil {
		return false, err
	}
	empty, err := os.MkdirTemp("", "bottle-diff-")
	if err != nil {
		return false, fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	defer os.RemoveAll(empty)
	// Names in a patch come from the command line, so both trees get short ones.
	for name, target := range map[string]string{"a": before, "b": after} {
		if err := os.Symlink(target, filepath.Join(empty, name)); err != nil {
			return false, fault.New(fault.CantCreate, "cannot_create", "%w", err)
		}
	}
	cmd := exec.CommandContext(ctx, git, "--git-dir=/dev/null", "diff", "--no-index", "--no-ext-diff", "--no-textconv",
		"--binary", "--no-color", "--src-prefix=", "--dst-prefix=", "--", "a/", "b/")
	cmd.Dir = empty
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + empty, "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_ATTR_NOSYSTEM=1", "GIT_CEILING_DIRECTORIES=/", "LC_ALL=C"}
	var stderr bytes.Buffer
	patch := &noGit{w: w, own: ownName(w, before)}
	cmd.Stdout, cmd.Stderr = patch, &stderr
	err = errors.Join(cmd.Run(), patch.flush())
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false, nil
	case errors.As(err, &exit) && exit.ExitCode() == 1:
		return patch.wrote, nil
	}
	return false, fault.New(fault.IO, "diff_failed", "git diff: %s", strings.TrimSpace(fmt.Sprint(err, " ", stderr.String())))
}

func findGit() (string, error) {
	git, err := exec.LookPath("git")
	if err != nil {
		return "", fault.New(fault.Unavailable, "no_git", "git is not installed").WithHint("bottle-vm diff needs it on the host")
	}
	return git, nil
}

// GitVersion is what the git that Diff uses calls itself.
func GitVersion(ctx context.Context) (string, error) {
	git, err := findGit()
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, git, "--version").Output()
	if err != nil {
		return "", fault.New(fault.Unavailable, "no_git", "git --version: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// noGit drops the files of a patch that lie in a .git folder. A line of content
// never starts with "diff --git ": it has a mark in front, or is base85.
type noGit struct {
	w     io.Writer
	own   string // the file that the patch itself goes to; "" for none
	line  []byte
	drop  bool
	wrote bool
}

func (n *noGit) Write(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			n.line = append(n.line, b...)
			break
		}
		n.line = append(n.line, b[:i+1]...)
		b = b[i+1:]
		if err := n.flush(); err != nil {
			return 0, err
		}
	}
	return total, nil
}

func (n *noGit) flush() error {
	line := n.line
	n.line = n.line[:0]
	if head, ok := bytes.CutPrefix(line, []byte("diff --git ")); ok {
		n.drop = bytes.Contains(head, []byte("/.git/")) || bytes.Contains(head, []byte("/.git\n")) || bytes.Contains(head, []byte("/.git ")) ||
			n.own != "" && (string(head) == "a/"+n.own+" b/"+n.own+"\n" || string(head) == "a/"+n.own+" a/"+n.own+"\n")
	}
	if n.drop || len(line) == 0 {
		return nil
	}
	n.wrote = true
	_, err := n.w.Write(line)
	return err
}

// ownName is the file that the patch is being written to, below the folder
// before: "bottle-vm diff ID > change.patch" is mostly typed in the workspace,
// and that file is no change of the guest's. git names a file that is on the
// first side only twice with a/.
func ownName(w io.Writer, before string) string {
	f, ok := w.(*os.File)
	if !ok {
		return ""
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return ""
	}
	if real, err := filepath.EvalSymlinks(before); err == nil {
		before = real
	}
	rel, err := filepath.Rel(before, path)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return ""
	}
	return rel
}
