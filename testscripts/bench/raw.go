//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// raw is runsc by itself, with the very flags, configuration and mounts of a
// bottle: they are taken from one that is started with a runsc that first lets
// the bench look. Only its first process is another, since the guest helper
// wants its keeper.
type raw struct {
	w      *world
	stock  string   // runsc as gVisor's Go module makes it, of the version that bottle-runsc is
	slim   string   // bottle-runsc
	bottle string   // whose configuration it is; it runs until the end
	flags  []string // runsc's global ones, without --root and --log
	bundle string
	mounts *os.File // mount namespace; as root the bundle is in one of its own
	next   atomic.Int64
}

// wrapper stands in for runsc until the bench has seen what it would be told.
const wrapper = `#!/bin/sh
PATH=/usr/bin:/bin
for a; do [ "$a" = run ] && run=1; done
if [ -n "${run-}" ]; then
	printf '%%s\n' "$@" >'%[1]s/argv'
	echo $$ >'%[1]s/pid.new' && mv '%[1]s/pid.new' '%[1]s/pid'
	until [ -e '%[1]s/go' ]; do sleep 0.02; done
fi
exec '%[2]s' "$@"
`

func newRaw(w *world) (*raw, error) {
	stock, err := stockRunsc(w)
	if err != nil {
		return nil, err
	}
	r := &raw{w: w, stock: stock, slim: filepath.Join(w.bin, "bottle-runsc")}
	dir := filepath.Join(w.dir, "raw")
	path := filepath.Join(dir, "bottle-runsc")
	script := fmt.Sprintf(wrapper, dir, r.slim)
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		return nil, err
	}
	looked := make(chan error, 1)
	go func() { looked <- errors.Join(r.look(dir), os.WriteFile(filepath.Join(dir, "go"), nil, 0o600)) }()
	other := *w
	other.env = append(slices.Clone(w.env), "BOTTLE_RUNSC="+path)
	id, err := other.up(4)
	r.bottle = id
	return r, errors.Join(err, <-looked)
}

// stockRunsc builds gVisor's own runsc once, below the user's cache folder: what
// there is without this project.
func stockRunsc(w *world) (string, error) {
	module := filepath.Join(w.repo, "tools", "runsc")
	command := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(w.ctx, "go", args...)
		cmd.Dir, cmd.Env, cmd.Stderr = module, append(os.Environ(), "CGO_ENABLED=0"), os.Stderr
		return cmd.Output()
	}
	version, err := command("list", "-m", "-f", "{{.Version}}", "gvisor.dev/gvisor")
	if err != nil {
		return "", fmt.Errorf("the version of gVisor: %w", err)
	}
	base, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	path := filepath.Join(base, "bottle-bench", "runsc-"+strings.TrimSpace(string(version)))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	fmt.Fprintln(os.Stderr, "bench: building gVisor's own runsc, once: it may take minutes")
	if _, err := command("build", "-trimpath", "-ldflags", "-s -w", "-o", path, "gvisor.dev/gvisor/runsc"); err != nil {
		return "", fmt.Errorf("gVisor's own runsc: %w", err)
	}
	return path, nil
}

// look waits for the wrapper and takes its arguments, its configuration and its
// mount namespace.
func (r *raw) look(dir string) error {
	var pid string
	for deadline := time.Now().Add(30 * time.Second); pid == ""; {
		b, err := os.ReadFile(filepath.Join(dir, "pid"))
		pid = strings.TrimSpace(string(b))
		if err != nil && time.Now().After(deadline) {
			return errors.New("no bottle came to start runsc")
		}
		time.Sleep(5 * time.Millisecond)
	}
	argv, err := os.ReadFile(filepath.Join(dir, "argv"))
	if err != nil {
		return err
	}
	if r.mounts, err = os.Open("/proc/" + pid + "/ns/mnt"); err != nil {
		return err
	}
	var bundle string
	for _, a := range strings.Split(strings.TrimSpace(string(argv)), "\n") {
		if a == "run" {
			r.flags = append(r.flags, a)
		}
		if v, ok := strings.CutPrefix(a, "--bundle="); ok {
			bundle = v
		}
		if !slices.Contains(r.flags, "run") && !strings.HasPrefix(a, "--root=") && !strings.HasPrefix(a, "--log=") {
			r.flags = append(r.flags, a)
		}
	}
	r.flags = r.flags[:max(0, len(r.flags)-1)] // without run
	if bundle == "" || len(r.flags) == 0 {
		return fmt.Errorf("runsc was called in a way that the bench does not know: %q", argv)
	}
	r.bundle = filepath.Join(bundle, "raw")
	seen := func(path string) string { return filepath.Join("/proc", pid, "root", path) }
	return rewrite(seen(filepath.Join(bundle, "config.json")), seen(r.bundle))
}

// rewrite puts a copy of an OCI configuration with another first process into
// the new folder dir.
func rewrite(path, dir string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var config map[string]json.RawMessage
	var process map[string]json.RawMessage
	if err := errors.Join(json.Unmarshal(b, &config), json.Unmarshal(config["process"], &process)); err != nil {
		return err
	}
	process["args"] = json.RawMessage(`["/bin/sleep","100000"]`)
	if config["process"], err = json.Marshal(process); err != nil {
		return err
	}
	if b, err = json.Marshal(config); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), b, 0o644)
}

// sandbox is one that raw runsc started.
type sandbox struct {
	raw             *raw
	runsc, id, root string
}

// fresh names a sandbox of runsc's (stock or slim), with a state folder of its
// own, as a bottle has.
func (r *raw) fresh(runsc string) (*sandbox, error) {
	n := strconv.FormatInt(r.next.Add(1), 10)
	s := &sandbox{raw: r, runsc: runsc, id: "raw-" + n, root: filepath.Join(r.w.dir, "raw", n)}
	return s, os.Mkdir(s.root, 0o700)
}

func (s *sandbox) run() error {
	return s.call("run", "--detach", "--bundle="+s.raw.bundle, s.id)
}

func (s *sandbox) remove() error {
	return errors.Join(s.call("delete", "--force", s.id), os.RemoveAll(s.root))
}

// call runs runsc, with no environment, in the namespace of the bundle.
func (s *sandbox) call(args ...string) error {
	return s.raw.inside(func() error {
		cmd := exec.Command(s.runsc, slices.Concat([]string{"--root=" + s.root}, s.raw.flags, args)...)
		cmd.Env, cmd.Dir = []string{}, "/"
		// A file: the sandbox keeps stderr, and nobody waits for its end.
		said, err := os.CreateTemp(s.raw.w.dir, "runsc.*")
		if err != nil {
			return err
		}
		defer os.Remove(said.Name())
		defer said.Close()
		cmd.Stderr = said
		if err := s.raw.w.pipeline(cmd); err != nil {
			text, _ := os.ReadFile(said.Name())
			return fmt.Errorf("%w%s", err, text)
		}
		return nil
	})
}

// inside runs fn on a thread in the bundle's mount namespace, where that is
// another one.
func (r *raw) inside(fn func() error) error {
	if os.Geteuid() != 0 {
		return fn()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(int(r.mounts.Fd()), unix.CLONE_NEWNS)
		}
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}
