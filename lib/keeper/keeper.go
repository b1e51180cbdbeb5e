package keeper

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engines"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/fdpass"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/trust"
)

// Times of a keeper.
const (
	startLimit  = 10 * time.Minute // a guest on a slow machine is waited for
	gateGrace   = 200 * time.Millisecond
	caLife      = 30 * 24 * time.Hour
	ownerPeriod = 500 * time.Millisecond // where a pidfd of the owner cannot be had
)

// keeper is the state of one run. mu guards what the control socket reads and
// supervisors write.
type keeper struct {
	cfg    Config
	root   *state.Root
	bottle *state.Bottle
	doc    *plan.Doc
	plan   *plan.Bottle
	eng    engine.Engine
	log    *os.File
	now    func() time.Time
	roots  func() ([]byte, error) // the host's trusted roots, read once

	caPEM, caCert []byte
	gate          *gateKeeper
	live          *liveRules
	proxy         *proxyKeeper
	aside         *asideKeeper
	guard         *guard
	monitor       *monitor

	mu     sync.Mutex
	rec    *state.Record
	phase  string // state.Starting | state.Ready | stopped
	reason string

	greeter *greeter // of a guest with a socket; nil without

	ended  chan struct{} // the guest has ended, for this reason
	why    string
	ending sync.Mutex // held by the one that ends the bottle

	lock   *os.File       // closed, it would be given up: by the garbage collector, too
	socket net.Listener   // of the owner's commands
	gates  []net.Listener // of the guest
	handed chan struct{}  // closed when another keeper has the bottle

	handing bool               // another keeper is being given it; with mu
	leaving context.Context    // ends when the bottle is not wanted any more
	leave   context.CancelFunc // ends it
}

const stopped = state.Stopped

// Run is the body of bottle-keeper: it reads Config from stdin, answers on
// reply, and returns when the bottle is removed. ctx ends with SIGTERM.
func Run(ctx context.Context, stdin io.Reader, reply io.WriteCloser, log *os.File) error {
	// It takes as long as all that comes before it is needed, so it begins now.
	roots := sync.OnceValues(ca.SystemRoots)
	go roots()
	k, err := open(stdin, log)
	if k == nil {
		return err // up went away before it had anything for us
	}
	k.roots = roots
	var started *engine.Started
	if err == nil {
		started, err = k.start(ctx)
	}
	if err == nil {
		// Before up says that the bottle is there: the next command asks for it.
		k.socket, err = k.control()
	}
	if err != nil {
		k.logf("start failed: %v", err)
		if k.cfg.Again && ctx.Err() == nil {
			return k.fallBack(reply, err)
		}
		if ctx.Err() != nil {
			// Whatever the end cut off looks like a failure of its own.
			err = fault.New(fault.Unavailable, "start_ended", "bottle %s was removed while it was being started", k.cfg.ID).
				WithHint("bottle-vm down, bottle-gc or a signal to its keeper ended it; start a new one")
		}
		removeErr := k.remove()
		r := Reply{Error: plan.NewFailure("vm", err)}
		if removeErr != nil {
			r.Warnings = []string{"clearing up after the failed start: " + removeErr.Error()}
		}
		_ = send(reply, r) // the caller may be gone, with or without it
		return err
	}
	defer func() { k.socket.Close() }()
	if err := send(reply, Reply{Document: k.doc.Line(), Warnings: k.guard.report()}); err != nil && !k.cfg.Again {
		// An up that was killed: nobody knows of the bottle.
		k.logf("who started the bottle is gone: %v", err)
		return k.remove()
	}
	// What the start used up is two fifths of what the keeper holds by now.
	k.roots = nil
	debug.FreeOSMemory()
	k.serve(ctx, started)
	k.leave()
	k.ending.Lock() // a start of the stopped bottle may be under way
	handed := false
	select {
	case <-k.handed:
		handed = true
	default:
	}
	k.ending.Unlock()
	if handed {
		return nil
	}
	return k.remove()
}

func send(w io.WriteCloser, r Reply) error {
	raw, err := json.Marshal(r)
	if err == nil {
		_, err = w.Write(append(raw, '\n'))
	}
	return errors.Join(err, w.Close())
}

// logf writes one line: the guest names files that are told of, and could
// otherwise fake lines, and move the terminal of whoever reads the log.
func (k *keeper) logf(format string, args ...any) {
	line := fault.Line(fmt.Sprintf(format, args...))
	fmt.Fprintf(k.log, "%s keeper: %s\n", k.now().UTC().Format(time.RFC3339), line)
}

