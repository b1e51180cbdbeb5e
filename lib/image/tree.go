package image

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// readDir gives what an open folder holds, sorted by name, symlinks as such.
func readDir(root *os.Root) ([]fs.FileInfo, error) {
	d, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(-1)
	if err := errors.Join(err, d.Close()); err != nil {
		return nil, err
	}
	sort.Strings(names)
	infos := make([]fs.FileInfo, 0, len(names))
	for _, name := range names {
		fi, err := root.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		infos = append(infos, fi)
	}
	return infos, nil
}

// walk calls fn for everything below root, in a fixed order, a folder before
// what it holds. dir is open on the folder that holds the entry; p is the path
// from root.
func walk(ctx context.Context, root *os.Root, fn func(dir *os.Root, p string, fi fs.FileInfo) error) error {
	return walkDir(ctx, root, ".", 0, fn)
}

func walkDir(ctx context.Context, dir *os.Root, p string, depth int, fn func(*os.Root, string, fs.FileInfo) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if depth > maxDepth {
		return errUnsafe("%s is nested more than %d deep", quote(p), maxDepth)
	}
	infos, err := readDir(dir)
	if err != nil {
		return inFolder(err, p)
	}
	for _, fi := range infos {
		at := path.Join(p, fi.Name())
		if err := fn(dir, at, fi); err != nil {
			return inFolder(err, p)
		}
		if !fi.IsDir() {
			continue
		}
		sub, err := dir.OpenRoot(fi.Name())
		if err != nil {
			return inFolder(err, p)
		}
		err = walkDir(ctx, sub, at, depth+1, fn)
		if err := errors.Join(err, sub.Close()); err != nil {
			return err
		}
	}
	return nil
}

// inFolder completes the path of an error: os.Root reports the part it was
// given.
func inFolder(err error, p string) error {
	var pe *fs.PathError
	if p == "." || !errors.As(err, &pe) || path.Dir(pe.Path) != "." {
		return err
	}
	return &fs.PathError{Op: pe.Op, Path: path.Join(p, pe.Path), Err: pe.Err}
}

// sizeOf sums the content of all regular files, hard links once each.
func sizeOf(ctx context.Context, root *os.Root) (int64, error) {
	var total int64
	seen := map[fileID]bool{}
	err := walk(ctx, root, func(_ *os.Root, _ string, fi fs.FileInfo) error {
		if !fi.Mode().IsRegular() {
			return nil
		}
		if id, many := idOf(fi); many {
			if seen[id] {
				return nil
			}
			seen[id] = true
		}
		total += fi.Size()
		return nil
	})
	return total, err
}

// packFolder packs a folder that holds a root file system. The folder is hashed
// while it is copied, so that the digest is that of the copy; before and after,
// sizes, inodes and times of everything in it are compared.
func (c *cache) packFolder(ctx context.Context, s source) (packed, error) {
	root, err := os.OpenRoot(s.path)
	if err != nil {
		return packed{}, pathFault(err, s.name)
	}
	defer root.Close()
	if err := looksLikeRootfs(root, s); err != nil {
		return packed{}, err
	}
	if strings.HasPrefix(c.dir+"/", s.path+"/") {
		return packed{}, fault.New(fault.Data, "image_unknown", "image %s holds the image cache %s", quote(s.name), quote(c.dir)).
			WithHint("give a folder that holds a root file system and nothing else, or name another cache with --cache")
	}
	unlock, err := c.lock(ctx, s.path)
	if err != nil {
		return packed{}, err
	}
	defer unlock()
	if s.stamp, err = stampTree(ctx, root, c.opts); err != nil {
		return packed{}, sourceFault(err, s.name)
	}
	if r, ok := c.indexed(s); ok {
		return r, nil
	}
	r, err := c.copyFolder(ctx, root, s)
	if err != nil {
		return packed{}, err
	}
	c.remember(s, r)
	return r, nil
}

// sourceFault tells trouble in the user's folder from trouble in the cache.
func sourceFault(err error, name string) error {
	if errors.Is(err, fs.ErrPermission) {
		return pathFault(err, name)
	}
	return err
}

func errChanged(name string) error {
	return fault.New(fault.TempFail, "image_changed", "image %s changed while it was copied", quote(name)).
		WithHint("wait until nothing writes to it, and try again")
}

func (c *cache) copyFolder(ctx context.Context, root *os.Root, s source) (packed, error) {
	t, err := c.newTemp(ctx)
	if err != nil {
		return packed{}, err
	}
	defer t.remove()
	p := newProgress(c.opts, "copying "+s.name)
	defer p.done()
	cp, err := newCopier(t.rootfs, c.opts.Limits, c.shared, p)
	if err != nil {
		return packed{}, err
	}
	defer cp.close()
	if err := walk(ctx, root, cp.entry); err != nil {
		return packed{}, err
	}
	after, err := stampTree(ctx, root, c.opts)
	if err != nil {
		return packed{}, sourceFault(err, s.name)
	}
	if after.print != s.stamp.print {
		return packed{}, errChanged(s.name)
	}
	size, err := sizeOf(ctx, cp.dst)
	if err != nil {
		return packed{}, err
	}
	if err := prepare(cp.dst); err != nil {
		return packed{}, err
	}
	e, cached, err := c.publish(t, Entry{
		Digest: "sha256:" + hex.EncodeToString(cp.sum.Sum(nil)), Kind: KindRootfs, Source: s.name,
		SizeBytes: size, Entries: cp.entries, Skipped: cp.skipped,
	})
	return packed{entry: e, kind: KindRootfs, cached: cached}, err
}

