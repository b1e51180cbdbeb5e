package pipelock

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/child"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/proclog"
	"github.com/tidwall/gjson"
)

const (
	configName   = "pipelock.yaml"
	startTimeout = 20 * time.Second // measured: 25 to 285 ms, and 0.9 s with the longest lists
	pollEvery    = 10 * time.Millisecond
	probeTimeout = 2 * time.Second // one request to its health page or proxy
	stopTimeout  = 2 * time.Second // measured: 30 ms
	// A reload takes 20 ms by signal; without an answer by then it never comes.
	reloadTimeout = 2 * time.Second
	// A refusal is told twice: for the signal, and for the watch of the file, which
	// waits 100 ms for more changes.
	toldAgain    = 500 * time.Millisecond
	portAttempts = 5
	inUse        = "address already in use"
)

// Options is what Start needs.
type Options struct {
	// Dir is a folder of the bottle's own, 0700 and with an absolute path. Start
	// makes in it: conf/ (which pipelock watches), home/, pipelock.log and
	// pipelock.log.1 (JSON lines), and pipelock.err; the file kill in it is
	// pipelock's kill switch.
	Dir        string
	Policy     []byte // as YAML gives it
	InstanceID string // vm.id
	// Listen is where it is to listen if that port is free; zero: at any port.
	Listen netip.AddrPort
	// Own are addresses of the host, which pipelock must not dial; nil means
	// those that the host has now.
	Own []netip.Addr
}

// Proc is a running pipelock. It does not outlive the process that started it.
type Proc struct {
	opts   Options
	run    RunOptions
	config string // path of the run file
	*child.Process
	log  *proclog.File
	errs *proclog.File

	mu      sync.Mutex // guards what follows
	sha     string
	stderr  tail
	waiting *waiter

	reloading sync.Mutex
	refused   time.Time // the last reload that failed; guarded by reloading
}

// event is one line of pipelock's log, or of its stderr.
type event struct {
	line   []byte
	stderr bool
}

func (e event) get(path string) string { return gjson.GetBytes(e.line, path).String() }

// waiter gets the first event for which match says so.
type waiter struct {
	match func(event) (done bool, err error)
	done  chan error
}

// Start runs pipelock and returns when it answers, and when it has been seen to
// refuse a host that is not on its list. ctx bounds the start only. Errors are
// faults 69 (proxy_refuses, proxy_unhealthy) with pipelock's own words.
func (p *Program) Start(ctx context.Context, o Options) (*Proc, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	var last error
	for range portAttempts {
		proc, err := p.start(ctx, o)
		if err == nil {
			return proc, nil
		}
		last = err
		// Someone was faster at one of the two ports.
		if ctx.Err() != nil || !strings.Contains(err.Error(), inUse) {
			break
		}
		o.Listen = netip.AddrPort{}
	}
	return nil, last
}

func (p *Program) start(ctx context.Context, o Options) (*Proc, error) {
	listen, metrics, err := freePorts()
	if err != nil {
		return nil, fault.New(fault.Unavailable, "proxy_unhealthy", "a port for pipelock: %w", err)
	}
	if o.Listen.IsValid() && o.Listen.Port() != metrics.Port() {
		listen = o.Listen
	}
	proc := &Proc{
		opts: o,
		run: RunOptions{
			Listen: listen, MetricsListen: metrics,
			Sentinel:   filepath.Join(o.Dir, "kill"),
			InstanceID: o.InstanceID,
			Own:        o.Own,
		},
		config: filepath.Join(o.Dir, "conf", configName),
		stderr: tail{max: maxOutput},
	}
	if proc.run.Own == nil {
		if proc.run.Own, err = HostAddrs(); err != nil {
			return nil, fault.New(fault.Unavailable, "proxy_unhealthy", "the host's own addresses: %w", err)
		}
	}
	yaml, sha, err := RunYAML(o.Policy, proc.run)
	if err != nil {
		return nil, err
	}
	proc.sha = sha
	if err := proc.prepare(yaml); err != nil {
		return nil, err
	}
	if err := proc.launch(p.Path); err != nil {
		return nil, fault.New(fault.Unavailable, "proxy_refuses", "running %s: %w", p.Path, err)
	}
	if err := proc.healthy(ctx); err != nil {
		proc.Kill()
		if strings.Contains(proc.words(), inUse) {
			return nil, proc.died()
		}
		return nil, err
	}
	return proc, nil
}

// HostAddrs are the addresses of this host's interfaces, which neither pipelock
// nor the gate in front of it connects to unless they are named.
func HostAddrs() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	own := make([]netip.Addr, 0, len(all))
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, p.Addr())
		}
	}
	return own, nil
}

