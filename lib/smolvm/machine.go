package smolvm

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/tidwall/gjson"
)

// forms is how each subcommand takes the machine's name, by release: as a flag,
// or as the first positional argument. Source: AGENTS.md of v0.5.0 to v1.0.0 and
// commit 67a09b27 ("fix(cli)!") of 1.0.2; from 1.0.2 on the --help texts. No
// recording exists of the positional forms.
var forms = []struct {
	since      Version
	positional map[string]bool
}{
	{sinceNameFlag, nil},
	{sinceMachine, map[string]bool{"create": true, "delete": true}},
}

// named gives the argv of a machine subcommand up to and including its name.
func (c *Client) named(verb, name string) ([]string, error) {
	for _, f := range forms {
		if c.Version.Less(f.since) {
			continue
		}
		if f.positional[verb] {
			if strings.HasPrefix(name, "-") || name == "" {
				// As a positional it would be read as a flag.
				return nil, &Error{Kind: ErrInvalidName, Op: "machine " + verb, Exit: -1, Detail: strconv.Quote(name)}
			}
			return []string{"machine", verb, name}, nil
		}
		if strings.HasPrefix(name, "-") {
			return []string{"machine", verb, "--name=" + name}, nil
		}
		return []string{"machine", verb, "--name", name}, nil
	}
	return nil, unsupported("machine "+verb, c.Version, sinceMachine, "the machine commands")
}

var errorFormatFlag = []string{"--error-format", "json"}

// common adds the flags of every subcommand: errors as JSON, with a stable code,
// where that exists, and where smolvm keeps its state.
func (c *Client) common(args []string) []string {
	if !c.Version.Less(sinceErrorFormat) {
		args = append(args, errorFormatFlag...)
	}
	return c.stateDir(args)
}

func (c *Client) stateDir(args []string) []string {
	if c.StateDir == "" {
		return args
	}
	return append(args, "--state-dir", c.StateDir)
}

// checkStateDir refuses what would act on another state than it is meant for.
func (c *Client) checkStateDir(op string) error {
	if c.StateDir != "" && c.Version.Less(sinceStateDir) {
		return unsupported(op, c.Version, sinceStateDir, "--state-dir")
	}
	return nil
}

// Label is one --label KEY=VALUE.
type Label struct{ Key, Value string }

// Volume is one host folder in the guest. Only folders can be mounted; both
// paths are absolute.
type Volume struct {
	Host, Guest string
	ReadOnly    bool // held by the host's virtiofs server, not by the guest
}

func (v Volume) String() string {
	if v.ReadOnly {
		return v.Host + ":" + v.Guest + ":ro"
	}
	return v.Host + ":" + v.Guest
}

// Socket is one host unix socket that guest processes can reach at Guest. Host
// may come to exist later; smolvm dials it for each connection.
type Socket struct{ Host, Guest string }

// CreateSpec is a machine to be created. Zero values are left out, and smolvm's
// own defaults hold: 4 vCPUs, 8192 MiB, no network.
type CreateSpec struct {
	CPUs     int
	MemMiB   int
	Labels   []Label
	Image    string // reference, docker-save archive or rootfs folder
	From     string // a .smolmachine
	Smolfile string
	Volumes  []Volume
	Sockets  []Socket
	Command  []string // workload of an image machine, run at every start

	// Credentials implies a network: a bottle, which has none, does not use it,
	// and its gate puts secrets in.
	Credentials []Credential
}

// Credential is a value of smolvm's own environment that guests use without
// seeing it: they find a placeholder in Env, and smolvm puts the value in on the
// way to one of the hosts.
type Credential struct {
	Name, Env string
	Hosts     []string
}

