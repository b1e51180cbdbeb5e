package image

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"
)

// Whiteouts, OCI image specification v1.1, layer.md.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // aufs' own; all but opaque mean nothing
	whiteoutOpaque = ".wh..wh..opq"
)

// extractor lays the layers of one image over each other in a folder. Names are
// resolved as the guest would; every change then goes through os.Root, so that
// even a mistake in resolving cannot leave the folder.
//
// The guest's users are not the host's: one host uid stands for all of them.
// Owners are dropped, setuid, setgid and extended attributes with them.
type extractor struct {
	ctx    context.Context
	root   *os.Root
	limits Limits
	shared bool
	prog   *progress

	res     *resolver
	dirName string   // resolved folder that dir is open on
	dir     *os.Root // or nil

	// placed holds the paths that the layer in work has written, and the folders
	// above them: its whiteouts concern only what older layers left.
	placed map[string]struct{}
	// cleared holds what the layer's whiteouts have named.
	cleared map[string]struct{}
	// left holds the names of devices and the like that were left out.
	left  map[string]struct{}
	mtime map[string]time.Time // of folders, set at the end

	entries, bytes, raw, skipped int64
	kept                         int64 // bytes of the files that are left in the end
	buf                          []byte
}

func newExtractor(ctx context.Context, dir string, limits Limits, shared bool, p *progress) (*extractor, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &extractor{
		ctx: ctx, root: root, limits: limits, shared: shared, prog: p,
		res:   newResolver(root),
		left:  map[string]struct{}{},
		mtime: map[string]time.Time{},
		buf:   make([]byte, 256<<10),
	}, nil
}

func (x *extractor) close() {
	x.leaveDir()
	_ = x.root.Close()
}

// layer applies one layer and checks its digest.
func (x *extractor) layer(l layer) error {
	rc, err := l.open()
	if err != nil {
		return corrupt(err, "layer %s", l.diffID)
	}
	defer rc.Close()
	sum := sha256.New()
	in := io.TeeReader(&layerReader{x: x, r: bufio.NewReaderSize(rc, 1<<20)}, sum)
	x.begin()
	if err := x.tar(in); err != nil {
		return err
	}
	// Padding after the end of the archive is part of the digest.
	if _, err := io.CopyBuffer(io.Discard, onlyReader{in}, x.buf); err != nil {
		return corrupt(err, "layer %s", l.diffID)
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != l.diffID {
		return errCorrupt("layer %s has the digest %s", l.diffID, got)
	}
	return nil
}

// begin starts a new layer.
func (x *extractor) begin() {
	x.placed, x.cleared = map[string]struct{}{}, map[string]struct{}{}
}

type onlyReader struct{ io.Reader }

// layerReader bounds what is read and lets a caller stop it.
type layerReader struct {
	x *extractor
	r io.Reader
}

func (l *layerReader) Read(b []byte) (int, error) {
	if err := l.x.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := l.r.Read(b)
	l.x.raw += int64(n)
	// Headers and padding come on top of what the files hold.
	if limit := l.x.limits.Bytes + 2048*l.x.limits.Entries; l.x.raw > limit {
		return n, errTooBig("the layers unpack to more than %s", mib(limit))
	}
	return n, err
}

// corrupt makes an image fault of a failure to read an archive. What the
// operating system or a registry says about itself is not the archive's fault.
func corrupt(err error, format string, args ...any) error {
	if keepError(err) {
		return err
	}
	return errCorrupt(format+": %w", append(args, err)...)
}

func (x *extractor) tar(in io.Reader) error {
	tr := tar.NewReader(in)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return corrupt(err, "layer")
		}
		if err := x.ctx.Err(); err != nil {
			return err
		}
		if err := x.entry(h, tr); err != nil {
			return err
		}
	}
}