// freePorts picks two ports of the loopback interface that are free now.
func freePorts() (a, b netip.AddrPort, err error) {
	var pair [2]netip.AddrPort
	for i := range pair {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return a, b, err
		}
		defer l.Close() // after both are taken, so that they differ
		pair[i] = l.Addr().(*net.TCPAddr).AddrPort()
	}
	return pair[0], pair[1], nil
}

// prepare lays out the folder.
func (p *Proc) prepare(yaml []byte) error {
	for _, d := range []string{"conf", "home"} {
		if err := os.Mkdir(filepath.Join(p.opts.Dir, d), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return fault.New(fault.CantCreate, "cannot_create", "a folder for pipelock: %w", err)
		}
	}
	p.log = &proclog.File{Path: filepath.Join(p.opts.Dir, "pipelock.log")}
	p.errs = &proclog.File{Path: filepath.Join(p.opts.Dir, "pipelock.err")}
	if err := replace(p.config, yaml); err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "the configuration of pipelock: %w", err)
	}
	return nil
}

// replace writes a file so that a reader sees the old or the new one, whole.
func replace(path string, b []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// launch starts the process.
func (p *Proc) launch(path string) (err error) {
	home := filepath.Join(p.opts.Dir, "home")
	p.Process, err = child.Start(child.Options{
		Argv: []string{path, "run", "--config", p.config},
		Env:  environment(home),
		Dir:  home,
		Line: func(line []byte, stderr bool) {
			to := p.log
			if stderr {
				to = p.errs
			}
			to.Write(line)
			p.take(event{line, stderr})
		},
		Ended: func() {
			p.log.Close()
			p.errs.Close()
		},
	})
	return err
}

func (p *Proc) take(e event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.stderr {
		p.stderr.Write(e.line)
	}
	if p.waiting == nil {
		return
	}
	if done, err := p.waiting.match(e); done {
		p.waiting.done <- err
		p.waiting = nil
	}
}

// expect waits for an event that act brings about.
func (p *Proc) expect(ctx context.Context, what string, match func(event) (bool, error), act func() error) error {
	w := &waiter{match, make(chan error, 1)}
	p.mu.Lock()
	p.waiting = w
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.waiting = nil
	}()
	if err := act(); err != nil {
		return err
	}
	select {
	case err := <-w.done:
		return err
	case <-p.Exited():
		return p.died()
	case <-ctx.Done():
		return fault.New(fault.Unavailable, "proxy_unhealthy", "pipelock did not %s in time: %s", what, p.words())
	}
}

// healthy returns when pipelock answers on its port, and when it is this
// pipelock that answers and it enforces its list: a request for a name that
// nobody has must be refused, and be in the log of our own child. Another
// process that took the port in between cannot do that.
func (p *Proc) healthy(ctx context.Context) error {
	for p.health(ctx) != nil {
		select {
		case <-p.Exited():
			return p.died()
		case <-ctx.Done():
			return fault.New(fault.Unavailable, "proxy_unhealthy", "pipelock did not answer on %s: %s", p.run.Listen, p.words())
		case <-time.After(pollEvery):
		}
	}
	name := strings.ToLower(rand.Text()) + ".invalid"
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	refused := func(e event) (bool, error) {
		return !e.stderr && e.get("event") == "blocked" && e.get("target") == name+":443", nil
	}
	return p.expect(ctx, "log a refused request", refused, func() error { return p.mustRefuse(ctx, name) })
}

var client = &http.Client{
	Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true},
	CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	},
	Timeout: probeTimeout,
}

func (p *Proc) health(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.run.Listen.String()+"/health", nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}

// mustRefuse asks for a tunnel to a host that no list can hold.
func (p *Proc) mustRefuse(ctx context.Context, host string) error {
	unhealthy := func(format string, args ...any) error {
		return fault.New(fault.Unavailable, "proxy_unhealthy", "pipelock: "+format, args...)
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", p.run.Listen.String())
	if err != nil {
		return unhealthy("asking it for a host: %w", err)
	}
	defer c.Close()
	if t, ok := ctx.Deadline(); ok {
		c.SetDeadline(t)
	}
	fmt.Fprintf(c, "CONNECT %s:443 HTTP/1.1\r\nHost: %s:443\r\n\r\n", host, host)
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return unhealthy("asking it for a host: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusForbidden {
		return unhealthy("it answers %s for a host that is not on its list, and has to answer 403", res.Status)
	}
	return nil
}

// Addr is where the proxy listens. Other users of the host can reach it, so it
// is never the only check.
func (p *Proc) Addr() netip.AddrPort { return p.run.Listen }

// RunConfigSHA256 is the digest of the file that pipelock runs with, as
// "sha256:<64 hex>".
func (p *Proc) RunConfigSHA256() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return "sha256:" + p.sha
}