// open takes the config, the lock and the record over from up.
func open(stdin io.Reader, log *os.File) (*keeper, error) {
	line, err := bufio.NewReaderSize(stdin, 1<<20).ReadBytes('\n')
	if err != nil {
		return nil, fault.New(fault.Data, "no_config", "no config on stdin: %w", err)
	}
	k := &keeper{log: log, now: time.Now, phase: state.Starting, ended: make(chan struct{}), handed: make(chan struct{})}
	if err := json.Unmarshal(line, &k.cfg); err != nil {
		return nil, fault.New(fault.Data, "no_config", "config: %w", err)
	}
	k.leaving, k.leave = context.WithCancel(context.Background())
	k.live = newLive(k)
	k.root = &state.Root{Dir: k.cfg.StateDir, RunDir: k.cfg.RunRoot}
	k.bottle = k.root.Bottle(k.cfg.ID)
	if k.lock, err = k.bottle.Lock(); err != nil {
		return nil, err
	}
	if k.rec, err = k.bottle.Load(); err != nil {
		return nil, err
	}
	self, err := state.Identify(os.Getpid())
	if err != nil {
		return nil, fault.New(fault.Host, "no_proc", "this host does not tell process identities: %w", err)
	}
	k.rec.Keeper, k.rec.Phase = &self, state.Starting
	eng, engErr := engines.Find(k.cfg.Runtime)
	if engErr == nil {
		k.eng, k.rec.Engine = eng, eng.Name()
	}
	if err := k.bottle.Save(k.rec); err != nil {
		return nil, err
	}
	k.guard = noGuard()
	if k.doc, err = plan.Parse(k.cfg.Document); err != nil {
		return k, err
	}
	if k.plan, err = k.doc.Bottle(); err != nil {
		return k, err
	}
	return k, engErr
}

