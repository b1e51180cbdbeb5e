package image

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// An engine that finds a mountpoint missing makes it in the root file system,
// which is shared. So those that every bottle has are made when an image is
// unpacked, and View gives a bottle with others a root file system of its own.
var (
	standardDirs = []string{
		"dev", "etc", "home/agent", "opt/bottle", "proc", "run", "sys", "tmp", "var/tmp", "workspace",
	}
	// Engines and the guest helper put files of their own here. Images like to
	// have symlinks here that lead to a running system's files.
	standardFiles = []string{
		"etc/group", "etc/hostname", "etc/hosts", "etc/passwd", "etc/resolv.conf",
	}
)

const maxStandardFile = 1 << 20

// Mountpoint is a place in the guest that something is mounted on.
type Mountpoint struct {
	Path string // absolute guest path
	Dir  bool   // a folder is mounted, else a file
}

// prepare makes the mountpoints that every bottle needs, as real folders and
// files.
func prepare(root *os.Root) error {
	res := newResolver(root)
	for _, p := range standardDirs {
		if _, err := realDir(root, res, p, true); err != nil {
			return err
		}
	}
	for _, p := range standardFiles {
		if err := realFile(root, res, p); err != nil {
			return err
		}
	}
	return root.Chmod(".", 0o755)
}

// realDir makes sure that p is a folder and gives its resolved path. Symlinks
// above p that lead to a folder are followed; others, and one at p itself if
// last is set, give way to a folder.
func realDir(root *os.Root, res *resolver, p string, last bool) (string, error) {
	real := "."
	parts := strings.Split(p, "/")
	for i, part := range parts {
		next := path.Join(real, part)
		fi, err := root.Lstat(next)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return "", err
		case fi.IsDir():
			real = next
			continue
		case fi.Mode()&fs.ModeSymlink != 0:
			if i < len(parts)-1 || !last {
				if to, missing, err := res.dir(next); err == nil && missing == "" {
					real = to
					continue
				}
			}
			if err := root.Remove(next); err != nil {
				return "", err
			}
			res.forget()
		default:
			return "", fault.New(fault.Data, "image_unknown", "the image has a file at /%s, where bottles need a folder", next).
				WithHint("use another image, or remove the file from it")
		}
		if err := root.Mkdir(next, 0o755); err != nil {
			return "", err
		}
		if err := root.Chmod(next, 0o755); err != nil {
			return "", err
		}
		real = next
	}
	return real, nil
}

// realFile makes sure that p is a regular file, with the content that a symlink
// there leads to.
func realFile(root *os.Root, res *resolver, p string) error {
	dir, err := realDir(root, res, path.Dir(p), false)
	if err != nil {
		return err
	}
	at := path.Join(dir, path.Base(p))
	fi, err := root.Lstat(at)
	var content []byte
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case fi.Mode().IsRegular():
		return nil
	case fi.IsDir():
		return fault.New(fault.Data, "image_unknown", "the image has a folder at /%s, where bottles need a file", at).
			WithHint("use another image, or remove the folder from it")
	default:
		if content, err = readThrough(root, res, at); err != nil {
			return err
		}
		if err := root.Remove(at); err != nil {
			return err
		}
		res.forget()
	}
	f, err := root.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Chmod(0o644), f.Close())
}

// readThrough gives the content of the regular file that a symlink leads to in
// the guest, or nothing if it leads to none.
func readThrough(root *os.Root, res *resolver, link string) ([]byte, error) {
	at, ok, err := follow(root, res, link)
	if err != nil || !ok {
		return nil, err
	}
	fi, err := root.Lstat(at)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() > maxStandardFile {
		return nil, ignoreMissing(err)
	}
	return root.ReadFile(at)
}

// follow resolves p, its last part too, the way the guest would. ok is false if
// it leads nowhere.
func follow(root *os.Root, res *resolver, p string) (at string, ok bool, err error) {
	for range maxSymlink {
		dir, missing, err := res.dir(path.Dir(p))
		var f *fault.Error
		if missing != "" || errors.As(err, &f) || errors.Is(err, syscall.ENOTDIR) {
			return "", false, nil
		}
		if err != nil {
			return "", false, err
		}
		at := path.Join(dir, path.Base(p))
		fi, err := root.Lstat(at)
		if err != nil {
			return "", false, ignoreMissing(err)
		}
		if fi.Mode()&fs.ModeSymlink == 0 {
			return at, true, nil
		}
		target, err := root.Readlink(at)
		if err != nil {
			return "", false, err
		}
		if !path.IsAbs(target) {
			target = dir + "/" + target
		}
		// Only the resolver may take ".." away; its last part is a folder's.
		parts := strings.Split(strings.TrimRight(target, "/"), "/")
		last := parts[len(parts)-1]
		if last != ".." && last != "." && last != "" {
			parts = parts[:len(parts)-1]
		} else {
			last = "."
		}
		real, missing, err := res.follow(target, nil, parts)
		if missing != "" || err != nil {
			return "", false, nil
		}
		if last == "." {
			return real, true, nil
		}
		p = path.Join(real, last)
	}
	return "", false, nil
}

