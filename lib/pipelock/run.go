package pipelock

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Limits of the short calls.
const (
	callTimeout = 15 * time.Second
	maxOutput   = 8 << 10 // bytes of pipelock's own words that are kept
)

// Program is a pipelock executable.
type Program struct {
	Path    string // absolute
	Version string // as it prints it: "2.3.0"; builds from source say "0.1.0-dev" or a commit
}

// Find looks for pipelock: $BOTTLE_PIPELOCK, then the absolute folders of
// $PATH. It asks the program for its version and refuses those before 2.2.0,
// which take unknown keys of a configuration without a word. Errors are faults
// 69 (proxy_missing, proxy_too_old, proxy_refuses).
func Find(ctx context.Context, getenv func(string) string) (*Program, error) {
	path, err := locate(getenv)
	if err != nil {
		return nil, err
	}
	p := &Program{Path: path}
	out, err := p.call(ctx, "--version")
	if err != nil {
		return nil, err
	}
	m := versionLine.FindStringSubmatch(out)
	if m == nil {
		return nil, fault.New(fault.Unavailable, "proxy_refuses", "%s is not pipelock: --version answers %q", path, clip(out)).
			WithHint("set BOTTLE_PIPELOCK to the pipelock program")
	}
	p.Version = m[1]
	if tooOld(p.Version) {
		return nil, fault.New(fault.Unavailable, "proxy_too_old", "%s is pipelock %s, which does not check its configuration strictly", path, p.Version).
			WithHint(`install pipelock 2.2.0 or newer, or use "proxy": "builtin"`)
	}
	return p, nil
}

var (
	versionLine    = regexp.MustCompile(`(?m)^pipelock version (\S+)`)
	releaseVersion = regexp.MustCompile(`^v?(\d+)\.(\d+)\.\d+$`)
)

// tooOld judges released versions only; a build from source has no number, and
// Start shows by a request whether it enforces its list.
func tooOld(version string) bool {
	m := releaseVersion.FindStringSubmatch(version)
	if m == nil {
		return false
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	return major < 2 || major == 2 && minor < 2
}

func locate(getenv func(string) string) (string, error) {
	if path := getenv("BOTTLE_PIPELOCK"); path != "" {
		abs, err := filepath.Abs(path)
		if err != nil || !executable(abs) {
			return "", missing("BOTTLE_PIPELOCK is %s, which is not an executable file", path)
		}
		return abs, nil
	}
	for _, dir := range filepath.SplitList(getenv("PATH")) {
		// A relative folder of PATH would run what a workspace holds.
		if path := filepath.Join(dir, "pipelock"); filepath.IsAbs(dir) && executable(path) {
			return path, nil
		}
	}
	return "", missing("pipelock is not on PATH")
}

func missing(format string, args ...any) error {
	return fault.New(fault.Unavailable, "proxy_missing", format, args...).
		WithHint(`install pipelock 2.2.0 or newer and set BOTTLE_PIPELOCK, or use "proxy": "builtin"`)
}

func executable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode().Perm()&0o111 != 0
}

// Check lets pipelock read a configuration. A refusal is a fault 69
// (proxy_refuses) with pipelock's own words. It is necessary and not
// sufficient: pipelock accepts list entries that never match.
func (p *Program) Check(ctx context.Context, yaml []byte) error {
	dir, err := os.MkdirTemp("", "bottle-pipelock-")
	if err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "a folder for pipelock check: %w", err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, configName)
	if err := os.WriteFile(file, yaml, 0o600); err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "a file for pipelock check: %w", err)
	}
	_, err = p.call(ctx, "check", "--config", file)
	return err
}

// call runs one short command. pipelock writes the answer of check on stderr
// and that of --version on stdout, so both are taken.
func (p *Program) call(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	home, err := os.MkdirTemp("", "bottle-pipelock-")
	if err != nil {
		return "", fault.New(fault.CantCreate, "cannot_create", "a home for pipelock: %w", err)
	}
	defer os.RemoveAll(home)
	out := &tail{max: maxOutput}
	cmd := exec.CommandContext(ctx, p.Path, args...)
	cmd.Env, cmd.Dir = environment(home), home
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	var status *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return "", fault.New(fault.Unavailable, "proxy_refuses", "pipelock %s did not answer within %s: %w", args[0], callTimeout, ctx.Err())
	case errors.As(err, &status):
		return "", fault.New(fault.Unavailable, "proxy_refuses", "pipelock %s: %s", args[0], firstOf(out.String(), status.Error())).
			WithHint("pipelock is %s", p.Path)
	case err != nil:
		return "", fault.New(fault.Unavailable, "proxy_refuses", "running %s: %w", p.Path, err)
	}
	return out.String(), nil
}

// environment is all that pipelock gets to see: it scans its environment for
// secrets, reads licence keys and crash-report settings from it, and has no
// business with ours.
func environment(home string) []string {
	return []string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=" + home}
}

// tail keeps the last bytes that were written to it.
type tail struct {
	max int
	buf []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.buf = append(t.buf, b...)
	if over := len(t.buf) - t.max; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(b), nil
}

func (t *tail) String() string { return string(t.buf) }

var _ io.Writer = (*tail)(nil)

// firstOf gives pipelock's complaint: the first line that is one, or otherwise
// the fallback. pipelock prints the message of check twice.
func firstOf(output, fallback string) string {
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if msg, ok := strings.CutPrefix(line, "Config validation FAILED: "); ok {
			return clip(msg + following(output, line))
		}
	}
	if s := clip(output); s != "" {
		return s
	}
	return fallback
}

// following adds the indented lines that belong to the one that was found.
func following(output, line string) string {
	_, rest, _ := strings.Cut(output, line)
	var more strings.Builder
	for l := range strings.Lines(strings.TrimPrefix(rest, "\n")) {
		if !strings.HasPrefix(l, " ") {
			break
		}
		more.WriteString(" " + strings.TrimSpace(l))
	}
	return more.String()
}

// clip makes one line of bounded length of what another program printed.
func clip(s string) string {
	const most = 600
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > most {
		s = s[:most] + "…"
	}
	return string(bytes.ToValidUTF8([]byte(s), []byte("?")))
}
