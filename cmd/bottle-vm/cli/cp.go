package cli

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/tarfs"
	"github.com/bottle-tools/bottle/lib/tool"
)

func (v *vm) cpCommand() *tool.Command {
	return &tool.Command{
		Name:       "cp",
		ShortUsage: "bottle-vm cp [ID:]SRC [ID:]DST",
		ShortHelp:  "copy a file or folder into a bottle or out of it",
		LongHelp: `
One of the two is in a bottle; a path there that is not absolute starts at
/workspace. A folder as DST takes SRC by its own name; anything else is its new
name, and folders above it that the bottle lacks are made. Links are copied as
links; one that points out of what is copied is refused. Devices, sockets and
pipes are left out.

  bottle-vm cp notes.md claude:/workspace/
  bottle-vm cp claude:/home/agent/.claude.json /tmp/`,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.CheckArgs(args); err != nil {
				return err
			}
			if len(args) != 2 {
				return fault.New(fault.Usage, "usage", "cp takes two paths, got %d", len(args)).WithHint("bottle-vm cp [ID:]SRC [ID:]DST")
			}
			return v.cp(ctx, args[0], args[1])
		},
	}
}

// place of a file: in a bottle if id is not empty.
type end struct{ id, path string }

// splitEnd takes ID:PATH apart. A path with a slash before its colon is the
// host's.
func splitEnd(s string) end {
	id, p, ok := strings.Cut(s, ":")
	if !ok || strings.Contains(id, "/") || id == "" {
		return end{path: s}
	}
	return end{id, p}
}

func (v *vm) cp(ctx context.Context, from, to string) error {
	src, dst := splitEnd(from), splitEnd(to)
	if src.path == "" || dst.path == "" {
		return nil // an empty path is nothing to copy: scripts pass variables that may be
	}
	if (src.id == "") == (dst.id == "") {
		return fault.New(fault.Usage, "usage", "exactly one of the two paths has to be in a bottle").
			WithHint("bottle-vm cp FILE ID:PATH, or bottle-vm cp ID:PATH FILE")
	}
	b, rec, p, err := v.live(ctx, src.id+dst.id)
	if err != nil {
		return err
	}
	eng, err := engines.Find(rec.Engine)
	if err != nil {
		return err
	}
	c := copier{v.p.Warn, eng, engine.Ref{ID: b.ID, Dir: b.Dir, RunDir: rec.RunDir, Bottle: p, Env: p.Environ()}}
	if src.id == "" {
		return c.in(ctx, src.path, guestPath(dst.path))
	}
	return c.out(ctx, guestPath(src.path), dst.path)
}

// guestPath is absolute; a relative one starts at the workspace. A trailing
// slash is kept: it asks for a folder.
func guestPath(p string) string {
	slash := strings.HasSuffix(p, "/")
	if !path.IsAbs(p) {
		p = path.Join(engine.GuestWorkspace, p)
	}
	if p = path.Clean(p); slash && p != "/" {
		p += "/"
	}
	return p
}

type copier struct {
	warn func(format string, args ...any)
	eng  engine.Engine
	ref  engine.Ref
}

func (c copier) in(ctx context.Context, src, dst string) error {
	abs, err := filepath.Abs(src)
	if err == nil {
		_, err = os.Lstat(abs)
	}
	if err != nil {
		return fault.New(fault.NoInput, "no_file", "cp: %w", err)
	}
	r, w := io.Pipe()
	var skipped bytes.Buffer
	go func() { w.CloseWithError(tarfs.Out(abs, w, &skipped)) }()
	defer r.Close()
	folder, err := c.isFolder(ctx, dst)
	if err != nil {
		return err
	}
	if folder {
		err = c.eng.CopyIn(ctx, c.ref, dst, r)
	} else {
		err = c.eng.CopyIn(ctx, c.ref, path.Dir(dst), renameTop(r, path.Base(dst)))
	}
	if err == nil {
		for line := range strings.Lines(skipped.String()) {
			c.warn("cp: %s", line)
		}
	}
	return copyError(err)
}

// isFolder asks the guest; a trailing slash decides without asking.
func (c copier) isFolder(ctx context.Context, p string) (bool, error) {
	if strings.HasSuffix(p, "/") {
		return true, nil
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return false, fault.New(fault.IO, "copy_failed", "cp: %w", err)
	}
	defer null.Close()
	code, err := c.eng.Exec(ctx, c.ref, engine.ExecRequest{
		Argv: []string{"sh", "-c", `test -d "$1"`, "sh", p}, Dir: "/", Stdout: null, Stderr: null,
	})
	return err == nil && code == 0, err
}

func (c copier) out(ctx context.Context, src, dst string) error {
	dir, name := dst, ""
	if fi, err := os.Lstat(dst); err != nil || !fi.IsDir() {
		if strings.HasSuffix(dst, "/") {
			return fault.New(fault.NoInput, "no_folder", "cp: %s is not a folder", dst).WithHint("make it first")
		}
		dir, name = filepath.Dir(dst), filepath.Base(dst)
		if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
			return fault.New(fault.NoInput, "no_folder", "cp: %s is not a folder", dir).WithHint("make it first")
		}
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(c.eng.CopyOut(ctx, c.ref, strings.TrimSuffix(src, "/"), w)) }()
	defer r.Close()
	in := io.Reader(r)
	if name != "" {
		in = renameTop(r, name)
	}
	return copyError(tarfs.In(dir, in))
}

func copyError(err error) error {
	var f *fault.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &f):
		return f // without the pipe that it came through
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.NoInput, "no_file", "cp: %w", err)
	}
	return fault.New(fault.IO, "copy_failed", "cp: %w", err)
}

// renameTop gives the first element of every name in a tar stream another name.
func renameTop(r io.Reader, name string) io.Reader {
	pr, pw := io.Pipe()
	go func() {
		tr, tw := tar.NewReader(r), tar.NewWriter(pw)
		for {
			h, err := tr.Next()
			if err == io.EOF {
				err = tw.Close()
				if err == nil {
					_, err = io.Copy(io.Discard, r)
				}
				pw.CloseWithError(err)
				return
			}
			if err == nil {
				_, rest, _ := strings.Cut(h.Name, "/")
				slash := strings.HasSuffix(h.Name, "/")
				h.Name = path.Join(name, rest)
				if slash {
					h.Name += "/"
				}
				err = tw.WriteHeader(h)
			}
			if err == nil {
				_, err = io.Copy(tw, tr)
			}
			if err != nil {
				pw.CloseWithError(err)
				return
			}
		}
	}()
	return pr
}
