package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Archive makes sure that src is in the cache as a docker-archive, and gives
// its path: the one form of a local image that smolvm takes offline ("machine
// create --image", smolvm 1.9.1; the first member is "manifest.json", never
// "./manifest.json"). Layers are uncompressed and checked against the config.
// For an image the bytes depend on the image alone; for a rootfs folder, also
// on the times of its files. Errors are those of Pack, and 78 for image host.
func Archive(ctx context.Context, src plan.Image, base string, opts Options) (string, error) {
	if src.Kind == KindHost {
		return "", fault.New(fault.Host, "image_host", "image host cannot be put into an archive: it is this machine's own files").
			WithHint("name an image for the smolvm runtime: a docker-archive, an OCI layout, a rootfs folder or a reference")
	}
	opts = opts.withDefaults()
	c, err := openCache(opts)
	if err != nil {
		return "", err
	}
	path, err := c.archive(ctx, src, base)
	if err != nil {
		return "", classify(ctx, err, src.Source)
	}
	return path, nil
}

func (c *cache) archive(ctx context.Context, src plan.Image, base string) (string, error) {
	r, err := c.pack(ctx, src, base)
	if err != nil {
		return "", err
	}
	name, err := entryName(r.entry.Digest)
	if err != nil {
		return "", err
	}
	final := c.archivePath(name)
	if ownedFile(final) {
		return final, nil
	}
	unlock, err := c.lock(ctx, r.entry.Digest)
	if err != nil {
		return "", err
	}
	defer unlock()
	if ownedFile(final) {
		return final, nil
	}
	t, err := c.newTemp(ctx)
	if err != nil {
		return "", err
	}
	defer t.remove()
	tmp := filepath.Join(t.dir, "archive.tar")
	if err := c.writeArchive(ctx, tmp, src, base, r); err != nil {
		return "", err
	}
	return final, os.Rename(tmp, final)
}

func ownedFile(p string) bool {
	var st unix.Stat_t
	return unix.Lstat(p, &st) == nil && uint32(st.Mode)&unix.S_IFMT == unix.S_IFREG && int(st.Uid) == os.Geteuid()
}

func (c *cache) writeArchive(ctx context.Context, path string, src plan.Image, base string, r packed) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	p := newProgress(c.opts, "writing an archive of "+src.Source)
	defer p.done()
	w := &archiveWriter{ctx: ctx, f: f, limit: c.opts.Limits.Bytes + 2048*c.opts.Limits.Entries, prog: p}
	if r.kind == KindRootfs {
		err = w.rootfs(r.entry.Rootfs, c.opts.Platform)
	} else {
		err = c.writeImage(ctx, w, src, base, r)
	}
	if err != nil {
		return err
	}
	if _, err := f.Write(make([]byte, 1024)); err != nil { // end of archive
		return err
	}
	return f.Sync()
}

func (c *cache) writeImage(ctx context.Context, w *archiveWriter, src plan.Image, base string, r packed) error {
	img, err := c.reopen(ctx, src, base)
	if err != nil {
		return err
	}
	defer img.close()
	if img.digest != r.entry.Digest {
		return errChanged(src.Source)
	}
	return w.image(img)
}

// reopen loads a source that was packed a moment ago.
func (c *cache) reopen(ctx context.Context, src plan.Image, base string) (*image, error) {
	if src.Kind == KindReference {
		return c.open(ctx, src.Source)
	}
	s, err := openSource(src, base, c.opts)
	if err != nil {
		return nil, err
	}
	return c.load(ctx, s)
}

// archiveWriter writes a docker-archive front to back: a member's size is
// filled in when its content is there.
type archiveWriter struct {
	ctx   context.Context
	f     *os.File
	limit int64
	prog  *progress
}

const tarBlock = 512

type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func layerFile(diffID string) string { return strings.TrimPrefix(diffID, "sha256:") + ".tar" }

func (w *archiveWriter) image(img *image) error {
	m := dockerManifest{Config: strings.TrimPrefix(img.digest, "sha256:") + ".json", RepoTags: []string{}, Layers: []string{}}
	for _, l := range img.layers {
		m.Layers = append(m.Layers, layerFile(l.diffID))
	}
	if err := w.head(m, img.config); err != nil {
		return err
	}
	written := map[string]bool{}
	for _, l := range img.layers {
		if written[l.diffID] {
			continue
		}
		written[l.diffID] = true
		if err := w.layer(l); err != nil {
			return err
		}
	}
	return nil
}

