package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gitguard"
)

// guard runs gitguard over the bottle's life and remembers what it found.
type guard struct {
	g      *gitguard.Guard // nil before the start got that far
	binds  []engine.Bind
	cancel context.CancelFunc
	done   chan struct{}
	swept  bool

	mu    sync.Mutex
	found []string
	bytes int // of found
	more  int // that found no room
}

// Bounds of what is told of findings: a guest brings them about, as many as it
// likes and with names of its own, and the keeper's answers have to stay short
// enough for the owner's commands. What is taken away is so all the same.
const (
	maxFound      = 1000
	maxFoundBytes = 64 << 10
)

// noGuard is the guard of a bottle that never started.
func noGuard() *guard { return &guard{} }

func newGuard(k *keeper) (*guard, error) {
	o := gitguard.Options{
		Workspace: k.cfg.Workspace, Mode: k.plan.Workspace.Mode, Hide: k.plan.Hide, Conceal: k.cfg.Conceal,
		EmptyFile: k.bottle.Path("empty-file"), EmptyDir: k.bottle.Path("empty-dir"), Home: k.cfg.UserHome,
	}
	for _, m := range k.cfg.Mounts {
		if !m.ReadOnly {
			o.Writable = append(o.Writable, m.Source)
		}
	}
	if k.cfg.Manifest != "" {
		o.ReadOnly = []string{k.cfg.Manifest}
	}
	// What is mounted over hidden things: readable for whoever the guest is
	// mapped to, writable for nobody.
	// Modes are set and not only asked for: a umask must not lock that user out.
	err := errors.Join(
		os.WriteFile(o.EmptyFile, nil, 0o444), os.Chmod(o.EmptyFile, 0o444),
		os.Mkdir(o.EmptyDir, 0o555), os.Chmod(o.EmptyDir, 0o555))
	if err != nil {
		return nil, fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	g, err := gitguard.Plan(o)
	if err != nil {
		return nil, err
	}
	g.KeepIn(func() (string, error) { return k.root.Aside(k.cfg.ID) })
	// For whoever clears up behind a keeper that was killed.
	if err := g.Persist(k.bottle.Path(gitguard.StateFile)); err != nil {
		return nil, err
	}
	if c, ok := k.eng.(engine.Coverer); ok {
		ref := engine.Ref{ID: k.cfg.ID, Dir: k.bottle.Dir, RunDir: k.rec.RunDir, Bottle: k.plan}
		g.OnLost(func(b engine.Bind) error {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			return c.Cover(ctx, ref, b)
		})
	}
	return &guard{g: g, binds: g.Binds}, nil
}

// watch sets aside what appears while the guest runs. A guard that cannot watch
// is a start that fails.
func (g *guard) watch(k *keeper) {
	ctx, cancel := context.WithCancel(context.Background())
	g.cancel, g.done = cancel, make(chan struct{})
	go func() {
		defer close(g.done)
		err := g.g.Watch(ctx, func(f gitguard.Finding) {
			g.note(k, f)
		})
		if err != nil && ctx.Err() == nil {
			// Not from here: the end of the bottle waits for this goroutine.
			go func() { _ = k.halt("the workspace could not be watched any more: " + err.Error()) }()
		}
	}()
}

// note keeps a finding for reports, and writes it into the keeper's log. One that
// is there already, or finds no room, is counted.
func (g *guard) note(k *keeper, f gitguard.Finding) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := f.String()
	switch {
	case slices.Contains(g.found, s):
		return
	case len(g.found) == maxFound || g.bytes+len(s) > maxFoundBytes:
		if g.more++; g.more == 1 {
			k.logf("workspace: more was found than is listed")
		}
		return
	}
	g.found = append(g.found, s)
	g.bytes += len(s)
	k.logf("workspace: %s", s)
}

// report gives what was found so far, one line each.
func (g *guard) report() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := slices.Clone(g.found)
	if g.more > 0 {
		out = append(out, fmt.Sprintf("%d more findings are not listed", g.more))
	}
	return out
}

// unwatch ends the watch, which is for after the guest. It takes some 10 ms: the
// kernel closes an inotify descriptor only when nobody can be using it any more.
func (g *guard) unwatch() {
	if g.cancel != nil {
		g.cancel()
		<-g.done
	}
}

// sweep is the last look, after the guest has ended. It may be called again,
// and looks again if the look before failed.
func (g *guard) sweep(k *keeper) error {
	if g.g == nil || g.swept {
		return nil
	}
	g.unwatch()
	found, err := g.g.Sweep()
	for _, f := range found {
		g.note(k, f)
	}
	g.swept = err == nil
	return err
}
