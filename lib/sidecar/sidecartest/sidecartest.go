// Package sidecartest gives tests a real mitmdump.
package sidecartest

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

//go:embed requirements.txt
var requirements []byte

// Path gives a mitmdump: $BOTTLE_MITMDUMP, one on PATH, or the pinned one if
// Install has been run. Where there is none it skips the test and says so; with
// BOTTLE_REQUIRE_REAL=1 it fails instead.
func Path(t testing.TB) string {
	t.Helper()
	name := os.Getenv("BOTTLE_MITMDUMP")
	if name == "" {
		name = "mitmdump"
	}
	path, err := exec.LookPath(name)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err == nil {
		return path
	}
	if _, pinned, perr := place(); perr == nil && installed(pinned) {
		return program(pinned)
	}
	if os.Getenv("BOTTLE_REQUIRE_REAL") == "1" {
		t.Fatalf("BOTTLE_REQUIRE_REAL=1: no mitmdump: %v", err)
	}
	t.Skipf("SKIPPED: there is no mitmdump (%v), so the sidecar was not tried with the real one; BOTTLE_MITMDUMP names one, make canaries installs one", err)
	return ""
}

// Install puts the pinned mitmproxy (130 MB) into $XDG_CACHE_HOME/bottle-test,
// once, with pip, by name and hash, and gives its mitmdump.
func Install(t testing.TB) string {
	t.Helper()
	path, err := install()
	if err == nil {
		return path
	}
	if os.Getenv("BOTTLE_REQUIRE_REAL") == "1" {
		t.Fatalf("BOTTLE_REQUIRE_REAL=1: mitmproxy: %v", err)
	}
	t.Skipf("SKIPPED: mitmproxy could not be installed: %v", err)
	return ""
}

func place() (root, dir string, err error) {
	cache, err := os.UserCacheDir()
	sum := sha256.Sum256(requirements)
	root = filepath.Join(cache, "bottle-test")
	return root, filepath.Join(root, "mitmproxy-"+hex.EncodeToString(sum[:6])), err
}

func program(dir string) string { return filepath.Join(dir, "bin", "mitmdump") }

// whole is written when an installation is complete.
func whole(dir string) string { return filepath.Join(dir, "installed") }

func installed(dir string) bool {
	_, err := os.Stat(whole(dir))
	return err == nil
}

func install() (string, error) {
	root, dir, err := place()
	if err != nil {
		return "", err
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
	if installed(dir) {
		return program(dir), nil
	}
	if err := os.RemoveAll(dir); err != nil { // what a killed run has left
		return "", err
	}
	if err := run("python3", "-m", "venv", dir); err != nil {
		return "", err
	}
	list := filepath.Join(dir, "requirements.txt")
	if err := os.WriteFile(list, requirements, 0o600); err != nil {
		return "", err
	}
	if err := run(filepath.Join(dir, "bin", "pip"), "install", "--quiet", "--no-deps", "--require-hashes", "-r", list); err != nil {
		return "", err
	}
	return program(dir), os.WriteFile(whole(dir), nil, 0o600)
}

func run(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		said := strings.TrimSpace(string(out))
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[0], err, said[strings.LastIndexByte(said, '\n')+1:])
	}
	return nil
}
