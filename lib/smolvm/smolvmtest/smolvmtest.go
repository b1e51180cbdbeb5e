// Package smolvmtest gives tests a smolvm: the recorded one, or the real one
// from the Python package smolmachines.
package smolvmtest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/smolvm/wheel"
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

// Real gives the path of a real smolvm of the version, fetched once with pip
// (45 to 55 MB) into $XDG_CACHE_HOME/bottle-test. Where there is no pip, no such
// wheel or no network it skips the test and says so; with BOTTLE_REQUIRE_REAL=1
// it fails instead.
func Real(t testing.TB, version string) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	var bin string
	if err == nil {
		bin, err = wheel.Install(t.Context(), filepath.Join(cache, "bottle-test", "smolvm"), version)
	}
	if err == nil {
		return bin
	}
	if os.Getenv("BOTTLE_REQUIRE_REAL") == "1" {
		t.Fatalf("BOTTLE_REQUIRE_REAL=1: real smolvm %s: %v", version, err)
	}
	t.Skipf("NOT RUN against the real smolvm %s: %v", version, err)
	return ""
}