func (x *extractor) entry(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	if err := x.count(); err != nil {
		return err
	}
	if isWhiteout(name) {
		return x.whiteout(name)
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return errUnsafe("entry %s would replace the image's root folder", quote(h.Name))
		}
		return nil // the root folder is 0755, always
	}
	parent, err := x.parent(name)
	if err != nil {
		return err
	}
	base := path.Base(name)
	p := path.Join(parent, base)
	if len(p) > maxPath {
		return errUnsafe("entry %s: path of %d bytes is longer than %d", quote(h.Name), len(p), maxPath)
	}
	dir, err := x.enter(parent)
	if err != nil {
		return err
	}
	x.place(p)
	delete(x.left, p)
	switch h.Typeflag {
	case tar.TypeDir:
		return x.mkdir(dir, base, p, h)
	case tar.TypeReg, 0, tar.TypeCont, tar.TypeGNUSparse: // 0 is a regular file in archives older than POSIX
		return x.file(dir, base, h, content)
	case tar.TypeSymlink:
		return x.symlink(dir, base, h)
	case tar.TypeLink:
		return x.link(dir, base, p, h)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		x.skipped++
		x.left[p] = struct{}{}
		return x.clear(dir, base)
	}
	return errCorrupt("entry %s is of the unknown type %q", quote(h.Name), h.Typeflag)
}

// count counts what the archive holds, and the folders that it leaves unsaid.
func (x *extractor) count() error {
	if x.entries++; x.entries > x.limits.Entries {
		return errTooBig("the image has more than %d entries", x.limits.Entries)
	}
	x.prog.step(1, 0)
	return nil
}

// isWhiteout tells whether any part of the name is a whiteout's.
func isWhiteout(name string) bool {
	return strings.HasPrefix(name, whiteoutPrefix) || strings.Contains(name, "/"+whiteoutPrefix)
}

func (x *extractor) whiteout(name string) error {
	dir, base := path.Split(name)
	if isWhiteout(dir) {
		if strings.HasPrefix(dir, whiteoutMeta) || strings.Contains(dir, "/"+whiteoutMeta) {
			return nil
		}
		return errCorrupt("entry %s lies in a whiteout", quote(name))
	}
	target := strings.TrimPrefix(base, whiteoutPrefix)
	if base != whiteoutOpaque && strings.HasPrefix(base, whiteoutMeta) {
		return nil
	}
	if target == "" || target == "." || target == ".." {
		return errUnsafe("whiteout %s leads out of its folder", quote(name))
	}
	parent, missing, err := x.res.dir(path.Clean(dir))
	if missing != "" || errors.Is(err, syscall.ENOTDIR) {
		return nil // nothing there to take away
	}
	if err != nil {
		return err
	}
	if base == whiteoutOpaque {
		return x.once(parent, x.removeOlderIn)
	}
	return x.once(path.Join(parent, target), x.removeOlder)
}

// once clears p of what older layers left: after the first time there is
// nothing of it, and a hostile layer may ask a million times.
func (x *extractor) once(p string, remove func(string) error) error {
	if _, done := x.cleared[p]; done {
		return nil
	}
	x.cleared[p] = struct{}{}
	return remove(p)
}

// removeOlder removes what older layers left at p and below.
func (x *extractor) removeOlder(p string) error {
	if _, ok := x.placed[p]; !ok {
		return x.removeAll(p)
	}
	fi, err := x.root.Lstat(p)
	if err != nil || !fi.IsDir() {
		return ignoreMissing(err)
	}
	return x.removeOlderIn(p)
}

func (x *extractor) removeOlderIn(p string) error {
	if err := x.ctx.Err(); err != nil {
		return err
	}
	d, err := x.root.Open(p)
	if err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	if err := errors.Join(err, d.Close()); err != nil {
		return err
	}
	for _, name := range names {
		if err := x.removeOlder(path.Join(p, name)); err != nil {
			return err
		}
	}
	return nil
}

