//go:build linux

package wheel

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// place is a data folder, and a python3 whose pip is a script: $dest is where the
// file has to be put, $wheel a file that is right.
type place struct{ top, dir string }

func newPlace(t *testing.T, pip string) place {
	t.Helper()
	p := place{top: t.TempDir()}
	p.dir = filepath.Join(p.top, "data")
	wheel := filepath.Join(p.top, "smolmachines.whl")
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for name, size := range map[string]int{"smol/smol-vmm": 64, "smol/lib/libkrun.so": 2 << 20, "smol/__init__.py": 1, "smolmachines/x": 1} {
		w, err := z.Create(name)
		if err == nil {
			_, err = w.Write(make([]byte, size)) // zeros: a small file with much in it
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(wheel, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b.Bytes())
	saved := pins
	t.Cleanup(func() { pins = saved })
	pins = map[string]struct{ platform, sha256 string }{Newest + "/" + runtime.GOOS + "/" + runtime.GOARCH: {"any", hex.EncodeToString(sum[:])}}
	bin := filepath.Join(p.top, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\ntop=" + p.top + " wheel=" + wheel + "\nfor a; do [ \"$last\" = --dest ] && dest=$a; last=$a; done\necho run >>$top/runs\n" + pip + "\n"
	if err := os.WriteFile(filepath.Join(bin, "python3"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	return p
}

const goodPip = `cp $wheel "$dest/"`

func (p place) runs(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.top, "runs"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return bytes.Count(b, []byte("\n"))
}

// left are the entries of the data folder beside the lock.
func (p place) left(t *testing.T) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(p.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != ".lock" {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestInstallsOnce(t *testing.T) {
	p := newPlace(t, "sleep 0.3\n"+goodPip)
	// What a killed install left is cleared.
	if err := os.MkdirAll(filepath.Join(p.dir, fetchName+"old", "out"), 0o755); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			path, err := Install(t.Context(), p.dir, Newest)
			if err != nil || path != filepath.Join(p.dir, Newest, "smol", "smolvm") {
				t.Errorf("%q, %v", path, err)
			}
		})
	}
	all.Wait()
	if n := p.runs(t); n != 1 {
		t.Errorf("fetched %d times", n)
	}
	if got := p.left(t); len(got) != 1 || got[0] != Newest {
		t.Errorf("left: %v", got)
	}
	// There already: neither python nor network is asked.
	t.Setenv("PATH", "/nonexistent")
	if _, err := Install(t.Context(), p.dir, Newest); err != nil {
		t.Error(err)
	}
}

// Python takes what it is to run from its working folder first, which may be a
// repository with a pip of its own.
func TestNothingOfTheWorkingFolderRuns(t *testing.T) {
	p := newPlace(t, "pwd >$top/ran-in\n"+goodPip)
	repository := t.TempDir()
	t.Chdir(repository)
	if _, err := Install(t.Context(), p.dir, Newest); err != nil {
		t.Fatal(err)
	}
	in, err := os.ReadFile(filepath.Join(p.top, "ran-in"))
	if err != nil || !strings.HasPrefix(string(in), filepath.Join(p.dir, fetchName)) {
		t.Errorf("pip ran in %s, %v", in, err)
	}
}

func TestDownloadFails(t *testing.T) {
	for name, c := range map[string]struct {
		pip, code string
		exit      int
		says      string
	}{
		"no network":   {`echo "ERROR: Could not find a version" >&2; printf '\033[31mERROR: No matching distribution\033[0m\n' >&2; exit 1`, "smolvm_fetch", fault.Unavailable, "No matching distribution"},
		"half a file":  {`head -c 100 $wheel >"$dest/smolmachines.whl"`, "smolvm_digest", fault.Data, "pinned is"},
		"killed":       {`kill -9 $$`, "smolvm_fetch", fault.Unavailable, "killed"},
		"nothing":      {`exit 0`, "smolvm_fetch", fault.Unavailable, "0 wheels"},
		"two files":    {`cp $wheel "$dest/a.whl"; cp $wheel "$dest/b.whl"`, "smolvm_fetch", fault.Unavailable, "2 wheels"},
		"no pip":       {`echo "/usr/bin/python3: No module named pip" >&2; exit 1`, "smolvm_fetch", fault.Unavailable, "No module named pip"},
		"megabytes":    {`i=0; while [ $i -lt 400 ]; do head -c 100000 /dev/zero | tr '\0' x; i=$((i+1)); done; exit 1`, "smolvm_fetch", fault.Unavailable, "xxx"},
		"disk is full": {`echo "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device" >&2; exit 1`, "cannot_create", fault.CantCreate, "no space left"},
		"not a zip":    {`echo x >"$dest/a.whl"`, "smolvm_digest", fault.Data, "a.whl"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, c.pip)
			_, err := Install(t.Context(), p.dir, Newest)
			wantFault(t, err, c.exit, c.code)
			if s := err.Error(); !strings.Contains(s, c.says) || len(s) > 4<<10 || strings.ContainsAny(s, "\n\x1b") {
				t.Errorf("%.500q", s)
			}
			if got := p.left(t); len(got) != 0 {
				t.Errorf("left: %v", got)
			}
		})
	}
}

// pip itself, and an index that nobody serves.
func TestRealPipWithoutNetwork(t *testing.T) {
	if err := exec.Command("python3", "-m", "pip", "--version").Run(); err != nil {
		t.Skipf("NOT RUN: no python3 with pip: %v", err)
	}
	for k, v := range map[string]string{"PIP_INDEX_URL": "http://127.0.0.1:1/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.DevNull,
		"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_NO_INDEX": ""} {
		t.Setenv(k, v)
	}
	if len(Versions()) == 0 {
		t.Skip("NOT RUN: no version for this platform")
	}
	dir := t.TempDir()
	_, err := Install(t.Context(), dir, Newest)
	wantFault(t, err, fault.Unavailable, "smolvm_fetch")
	t.Log(err)
}

// A data folder on a disk that is full, while pip fetches and while the file is
// unpacked.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT RUN: only root mounts a small disk")
	}
	for name, pip := range map[string]string{
		"unpacking": goodPip,
		"fetching":  `exec 2>"$top/said"; cat /dev/zero >"$dest/part" || { cat "$top/said"; exit 1; }`,
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, pip)
			if err := os.Mkdir(p.dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("small", p.dir, "tmpfs", 0, "size=1m"); err != nil {
				t.Skipf("NOT RUN: no small disk: %v", err)
			}
			t.Cleanup(func() { _ = unix.Unmount(p.dir, unix.MNT_DETACH) })
			_, err := Install(t.Context(), p.dir, Newest)
			wantFault(t, err, fault.CantCreate, "cannot_create")
			if f := fault.As(err); !strings.Contains(strings.ToLower(err.Error()), "no space left") || !strings.Contains(f.Hint, "make room") {
				t.Errorf("%v; %s", err, f.Hint)
			}
			if got := p.left(t); len(got) != 0 {
				t.Errorf("left: %v", got)
			}
		})
	}
}

