package image

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// layoutVersion is part of every entry: a change in how images are unpacked
// makes older entries count for nothing.
const layoutVersion = 1

const (
	tmpPrefix  = "tmp-"
	markerName = "entry.json"
	rootfsName = "rootfs"
)

// Entry is one root file system in the cache.
type Entry struct {
	Layout     int       `json:"layout"`
	Digest     string    `json:"digest"` // sha256:<hex>
	Kind       string    `json:"kind"`
	Source     string    `json:"source"`     // as the manifest that first packed it named it
	SizeBytes  int64     `json:"size_bytes"` // content of the files, unpacked
	Entries    int64     `json:"entries"`
	Skipped    int64     `json:"skipped"` // devices, fifos and sockets left out
	CreatedAt  time.Time `json:"created_at"`
	LastUsedAt time.Time `json:"last_used_at"` // kept as the marker's mtime
	Rootfs     string    `json:"rootfs"`       // absolute path; set on reading
}

type cache struct {
	dir    string
	opts   Options
	shared bool // root's: bottles run under other uids
}

// openCache makes the cache folder if it is missing and checks that nobody else
// can put anything into it.
func openCache(opts Options) (*cache, error) {
	c := &cache{opts: opts, shared: os.Geteuid() == 0}
	if !filepath.IsAbs(opts.CacheDir) {
		return nil, fault.New(fault.Usage, "cache_relative", "cache folder %s is not absolute", quote(opts.CacheDir)).
			WithHint("give --cache a full path")
	}
	if err := c.mkdirAll(filepath.Clean(opts.CacheDir)); err != nil {
		return nil, cacheFault(err, opts.CacheDir)
	}
	dir, err := filepath.EvalSymlinks(opts.CacheDir)
	if err != nil {
		return nil, cacheFault(err, opts.CacheDir)
	}
	c.dir = dir
	if err := checkPrivate(dir); err != nil {
		return nil, err
	}
	for _, sub := range []string{"locks", "index", "archives"} {
		if err := c.mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, cacheFault(err, dir)
		}
	}
	return c, nil
}

func cacheFault(err error, dir string) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fault.New(fault.IO, "disk_full", "cache folder %s: %w", quote(dir), err).WithHint("free some space, or name another folder with --cache")
	}
	return fault.New(fault.CantCreate, "cache_unwritable", "cache folder %s: %w", quote(dir), err).
		WithHint("name a folder of your own with --cache")
}

// dirMode is the mode of the folders that lead to a root file system.
func (c *cache) dirMode() fs.FileMode {
	if c.shared {
		return 0o711
	}
	return 0o700
}

// mkdir makes one folder with exactly this mode; one that is there is fine.
func (c *cache) mkdir(dir string, mode fs.FileMode) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Chmod(dir, mode) // whatever the umask says
}

func (c *cache) mkdirAll(dir string) error {
	if fi, err := os.Stat(dir); err == nil {
		if !fi.IsDir() {
			return fmt.Errorf("%s: %w", dir, unix.ENOTDIR)
		}
		return nil
	}
	if err := c.mkdirAll(filepath.Dir(dir)); err != nil {
		return err
	}
	return c.mkdir(dir, c.dirMode())
}

// checkPrivate refuses a folder that somebody else owns or may write, or that
// somebody else could swap for another by renaming a folder above it. dir has
// no symlink in it.
func checkPrivate(dir string) error {
	for p := dir; ; p = filepath.Dir(p) {
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return cacheFault(err, p)
		}
		if why := unsafeDir(&st, p == dir); why != "" {
			return fault.New(fault.NoPerm, "cache_unsafe", "cache folder %s: %s %s", quote(dir), quote(p), why).
				WithHint("make it yours alone (owner and chmod go-w), or name another folder with --cache")
		}
		if p == filepath.Dir(p) {
			return nil
		}
	}
}

