package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/state"
)

// liveProbes are those that can be decided beside a running bottle, and that do
// no harm to the host if they succeed.
var liveProbes = strings.Fields("C08 N03 N04 N05 N12 L01 X24 X25 X27 S01 S02 S07 S12 S15 S16 S19 S20 S22")

// outsideTheLab is why the others are not tried.
const outsideTheLab = "only in a laboratory: bottle-probe run"

// liveControls are the controls of a running bottle alone.
func liveControls() []*probe {
	return []*probe{{Info: info("C08", "control-gate", "", "control: what a running bottle asks for arrives at its gate, and is in its audit log"), control: true,
		skip: func(l *lab) string {
			if l.audit == "" {
				return "only beside a running bottle: bottle-probe ID"
			}
			return ""
		},
		try:  func(c *inside, token string) { c.tunnel(token+".invalid", 443, "x") },
		leak: func(l *lab, token string) string { return l.logged(token) }}}
}

// logged looks for a token in the audit log of the bottle.
func (l *lab) logged(token string) string {
	for until := time.Now().Add(2 * time.Second); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		raw, err := os.ReadFile(l.audit)
		if err == nil && strings.Contains(string(raw), token) {
			return "the audit log has it"
		}
	}
	return ""
}

// Live tries to get out of a running bottle: to services on the host's loopback,
// its sockets, processes and files, which are all canaries of its own. Whatever
// was started or copied is gone afterwards. Errors are faults: those of
// state.Find, and no_client where the client cannot run in it.
func Live(ctx context.Context, id string, getenv func(string) string, emit func(Result) error) error {
	root, err := state.Open(getenv)
	if err != nil {
		return err
	}
	b, err := root.Find(id)
	if err != nil {
		return err
	}
	if err := static("/proc/self/exe"); err != nil {
		return err
	}
	tool, err := beside("bottle-vm")
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bp-")
	if err != nil {
		return fault.New(fault.CantCreate, "no_lab_folder", "a folder for canaries: %w", err).WithHint("TMPDIR names another place")
	}
	defer removeAll(dir)
	// The witness dies with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	l := &lab{dir: dir, prefix: "bp" + random(3), audit: root.Audit(b.ID), env: os.Environ(),
		secrets: map[string]string{}, given: map[string]bool{}, asked: map[string]bool{}, count: map[string]int{}, protected: map[string][]byte{}}
	stop, err := l.besideBottle()
	if err != nil {
		return fault.New(fault.Host, "no_canaries", "the canary services: %w", err)
	}
	defer stop()
	return l.tryBottle(ctx, tool, b.ID, emit)
}

// beside finds one of our tools: where this one is, or on PATH.
func beside(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		if path := filepath.Join(filepath.Dir(self), name); isExecutable(path) {
			return path, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fault.New(fault.Unavailable, "no_bottle_vm", "%s is neither beside this program nor on PATH", name).WithHint("build it (make build)")
	}
	return path, nil
}

func isExecutable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}

// besideBottle starts the host's canaries without a laboratory: on loopback and
// in a folder of our own, so that nobody else sees them.
func (l *lab) besideBottle() (stop func(), err error) {
	if l.material, err = newMaterial("canary.invalid"); err != nil {
		return nil, err
	}
	ca, err := l.material.authority()
	if err != nil {
		return nil, err
	}
	l.zone = &zone{AllowIP: netip.MustParseAddr("192.0.2.1")}
	c := newCanary("host-", l.zone, ca, l.record)
	var open []io.Closer
	stop = func() {
		close(c.done)
		for _, o := range open {
			o.Close()
		}
	}
	v4, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	open = append(open, v4)
	c.serve(v4, "tcp")
	port := v4.Addr().(*net.TCPAddr).Port
	if v6, err := net.Listen("tcp", fmt.Sprintf("[::1]:%d", port)); err == nil {
		open = append(open, v6)
		c.serve(v6, "tcp")
	}
	l.spec = spec{Allow: "allowed.invalid", Deny: "denied.invalid", AllowIP: "192.0.2.1", DenyIP: "192.0.2.2", DenyIP6: "2001:db8::2", Resolver: "192.0.2.53",
		HostIP: "127.0.0.1", HostPort: port, Home: filepath.Join(l.dir, "home"), Outside: filepath.Join(l.dir, "outside"),
		Abstract: "bottle-probe-" + random(6), Workspace: "/tmp/bottle-probe-" + random(6)}
	listeners, err := l.sockets(c)
	open = append(open, listeners...)
	if err != nil {
		stop()
		return nil, err
	}
	l.vsock(c)
	return stop, nil
}

func (l *lab) tryBottle(ctx context.Context, tool, id string, emit func(Result) error) error {
	program := l.spec.Workspace + "/" + programName
	var all []*chosen
	var tasks []task
	for _, p := range catalog {
		c := &chosen{probe: p, token: l.prefix + random(8)}
		switch {
		case !slices.Contains(liveProbes, p.ID):
			c.na = outsideTheLab
		case p.skip != nil:
			c.na = p.skip(l)
		}
		if c.na == "" {
			if c.lay != nil {
				if err := c.lay(l, c.token); err != nil {
					return fault.New(fault.CantCreate, "no_lab_folder", "laying out %s: %w", c.ID, err)
				}
			}
			tasks = append(tasks, task{c.ID, c.token})
		}
		all = append(all, c)
	}
	stop, err := l.startWitness(ctx, all)
	if err != nil {
		return err
	}
	defer stop()
	run := func(ctx context.Context, args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, tool, args...)
		cmd.Env, cmd.WaitDelay = l.env, 5*time.Second
		return cmd
	}
	local := filepath.Join(l.dir, programName)
	if err := copySelf(local); err != nil {
		return fault.New(fault.CantCreate, "no_lab_folder", "a copy of this program: %w", err)
	}
	if out, err := run(ctx, "cp", local, id+":"+program).CombinedOutput(); err != nil {
		return noClient(out, err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		_ = run(ctx, "exec", id, "--", "rm", "-rf", l.spec.Workspace).Run()
	}()
	limited, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd := run(limited, append([]string{"exec", id, "--"}, strings.Fields(l.client(tasks))...)...)
	var said strings.Builder
	cmd.Stderr = &said
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return noClient(nil, err)
	}
	started, ended := map[string]bool{}, map[string]bool{}
	l.listen(limited, stdout, io.Discard, started, ended, all)
	err = cmd.Wait()
	if ctx.Err() != nil {
		return fault.New(interrupted, "interrupted", "interrupted before the last probe")
	}
	if len(started) == 0 {
		return noClient([]byte(said.String()), err)
	}
	time.Sleep(grace)
	results := make([]Result, 0, len(all))
	works := false
	for _, c := range all {
		if c.na == "" && !ended[c.ID] {
			c.void = "the client did not get through it"
		}
		r := l.judge(c)
		works = works || r.ID == "C08" && r.Verdict == Works
		results = append(results, r)
	}
	for _, r := range results {
		if r.Verdict == Held && !works && strings.ContainsAny(r.ID[:1], "XL") {
			r.Verdict, r.Evidence = Void, "C08 (control-gate) failed, so that holding proves nothing"
		}
		if err := emit(r); err != nil {
			return err
		}
	}
	return nil
}

func noClient(out []byte, err error) error {
	if err == nil {
		err = errors.New("it printed nothing")
	}
	return fault.New(fault.Unavailable, "no_client", "the client does not run in the bottle: %w: %s", err, lastLine(out)).WithHint("is the bottle ready? bottle-vm status tells")
}
