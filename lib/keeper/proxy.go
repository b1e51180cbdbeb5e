package keeper

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
)

// proxyKeeper keeps pipelock alive where the plan has it as the gate's
// upstream. With the built-in proxy it is empty.
type proxyKeeper struct {
	k    *keeper
	prog *pipelock.Program
	opts pipelock.Options
	quit chan struct{}
	done chan struct{}
	once sync.Once

	mu   sync.Mutex
	proc *pipelock.Proc
}

func startProxy(ctx context.Context, k *keeper) (*proxyKeeper, error) {
	if k.cfg.Pipelock == "" {
		return &proxyKeeper{}, nil
	}
	eg, err := k.doc.Egress()
	if err != nil {
		return nil, err
	}
	if eg.Pipelock == nil {
		return nil, fault.New(fault.Data, "no_pipelock_policy", "the document has no pipelock policy").
			WithHint("pipelock cannot run with an empty allowlist; use egress.proxy: builtin")
	}
	prog, err := pipelock.Find(ctx, func(name string) string {
		if name == "BOTTLE_PIPELOCK" {
			return k.cfg.Pipelock
		}
		return os.Getenv(name)
	})
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(k.bottle.Dir, "pipelock")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	p := &proxyKeeper{k: k, prog: prog, quit: make(chan struct{}), done: make(chan struct{})}
	p.opts = pipelock.Options{Dir: dir, Policy: []byte(eg.Pipelock.YAML), InstanceID: k.cfg.ID}
	if len(k.live.rules) > 0 {
		if p.opts.Policy, _, err = p.policyFor(k.live.rules); err != nil {
			return nil, err
		}
	}
	proc, err := p.launch(ctx)
	if err != nil {
		return nil, err
	}
	p.proc = proc
	go p.supervise(proc)
	return p, nil
}

func (p *proxyKeeper) launch(ctx context.Context) (*pipelock.Proc, error) {
	p.mu.Lock()
	opts := p.opts
	if p.proc != nil {
		// The gate need not be replaced if it comes back where it was.
		opts.Listen = p.proc.Addr()
	}
	p.mu.Unlock()
	proc, err := p.prog.Start(ctx, opts)
	if err != nil {
		return nil, err
	}
	if err := p.k.record(roleProxy, proc.PID()); err != nil {
		_ = proc.Stop()
		return nil, err
	}
	return proc, nil
}

func (p *proxyKeeper) supervise(proc *pipelock.Proc) {
	defer close(p.done)
	wait := restartFirst
	for {
		select {
		case <-p.quit:
			_ = proc.Stop()
			return
		case <-proc.Exited():
		}
		p.k.logf("pipelock ended (%v); the bottle has no way out until it is back", proc.Wait())
		for proc = nil; proc == nil; wait = min(2*wait, restartMost) {
			select {
			case <-p.quit:
				return
			case <-time.After(wait):
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			next, err := p.launch(ctx)
			cancel()
			if err != nil {
				p.k.logf("restarting pipelock: %v", err)
				continue
			}
			proc = next
		}
		p.mu.Lock()
		moved := p.proc.Addr() != proc.Addr()
		p.proc = proc
		p.mu.Unlock()
		p.k.logf("pipelock is back, process %d", proc.PID())
		if moved {
			p.k.gate.restart() // its upstream is at another port now
		}
	}
}

func (p *proxyKeeper) addr() string {
	if p.prog == nil {
		return ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.proc.Addr().String()
}

func (p *proxyKeeper) ref() plan.ProxyRef {
	if p.prog == nil {
		return plan.ProxyRef{Name: "builtin"}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return plan.ProxyRef{Name: "pipelock", RunConfigSHA256: p.proc.RunConfigSHA256()}
}

func (p *proxyKeeper) status() string {
	if p.prog == nil {
		return "none"
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.proc.Exited():
		return "down"
	default:
		return "up"
	}
}

// stop may be called on nil and more than once.
func (p *proxyKeeper) stop() error {
	if p == nil || p.prog == nil {
		return nil
	}
	p.once.Do(func() { close(p.quit) })
	<-p.done
	return nil
}