// unsafeDir says what is wrong with a folder. Above the cache folder itself a
// sticky bit, root as the owner, and write permission for the caller's own
// group (of which private groups are the usual case) are good enough.
func unsafeDir(st *unix.Stat_t, itself bool) string {
	mode, uid := uint32(st.Mode), os.Geteuid()
	switch {
	case mode&unix.S_IFMT != unix.S_IFDIR:
		return "is not a folder"
	case int(st.Uid) != uid && (itself || st.Uid != 0):
		return fmt.Sprintf("belongs to uid %d", st.Uid)
	case itself && mode&0o022 != 0:
		return "can be written by others"
	case mode&unix.S_ISVTX != 0:
		return ""
	case mode&0o002 != 0, mode&0o020 != 0 && int(st.Gid) != os.Getegid():
		return "can be written by others"
	}
	return ""
}

func entryName(digest string) (string, error) {
	h, ok := strings.CutPrefix(digest, "sha256:")
	if b, err := hex.DecodeString(h); !ok || err != nil || len(b) != sha256.Size || strings.ToLower(h) != h {
		return "", fault.New(fault.Data, "image_digest", "%s is not an image digest", quote(digest)).
			WithHint("digests look like sha256:<64 hex digits>")
	}
	return "sha256-" + h, nil
}

// lookup gives a complete entry. One that is not complete, or that another user
// made, is as good as none.
func (c *cache) lookup(digest string) (Entry, bool) {
	name, err := entryName(digest)
	if err != nil {
		return Entry{}, false
	}
	dir := filepath.Join(c.dir, name)
	if !ownedDir(dir) || !ownedDir(filepath.Join(dir, rootfsName)) {
		return Entry{}, false
	}
	marker := filepath.Join(dir, markerName)
	data, err := os.ReadFile(marker)
	if err != nil {
		return Entry{}, false
	}
	var e Entry
	if json.Unmarshal(data, &e) != nil || e.Layout != layoutVersion || e.Digest != digest {
		return Entry{}, false
	}
	if fi, err := os.Stat(marker); err == nil {
		e.LastUsedAt = fi.ModTime().UTC()
	}
	e.Rootfs = filepath.Join(dir, rootfsName)
	return e, true
}

func ownedDir(p string) bool {
	var st unix.Stat_t
	return unix.Lstat(p, &st) == nil && uint32(st.Mode)&unix.S_IFMT == unix.S_IFDIR && int(st.Uid) == os.Geteuid()
}

// use gives an entry and notes that it was used.
func (c *cache) use(digest string) (Entry, bool) {
	e, ok := c.lookup(digest)
	if !ok {
		return e, false
	}
	now := c.opts.Now()
	// A cache on a read-only file system serves all the same.
	_ = os.Chtimes(filepath.Join(filepath.Dir(e.Rootfs), markerName), now, now)
	return e, true
}

// ensure gives the entry with this digest and makes it, once, if it is missing.
// build fills the folder it is given.
func (c *cache) ensure(ctx context.Context, digest string, build func(dir string) (Entry, error)) (Entry, bool, error) {
	if e, ok := c.use(digest); ok {
		return e, true, nil
	}
	unlock, err := c.lock(ctx, digest)
	if err != nil {
		return Entry{}, false, err
	}
	defer unlock()
	if e, ok := c.use(digest); ok {
		return e, true, nil
	}
	t, err := c.newTemp(ctx)
	if err != nil {
		return Entry{}, false, err
	}
	defer t.remove()
	e, err := build(t.rootfs)
	if err != nil {
		return Entry{}, false, err
	}
	e.Digest = digest
	return c.publish(t, e)
}

