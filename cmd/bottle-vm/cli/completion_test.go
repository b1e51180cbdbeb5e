package cli

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/tool"
)

// TestMain lets the test binary be bottle-vm, under that name.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "bottle-vm" {
		tool.Main("bottle-vm", Run)
	}
	os.Exit(m.Run())
}

// TestCompletion is scripts/bottle-completion.bash against the real help texts
// of bottle-vm and of the driver.
func TestCompletion(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("SKIPPED: bash is not installed, so its completion is not tested")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	scripts, err := filepath.Abs("../../../scripts")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	for name, to := range map[string]string{"bottle-vm": self, "bottle": filepath.Join(scripts, "bottle")} {
		if err := os.Symlink(to, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	for line, want := range map[string]string{
		"bottle ":                      "run start shell exec ls stop gc plan",
		"bottle st":                    "start stop",
		"bottle plan --":               "--all --hash --pretty",
		"bottle-vm ":                   "up exec cp ls status logs diff stop start down trust verify doctor",
		"bottle-vm do":                 "down doctor",
		"bottle-vm up --d":             "--dir",
		"bottle-vm exec -":             "--agent -e -i -t --timeout -w",
		"bottle-vm exec --timeout 5 -": "--agent -e -i -t --timeout -w",
		"bottle-vm exec x -- --t":      "",
		"bottle-vm logs -":             "--audit -f --follow",
	} {
		words := strings.Split(line, " ")
		cmd := exec.Command(bash, append([]string{"-c",
			`. "$0"; COMP_WORDS=("$@") COMP_CWORD=$(($#-1)); _bottle; echo "${COMPREPLY[*]}"`,
			filepath.Join(scripts, "bottle-completion.bash")}, words...)...)
		cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "XDG_STATE_HOME=" + t.TempDir()}
		out, err := cmd.CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("%q: %v\n got %s\nwant %s", line, err, got, want)
		}
	}
}
