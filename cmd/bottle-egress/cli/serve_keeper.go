package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"os/user"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/fdpass"
	"github.com/bottle-tools/bottle/lib/gate"
	"github.com/bottle-tools/bottle/lib/gateproc"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/trust"
)

// serveKeeper is the gate of a bottle: lib/gateproc has the contract. stdout
// tells one thing, how the start went.
func serveKeeper(ctx context.Context, p *tool.Proc) error {
	in := &io.LimitedReader{R: p.Stdin, N: 2 * plan.MaxBytes}
	lines := bufio.NewReader(in)
	g, l, log, err := keeperGate(p, lines)
	if err != nil {
		return errors.Join(err, answer(p, gateproc.Ready{Error: plan.NewFailure("gate", err)}))
	}
	defer log.Close()
	if err := answer(p, gateproc.Ready{OK: true}); err != nil {
		l.Close()
		return err
	}
	in.N = math.MaxInt64
	go changes(p, g, lines)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go tellHead(ctx, p, log)
	return g.Serve(ctx, l)
}

// tellHead keeps the keeper informed of how far the log is on the disk.
func tellHead(ctx context.Context, p *tool.Proc, log *audit.Log) {
	var last audit.Head
	for {
		if h := log.Durable(); h != last {
			if answer(p, gateproc.Told{Head: h}) != nil {
				return
			}
			last = h
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

// changes puts the keeper's rules in force, one line after the other. What the
// keeper cannot have meant ends the gate: the next one begins anew.
func changes(p *tool.Proc, g *gate.Gate, lines *bufio.Reader) {
	<-g.Started()
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return // the keeper is gone, and the connections end as well
		}
		var u live.Update
		if json.Unmarshal(line, &u) != nil {
			g.Close()
			return
		}
		a, err := g.Apply(u)
		a.Seq = u.Seq
		if err != nil {
			a.Error = plan.NewFailure("gate", err)
		}
		if answer(p, a) != nil {
			g.Close()
			return
		}
	}
}

func answer(p *tool.Proc, r any) error {
	line, err := json.Marshal(r)
	if err == nil {
		_, err = p.Stdout.Write(append(line, '\n'))
	}
	if err != nil {
		return fault.New(fault.IO, "write_failed", "answering the keeper: %w", err)
	}
	return nil
}

func keeperGate(p *tool.Proc, in *bufio.Reader) (*gate.Gate, net.Listener, *audit.Log, error) {
	c, err := keeperConfig(p, in)
	if err != nil {
		return nil, nil, nil, err
	}
	cfg := gate.Config{Bottle: c.Bottle, Secrets: c.Secrets, Upstream: c.Upstream, Log: p.Stderr, OnShut: func(why error) {
		s := gateproc.State{Gate: gateproc.Open}
		if why != nil {
			s = gateproc.State{Gate: gateproc.Shut, Why: why.Error()}
		}
		_ = answer(p, s) // a keeper that is gone ends the gate by its socket
	}}
	if cfg.RootsPEM, err = roots(c.Bottle, trust.Place{Base: c.Base, Home: home(p)}); err != nil {
		return nil, nil, nil, err
	}
	if len(c.CA) > 0 {
		if cfg.CA, err = ca.Unmarshal(c.CA); err != nil {
			return nil, nil, nil, err
		}
	}
	if s := c.Sidecar; s != nil {
		back, err := net.FileListener(os.NewFile(gateproc.BackFD, "sidecar"))
		if err != nil {
			return nil, nil, nil, fault.New(fault.Bug, "bug", "the sidecar's descriptor: %w", err)
		}
		cfg.Sidecar = &gate.Sidecar{Name: s.Name, Addr: s.Addr, Auth: s.Auth, BackAuth: s.BackAuth, CA: s.CA, Back: back}
	}
	conns, err := fdpass.New(os.NewFile(gateproc.ConnFD, "connections"))
	if err != nil {
		return nil, nil, nil, fault.New(fault.Bug, "bug", "the keeper's descriptor: %w", err).
			WithHint("--keeper is for bottle-vm; by hand, use --listen")
	}
	opts := c.AuditBounds.Options(c.ID)
	opts.Now, opts.Head = p.Now, c.AuditHead
	if cfg.Audit, err = audit.Open(c.Audit, opts); err != nil {
		conns.Close()
		return nil, nil, nil, err
	}
	g, err := gate.New(cfg)
	if err == nil {
		// A gate that cannot write is none: up fails, or the keeper tries again.
		err = cfg.Audit.Start()
	}
	if err != nil {
		conns.Close()
		cfg.Audit.Close()
		return nil, nil, nil, err
	}
	return g, untilEOF{fdpass.NewListener(conns)}, cfg.Audit, nil
}

func keeperConfig(p *tool.Proc, in *bufio.Reader) (*gateproc.Config, error) {
	bad := func(format string, args ...any) (*gateproc.Config, error) {
		return nil, fault.New(fault.Data, "bad_config", "the keeper's configuration "+format, args...).
			WithHint("--keeper is for bottle-vm; by hand, pipe a document into bottle-egress serve --listen …")
	}
	if tool.IsTerminal(p.Stdin) {
		return bad("cannot be typed")
	}
	line, err := in.ReadBytes('\n')
	if err != nil {
		return bad("ends early: %w", err)
	}
	c := new(gateproc.Config)
	// Its errors would quote the text, which holds secrets.
	if json.Unmarshal(line, c) != nil || c.Bottle == nil || c.ID == "" || c.Audit == "" {
		return bad("is not of the form of lib/gateproc")
	}
	return c, c.Bottle.Validate()
}

// home is for trust roots that start with ~. The keeper leaves its gate no
// environment, so the system is asked.
func home(p *tool.Proc) string {
	if h := p.Getenv("HOME"); h != "" {
		return h
	}
	u, err := user.Current()
	if err != nil {
		return ""
	}
	return u.HomeDir
}

// untilEOF ends a gate in order when its keeper has closed the other end.
type untilEOF struct{ net.Listener }

func (l untilEOF) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if errors.Is(err, io.EOF) {
		err = net.ErrClosed
	}
	return c, err
}
