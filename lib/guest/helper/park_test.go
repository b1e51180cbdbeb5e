//go:build linux

package helper

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/guest"
)

// parked makes the test binary a parked process, see TestPark.
const parked = "BOTTLE_TEST_PARK"

func init() {
	if os.Getenv(parked) != "" {
		os.Stderr.WriteString(Park("/bin/echo", []string{"echo", "it", "is"}, func() error { return nil }).Error())
		os.Exit(1)
	}
}

// A parked process survives what ends others, and becomes another when it is told.
func TestPark(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = []string{parked + "=1", "GOCOVERDIR=" + t.TempDir()}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	// Before it has its handlers any of the signals would end it. Those that it
	// ignores come last.
	const ignored = 1<<(unix.SIGHUP-1) | 1<<(unix.SIGINT-1) | 1<<(unix.SIGTERM-1) | 1<<(unix.SIGPIPE-1)
	caught := func() bool {
		b, _ := os.ReadFile(filepath.Join("/proc", itoa(cmd.Process.Pid), "status"))
		for line := range strings.Lines(string(b)) {
			if hex, ok := strings.CutPrefix(line, "SigIgn:"); ok {
				set, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
				return err == nil && set&ignored == ignored
			}
		}
		return false
	}
	for deadline := time.Now().Add(20 * time.Second); !caught(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not park")
		}
	}
	for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP} {
		_ = cmd.Process.Signal(s)
	}
	select {
	case err := <-ended:
		t.Fatalf("a signal ended it: %v, %s", err, out.String())
	case <-time.After(200 * time.Millisecond):
	}
	_ = cmd.Process.Signal(unix.SIGUSR1)
	select {
	case err := <-ended:
		if err != nil || out.String() != "it is\n" {
			t.Errorf("%v, %q", err, out.String())
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it does not wake")
	}
}

// The parked process is found whatever its number is, and nothing else for it.
func TestParked(t *testing.T) {
	proc := t.TempDir()
	add := func(pid, cmdline string) {
		if err := os.MkdirAll(filepath.Join(proc, pid), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, pid, "cmdline"), []byte(cmdline), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	add("1", "/run/smolvm/init\x00container-init\x00")
	add("self", "/opt/guest\x00park\x00")
	add("7", "/opt/guest\x00park\x00more\x00")
	add("8", "/opt/guest\x00adopt\x00")
	if pid, err := Parked(proc, "/opt/guest"); err == nil {
		t.Errorf("%d is taken for it", pid)
	}
	add("2", "/opt/guest\x00park\x00")
	if pid, err := Parked(proc, "/opt/guest"); pid != 2 || err != nil {
		t.Errorf("%d, %v", pid, err)
	}
}

func itoa(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}

// What is wrong is found before anything is changed.
func TestAdoptRefuses(t *testing.T) {
	good := guest.Adoption{Hostname: "dev-0123abcd", UnixNano: 1, Seed: make([]byte, guest.SeedSize),
		MachineID: strings.Repeat("0", 32), BootID: "00000000-0000-4000-8000-000000000000"}
	if err := check(good); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*guest.Adoption){
		"no host name":       func(a *guest.Adoption) { a.Hostname = "" },
		"a seed of 63 bytes": func(a *guest.Adoption) { a.Seed = a.Seed[1:] },
		"no machine id":      func(a *guest.Adoption) { a.MachineID = "x" },
		"no boot id":         func(a *guest.Adoption) { a.BootID = strings.Repeat("0", 36) },
		"no time":            func(a *guest.Adoption) { a.UnixNano = 0 },
	} {
		bad := good
		change(&bad)
		raw, err := json.Marshal(bad)
		if err != nil {
			t.Fatal(err)
		}
		if err := Adopt(strings.NewReader(string(raw)), os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if err := Adopt(strings.NewReader("{"), os.Getpid()); err == nil || !strings.Contains(err.Error(), "what to become") {
		t.Error(err)
	}
}

func TestMachineID(t *testing.T) {
	root := t.TempDir()
	for _, d := range []string{"etc", "var/lib/dbus"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	bus := filepath.Join(root, "var/lib/dbus/machine-id")
	id := strings.Repeat("ab", 16)
	read := func(p string) string {
		b, err := os.ReadFile(p)
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	if err := setMachineID(root, id); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(bus); err == nil {
		t.Error("one for dbus was made where there was none")
	}
	if err := os.WriteFile(bus, []byte("old"), 0o444); err != nil {
		t.Fatal(err)
	}
	if err := setMachineID(root, id); err != nil {
		t.Fatal(err)
	}
	if read(bus) != id+"\n" || read(filepath.Join(root, "etc/machine-id")) != id+"\n" {
		t.Errorf("%q", read(bus))
	}
}
