package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

const (
	maxJSON    = 8 << 20 // of a manifest, an index or a config
	maxLayers  = 1000
	maxOuter   = 100_000 // members of an archive that holds an image
	maxNesting = 4       // indexes within indexes
)

// source is an image on disk.
type source struct {
	name  string // as the plan has it
	path  string // absolute, no symlinks
	kind  string // KindRootfs, KindOCI, or empty for an archive
	stamp stamp  // empty where looking costs no more than the index
}

// image is a set of layers under the digest of its config.
type image struct {
	kind   string
	digest string // of config
	config []byte
	layers []layer // oldest first
	close  func()
}

type layer struct {
	diffID string                        // sha256:<hex> of the uncompressed archive
	open   func() (io.ReadCloser, error) // uncompressed
}

func openSource(src plan.Image, base string, o Options) (source, error) {
	p, err := resolve(src.Source, base, o.Home)
	if err != nil {
		return source{}, err
	}
	fi, err := os.Stat(p)
	if err != nil {
		return source{}, pathFault(err, src.Source)
	}
	s := source{name: src.Source, path: p}
	switch {
	case fi.Mode().IsRegular():
		s.stamp = stampFile(fi)
	case !fi.IsDir():
		return source{}, fault.New(fault.Data, "image_unknown", "image %s is neither a file nor a folder", quote(src.Source)).
			WithHint("give a rootfs folder, a docker-archive or an OCI layout")
	default:
		s.kind = KindRootfs
		if fi, err := os.Lstat(filepath.Join(p, "oci-layout")); err == nil && fi.Mode().IsRegular() {
			s.kind = KindOCI
		}
	}
	return s, nil
}

// load opens an image, and checks its config. The layers are checked when they
// are read.
func (c *cache) load(ctx context.Context, s source) (*image, error) {
	if s.kind == KindOCI {
		root, err := os.OpenRoot(s.path)
		if err != nil {
			return nil, pathFault(err, s.name)
		}
		return c.loadFrom(folderStore{root}, s.name)
	}
	f, err := os.OpenFile(s.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, pathFault(err, s.name)
	}
	st, err := c.openArchive(ctx, f, s.name)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return c.loadFrom(st, s.name)
}

func (c *cache) loadFrom(st store, name string) (*image, error) {
	img, err := c.parse(st, name)
	if err != nil {
		st.close()
		return nil, err
	}
	img.close = st.close
	return img, nil
}

func (c *cache) parse(st store, name string) (*image, error) {
	switch {
	case has(st, "manifest.json"):
		return c.dockerImage(st)
	case has(st, "index.json"):
		return c.ociImage(st)
	}
	e := fault.New(fault.Data, "image_unknown", "image %s holds neither a manifest.json (docker-archive) nor an index.json (OCI layout)", quote(name))
	if has(st, "etc") || has(st, "bin") || has(st, "usr") {
		return nil, e.WithHint("it looks like the output of docker export: use docker save, or unpack it into a folder and give that")
	}
	return nil, e.WithHint("make one with: docker save -o image.tar NAME")
}

// store is where the parts of an image are.
type store interface {
	open(name string) (blob, error) // fs.ErrNotExist if it has no such file
	close()
}

type blob struct {
	io.ReadCloser
	size int64
}

func has(st store, name string) bool {
	b, err := st.open(name)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	_ = b.Close()
	return true
}

type folderStore struct{ root *os.Root }

func (s folderStore) close() { _ = s.root.Close() }

func (s folderStore) open(name string) (blob, error) {
	f, err := s.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return blob{}, err
	}
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return blob{}, errors.Join(err, f.Close(), fmt.Errorf("%s is not a file", quote(name)))
	}
	return blob{f, fi.Size()}, nil
}

// archiveStore is a tar archive whose members are read in place.
type archiveStore struct {
	file    *os.File
	members map[string]member
	remove  func() // of a temporary copy; may be nil
}

type member struct {
	offset, size int64
	link         string // clean name of another member
	other        bool   // a folder or the like
}

func (s *archiveStore) close() {
	_ = s.file.Close()
	if s.remove != nil {
		s.remove()
	}
}