// MachineCreate records a new machine and starts nothing. There is no argument
// for variables of the guest's environment: an argv is public.
func (c *Client) MachineCreate(ctx context.Context, name string, s CreateSpec) error {
	const op = "machine create"
	args, err := c.named("create", name)
	if err != nil {
		return err
	}
	if s.CPUs > 0 {
		args = append(args, "--cpus", strconv.Itoa(s.CPUs))
	}
	if s.MemMiB > 0 {
		args = append(args, "--mem", strconv.Itoa(s.MemMiB))
	}
	if len(s.Labels) > 0 && c.Version.Less(sinceLabel) {
		return unsupported(op, c.Version, sinceLabel, "--label")
	}
	for _, l := range s.Labels {
		args = append(args, "--label", l.Key+"="+l.Value)
	}
	if s.Image != "" {
		args = append(args, "--image", s.Image)
	}
	if s.From != "" {
		args = append(args, "--from", s.From)
	}
	if s.Smolfile != "" {
		args = append(args, "-s", s.Smolfile)
	}
	for _, v := range s.Volumes {
		args = append(args, "-v", v.String())
	}
	if len(s.Sockets) > 0 && c.Version.Less(SinceMountSocket) {
		return unsupported(op, c.Version, SinceMountSocket, "--mount-socket")
	}
	for _, k := range s.Sockets {
		if strings.Contains(k.Host, ":") { // smolvm splits at the first colon
			return &Error{Kind: ErrFailed, Op: op, Exit: -1, Detail: "a colon in the socket's path " + strconv.Quote(k.Host)}
		}
		args = append(args, "--mount-socket", k.Host+":"+k.Guest)
	}
	if len(s.Credentials) > 0 && c.Version.Less(sinceCredential) {
		return unsupported(op, c.Version, sinceCredential, "--credential")
	}
	for _, k := range s.Credentials {
		args = append(args, "--credential", k.Name+"="+k.Env+"@"+strings.Join(k.Hosts, ","))
	}
	args = c.common(args)
	if len(s.Command) > 0 {
		args = append(append(args, "--"), s.Command...)
	}
	_, err = c.call(ctx, op, c.bootTimeout(), args) // it may have an archive to read
	return err
}

// MachineStart boots the machine and returns when its agent answers. A running
// machine is a success. smolvm 1.9.1 gives up after 30 s by itself.
//
// When the call ends early (time limit, context) the guest's monitor may live
// on, unknown to smolvm: even MachineDelete then leaves it running. Whoever ends
// a start has to look for it by MachineDataDir.
func (c *Client) MachineStart(ctx context.Context, name string) error {
	_, err := c.verb(ctx, "start", name, c.startTimeout())
	return err
}

// MachineStartIn is MachineStart as launch has it: in a mount namespace, say, which
// the guest's monitor is in from then on. pid is the monitor's, as smolvm says; 0
// where it does not. Nil leaves the start as it is.
func (c *Client) MachineStartIn(ctx context.Context, name string, launch Launch) (pid int, err error) {
	there := *c
	there.launch = launch
	r, err := there.verb(ctx, "start", name, c.startTimeout())
	return startedPID(string(r.Stdout)), err
}

// startedPID reads "Machine 'NAME' running (PID: N)".
func startedPID(out string) int {
	_, rest, _ := strings.Cut(out, " (PID: ")
	digits, _, ok := strings.Cut(rest, ")")
	pid, err := strconv.Atoi(digits)
	if !ok || err != nil || pid < 1 {
		return 0
	}
	return pid
}

// MachineStop ends the guest; a machine that does not run is a success.
func (c *Client) MachineStop(ctx context.Context, name string) error {
	_, err := c.verb(ctx, "stop", name, c.bootTimeout())
	return err
}

func (c *Client) verb(ctx context.Context, verb, name string, limit time.Duration, flags ...string) (Result, error) {
	args, err := c.named(verb, name)
	if err != nil {
		return Result{}, err
	}
	return c.call(ctx, "machine "+verb, limit, c.common(append(args, flags...)))
}

// MachineDelete stops and removes the machine. It always passes -f and then
// makes sure, by "ls --json", that the machine is gone: without -f smolvm 1.9.1
// prints "Cancelled", stops the guest, keeps the machine and exits 0. A machine
// that does not exist is ErrNotFound.
func (c *Client) MachineDelete(ctx context.Context, name string) error {
	const op = "machine delete"
	args, err := c.named("delete", name)
	if err != nil {
		return err
	}
	r, err := c.call(ctx, op, c.bootTimeout(), c.common(append(args, "-f")))
	if err != nil {
		return err
	}
	left, err := c.MachineLs(ctx)
	if err != nil {
		return err
	}
	for _, m := range left {
		if m.Name == name {
			return &Error{Kind: ErrNotDeleted, Op: op, Exit: r.Code, Stderr: bound(string(r.Stderr), maxStderr),
				Detail: fmt.Sprintf("smolvm said %q, yet %s is still listed", oneLine(string(r.Stdout)), name)}
		}
	}
	return nil
}