func (w *archiveWriter) head(m dockerManifest, config []byte) error {
	data, err := json.Marshal([]dockerManifest{m})
	if err != nil {
		return err
	}
	for _, file := range []struct {
		name string
		data []byte
	}{{"manifest.json", data}, {m.Config, config}} {
		err := w.member(file.name, func(out io.Writer) error {
			_, err := out.Write(file.data)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *archiveWriter) layer(l layer) error {
	rc, err := l.open()
	if err != nil {
		return corrupt(err, "layer %s", l.diffID)
	}
	defer rc.Close()
	sum := sha256.New()
	err = w.member(layerFile(l.diffID), func(out io.Writer) error {
		return w.copy(io.MultiWriter(sum, out), rc, l.diffID)
	})
	if err != nil {
		return err
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != l.diffID {
		return errCorrupt("layer %s has the digest %s", l.diffID, got)
	}
	return nil
}

func (w *archiveWriter) copy(out io.Writer, in io.Reader, what string) error {
	buf := make([]byte, 256<<10)
	for {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		n, err := in.Read(buf)
		if w.limit -= int64(n); w.limit < 0 {
			return errTooBig("the layers unpack to more than they may")
		}
		if _, werr := out.Write(buf[:n]); werr != nil {
			return werr
		}
		w.prog.step(0, int64(n))
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return corrupt(err, "%s", what)
		}
	}
}

// member writes one file of the archive, whose size is known afterwards.
func (w *archiveWriter) member(name string, fill func(io.Writer) error) error {
	at, err := w.reserve()
	if err != nil {
		return err
	}
	if err := fill(w.f); err != nil {
		return err
	}
	return w.finish(at, name)
}

func (w *archiveWriter) reserve() (int64, error) {
	at, err := w.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	_, err = w.f.Write(make([]byte, tarBlock))
	return at, err
}

// finish writes the header at the place reserved for it, and the padding.
func (w *archiveWriter) finish(at int64, name string) error {
	end, err := w.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	size := end - at - tarBlock
	if pad := size % tarBlock; pad != 0 {
		if _, err := w.f.Write(make([]byte, tarBlock-pad)); err != nil {
			return err
		}
	}
	var head bytes.Buffer
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatGNU}
	if err := tar.NewWriter(&head).WriteHeader(h); err != nil {
		return err
	}
	_, err = w.f.WriteAt(head.Bytes(), at) // GNU format: one block, whatever the size
	return err
}

// rootfs writes an image of one layer. The names of manifest and config have
// to be known before the layer's digest is, so the layer is written first into
// a file of its own.
func (w *archiveWriter) rootfs(dir, platform string) error {
	spool, err := os.OpenFile(w.f.Name()+".layer", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer spool.Close()
	sum, limit := sha256.New(), w.limit
	if err := w.tree(io.MultiWriter(spool, sum), dir); err != nil {
		return err
	}
	w.limit = limit // the same bytes are about to pass again
	if _, err := spool.Seek(0, io.SeekStart); err != nil {
		return err
	}
	diffID := "sha256:" + hex.EncodeToString(sum.Sum(nil))
	osName, arch, _ := strings.Cut(platform, "/")
	arch, _, _ = strings.Cut(arch, "/")
	config, err := json.Marshal(map[string]any{
		"architecture": arch, "os": osName, "config": map[string]any{},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{diffID}},
	})
	if err != nil {
		return err
	}
	return w.image(&image{
		digest: digestOf(config), config: config,
		layers: []layer{{diffID: diffID, open: func() (io.ReadCloser, error) { return io.NopCloser(spool), nil }}},
	})
}

// tree writes a root file system as a tar archive, owned by root throughout.
func (w *archiveWriter) tree(out io.Writer, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	tw := tar.NewWriter(out)
	first := map[fileID]string{}
	err = walk(w.ctx, root, func(d *os.Root, p string, fi fs.FileInfo) error {
		h := &tar.Header{Name: p, Mode: int64(fi.Mode().Perm()), ModTime: fi.ModTime().Truncate(time.Second), Format: tar.FormatPAX}
		if fi.Mode()&fs.ModeSticky != 0 {
			h.Mode |= 0o1000
		}
		switch {
		case fi.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, p+"/"
		case fi.Mode()&fs.ModeSymlink != 0:
			target, err := d.Readlink(fi.Name())
			if err != nil {
				return err
			}
			h.Typeflag, h.Linkname = tar.TypeSymlink, target
		default:
			h.Typeflag, h.Size = tar.TypeReg, fi.Size()
			if id, many := idOf(fi); many {
				if other, ok := first[id]; ok {
					h.Typeflag, h.Linkname, h.Size = tar.TypeLink, other, 0
				} else {
					first[id] = p
				}
			}
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		w.prog.step(1, 0)
		if h.Typeflag != tar.TypeReg {
			return nil
		}
		in, err := d.Open(fi.Name())
		if err != nil {
			return err
		}
		return errors.Join(w.copy(tw, in, p), in.Close())
	})
	return errors.Join(err, tw.Close())
}
