//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/pipelock"
)

// Sizes of one round.
const (
	newConns  = 160 // TLS connections
	atOnce    = 8   // of them at a time
	manyAsked = 400 // requests of which the CPU time is taken
)

const (
	loopback   = "127.0.0.1"
	publicAddr = "93.184.216.34" // within a network of the bench's own only
	aLongWait  = 30 * time.Second
	farAway    = 5 * time.Millisecond // the way to a host and back: one in the same town
)

var newTLSName = fmt.Sprintf("%d new TLS connections", newConns)

// gates measures the gate by itself, from the host's side of its socket: what
// the guest's kernel and relay take is not in it.
func (b *bench) gates() error {
	return errors.Join(b.newTLS(), b.requestCPU(), b.idleGate())
}

// newTLS is a new TLS connection with one small request, with several on the way
// at a time, as agents have. pipelock refuses the addresses that bench servers
// have, so this runs in a network of its own, where a public one leads to them.
func (b *bench) newTLS() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(b.w.ctx, callLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "-own-network", "-repo", b.w.repo, "-rounds", strconv.Itoa(b.rounds))
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   unix.SIGTERM,
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil && cmd.Process == nil {
		b.emit(row{Kind: "row", Name: newTLSName, Verdict: skipped, Why: "no user and network namespaces here: " + err.Error()})
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, said.String())
	}
	for line := range bytes.Lines(out) {
		var r row
		if err := json.Unmarshal(line, &r); err != nil {
			return err
		}
		b.emit(r)
	}
	return nil
}

// insideNetwork is the part of newTLS that runs in a network of its own. Its
// rows go to stdout as lines of JSON.
func (b *bench) insideNetwork() error {
	if err := ownNetwork(); err != nil {
		return fmt.Errorf("a network of its own: %w", err)
	}
	far, err := newOrigin(publicAddr, farAway)
	if err != nil {
		return err
	}
	defer far.close()
	near, err := newOrigin(publicAddr, 0)
	if err != nil {
		return err
	}
	defer near.close()
	g, err := b.startGate("tls", gateManifest([]any{map[string]any{"cidr": publicAddr + "/32", "ports": []int{far.tlsPort, near.tlsPort}}}))
	if err != nil {
		return err
	}
	defer g.stop()
	relaySock, stopRelay, err := b.startRelay()
	if err != nil {
		return err
	}
	defer stopRelay()
	p, why, err := b.startPipelock(g)
	if err != nil {
		return err
	}
	if p != nil {
		defer p.Stop()
	}
	direct := func(o *origin) func() (net.Conn, error) {
		return func() (net.Conn, error) { return net.Dial("tcp", o.tlsAddr) }
	}
	compare := func(name string, o *origin, beside string, dial func() (net.Conn, error), l *limit) error {
		ours, theirs, err := pairs(b.rounds,
			func() error { return o.askAll(g.connect(o.tlsAddr)) },
			func() error { return o.askAll(dial) }, nil, nil)
		if err == nil {
			b.emit(newRow(name, "ms", ours, beside, theirs, l))
		}
		return err
	}
	if err := errors.Join(
		compare(newTLSName, far, "direct", direct(far), ratioAtMost(">= 0.8x direct", 1/0.8)),
		compare("  to a host on this machine", near, "direct", direct(near), nil),
		compare("  the same beside a bare relay", near, "relay", connectVia("unix", relaySock, near.tlsAddr), nil),
	); err != nil {
		return err
	}
	const name = "  the same beside pipelock"
	if p == nil {
		b.emit(row{Kind: "row", Name: name, Verdict: skipped, Why: why})
		return nil
	}
	return compare(name, near, "pipelock", connectVia("tcp", p.Addr().String(), near.tlsAddr), nil)
}

// ownNetwork takes the loopback interface up and gives it publicAddr.
func ownNetwork() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	up, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	up.SetUint16(unix.IFF_UP)
	alias, err := unix.NewIfreq("lo:1")
	if err != nil {
		return err
	}
	if err := alias.SetInet4Addr(netip.MustParseAddr(publicAddr).AsSlice()); err != nil {
		return err
	}
	return errors.Join(unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, up), unix.IoctlIfreq(s, unix.SIOCSIFADDR, alias))
}

