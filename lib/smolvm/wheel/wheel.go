// Package wheel installs smolvm from where its makers publish it ready to run:
// the Python package smolmachines, whose smol/smol-vmm is smolvm, with its
// libraries and the root file system of its guests beside it. The Python package
// smolvm is another program.
//
// It is the one place that runs pip, and only to fetch a file whose SHA-256 is
// pinned here. Nothing of the package is executed by that.
package wheel

import (
	"archive/zip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Pinned versions: Newest is the newest that the tools were tested with, Oldest
// one from before its many newer flags.
const (
	Newest = "1.32.2"
	Oldest = "1.9.1"
)

// pins by version, GOOS and GOARCH.
var pins = map[string]struct{ platform, sha256 string }{
	"1.9.1/linux/amd64":   {"manylinux_2_34_x86_64", "aab3c881f295f933c9a24dab1cdbf9d5ea9ee438810737461642d06da1a6da5d"},
	"1.9.1/linux/arm64":   {"manylinux_2_34_aarch64", "58dd1db128a8704ef4c3c59ec73c6829ae7610adba8dc9ab5b6123e40ec979fb"},
	"1.9.1/darwin/arm64":  {"macosx_11_0_arm64", "26849e6deeda0268e516f4ecae45571874557ae5d76169778e76412888fc2cd4"},
	"1.32.2/linux/amd64":  {"manylinux_2_28_x86_64", "81b104e2622aa0b187b6b7054397c391151b83db2638a16d0e54c517684f0dc2"},
	"1.32.2/linux/arm64":  {"manylinux_2_28_aarch64", "5cdd53c71369f149639f00197ce9deaafd204d2bda03b323b1ae3ee35ba4cf8b"},
	"1.32.2/darwin/arm64": {"macosx_11_0_arm64", "af690651bd2d2e329f3ab15d35acd7037a3a94581b3f79c08d1df867e8ef54f9"},
}

// fetchLimit bounds pip: the files have 45 to 55 MB. Who waits for another to
// install waits a little longer. pip's words are kept up to maxSaid.
const (
	fetchLimit = 10 * time.Minute
	lockLimit  = fetchLimit + 2*time.Minute
	lockPoll   = 100 * time.Millisecond
	maxSaid    = 16 << 10
	fetchName  = ".fetch-" // of folders that are filled and moved into place
)

// Install puts smolvm of a pinned version below dir, as VERSION/smol/smolvm, and
// gives its path. What is there already is kept; others may install at the same
// time. Errors are faults: 64 for a version that is not pinned, 78 for a platform
// without one, 69 for pip, 65 for a file that is not the pinned one, 73.
func Install(ctx context.Context, dir, version string) (string, error) {
	pin, ok := pins[version+"/"+runtime.GOOS+"/"+runtime.GOARCH]
	if !ok {
		return "", unpinned(version)
	}
	bin := filepath.Join(dir, version, "smol", "smolvm")
	if there(bin) {
		return bin, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", cannot(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", cannot(err)
	}
	defer lock.Close()
	if err := await(ctx, lock); err != nil {
		return "", err
	}
	if there(bin) { // somebody was faster
		return bin, nil
	}
	// Whoever made these was killed: the lock is ours.
	if left, err := filepath.Glob(filepath.Join(dir, fetchName+"*")); err == nil {
		for _, l := range left {
			_ = os.RemoveAll(l) // what stays is in nobody's way
		}
	}
	tmp, err := os.MkdirTemp(dir, fetchName)
	if err != nil {
		return "", cannot(err)
	}
	defer os.RemoveAll(tmp)
	file, err := download(ctx, tmp, version, pin.platform)
	if err != nil {
		return "", err
	}
	if err := checkSum(file, pin.sha256); err != nil {
		return "", err
	}
	out := filepath.Join(tmp, "out")
	if err := unzip(file, out); err != nil {
		return "", cannot(err)
	}
	// Under its own name each call prints a note about packed assets.
	err = os.Rename(filepath.Join(out, "smol", "smol-vmm"), filepath.Join(out, "smol", "smolvm"))
	if err == nil {
		err = os.Rename(out, filepath.Join(dir, version))
	}
	if err != nil {
		return "", cannot(err)
	}
	return bin, nil
}

// await takes the lock, which another install may hold for minutes.
func await(ctx context.Context, lock *os.File) error {
	for end := time.Now().Add(lockLimit); ; {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return cannot(err)
		case time.Now().After(end):
			return fault.New(fault.TempFail, "locked", "another install holds %s", lock.Name()).
				WithHint("see what it does, and try again")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

func there(bin string) bool {
	fi, err := os.Stat(bin)
	return err == nil && fi.Mode().IsRegular() && fi.Mode().Perm()&0o111 != 0
}

func cannot(err error) error {
	hint := "see that your data folder (XDG_DATA_HOME, else ~/.local/share) is yours to write, and that nothing else has the version's name in it"
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		hint = fmt.Sprintf("make room for %d MiB on the disk of your data folder (XDG_DATA_HOME, else ~/.local/share)", room>>20)
	}
	return fault.New(fault.CantCreate, "cannot_create", "installing smolvm: %w", err).WithHint("%s", hint)
}

// room is what a version needs while it is installed: the file and what is in it.
const room = 300 << 20

// Versions that are pinned for this platform, oldest first.
func Versions() []string {
	var vs []string
	for _, v := range []string{Oldest, Newest} {
		if _, ok := pins[v+"/"+runtime.GOOS+"/"+runtime.GOARCH]; ok {
			vs = append(vs, v)
		}
	}
	return vs
}

func unpinned(version string) error {
	vs := Versions()
	switch {
	case len(vs) == 0:
		return fault.New(fault.Host, "smolvm_platform", "there is no smolvm for %s/%s to install", runtime.GOOS, runtime.GOARCH).
			WithHint("use runtime gvisor, which needs none")
	case !slices.Contains(vs, version):
		return fault.New(fault.Usage, "usage", "smolvm %s is not one of the versions that can be installed: %s", version, strings.Join(vs, ", ")).
			WithHint("name one of them; a smolvm of another version is used if it is on PATH or in BOTTLE_SMOLVM")
	}
	return nil
}

func download(ctx context.Context, dir, version, platform string) (string, error) {
	limited, cancel := context.WithTimeout(ctx, fetchLimit)
	defer cancel()
	args := []string{"-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:",
		"--platform", platform, "--python-version", "3.11", "--implementation", "cp", "--abi", "abi3",
		"--dest", dir, "smolmachines==" + version}
	cmd := exec.CommandContext(limited, "python3", args...)
	// "python3 -m pip" runs a pip of the working folder if there is one, which may
	// be a cloned repository. Its temporary files go with the folder, whatever ends
	// it.
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "TMPDIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	var said tail
	cmd.Stdout, cmd.Stderr = &said, &said
	err := cmd.Run()
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return "", ctx.Err()
	case limited.Err() != nil:
		return "", fault.New(fault.Unavailable, "smolvm_fetch", "pip download smolmachines==%s took longer than %s: %s", version, fetchLimit, said.line()).
			WithHint("see whether the Python package index that pip is set up for answers")
	case strings.Contains(string(said), "No space left on device"):
		return "", cannot(fmt.Errorf("pip download smolmachines==%s: %w", version, unix.ENOSPC))
	default:
		return "", fault.New(fault.Unavailable, "smolvm_fetch", "pip download smolmachines==%s: %w: %s", version, err, said.line()).
			WithHint("it needs python3 with pip, and the Python package index that pip is set up for")
	}
	found, err := filepath.Glob(filepath.Join(dir, "*.whl"))
	if err != nil || len(found) != 1 {
		return "", fault.New(fault.Unavailable, "smolvm_fetch", "pip left %d wheels of smolmachines==%s", len(found), version).
			WithHint("try: python3 -m pip download --no-deps smolmachines==%s", version)
	}
	return found[0], nil
}

// tail is the end of what pip says.
type tail []byte

func (t *tail) Write(p []byte) (int, error) {
	*t = append(*t, p...)
	if over := len(*t) - maxSaid; over > 0 {
		*t = slices.Clone((*t)[over:])
	}
	return len(p), nil
}

// line is the last one, which tells why.
func (t tail) line() string {
	s := strings.TrimSpace(string(t))
	s = s[strings.LastIndexByte(s, '\n')+1:]
	if len(s) > 1<<10 {
		s = s[:1<<10]
	}
	return fault.Line(s)
}

func checkSum(file, want string) error {
	f, err := os.Open(file)
	if err != nil {
		return cannot(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return cannot(err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fault.New(fault.Data, "smolvm_digest", "%s has SHA-256 %s, pinned is %s", filepath.Base(file), got, want).
			WithHint("it is not the file that was tested: look at what pip is set up to fetch from")
	}
	return nil
}

// unzip takes what the program needs out of a wheel, within dir.
func unzip(file, dir string) error {
	z, err := zip.OpenReader(file)
	if err != nil {
		return err
	}
	defer z.Close()
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, e := range z.File {
		if !strings.HasPrefix(e.Name, "smol/") || strings.HasSuffix(e.Name, ".py") || strings.HasSuffix(e.Name, "/") {
			continue
		}
		if err := extract(root, e); err != nil {
			return &fs.PathError{Op: "unpack", Path: e.Name, Err: err}
		}
	}
	return nil
}

func extract(root *os.Root, e *zip.File) error {
	if err := root.MkdirAll(filepath.Dir(e.Name), 0o755); err != nil {
		return err
	}
	in, err := e.Open()
	if err != nil {
		return err
	}
	defer in.Close()
	mode := os.FileMode(0o644)
	if strings.HasSuffix(e.Name, "smol-vmm") || strings.Contains(e.Name, ".so") {
		mode = 0o755
	}
	out, err := root.OpenFile(e.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
