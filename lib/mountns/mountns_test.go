//go:build linux

package mountns

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Verb {
		os.Exit(Main(os.Args[2:], os.Stderr))
	}
	os.Exit(m.Run())
}

// start runs a shell script among binds.
func start(t *testing.T, script string, binds ...Bind) (string, error) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	exe, err := os.Executable()
	if err == nil {
		err = Attach(cmd, exe, binds)
	}
	if err != nil {
		t.Fatal(err)
	}
	err = cmd.Run()
	return out.String(), err
}

func folder(t *testing.T, name, content string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "who"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestBinds(t *testing.T) {
	slot, own, ro := folder(t, "slot", "slot\n"), folder(t, "own", "own\n"), folder(t, "ro", "ro\n")
	out, err := start(t, `
cat `+slot+`/who `+ro+`/who
echo written >`+slot+`/new && cat `+own+`/new
mkdir `+ro+`/new 2>/dev/null || echo refused
id -u
[ $(id -u) = 0 ] || grep CapEff /proc/self/status
exit 7`, Bind{own, slot, false}, Bind{ro, ro, true})
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 7 {
		t.Errorf("ended with %v", err)
	}
	want := fmt.Sprintf("own\nro\nwritten\nrefused\n%d\n", os.Getuid())
	if os.Getuid() != 0 {
		want += "CapEff:\t0000000000000000\n"
	}
	if out != want {
		t.Errorf("%q, want %q", out, want)
	}
	// The host has nothing of it but what was written.
	if b, err := os.ReadFile(filepath.Join(slot, "who")); err != nil || string(b) != "slot\n" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(slot, "new")); !os.IsNotExist(err) {
		t.Errorf("it is in the host's folder: %v", err)
	}
}

func TestWhatIsMissing(t *testing.T) {
	slot := folder(t, "slot", "slot\n")
	out, err := start(t, "echo ran", Bind{filepath.Join(slot, "none"), slot, false})
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != Failed {
		t.Errorf("ended with %v", err)
	}
	if !strings.Contains(out, Verb+": "+slot+"/none at "+slot+": no such file or directory") || strings.Contains(out, "ran\n") {
		t.Errorf("%q", out)
	}
}

func TestCommandWithFiles(t *testing.T) {
	cmd := exec.Command("/bin/true")
	cmd.ExtraFiles = []*os.File{os.Stdin}
	if Attach(cmd, "/bin/true", nil) == nil {
		t.Error("a command with files of its own is taken")
	}
}
