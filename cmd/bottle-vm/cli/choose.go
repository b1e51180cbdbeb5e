package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

// choice is an engine that works here.
type choice struct {
	engine.Engine
	why string
}

// chooseEngines gives the plan's candidates that work here, best first. With
// runtime auto an engine that needs hardware counts as working only once it has
// booted something on this host; with one engine asked for, its own start is
// the proof.
//
// away are the folders that the guest may write: no engine's program may lie
// there.
func (v *vm) chooseEngines(ctx context.Context, b *plan.Bottle, root *state.Root, away []string) ([]choice, error) {
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
			err = v.booted(ctx, e, root)
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
		works = append(works, choice{e, why})
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
type checks map[string]checked

// checked is what one boot check found. What worked once is believed until the
// key changes. What failed may have been a machine that was busy, or a group that
// the user has joined since.
type checked struct {
	Why string    `json:"why"` // "" for ok, or why not
	At  time.Time `json:"at"`
}

// failedFor is how long a failure is believed.
const failedFor = time.Hour

const checksFile = "engine-checks.json"

func (c checked) holds(now time.Time) bool {
	return c.Why == "" || !now.Before(c.At) && now.Sub(c.At) < failedFor
}

// versioned is an engine whose boot has to be proved anew for each version. One
// without needs no hardware and is checked by its start.
type versioned interface {
	Version(context.Context) (string, error)
}

func checkKey(ctx context.Context, e engine.Engine) (key string, ok bool, err error) {
	v, ok := e.(versioned)
	if !ok {
		return "", false, nil
	}
	version, err := v.Version(ctx)
	return hostKey() + " " + e.Name() + " " + version, true, err
}

// booted runs the engine's boot check once for a host, kernel and version.
func (v *vm) booted(ctx context.Context, e engine.Engine, root *state.Root) error {
	key, ok, err := checkKey(ctx, e)
	if err != nil || !ok {
		return err
	}
	found, seen := readChecks(root)[key]
	if !seen || !found.holds(v.p.Now()) {
		tellFirst(ctx, e, v.p.Stderr)
		err := bootCheck(ctx, e)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if found, err = noteCheck(root, key, err, v.p.Now()); err != nil {
			return err
		}
	}
	if found.Why != "" {
		return fault.New(fault.Host, "engine_unfit", "%s", found.Why).WithHint("bottle-vm doctor checks again")
	}
	return nil
}

func readChecks(root *state.Root) checks {
	known := checks{}
	if raw, err := os.ReadFile(filepath.Join(root.Dir, checksFile)); err == nil {
		if json.Unmarshal(raw, &known) != nil {
			known = checks{} // unreadable: check again
		}
	}
	return known
}

// noteCheck remembers what a boot check found.
func noteCheck(root *state.Root, key string, err error, now time.Time) (checked, error) {
	found := checked{At: now.UTC().Truncate(time.Second)}
	if err != nil {
		found.Why = err.Error()
	}
	known := readChecks(root)
	known[key] = found
	return found, root.WriteFile(checksFile, known)
}

// tellFirst says why a start takes longer than others, before it does.
func tellFirst(ctx context.Context, e engine.Engine, w io.Writer) {
	if f, ok := e.(engine.FirstStarter); ok {
		if what, _ := f.FirstStart(ctx); what != "" {
			fmt.Fprintf(w, "bottle-vm: %s\n", what)
		}
	}
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
