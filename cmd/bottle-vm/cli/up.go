package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/image"
	"github.com/bottle-tools/bottle/lib/keeper"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/secret"
	"github.com/bottle-tools/bottle/lib/sidecar"
	"github.com/bottle-tools/bottle/lib/sign"
	"github.com/bottle-tools/bottle/lib/smolfile"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/trust"
	"github.com/bottle-tools/bottle/lib/worktree"
)

type upFlags struct {
	dir, name, cache string
	signers, revoked tool.Filled
	expect           tool.List
	owner            int
	printID          bool
	warm             bool
	audit            audit.Bounds
}

func (v *vm) upCommand() *tool.Command {
	var f upFlags
	fs := v.p.Flags("bottle-vm up")
	fs.StringVar(&f.dir, "dir", "", "the manifest's `FOLDER`; the working folder if not given")
	fs.StringVar(&f.name, "name", "", "call the bottle `NAME` instead of its agent's name")
	fs.StringVar(&f.cache, "cache", "", "image cache `FOLDER`")
	fs.IntVar(&f.owner, "owner", 0, "remove the bottle when process `PID` is gone")
	fs.BoolVar(&f.printID, "print-id", false, "print the ids of the bottles instead of their documents")
	fs.BoolVar(&f.warm, "warm", false, "start a copy of a prepared machine, which the first such start prepares (engine smolvm)")
	fs.Var(&f.signers, "require-signed", "start only what somebody has signed whom `FILE` allows (ssh-keygen(1), ALLOWED SIGNERS)")
	fs.Var(&f.revoked, "revoked", "keys that do not count any more: a `FILE` with a KRL, or public keys")
	fs.Var(&f.expect, "expect", "start only the plan with this `DIGEST`, as bottle-plan --hash prints it; may be repeated")
	// Where signers are listed may be ambient: it can only keep bottles from starting.
	v.p.Ambient(fs, append(f.audit.Flags(fs), "dir", "cache", "require-signed", "revoked")...)
	out := v.p.OutputFlags(fs)
	return &tool.Command{
		Name:       "up",
		ShortUsage: "bottle-plan AGENT | bottle-vm up [flags]",
		ShortHelp:  "start the bottle of each document; prints it with its vm section",
		LongHelp: `
Returns once the bottle is ready; it runs on under its keeper until down.
Sections that are missing (egress, pack) are filled in; a section that differs
from what up computes is refused.

With --require-signed, a signature in the document (bottle-plan sign) or in the
file beside the manifest (bottle.json.sig) has to be about exactly this plan and
made by a key that FILE allows; anything else is refused (77) before something
is started. FILE has to lie where no bottle and no checkout comes.

With --warm the bottle is a copy of a machine that has booted the same image and
waits; the first such start prepares it, and bottle-gc removes it when it was
not used for a day. A bottle that cannot be started so, or not faster, is
refused (78). docs/warm.md tells what a copy shares.

  bottle-plan claude | bottle-vm up | jq -r .vm.id
  bottle-plan claude | bottle-vm up --require-signed ~/.config/bottle/allowed_signers`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			if err := f.audit.Check(); err != nil {
				return err
			}
			return v.up(ctx, &f, out)
		},
	}
}

// up is a filter, except that a bottle whose document cannot be written is
// taken back: nobody would know of it.
func (v *vm) up(ctx context.Context, f *upFlags, out *tool.Output) error {
	return v.p.Filter(ctx, "vm", out, func(ctx context.Context, d *plan.Doc) error {
		s := starter{vm: v, flags: f, doc: d}
		return s.run(ctx)
	}, tool.Undo(func(d *plan.Doc) {
		if m, err := d.VM(); err == nil {
			_ = v.down(context.WithoutCancel(ctx), m.ID)
		}
	}), tool.Render(func(d *plan.Doc) []byte {
		if m, err := d.VM(); f.printID && err == nil && d.Failure() == nil {
			return []byte(m.ID)
		}
		if f.printID {
			return nil
		}
		return d.Line()
	}))
}

