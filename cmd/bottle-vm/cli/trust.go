package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/trust"
)

func (v *vm) trustCommand() *tool.Command {
	var file string
	fs := v.p.Flags("bottle-vm trust")
	fs.StringVar(&file, "m", "bottle.json", "the manifest, a `FILE`")
	return &tool.Command{
		Name:       "trust",
		ShortUsage: "bottle-vm trust [-m FILE]",
		ShortHelp:  "allow a manifest to run commands, send keys, and use paths outside of its folder",
		LongHelp: `
Prints what is granted. It holds for exactly these bytes of the manifest, in
this folder.`,
		FlagSet: fs,
		Exec: func(_ context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			return v.trust(file)
		},
	}
}

// reader reads the files that a manifest names.
func (v *vm) reader(base string) func(string) ([]byte, error) {
	return func(p string) ([]byte, error) {
		path, err := v.place(base).Path(p)
		if err != nil {
			return nil, err
		}
		raw, err := trust.ReadFile(path, manifest.MaxFile)
		if err != nil {
			return nil, manifest.ReadFailed(p, errors.Is(err, fs.ErrNotExist), err)
		}
		return raw, nil
	}
}

func (v *vm) trust(file string) error {
	path, err := filepath.Abs(file)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return fault.New(fault.NoInput, "no_manifest", "manifest: %w", err).WithHint("give it with -m")
	}
	base := filepath.Dir(path)
	raw, err := trust.ReadFile(path, manifest.MaxBytes)
	if err != nil {
		return fault.New(fault.NoInput, "no_manifest", "manifest: %w", err)
	}
	m, err := manifest.Load(raw, filepath.Base(path), v.reader(base))
	if err != nil {
		return err
	}
	var bottles []*plan.Bottle
	for _, agent := range m.Agents() {
		b, err := m.Plan(agent)
		if err != nil {
			return err
		}
		bottles = append(bottles, b)
	}
	root, err := v.root()
	if err != nil {
		return err
	}
	lines, err := trust.Add(root, v.place(base), bottles...)
	if err != nil {
		return err
	}
	if len(lines) == 0 {
		fmt.Fprintf(v.p.Stderr, "bottle-vm: %s needs no trust: it stays in its folder, runs nothing and sends no key of yours away\n", file)
	}
	for _, l := range lines {
		fmt.Fprintln(v.p.Stdout, l)
	}
	return nil
}
