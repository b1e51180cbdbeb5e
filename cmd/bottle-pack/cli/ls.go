package cli

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/bottle-tools/bottle/lib/image"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
)

// row is one line of ls.
type row struct {
	Digest     string `json:"digest"`
	Kind       string `json:"kind"`
	Source     string `json:"source"`
	SizeBytes  int64  `json:"size_bytes"`
	Entries    int64  `json:"entries"`
	Skipped    int64  `json:"skipped"`
	CreatedAt  string `json:"created_at"`
	LastUsedAt string `json:"last_used_at"`
	Rootfs     string `json:"rootfs"`
	// Derived are the files that were made of it, a .smolmachine for one.
	Derived []string `json:"derived,omitempty"`
}

func lsCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-pack ls")
	out := p.OutputFlags(fs)
	c := &command{p: p}
	c.cacheFlag(fs)
	return &tool.Command{
		Name:       "ls",
		ShortUsage: "bottle-pack ls [--cache FOLDER] [-o FILE] [--pretty]",
		ShortHelp:  "list the root file systems in the cache, one JSON object a line",
		LongHelp: `
digest, kind, source (as the manifest that first packed it named it),
size_bytes and entries of what it unpacked to, skipped (devices, fifos and
sockets that were left out), created_at, last_used_at, rootfs (the folder),
derived (.smolmachine files made of it).
An empty cache is an empty list.`,
		FlagSet: fs,
		Exec: func(_ context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			return c.ls(out)
		},
	}
}

func (c *command) ls(out *tool.Output) error {
	dir, err := c.cacheDir()
	if err != nil {
		return err
	}
	entries, err := image.List(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		derived, err := image.Derived(dir, e.Digest)
		if err != nil {
			return err
		}
		line, err := plan.Encode(row{
			Digest: e.Digest, Kind: e.Kind, Source: e.Source, SizeBytes: e.SizeBytes, Entries: e.Entries, Skipped: e.Skipped,
			CreatedAt: e.CreatedAt.Format(time.RFC3339), LastUsedAt: e.LastUsedAt.Format(time.RFC3339), Rootfs: e.Rootfs,
			Derived: slices.Sorted(maps.Values(derived)),
		})
		if err != nil {
			return err
		}
		if err := out.WriteLine(line); err != nil {
			return err
		}
	}
	return out.Close()
}