func (x *extractor) removeAll(p string) error {
	x.res.forget()
	x.leaveDir()
	return x.root.RemoveAll(p)
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// place notes that the layer in work has written p.
func (x *extractor) place(p string) {
	for ; p != "."; p = path.Dir(p) {
		if _, ok := x.placed[p]; ok {
			return
		}
		x.placed[p] = struct{}{}
	}
}

// parent gives the folder that holds name, with no symlink in it, and makes it
// if an archive that names no folders needs it.
func (x *extractor) parent(name string) (string, error) {
	real, missing, err := x.res.dir(path.Dir(name))
	if errors.Is(err, syscall.ENOTDIR) {
		return "", errCorrupt("entry %s lies below a file", quote(name))
	}
	if err != nil || missing == "" {
		return real, err
	}
	full := path.Join(real, missing)
	if len(full) > maxPath || strings.Count(full, "/") > maxDepth {
		return "", errUnsafe("entry %s leads too deep", quote(name))
	}
	for _, part := range strings.Split(missing, "/") {
		if err := x.count(); err != nil {
			return "", err
		}
		real = path.Join(real, part)
		if err := x.root.Mkdir(real, 0o755); err != nil {
			return "", err
		}
		if err := x.root.Chmod(real, 0o755); err != nil {
			return "", err
		}
		x.place(real)
	}
	return real, nil
}

// enter opens the folder p, which is resolved. Most entries of an archive lie
// in the same folder as the one before.
func (x *extractor) enter(p string) (*os.Root, error) {
	if x.dir != nil && x.dirName == p {
		return x.dir, nil
	}
	x.leaveDir()
	d, err := x.root.OpenRoot(p)
	if err != nil {
		return nil, err
	}
	x.dir, x.dirName = d, p
	return d, nil
}

func (x *extractor) leaveDir() {
	if x.dir != nil {
		_ = x.dir.Close()
		x.dir = nil
	}
}

// clear makes room for a new entry. What is removed is never followed.
func (x *extractor) clear(dir *os.Root, base string) error {
	fi, err := dir.Lstat(base)
	if err != nil {
		return ignoreMissing(err)
	}
	if !fi.Mode().IsRegular() {
		x.res.forget() // a folder, or a symlink to one, may be among what is known
	}
	if fi.IsDir() {
		return dir.RemoveAll(base)
	}
	return dir.Remove(base)
}

func (x *extractor) mkdir(dir *os.Root, base, p string, h *tar.Header) error {
	mode := guestMode(h.FileInfo().Mode(), x.shared)
	err := dir.Mkdir(base, 0o700)
	if errors.Is(err, fs.ErrExist) {
		fi, err := dir.Lstat(base)
		if err != nil {
			return err
		}
		if !fi.IsDir() {
			if err := x.clear(dir, base); err != nil {
				return err
			}
			if err := dir.Mkdir(base, 0o700); err != nil {
				return err
			}
		}
	} else if err != nil {
		return err
	}
	x.mtime[p] = h.ModTime
	return dir.Chmod(base, mode)
}

func (x *extractor) file(dir *os.Root, base string, h *tar.Header, content io.Reader) error {
	if h.Size < 0 || h.Size > x.limits.Bytes-x.bytes {
		return errTooBig("the files of the image hold more than %s", mib(x.limits.Bytes))
	}
	x.bytes += h.Size
	f, err := createNew(dir, base, func() error { return x.clear(dir, base) })
	if err != nil {
		return err
	}
	if err := x.fill(f, h, content); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Chmod(guestMode(h.FileInfo().Mode(), x.shared)); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	return setTime(dir, base, h.ModTime)
}

// createNew opens a file that did not exist: an existing one may share its
// content with other names, or be a symlink.
func createNew(dir *os.Root, base string, clear func() error) (*os.File, error) {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL
	f, err := dir.OpenFile(base, flags, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if err := clear(); err != nil {
			return nil, err
		}
		f, err = dir.OpenFile(base, flags, 0o600)
	}
	return f, err
}

// fill copies content into f. A failure to read is the archive's, one to write
// is the disk's.
func (x *extractor) fill(f *os.File, h *tar.Header, content io.Reader) error {
	for left := h.Size; left > 0; {
		n, err := content.Read(x.buf[:min(left, int64(len(x.buf)))])
		if n > 0 {
			if _, werr := f.Write(x.buf[:n]); werr != nil {
				return werr
			}
			left -= int64(n)
			x.prog.step(0, int64(n))
		}
		if err == io.EOF && left > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && err != io.EOF {
			return corrupt(err, "entry %s", quote(h.Name))
		}
	}
	return nil
}

// setTime keeps the time of a file: python, make and others compare it with
// what they have noted. Times that the file system cannot hold are left alone.
func setTime(dir *os.Root, base string, t time.Time) error {
	if t.Before(time.Unix(0, 0)) || t.Year() > 2400 {
		return nil
	}
	return dir.Chtimes(base, t, t)
}

func (x *extractor) symlink(dir *os.Root, base string, h *tar.Header) error {
	if h.Linkname == "" || len(h.Linkname) > maxPath || strings.ContainsRune(h.Linkname, 0) {
		return errCorrupt("entry %s is a symlink to nothing that can be", quote(h.Name))
	}
	err := dir.Symlink(h.Linkname, base)
	if errors.Is(err, fs.ErrExist) {
		if err := x.clear(dir, base); err != nil {
			return err
		}
		err = dir.Symlink(h.Linkname, base)
	}
	return err
}

// link makes a hard link, whose target is a path of the image.
func (x *extractor) link(dir *os.Root, base, p string, h *tar.Header) error {
	target, err := cleanName(h.Linkname)
	if err != nil {
		return err
	}
	parent, missing, err := x.res.dir(path.Dir(target))
	if errors.Is(err, syscall.ENOTDIR) || missing != "" || target == "." {
		return errCorrupt("entry %s is a link to %s, which is not there", quote(h.Name), quote(h.Linkname))
	}
	if err != nil {
		return err
	}
	old := path.Join(parent, path.Base(target))
	if _, ok := x.left[old]; ok {
		x.skipped++
		x.left[p] = struct{}{}
		return x.clear(dir, base)
	}
	if old == p {
		return nil
	}
	fi, err := x.root.Lstat(old)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errCorrupt("entry %s is a link to %s, which is not there", quote(h.Name), quote(h.Linkname))
	case err != nil:
		return err
	case fi.IsDir():
		return errCorrupt("entry %s is a link to the folder %s", quote(h.Name), quote(h.Linkname))
	}
	if err := x.clear(dir, base); err != nil {
		return err
	}
	// Clearing a folder may have taken the target with it.
	if err := x.root.Link(old, p); errors.Is(err, fs.ErrNotExist) {
		return errCorrupt("entry %s replaces its own target %s", quote(h.Name), quote(h.Linkname))
	} else if err != nil {
		return err
	}
	return nil
}

