// Package image turns the image of a plan into a root file system: a folder in
// a content-addressed cache that all bottles of one user share and none may
// change.
//
// # Sources
//
// A plan sorts images only by form (host, path, reference); what a path holds
// is found here:
//
//   - host: nothing to do. The digest is the word "host".
//   - rootfs: a folder that holds a root file system.
//   - docker-archive: what "docker save" writes, plain or gzipped.
//   - oci-layout: a folder or a tar archive after the OCI image layout.
//   - reference: pulled from a registry (OCI distribution). A reference with a
//     digest is held to it; one with a tag is asked for every time.
//
// # Digests
//
// Images are known by the digest of their config file (docker's "image ID"):
// the same image has one digest through every channel. The config names the
// digest of each uncompressed layer, and each layer is hashed while it is
// unpacked, so the digest covers every byte. A rootfs folder is known by a hash
// over the path, type, mode, content and link target of everything in it.
//
// # Cache folder
//
// It belongs to the calling user; one that others own or may write is refused.
// For a plain user it is private (0700). Root's bottles run under the host uid
// of the workspace's owner, so for root it can be passed through but not listed
// (0711), and everything in a root file system is readable, and writable by
// root alone. Below it:
//
//	sha256-<hex>/rootfs      the root file system
//	sha256-<hex>/entry.json  written last; without it the entry does not count
//	archives/                docker-archives made for engine smolvm
//	derived/                 what programs made of an entry: .smolmachine files
//	index/                   what a source file held when it had this inode, size and times
//	locks/                   flock files, one of 256 for each entry
//	tmp-<random>/            work in progress, flocked; swept when its process is gone
package image

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Kinds of images, as in plan.Pack.
const (
	KindHost      = "host"
	KindRootfs    = "rootfs"
	KindDocker    = "docker-archive"
	KindOCI       = "oci-layout"
	KindReference = "reference"
)

// Options says where the cache is and how far an image may go. Only CacheDir is
// required.
type Options struct {
	CacheDir string // absolute; see DefaultDir
	Home     string // what a leading ~ in a source stands for
	Platform string // os/arch or os/arch/variant; empty: linux and this machine's
	Limits   Limits

	// Progress gets lines of prose when packing takes longer than a second.
	Progress io.Writer
	Now      func() time.Time
}

// Limits bound what an image may unpack to; zero fields take the default.
type Limits struct {
	Bytes   int64 // content of all files, all layers together; default 64 GiB
	Entries int64 // files, folders and links, all layers together; default 5,000,000
}

const (
	defaultBytes   = 64 << 30
	defaultEntries = 5_000_000
)

func (o Options) withDefaults() Options {
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Platform == "" {
		o.Platform = "linux/" + runtime.GOARCH
	}
	if o.Limits.Bytes <= 0 {
		o.Limits.Bytes = defaultBytes
	}
	if o.Limits.Entries <= 0 {
		o.Limits.Entries = defaultEntries
	}
	return o
}

// DefaultDir gives the cache folder of the user with this uid: below
// $XDG_CACHE_HOME or ~/.cache. Root's is /var/cache/bottle/images, because the
// host user that root's bottles run under has to get there, and root's home is
// closed to it.
func DefaultDir(getenv func(string) string, uid int, home string) (string, error) {
	if dir := getenv("XDG_CACHE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "bottle", "images"), nil
	}
	if uid == 0 {
		return "/var/cache/bottle/images", nil
	}
	if !filepath.IsAbs(home) {
		return "", fault.New(fault.CantCreate, "cache_unknown", "cannot tell where the image cache goes: neither XDG_CACHE_HOME nor HOME is set").
			WithHint("set HOME, or name a folder with --cache")
	}
	return filepath.Join(home, ".cache", "bottle", "images"), nil
}

// Pack makes sure that the root file system of src is in the cache. base is the
// manifest's folder, absolute: relative sources start there. The path returned
// is empty for image host.
//
// Errors are faults: 65 image_corrupt, image_unsafe, image_too_big,
// image_unknown, image_mounted, image_ambiguous, image_reference; 66 image_missing; 69 image_unavailable;
// 73 cache_unwritable; 74 disk_full, image_io; 75 image_changed, interrupted;
// 77 image_denied, cache_unsafe; 78 image_platform.
func Pack(ctx context.Context, src plan.Image, base string, opts Options) (plan.Pack, string, error) {
	if src.Kind == KindHost {
		return plan.Pack{Digest: KindHost, Kind: KindHost}, "", nil
	}
	opts = opts.withDefaults()
	c, err := openCache(opts)
	if err != nil {
		return plan.Pack{}, "", err
	}
	r, err := c.pack(ctx, src, base)
	if err != nil {
		return plan.Pack{}, "", classify(ctx, err, src.Source)
	}
	return plan.Pack{
		Digest:    r.entry.Digest,
		Kind:      r.kind,
		SizeBytes: r.entry.SizeBytes,
		Cached:    r.cached,
	}, r.entry.Rootfs, nil
}

