// Package engine is what the bottle tools ask of a sandbox: a guest kernel, a
// workspace, one socket to the gate, and commands run inside. engine/gvisor and
// engine/smolvm implement it.
package engine

import (
	"bytes"
	"context"
	"io"
	"os"
	"time"

	"github.com/bottle-tools/bottle/lib/drift"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Guest paths and numbers that both engines and the guest helper share.
const (
	GuestWorkspace = "/workspace"
	GuestDir       = "/opt/bottle"       // read-only: helper, its config, CA bundle
	GuestHelper    = "/opt/bottle/guest" // the helper binary
	GuestConfig    = "/opt/bottle/config.json"
	GuestBundle    = "/opt/bottle/ca-bundle.pem"
	// GuestTruststore is the CA bundle for Java, where hosts are inspected.
	GuestTruststore = "/opt/bottle/cacerts"
	GuestHome       = "/home/agent"
	GuestUser       = "agent"
	GuestUID        = 1000
	GuestProxy      = "127.0.0.1:3128"
	GuestSocket     = "/run/bottle/gate.sock" // where a socket engine puts the gate
)

// Transport is how a connection gets from the guest to the gate.
type Transport int

const (
	// FD: one SOCK_SEQPACKET pair is passed to the guest helper; for each
	// request the keeper sends back a fresh stream descriptor.
	FD Transport = iota
	// Socket: the keeper listens on Spec.GateSocket, which the engine makes
	// appear in the guest as GuestSocket. Until Start returns the keeper answers
	// every connection with guest.Greeting, and Start has to know that this was heard
	// inside of the guest: a socket that is not there must not look like a guest
	// without anything to say. What the guest answers comes by Spec.Reports.
	Socket
)

// Bind is one more host path in the guest.
type Bind struct {
	Source   string // absolute, resolved, no symlink left
	Target   string // absolute guest path
	ReadOnly bool
}

// Spec is all an engine needs to start one bottle. Everything is resolved and
// checked; an engine that cannot hold a clause returns a fault (78), it never
// warns.
type Spec struct {
	ID     string // vm.id
	Bottle *plan.Bottle
	Dir    string // the bottle's state folder, 0700, exists
	RunDir string // short folder for sockets, 0700, exists

	Workspace string // absolute host folder (for scratch: the private copy)
	ReadOnly  bool   // workspace mode ro
	Binds     []Bind // mounts of the plan, pinned git paths, hidden paths; in mount order
	Rootfs    string // absolute path of the unpacked image; "" for image host
	Pack      string // what the engine itself made of Rootfs (see Packer); "" for none
	Home      string // absolute host folder for home: keep; "" to discard

	GuestHelper string   // absolute host path of the static bottle-guest
	Env         []string // K=V, the whole environment of the guest, sorted
	CABundle    []byte   // PEM: the system's roots and the bottle's own CA
	CACert      []byte   // PEM: the bottle's own CA alone

	HostUID, HostGID int // who the guest's writes belong to on the host

	Guest      *os.File            // FD transport: the guest's end of the pair
	GateSocket string              // Socket transport: host path
	Reports    <-chan guest.Report // Socket transport: what the helper has told; nil if nobody listens
	Forget     func()              // drops Reports, and those of connections that are there; nil with Reports
	Log        *os.File            // engine's own log and the guest helper's stderr

	// Self is a program of ours that serves mountns.Main; "" for none.
	Self string

	// Warm asks for a copy of a prepared guest instead of a new one; nil does not.
	// An engine that has none, or none that is faster, refuses (78).
	Warm *Warm

	// Record is called with each process the engine has started, before the
	// next is started, so that a killed keeper leaves nothing unnamed.
	Record func(role string, pid int) error
}

// GuestConfig is the helper's, but for what only the engine knows: how it gets to
// the gate.
func (s *Spec) GuestConfig(u guest.User) *guest.Config {
	c := &guest.Config{
		Hostname:  s.ID,
		User:      u,
		Relays:    []guest.Relay{{Listen: GuestProxy, Service: guest.ServiceEgress}},
		Addresses: guest.Addresses(s.Bottle.Egress.Rules),
	}
	if cert := bytes.TrimSpace(s.CACert); len(cert) > 0 {
		c.CACert, c.Truststore = string(cert)+"\n", GuestTruststore
	}
	if len(s.CABundle) > 0 {
		c.CABundle = GuestBundle
	}
	for _, f := range s.Bottle.Files {
		c.Files = append(c.Files, guest.File{Path: f.Path, Content: f.Content})
	}
	return c
}

// GuestUserOf is the plan's user in the guest; uid and gid are those of the agent.
// The home is the same for root: HOME says so, and a kept home is mounted there.
func GuestUserOf(name string, uid, gid int) guest.User {
	if name == "root" {
		return guest.User{Name: "root", Home: GuestHome}
	}
	return guest.User{Name: GuestUser, UID: uid, GID: gid, Home: GuestHome}
}

// ForgetReports is for an engine that is about to boot the guest: what another
// boot of it has told does not count.
func (s *Spec) ForgetReports() {
	if s.Forget != nil {
		s.Forget()
	}
}

// Warm is what a prepared guest is found by. It is made where there is none.
type Warm struct {
	Dir   string // folder of prepared guests, in the user's state folder; may not be there yet
	Image string // digest of the image
}

// Shown is what of the host a guest was given. The keeper notes it in the
// bottle's folder (ShownFile) before the guest starts, for Verifier.
type Shown struct {
	Workspace   string `json:"workspace"`
	ReadOnly    bool   `json:"read_only"`
	Home        string `json:"home,omitempty"`
	Rootfs      string `json:"rootfs,omitempty"`
	GuestHelper string `json:"guest_helper"`
	Binds       []Bind `json:"binds"`
	HostUID     int    `json:"host_uid"`
}

// ShownFile is its name.
const ShownFile = "mounts.json"

// Shown is what s gives to the guest.
func (s *Spec) Shown() Shown {
	binds := s.Binds
	if binds == nil {
		binds = []Bind{}
	}
	return Shown{s.Workspace, s.ReadOnly, s.Home, s.Rootfs, s.GuestHelper, binds, s.HostUID}
}

// Running is what a Verifier looks at.
type Running struct {
	Ref
	Shown  Shown
	Keeper int // its pid: what is not the guest's own is compared with it
	VM     *plan.VM
	Proc   drift.Proc
	// Watches: the keeper says that it watches limits.
	Watches bool
}

// Verifier is an engine that can tell from outside how a running guest differs
// from what was asked for. It sends nothing to the guest.
type Verifier interface {
	Verify(r Running, f *drift.Findings)
	// Sockets are the paths of those that the engine keeps in the runtime folder,
	// and Programs what it starts for a moment.
	Sockets(r Ref) []string
	Programs() []string
}

// Packer is an engine that can make a file of a root file system which its guests
// may be started from.
type Packer interface {
	// PackName tells what the file is called, beside the digest of what it is made
	// of: engine, version, machine. It is a fault (78) where it cannot be made.
	PackName(ctx context.Context) (string, error)
	// Pack makes one in dir and gives its path.
	Pack(ctx context.Context, rootfs, dir string) (string, error)
}

// Ref finds a started bottle again, from another process.
type Ref struct {
	ID     string
	Dir    string
	RunDir string
	Bottle *plan.Bottle
	Env    []string
}

// Started is what is known once the guest is up.
type Started struct {
	Enforcement plan.Enforcement
	Warm        string // what it is a copy of; "" where it was booted
	// Wait blocks until the guest has ended, whatever ended it.
	Wait func(context.Context) error
}

// Winsize is a terminal's size in characters.
type Winsize struct{ Rows, Cols uint16 }

// ExecRequest is one command in a running guest.
type ExecRequest struct {
	Argv   []string
	Env    []string // K=V on top of the bottle's own
	Dir    string   // absolute guest path; "" is the workspace
	User   string   // agent | root | "" for the bottle's own
	Stdin  *os.File // nil: empty
	Stdout *os.File
	Stderr *os.File
	TTY    bool // Stdin is a terminal: give the guest one, keep sizes in step
	// Signals are passed to the command; the caller decides which.
	Signals <-chan os.Signal
}

// Engine runs bottles. Every method may be called from a process other than the
// one that called Start, except where it says so.
type Engine interface {
	Name() string // gvisor | smolvm
	Transport() Transport

	// Available tells without starting anything whether the engine's program is
	// there and of a version that can hold a bottle. Errors are faults 69 or 78.
	Available(ctx context.Context) error
	// Check boots a throw-away guest in dir and runs a command in it, with a
	// time limit: the only proof that an engine works.
	Check(ctx context.Context, dir string) error

	// Prepare refuses (78) what the engine cannot hold, before anything starts.
	Prepare(ctx context.Context, s *Spec) error
	// Start returns once the guest kernel runs and the helper was started. The
	// guest must die with the caller's processes only through Stop and Delete.
	Start(ctx context.Context, s *Spec) (*Started, error)

	// Exec returns the guest command's status (128+n for a signal), or an error
	// for the engine's own failure.
	Exec(ctx context.Context, r Ref, q ExecRequest) (int, error)
	// CopyOut writes a tar stream of the guest path; CopyIn unpacks one below
	// the guest folder dir.
	CopyOut(ctx context.Context, r Ref, path string, w io.Writer) error
	CopyIn(ctx context.Context, r Ref, dir string, rd io.Reader) error

	// Alive tells whether the guest still runs.
	Alive(ctx context.Context, r Ref) (bool, error)
	// Delete ends the guest and removes what the engine made of it: processes,
	// mounts, its own state below r.Dir. Idempotent; nothing there is success.
	Delete(ctx context.Context, r Ref) error
}

// Restarter is an engine whose stopped guests keep their disk.
type Restarter interface {
	// Stop ends the guest and keeps what a Restart needs. Idempotent; Delete removes
	// the rest.
	Stop(ctx context.Context, r Ref) error
	// Restart boots the guest that Stop has ended, with its disk. It refuses (78) a
	// spec that would show the guest something else than Start did. On failure the
	// guest is stopped.
	Restart(ctx context.Context, s *Spec) (*Started, error)
}

// FirstStarter is an engine whose next start may have more to do than others.
type FirstStarter interface {
	// FirstStart tells what that is and how much longer it may take; "" and 0 for
	// a start like any other.
	FirstStart(ctx context.Context) (what string, more time.Duration)
}

// Usage is what a guest uses.
type Usage struct {
	MemoryBytes int64
	Pids        int // without what the guest helper may use
}

// Meter is an engine that can tell what a guest uses, for limits that the
// keeper watches where nothing else can hold them.
type Meter interface {
	Usage(ctx context.Context, r Ref) (Usage, error)
}

// Coverer is an engine that can mount over a path of a running guest: a file
// that the host replaces by a rename loses what was mounted over it.
type Coverer interface {
	// Cover mounts b.Source read-only over b.Target; where b.Source is the
	// workspace's own file at that path, it mounts the target over itself.
	Cover(ctx context.Context, r Ref, b Bind) error
}
