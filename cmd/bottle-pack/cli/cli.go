// Package cli is the body of bottle-pack. The filter is in this file, the verb
// ls in one of its own.
package cli

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"slices"

	"github.com/bottle-tools/bottle/lib/engine/smolvm"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/image"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/smolfile"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/trust"
)

// stage is the name under which failures and diagnostics are recorded.
const stage = "pack"

// Run is bottle-pack as a value; it returns the exit status.
func Run(ctx context.Context, p *tool.Proc) int {
	fs := p.Flags("bottle-pack")
	out := p.OutputFlags(fs)
	c := &command{p: p}
	fs.StringVar(&c.dir, "dir", "", "the manifest's `FOLDER`, where relative images start; the working folder if not given")
	c.cacheFlag(fs)
	fs.BoolVar(&c.smolmachine, "smolmachine", false, "also have smolvm make a .smolmachine of the image, for plans that it may run")
	return p.Run(ctx, &tool.Command{
		Name:       "bottle-pack",
		ShortUsage: "bottle-plan … | bottle-pack [--smolmachine] [--dir FOLDER] [--cache FOLDER] [-o FILE] [--pretty]",
		ShortHelp:  "turn the image of a plan into a root file system in the cache",
		LongHelp: `
Reads documents that have a bottle section and adds pack: the image's digest,
its kind (host, rootfs, docker-archive, oci-layout, reference), the size of what
it unpacks to, whether it was in the cache, and for smolvm the Smolfile. A plan
that only smolvm can serve also gets the archive that smolvm takes. Nothing but
the cache is written. It is $XDG_CACHE_HOME/bottle/images, or ~/.cache/…, and
/var/cache/bottle/images for root.

With --smolmachine the installed smolvm makes a .smolmachine of the image, where
it can (1.32.2 can, 1.9.1 cannot: 78). It boots a guest for that. The file is kept
in the cache by the image's digest and smolvm's version, is made once, and from
then on bottle-vm up starts machines from it.

  bottle-plan claude | bottle-pack --pretty
  bottle-pack ls`,
		FlagSet:     fs,
		Subcommands: []*tool.Command{lsCommand(p)},
		Exec: func(ctx context.Context, args []string) error {
			if err := noVerb(args); err != nil {
				return err
			}
			return p.Filter(ctx, stage, out, c.pack)
		},
	})
}

func noVerb(args []string) error {
	if err := tool.CheckArgs(args); err != nil || len(args) == 0 {
		return err
	}
	return fault.New(fault.Usage, "usage", "unknown verb %q", args[0]).
		WithHint("the only verb is ls; without one, documents are read from stdin")
}

type command struct {
	p           *tool.Proc
	dir         string
	cache       string
	smolmachine bool
}

func (c *command) cacheFlag(fs *flag.FlagSet) {
	fs.StringVar(&c.cache, "cache", "", "keep root file systems in the image cache `FOLDER`")
	c.p.Ambient(fs, "cache")
}

// cacheDir is the cache folder, absolute.
func (c *command) cacheDir() (string, error) {
	if c.cache == "" {
		return image.DefaultDir(c.p.Getenv, os.Geteuid(), c.p.Getenv("HOME"))
	}
	dir, err := filepath.Abs(c.cache)
	if err != nil {
		return "", fault.New(fault.NoInput, "cache_unknown", "cache folder %s: %w", c.cache, err).WithHint("give --cache a full path")
	}
	return dir, nil
}

// pack writes the pack section; one that is there is derived anew.
func (c *command) pack(ctx context.Context, d *plan.Doc) error {
	b, err := d.Bottle()
	if err != nil {
		return err
	}
	base, err := c.base(b)
	if err != nil {
		return err
	}
	opts := image.Options{Home: c.p.Getenv("HOME"), Progress: prefixed{c.p}, Now: c.p.Now}
	if b.Image.Kind != image.KindHost {
		if opts.CacheDir, err = c.cacheDir(); err != nil {
			return err
		}
	}
	section, _, err := image.Pack(ctx, b.Image, base, opts)
	if err != nil {
		return err
	}
	if section.Smolfile, err = smolfile.Section(b); err != nil {
		return err
	}
	if onlySmolvm(b) {
		if _, err := image.Archive(ctx, b.Image, base, opts); err != nil {
			return err
		}
	}
	switch {
	case !c.smolmachine:
	case !forSmolvm(b):
		c.p.Warn("%s: no .smolmachine is made: the plan is not for smolvm", b.ID)
	case b.Image.Kind == image.KindHost:
		c.p.Warn("%s: no .smolmachine is made: the image is the host, which smolvm cannot take", b.ID)
	default:
		if err := c.makeSmolmachine(ctx, opts, section.Digest); err != nil {
			return err
		}
	}
	return d.Set("pack", section)
}

// makeSmolmachine makes sure that the cache has a .smolmachine of the image. The
// document does not name it: which there is depends on this host's smolvm.
func (c *command) makeSmolmachine(ctx context.Context, opts image.Options, digest string) error {
	e := smolvm.NewFrom(c.p.Getenv)
	name, err := e.PackName(ctx)
	if err != nil {
		return err
	}
	_, _, err = image.Derive(ctx, opts, digest, name, func(rootfs, dir string) (string, error) {
		return e.Pack(ctx, rootfs, dir)
	})
	return err
}

func forSmolvm(b *plan.Bottle) bool {
	return slices.ContainsFunc(b.Runtime.Candidates, func(c plan.Candidate) bool { return c.Engine == "smolvm" })
}

// onlySmolvm tells whether no other engine may run the plan. Where one may, the
// archive is made when smolvm has been chosen.
func onlySmolvm(b *plan.Bottle) bool {
	for _, c := range b.Runtime.Candidates {
		if c.Engine != "smolvm" {
			return false
		}
	}
	return len(b.Runtime.Candidates) > 0
}

// base is the manifest's folder, for images that are paths.
func (c *command) base(b *plan.Bottle) (string, error) {
	if b.Image.Kind != "path" {
		return "", nil
	}
	return trust.Base(c.dir, b.Manifest)
}

// prefixed writes lines of progress the way warnings and errors are written.
type prefixed struct{ p *tool.Proc }

func (w prefixed) Write(line []byte) (int, error) {
	if _, err := w.p.Stderr.Write(append([]byte(w.p.Name+": "), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}
