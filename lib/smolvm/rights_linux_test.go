package smolvm

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// What root starts has none of the withheld rights, and cannot get them back;
// this process keeps its own.
func TestWithheld(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: not root, so there is no right to withhold")
	}
	sets := func(status string) map[string]uint64 {
		all := map[string]uint64{}
		for line := range strings.Lines(status) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
			if strings.HasPrefix(name, "Cap") {
				n, err := strconv.ParseUint(value, 16, 64)
				if err != nil {
					t.Fatal(line)
				}
				all[name] = n
			}
		}
		return all
	}
	own := func() map[string]uint64 {
		raw, err := os.ReadFile("/proc/thread-self/status")
		if err != nil {
			t.Fatal(err)
		}
		return sets(string(raw))
	}
	before := own()
	if before["CapBnd"]&(1<<unix.CAP_MKNOD) == 0 {
		t.Skip("SKIPPED: root has no CAP_MKNOD here, so there is nothing to withhold")
	}
	// The shell is the program that another starts, as smolvm starts the monitor.
	cmd := exec.Command("/bin/sh", "-c", "/bin/cat /proc/self/status; true")
	var out strings.Builder
	cmd.Stdout = &out
	if err := begin(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	got := sets(out.String())
	for _, name := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		set, ok := got[name]
		for _, c := range withheld {
			if !ok || set&(1<<c) != 0 {
				t.Errorf("%s has right %d: %x", name, c, set)
			}
		}
	}
	if want := before["CapBnd"] &^ (1<<unix.CAP_MKNOD | 1<<unix.CAP_SETFCAP); got["CapBnd"] != want || got["CapEff"] == 0 {
		t.Errorf("other rights are gone, too: %x, want %x; effective %x", got["CapBnd"], want, got["CapEff"])
	}
	for range 20 { // on whichever thread
		if now := own(); now["CapBnd"] != before["CapBnd"] {
			t.Fatalf("this process has lost rights: %x, had %x", now["CapBnd"], before["CapBnd"])
		}
	}
}

// asPlain makes TestWithheldOfAPlainUser the plain user's part of itself.
const asPlain = "BOTTLE_TEST_WITHHELD"

// A plain user who was given rights to hand on (ambient ones) does not hand these
// on either.
func TestWithheldOfAPlainUser(t *testing.T) {
	if os.Getenv(asPlain) != "" {
		cmd := exec.Command("/bin/cat", "/proc/self/status")
		cmd.Stdout = os.Stdout
		if err := begin(cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: not root, who alone gives such rights")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestWithheldOfAPlainUser$")
	cmd.Env = append(os.Environ(), asPlain+"=1")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534},
		AmbientCaps: []uintptr{unix.CAP_MKNOD, unix.CAP_SETFCAP, unix.CAP_CHOWN}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want := fmt.Sprintf("%016x", 1<<unix.CAP_CHOWN) // what is not withheld
	for _, name := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb"} {
		if !strings.Contains(string(out), name+":\t"+want+"\n") {
			t.Errorf("not %s %s: %s", name, want, out)
		}
	}
}
