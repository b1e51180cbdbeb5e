// Package smolvm is the engine that runs a bottle in a microVM of smolvm.
//
// The guest has no network device. Its one way out is a unix socket that smolvm
// mounts from the host (--mount-socket), behind which is the bottle's gate. The
// machine's workload, the first process of its container, is the guest helper.
// Commands run through "machine exec" and the helper's runner, so that neither
// variables nor secrets are ever in an argv.
//
// What smolvm cannot hold against a guest that is root in its own kernel is
// refused (78) and not approximated: see Prepare.
package smolvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/trust"
)

// Engine implements engine.Engine. Make it with New.
type Engine struct {
	getenv func(string) string
	env    []string
	away   []string // where no program to run may lie; see KeepAway

	mu     sync.Mutex
	cached *smolvm.Client
	asked  known // what the program said, if it was asked
}

var (
	_ engine.Engine       = (*Engine)(nil)
	_ engine.Packer       = (*Engine)(nil)
	_ engine.FirstStarter = (*Engine)(nil)
	_ engine.Restarter    = (*Engine)(nil)
)

// New gives the engine. environ is the environment of the caller, of which
// smolvm gets what it needs and nothing else.
func New(environ []string) *Engine { return NewFrom(lookup(environ)) }

// NewFrom is New for an environment that is asked for by name.
func NewFrom(getenv func(string) string) *Engine {
	return &Engine{getenv: getenv, env: programEnv(getenv)}
}

func lookup(environ []string) func(string) string {
	return func(name string) string {
		for i := len(environ) - 1; i >= 0; i-- {
			if v, ok := strings.CutPrefix(environ[i], name+"="); ok {
				return v
			}
		}
		return ""
	}
}

// environment is what smolvm gets of the caller's. A keeper has the same of it
// (bottle-vm up), so that all commands see the same machines. smolvm's other
// variables stay out: some open what a bottle closes (a container engine's
// socket, an agent of ssh, the seccomp filter of the guest's monitor), and their
// names cannot hold a secret of the caller either.
var environment = []string{
	"HOME", "PATH", "USER", "LOGNAME", "LANG", "LC_ALL", "TERM", "TMPDIR",
	"XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME",
	"SMOLVM_LIB_DIR", "SMOLVM_AGENT_ROOTFS", "SMOLVM_DATA_DIR", "SMOLVM_VM_UID_DROP",
	"BOTTLE_TRANSCRIPTS", "BOTTLE_TRANSCRIPT_LOG", "BOTTLE_TRANSCRIPT_STATE", "BOTTLE_TRANSCRIPT_VERSION",
}

func programEnv(getenv func(string) string) []string {
	out := []string{}
	for _, name := range environment {
		if v := getenv(name); v != "" {
			out = append(out, name+"="+v)
		}
	}
	// Without it smolvm unpacks a .smolmachine once for all machines, and attaches
	// that folder to each: a guest that is root in its kernel could write to the
	// image of every other bottle (source of 1.9.3, src/agent/launcher.rs and
	// crates/smolvm-pack/src/extract.rs; 1.32.2 knows the variable, too).
	return append(out, "SMOLVM_DISABLE_SHARED_EXTRACT=1")
}

func (e *Engine) Name() string                { return "smolvm" }
func (e *Engine) Transport() engine.Transport { return engine.Socket }

// client finds smolvm and its version, once.
func (e *Engine) client(ctx context.Context) (*smolvm.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cached != nil {
		return e.cached, nil
	}
	bin, err := smolvm.Find(e.getenv)
	if err != nil {
		return nil, err
	}
	if err := trust.Program("smolvm", bin, e.judged(append(e.reach(), e.away...))); err != nil {
		return nil, err
	}
	c, err := e.open(ctx, bin)
	if err != nil {
		return nil, err
	}
	e.cached = c
	return c, nil
}

// KeepAway names folders of a bottle that is to be made: a smolvm in one of them
// is not run. Those of the bottles that are there are known.
func (e *Engine) KeepAway(dirs []string) { e.away = dirs }