func TestFolderIsInTheWay(t *testing.T) {
	p := newPlace(t, goodPip)
	if err := os.WriteFile(p.dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Install(t.Context(), p.dir, Newest)
	wantFault(t, err, fault.CantCreate, "cannot_create")

	p = newPlace(t, goodPip)
	if err := os.MkdirAll(filepath.Join(p.dir, Newest, "by-hand"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err = Install(t.Context(), p.dir, Newest)
	wantFault(t, err, fault.CantCreate, "cannot_create")
	if got := p.left(t); len(got) != 1 {
		t.Errorf("left: %v", got)
	}
	if os.Geteuid() == 0 {
		t.Log("NOT RUN as root: a folder that may not be written")
		return
	}
	p = newPlace(t, goodPip)
	if err := os.Mkdir(p.dir, 0o555); err != nil {
		t.Fatal(err)
	}
	_, err = Install(t.Context(), p.dir, Newest)
	wantFault(t, err, fault.CantCreate, "cannot_create")
}

// Whoever waits, for the lock or for pip, can be interrupted; pip's children end
// with it.
func TestInterrupted(t *testing.T) {
	p := newPlace(t, `sleep 600 & echo $! >"$top/pid.new"; mv "$top/pid.new" "$top/pid"; wait`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { _, err := Install(ctx, p.dir, Newest); first <- err }()
	var pid int
	for range 1000 {
		if b, err := os.ReadFile(filepath.Join(p.top, "pid")); err == nil {
			pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if pid == 0 {
		t.Fatal("pip was not run")
	}
	waiting, stop := context.WithCancel(t.Context())
	go func() { _, err := Install(waiting, p.dir, Newest); second <- err }()
	time.Sleep(300 * time.Millisecond)
	stop()
	for _, c := range []struct {
		name  string
		ended chan error
	}{{"waiting for the lock", second}, {"waiting for pip", first}} {
		select {
		case err := <-c.ended:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", c.name, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: it goes on", c.name)
		}
		cancel()
	}
	for range 500 {
		if stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat"); err != nil || bytes.Contains(stat, []byte(") Z ")) {
			if got := p.left(t); len(got) != 0 {
				t.Errorf("left: %v", got)
			}
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Error("pip's child is still there")
	_ = unix.Kill(pid, unix.SIGKILL)
}
