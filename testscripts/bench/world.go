//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/tidwall/gjson"
)

// callLimit bounds every command that is measured.
const callLimit = 2 * time.Minute

// world is a place of the bench's own: nothing of the user's state, runtime or
// cache is read or written.
type world struct {
	ctx     context.Context // its end stops what is being measured
	repo    string
	bin     string // the tools
	scripts string
	dir     string // short: sockets lie below
	project string
	env     []string
}

func newWorld(ctx context.Context, repo string) (*world, error) {
	bin, scripts := filepath.Join(repo, "bin"), filepath.Join(repo, "scripts")
	for _, name := range []string{"plan", "egress", "pack", "vm", "keeper", "guest", "runsc"} {
		if _, err := os.Stat(filepath.Join(bin, "bottle-"+name)); err != nil {
			return nil, fmt.Errorf("%w; make build makes it", err)
		}
	}
	dir, err := os.MkdirTemp("/tmp", "bottle-bench.")
	if err != nil {
		return nil, err
	}
	w := &world{ctx: ctx, repo: repo, bin: bin, scripts: scripts, dir: dir, project: filepath.Join(dir, "project")}
	for _, d := range []string{"project", "state", "run", "cache", "home", "raw"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			return w, err
		}
	}
	w.env = []string{
		"PATH=" + bin + ":" + scripts + ":" + os.Getenv("PATH"), "HOME=" + filepath.Join(dir, "home"), "LC_ALL=C",
		"XDG_STATE_HOME=" + filepath.Join(dir, "state"), "XDG_RUNTIME_DIR=" + filepath.Join(dir, "run"),
		"XDG_CACHE_HOME=" + filepath.Join(dir, "cache"),
	}
	manifest, err := w.output("bottle-plan", "init")
	if err != nil {
		return w, err
	}
	return w, os.WriteFile(filepath.Join(w.project, "bottle.json"), manifest, 0o600)
}

// close removes every bottle and the folder.
func (w *world) close() error {
	if w == nil {
		return nil
	}
	w.ctx = context.WithoutCancel(w.ctx)
	errs := []error{w.downAll()}
	errs = append(errs, os.RemoveAll(w.dir))
	return errors.Join(errs...)
}

func (w *world) ids() ([]string, error) {
	out, err := w.output("bottle-vm", "ls")
	var ids []string
	for line := range bytes.Lines(out) {
		ids = append(ids, gjson.GetBytes(line, "id").Str)
	}
	return ids, err
}

func (w *world) downAll() error {
	ids, err := w.ids()
	if err != nil || len(ids) == 0 {
		return err
	}
	return w.run("bottle-vm", append([]string{"down"}, ids...)...)
}

// command in the project's folder, with the world's environment and an empty
// stdin.
func (w *world) command(name string, args ...string) *exec.Cmd {
	path := name
	if !filepath.IsAbs(path) {
		path = filepath.Join(w.bin, name)
	}
	cmd := exec.Command(path, args...)
	cmd.Env, cmd.Dir = w.env, w.project
	return cmd
}

func (w *world) output(name string, args ...string) ([]byte, error) {
	var out bytes.Buffer
	cmd := w.command(name, args...)
	cmd.Stdout = &out
	err := w.pipeline(cmd)
	return out.Bytes(), err
}

func (w *world) run(name string, args ...string) error { return w.pipeline(w.command(name, args...)) }

// pipeline runs commands as a shell would, each reading what the one before it
// writes, and gives the failures with what was said on stderr.
func (w *world) pipeline(cmds ...*exec.Cmd) error {
	said := make([]bytes.Buffer, len(cmds))
	for i, cmd := range cmds {
		if cmd.Stderr == nil {
			cmd.Stderr = &said[i]
		}
		cmd.WaitDelay = time.Second
		if i == 0 {
			continue
		}
		in, out, err := os.Pipe()
		if err != nil {
			return err
		}
		defer in.Close()
		defer out.Close()
		cmds[i-1].Stdout, cmd.Stdin = out, in
	}
	ctx, cancel := context.WithTimeout(w.ctx, callLimit)
	defer cancel()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var errs []error
	started := 0
	for i, cmd := range cmds {
		if err := cmd.Start(); err != nil {
			errs = append(errs, err)
			break
		}
		started++
		// The child has its ends now; ours would keep the pipe open.
		closePipe(cmd.Stdin)
		if i < len(cmds)-1 {
			closePipe(cmd.Stdout)
		}
	}
	stop := context.AfterFunc(ctx, func() {
		for _, cmd := range cmds[:started] {
			_ = cmd.Process.Signal(os.Interrupt) // up takes its bottle back
		}
	})
	defer stop()
	for i, cmd := range cmds[:started] {
		if err := cmd.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(said[i].String())))
		}
	}
	return errors.Join(errs...)
}

func closePipe(stream any) {
	if f, ok := stream.(*os.File); ok {
		f.Close()
	}
}

// up starts a bottle with all four stages, or with the two that are needed, and
// gives its id.
func (w *world) up(stages int) (string, error) {
	var id bytes.Buffer
	plan, vm := w.command("bottle-plan", "bash"), w.command("bottle-vm", "up", "--print-id")
	vm.Stdout = &id
	cmds := []*exec.Cmd{plan, w.command("bottle-egress"), w.command("bottle-pack"), vm}
	if stages == 2 {
		cmds = []*exec.Cmd{plan, vm}
	}
	err := w.pipeline(cmds...)
	return strings.TrimSpace(id.String()), err
}

// together runs n calls at once.
func together(n int, fn func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = fn(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// pairs takes turns: one of ours, one beside it, in each round, after one round
// that does not count. tidy is called after each, untimed; it may be nil.
func pairs(rounds int, ours, beside func() error, tidyOurs, tidyBeside func() error) (o, b []float64, err error) {
	one := func(fn, tidy func() error, into *[]float64, counts bool) error {
		ms, err := milliseconds(fn)
		if tidy != nil {
			err = errors.Join(err, tidy())
		}
		if counts && err == nil {
			*into = append(*into, ms)
		}
		return err
	}
	for i := range rounds + 1 {
		if err := one(ours, tidyOurs, &o, i > 0); err != nil {
			return o, b, err
		}
		if err := one(beside, tidyBeside, &b, i > 0); err != nil {
			return o, b, err
		}
	}
	return o, b, nil
}
