package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/tool"
)

// largeManifest is where memory is traded for time: some 20,000 hosts.
const largeManifest = 512 << 10

// loadManifest reads and checks a manifest; file "-" is stdin, and what it
// names is then looked for in the working folder.
func loadManifest(p *tool.Proc, file string) (*manifest.Manifest, error) {
	data, err := manifestBytes(p, file, manifest.MaxBytes)
	if err != nil {
		return nil, err
	}
	return parseManifest(p, file, data)
}

// parseManifest checks the bytes of a manifest. What it names is looked for
// beside file; beside a pipe there is nothing, and the working folder counts.
func parseManifest(p *tool.Proc, file string, data []byte) (*manifest.Manifest, error) {
	if len(data) > largeManifest {
		// A process this short has better use for its time than collecting what
		// it made a moment ago.
		debug.SetGCPercent(400)
	}
	dir, name := ".", "-"
	if file != "-" && !isPipe(file) {
		dir, name = filepath.Dir(file), filepath.Base(file)
	}
	return manifest.Load(data, name, func(path string) ([]byte, error) {
		full, err := inManifest(dir, path, p.Getenv("HOME"))
		if err == nil {
			data, err = readRegular(full, manifest.MaxFile)
		}
		if err != nil {
			return nil, manifest.ReadFailed(path, errors.Is(err, fs.ErrNotExist), errors.Unwrap(err))
		}
		return data, nil
	})
}

// manifestBytes reads one byte more than most, so that the reader of a format
// can tell.
func manifestBytes(p *tool.Proc, file string, most int64) ([]byte, error) {
	if file == "-" {
		if tool.IsTerminal(p.Stdin) {
			return nil, fault.New(fault.Usage, "usage", "stdin is a terminal, and -m - reads the manifest from it").
				WithHint("pipe the manifest in, or name the file with -m FILE")
		}
		return readAll(p.Stdin, "stdin", most)
	}
	if file == "" {
		return nil, fault.New(fault.Usage, "usage", "-m names no file").WithHint("leave it out to read %s", defaultManifest)
	}
	// A shell's own pipe, -m <(...), may be read; a FIFO that lies in a cloned
	// repository would hold us up for ever.
	if fi, err := os.Stat(file); err == nil && !fi.IsDir() && !fi.Mode().IsRegular() && !isPipe(file) {
		return nil, fault.New(fault.NoInput, "unreadable_manifest", "%s is not a regular file", file).WithHint("-m - reads the manifest from stdin")
	}
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NoInput, "no_manifest", "there is no manifest %s", file).
			WithHint("bottle-plan init >%s writes one to start from; -m FILE names another", defaultManifest)
	}
	if err != nil {
		return nil, unreadable(file, err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.IsDir() {
		return nil, fault.New(fault.NoInput, "no_manifest", "%s is a folder", file).
			WithHint("name the file in it: -m %s", filepath.Join(file, defaultManifest))
	}
	return readAll(f, file, most)
}

// isPipe tells of a shell's own pipe, as in -m <(...).
func isPipe(file string) bool {
	return strings.HasPrefix(file, "/dev/fd/") || strings.HasPrefix(file, "/proc/self/fd/")
}

func unreadable(file string, err error) error {
	return fault.New(fault.NoInput, "unreadable_manifest", "reading the manifest: %w", err).WithHint("may you read %s?", file)
}

func readAll(r io.Reader, name string, most int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, most+1))
	if err != nil {
		return nil, unreadable(name, err)
	}
	return data, nil
}

// inManifest resolves a path as a manifest writes it.
func inManifest(dir, path, home string) (string, error) {
	rest, inHome := strings.CutPrefix(path, "~")
	switch {
	case inHome && home == "":
		return "", &fs.PathError{Op: "open", Path: path, Err: errors.New("HOME is not set")}
	case inHome:
		return filepath.Join(home, rest), nil
	case filepath.IsAbs(path):
		return path, nil
	}
	return filepath.Join(dir, path), nil
}

// readRegular reads a regular file. A FIFO or device would block, or never end;
// O_NONBLOCK keeps the open itself from blocking.
func readRegular(path string, max int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	switch {
	case !fi.Mode().IsRegular():
		return nil, &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	case fi.Size() > max:
		return nil, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("larger than %d MiB", max>>20)}
	}
	return io.ReadAll(io.LimitReader(f, max))
}