// Wait blocks until pipelock has ended and gives the reason as a fault 69
// (proxy_died), or nil if it ended by itself or by Stop.
func (p *Proc) Wait() error {
	if p.Status() == nil {
		return nil
	}
	return p.died()
}

func (p *Proc) died() error {
	how := p.How()
	return fault.New(fault.Unavailable, "proxy_died", "pipelock ended (%s): %s", how, p.words())
}

// words gives the end of what pipelock said on stderr, without its banner.
func (p *Proc) words() string {
	p.mu.Lock()
	text := p.stderr.String()
	p.mu.Unlock()
	var said []string
	banner := false // "Pipelock 2.3.0 starting" and the indented lines below it
	for line := range strings.Lines(text) {
		banner = strings.HasPrefix(line, "Pipelock ") || banner && strings.HasPrefix(line, " ")
		if line = strings.TrimSpace(line); !banner && line != "" {
			said = append(said, line)
		}
	}
	if len(said) == 0 {
		return "it said nothing"
	}
	if len(said) > 4 {
		said = said[len(said)-4:]
	}
	return clip(strings.Join(said, " "))
}

// Reload gives a running pipelock another policy and returns when it has taken
// it, proven by the digest that it logs. Live tunnels are not cut, not even to
// hosts that are gone from the list: the gate does that. A change that loosens
// more than the list is refused by pipelock (69, proxy_reload_refused) and
// leaves the old policy in force; only a new Start applies it.
func (p *Proc) Reload(ctx context.Context, policy []byte) error {
	p.reloading.Lock()
	defer p.reloading.Unlock()
	yaml, sha, err := RunYAML(policy, p.run)
	if err != nil {
		return err
	}
	if "sha256:"+sha == p.RunConfigSHA256() {
		return nil
	}
	old, err := os.ReadFile(p.config)
	if err != nil {
		return fault.New(fault.IO, "read_failed", "the configuration of pipelock: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, reloadTimeout)
	defer cancel()
	match := reloaded(sha)
	if time.Since(p.refused) < toldAgain {
		match = sparing(match)
	}
	err = p.expect(ctx, "reload", match, func() error {
		if err := replace(p.config, yaml); err != nil {
			return fault.New(fault.CantCreate, "cannot_create", "the configuration of pipelock: %w", err)
		}
		if err := p.Signal(syscall.SIGHUP); err != nil {
			return fault.New(fault.Bug, "bug", "signalling pipelock: %w", err)
		}
		return nil
	})
	if err != nil {
		p.refused = time.Now()
		// pipelock reads the file again when it likes: it has to hold what is in
		// force.
		return errors.Join(err, replace(p.config, old))
	}
	p.mu.Lock()
	p.sha = sha
	p.mu.Unlock()
	return nil
}

// sparing is match, but for the first failure: that is the last refusal, told
// again.
func sparing(match func(event) (bool, error)) func(event) (bool, error) {
	spared := false
	return func(e event) (bool, error) {
		done, err := match(e)
		if err != nil && !spared {
			spared = true
			return false, nil
		}
		return done, err
	}
}

// reloaded matches the three ways in which pipelock 2.3 answers a reload.
func reloaded(sha string) func(event) (bool, error) {
	refused := func(reason string) (bool, error) {
		return true, fault.New(fault.Unavailable, "proxy_reload_refused", "pipelock keeps its old policy: %s", clip(reason)).
			WithHint("restart the proxy to apply the new one")
	}
	return func(e event) (bool, error) {
		switch {
		case e.stderr:
			if _, why, ok := strings.Cut(string(e.line), "config reload failed: "); ok {
				return refused(why)
			}
		case e.get("event") == "config_reload" && e.get("status") == "success":
			return e.get("config_hash") == sha, nil
		case e.get("event") == "error" && e.get("method") == "CONFIG_RELOAD":
			return refused(e.get("error"))
		}
		return false, nil
	}
}

// Stop ends pipelock and returns when it is gone. Stopping it twice is fine.
func (p *Proc) Stop() error {
	if err := p.Process.Stop(stopTimeout); err != nil {
		return fault.New(fault.Bug, "bug", "stopping pipelock: %w", err)
	}
	return nil
}
