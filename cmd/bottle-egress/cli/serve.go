package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gate"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/secret"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/trust"
)

// caLife is how long the authority of a gate in the foreground is valid.
const caLife = 24 * time.Hour

// serveFlags are where, and nothing about what may leave: that is the document.
type serveFlags struct {
	listen, audit, caCert, dir string
	keeper                     bool
	bounds                     audit.Bounds
}

func serveCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-egress serve")
	var f serveFlags
	fs.StringVar(&f.listen, "listen", "", "`ADDRESS` to serve on: unix:PATH, or tcp:127.0.0.1:PORT, which every user of this host can reach")
	fs.StringVar(&f.audit, "audit", "-", "append the audit log to `FILE`; - is stdout")
	p.Ambient(fs, f.bounds.Flags(fs)...)
	fs.StringVar(&f.caCert, "ca-cert", "", "write the certificate that clients of inspected hosts have to trust to `FILE`")
	fs.StringVar(&f.dir, "dir", "", "the manifest's `FOLDER`, for the files that the plan names; the working folder if not given")
	fs.BoolVar(&f.keeper, "keeper", false, "take configuration and connections from a bottle's keeper")
	return &tool.Command{
		Name:       "serve",
		ShortUsage: "bottle-plan AGENT | bottle-egress serve --listen unix:PATH [flags]",
		ShortHelp:  "run one bottle's gate in the foreground",
		LongHelp: `
Runs the gate of the document on stdin until it is interrupted: a proxy that
lets through what bottle.egress allows, injects the secrets, and writes one line
of JSON for every decision. It is what bottle-vm up puts in front of a bottle,
without the bottle.

  bottle-plan claude | bottle-egress serve --listen tcp:127.0.0.1:3128 &
  curl -x http://127.0.0.1:3128 https://api.anthropic.com/`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			if f.keeper {
				if f != (serveFlags{keeper: true, audit: "-", bounds: audit.DefaultBounds}) {
					return fault.New(fault.Usage, "usage", "--keeper takes no other flag").WithHint("the keeper's configuration says it all")
				}
				return serveKeeper(ctx, p)
			}
			return serve(ctx, p, f)
		},
	}
}

// serve runs a gate by itself. What it opens it closes in the opposite order.
func serve(ctx context.Context, p *tool.Proc, f serveFlags) (err error) {
	addr, err := parseListen(f.listen)
	if err != nil {
		return err
	}
	if err := f.bounds.Check(); err != nil {
		return err
	}
	d, err := one(ctx, p)
	if err != nil {
		return err
	}
	b, e, err := checked(d)
	if err != nil {
		return err
	}
	if err := withoutSidecar(b); err != nil {
		return err
	}
	cfg, err := configure(ctx, p, f, b)
	if err != nil {
		return err
	}
	proxy, why, err := startProxy(ctx, p, f.dir, b, e)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, proxy.stop()) }()
	cfg.Upstream = proxy.addr()

	if cfg.Audit, err = openAudit(p, f, b.ID); err != nil {
		return err
	}
	defer cfg.Audit.Close()
	g, err := gate.New(cfg)
	if err != nil {
		return err
	}
	l, err := addr.listen()
	if err != nil {
		return err
	}
	fmt.Fprintf(p.Stderr, "%s: ready: %s is served on %s (proxy %s: %s)\n", p.Name, b.ID, addr.name(l), proxy.name(), why)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	died := proxy.watch(ctx, cancel)
	return errors.Join(g.Serve(ctx, l), died())
}

// withoutSidecar refuses a plan that wants its requests read on their way: a gate
// by itself has nobody who would keep mitmdump.
func withoutSidecar(b *plan.Bottle) error {
	if b.Egress.Mitmdump == nil {
		return nil
	}
	return fault.New(fault.Unavailable, "no_sidecar_here", "the plan of %s has addons of mitmdump, and this gate would run without them", b.ID).
		WithHint("bottle-vm up runs them; or take egress.mitmdump out of the manifest")
}

// checked gives the policy of a document and what follows from it. An egress
// section that says something else is refused: the policy is edited in bottle.
func checked(d *plan.Doc) (*plan.Bottle, *plan.Egress, error) {
	b, err := d.Bottle()
	if err != nil {
		return nil, nil, err
	}
	e, err := pipelock.Derive(b)
	if err != nil || !d.Has("egress") {
		return b, e, err
	}
	given, err := d.Egress()
	if err != nil {
		return nil, nil, err
	}
	was, err := plan.Encode(given)
	if err != nil {
		return nil, nil, err
	}
	is, err := plan.Encode(e)
	if err != nil {
		return nil, nil, err
	}
	if string(was) != string(is) {
		return nil, nil, fault.New(fault.Data, "egress_differs", "the egress section is not what follows from bottle").At("egress").
			WithHint("edit the policy in bottle.egress or the manifest, and let bottle-egress compute this section")
	}
	return b, e, nil
}

// configure gathers what the gate needs: roots, secrets and the authority.
func configure(ctx context.Context, p *tool.Proc, f serveFlags, b *plan.Bottle) (gate.Config, error) {
	cfg := gate.Config{Bottle: b, Log: p.Stderr}
	at, err := place(p, f.dir, b)
	if err != nil {
		return cfg, err
	}
	if at.Scripts, err = trust.ReadScripts(b, at); err != nil {
		return cfg, err
	}
	if err := trusted(p, b, at); err != nil {
		return cfg, err
	}
	if cfg.RootsPEM, err = roots(b, at); err != nil {
		return cfg, err
	}
	if cfg.Secrets, err = secrets(ctx, p, b, at); err != nil {
		return cfg, err
	}
	cfg.CA, err = authority(p, f.caCert, b)
	return cfg, err
}

