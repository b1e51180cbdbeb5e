//go:build linux

package main

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// The peer: @anthropic-ai/sandbox-runtime, at the version of srt/package.json,
// with what its lock file names.
var (
	//go:embed srt/package.json
	peerPackage []byte
	//go:embed srt/package-lock.json
	peerLock []byte
)

// peerSettings: an allow list, and the project may be written, as in the bottle
// beside it (srt's README, "Configuration").
const peerSettings = `{
  "network": {"allowedDomains": ["api.anthropic.com"], "deniedDomains": []},
  "filesystem": {"denyRead": [], "allowWrite": ["."], "denyWrite": []}
}
`

// peer is an installed srt.
type peer struct {
	w        *world
	exe      string
	settings string
	env      []string
}

// newPeer installs srt into cache, once. An error means that this machine
// cannot run it.
func newPeer(w *world, cache string) (*peer, error) {
	for _, need := range []string{"node", "npm", "bwrap", "socat", "rg"} {
		if _, err := exec.LookPath(need); err != nil {
			return nil, fmt.Errorf("%w; it needs node, npm, bubblewrap, socat and ripgrep (apt-get install)", err)
		}
	}
	p := &peer{w: w, exe: filepath.Join(cache, "node_modules", ".bin", "srt"), settings: filepath.Join(w.dir, "srt.json")}
	// The user's own environment: node may be a shim that wants it.
	p.env = os.Environ()
	if err := os.WriteFile(p.settings, []byte(peerSettings), 0o600); err != nil {
		return nil, err
	}
	if err := install(w, cache, p.exe); err != nil {
		return nil, err
	}
	return p, p.check()
}

func install(w *world, cache, exe string) error {
	if _, err := os.Stat(exe); err == nil {
		if have, err := os.ReadFile(filepath.Join(cache, "package-lock.json")); err == nil && string(have) == string(peerLock) {
			return nil
		}
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return err
	}
	for name, content := range map[string][]byte{"package.json": peerPackage, "package-lock.json": peerLock} {
		if err := os.WriteFile(filepath.Join(cache, name), content, 0o600); err != nil {
			return err
		}
	}
	fmt.Fprintln(os.Stderr, "bench: installing the peer with npm into "+cache)
	cmd := exec.Command("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
	cmd.Dir = cache
	if err := w.pipeline(cmd); err != nil {
		// npm ci may leave half of it, which must not pass for a whole.
		return errors.Join(err, os.RemoveAll(filepath.Join(cache, "node_modules")))
	}
	return nil
}

// check looks that the sandbox works and has its network taken away.
func (p *peer) check() error {
	out, err := p.command("echo hi").Output()
	if err != nil || strings.TrimSpace(string(out)) != "hi" {
		return fmt.Errorf("srt does not work here: %q, %w", out, err)
	}
	out, err = p.command("cat /proc/net/dev").Output()
	if err != nil || strings.Contains(string(out), "eth0") {
		return fmt.Errorf("srt leaves the host's network in the sandbox: %q, %w", out, err)
	}
	return nil
}

func (p *peer) command(line string) *exec.Cmd {
	cmd := exec.Command(p.exe, "-s", p.settings, "-c", line)
	cmd.Dir, cmd.Env = p.w.project, p.env
	return cmd
}

func (p *peer) run() error { return p.w.pipeline(p.command("echo hi")) }

// version of the node that it runs on, which its time depends on.
func (p *peer) version() string {
	out, err := exec.Command("node", "--version").Output()
	if err != nil {
		return "node of unknown version"
	}
	return "node " + strings.TrimSpace(string(out))
}
