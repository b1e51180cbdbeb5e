package pipelock

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	inNetwork  = "BOTTLE_TEST_IN_NETWORK" // set in the process that has the namespace
	publicAddr = "93.184.216.34"
)

const hosts = `127.0.0.1 localhost
93.184.216.34 a.example x.y.w.example w.example bad.w.example p.example other.example a.test
10.1.2.3 inner.example
168.63.129.16 azure.example
64:ff9b::a01:203 nat64.example
1.2.3.4 own.example
9.9.9.9 quad.example
`

// ownNetwork runs the calling test again, in namespaces of its own.
func ownNetwork(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), inNetwork+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if err != nil && len(out) == 0 {
		t.Skipf("SKIPPED: no user and network namespaces on this host (%v), so no traffic goes through the real pipelock", err)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
}

func init() {
	dir := os.Getenv(inNetwork)
	if dir == "" || os.Getenv("FAKE_PIPELOCK") != "" {
		return
	}
	if err := setUpNetwork(dir); err != nil {
		fmt.Println("setting up the network:", err)
		os.Exit(1)
	}
}

// setUpNetwork takes the loopback interface up, gives it the public address,
// and lays the hosts file over the system's.
func setUpNetwork(dir string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	for _, name := range []string{"lo", "lo:1"} {
		r, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		if name != "lo" {
			if err := r.SetInet4Addr([]byte{93, 184, 216, 34}); err != nil {
				return err
			}
			if err := unix.IoctlIfreq(s, unix.SIOCSIFADDR, r); err != nil {
				return err
			}
			continue
		}
		r.SetUint16(unix.IFF_UP)
		if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r); err != nil {
			return err
		}
	}
	file := filepath.Join(dir, "hosts")
	if err := os.WriteFile(file, []byte(hosts), 0o644); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Mount(file, "/etc/hosts", "", unix.MS_BIND, "")
}
