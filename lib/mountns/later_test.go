//go:build linux

package mountns

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What the host mounts later below a folder that is shown read-only does not come
// in: it would come writable. It goes on coming into the others.
func TestLaterMounts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: not root, who alone mounts on a host")
	}
	// A shared mount, as systemd makes all of a host's.
	host := t.TempDir()
	if err := unix.Mount("none", host, "tmpfs", 0, ""); err != nil {
		t.Skipf("SKIPPED: nothing can be mounted here, so nothing later either: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(host, unix.MNT_DETACH) })
	if err := unix.Mount("", host, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	dirs := map[string]string{}
	for _, name := range []string{"ro", "rw", "at-ro", "at-rw"} {
		dirs[name] = filepath.Join(host, name)
		if err := os.MkdirAll(filepath.Join(dirs[name], "below"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf(`echo ready; read _
for d in %s %s; do
	test -e $d/below/later && echo there || echo hidden
	touch $d/below/new 2>/dev/null && echo written || echo refused
done`, dirs["at-ro"], dirs["at-rw"]))
	if err := Attach(cmd, exe, []Bind{{dirs["ro"], dirs["at-ro"], true}, {dirs["rw"], dirs["at-rw"], false}}); err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	if line, err := lines.ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	for _, name := range []string{"ro", "rw"} {
		below := filepath.Join(dirs[name], "below")
		if err := unix.Mount("none", below, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(below, unix.MNT_DETACH) })
		if err := os.WriteFile(filepath.Join(below, "later"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	in.Close()
	rest, err := io.ReadAll(lines)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if got := strings.Fields(string(rest)); fmt.Sprint(got) != "[hidden refused there written]" {
		t.Errorf("the read-only folder and the other: %v", got)
	}
}