// requestCPU is what the gate's process computes for one request when its list
// is long: half of them are allowed and answered, half are denied.
func (b *bench) requestCPU() error {
	o, err := newOrigin(loopback, 0)
	if err != nil {
		return err
	}
	defer o.close()
	rules := []any{map[string]any{"host": "web.bench.test", "ports": []int{o.webPort}, "protocol": "http", "addresses": []string{loopback}}}
	for i := range many - 1 {
		rules = append(rules, fmt.Sprintf("h%d.example%d.com", i, i%1000))
	}
	g, err := b.startGate("many", gateManifest(rules))
	if err != nil {
		return err
	}
	defer g.stop()
	allowed := fmt.Sprintf("web.bench.test:%d", o.webPort)
	var took []float64
	for round := range b.rounds + 1 {
		before, err := g.cpu()
		if err != nil {
			return err
		}
		if err := g.requests(manyAsked/2, allowed, http.StatusOK); err != nil {
			return err
		}
		if err := g.requests(manyAsked/2, "denied.bench.test", http.StatusForbidden); err != nil {
			return err
		}
		after, err := g.cpu()
		if err != nil {
			return err
		}
		if round > 0 {
			took = append(took, (after-before)/manyAsked)
		}
	}
	b.emit(newRow("CPU of a request, 100,000 rules", "ms", took, "", nil, medianAtMost("<= 0.3 ms", 0.3)))
	return nil
}

// idleGate is the resident memory of a gate that has nothing to do, shared
// pages of its program included.
func (b *bench) idleGate() error {
	manifest, err := os.ReadFile(filepath.Join(b.w.project, "bottle.json"))
	if err != nil {
		return err
	}
	var mb []float64
	for range b.rounds {
		g, err := b.startGate("idle", manifest)
		if err != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
		rss, err := residentMB(g.cmd.Process.Pid)
		g.stop()
		if err != nil {
			return err
		}
		mb = append(mb, rss)
	}
	b.emit(newRow("an idle gate (RSS)", "MB", mb, "", nil, medianAtMost("<= 20 MB", 20)))
	return nil
}

func gateManifest(allow []any) []byte {
	raw, err := json.Marshal(map[string]any{
		"format_version": "1.0",
		"bottles":        map[string]any{"dev": map[string]any{"egress": map[string]any{"allow": allow}}},
		"agents":         map[string]any{"bash": map[string]any{"bottle": "dev", "command": []string{"bash"}}},
	})
	if err != nil {
		panic(err) // strings and numbers
	}
	return raw
}

// gateProcess is a bottle-egress serve.
type gateProcess struct {
	cmd  *exec.Cmd
	sock string
	plan []byte // its document
	w    *world
}

func (b *bench) startGate(name string, manifest []byte) (*gateProcess, error) {
	dir := filepath.Join(b.w.dir, "gate-"+name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "bottle.json")
	if err := os.WriteFile(path, manifest, 0o600); err != nil {
		return nil, err
	}
	plan, err := b.w.output("bottle-plan", "-m", path, "bash")
	if err != nil {
		return nil, err
	}
	g := &gateProcess{sock: filepath.Join(dir, "s"), plan: plan, w: b.w}
	_ = os.Remove(g.sock)
	g.cmd = b.w.command("bottle-egress", "serve", "--dir", dir, "--listen", "unix:"+g.sock, "--audit", filepath.Join(dir, "audit"))
	g.cmd.Stdin = strings.NewReader(string(plan))
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(aLongWait); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", g.sock)
		if err == nil {
			return g, c.Close()
		}
		if time.Now().After(deadline) {
			g.stop()
			return nil, fmt.Errorf("the gate did not come up: %w", err)
		}
	}
}

func (g *gateProcess) stop() {
	_ = g.cmd.Process.Signal(unix.SIGTERM)
	_ = g.cmd.Wait()
}

func (g *gateProcess) connect(to string) func() (net.Conn, error) {
	return connectVia("unix", g.sock, to)
}

// connectVia opens a tunnel through a proxy.
func connectVia(network, proxy, to string) func() (net.Conn, error) {
	return func() (net.Conn, error) {
		c, err := net.Dial(network, proxy)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", to, to)
		resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: http.MethodConnect})
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("CONNECT %s: %s", to, resp.Status)
		}
		if err != nil {
			c.Close()
		}
		return c, err
	}
}