// record notes a started process before the next one is started.
func (k *keeper) record(role string, pid int) error {
	id, err := state.Identify(pid)
	if err != nil {
		return fault.New(fault.Unavailable, "engine_died", "%s ended as it was started: %w", role, err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	// A replaced gate takes the place of the dead one.
	k.rec.Processes = slices.DeleteFunc(k.rec.Processes, func(c state.Child) bool {
		return c.Role == role && !state.Alive(c.Process)
	})
	k.rec.Processes = append(k.rec.Processes, state.Child{Role: role, Process: id})
	return k.bottle.Save(k.rec)
}

func (k *keeper) start(ctx context.Context) (*engine.Started, error) {
	limit := startLimit
	if f, ok := k.eng.(engine.FirstStarter); ok {
		_, more := f.FirstStart(ctx)
		limit += more
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	boot := k.eng.Start
	if k.cfg.Again {
		var err error
		if boot, err = k.prepareAgain(); err != nil {
			return nil, err
		}
	}
	if err := k.makeCA(); err != nil {
		return nil, err
	}
	spec, err := k.spec()
	if err != nil {
		return nil, err
	}
	defer spec.Log.Close()
	if err := k.eng.Prepare(ctx, spec); err != nil {
		return nil, err
	}
	// Proxy and gate come up while the guest boots; nothing is passed on before
	// all are ready.
	if k.proxy, err = startProxy(ctx, k); err != nil {
		return nil, err
	}
	if k.aside, err = startAside(k); err != nil {
		return nil, err
	}
	if k.gate, err = startGate(k); err != nil {
		return nil, err
	}
	ready, err := k.listen(spec)
	if err != nil {
		return nil, err
	}
	started, err := boot(ctx, spec)
	if err != nil {
		return nil, err
	}
	go k.watchGuest(started)
	if err := k.greeter.over(); err != nil {
		return nil, err
	}
	if err := k.gate.awaitReady(ctx); err != nil {
		return nil, err
	}
	if err := k.awaitGuest(ctx, ready); err != nil {
		return nil, err
	}
	if err := k.aside.awaitReady(ctx); err != nil {
		return nil, err
	}
	k.monitor = startMonitor(k, started.Enforcement)
	k.guard.watch(k)
	return started, k.finish(started)
}

// inspected are the hosts whose TLS the gate terminates.
func (k *keeper) inspected() (hosts []string) {
	for _, r := range k.plan.Egress.Rules {
		if r.Inspect && r.Verdict == "allow" && r.Host != "" {
			hosts = append(hosts, r.Host)
		}
	}
	return hosts
}

// makeCA makes the bottle's own authority where the policy opens TLS.
func (k *keeper) makeCA() error {
	hosts := k.inspected()
	if len(hosts) == 0 {
		return nil
	}
	a, err := ca.New(k.cfg.ID, hosts, k.now(), caLife)
	if err != nil {
		return err
	}
	k.caCert = a.CertPEM()
	k.caPEM, err = a.Marshal()
	return err
}

func (k *keeper) spec() (*engine.Spec, error) {
	bundle, err := k.roots()
	if err != nil {
		// A host without roots still runs bottles; nothing end-to-end will verify.
		k.logf("no system roots: %v", err)
	}
	// What the gate trusts the guest has to trust too, where TLS is end to end.
	own, err := ca.PlanRoots(k.plan.Egress.Roots, trust.Place{Base: k.cfg.Base, Home: k.cfg.UserHome}.Path)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(k.bottle.Path("engine.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	s := &engine.Spec{
		ID: k.cfg.ID, Bottle: k.plan, Dir: k.bottle.Dir, RunDir: k.rec.RunDir,
		Workspace: k.cfg.Workspace, ReadOnly: k.plan.Workspace.Mode == "ro",
		Rootfs: k.cfg.Rootfs, Pack: k.cfg.Pack, Home: k.cfg.Home, GuestHelper: k.cfg.GuestExe,
		CABundle: slices.Concat(bundle, slices.Concat(own...), k.caCert), CACert: k.caCert,
		HostUID: k.cfg.HostUID, HostGID: k.cfg.HostGID,
		Log: log, Record: k.record,
	}
	if s.Self, err = os.Executable(); err != nil {
		log.Close()
		return nil, fault.New(fault.Host, "no_self", "this host does not tell a program's own path: %w", err)
	}
	if k.cfg.Warm {
		s.Warm = &engine.Warm{Dir: k.root.Warm(), Image: k.cfg.Image}
	}
	s.Env = k.plan.Environ()
	guard, err := newGuard(k)
	if err != nil {
		log.Close()
		return nil, err
	}
	k.guard = guard
	s.Binds = slices.Concat(k.cfg.Mounts, k.guard.binds)
	shown, err := json.Marshal(s.Shown())
	if err == nil {
		err = k.bottle.WriteFile(engine.ShownFile, append(shown, '\n'))
	}
	if err != nil {
		log.Close()
		return nil, err
	}
	return s, nil
}

// listen makes the guest's way to the gate. The channel closes when the guest
// helper says that it is ready, or carries why it is not.
func (k *keeper) listen(s *engine.Spec) (<-chan error, error) {
	ready := make(chan error, 1)
	if k.eng.Transport() == engine.Socket {
		s.GateSocket = k.gateSocket()
		l, err := net.Listen("unix", s.GateSocket)
		if err != nil {
			return nil, fault.New(fault.CantCreate, "cannot_create", "the guest's socket: %w", err)
		}
		k.greeter = newGreeter()
		s.Reports, s.Forget = k.greeter.reports, k.greeter.forget
		k.gates = append(k.gates, l)
		go k.accept(l.(*net.UnixListener))
		close(ready) // the engine's Start has waited for the helper
		return ready, nil
	}
	conn, theirs, err := fdpass.Pair()
	if err != nil {
		return nil, fault.New(fault.IO, "gate_failed", "the guest's socket: %w", err)
	}
	s.Guest = theirs
	b := &guest.Broker{
		Conn:     conn,
		Services: map[string]func(*os.File) error{guest.ServiceEgress: k.gate.take},
		Ready:    func() { close(ready) },
		Failed: func(why string) {
			ready <- fault.New(fault.Unavailable, "guest_failed", "the guest helper could not set the guest up: %s", why)
		},
	}
	go func() {
		if err := b.Serve(); err != nil {
			k.logf("guest's socket: %v", err)
		}
		conn.Close()
	}()
	return ready, nil
}

func (k *keeper) gateSocket() string { return filepath.Join(k.rec.RunDir, "gate.sock") }

func (k *keeper) accept(l *net.UnixListener) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				k.logf("guest's socket: %v", err)
			}
			return
		}
		if k.greeter.greet(c) {
			continue
		}
		if f, err := c.File(); err == nil {
			_ = k.gate.take(f)
		}
		c.Close()
	}
}

func (k *keeper) watchGuest(s *engine.Started) {
	k.why = "the guest ended by itself"
	if err := s.Wait(context.Background()); err != nil {
		k.why = fmt.Sprintf("the guest ended: %v", err)
		k.logf("%s", k.why)
	}
	close(k.ended)
}

func (k *keeper) awaitGuest(ctx context.Context, ready <-chan error) error {
	select {
	case err := <-ready:
		return err
	case <-k.ended:
		return fault.New(fault.Unavailable, "engine_died", "the guest ended while it started").
			WithHint("the log is at the end of this message's document, and: bottle-vm doctor")
	case <-ctx.Done():
		return fault.New(fault.Unavailable, "guest_failed", "the guest was not ready in time: %w", context.Cause(ctx))
	}
}