func (s *archiveStore) open(name string) (blob, error) {
	at := name
	for range 8 {
		m, ok := s.members[at]
		switch {
		case !ok:
			return blob{}, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		case m.link != "":
			at = m.link
		case m.other:
			return blob{}, fmt.Errorf("%s is not a file", quote(name))
		default:
			return blob{io.NopCloser(io.NewSectionReader(s.file, m.offset, m.size)), m.size}, nil
		}
	}
	return blob{}, fmt.Errorf("%s: too many links", quote(name))
}

// openArchive indexes an archive, unpacking a gzipped one into the cache first:
// its parts are needed in another order than they come in. f is the store's to
// close, once this succeeds.
func (c *cache) openArchive(ctx context.Context, f *os.File, name string) (store, error) {
	st := &archiveStore{file: f}
	var magic [6]byte
	n, err := io.ReadFull(f, magic[:])
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, err
	}
	switch head := magic[:n]; {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		if err := c.gunzip(ctx, st, f, name); err != nil {
			return nil, err
		}
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}), bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")), bytes.HasPrefix(head, []byte("BZh")):
		return nil, fault.New(fault.Data, "image_unknown", "image %s is compressed with something other than gzip", quote(name)).
			WithHint("decompress it first")
	}
	if err := st.index(ctx); err != nil {
		if st.remove != nil {
			st.close()
		}
		return nil, archiveFault(err, name)
	}
	return st, nil
}

func archiveFault(err error, name string) error {
	if keepError(err) {
		return err
	}
	return fault.New(fault.Data, "image_corrupt", "image %s: %w", quote(name), err).
		WithHint("it is not a whole tar archive; save or fetch the image again")
}

// gunzip replaces st.file by a decompressed copy that goes away with st.
func (c *cache) gunzip(ctx context.Context, st *archiveStore, f *os.File, name string) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	zr, err := gzip.NewReader(f)
	if err != nil {
		return archiveFault(err, name)
	}
	t, err := c.newTemp(ctx)
	if err != nil {
		return err
	}
	out, err := os.OpenFile(filepath.Join(t.dir, "archive.tar"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		err = c.decompress(ctx, out, zr, name)
	}
	if err != nil {
		if out != nil {
			_ = out.Close()
		}
		t.remove()
		return archiveFault(err, name)
	}
	_ = f.Close()
	st.file, st.remove = out, t.remove
	return nil
}

func (c *cache) decompress(ctx context.Context, out io.Writer, in io.Reader, name string) error {
	p := newProgress(c.opts, "decompressing "+name)
	defer p.done()
	buf := make([]byte, 256<<10)
	limit := c.opts.Limits.Bytes + 2048*c.opts.Limits.Entries
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := in.Read(buf)
		if limit -= int64(n); limit < 0 {
			return errTooBig("image %s decompresses to more than it may", quote(name))
		}
		if _, werr := out.Write(buf[:n]); werr != nil {
			return werr
		}
		p.step(0, int64(n))
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *archiveStore) index(ctx context.Context) error {
	fi, err := s.file.Stat()
	if err != nil {
		return err
	}
	if _, err := s.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	s.members = map[string]member{}
	tr := tar.NewReader(s.file)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return err
		}
		if len(s.members) >= maxOuter {
			return errors.New("too many members for an image archive")
		}
		// archive/tar reads no further than the header: what follows is content.
		at, err := s.file.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg, 0:
			if h.Size > fi.Size()-at {
				return io.ErrUnexpectedEOF
			}
			s.members[name] = member{offset: at, size: h.Size}
		case tar.TypeSymlink:
			s.members[name] = member{link: path.Join(path.Dir(name), h.Linkname)}
		case tar.TypeLink:
			s.members[name] = member{link: path.Clean(h.Linkname)}
		default:
			s.members[name] = member{other: true}
		}
	}
	if len(s.members) == 0 {
		return errors.New("the archive is empty")
	}
	return nil
}

