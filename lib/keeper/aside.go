package keeper

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gateproc"
	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/sidecar"
	"github.com/bottle-tools/bottle/lib/trust"
)

// asideKeeper keeps mitmdump alive where the plan has addons for it. Without it
// is empty.
type asideKeeper struct {
	k    *keeper
	opts sidecar.Options
	cert []byte // of its authority
	back *os.File
	quit chan struct{}
	done chan struct{}
	once sync.Once

	mu         sync.Mutex
	proc       *sidecar.Proc
	supervised bool
}

// startAside launches mitmdump, which takes seconds to serve; awaitReady waits
// for it. Its way back into the gate is a socket that this process holds, so
// that no other can take it while a gate is replaced.
func startAside(k *keeper) (*asideKeeper, error) {
	m := k.plan.Egress.Mitmdump
	if m == nil {
		return &asideKeeper{}, nil
	}
	at := trust.Place{Base: k.cfg.Base, Home: k.cfg.UserHome}
	addons, err := sidecar.Load(m.Addons, func(p string) ([]byte, error) {
		path, err := at.Path(p)
		if err != nil {
			return nil, err
		}
		return trust.ReadFile(path, manifest.MaxFile)
	})
	if err != nil {
		return nil, err
	}
	hosts := k.inspected()
	if len(hosts) == 0 {
		return nil, fault.New(fault.Data, "bad_addon", "the plan has addons of mitmdump, and no inspected host").WithHint("name one in egress.inspect")
	}
	authority, err := ca.New(k.cfg.ID+" mitmdump", hosts, k.now(), caLife)
	if err != nil {
		return nil, err
	}
	key, err := authority.Marshal()
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, fault.New(fault.Unavailable, "sidecar_failed", "a port for mitmdump's way back: %w", err)
	}
	defer l.Close()
	a := &asideKeeper{k: k, cert: authority.CertPEM(), quit: make(chan struct{}), done: make(chan struct{})}
	if a.back, err = l.(*net.TCPListener).File(); err != nil {
		return nil, fault.New(fault.Unavailable, "sidecar_failed", "a port for mitmdump's way back: %w", err)
	}
	dir := filepath.Join(k.bottle.Dir, "mitmdump")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	a.opts = sidecar.Options{
		Program: k.cfg.Mitmdump, Dir: dir, Addons: addons, Back: l.Addr().String(), BackAuth: sidecar.NewAuth(),
		Authority: key, BackCA: k.caCert, Host: probeHost(hosts[0]),
	}
	a.proc, err = a.launch()
	return a, err
}

// probeHost is a host that its authority covers; none is connected to.
func probeHost(h string) string {
	if below, wild := strings.CutPrefix(h, "*."); wild {
		return "probe." + below
	}
	return h
}

// launch starts a mitmdump with a word of its own: that of one before it may
// have been told to whoever took its port.
func (a *asideKeeper) launch() (*sidecar.Proc, error) {
	a.opts.Auth = sidecar.NewAuth()
	p, err := sidecar.Start(a.opts, netip.AddrPort{})
	if err != nil {
		return nil, err
	}
	if err := a.k.record(roleAside, p.PID()); err != nil {
		p.Stop()
		if f := fault.As(err); f.Code == "engine_died" { // it ended at once, and knows why
			return nil, p.Wait()
		}
		return nil, err
	}
	return p, nil
}

// awaitReady waits for the first mitmdump and then starts to supervise it.
func (a *asideKeeper) awaitReady(ctx context.Context) error {
	if a == nil || a.k == nil {
		return nil
	}
	if err := a.proc.Ready(ctx); err != nil {
		return err
	}
	a.mu.Lock()
	a.supervised = true
	a.mu.Unlock()
	go a.supervise(a.proc)
	return nil
}

// supervise replaces a mitmdump that ended. Until the next one serves, the gate
// finds nobody at its port, and has no other way to inspected hosts.
func (a *asideKeeper) supervise(p *sidecar.Proc) {
	defer close(a.done)
	wait := restartFirst
	for {
		begun := a.k.now()
		select {
		case <-a.quit:
			p.Stop()
			return
		case <-p.Exited():
		}
		a.k.logf("%v; inspected hosts cannot be reached until it is back", p.Wait())
		for p = nil; p == nil; wait = min(2*wait, restartMost) {
			if a.k.now().Sub(begun) > steady {
				wait = restartFirst
			}
			select {
			case <-a.quit:
				return
			case <-time.After(wait):
			}
			p = a.relaunch()
		}
	}
}

func (a *asideKeeper) relaunch() *sidecar.Proc {
	p, err := a.launch()
	if err != nil {
		a.k.logf("restarting mitmdump: %v", err)
		return nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-a.quit:
			cancel()
		case <-ctx.Done():
		}
	}()
	if err := p.Ready(ctx); err != nil {
		a.k.logf("restarting mitmdump: %v", err)
		p.Stop()
		return nil
	}
	a.mu.Lock()
	a.proc = p
	a.mu.Unlock()
	a.k.logf("mitmdump is back, process %d", p.PID())
	a.k.gate.restart() // it is at another port now, and has another word
	return p
}

// config is what the gate has to know; nil without a sidecar.
func (a *asideKeeper) config() *gateproc.Sidecar {
	if a == nil || a.k == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return &gateproc.Sidecar{Name: sidecar.Name, Addr: a.proc.Addr().String(), Auth: a.proc.Auth(), BackAuth: a.opts.BackAuth,
		CA: a.cert, Back: a.back}
}

func (a *asideKeeper) ref() *plan.SidecarRef {
	if a == nil || a.k == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return &plan.SidecarRef{Name: sidecar.Name, RunConfigSHA256: a.proc.RunConfigSHA256()}
}

func (a *asideKeeper) report() *control.Sidecar {
	if a == nil || a.k == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return &control.Sidecar{Program: a.opts.Program, Listen: a.proc.Addr().String(), Back: a.opts.Back}
}

func (a *asideKeeper) status() string {
	if a == nil || a.k == nil {
		return ""
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-a.proc.Exited():
		return "down"
	default:
		return "up"
	}
}

// stop may be called on nil and more than once.
func (a *asideKeeper) stop() {
	if a == nil || a.proc == nil {
		return
	}
	a.once.Do(func() { close(a.quit) })
	a.mu.Lock()
	supervised := a.supervised
	a.mu.Unlock()
	if supervised {
		<-a.done
	} else {
		a.proc.Stop()
	}
}
