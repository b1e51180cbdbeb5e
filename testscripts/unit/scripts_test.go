package unit

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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

// TestRigVariables: what the suite of engine smolvm reads from its environment
// gets into the rig.
func TestRigVariables(t *testing.T) {
	script, err := os.ReadFile("../../scripts/test-smolvm")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("../smolvm/*_test.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`Getenv\("(BOTTLE_\w+)"\)`).FindAllSubmatch(src, -1) {
			if !bytes.Contains(script, append([]byte("export "), append(m[1], '=')...)) {
				t.Errorf("%s reads %s, which scripts/test-smolvm does not take along", file, m[1])
			}
		}
	}
}