// publish moves a finished root file system into its place. The second result
// is true when another process was first.
func (c *cache) publish(t *temp, e Entry) (Entry, bool, error) {
	name, err := entryName(e.Digest)
	if err != nil {
		return Entry{}, false, err
	}
	e.Layout = layoutVersion
	e.CreatedAt = c.opts.Now().UTC().Truncate(time.Second)
	data, err := json.Marshal(e)
	if err != nil {
		return Entry{}, false, err
	}
	// The marker means "all of it is there", after a power cut too.
	if err := syncTree(t.dir); err != nil {
		return Entry{}, false, err
	}
	if err := writeSynced(filepath.Join(t.dir, markerName), data); err != nil {
		return Entry{}, false, err
	}
	if err := os.Chmod(t.dir, c.dirMode()); err != nil {
		return Entry{}, false, err
	}
	final := filepath.Join(c.dir, name)
	for range 3 {
		err = os.Rename(t.dir, final)
		if err == nil {
			got, ok := c.lookup(e.Digest)
			if !ok {
				return Entry{}, false, fault.New(fault.IO, "image_io", "cache entry %s vanished while it was made", quote(final))
			}
			return got, false, nil
		}
		if got, ok := c.use(e.Digest); ok {
			return got, true, nil
		}
		// Something that does not count is in the way.
		if err := c.discard(final); err != nil {
			return Entry{}, false, err
		}
	}
	return Entry{}, false, err
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// discard takes a folder out of sight in one step, then removes it.
func (c *cache) discard(path string) error {
	gone := filepath.Join(c.dir, tmpPrefix+rand.Text())
	if err := os.Rename(path, gone); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return removeAll(gone)
}

// lock takes the lock of a key. Locks are never nested, so that two keys that
// share a file cannot wait for each other.
func (c *cache) lock(ctx context.Context, key string) (func(), error) {
	sum := sha256.Sum256([]byte(key))
	return c.flock(ctx, filepath.Join(c.dir, "locks", hex.EncodeToString(sum[:1])))
}

func (c *cache) flock(ctx context.Context, path string) (func(), error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	p := newProgress(c.opts, "waiting for another pack of the same image")
	defer p.done()
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = unix.Close(fd) }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = unix.Close(fd)
			return nil, &fs.PathError{Op: "flock", Path: path, Err: err}
		}
		select {
		case <-ctx.Done():
			_ = unix.Close(fd)
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		p.tick()
	}
}

// temp is a folder for work in progress. Its flock tells the sweeper that the
// process that made it is alive.
type temp struct {
	dir    string
	rootfs string
	fd     int
}

// newTemp makes one, and clears away those of processes that died.
func (c *cache) newTemp(ctx context.Context) (*temp, error) {
	// The sweeper must not see a new folder before its lock is taken.
	unlock, err := c.lockTemps(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := c.sweep(); err != nil {
		return nil, err
	}
	t := &temp{dir: filepath.Join(c.dir, tmpPrefix+rand.Text()), fd: -1}
	t.rootfs = filepath.Join(t.dir, rootfsName)
	if err := os.Mkdir(t.dir, 0o700); err != nil {
		return nil, cacheFault(err, c.dir)
	}
	if err := t.hold(); err != nil {
		t.remove()
		return nil, err
	}
	if err := c.mkdir(t.rootfs, 0o755); err != nil {
		t.remove()
		return nil, cacheFault(err, c.dir)
	}
	return t, nil
}

func (t *temp) hold() error {
	fd, err := unix.Open(t.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	t.fd = fd
	return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
}

// remove clears the folder away; once it was renamed into place there is
// nothing left to remove.
func (t *temp) remove() {
	_ = removeAll(t.dir)
	if t.fd >= 0 {
		_ = unix.Close(t.fd)
	}
}

func (c *cache) lockTemps(ctx context.Context) (func(), error) {
	return c.flock(ctx, filepath.Join(c.dir, "locks", "sweep"))
}

// sweep removes what dead processes left. The caller holds the sweep lock.
func (c *cache) sweep() error {
	names, err := readNames(c.dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, tmpPrefix) {
			continue
		}
		t := &temp{dir: filepath.Join(c.dir, name), fd: -1}
		if t.hold() == nil {
			t.remove()
		} else if t.fd >= 0 {
			_ = unix.Close(t.fd)
		}
	}
	return nil
}

// removeAll removes a tree of ours without following symlinks, through folders
// whose mode forbids it too.
func removeAll(path string) error {
	if err := os.RemoveAll(path); err == nil {
		return nil
	}
	_ = filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(p, 0o700)
		}
		return nil
	})
	return os.RemoveAll(path)
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	sort.Strings(names)
	return names, err
}

