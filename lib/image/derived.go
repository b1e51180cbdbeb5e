package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
)

// derivedDir holds files that programs made of a packed root file system, such as
// a .smolmachine. Their names say what they were made of and by what:
// sha256-<hex>.<by>. The bytes need not be the same every time; there is one file
// for each pair, and it is used until it is removed.
const derivedDir = "derived"

// Derive gives the file that by ("smolvm-1.32.2.smolmachine") makes of the packed
// root file system with this digest, and makes it, once, if it is missing. build
// gets the root file system, which it may only read, and a folder for itself; it
// gives the path of what it made there. Whatever is left in that folder is removed,
// also when this process is killed (Sweep): half a file is never in its place.
//
// Errors are build's own where they are faults, and those of Pack.
func Derive(ctx context.Context, opts Options, digest, by string, build func(rootfs, dir string) (string, error)) (path string, cached bool, err error) {
	opts = opts.withDefaults()
	c, err := openCache(opts)
	if err != nil {
		return "", false, err
	}
	path, cached, err = c.derive(ctx, digest, by, build)
	if err != nil {
		return "", false, classify(ctx, err, by)
	}
	return path, cached, nil
}

func (c *cache) derive(ctx context.Context, digest, by string, build func(rootfs, dir string) (string, error)) (string, bool, error) {
	final, err := c.derivedPath(digest, by)
	if err != nil {
		return "", false, err
	}
	if ownedFile(final) {
		return final, true, nil
	}
	if err := c.mkdir(filepath.Dir(final), 0o700); err != nil {
		return "", false, err
	}
	unlock, err := c.lock(ctx, digest)
	if err != nil {
		return "", false, err
	}
	defer unlock()
	if ownedFile(final) {
		return final, true, nil
	}
	e, ok := c.use(digest)
	if !ok {
		return "", false, errNotPacked(digest, c.dir)
	}
	t, err := c.newTemp(ctx)
	if err != nil {
		return "", false, err
	}
	defer t.remove()
	made, err := build(e.Rootfs, t.dir)
	if err != nil {
		return "", false, err
	}
	if err := syncFile(made); err != nil { // its name means "all of it is there", after a power cut too
		return "", false, err
	}
	return final, false, os.Rename(made, final)
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (c *cache) derivedPath(digest, by string) (string, error) {
	name, err := entryName(digest)
	if err != nil {
		return "", err
	}
	if by == "" || strings.ContainsAny(by, "/\x00") {
		return "", fault.New(fault.Bug, "bug", "%q cannot be a part of a file's name", by).WithHint("report it")
	}
	return filepath.Join(c.dir, derivedDir, name+"."+by), nil
}

// Derived gives the files that Derive made of this root file system: the path of
// each, by what made it.
func Derived(cacheDir, digest string) (map[string]string, error) {
	name, err := entryName(digest)
	if err != nil {
		return nil, err
	}
	c, ok, err := existing(cacheDir)
	if err != nil || !ok {
		return nil, err
	}
	names, err := readNames(filepath.Join(c.dir, derivedDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, cacheFault(err, c.dir)
	}
	found := map[string]string{}
	for _, n := range names {
		path := filepath.Join(c.dir, derivedDir, n)
		if by, ok := strings.CutPrefix(n, name+"."); ok && ownedFile(path) {
			found[by] = path
		}
	}
	return found, nil
}

// removeDerived takes away all that was made of the entry of this name.
func (c *cache) removeDerived(name string) error {
	dir := filepath.Join(c.dir, derivedDir)
	names, err := readNames(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, n := range names {
		if strings.HasPrefix(n, name+".") {
			errs = append(errs, os.Remove(filepath.Join(dir, n)))
		}
	}
	return errors.Join(errs...)
}
