// Package keeper is the one long-lived host process of a bottle. It holds the
// guest's only socket, starts the gate, the proxy and the guest, replaces a
// gate or proxy that dies (meanwhile the bottle has no way out), guards the
// workspace's .git, and ends everything when it is told to or when the
// bottle's owner is gone.
package keeper

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"syscall"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Config is the one line of JSON on the keeper's stdin. It holds secrets, so it
// is never an argument, a variable or a file.
type Config struct {
	ID       string            `json:"id"`
	StateDir string            `json:"state_dir"` // state.Root.Dir
	RunRoot  string            `json:"run_root"`  // state.Root.RunDir
	Document json.RawMessage   `json:"document"`  // all sections but vm
	Base     string            `json:"base"`      // absolute folder of the manifest
	Manifest string            `json:"manifest"`  // its absolute path
	Secrets  map[string]string `json:"secrets"`

	Runtime    string        `json:"runtime"`
	RuntimeWhy string        `json:"runtime_why"`
	Signed     []plan.Signer `json:"signed"`   // who has signed the plan, where up asked
	Mitmdump   string        `json:"mitmdump"` // the program; "" where the plan has no addons
	Pipelock   string        `json:"pipelock"` // the program; "" for the built-in proxy

	Workspace string        `json:"workspace"` // the host folder
	Rootfs    string        `json:"rootfs"`    // "" for image host
	Pack      string        `json:"pack"`      // the engine's own form of Rootfs; "" for none
	Home      string        `json:"home"`      // "" to discard
	Mounts    []engine.Bind `json:"mounts"`
	Conceal   []string      `json:"conceal"` // files that secrets come from, absolute
	UserHome  string        `json:"user_home"`
	Audit     audit.Bounds  `json:"audit"` // of the log
	HostUID   int           `json:"host_uid"`
	HostGID   int           `json:"host_gid"`

	Warm  bool   `json:"warm"`  // from a prepared guest
	Image string `json:"image"` // digest of the image that Rootfs is

	EgressExe string `json:"egress_exe"`
	GuestExe  string `json:"guest_exe"`

	// Again: the bottle was stopped, and its guest is to be booted with its disk.
	// Its audit log ends with AuditHead, and Denied are the denies that were added
	// while it ran: they are for as long as there is the bottle, or their own time.
	Again     bool        `json:"again,omitempty"`
	AuditHead audit.Head  `json:"audit_head,omitzero"`
	Denied    []live.Rule `json:"denied,omitempty"`
}

// ReplyFD is where the keeper writes one Reply: the pipe of the up that started it.
const ReplyFD = 3

// Reply tells how the start went.
type Reply struct {
	Document json.RawMessage `json:"document,omitempty"` // with its vm section
	Error    *plan.Failure   `json:"error,omitempty"`
	// Warnings are for the person at up: secrets that are missing, paths set aside.
	Warnings []string `json:"warnings,omitempty"`
}

// Handle is the keeper as up sees it: a started process and the reply to come.
type Handle struct {
	PID   int
	cmd   *exec.Cmd
	reply *os.File
	stdin io.WriteCloser
}

// Spawn starts exe (bottle-keeper) in a session of its own, with its output in
// logPath. It does nothing before Configure: up records it first.
func Spawn(exe, logPath string, env []string) (*Handle, error) {
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fault.New(fault.IO, "keeper_failed", "%w", err)
	}
	defer w.Close()
	cmd := exec.Command(exe)
	cmd.Env = env
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		r.Close()
		return nil, fault.New(fault.Unavailable, "keeper_failed", "starting the keeper: %w", err).
			WithHint("bottle-keeper has to stand beside bottle-vm; run make build")
	}
	return &Handle{PID: cmd.Process.Pid, cmd: cmd, reply: r, stdin: stdin}, nil
}

// Configure lets the keeper begin.
func (h *Handle) Configure(cfg Config) error {
	raw, err := json.Marshal(cfg)
	if err != nil {
		return fault.New(fault.Bug, "bug", "encoding the keeper's config: %w", err)
	}
	_, err = h.stdin.Write(append(raw, '\n'))
	err = errors.Join(err, h.stdin.Close())
	if err != nil {
		return fault.New(fault.Unavailable, "keeper_failed", "the keeper did not take its config: %w", err)
	}
	return nil
}

// Await reads the reply. A keeper that ends without one is a fault that names
// its log.
func (h *Handle) Await() (*Reply, error) {
	defer h.reply.Close()
	raw, err := bufio.NewReader(h.reply).ReadBytes('\n')
	var r Reply
	if err != nil || json.Unmarshal(raw, &r) != nil {
		_ = h.cmd.Wait()
		return nil, fault.New(fault.Unavailable, "keeper_failed", "the keeper ended before the bottle was ready (%s)", h.cmd.ProcessState)
	}
	return &r, nil
}

// Abandon ends a keeper whose bottle is not wanted any more.
func (h *Handle) Abandon() {
	h.stdin.Close()
	_ = h.cmd.Process.Signal(syscall.SIGTERM)
}

// Wait reaps the keeper once it has ended.
func (h *Handle) Wait() { _ = h.cmd.Wait() }
