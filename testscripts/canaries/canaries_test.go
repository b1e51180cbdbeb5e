// Package canaries asks pinned programs from outside whether they still do what
// the recordings in testscripts/transcripts say, and what the tools rely on.
// They are for a schedule, not for every change: BOTTLE_CANARIES=1 runs them.
package canaries

import (
	"bufio"
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/pipelock/pipelocktest"
	"github.com/bottle-tools/bottle/lib/sidecar"
	"github.com/bottle-tools/bottle/lib/sidecar/sidecartest"
	"github.com/bottle-tools/bottle/lib/smolvm/smolvmtest"
	"github.com/bottle-tools/bottle/lib/smolvm/wheel"
	"github.com/bottle-tools/bottle/testscripts/harness"
	"github.com/bottle-tools/bottle/testscripts/smolvmcalls"
)

func TestMain(m *testing.M) { harness.Main(m) }

func gated(t *testing.T) {
	t.Helper()
	if os.Getenv("BOTTLE_CANARIES") != "1" {
		t.Skip("SKIPPED: a canary; BOTTLE_CANARIES=1 runs it (make canaries)")
	}
}

const transcripts = "../transcripts"

// TestSmolvm asks each pinned smolvm all that needs no guest, and compares with
// what it was recorded to answer; a pinned release that was not recorded yet, with
// the newest older one. What needs a guest is compared by recording it again
// (scripts/record-smolvm), where guests boot.
func TestSmolvm(t *testing.T) {
	gated(t)
	dir := filepath.Join(transcripts, "smolvm")
	versions, err := smolvmcalls.Recorded(dir)
	if err != nil {
		t.Fatal(err)
	}
	pinned := wheel.Versions()
	if len(pinned) == 0 {
		t.Skip("SKIPPED: no smolvm is pinned for this platform")
	}
	for _, release := range pinned {
		t.Run(release, func(t *testing.T) {
			now, err := smolvmcalls.Ask(t.Context(), smolvmtest.Real(t, release), t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			if now.Version.String() != release {
				t.Errorf("it says that it is %s", now.Version)
			}
			against, ok := smolvmcalls.Against(versions, now.Version)
			if !ok {
				t.Fatalf("nothing as old was recorded: scripts/record-smolvm %s", release)
			}
			recorded, err := smolvmcalls.ReadAnswers(dir, against)
			if err != nil {
				t.Fatal(err)
			}
			differences := smolvmcalls.Compare(recorded, now.Records)
			for _, d := range differences {
				t.Errorf("smolvm %s answers otherwise than %s was recorded:\n%s", now.Version, against, d)
			}
			if len(differences) > 0 || against != now.Version {
				t.Errorf("%d differences; look at each, then: scripts/record-smolvm %s", len(differences), release)
			}
		})
	}
}

func call(t *testing.T, home, bin string, args ...string) (out, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = []string{"HOME=" + home, "PATH=/usr/bin:/bin"}
	var o, e strings.Builder
	cmd.Stdout, cmd.Stderr = &o, &e
	_ = cmd.Run()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		t.Fatalf("%s %q did not run: %v", bin, args, ctx.Err())
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// TestPipelock repeats the recorded checks of configurations.
func TestPipelock(t *testing.T) {
	gated(t)
	bin := pipelocktest.Path(t)
	f, err := os.Open(filepath.Join(transcripts, "pipelock", "check.ndjson"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<24)
	asked := 0
	for sc.Scan() {
		var r checkRecord
		if err := json.Unmarshal(sc.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
		if ok := r.ask(t, bin); ok {
			asked++
		}
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	if asked == 0 {
		t.Error("no recording could be asked")
	}
}

// checkRecord is one recorded "pipelock check".
type checkRecord struct {
	Name   string   `json:"name"`
	Config string   `json:"config"`
	Argv   []string `json:"argv"`
	Exit   int      `json:"exit"`
	Stdout string   `json:"stdout"`
	Stderr string   `json:"stderr"`
}

// ask repeats the call. What the tools rely on is the verdict: the exit status,
// and the line that says so.
func (r *checkRecord) ask(t *testing.T, bin string) bool {
	t.Helper()
	n := len(r.Argv)
	if n != 4 || r.Argv[1] != "check" || r.Argv[2] != "--config" || r.Config == "" {
		return false
	}
	dir := t.TempDir()
	config := filepath.Join(dir, filepath.Base(r.Argv[3]))
	if err := os.WriteFile(config, []byte(r.Config), 0o600); err != nil {
		t.Fatal(err)
	}
	out, stderr, code := call(t, dir, bin, "check", "--config", config)
	const ok = "Config validation: OK"
	if code != r.Exit || strings.Contains(out+stderr, ok) != strings.Contains(r.Stdout+r.Stderr, ok) {
		t.Errorf("%s: exit %d, recorded %d\n%s%s\n--- recorded\n%s%s", r.Name, code, r.Exit, out, stderr, r.Stdout, r.Stderr)
	}
	return true
}

// TestClaudeCode: the demo's agent is pinned to one version, and that is the one
// that gets installed.
func TestClaudeCode(t *testing.T) {
	gated(t)
	const dir = "../../tools/claude-code"
	raw, err := os.ReadFile(filepath.Join(dir, "package.json"))
	if err != nil {
		t.Fatal(err)
	}
	const name = `@anthropic-ai/claude-code`
	version := gjson.GetBytes(raw, "dependencies."+name).Str
	if !regexp.MustCompile(`^\d+\.\d+\.\d+$`).MatchString(version) {
		t.Fatalf("%s is not pinned: %q", name, version)
	}
	lock, err := os.ReadFile(filepath.Join(dir, "package-lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	locked := gjson.GetBytes(lock, "packages").Get(`node_modules/` + name)
	if locked.Get("version").Str != version || locked.Get("integrity").Str == "" {
		t.Errorf("package-lock.json has %s, want %s with an integrity", locked.Get("version").Raw, version)
	}
	home := t.TempDir()
	for _, file := range []string{"package.json", "package-lock.json"} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err == nil {
			err = os.WriteFile(filepath.Join(home, file), b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	install := exec.CommandContext(ctx, "npm", "ci", "--no-audit", "--no-fund")
	install.Dir = home
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("npm ci: %v\n%s", err, out)
	}
	out, stderr, code := call(t, home, filepath.Join(home, "node_modules", ".bin", "claude"), "--version")
	if code != 0 || !strings.HasPrefix(out, version) {
		t.Errorf("claude --version: exit %d %q %q, want %s", code, out, stderr, version)
	}
}

// TestMitmdump installs the pinned mitmproxy and starts it as a bottle's sidecar.
// The tests of the sidecar and of whole bottles find it from then on.
func TestMitmdump(t *testing.T) {
	gated(t)
	program := sidecartest.Install(t)
	authority, err := ca.New("canary", []string{"keys.test"}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	key, err := authority.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	p, err := sidecar.Start(sidecar.Options{Program: program, Dir: t.TempDir(), Back: "127.0.0.1:9", Auth: sidecar.NewAuth(), BackAuth: sidecar.NewAuth(),
		Authority: key, BackCA: authority.CertPEM(), Host: "keys.test", Addons: []sidecar.Addon{{Name: "a.py", Code: []byte("def request(flow): pass\n")}}}, netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	if err := p.Ready(t.Context()); err != nil {
		t.Error(err)
	}
}