// place finds the manifest's folder, where the plan names files. The manifest
// has to be there, unchanged, as a plan of another folder must not pick up the
// files of this one.
func place(p *tool.Proc, dir string, b *plan.Bottle) (trust.Place, error) {
	at := trust.Place{Home: p.Getenv("HOME")}
	var err error
	if namesFiles(b) {
		at.Base, err = trust.Base(dir, b.Manifest)
		return at, err
	}
	if at.Base, err = filepath.Abs(dir); err != nil {
		return at, fault.New(fault.NoInput, "no_input", "the manifest's folder: %w", err)
	}
	return at, nil
}

func namesFiles(b *plan.Bottle) bool {
	for _, s := range b.Secrets {
		if !strings.HasPrefix(s.From, "env:") {
			return true
		}
	}
	return len(b.Egress.Roots) > 0
}

// secrets fetches what the gate injects. One that is missing is only a warning:
// its first use is refused.
func secrets(ctx context.Context, p *tool.Proc, b *plan.Bottle, at trust.Place) (map[string]string, error) {
	values, missing, err := secret.Resolve(ctx, b.Secrets, secret.Options{
		Base: at.Base, Home: at.Home, Getenv: p.Getenv, Warn: p.Warn, Scripts: at.Scripts,
	})
	if err != nil {
		return nil, err
	}
	for _, m := range missing {
		p.Warn("secret %s is missing (%s): requests that need it will be refused", m.Name, m.Why)
	}
	return values, nil
}

// trusted asks for the user's word where the plan reads or runs what lies
// outside of the manifest's folder. Only what the gate touches counts here.
func trusted(p *tool.Proc, b *plan.Bottle, at trust.Place) error {
	touched := *b
	touched.Mounts, touched.Image, touched.Workspace.Path = nil, plan.Image{Kind: "host"}, "."
	if wanted, err := trust.Needed(&touched, at); err != nil || len(wanted) == 0 {
		return err
	}
	root, err := state.Open(p.Getenv)
	if err != nil {
		return err
	}
	return trust.Check(root, &touched, at, filepath.Join(at.Base, b.Manifest.Name))
}

// authority makes the certificate authority for inspected hosts.
func authority(p *tool.Proc, file string, b *plan.Bottle) (*ca.Authority, error) {
	hosts := gate.InspectedHosts(b)
	switch {
	case len(hosts) == 0 && file != "":
		return nil, fault.New(fault.Usage, "usage", "--ca-cert is given and no host of %s is inspected", b.ID).WithHint("leave it out")
	case len(hosts) == 0:
		return nil, nil
	case file == "":
		return nil, fault.New(fault.Usage, "usage", "hosts of %s are inspected (%s), and clients have to trust the gate's certificate", b.ID, strings.Join(hosts, ", ")).
			WithHint("add --ca-cert FILE, and let clients trust FILE (curl --cacert FILE)")
	}
	a, err := ca.New(b.ID, hosts, p.Now(), caLife)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(file, a.CertPEM(), 0o644); err != nil {
		return nil, fault.New(fault.CantCreate, "cannot_create", "the certificate: %w", err)
	}
	return a, nil
}

func openAudit(p *tool.Proc, f serveFlags, id string) (*audit.Log, error) {
	opts := f.bounds.Options(id)
	opts.Now = p.Now
	if f.audit == "-" {
		return audit.New(keepOpen{p.Stdout}, opts), nil
	}
	return audit.Open(f.audit, opts)
}

// keepOpen is stdout for a log that closes what it writes to.
type keepOpen struct{ io.Writer }

func (keepOpen) Close() error { return nil }

// proxy is pipelock, or nothing with the built-in proxy.
type proxy struct {
	proc *pipelock.Proc
	dir  string
}

func startProxy(ctx context.Context, p *tool.Proc, dir string, b *plan.Bottle, e *plan.Egress) (*proxy, string, error) {
	at, err := place(p, dir, b)
	if err != nil {
		return nil, "", err
	}
	program, why, err := pipelock.Choose(ctx, b, e, p.Getenv, trust.Reach(b, at))
	if err != nil || program == nil {
		return &proxy{}, why, err
	}
	dir, err = os.MkdirTemp("", "bottle-egress-")
	if err != nil {
		return nil, "", fault.New(fault.CantCreate, "cannot_create", "a folder for pipelock: %w", err)
	}
	proc, err := program.Start(ctx, pipelock.Options{Dir: dir, Policy: []byte(e.Pipelock.YAML), InstanceID: b.ID})
	if err != nil {
		return nil, "", errors.Join(err, os.RemoveAll(dir))
	}
	return &proxy{proc, dir}, why, nil
}

func (x *proxy) name() string {
	if x.proc == nil {
		return "builtin"
	}
	return "pipelock"
}

func (x *proxy) addr() string {
	if x.proc == nil {
		return ""
	}
	return x.proc.Addr().String()
}

// watch ends the gate with its proxy: without it there is no way out, and
// another process could take its port. The returned function says so afterwards.
func (x *proxy) watch(ctx context.Context, stop func()) (died func() error) {
	if x.proc == nil {
		return func() error { return nil }
	}
	gone := make(chan bool, 1)
	go func() {
		select {
		case <-x.proc.Exited():
			gone <- true
			stop()
		case <-ctx.Done():
			gone <- false
		}
	}()
	return func() error {
		stop()
		if !<-gone {
			return nil
		}
		if err := x.proc.Wait(); err != nil {
			return err
		}
		return fault.New(fault.Unavailable, "proxy_died", "pipelock ended")
	}
}

func (x *proxy) stop() error {
	if x == nil || x.proc == nil {
		return nil
	}
	return errors.Join(x.proc.Stop(), os.RemoveAll(x.dir))
}