// reach are the folders that guests of this user's bottles may write, or that
// came with the repositories of their manifests: a PATH may lead through one (a
// virtual environment), and what is put there must not become the smolvm of the
// next command.
func (e *Engine) reach() (dirs []string) {
	root, err := state.Open(e.getenv)
	if err != nil {
		return nil
	}
	bottles, err := root.List()
	if err != nil {
		return nil
	}
	for _, b := range bottles {
		if rec, err := b.Load(); err == nil {
			dirs = append(dirs, rec.ManifestDir, rec.Workspace)
		}
		var shown engine.Shown
		if raw, err := os.ReadFile(b.Path(engine.ShownFile)); err == nil && json.Unmarshal(raw, &shown) == nil {
			dirs = append(dirs, shown.Workspace, shown.Home, shown.Rootfs)
			for _, bind := range shown.Binds {
				if !bind.ReadOnly {
					dirs = append(dirs, bind.Source)
				}
			}
		}
	}
	return dirs
}

// judged leaves out a folder that holds the whole home: a manifest may lie there,
// and so do the user's own programs. What a guest could do to it goes far beyond
// them.
func (e *Engine) judged(dirs []string) []string {
	home := e.getenv("HOME")
	if real, err := filepath.EvalSymlinks(home); err == nil {
		home = real
	}
	return slices.DeleteFunc(dirs, func(d string) bool { return d == "" || home != "" && trust.Within(d, home) })
}

// Available tells whether there is a smolvm that can hold a bottle (69), and
// whether this user can run one with it (78).
func (e *Engine) Available(ctx context.Context) error {
	c, err := e.client(ctx)
	if err != nil {
		return err
	}
	if err := checkVersion(c); err != nil {
		return err
	}
	return e.checkUser(os.Geteuid())
}

// Version gives smolvm's version: whether a guest boots has to be proved anew for
// each.
func (e *Engine) Version(ctx context.Context) (string, error) {
	c, err := e.client(ctx)
	if err != nil {
		return "", err
	}
	return c.Version.String(), nil
}

// FirstStart implements engine.FirstStarter.
func (e *Engine) FirstStart(ctx context.Context) (string, time.Duration) {
	c, err := e.client(ctx)
	if err != nil || !c.Unpacks() {
		return "", 0 // what is wrong its start will say
	}
	return fmt.Sprintf("the first start of smolvm %s unpacks the templates of its disks, once: half a minute, on a slow machine several", c.Version),
		smolvm.UnpackTimeout
}

func checkVersion(c *smolvm.Client) error {
	what := ""
	switch {
	case c.Version.Less(smolvm.SinceMountSocket):
		what = fmt.Sprintf("cannot mount a host socket, which came with %s", smolvm.SinceMountSocket)
	case c.Version.Less(smolvm.SinceSockets):
		what = fmt.Sprintf("has mounted sockets that hang, up to %s", smolvm.SinceSockets)
	case c.Version.Less(smolvm.SinceContainers):
		what = "does not show a mounted socket to an image's container"
	default:
		return nil
	}
	return fault.New(fault.Unavailable, "smolvm_too_old", "%s is smolvm %s, which %s; a bottle needs %s or newer",
		c.Bin, c.Version, what, smolvm.SinceContainers).WithHint("%s", smolvm.InstallHint)
}

// checkUser refuses root unless smolvm's own change of user is off. As root
// smolvm runs each guest's monitor as a user of its own (2000000 and up), who
// can reach neither the bottle's gate nor its workspace.
func (e *Engine) checkUser(euid int) error {
	if runtime.GOOS != "linux" || euid != 0 || e.getenv("SMOLVM_VM_UID_DROP") == "off" {
		return nil
	}
	return fault.New(fault.Host, "smolvm_root", "as root, smolvm gives each guest's monitor a user id of its own, which can reach neither the gate nor the workspace").
		WithHint("run it as a plain user who may open /dev/kvm, or set SMOLVM_VM_UID_DROP=off to let the monitor be root")
}

// refuse makes the fault for a clause of the plan that smolvm cannot hold.
func refuse(code, where, hint, format string, args ...any) error {
	return fault.New(fault.Host, code, "engine smolvm: "+format, args...).At(where).WithHint("%s", hint)
}

// Alive tells whether the guest runs. A machine that smolvm calls unreachable is
// slow, not dead, as long as its monitor lives.
func (e *Engine) Alive(ctx context.Context, r engine.Ref) (bool, error) {
	c, err := e.client(ctx)
	if err != nil {
		return false, err
	}
	m, err := c.MachineStatus(ctx, r.ID)
	if errors.Is(err, smolvm.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return running(m), nil
}

func running(m smolvm.Machine) bool {
	switch m.State {
	case "created", "stopped", "failed":
		return false
	case "running":
		return m.PID == 0 || exists(m.PID)
	}
	return m.PID > 0 && exists(m.PID)
}