// starter turns one document into a running bottle.
type starter struct {
	*vm
	flags  *upFlags
	doc    *plan.Doc
	bottle *plan.Bottle
	root   *state.Root
	base   string // the manifest's folder, resolved
	cfg    keeper.Config
	packs  map[string]string // files made of the image, by what made them
	// scripts of secrets' commands, as they were trusted
	scripts trust.Scripts
}

func (s *starter) run(ctx context.Context) error {
	var err error
	if s.doc.Has("vm") {
		return fault.New(fault.Data, "already_up", "the document has a vm section already").
			WithHint("bottle-vm exec and down take it; up wants the output of bottle-plan")
	}
	if s.bottle, err = s.doc.Bottle(); err != nil {
		return err
	}
	if s.root, err = s.vm.root(); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{
		s.place, s.expected, s.signed, s.egress, s.trusted, s.folders, s.pack, s.programs, s.proxy, s.sidecar, s.secrets,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return s.engines(ctx)
}

// engines starts the bottle on the first engine that can hold its plan: one
// that refuses a clause (78) has left nothing, and the next is tried.
func (s *starter) engines(ctx context.Context) error {
	works, err := s.vm.chooseEngines(ctx, s.bottle, s.root, trust.Reach(s.bottle, s.vm.place(s.base)))
	if err != nil {
		return err
	}
	var passed passedOver
	for i, c := range works {
		s.cfg.Runtime, s.cfg.RuntimeWhy = c.Name(), c.why
		if len(passed) > 0 {
			s.cfg.RuntimeWhy = "not " + strings.Join(passed, "; not ")
		}
		tellFirst(ctx, c.Engine, s.p.Stderr)
		if s.cfg.Pack, err = s.packed(ctx, c.Engine); err != nil {
			return err
		}
		resolved := s.cfg // start puts the bottle's own copies in place of what it resolved
		err := s.start(ctx)
		s.cfg = resolved
		f := fault.As(err)
		if f == nil || f.Exit != fault.Host {
			return err
		}
		// Only smolvm may have warm starts: why it has none is what the caller asks.
		if s.flags.warm && strings.HasPrefix(s.cfg.RuntimeWhy, "not ") {
			return fault.New(f.Exit, f.Code, "%w; %s", err, s.cfg.RuntimeWhy).WithHint("%s", f.Hint)
		}
		if s.flags.warm || i == len(works)-1 {
			return err
		}
		passed = passed.add(c.Name(), err)
	}
	return nil
}

// place finds the manifest's folder, and makes sure that it holds the manifest
// that was planned.
func (s *starter) place(context.Context) (err error) {
	if s.base, err = trust.Base(s.flags.dir, s.bottle.Manifest); err == nil && s.bottle.Manifest.Name != "-" {
		s.cfg.Manifest = filepath.Join(s.base, s.bottle.Manifest.Name)
	}
	return err
}

// expected refuses a plan that is none of those the caller named.
func (s *starter) expected(context.Context) error {
	if len(s.flags.expect) == 0 {
		return nil
	}
	digest, err := plan.Digest(s.bottle)
	if err != nil {
		return err
	}
	if slices.Contains(s.flags.expect, digest) {
		return nil
	}
	return fault.New(fault.NoPerm, "unexpected_plan", "the plan of %s is %s, and not what --expect names", s.bottle.ID, digest).
		WithHint("look at what changed; bottle-plan --hash %s prints the digest", s.bottle.Agent)
}

// signed refuses a plan that nobody has signed who may, if the caller asks for
// signatures. It comes before anything that the plan wants is done.
func (s *starter) signed(ctx context.Context) (err error) {
	if s.flags.signers == "" {
		if s.flags.revoked != "" {
			return fault.New(fault.Usage, "usage", "--revoked without --require-signed").WithHint("say whose signatures count, too")
		}
		return nil
	}
	s.cfg.Signed, err = sign.Check(ctx, s.doc, s.bottle, s.vm.place(s.base), string(s.flags.signers), string(s.flags.revoked), s.root.Dir)
	return err
}

// egress fills in the derived section, or refuses one that was edited: people
// edit policy, not what follows from it.
func (s *starter) egress(context.Context) error {
	want, err := pipelock.Derive(s.bottle)
	if err != nil {
		return err
	}
	if !s.doc.Has("egress") {
		return s.doc.Set("egress", want)
	}
	raw, err := plan.Encode(want)
	if err != nil {
		return err
	}
	got, err := s.doc.Egress()
	if err != nil {
		return err
	}
	gotRaw, err := plan.Encode(got)
	if err != nil {
		return err
	}
	if string(gotRaw) != string(raw) {
		return fault.New(fault.Data, "section_differs", "section egress is not what follows from bottle.egress").
			WithHint("drop it (jq -c 'del(.egress)') or run bottle-egress again; policy is edited in bottle.egress")
	}
	return nil
}

func (s *starter) trusted(context.Context) (err error) {
	at := s.vm.place(s.base)
	if s.scripts, err = trust.ReadScripts(s.bottle, at); err != nil {
		return err
	}
	at.Scripts = s.scripts
	return trust.Check(s.root, s.bottle, at, filepath.Join(s.base, s.bottle.Manifest.Name))
}

// folders resolves the workspace and the mounts.
func (s *starter) folders(context.Context) error {
	pl := s.vm.place(s.base)
	ws, err := pl.Path(s.bottle.Workspace.Path)
	if err != nil {
		return err
	}
	fi, err := os.Lstat(ws)
	switch {
	case err != nil:
		return fault.New(fault.NoInput, "no_workspace", "workspace: %w", err).WithHint("make the folder, or change workspace.path in the manifest")
	case fi.Mode()&os.ModeSymlink != 0:
		target, _ := filepath.EvalSymlinks(ws)
		return fault.New(fault.Data, "workspace_symlink", "workspace %s is a symbolic link", ws).
			WithHint("write the folder itself in workspace.path: %s", target)
	case !fi.IsDir():
		return fault.New(fault.NoInput, "no_workspace", "workspace %s is not a folder", ws).WithHint("name a folder in workspace.path")
	}
	if s.cfg.Workspace, err = filepath.EvalSymlinks(ws); err != nil {
		return fault.New(fault.NoInput, "no_workspace", "workspace: %w", err)
	}
	s.cfg.HostUID, s.cfg.HostGID = os.Geteuid(), os.Getegid()
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && s.cfg.HostUID == 0 {
		s.cfg.HostUID, s.cfg.HostGID = int(st.Uid), int(st.Gid)
	}
	if s.bottle.Workspace.Mode != "scratch" {
		if err := s.apart("workspace", s.cfg.Workspace, s.bottle.Workspace.Mode == "rw"); err != nil {
			return err
		}
	}
	for i, m := range s.bottle.Mounts {
		at := fmt.Sprintf("bottle.mounts[%d].source", i)
		src, err := pl.Path(m.Source)
		if err == nil {
			src, err = filepath.EvalSymlinks(src)
		}
		if err != nil {
			return fault.New(fault.NoInput, "no_mount", "%w", err).At(at).WithHint("make it, or take the mount out of the manifest")
		}
		if fi, err := os.Stat(src); err != nil || !fi.IsDir() && !fi.Mode().IsRegular() {
			return fault.New(fault.Data, "bad_mount", "%s is neither a folder nor a file", src).At(at).
				WithHint("sockets and devices are no mounts: a bottle has one way out")
		}
		if err := s.apart(at, src, m.Mode == "rw"); err != nil {
			return err
		}
		s.cfg.Mounts = append(s.cfg.Mounts, engine.Bind{Source: src, Target: m.Target, ReadOnly: m.Mode == "ro"})
	}
	if s.bottle.Home == "keep" {
		if s.cfg.Home, err = s.root.Home(s.bottle.Agent, s.base); err != nil {
			return err
		}
		if err := os.Chown(s.cfg.Home, s.cfg.HostUID, s.cfg.HostGID); err != nil {
			return fault.New(fault.CantCreate, "cannot_create", "home: %w", err)
		}
	}
	return nil
}

// apart refuses to show the guest the records that hold it: with them it could
// forge what down and gc act on. Nor may it write to the images that bottles share,
// since the next one runs what is in them.
func (s *starter) apart(what, dir string, writable bool) error {
	if dir == "/" {
		return fault.New(fault.Data, "bad_mount", "%s is the whole file system", what).WithHint("name the project's folder")
	}
	for _, own := range []string{s.root.Dir, s.root.RunDir} {
		real, err := filepath.EvalSymlinks(own)
		if err != nil {
			real = own
		}
		if within(dir, real) || within(real, dir) {
			return fault.New(fault.Data, "holds_state", "%s %s holds the state of the bottle tools (%s)", what, dir, real).
				WithHint("use a folder further down, or set XDG_STATE_HOME to a place outside of it")
		}
	}
	images, err := s.images()
	if err != nil || !writable || !filepath.IsAbs(images) {
		return nil // that there is no place for images is told where one is needed
	}
	if real, err := filepath.EvalSymlinks(images); err == nil {
		images = real
	}
	if within(dir, images) || within(images, dir) {
		return fault.New(fault.Data, "holds_images", "%s %s holds the images that bottles share (%s)", what, dir, images).
			WithHint("use a folder further down, mount it read-only, or set XDG_CACHE_HOME to a place outside of it")
	}
	return nil
}

// images is where they are.
func (s *starter) images() (string, error) {
	if s.flags.cache != "" {
		return s.flags.cache, nil
	}
	return image.DefaultDir(s.p.Getenv, os.Geteuid(), s.p.Getenv("HOME"))
}

// within tells whether path lies in dir or is it.
func within(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && (rel == "." || rel != ".." && !strings.HasPrefix(rel, "../"))
}

func (s *starter) pack(ctx context.Context) error {
	opts := image.Options{CacheDir: s.flags.cache, Home: s.p.Getenv("HOME"), Progress: s.p.Stderr, Now: s.p.Now}
	if s.bottle.Image.Kind != image.KindHost {
		var err error
		if opts.CacheDir, err = s.images(); err != nil {
			return err
		}
	}
	got, rootfs, err := image.Pack(ctx, s.bottle.Image, s.base, opts)
	if err != nil {
		return err
	}
	if got.Smolfile, err = smolfile.Section(s.bottle); err != nil {
		return err
	}
	s.cfg.Rootfs, s.cfg.Image, s.cfg.Warm = rootfs, got.Digest, s.flags.warm
	if rootfs != "" {
		if s.packs, err = image.Derived(opts.CacheDir, got.Digest); err != nil {
			return err
		}
	}
	if !s.doc.Has("pack") {
		return s.doc.Set("pack", got)
	}
	was, err := s.doc.Pack()
	if err != nil {
		return err
	}
	if was.Digest != got.Digest || was.Kind != got.Kind {
		return fault.New(fault.Data, "section_differs", "section pack names %s %.19s…, the image is %s %.19s… now", was.Kind, was.Digest, got.Kind, got.Digest).
			WithHint("run bottle-pack again")
	}
	return nil
}

// packed gives the file that bottle-pack had the engine make of the image, if
// there is one of this very version of it.
func (s *starter) packed(ctx context.Context, by engine.Engine) (string, error) {
	if len(s.packs) == 0 {
		return "", nil
	}
	e, ok := by.(engine.Packer)
	if !ok {
		return "", nil
	}
	name, err := e.PackName(ctx)
	if f := fault.As(err); f != nil && f.Exit == fault.Host {
		return "", nil // this version has none; the root file system itself is used
	}
	return s.packs[name], err
}

func (s *starter) programs(context.Context) (err error) {
	if s.cfg.EgressExe, err = beside("bottle-egress"); err != nil {
		return err
	}
	s.cfg.GuestExe, err = beside("bottle-guest")
	return err
}

// proxy picks the gate's upstream. auto takes pipelock where it is installed
// and has something to carry.
func (s *starter) proxy(ctx context.Context) error {
	eg, err := s.doc.Egress()
	if err != nil {
		return err
	}
	prog, _, err := pipelock.Choose(ctx, s.bottle, eg, s.p.Getenv, trust.Reach(s.bottle, s.vm.place(s.base)))
	if err == nil && prog != nil {
		s.cfg.Pipelock = prog.Path
	}
	return err
}

// sidecar finds mitmdump where the plan has addons for it. A virtual environment
// in the workspace is the guest's to write, and would run on the host.
func (s *starter) sidecar(context.Context) error {
	if s.bottle.Egress.Mitmdump == nil {
		return nil
	}
	path, err := sidecar.Find(s.p.Getenv)
	if err != nil {
		return err
	}
	if err := trust.Program(sidecar.Name, path, trust.Reach(s.bottle, s.vm.place(s.base))); err != nil {
		return err
	}
	s.cfg.Mitmdump = path
	return nil
}

func (s *starter) secrets(ctx context.Context) error {
	values, missing, err := secret.Resolve(ctx, s.bottle.Secrets, secret.Options{
		Base: s.base, Home: s.p.Getenv("HOME"), Getenv: s.p.Getenv, Warn: s.p.Warn, Scripts: s.scripts,
	})
	if err != nil {
		return err
	}
	for _, m := range missing {
		s.p.Warn("secret %s is missing: %s; its first use will be answered with 403 secret_missing", m.Name, m.Why)
	}
	s.cfg.Secrets, s.cfg.UserHome, s.cfg.Audit = values, s.p.Getenv("HOME"), s.flags.audit
	for _, sec := range s.bottle.Secrets {
		if file, ok := strings.CutPrefix(sec.From, "file:"); ok {
			path, err := s.vm.place(s.base).Path(file)
			if err != nil {
				return err
			}
			s.cfg.Conceal = append(s.cfg.Conceal, path)
		}
	}
	return nil
}

// start makes the bottle's folder and hands over to its keeper.
func (s *starter) start(ctx context.Context) (err error) {
	exe, err := beside("bottle-keeper")
	if err != nil {
		return err
	}
	rec, err := s.record()
	if err != nil {
		return err
	}
	name := s.bottle.ID
	if s.flags.name != "" {
		if err := plan.CheckID(s.flags.name); err != nil {
			return fault.New(fault.Usage, "usage", "--name: %w", err)
		}
		name = s.flags.name
	}
	b, saved, err := s.root.Create(name, *rec)
	if err != nil {
		return err
	}
	s.cfg.ID, s.cfg.StateDir, s.cfg.RunRoot, s.cfg.Base = b.ID, s.root.Dir, s.root.RunDir, s.base
	s.cfg.Document = s.doc.Line()
	// From here on a failure must leave nothing.
	defer func() {
		if err != nil {
			if rerr := s.vm.remove(context.WithoutCancel(ctx), b, saved); rerr != nil {
				s.p.Warn("clearing up: %v", rerr)
			}
		}
	}()
	if err := s.view(b); err != nil {
		return err
	}
	if s.bottle.Workspace.Mode == "scratch" {
		if err := s.scratch(ctx, b); err != nil {
			return err
		}
	}
	h, err := keeper.Spawn(exe, b.Path("keeper.log"), s.environment())
	if err != nil {
		return err
	}
	if id, err := state.Identify(h.PID); err == nil {
		saved.Processes = append(saved.Processes, state.Child{Role: "keeper", Process: id})
	}
	if err := b.Save(saved); err != nil {
		h.Abandon()
		h.Wait()
		return err
	}
	return s.handOver(ctx, h)
}

func (s *starter) record() (*state.Record, error) {
	self, err := state.Identify(os.Getpid())
	if err != nil {
		return nil, fault.New(fault.Host, "no_proc", "this host does not tell process identities: %w", err)
	}
	digest, err := plan.Digest(s.bottle)
	if err != nil {
		return nil, err
	}
	rec := &state.Record{
		CreatedAt: s.p.Now().UTC().Truncate(time.Second), Creator: self,
		PlanSHA256: digest, ManifestDir: s.base, Workspace: s.cfg.Workspace,
	}
	if s.flags.owner != 0 {
		owner, err := state.Identify(s.flags.owner)
		if err != nil {
			return nil, fault.New(fault.Usage, "usage", "--owner: %w", err).
				WithHint("give the id of a process that runs")
		}
		rec.Owner = &owner
	}
	return rec, nil
}

// view gives the bottle a root file system that has a place for each of its
// mounts; the shared one is not written to.
func (s *starter) view(b *state.Bottle) error {
	if s.cfg.Rootfs == "" {
		return nil
	}
	var points []image.Mountpoint
	for _, m := range s.cfg.Mounts {
		fi, err := os.Stat(m.Source)
		if err != nil {
			return fault.New(fault.NoInput, "no_mount", "%w", err)
		}
		points = append(points, image.Mountpoint{Path: m.Target, Dir: fi.IsDir()})
	}
	rootfs, err := image.View(s.cfg.Rootfs, points, b.Dir)
	if err == nil {
		s.cfg.Rootfs = rootfs
	}
	return err
}

func (s *starter) scratch(ctx context.Context, b *state.Bottle) error {
	dst := b.Path("workspace")
	if err := worktree.Copy(ctx, s.cfg.Workspace, dst, nil); err != nil {
		return err
	}
	if s.cfg.HostUID != os.Geteuid() {
		if err := worktree.Chown(dst, s.cfg.HostUID, s.cfg.HostGID); err != nil {
			return err
		}
	}
	s.cfg.Workspace = dst
	return nil
}

// keeperEnvironment names what a keeper's engines need to find their programs and
// data, and nothing that a secret could be in.
var keeperEnvironment = []string{
	"PATH", "HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME",
	"SSL_CERT_FILE", "SSL_CERT_DIR", "BOTTLE_RUNSC", "BOTTLE_SMOLVM", "BOTTLE_PIPELOCK", "TMPDIR",
	"SMOLVM_LIB_DIR", "SMOLVM_AGENT_ROOTFS", "SMOLVM_DATA_DIR", "SMOLVM_VM_UID_DROP",
	"BOTTLE_TRANSCRIPTS", "BOTTLE_TRANSCRIPT_LOG", "BOTTLE_TRANSCRIPT_STATE", "BOTTLE_TRANSCRIPT_VERSION",
}

// environment of the keeper.
func (s *starter) environment() []string {
	var env []string
	for _, name := range keeperEnvironment {
		if val := s.p.Getenv(name); val != "" {
			env = append(env, name+"="+val)
		}
	}
	return env
}

// handOver configures the keeper and waits for its word. An interrupt takes the
// bottle back.
func (s *starter) handOver(ctx context.Context, h *keeper.Handle) error {
	stop := context.AfterFunc(ctx, h.Abandon)
	defer stop()
	defer s.vm.tellWaiting(s.cfg.ID, s.cfg.Runtime)()
	err := h.Configure(s.cfg)
	if err == nil {
		var r *keeper.Reply
		if r, err = h.Await(); err == nil {
			return s.settle(ctx, h, r)
		}
	}
	h.Abandon()
	h.Wait()
	if ctx.Err() != nil {
		return tool.Exit(tool.Interrupted)
	}
	return err
}

// waits is when up says that it is still waiting: most starts take less.
const (
	waitFirst = 20 * time.Second
	waitNext  = time.Minute
)

// tellWaiting says on stderr, now and then, that the bottle is not ready yet.
func (v *vm) tellWaiting(id, runtime string) (stop func()) {
	done := make(chan struct{})
	go func() {
		begun, next := time.Now(), time.NewTimer(waitFirst)
		defer next.Stop()
		for {
			select {
			case <-done:
				return
			case <-next.C:
				fmt.Fprintf(v.p.Stderr, "bottle-vm: %s is still starting on %s (%s so far)\n", id, runtime, time.Since(begun).Round(time.Second))
				next.Reset(waitNext)
			}
		}
	}()
	return func() { close(done) }
}

func (s *starter) settle(ctx context.Context, h *keeper.Handle, r *keeper.Reply) error {
	for _, w := range r.Warnings {
		s.p.Warn("%s", w)
	}
	if r.Error != nil {
		h.Wait()
		if ctx.Err() != nil {
			return tool.Exit(tool.Interrupted)
		}
		return fault.New(r.Error.Exit, r.Error.Code, "%s", r.Error.Message).WithHint("%s", r.Error.Hint)
	}
	if ctx.Err() != nil { // ready and told to end at the same time
		h.Abandon()
		h.Wait()
		return tool.Exit(tool.Interrupted)
	}
	d, err := plan.Parse(r.Document)
	if err != nil {
		return fault.New(fault.Bug, "bug", "the keeper's document: %w", err)
	}
	*s.doc = *d
	return nil
}
