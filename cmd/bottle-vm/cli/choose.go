package cli

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

// choice is an engine that works here.
type choice struct{ name, why string }

// chooseEngines gives the plan's candidates that work here, best first. With
// runtime auto an engine that needs hardware counts as working only once it has
// booted something on this host; with one engine asked for, its own start is
// the proof.
//
// away are the folders that the guest may write: no engine's program may lie
// there.
func chooseEngines(ctx context.Context, b *plan.Bottle, root *state.Root, away []string) ([]choice, error) {
	var works []choice
	var passed passedOver
	for _, c := range b.Runtime.Candidates {
		e, err := engines.Find(c.Engine)
		if err == nil {
			if k, ok := e.(interface{ KeepAway([]string) }); ok {
				k.KeepAway(away)
			}
			err = e.Available(ctx)
		}
		if err == nil && b.Runtime.Requested == "auto" {
			err = booted(ctx, e, root)
		}
		if err != nil {
			if len(b.Runtime.Candidates) == 1 {
				return nil, err
			}
			passed = passed.add(c.Engine, err)
			continue
		}
		why := "the plan asks for it"
		if b.Runtime.Requested == "auto" {
			why = "first candidate that works here"
			if len(passed) > 0 {
				why = "not " + strings.Join(passed, "; not ")
			}
		}
		works = append(works, choice{e.Name(), why})
	}
	if len(works) == 0 {
		return nil, fault.New(fault.Unavailable, "no_engine", "no engine works here: %s", strings.Join(passed, "; ")).
			WithHint("bottle-vm doctor tells what to do")
	}
	return works, nil
}

// passedOver are engines and why they were not taken.
type passedOver []string

func (p passedOver) add(engine string, err error) passedOver {
	return append(p, engine+": "+strings.TrimPrefix(err.Error(), engine+": "))
}

// checks is engine-checks.json: what booted on this host, by a key that changes
// with the host, its kernel and the engine's version.
type checks map[string]string // key -> "" for ok, or why not

// booted runs the engine's boot check once for a host, kernel and version. An
// engine without Version needs no hardware and is checked by its start.
func booted(ctx context.Context, e engine.Engine, root *state.Root) error {
	versioned, ok := e.(interface {
		Version(context.Context) (string, error)
	})
	if !ok {
		return nil
	}
	version, err := versioned.Version(ctx)
	if err != nil {
		return err
	}
	path := filepath.Join(root.Dir, "engine-checks.json")
	known := checks{}
	if raw, err := os.ReadFile(path); err == nil {
		_ = json.Unmarshal(raw, &known) // unreadable: check again
	}
	key := hostKey() + " " + e.Name() + " " + version
	why, seen := known[key]
	if !seen {
		err := bootCheck(ctx, e)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			why = err.Error()
		}
		known[key] = why
		if err := root.WriteFile("engine-checks.json", known); err != nil {
			return err
		}
	}
	if why != "" {
		return fault.New(fault.Host, "engine_unfit", "%s", why).WithHint("bottle-vm doctor checks again")
	}
	return nil
}

func hostKey() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	host, _ := os.Hostname()
	return host + " " + unix.ByteSliceToString(u.Release[:])
}

func bootCheck(ctx context.Context, e engine.Engine) error {
	dir, err := os.MkdirTemp("", "bottle-check-")
	if err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	defer state.RemoveAll(dir)
	return e.Check(ctx, dir)
}