// MachineDataDir gives the folder that holds the machine's disks and sockets.
func (c *Client) MachineDataDir(ctx context.Context, name string) (string, error) {
	const op = "machine data-dir"
	args, err := c.named("data-dir", name)
	if err != nil {
		return "", err
	}
	r, err := c.call(ctx, op, c.timeout(), c.common(args))
	if err != nil {
		return "", err
	}
	dir := strings.TrimSuffix(string(r.Stdout), "\n")
	if !strings.HasPrefix(dir, "/") || strings.ContainsAny(dir, "\n\x00") {
		return "", &Error{Kind: ErrGarbage, Op: op, Exit: r.Code, Detail: fmt.Sprintf("not a path: %q", bound(dir, 80))}
	}
	return dir, nil
}

// MachineCp copies one file to or from a machine; one of src and dst is
// NAME:PATH. An empty path on either side is a no-op. Folders cannot be copied.
// smolvm follows a symlink at a host destination: never let a guest prepare one.
func (c *Client) MachineCp(ctx context.Context, src, dst string) error {
	if emptyPath(src) || emptyPath(dst) {
		return nil
	}
	const op = "machine cp"
	if c.Version.Less(sinceCp) {
		return unsupported(op, c.Version, sinceCp, "cp")
	}
	args := c.common([]string{"machine", "cp"})
	if flagLike(src) || flagLike(dst) {
		args = append(args, "--") // a file name is not a flag
	}
	_, err := c.call(ctx, op, c.bootTimeout(), append(args, src, dst))
	return err
}

// flagLike tells whether the command line would read p as a flag; "-" is a file
// name to smolvm.
func flagLike(p string) bool { return len(p) > 1 && p[0] == '-' }

// emptyPath tells whether p, PATH or NAME:PATH, names no file.
func emptyPath(p string) bool {
	if name, path, ok := strings.Cut(p, ":"); ok && !strings.Contains(name, "/") {
		return path == ""
	}
	return p == ""
}

// Machine is what "ls --json" and "status --json" tell of one machine. Members
// come and go between versions, so what is absent or of another type is zero.
type Machine struct {
	Name      string
	State     string // created, running, stopped, unreachable, failed, or one not known yet
	PID       int    // the guest's monitor on the host; 0 when there is none
	CPUs      int
	MemoryMiB int
	Image     string
	Network   bool
	Mounts    int // how many
	Labels    map[string]string
	CreatedAt int64 // seconds since 1970
}

// MachineLs lists every machine of this user.
func (c *Client) MachineLs(ctx context.Context) ([]Machine, error) {
	const op = "machine ls"
	if c.Version.Less(sinceMachine) {
		return nil, unsupported(op, c.Version, sinceMachine, "the machine commands")
	}
	r, err := c.call(ctx, op, c.timeout(), c.stateDir([]string{"machine", "ls", "--json"}))
	if err != nil {
		return nil, err
	}
	list, err := decode(op, r, "[")
	if err != nil {
		return nil, err
	}
	machines := []Machine{}
	for _, item := range list.Array() {
		m, err := machine(op, item)
		if err != nil {
			return nil, err
		}
		machines = append(machines, m)
	}
	return machines, nil
}

// MachineStatus tells of one machine.
func (c *Client) MachineStatus(ctx context.Context, name string) (Machine, error) {
	const op = "machine status"
	args, err := c.named("status", name)
	if err != nil {
		return Machine{}, err
	}
	r, err := c.call(ctx, op, c.timeout(), c.common(append(args, "--json")))
	if err != nil {
		return Machine{}, err
	}
	item, err := decode(op, r, "{")
	if err != nil {
		return Machine{}, err
	}
	m, err := machine(op, item)
	if err == nil && m.Name != name {
		err = &Error{Kind: ErrGarbage, Op: op, Detail: fmt.Sprintf("asked for %q, answered for %q", name, bound(m.Name, 80))}
	}
	return m, err
}