type packed struct {
	entry  Entry
	kind   string
	cached bool
}

func (c *cache) pack(ctx context.Context, src plan.Image, base string) (packed, error) {
	if src.Kind == KindReference {
		return c.packReference(ctx, src.Source)
	}
	s, err := openSource(src, base, c.opts)
	if err != nil {
		return packed{}, err
	}
	if s.kind == KindRootfs {
		return c.packFolder(ctx, s)
	}
	return c.packImageFile(ctx, s)
}

// packImageFile packs what openSource found to be an image: an OCI layout
// folder or an archive.
func (c *cache) packImageFile(ctx context.Context, s source) (packed, error) {
	if r, ok := c.indexed(s); ok {
		return r, nil
	}
	img, err := c.load(ctx, s)
	if err != nil {
		return packed{}, err
	}
	defer img.close()
	r, err := c.packImage(ctx, img, s.name)
	if err != nil {
		return packed{}, err
	}
	c.remember(s, r)
	return r, nil
}

func (c *cache) packImage(ctx context.Context, img *image, name string) (packed, error) {
	build := func(dir string) (Entry, error) {
		p := newProgress(c.opts, "unpacking "+name)
		defer p.done()
		x, err := newExtractor(ctx, dir, c.opts.Limits, c.shared, p)
		if err != nil {
			return Entry{}, err
		}
		defer x.close()
		for _, l := range img.layers {
			if err := x.layer(l); err != nil {
				return Entry{}, err
			}
		}
		if err := x.finish(); err != nil {
			return Entry{}, err
		}
		return Entry{Kind: img.kind, Source: name, SizeBytes: x.kept, Entries: x.entries, Skipped: x.skipped}, nil
	}
	e, cached, err := c.ensure(ctx, img.digest, build)
	return packed{entry: e, kind: img.kind, cached: cached}, err
}

// resolve gives the absolute path of an image source with every symlink
// followed. Whether a path outside of the manifest's folder is to be trusted is
// lib/trust's to say, before a bottle starts.
func resolve(source, base, home string) (string, error) {
	p := source
	switch {
	case p == "~" || strings.HasPrefix(p, "~/"):
		if !filepath.IsAbs(home) {
			return "", fault.New(fault.NoInput, "image_missing", "image %s: HOME is not set", quote(source)).
				WithHint("set HOME, or write the path in full")
		}
		p = filepath.Join(home, p[1:])
	case strings.HasPrefix(p, "~"):
		return "", fault.New(fault.Data, "image_reference", "image %s: another user's home folder cannot be named", quote(source)).
			WithHint("write the path in full, or ./%s if the name really starts with ~", source)
	case !filepath.IsAbs(p):
		p = filepath.Join(base, p)
	}
	if _, err := os.Stat(p); err != nil { // whose errors say more than EvalSymlinks'
		return "", pathFault(err, source)
	}
	real, err := filepath.EvalSymlinks(p)
	if err != nil {
		return "", pathFault(err, source)
	}
	return real, nil
}

// pathFault sorts an error about a path that the user named.
func pathFault(err error, name string) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fault.New(fault.NoPerm, "image_denied", "image %s: %w", quote(name), err).
			WithHint("the image must be readable by the user who runs this")
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP):
		return fault.New(fault.NoInput, "image_missing", "image %s: %w", quote(name), err).
			WithHint("give the path of a rootfs folder, a docker-archive or an OCI layout, relative to the manifest's folder")
	}
	return ioFault(err, name)
}

func ioFault(err error, name string) error {
	return fault.New(fault.IO, "image_io", "image %s: %w", quote(name), err).
		WithHint("the disk or the file system reports an error; see the kernel's log")
}

// errUnsafe, errCorrupt and errTooBig are the three things that can be wrong
// with an image's content.
func errUnsafe(format string, args ...any) error {
	return fault.New(fault.Data, "image_unsafe", format, args...).
		WithHint("this archive tries to leave its folder; do not use it, and build the image with a standard tool")
}

func errCorrupt(format string, args ...any) error {
	return fault.New(fault.Data, "image_corrupt", format, args...).
		WithHint("save or fetch the image again")
}

func errTooBig(format string, args ...any) error {
	return fault.New(fault.Data, "image_too_big", format, args...).
		WithHint("use a smaller image; an archive that unpacks to this much may be a decompression bomb")
}

// classify makes a fault of what went wrong while packing.
func classify(ctx context.Context, err error, name string) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return fault.As(err)
	}
	if ctx.Err() != nil {
		return fault.New(fault.TempFail, "interrupted", "image %s: %w", quote(name), ctx.Err()).
			WithHint("nothing was left behind; run the command again")
	}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fault.New(fault.IO, "disk_full", "image %s: %w", quote(name), err).
			WithHint("free some space, or name another cache folder with --cache")
	case errors.Is(err, os.ErrPermission):
		return fault.New(fault.NoPerm, "image_denied", "image %s: %w", quote(name), err).
			WithHint("the image must be readable, and the cache writable, by the user who runs this")
	}
	return ioFault(err, name)
}