// looksLikeRootfs refuses a folder that was named by mistake: it would be
// copied whole, and nothing in it would run.
func looksLikeRootfs(root *os.Root, s source) error {
	const hint = "give a folder that holds a root file system, a docker-archive (docker save -o) or an OCI layout"
	if s.path == "/" {
		return fault.New(fault.Data, "image_unknown", "image %s is this machine's own root folder", quote(s.name)).
			WithHint(`use "image": "host" for the host's tools`)
	}
	for _, name := range []string{"bin", "usr", "sbin", "lib", "etc"} {
		if _, err := root.Lstat(name); err == nil {
			return nil
		}
	}
	return fault.New(fault.Data, "image_unknown", "image %s holds no root file system: it has none of bin, usr, sbin, lib, etc", quote(s.name)).WithHint(hint)
}

// copier copies a tree and hashes it on the way.
//
// The tree hash is SHA-256 over one record for each entry, in the order of the
// walk: type letter, permission bits (sticky included) as 4 bytes, path and
// link target each after its length as 8 bytes; for a file, its content's
// SHA-256. Owners, times and extended attributes are not part of it.
type copier struct {
	dst    *os.Root
	limits Limits
	shared bool
	prog   *progress
	sum    hash.Hash
	buf    []byte
	linked map[fileID]string // where the first name of a file with several was put

	entries, bytes, skipped int64
}

func newCopier(dir string, limits Limits, shared bool, p *progress) (*copier, error) {
	dst, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &copier{
		dst: dst, limits: limits, shared: shared, prog: p,
		sum: sha256.New(), buf: make([]byte, 256<<10), linked: map[fileID]string{},
	}, nil
}

func (c *copier) close() { _ = c.dst.Close() }

func (c *copier) record(kind byte, mode fs.FileMode, p, target string, content []byte) {
	perm := uint32(mode.Perm())
	if mode&fs.ModeSticky != 0 {
		perm |= 0o1000
	}
	b := binary.BigEndian.AppendUint32([]byte{kind}, perm)
	for _, s := range []string{p, target} {
		b = binary.BigEndian.AppendUint64(b, uint64(len(s)))
		b = append(b, s...)
	}
	c.sum.Write(append(b, content...))
}

func (c *copier) entry(dir *os.Root, p string, fi fs.FileInfo) error {
	if c.entries++; c.entries > c.limits.Entries {
		return errTooBig("the folder has more than %d entries", c.limits.Entries)
	}
	c.prog.step(1, 0)
	switch fi.Mode().Type() {
	case fs.ModeDir:
		c.record('d', fi.Mode(), p, "", nil)
		if err := c.dst.Mkdir(p, 0o700); err != nil {
			return err
		}
		return c.dst.Chmod(p, guestMode(fi.Mode(), c.shared))
	case fs.ModeSymlink:
		target, err := dir.Readlink(fi.Name())
		if err != nil {
			return err
		}
		c.record('l', 0o777, p, target, nil)
		return c.dst.Symlink(target, p)
	case 0:
		return c.file(dir, p, fi)
	}
	c.skipped++
	return nil
}

func (c *copier) file(dir *os.Root, p string, fi fs.FileInfo) error {
	if fi.Size() > c.limits.Bytes-c.bytes {
		return errTooBig("the files of the folder hold more than %s", mib(c.limits.Bytes))
	}
	// A fifo may have taken the file's place: opening one would wait for ever.
	in, err := dir.OpenFile(fi.Name(), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return pathFault(err, p)
		}
		return err
	}
	defer in.Close()
	now, err := in.Stat()
	if err != nil {
		return err
	}
	if !now.Mode().IsRegular() {
		return errChanged(p)
	}
	id, many := idOf(fi)
	var out io.Writer = io.Discard
	var done func() error
	if first, ok := c.linked[id]; ok && many {
		// Read once more for its place in the hash; the bytes are there.
		done = func() error { return c.dst.Link(first, p) }
	} else {
		f, err := c.dst.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		out = f
		done = func() error {
			if many {
				c.linked[id] = p
			}
			if err := errors.Join(f.Chmod(guestMode(fi.Mode(), c.shared)), f.Close()); err != nil {
				return err
			}
			return setTime(c.dst, p, fi.ModTime())
		}
	}
	content, err := c.copy(out, in)
	if err != nil {
		return err
	}
	c.record('f', fi.Mode(), p, "", content)
	return done()
}

func (c *copier) copy(out io.Writer, in *os.File) ([]byte, error) {
	sum := sha256.New()
	for {
		n, err := in.Read(c.buf)
		if n > 0 {
			if c.bytes += int64(n); c.bytes > c.limits.Bytes {
				return nil, errTooBig("the files of the folder hold more than %s", mib(c.limits.Bytes))
			}
			c.prog.step(0, int64(n))
			sum.Write(c.buf[:n])
			if _, err := out.Write(c.buf[:n]); err != nil {
				return nil, err
			}
		}
		if err == io.EOF {
			return sum.Sum(nil), nil
		}
		if err != nil {
			return nil, err
		}
	}
}
