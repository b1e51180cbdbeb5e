package sidecar

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/child"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/proclog"
)

const (
	readyTimeout = 60 * time.Second // measured: 1.4 to 3.6 s on a quiet machine
	pollEvery    = 20 * time.Millisecond
	probeTimeout = 2 * time.Second
	stopTimeout  = 2 * time.Second
	maxWords     = 4 << 10
)

// Proc is a running mitmdump. It does not outlive the process that started it.
type Proc struct {
	o      Options
	listen netip.AddrPort
	digest string
	*child.Process

	mu    sync.Mutex // guards what follows
	log   *proclog.File
	words []byte // the end of what it said
}

// Start launches mitmdump and returns at once; Ready tells when it serves. at is
// the port to take, or the zero value for a free one. Faults: cannot_create
// (73), sidecar_failed (69).
func Start(o Options, at netip.AddrPort) (*Proc, error) {
	var err error
	if !at.IsValid() {
		if at, err = freePort(); err != nil {
			return nil, fault.New(fault.Unavailable, "sidecar_failed", "a port for mitmdump: %w", err)
		}
	}
	p := &Proc{o: o, listen: at, log: &proclog.File{Path: filepath.Join(o.Dir, "mitmdump.log")}}
	if p.digest, err = lay(&o, at); err != nil {
		return nil, err
	}
	if err := p.launch(); err != nil {
		return nil, fault.New(fault.Unavailable, "sidecar_failed", "running %s: %w", o.Program, err)
	}
	return p, nil
}

func freePort() (netip.AddrPort, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort(), nil
}

// environment is all that mitmdump and its addons get to see.
func environment(home string) []string {
	return []string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=" + home, "LC_ALL=C.UTF-8",
		"PYTHONSAFEPATH=1", "PYTHONNOUSERSITE=1", "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1"}
}

// EnvNames are the variables that mitmdump may have.
var EnvNames = []string{"PATH", "HOME", "LC_ALL", "PYTHONSAFEPATH", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}

// Argv is what a mitmdump is started with, whose way back is back.
func Argv(program, dir, back string) []string {
	// No word of Auth here: every user of the host can read arguments.
	return []string{program, "--set", "confdir=" + filepath.Join(dir, "conf"), "--mode", "upstream:http://" + back}
}

func (p *Proc) launch() (err error) {
	home := filepath.Join(p.o.Dir, "home")
	p.Process, err = child.Start(child.Options{
		Argv: Argv(p.o.Program, p.o.Dir, p.o.Back),
		Env:  environment(home),
		Dir:  home,
		Line: func(line []byte, _ bool) { p.take(line) },
		// No line comes any more that could be written at the same time.
		Ended: func() { p.log.Close() },
	})
	return err
}

func (p *Proc) take(line []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log.Write(line)
	p.words = append(p.words, line...)
	if over := len(p.words) - maxWords; over > 0 {
		p.words = append(p.words[:0], p.words[over:]...)
	}
}

// Ready returns when mitmdump serves: it turns away who does not know the word,
// and shows to who does a certificate of the bottle's own for it. Nothing that
// has taken the port in its place could. Faults: sidecar_failed (69).
func (p *Proc) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		err := p.probe(ctx)
		if err == nil {
			return nil
		}
		var f *fault.Error
		if errors.As(err, &f) {
			return err
		}
		select {
		case <-p.Exited():
			return p.Wait()
		case <-ctx.Done():
			return fault.New(fault.Unavailable, "sidecar_failed", "mitmdump does not serve (%w)%s", err, p.said())
		case <-time.After(pollEvery):
		}
	}
}

func (p *Proc) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if err := p.owned(); err != nil {
		return err
	}
	_, status, err := p.ask(ctx, "")
	if err != nil {
		return err
	}
	if status != http.StatusProxyAuthRequired {
		return fault.New(fault.Unavailable, "sidecar_failed", "what listens on %s answers %d to who has no password, and has to answer 407", p.listen, status).
			WithHint("is %s a mitmdump 9 or newer?", p.o.Program)
	}
	c, status, err := p.ask(ctx, p.o.Auth)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("it answers %d to the gate", status)
	}
	defer c.Close()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.o.Authority)
	return tls.Client(c, &tls.Config{ServerName: p.o.Host, RootCAs: roots}).HandshakeContext(ctx)
}

// owned tells whether the port is held by a process of this user: to another's
// no password is told.
func (p *Proc) owned() error {
	uid, ok := listener(p.listen)
	switch {
	case !ok:
		return errors.New("nothing listens on its port")
	case uid != os.Geteuid():
		return fault.New(fault.Unavailable, "sidecar_failed", "its port, %s, was taken by a process of uid %d", p.listen, uid)
	}
	return nil
}

// ask asks for a tunnel; the connection is the caller's if it is given.
func (p *Proc) ask(ctx context.Context, auth string) (net.Conn, int, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", p.listen.String())
	if err != nil {
		return nil, 0, err
	}
	if t, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(t)
	}
	head := "CONNECT " + p.o.Host + ":443 HTTP/1.1\r\nHost: " + p.o.Host + ":443\r\n"
	if auth != "" {
		head += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(auth)) + "\r\n"
	}
	if _, err = io.WriteString(c, head+"\r\n"); err == nil {
		var resp *http.Response
		if resp, err = http.ReadResponse(bufio.NewReader(c), &http.Request{Method: http.MethodConnect}); err == nil {
			if resp.StatusCode != http.StatusOK {
				resp.Body.Close()
				c.Close()
			}
			return c, resp.StatusCode, nil
		}
	}
	c.Close()
	return nil, 0, err
}

// Addr is where it listens.
func (p *Proc) Addr() netip.AddrPort { return p.listen }

// Auth is what it asks of the gate.
func (p *Proc) Auth() string { return p.o.Auth }

// RunConfigSHA256 is the digest of its options and addons.
func (p *Proc) RunConfigSHA256() string { return p.digest }

// Wait blocks until it has ended and says why, as a fault 69 (sidecar_failed).
func (p *Proc) Wait() error {
	how := p.How()
	return fault.New(fault.Unavailable, "sidecar_failed", "mitmdump ended (%s)%s", how, p.said()).
		WithHint("an addon that cannot be loaded ends it, too; try it by itself: mitmdump -s ADDON")
}

// said is the end of what it said, on one line.
func (p *Proc) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	lines := bytes.Split(bytes.TrimSpace(p.words), []byte("\n"))
	text := strings.TrimSpace(fault.Line(string(bytes.Join(lines[max(0, len(lines)-6):], []byte(" ")))))
	if text == "" {
		return ""
	}
	return ": " + text
}

// Stop ends it and returns when it is gone. Stopping it twice is fine.
func (p *Proc) Stop() { _ = p.Process.Stop(stopTimeout) }
