package keeper

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/plan"
)

const sampleEvery = 500 * time.Millisecond

// monitor holds the limits that the plan lets be watched: it samples, and ends
// a guest that is above one.
type monitor struct {
	quit chan struct{}
	once sync.Once
}

// startMonitor starts nothing, and returns nil, where no limit is watched: what
// something else holds is not a reason to end a guest.
func startMonitor(k *keeper, held plan.Enforcement) *monitor {
	meter, ok := k.eng.(engine.Meter)
	if !ok || held.Memory != "watched" && held.Pids != "watched" {
		return nil
	}
	m := &monitor{quit: make(chan struct{})}
	go m.run(k, meter, held)
	return m
}

func (m *monitor) run(k *keeper, meter engine.Meter, held plan.Enforcement) {
	ref := engine.Ref{ID: k.cfg.ID, Dir: k.bottle.Dir, RunDir: k.rec.RunDir, Bottle: k.plan}
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for failures := 0; ; {
		select {
		case <-m.quit:
			return
		case <-k.ended:
			return
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		u, err := meter.Usage(ctx, ref)
		cancel()
		if err != nil {
			// A limit that cannot be read is not held.
			if failures++; failures == 5 {
				_ = k.halt(fmt.Sprintf("its limits could not be watched any more: %v", err))
				return
			}
			continue
		}
		failures = 0
		if over := overLimit(k.plan.Resources, held, u); over != "" {
			_ = k.halt(over)
			return
		}
	}
}

func overLimit(r plan.Resources, held plan.Enforcement, u engine.Usage) string {
	switch {
	case held.Memory == "watched" && u.MemoryBytes > int64(r.MemoryMiB)<<20:
		return fmt.Sprintf("it used %d MiB of memory, its limit is %d (watched)", u.MemoryBytes>>20, r.MemoryMiB)
	case held.Pids == "watched" && u.Pids > r.Pids:
		return fmt.Sprintf("it had %d processes, its limit is %d (watched)", u.Pids, r.Pids)
	}
	return ""
}

// stop may be called on nil and more than once.
func (m *monitor) stop() {
	if m != nil {
		m.once.Do(func() { close(m.quit) })
	}
}