// decode checks that what smolvm printed is one JSON value that starts as it
// should. gjson does not validate by itself.
func decode(op string, r Result, start string) (gjson.Result, error) {
	text := strings.TrimSpace(string(r.Stdout))
	if !strings.HasPrefix(text, start) || !gjson.Valid(text) {
		return gjson.Result{}, &Error{Kind: ErrGarbage, Op: op, Exit: r.Code, Stderr: bound(string(r.Stderr), maxStderr),
			Detail: fmt.Sprintf("not the JSON that was asked for: %q", bound(text, 80))}
	}
	return gjson.Parse(text), nil
}

// machine decodes leniently, but a machine without a name is nothing that
// anyone could act on.
func machine(op string, v gjson.Result) (Machine, error) {
	if name := v.Get("name"); name.Type != gjson.String || name.Str == "" {
		return Machine{}, &Error{Kind: ErrGarbage, Op: op, Detail: "a machine without a name"}
	}
	m := Machine{
		Name:      v.Get("name").Str,
		State:     v.Get("state").Str,
		PID:       number(v.Get("pid")),
		CPUs:      number(v.Get("cpus")),
		MemoryMiB: number(v.Get("memory_mib")),
		Image:     v.Get("image").Str,
		Network:   v.Get("network").Type == gjson.True,
		Mounts:    number(v.Get("mounts")),
		Labels:    map[string]string{},
		CreatedAt: int64(number(v.Get("created_at"))),
	}
	v.Get("labels").ForEach(func(k, val gjson.Result) bool {
		if val.Type == gjson.String {
			m.Labels[k.Str] = val.Str
		}
		return true
	})
	return m, nil
}

// number gives a JSON integer that is neither negative nor beyond 2^53, else 0.
func number(v gjson.Result) int {
	if v.Type != gjson.Number || v.Num < 0 || v.Num > 1<<53-1 || v.Num != float64(int64(v.Num)) {
		return 0
	}
	return int(v.Num)
}

// PackSpec is what "pack create" makes a .smolmachine of: an image or a stopped
// machine, exactly one of them.
type PackSpec struct {
	Image      string
	FromVM     string
	Output     string // path of the stub; the payload is beside it
	StagingDir string // for what smolvm puts together on the way; empty for its own cache
}

// PacksLocalImages tells whether Image may be a docker-save archive or a rootfs
// folder. 1.9.1 takes every image for a registry's reference, 1.32.2 does not;
// where between them it changed is not known, so its help is asked.
func (c *Client) PacksLocalImages(ctx context.Context) (bool, error) {
	text, err := c.Help(ctx, "pack", "create")
	return strings.Contains(text, "rootfs directory"), err
}

// PackCreate packs an image or a stopped machine. It boots a helper guest.
func (c *Client) PackCreate(ctx context.Context, s PackSpec) error {
	const op = "pack create"
	args := []string{"pack", "create"}
	switch {
	case (s.Image == "") == (s.FromVM == "") || s.Output == "":
		return &Error{Kind: ErrUsage, Op: op, Exit: -1, Detail: "it takes an image or a machine, and an output"}
	case s.Image != "":
		args = append(args, "--image", s.Image)
	default:
		args = append(args, "--from-vm", s.FromVM)
	}
	args = append(args, "-o", s.Output)
	if s.StagingDir != "" {
		args = append(args, "--staging-dir", s.StagingDir)
	}
	_, err := c.call(ctx, op, PackTimeout, c.common(args))
	return err
}

// Help runs "smolvm … --help", which answers for every subcommand.
func (c *Client) Help(ctx context.Context, subcommand ...string) (string, error) {
	r, err := c.call(ctx, strings.Join(append(subcommand, "--help"), " "), c.timeout(), append(subcommand, "--help"))
	return string(r.Stdout), err
}

// IsNotFound tells whether err says that there is no such machine.
func IsNotFound(err error) bool { return errors.Is(err, ErrNotFound) }