// requests asks for one small answer after the other on one connection.
func (g *gateProcess) requests(n int, host string, want int) error {
	c, err := net.Dial("unix", g.sock)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(aLongWait))
	r := bufio.NewReader(c)
	for range n {
		fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: %s\r\n\r\n", host, host)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return err
		}
		if resp.StatusCode != want {
			return fmt.Errorf("%s: %s", host, resp.Status)
		}
	}
	return nil
}

// cpu is what all threads of the gate have computed, in milliseconds
// (/proc/PID/task/TID/schedstat, first field, nanoseconds).
func (g *gateProcess) cpu() (float64, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", g.cmd.Process.Pid))
	if err != nil || len(files) == 0 {
		return 0, errors.Join(errors.New("the gate's threads are not told"), err)
	}
	sum := 0.0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return 0, err
		}
		first, _, _ := strings.Cut(string(b), " ")
		ns, err := strconv.ParseFloat(first, 64)
		if err != nil {
			return 0, err
		}
		sum += ns / 1e6
	}
	return sum, nil
}

// residentMB is VmRSS of a process.
func residentMB(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 64)
			return kib * 1024 / 1e6, err
		}
	}
	return 0, errors.New("no VmRSS")
}

// startPipelock runs the real one with the gate's policy, if there is one.
func (b *bench) startPipelock(g *gateProcess) (*pipelock.Proc, string, error) {
	prog, err := pipelock.Find(b.w.ctx, os.Getenv)
	if err != nil {
		return nil, "no pipelock to compare with: " + err.Error(), nil
	}
	yaml := b.w.command("bottle-egress", "yaml")
	yaml.Stdin = strings.NewReader(string(g.plan))
	policy, err := yaml.Output()
	if err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(b.w.ctx, aLongWait)
	defer cancel()
	dir := filepath.Join(b.w.dir, "pipelock")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, "", err
	}
	// Loopback is where the bench's servers are, so it may be dialled.
	p, err := prog.Start(ctx, pipelock.Options{Dir: dir, Policy: policy, InstanceID: "bench", Own: []netip.Addr{}})
	return p, "", err
}

// origin is what is asked: a TLS and a plain HTTP server.
type origin struct {
	tlsAddr          string
	tlsPort, webPort int
	servers          []*http.Server
}

// newOrigin listens on addr. What it sends takes the time away to arrive.
func newOrigin(addr string, away time.Duration) (*origin, error) {
	cert, err := selfSigned()
	if err != nil {
		return nil, err
	}
	o := &origin{}
	hello := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello\n") })
	serve := func(secure bool) (*net.TCPAddr, error) {
		l, err := net.Listen("tcp", addr+":0")
		if err != nil {
			return nil, err
		}
		if away > 0 {
			l = &farListener{l, away}
		}
		s := &http.Server{Handler: hello, TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}}
		o.servers = append(o.servers, s)
		if secure {
			go s.ServeTLS(l, "", "")
		} else {
			go s.Serve(l)
		}
		return l.Addr().(*net.TCPAddr), nil
	}
	secure, err := serve(true)
	if err != nil {
		return nil, err
	}
	plain, err := serve(false)
	if err != nil {
		o.close()
		return nil, err
	}
	o.tlsAddr, o.tlsPort, o.webPort = secure.String(), secure.Port, plain.Port
	return o, nil
}

func (o *origin) close() {
	for _, s := range o.servers {
		s.Close()
	}
}

// askAll makes newConns connections with one request each, atOnce at a time.
func (o *origin) askAll(dial func() (net.Conn, error)) error {
	return together(atOnce, func(int) error {
		for range newConns / atOnce {
			if err := o.ask(dial); err != nil {
				return err
			}
		}
		return nil
	})
}

func (o *origin) ask(dial func() (net.Conn, error)) error {
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	// By address, so without a server name: what is measured is the way there.
	t := tls.Client(c, &tls.Config{InsecureSkipVerify: true})
	_ = t.SetDeadline(time.Now().Add(aLongWait))
	fmt.Fprintf(t, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", o.tlsAddr)
	got, err := io.ReadAll(t)
	if err != nil || !strings.HasSuffix(string(got), "hello\n") {
		return errors.Join(fmt.Errorf("answered %q", got), err)
	}
	return nil
}

func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.ParseIP(loopback)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
