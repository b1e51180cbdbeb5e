package cli

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
)

// effects are the system calls that change something outside the process, reach
// out of it, or start another. What is left can read and compute.
var effects = regexp.MustCompile(`^(?:\d+ +)?(` +
	`open(?:at2?)?\(.*(?:O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND|O_TMPFILE)` +
	`|creat\(|mkdir|mknod|unlink|rmdir|rename|link(?:at)?\(|symlink|truncate|ftruncate|chmod|fchmod|chown|fchown|lchown|utime|futimes|setxattr|fallocate|mount|umount` +
	`|socket|connect|bind|listen|sendto|sendmsg|accept` +
	`|execve|execveat|fork|vfork|kill\(|ptrace` +
	`|clone3?\((?:[^T]|T[^H])*$)`)

// trace runs a command under strace and gives its effects, but for its own
// start.
func trace(t *testing.T, dir string, env []string, argv ...string) []string {
	t.Helper()
	log := filepath.Join(t.TempDir(), "trace")
	args := append([]string{"-f", "-qq", "-o", log, "-e", "trace=%file,%network,%process,%desc,kill,ptrace"}, argv...)
	cmd := exec.Command("strace", args...)
	cmd.Dir, cmd.Env = dir, env
	out, err := cmd.CombinedOutput()
	if _, failed := err.(*exec.ExitError); err != nil && !failed {
		t.Fatalf("%v: %s", err, out)
	}
	raw, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(raw), "PTRACE") || !strings.Contains(string(raw), "execve(") {
		t.Skipf("SKIPPED LOUDLY: strace cannot trace here: %s %s", out, raw)
	}
	var found []string
	for i, line := range strings.Split(string(raw), "\n") {
		if i > 0 && effects.MatchString(line) {
			found = append(found, line)
		}
	}
	return found
}

// bottle-plan writes nothing, connects to nothing, resolves nothing and starts
// nothing, whatever it is asked.
func TestNoSideEffects(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("SKIPPED LOUDLY: strace is a Linux program")
	}
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("SKIPPED LOUDLY: strace is not installed, so the absence of side effects is not proved here")
	}
	bin := filepath.Join(t.TempDir(), "bottle-plan")
	if out, err := exec.Command("go", "build", "-o", bin, "github.com/bottle-tools/bottle/cmd/bottle-plan").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dir := folder(t, map[string]string{
		"bottle.json": strings.Replace(starter, `"allow": [`, `"roots": ["ca.pem"], "allow": ["api.example.com", "*.example.org", "10.0.0.0/8",`, 1),
		"other.json":  starter,
		"bad.json":    `{`,
		"ca.pem":      "-----BEGIN CERTIFICATE-----\n",
		".npmrc":      "registry=https://npm.example/\n",
	})
	env := []string{"HOME=" + dir, "GOPROXY=https://go.example,direct", "PATH=" + os.Getenv("PATH")}

	// The control: the test can see each kind of effect.
	if got := trace(t, dir, env, "sh", "-c", "echo x >made; (exec 3<>/dev/null); ls /dev/null >/dev/null; rm made"); len(got) < 4 {
		t.Fatalf("the tracer sees no effects where there are some: %q", got)
	}
	for _, args := range [][]string{
		{"bash"}, {"--all"}, {"--all", "--hash"}, {"--pretty"}, {"check"}, {"schema"},
		{"init", "--with", "npm,pip,go"}, {"-m", "bad.json"}, {"-m", "nowhere.json"}, {"nosuch"},
		{"diff", "bottle.json", "bottle.json"}, {"diff", "--pretty", "bottle.json", "other.json"},
	} {
		if got := trace(t, dir, env, append([]string{bin}, args...)...); len(got) > 0 {
			t.Errorf("bottle-plan %s:\n%s", strings.Join(args, " "), strings.Join(got, "\n"))
		}
	}
}
