package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/bottle-tools/bottle/lib/fault"
)

// packReference pulls an image. A digest that is in the cache needs no network;
// a tag is asked for every time, since it may have moved.
//
// Credentials are those of docker login (~/.docker/config.json and the helpers
// it names), for the image's own registry.
func (c *cache) packReference(ctx context.Context, src string) (packed, error) {
	ref, err := parseReference(src)
	if err != nil {
		return packed{}, err
	}
	s := source{name: src, path: "reference " + ref.Name()}
	if _, pinned := ref.(name.Digest); pinned {
		s.stamp = stamp{print: ref.Name()}
		if r, ok := c.indexed(s); ok {
			return r, nil
		}
	}
	img, err := c.pull(ctx, ref)
	if err != nil {
		return packed{}, registryFault(ctx, err, src)
	}
	r, err := c.packImage(ctx, img, src)
	if err != nil {
		return packed{}, registryFault(ctx, err, src)
	}
	c.remember(s, r)
	return r, nil
}

func parseReference(src string) (name.Reference, error) {
	ref, err := name.ParseReference(src, name.WeakValidation)
	if err != nil {
		return nil, fault.New(fault.Data, "image_reference", "image %s: %w", quote(src), err).
			WithHint("give host, or a path that starts with ./ or /, or a reference like registry.example/name@sha256:…")
	}
	return ref, nil
}

// open loads an image from its registry.
func (c *cache) open(ctx context.Context, src string) (*image, error) {
	ref, err := parseReference(src)
	if err != nil {
		return nil, err
	}
	img, err := c.pull(ctx, ref)
	if err != nil {
		return nil, registryFault(ctx, err, src)
	}
	return img, nil
}

// pull fetches manifest and config; layers are fetched as they are unpacked.
func (c *cache) pull(ctx context.Context, ref name.Reference) (*image, error) {
	rt := remote.DefaultTransport.(*http.Transport).Clone()
	rt.ResponseHeaderTimeout = time.Minute
	puller, err := remote.NewPuller(remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithTransport(rt), remote.WithUserAgent("bottle-pack"))
	if err != nil {
		return nil, err
	}
	for range maxNesting {
		d, err := puller.Get(ctx, ref)
		if err != nil {
			return nil, err
		}
		if !d.MediaType.IsIndex() {
			return c.pulled(ctx, d, puller, ref)
		}
		idx, err := v1.ParseIndexManifest(bytes.NewReader(d.Manifest))
		if err != nil {
			return nil, errCorrupt("index: %w", err)
		}
		chosen, err := c.pick(idx)
		if err != nil {
			return nil, err
		}
		ref = ref.Context().Digest(chosen.Digest.String())
	}
	return nil, errCorrupt("more than %d indexes lead to the image", maxNesting)
}

func (c *cache) pulled(ctx context.Context, d *remote.Descriptor, puller *remote.Puller, ref name.Reference) (*image, error) {
	if !d.MediaType.IsImage() {
		return nil, fault.New(fault.Data, "image_unknown", "%s is not an image but %s", quote(ref.Name()), quote(string(d.MediaType))).
			WithHint("name an image")
	}
	m, err := v1.ParseManifest(bytes.NewReader(d.Manifest))
	if err != nil {
		return nil, errCorrupt("manifest: %w", err)
	}
	// A foreign layer would make this machine fetch whatever address the image
	// names.
	for _, l := range m.Layers {
		if len(l.URLs) > 0 || !l.MediaType.IsDistributable() {
			return nil, fault.New(fault.Data, "image_unsafe", "layer %s is to be fetched from another place than the registry", l.Digest).
				WithHint("use an image that is whole in its registry")
		}
	}
	if m.Config.Size > maxJSON {
		return nil, errTooBig("the image's config has %s", mib(m.Config.Size))
	}
	img, err := d.Image()
	if err != nil {
		return nil, err
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return nil, err
	}
	if got := digestOf(config); got != m.Config.Digest.String() {
		return nil, errCorrupt("the image's config has the digest %s", got)
	}
	return c.newImage(KindReference, config, len(m.Layers), func(i int) (io.ReadCloser, error) {
		l, err := puller.Layer(ctx, ref.Context().Digest(m.Layers[i].Digest.String()))
		if err != nil {
			return nil, err
		}
		return l.Uncompressed()
	})
}

// registryFault sorts what a registry, or the way to it, answered.
func registryFault(ctx context.Context, err error, src string) error {
	var f *fault.Error
	var te *transport.Error
	switch {
	case errors.As(err, &f), ctx.Err() != nil:
		return err
	case errors.As(err, &te):
		switch te.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden:
			return fault.New(fault.NoPerm, "image_denied", "image %s: %w", quote(src), err).
				WithHint("docker login to the registry, or check the name")
		case http.StatusNotFound:
			return fault.New(fault.NoInput, "image_missing", "image %s: %w", quote(src), err).
				WithHint("check the name; a path starts with ./ or /")
		}
	}
	if !isNetwork(err) {
		return err
	}
	return fault.New(fault.Unavailable, "image_unavailable", "image %s: %w", quote(src), err).
		WithHint("is the registry reachable from here? an image pinned by digest needs it only once")
}