// readJSON reads a small file of the image; with a digest, it must match.
func readJSON(st store, name, digest string) ([]byte, error) {
	b, err := st.open(name)
	if err != nil {
		if keepError(err) {
			return nil, err
		}
		return nil, errCorrupt("%w", err)
	}
	defer b.Close()
	if b.size > maxJSON {
		return nil, errTooBig("%s has %s", quote(name), mib(b.size))
	}
	data, err := io.ReadAll(io.LimitReader(b, maxJSON))
	if err != nil {
		return nil, corrupt(err, "%s", quote(name))
	}
	if got := digestOf(data); digest != "" && got != digest {
		return nil, errCorrupt("%s has the digest %s", quote(name), got)
	}
	return data, nil
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// dockerImage reads a docker-archive: manifest.json names the config and the
// layers, which are files of the archive.
func (c *cache) dockerImage(st store) (*image, error) {
	data, err := readJSON(st, "manifest.json", "")
	if err != nil {
		return nil, err
	}
	var manifests []struct {
		Config string
		Layers []string
	}
	if err := json.Unmarshal(data, &manifests); err != nil {
		return nil, errCorrupt("manifest.json: %w", err)
	}
	if len(manifests) != 1 {
		return nil, fault.New(fault.Data, "image_ambiguous", "the archive holds %d images", len(manifests)).
			WithHint("save one image to the archive")
	}
	config, err := readJSON(st, path.Clean(manifests[0].Config), "")
	if err != nil {
		return nil, err
	}
	return c.newImage(KindDocker, config, len(manifests[0].Layers), func(i int) (io.ReadCloser, error) {
		return uncompressed(st, path.Clean(manifests[0].Layers[i]))
	})
}

// newImage checks a config and joins it with its layers.
func (c *cache) newImage(kind string, config []byte, layers int, open func(i int) (io.ReadCloser, error)) (*image, error) {
	cf, err := v1.ParseConfigFile(bytes.NewReader(config))
	if err != nil {
		return nil, errCorrupt("image config: %w", err)
	}
	if layers != len(cf.RootFS.DiffIDs) || layers > maxLayers {
		return nil, errCorrupt("the image has %d layers and its config %d", layers, len(cf.RootFS.DiffIDs))
	}
	if err := c.checkPlatform(cf); err != nil {
		return nil, err
	}
	img := &image{kind: kind, digest: digestOf(config), config: config, close: func() {}}
	for i, id := range cf.RootFS.DiffIDs {
		if id.Algorithm != "sha256" {
			return nil, errCorrupt("layer %s is not known by a sha256 digest", quote(id.String()))
		}
		img.layers = append(img.layers, layer{diffID: id.String(), open: func() (io.ReadCloser, error) { return open(i) }})
	}
	return img, nil
}

func (c *cache) checkPlatform(cf *v1.ConfigFile) error {
	want, err := c.platform()
	if err != nil {
		return err
	}
	has := v1.Platform{OS: cf.OS, Architecture: cf.Architecture}
	if (has.OS != "" && has.OS != want.OS) || (has.Architecture != "" && has.Architecture != want.Architecture) {
		return platformFault(want, []string{has.String()})
	}
	return nil
}

func (c *cache) platform() (*v1.Platform, error) {
	p, err := v1.ParsePlatform(c.opts.Platform)
	if err != nil || p.OS == "" || p.Architecture == "" {
		return nil, fault.New(fault.Usage, "usage", "platform %s is not os/arch", quote(c.opts.Platform)).WithHint("give one like linux/amd64")
	}
	return p, nil
}

func platformFault(want *v1.Platform, has []string) error {
	for i := range has {
		has[i] = strings.Trim(quote(has[i]), `"`)
	}
	return fault.New(fault.Host, "image_platform", "the image is not for %s; it is for %s", want, strings.Join(has, ", ")).
		WithHint("fetch the image for %s", want)
}

// uncompressed opens a layer; gzip and zstd are found by their first bytes,
// whatever the media type says.
func uncompressed(st store, name string) (io.ReadCloser, error) {
	l, err := partial.CompressedToLayer(storedLayer{st, name})
	if err != nil {
		return nil, err
	}
	return l.Uncompressed()
}

// storedLayer implements partial.CompressedLayer; only Compressed is ever
// called on the way to Uncompressed.
type storedLayer struct {
	st   store
	name string
}

func (l storedLayer) Compressed() (io.ReadCloser, error) {
	b, err := l.st.open(l.name)
	return b.ReadCloser, err
}

func (l storedLayer) Size() (int64, error) {
	b, err := l.st.open(l.name)
	if err != nil {
		return 0, err
	}
	return b.size, b.Close()
}

func (l storedLayer) Digest() (v1.Hash, error) {
	b, err := l.st.open(l.name)
	if err != nil {
		return v1.Hash{}, err
	}
	defer b.Close()
	h, _, err := v1.SHA256(b)
	return h, err
}

func (l storedLayer) MediaType() (types.MediaType, error) { return types.OCIUncompressedLayer, nil }

// ociImage reads an OCI layout: index.json leads to a manifest for the wanted
// platform, all by digest.
func (c *cache) ociImage(st store) (*image, error) {
	data, err := readJSON(st, "index.json", "")
	if err != nil {
		return nil, err
	}
	for range maxNesting {
		idx, err := v1.ParseIndexManifest(bytes.NewReader(data))
		if err != nil {
			return nil, errCorrupt("index: %w", err)
		}
		d, err := c.pick(idx)
		if err != nil {
			return nil, err
		}
		if data, err = readJSON(st, blobPath(d.Digest), d.Digest.String()); err != nil {
			return nil, err
		}
		if !d.MediaType.IsIndex() {
			return c.ociManifest(st, data)
		}
	}
	return nil, errCorrupt("more than %d indexes lead to the image", maxNesting)
}

func (c *cache) ociManifest(st store, data []byte) (*image, error) {
	m, err := v1.ParseManifest(bytes.NewReader(data))
	if err != nil {
		return nil, errCorrupt("manifest: %w", err)
	}
	config, err := readJSON(st, blobPath(m.Config.Digest), m.Config.Digest.String())
	if err != nil {
		return nil, err
	}
	return c.newImage(KindOCI, config, len(m.Layers), func(i int) (io.ReadCloser, error) {
		return uncompressed(st, blobPath(m.Layers[i].Digest))
	})
}

func blobPath(h v1.Hash) string { return path.Join("blobs", path.Base(h.Algorithm), path.Base(h.Hex)) }

// pick chooses the one image for the wanted platform. Attestations and other
// things that are not images are passed over.
func (c *cache) pick(idx *v1.IndexManifest) (v1.Descriptor, error) {
	want, err := c.platform()
	if err != nil {
		return v1.Descriptor{}, err
	}
	var fit []v1.Descriptor
	var others []string
	for _, d := range idx.Manifests {
		if !d.MediaType.IsImage() && !d.MediaType.IsIndex() || d.Annotations["vnd.docker.reference.type"] != "" {
			continue
		}
		switch {
		case d.Platform != nil && d.Platform.OS != "" && !d.Platform.Satisfies(*want):
			others = append(others, d.Platform.String())
		case len(fit) == 0 || fit[0].Digest != d.Digest:
			fit = append(fit, d)
		}
	}
	switch {
	case len(fit) == 1:
		return fit[0], nil
	case len(fit) > 1:
		return v1.Descriptor{}, fault.New(fault.Data, "image_ambiguous", "the index holds %d images for %s", len(fit), want).
			WithHint("keep one image in the layout, or name one by its digest")
	case len(others) > 0:
		return v1.Descriptor{}, platformFault(want, others)
	}
	return v1.Descriptor{}, errCorrupt("the index holds no image")
}

// keepError tells whether err is about the machine, a registry or the caller,
// and not about what is in an archive.
func keepError(err error) bool {
	var f *fault.Error
	var pe *fs.PathError
	return errors.As(err, &f) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) ||
		errors.As(err, &pe) && !errors.Is(err, fs.ErrNotExist) || isNetwork(err)
}

// isNetwork tells whether a registry or the way to it failed.
func isNetwork(err error) bool {
	var te *transport.Error
	var oe *net.OpError
	var de *net.DNSError
	var ue *url.Error
	return errors.As(err, &te) || errors.As(err, &oe) || errors.As(err, &de) || errors.As(err, &ue)
}