// View gives a root file system that has all of the mountpoints: the shared one
// if it has them already, else a copy in dir/rootfs whose files are hard links
// (plain copies where dir is on another file system). dir exists and is the
// caller's; what View makes in it goes with it. The shared one is never changed.
func View(rootfs string, mountpoints []Mountpoint, dir string) (string, error) {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return "", fault.New(fault.NoInput, "image_missing", "root file system: %w", err).WithHint("run bottle-pack on this plan again")
	}
	defer root.Close()
	missing, err := missingIn(root, mountpoints)
	if err != nil || len(missing) == 0 {
		return rootfs, err
	}
	view := filepath.Join(dir, rootfsName)
	if err := makeView(root, view, missing); err != nil {
		_ = removeAll(view)
		var f *fault.Error
		switch {
		case errors.As(err, &f):
			return "", f
		case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
			return "", fault.New(fault.IO, "disk_full", "root file system %s: %w", quote(view), err).WithHint("free some space")
		}
		return "", fault.New(fault.IO, "image_io", "root file system %s: %w", quote(view), err)
	}
	return view, nil
}

// missingIn gives the mountpoints, relative, that root does not have.
func missingIn(root *os.Root, mountpoints []Mountpoint) ([]Mountpoint, error) {
	res := newResolver(root)
	var missing []Mountpoint
	for _, m := range mountpoints {
		p, err := cleanName(m.Path)
		if err != nil || !path.IsAbs(m.Path) || p == "." {
			return nil, fault.New(fault.Data, "mount_target", "mount target %s is not a path below / in the guest", quote(m.Path)).
				WithHint("give an absolute path without ..")
		}
		at, ok, err := follow(root, res, p)
		if err != nil {
			return nil, err
		}
		if !ok {
			missing = append(missing, Mountpoint{Path: p, Dir: m.Dir})
			continue
		}
		fi, err := root.Lstat(at)
		if err != nil {
			return nil, err
		}
		if fi.IsDir() != m.Dir {
			return nil, fault.New(fault.Data, "mount_target", "mount target %s: the image has a %s there and the plan mounts a %s",
				quote(m.Path), fileWord(fi.IsDir()), fileWord(m.Dir)).WithHint("choose another target")
		}
	}
	return missing, nil
}

func fileWord(dir bool) string {
	if dir {
		return "folder"
	}
	return "file"
}

func makeView(src *os.Root, view string, missing []Mountpoint) error {
	if err := os.Mkdir(view, 0o700); err != nil {
		return err
	}
	dst, err := os.OpenRoot(view)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := linkTree(src, dst, 0); err != nil {
		return err
	}
	res := newResolver(dst)
	for _, m := range missing {
		if m.Dir {
			_, err = realDir(dst, res, m.Path, true)
		} else {
			err = realFile(dst, res, m.Path)
		}
		if err != nil {
			return err
		}
	}
	fi, err := src.Lstat(".")
	if err != nil {
		return err
	}
	return dst.Chmod(".", chmodBits(fi.Mode()))
}

func chmodBits(m fs.FileMode) fs.FileMode { return m & (fs.ModePerm | fs.ModeSticky) }

// linkTree copies folders and symlinks of src into dst and hard-links files.
func linkTree(src, dst *os.Root, depth int) error {
	if depth > maxDepth {
		return errUnsafe("the root file system is nested more than %d deep", maxDepth)
	}
	infos, err := readDir(src)
	if err != nil {
		return err
	}
	for _, fi := range infos {
		if err := linkEntry(src, dst, fi, depth); err != nil {
			return err
		}
	}
	return nil
}

func linkEntry(src, dst *os.Root, fi fs.FileInfo, depth int) error {
	name := fi.Name()
	switch {
	case fi.IsDir():
		if err := dst.Mkdir(name, 0o700); err != nil {
			return err
		}
		s, err := src.OpenRoot(name)
		if err != nil {
			return err
		}
		defer s.Close()
		d, err := dst.OpenRoot(name)
		if err != nil {
			return err
		}
		defer d.Close()
		if err := linkTree(s, d, depth+1); err != nil {
			return err
		}
		if err := dst.Chmod(name, chmodBits(fi.Mode())); err != nil {
			return err
		}
		return setTime(dst, name, fi.ModTime())
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := src.Readlink(name)
		if err != nil {
			return err
		}
		return dst.Symlink(target, name)
	}
	return linkFile(src, dst, fi)
}

func linkFile(src, dst *os.Root, fi fs.FileInfo) error {
	err := linkAt(src, dst, fi.Name())
	if !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EMLINK) && !errors.Is(err, unix.EPERM) {
		return err
	}
	in, err := src.Open(fi.Name())
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := dst.OpenFile(fi.Name(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Chmod(chmodBits(fi.Mode())), out.Close()); err != nil {
		return err
	}
	return setTime(dst, fi.Name(), fi.ModTime())
}

// linkAt links a file from one open folder into another.
func linkAt(src, dst *os.Root, name string) error {
	s, err := src.Open(".")
	if err != nil {
		return err
	}
	defer s.Close()
	d, err := dst.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Linkat(int(s.Fd()), name, int(d.Fd()), name, 0); err != nil {
		return &os.LinkError{Op: "link", Old: name, New: name, Err: err}
	}
	return nil
}