// existing opens a cache folder for reading only: a folder that is missing has
// nothing in it, and none is made.
func existing(dir string) (*cache, bool, error) {
	c := &cache{opts: Options{CacheDir: dir}.withDefaults(), shared: os.Geteuid() == 0}
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return c, false, nil
	}
	if err != nil {
		return nil, false, cacheFault(err, dir)
	}
	c.dir = real
	if err := checkPrivate(real); err != nil {
		return nil, false, err
	}
	if fi, err := os.Stat(filepath.Join(real, "locks")); err != nil || !fi.IsDir() {
		return c, false, nil // nothing was ever packed here
	}
	return c, true, nil
}

// Rootfs gives the path of a packed root file system, empty for digest "host".
func Rootfs(cacheDir, digest string) (string, error) {
	if digest == KindHost {
		return "", nil
	}
	if _, err := entryName(digest); err != nil {
		return "", err
	}
	c, ok, err := existing(cacheDir)
	if err != nil {
		return "", err
	}
	if ok {
		if e, ok := c.lookup(digest); ok {
			return e.Rootfs, nil
		}
	}
	return "", errNotPacked(digest, cacheDir)
}

func errNotPacked(digest, cacheDir string) error {
	return fault.New(fault.NoInput, "image_missing", "image %s is not in the cache %s", digest, quote(cacheDir)).
		WithHint("run bottle-pack on this plan again")
}

// List gives the complete entries, sorted by digest.
func List(cacheDir string) ([]Entry, error) {
	c, ok, err := existing(cacheDir)
	if err != nil || !ok {
		return nil, err
	}
	names, err := readNames(c.dir)
	if err != nil {
		return nil, cacheFault(err, c.dir)
	}
	var all []Entry
	for _, name := range names {
		h, ok := strings.CutPrefix(name, "sha256-")
		if !ok {
			continue
		}
		if e, ok := c.lookup("sha256:" + h); ok {
			all = append(all, e)
		}
	}
	return all, nil
}

// Stale names the folders that dead processes left in the cache, for a garbage
// collector to show. Sweep removes them.
func Stale(cacheDir string) ([]string, error) {
	c, ok, err := existing(cacheDir)
	if err != nil || !ok {
		return nil, err
	}
	unlock, err := c.lockTemps(context.Background())
	if err != nil {
		return nil, cacheFault(err, c.dir)
	}
	defer unlock()
	names, err := readNames(c.dir)
	if err != nil {
		return nil, cacheFault(err, c.dir)
	}
	var stale []string
	for _, name := range names {
		t := &temp{dir: filepath.Join(c.dir, name), fd: -1}
		if strings.HasPrefix(name, tmpPrefix) && t.hold() == nil {
			stale = append(stale, t.dir)
		}
		if t.fd >= 0 {
			_ = unix.Close(t.fd)
		}
	}
	return stale, nil
}

// Sweep removes what dead processes left in the cache.
func Sweep(cacheDir string) error {
	c, ok, err := existing(cacheDir)
	if err != nil || !ok {
		return err
	}
	unlock, err := c.lockTemps(context.Background())
	if err != nil {
		return cacheFault(err, c.dir)
	}
	defer unlock()
	return c.sweep()
}

// Remove takes an entry, and what was made of it, out of the cache. The
// caller knows that no bottle uses it. An entry that is not there is success.
func Remove(ctx context.Context, cacheDir, digest string) error {
	name, err := entryName(digest)
	if err != nil {
		return err
	}
	c, ok, err := existing(cacheDir)
	if err != nil || !ok {
		return err
	}
	unlock, err := c.lock(ctx, digest)
	if err != nil {
		return cacheFault(err, c.dir)
	}
	defer unlock()
	err = os.Remove(c.archivePath(name))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err := errors.Join(err, c.removeDerived(name), c.discard(filepath.Join(c.dir, name))); err != nil {
		return fault.New(fault.IO, "image_io", "cache entry %s: %w", digest, err)
	}
	return nil
}

func (c *cache) archivePath(name string) string {
	return filepath.Join(c.dir, "archives", name+".tar")
}
