package unit

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestScriptsHelp: a script that takes arguments tells them, and does nothing
// else, when it is asked to.
func TestScriptsHelp(t *testing.T) {
	// A script that went on would find nothing to do it with.
	bin := t.TempDir()
	for _, name := range []string{"sed", "dirname"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"rig", "record-smolvm", "test-smolvm"} {
		cmd := exec.CommandContext(t.Context(), "../../scripts/"+name, "--help")
		var said, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &errs
		cmd.Env = []string{"PATH=" + bin, "HOME=/nonexistent"}
		err := cmd.Run()
		if err != nil || !bytes.HasPrefix(said.Bytes(), []byte(name+": ")) || !bytes.Contains(said.Bytes(), []byte("\n  scripts/"+name+" ")) || errs.Len() > 0 {
			t.Errorf("scripts/%s --help: %v\n%s%s", name, err, said.Bytes(), errs.Bytes())
		}
	}
}