// finish writes the final document and the record of a bottle that is ready.
func (k *keeper) finish(s *engine.Started) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	vm := plan.VM{
		ID: k.cfg.ID, Runtime: k.eng.Name(), RuntimeWhy: k.cfg.RuntimeWhy,
		HostUID: k.cfg.HostUID, StateDir: k.bottle.Dir, Keeper: *k.rec.Keeper,
		Gate:        plan.GateRef{AuditLog: k.root.Audit(k.cfg.ID)},
		Proxy:       k.proxy.ref(),
		Sidecar:     k.aside.ref(),
		Enforcement: s.Enforcement,
		Signed:      k.cfg.Signed,
		Warm:        s.Warm,
		StartedAt:   k.now().UTC().Format(time.RFC3339),
	}
	for _, c := range k.rec.Processes {
		if c.Role == roleGate {
			vm.Gate.Process = c.Process
		}
	}
	if err := k.doc.Set("vm", vm); err != nil {
		return err
	}
	if err := k.bottle.WriteFile("document.json", append(k.doc.Line(), '\n')); err != nil {
		return err
	}
	k.phase, k.rec.Phase = state.Ready, state.Ready
	return k.bottle.Save(k.rec)
}

// serve keeps the bottle until it is to be removed, or another keeper has it.
func (k *keeper) serve(ctx context.Context, s *engine.Started) {
	owner := make(chan struct{})
	if k.rec.Owner != nil {
		go func() {
			for !state.Await(*k.rec.Owner, time.Hour) {
			}
			close(owner)
		}()
	}
	ended := k.ended
	for {
		select {
		case <-ctx.Done():
			k.logf("told to end")
			return
		case <-owner:
			k.logf("the owner, process %d, is gone", k.rec.Owner.PID)
			return
		case <-k.handed:
			return
		case <-ended:
			k.halt(k.why)
			ended = nil
		}
	}
}

// halt ends the guest and what serves it, and keeps the records.
func (k *keeper) halt(reason string) error {
	k.mu.Lock()
	if k.handing {
		// Its own guest has ended before; the one that is started now is not its.
		k.mu.Unlock()
		return fault.New(fault.TempFail, "being_started", "bottle %s is just being started", k.cfg.ID).
			WithHint("try again in a moment; bottle-vm down %s ends it now", k.cfg.ID)
	}
	if k.phase == stopped {
		k.mu.Unlock()
		return nil
	}
	k.phase, k.reason = stopped, reason
	k.rec.Phase = state.Stopped
	err := k.bottle.Save(k.rec)
	k.mu.Unlock()
	k.logf("stopped: %s", reason)
	return errors.Join(err, k.end(k.stopGuest))
}

// end stops what the guest could still use and what it could still do, at once,
// and looks at the workspace when the guest is gone. It goes on past errors, and
// may be called again: what is done already costs little.
func (k *keeper) end(endGuest func() error) error {
	k.ending.Lock()
	defer k.ending.Unlock()
	k.monitor.stop()
	var gate, guest error
	var wg sync.WaitGroup
	if k.gate != nil {
		wg.Go(func() { gate = k.gate.stop() })
	}
	gone := make(chan struct{})
	wg.Go(func() {
		// Waiting for the first to come: clearing up goes on after the guest's end.
		select {
		case <-k.ended:
		case <-gone:
		}
		k.guard.unwatch()
	})
	guest = endGuest()
	close(gone)
	wg.Wait()
	k.aside.stop()
	return errors.Join(gate, guest, k.proxy.stop(), k.guard.sweep(k))
}

// stopGuest ends the guest, and keeps its disk where the engine can.
func (k *keeper) stopGuest() error {
	r, ok := k.eng.(engine.Restarter)
	if !ok {
		return k.endGuest()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return r.Stop(ctx, k.ref())
}

func (k *keeper) ref() engine.Ref {
	return engine.Ref{ID: k.cfg.ID, Dir: k.bottle.Dir, RunDir: k.rec.RunDir, Bottle: k.plan}
}

func (k *keeper) endGuest() error {
	if k.eng == nil || k.plan == nil {
		return nil // nothing was started
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return k.eng.Delete(ctx, k.ref())
}

// remove ends everything and takes the bottle's folders away. What cannot be
// removed is left to be found: the record stays.
func (k *keeper) remove() error {
	k.mu.Lock()
	k.rec.Phase = state.Stopping
	_ = k.bottle.Save(k.rec)
	k.mu.Unlock()
	// Of a halted bottle too: the stop may be at it still, or have failed.
	if err := k.end(k.endGuest); err != nil {
		k.logf("ending: %v", err)
		return err
	}
	if err := k.root.TidyAudit(k.cfg.ID); err != nil {
		k.logf("%v", err)
	}
	return k.bottle.Remove(k.rec)
}
