package trust

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Base is the manifest's folder, absolute and resolved: dir, or the working
// folder where dir is empty. It has to hold the manifest that was planned, byte
// for byte, because the paths of a plan mean nothing anywhere else; a manifest
// that came from stdin ("-") cannot be looked for, and dir has to be given.
// Faults: usage (64), manifest_changed (65), no_manifest_dir and no_manifest
// (66).
func Base(dir string, planned plan.ManifestRef) (string, error) {
	if dir == "" && planned.Name == "-" {
		return "", fault.New(fault.Usage, "usage", "the manifest came from stdin, so its folder is not known").
			WithHint("give --dir")
	}
	base, err := filepath.Abs(dir)
	if err == nil {
		base, err = filepath.EvalSymlinks(base)
	}
	if err != nil {
		return "", fault.New(fault.NoInput, "no_manifest_dir", "--dir: %w", err).WithHint("give the folder that holds the manifest")
	}
	if planned.Name == "-" {
		return base, nil
	}
	raw, err := ReadFile(filepath.Join(base, planned.Name), manifest.MaxBytes)
	if err != nil {
		return "", fault.New(fault.NoInput, "no_manifest", "the manifest of this plan: %w", err).
			WithHint("run this in the manifest's folder, or give --dir")
	}
	if got := plan.SHA256(raw); got != planned.SHA256 {
		return "", fault.New(fault.Data, "manifest_changed", "%s is not the manifest that was planned (%.19s…, planned %.19s…)",
			planned.Name, got, planned.SHA256).
			WithHint("plan again, or give --dir with the folder of the manifest")
	}
	return base, nil
}

// ReadFile reads a regular file of at most max bytes. What lies in a cloned
// repository may be a FIFO, which would hold us up for ever, or have no end.
func ReadFile(path string, max int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	switch fi, err := f.Stat(); {
	case err != nil:
		return nil, err
	case !fi.Mode().IsRegular():
		return nil, &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	}
	raw, err := io.ReadAll(io.LimitReader(f, max+1)) // a file of /proc tells no size
	if err == nil && int64(len(raw)) > max {
		return nil, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("larger than %d MiB", max>>20)}
	}
	return raw, err
}