// finish makes the mountpoints, measures the result and sets the times of
// folders, which every entry made in them has changed.
func (x *extractor) finish() error {
	x.leaveDir()
	for p, t := range x.mtime {
		if fi, err := x.root.Lstat(p); err == nil && fi.IsDir() {
			if err := setTime(x.root, p, t); err != nil {
				return err
			}
		}
	}
	var err error
	if x.kept, err = sizeOf(x.ctx, x.root); err != nil {
		return err
	}
	return prepare(x.root)
}

// guestMode is the mode of a file or folder in the cache. The bottle runs under
// one host uid, which for a plain user owns the cache too, so:
//
//   - the owner can always read, and write, and enter folders: else neither the
//     guest nor a removal of the cache could;
//   - setuid and setgid are gone;
//   - in root's cache everything is readable by the uid the bottle runs under,
//     and writable only by root, since others can get there.
func guestMode(m fs.FileMode, shared bool) fs.FileMode {
	perm := m.Perm() | 0o600
	if m.IsDir() {
		perm |= 0o100
	}
	if shared {
		perm |= perm >> 3 & 0o055
		perm |= perm >> 6 & 0o005
		perm &^= 0o022
	}
	if m.IsDir() && m&fs.ModeSticky != 0 {
		perm |= fs.ModeSticky
	}
	return perm
}
