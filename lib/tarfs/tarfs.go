// Package tarfs copies files between host and guest as tar streams, on either
// side of which sits somebody who is not trusted.
package tarfs

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// Out writes what is at name (absolute) as a tar stream. Its entries start
// with name's last element, as with tar -C DIR BASE; the root folder's with
// ".". Links are written as links and never followed; devices, sockets and
// pipes are left out, each with a line on stderr.
func Out(name string, w io.Writer, stderr io.Writer) error {
	clean := path.Clean(name)
	base := path.Base(clean)
	if clean == "/" {
		base = "."
	}
	if _, err := os.Lstat(clean); err != nil {
		return err // with the name as it was given
	}
	root, err := os.OpenRoot(path.Dir(clean))
	if err != nil {
		return err
	}
	defer root.Close()
	tw := tar.NewWriter(w)
	if err := tarTree(tw, root, base, stderr); err != nil {
		return err
	}
	return tw.Close()
}

func tarTree(tw *tar.Writer, root *os.Root, name string, stderr io.Writer) error {
	info, err := root.Lstat(name)
	if err != nil {
		return err
	}
	switch t := info.Mode().Type(); {
	case t == 0:
		return tarFile(tw, root, name)
	case t == fs.ModeSymlink:
		target, err := root.Readlink(name)
		if err != nil {
			return err
		}
		return tw.WriteHeader(header(info, name, target))
	case !t.IsDir():
		fmt.Fprintf(stderr, "%s: left out: not a file, folder or link\n", name)
		return nil
	}
	if err := tw.WriteHeader(header(info, name, "")); err != nil {
		return err
	}
	entries, err := fs.ReadDir(root.FS(), name)
	if err != nil {
		return err
	}
	for _, e := range entries {
		err := tarTree(tw, root, path.Join(name, e.Name()), stderr)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// tarFile takes the size from the open file and writes just as much: the file
// may grow or shrink while it is read.
func tarFile(tw *tar.Writer, root *os.Root, name string) error {
	f, err := root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: changed while it was read", name)
	}
	if err := tw.WriteHeader(header(info, name, "")); err != nil {
		return err
	}
	n, err := io.CopyN(tw, f, info.Size())
	if err == io.EOF {
		return fmt.Errorf("%s: shrank while it was read (%d of %d bytes)", name, n, info.Size())
	}
	return err
}

// header leaves owners out: ids mean something else on the other side.
func header(info fs.FileInfo, name, target string) *tar.Header {
	h := &tar.Header{Name: name, Linkname: target, Mode: int64(info.Mode().Perm()),
		ModTime: info.ModTime().Truncate(time.Second), Format: tar.FormatPAX}
	switch {
	case info.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, strings.TrimSuffix(name, "/")+"/"
	case target != "":
		h.Typeflag = tar.TypeSymlink
	default:
		h.Typeflag, h.Size = tar.TypeReg, info.Size()
	}
	return h
}

// In unpacks a tar stream below the folder dir, which is made if missing.
// Nothing is ever written outside of it: no entry leaves dir, through "..", an
// absolute name or a link that was there before. Links that point out of dir,
// hard links and devices are errors. Files that exist are replaced.
func In(dir string, r io.Reader) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return drainAll(r)
		}
		if err != nil {
			return fmt.Errorf("tar stream: %w", err)
		}
		if err := tarEntry(root, h, tr); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

// drainAll reads the padding after the end mark: the sender must not be cut off.
func drainAll(r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

func tarEntry(root *os.Root, h *tar.Header, content io.Reader) error {
	name := path.Clean(h.Name)
	if !filepath.IsLocal(name) {
		return errors.New("leaves the folder")
	}
	mode := fs.FileMode(h.Mode).Perm()
	switch h.Typeflag {
	case tar.TypeDir:
		if err := root.MkdirAll(name, mode|0o700); err != nil {
			return err
		}
		return root.Chmod(name, mode|0o700)
	case tar.TypeReg:
		return writeFile(root, name, mode, h.ModTime, content)
	case tar.TypeSymlink:
		if path.IsAbs(h.Linkname) || !filepath.IsLocal(path.Join(path.Dir(name), h.Linkname)) {
			return fmt.Errorf("link to %q points out of the folder", h.Linkname)
		}
		if err := makeRoom(root, name); err != nil {
			return err
		}
		return root.Symlink(h.Linkname, name)
	}
	return fmt.Errorf("entry of type %q cannot be copied", h.Typeflag)
}

// makeRoom makes the folders above name and removes a file or link at it.
func makeRoom(root *os.Root, name string) error {
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func writeFile(root *os.Root, name string, mode fs.FileMode, mtime time.Time, content io.Reader) error {
	if err := makeRoom(root, name); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err != nil {
		return err
	}
	if mtime.IsZero() {
		return nil
	}
	return root.Chtimes(name, mtime, mtime)
}
