// Package smolvmtest gives tests a smolvm: the recorded one, or the real one
// from the Python package smolmachines.
package smolvmtest

import (
	"archive/zip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/testscripts/fakesmolvm"
)

// Main is for TestMain: it makes the test binary answer as the fake smolvm when
// it was called by that name (see Fake), and runs the tests otherwise.
func Main(m *testing.M) {
	if filepath.Base(os.Args[0]) == "smolvm" {
		os.Exit(fakesmolvm.Main())
	}
	os.Exit(m.Run())
}

// Fake is a replaying smolvm with its own memory and log.
type Fake struct {
	Bin string
	Env []string
	log string
}

// NewFake gives the fake that answers as version did ("1.9.1", "1.32.2"), from
// the recordings in the given folders.
func NewFake(t testing.TB, version string, transcripts ...string) *Fake {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f := &Fake{Bin: filepath.Join(dir, "smolvm"), log: filepath.Join(dir, "log")}
	if err := os.Symlink(self, f.Bin); err != nil {
		t.Fatal(err)
	}
	f.Env = []string{
		"BOTTLE_TRANSCRIPTS=" + strings.Join(transcripts, string(os.PathListSeparator)),
		"BOTTLE_TRANSCRIPT_VERSION=" + version,
		"BOTTLE_TRANSCRIPT_STATE=" + filepath.Join(dir, "state"),
		"BOTTLE_TRANSCRIPT_LOG=" + f.log,
		"GOCOVERDIR=" + dir,
	}
	return f
}

// Calls gives the arguments of every call so far, one line each.
func (f *Fake) Calls(t testing.TB) string {
	t.Helper()
	data, err := os.ReadFile(f.log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(data)
}

// wheels are the pinned files of the Python package smolmachines, by version and
// GOARCH. 1.9.1 is what was recorded, 1.32.2 the newest that was.
var wheels = map[string]struct{ platform, sha256 string }{
	"1.9.1/amd64":  {"manylinux_2_34_x86_64", "aab3c881f295f933c9a24dab1cdbf9d5ea9ee438810737461642d06da1a6da5d"},
	"1.32.2/amd64": {"manylinux_2_28_x86_64", "81b104e2622aa0b187b6b7054397c391151b83db2638a16d0e54c517684f0dc2"},
}

// Real gives the path of a real smolvm of the version, fetched once with pip
// (45 to 55 MB) into $XDG_CACHE_HOME/bottle-test and checked by SHA-256. Where
// there is no pip, no such wheel or no network it skips the test and says so;
// with BOTTLE_REQUIRE_REAL=1 it fails instead.
func Real(t testing.TB, version string) string {
	t.Helper()
	bin, err := fetch(version)
	if err == nil {
		return bin
	}
	if os.Getenv("BOTTLE_REQUIRE_REAL") == "1" {
		t.Fatalf("BOTTLE_REQUIRE_REAL=1: real smolvm %s: %v", version, err)
	}
	t.Skipf("NOT RUN against the real smolvm %s: %v", version, err)
	return ""
}

// fetch is idempotent and safe against other test processes: a lock, a check of
// the hash, and a rename into place.
func fetch(version string) (string, error) {
	wheel, ok := wheels[version+"/"+runtime.GOARCH]
	if !ok || runtime.GOOS != "linux" {
		return "", fmt.Errorf("no pinned wheel for %s/%s", runtime.GOOS, runtime.GOARCH)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	root := filepath.Join(cache, "bottle-test")
	dir := filepath.Join(root, "smolmachines-"+version+"-"+wheel.sha256[:12])
	bin := filepath.Join(dir, "smol", "smolvm")
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(bin); err == nil { // another process was faster
		return bin, nil
	}
	tmp, err := os.MkdirTemp(root, "fetch-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	file, err := download(tmp, version, wheel.platform)
	if err != nil {
		return "", err
	}
	if err := checkSum(file, wheel.sha256); err != nil {
		return "", err
	}
	out := filepath.Join(tmp, "out")
	if err := unzip(file, out); err != nil {
		return "", err
	}
	// Under its own name each call prints a note about packed assets.
	if err := os.Rename(filepath.Join(out, "smol", "smol-vmm"), filepath.Join(out, "smol", "smolvm")); err != nil {
		return "", err
	}
	if err := os.Rename(out, dir); err != nil {
		return "", err
	}
	return bin, nil
}

func download(dir, version, platform string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	args := []string{"-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
		"--platform", platform, "--python-version", "3.11", "--implementation", "cp", "--abi", "abi3",
		"--dest", dir, "smolmachines==" + version}
	cmd := exec.CommandContext(ctx, "python3", args...)
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("pip download smolmachines==%s: %w: %s", version, err, lastLine(string(out)))
	}
	found, err := filepath.Glob(filepath.Join(dir, "*.whl"))
	if err != nil || len(found) != 1 {
		return "", fmt.Errorf("pip left %d wheels", len(found))
	}
	return found[0], nil
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

func checkSum(file, want string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("%s has SHA-256 %s, pinned is %s", filepath.Base(file), got, want)
	}
	return nil
}

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
			return fmt.Errorf("%s: %w", e.Name, err)
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
