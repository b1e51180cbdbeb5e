package trust

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Place is where the paths of a plan start from.
type Place struct {
	Base string // the manifest's folder, absolute
	Home string // for ~; may be empty when nothing uses it
	// Scripts, where they were read before, are what counts of the files that
	// commands name, and not what lies there by now.
	Scripts Scripts
}

// Path makes a path of the plan absolute: relative to Base, below Home for ~,
// or as it stands. Symlinks are left as they are.
func (pl Place) Path(p string) (string, error) {
	switch {
	case p == "~" || strings.HasPrefix(p, "~/"):
		if !filepath.IsAbs(pl.Home) {
			return "", fault.New(fault.Host, "no_home", "%q starts from the home folder, and HOME is not set", p).
				WithHint("set HOME, or write the path in full")
		}
		return filepath.Join(pl.Home, p[1:]), nil
	case strings.HasPrefix(p, "~"):
		return "", fault.New(fault.Data, "bad_path", "%q: another user's home folder cannot be named", p).
			WithHint("write the path in full, or ./%s if the name really starts with ~", p)
	case filepath.IsAbs(p):
		return filepath.Clean(p), nil
	}
	return filepath.Join(pl.Base, p), nil
}

// Command makes the paths in the argument list of a secret's command absolute:
// arguments that start with ./, ../, ~/ or /, and a program with a slash in its
// name. Other arguments are passed as they are.
func (pl Place) Command(argv []string) ([]string, error) {
	out := make([]string, len(argv))
	for i, arg := range argv {
		out[i] = arg
		if !isPath(i, arg) {
			continue
		}
		abs, err := pl.Path(arg)
		if err != nil {
			return nil, err
		}
		out[i] = abs
	}
	return out, nil
}

func isPath(i int, arg string) bool {
	return strings.HasPrefix(arg, "./") || strings.HasPrefix(arg, "../") || strings.HasPrefix(arg, "~/") ||
		filepath.IsAbs(arg) || i == 0 && strings.Contains(arg, "/")
}

// Real is a path of the plan with all symlinks resolved, and whether it lies
// inside the manifest's folder. What does not exist yet is resolved as far as
// it does; a dangling symlink is outside, because nobody knows where it will
// lead.
func (pl Place) Real(p string) (real string, inside bool, err error) {
	abs, err := pl.Path(p)
	if err != nil {
		return "", false, err
	}
	base, err := filepath.EvalSymlinks(pl.Base)
	if err != nil {
		return "", false, fault.New(fault.NoInput, "no_input", "the manifest's folder: %w", err)
	}
	real, err = resolve(abs)
	if errors.Is(err, errDangling) {
		return abs, false, nil
	}
	if err != nil {
		return "", false, fault.New(fault.NoInput, "no_input", "resolving %s: %w", p, err)
	}
	return real, Within(base, real), nil
}

var errDangling = errors.New("symlink to nowhere")

func resolve(abs string) (string, error) {
	real, err := filepath.EvalSymlinks(abs)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return real, err
	}
	if _, err := os.Lstat(abs); err == nil {
		return "", errDangling
	}
	parent, err := resolve(filepath.Dir(abs))
	return filepath.Join(parent, filepath.Base(abs)), err
}

// Within tells whether path is dir or lies below it. Both are clean and
// absolute.
func Within(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// Program refuses (77, program_in_reach) to run what lies in one of the folders
// away (Reach), by itself or by a link: a PATH may lead through a checkout
// (node_modules/.bin, a virtual environment), and what a guest or a repository
// put there would run on the host.
func Program(name, path string, away []string) error {
	names := []string{path}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		names = append(names, real)
	}
	if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		names = append(names, filepath.Join(dir, filepath.Base(path)))
	}
	for _, p := range names {
		for _, a := range away {
			if Within(a, p) {
				return fault.New(fault.NoPerm, "program_in_reach", "%s is %s, in %s, where a guest or a repository could change what runs on the host", name, p, a).
					WithHint("install it outside of that folder, and take the folder out of PATH")
			}
		}
	}
	return nil
}

// Temp refuses (77, temp_in_reach) a folder for temporary files that lies in one
// of the folders away: what is laid there to be run, or to be believed, a guest
// could exchange.
func Temp(away []string) error {
	dir := os.TempDir()
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	for _, a := range away {
		if Within(a, dir) {
			return fault.New(fault.NoPerm, "temp_in_reach", "the folder for temporary files, %s, lies in %s, where a guest could exchange what is laid there", dir, a).
				WithHint("set TMPDIR to a folder outside of it, such as /tmp")
		}
	}
	return nil
}

// Reach are the folders that the guest of b may write, or that come with the
// repository: the manifest's folder, the workspace and the mounts, resolved. The
// modes of the plan do not matter, it is what is to be judged.
func Reach(b *plan.Bottle, at Place) []string {
	paths := []string{at.Base, b.Workspace.Path}
	for _, m := range b.Mounts {
		paths = append(paths, m.Source)
	}
	var out []string
	for _, p := range paths {
		if real, _, err := at.Real(p); err == nil { // what cannot be found is not mounted either
			out = append(out, real)
		}
	}
	return out
}
