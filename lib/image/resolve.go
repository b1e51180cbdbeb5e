package image

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
)

const (
	maxPath    = 4095 // PATH_MAX less the NUL
	maxName    = 255  // NAME_MAX
	maxDepth   = 512  // components; real images stay below a hundred
	maxSymlink = 40   // as the kernel's own limit
)

// resolver turns a path of the image into one without symlinks, the way a guest
// whose root folder is root would: an absolute target starts at the root. A
// target that climbs above the root is refused: no honest image needs it.
type resolver struct {
	root *os.Root
	// known maps folders that were resolved before. Whoever removes or replaces
	// something calls forget.
	known map[string]string
}

func newResolver(root *os.Root) *resolver {
	return &resolver{root: root, known: map[string]string{}}
}

func (r *resolver) forget() { clear(r.known) }

// dir resolves every component of name, which is clean and relative. missing is
// what was not there, to be made below real.
func (r *resolver) dir(name string) (real, missing string, err error) {
	if name == "." {
		return ".", "", nil
	}
	if real, ok := r.known[name]; ok {
		return real, "", nil
	}
	at, todo := r.start(name)
	real, missing, err = r.follow(name, at, todo)
	if err == nil && missing == "" {
		r.known[name] = real
	}
	return real, missing, err
}

// follow walks on from the resolved parts at through todo, which may hold
// anything. name is for messages.
func (r *resolver) follow(name string, at, todo []string) (real, missing string, err error) {
	for hops := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if len(at) == 0 {
				return "", "", errUnsafe("%s leads out of the image through a symlink", quote(name))
			}
			at = at[:len(at)-1]
			continue
		}
		p := path.Join(path.Join(at...), part)
		fi, err := r.root.Lstat(p)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return joinReal(at), path.Join(append([]string{part}, todo...)...), r.checkMissing(name, todo)
		case err != nil:
			return "", "", err
		case fi.Mode()&fs.ModeSymlink != 0:
			if hops++; hops > maxSymlink {
				return "", "", errCorrupt("%s: too many symlinks", quote(name))
			}
			target, err := r.root.Readlink(p)
			if err != nil {
				return "", "", err
			}
			if path.IsAbs(target) {
				at = at[:0]
			}
			todo = append(strings.Split(target, "/"), todo...)
			continue
		case !fi.IsDir():
			return "", "", &fs.PathError{Op: "open", Path: name, Err: syscall.ENOTDIR}
		}
		at = append(at, part)
		if len(at) > maxDepth {
			return "", "", errUnsafe("%s is nested more than %d deep", quote(name), maxDepth)
		}
	}
	return joinReal(at), "", nil
}

// start splits name after the longest part of it that was resolved before.
func (r *resolver) start(name string) (at, todo []string) {
	for p := path.Dir(name); p != "."; p = path.Dir(p) {
		if real, ok := r.known[p]; ok {
			if real != "." {
				at = strings.Split(real, "/")
			}
			return at, strings.Split(name[len(p)+1:], "/")
		}
	}
	return nil, strings.Split(name, "/")
}

// checkMissing refuses ".." after a part that does not exist: what it means
// would depend on what the part becomes.
func (r *resolver) checkMissing(name string, todo []string) error {
	for _, part := range todo {
		if part == ".." {
			return errUnsafe("%s leads through a dangling symlink", quote(name))
		}
	}
	return nil
}

func joinReal(parts []string) string {
	if len(parts) == 0 {
		return "."
	}
	return path.Join(parts...)
}

// cleanName makes a path of an archive relative to the image's root. A leading
// slash means that root; ".." is refused wherever it stands.
func cleanName(name string) (string, error) {
	if strings.ContainsRune(name, 0) {
		return "", errUnsafe("entry %s has a NUL in its name", quote(name))
	}
	if len(name) > maxPath {
		return "", errUnsafe("entry %s: name of %d bytes is longer than %d", quote(name), len(name), maxPath)
	}
	parts := strings.Split(name, "/")
	depth := 0
	for _, p := range parts {
		if p == ".." {
			return "", errUnsafe("entry %s leads out of the image", quote(name))
		}
		if len(p) > maxName {
			return "", errUnsafe("entry %s: a part of the name is longer than %d bytes", quote(name), maxName)
		}
		if p != "" && p != "." {
			depth++
		}
	}
	if depth > maxDepth {
		return "", errUnsafe("entry %s is nested more than %d deep", quote(name), maxDepth)
	}
	c := strings.TrimPrefix(path.Clean("/"+name), "/")
	if c == "" {
		return ".", nil
	}
	return c, nil
}
