package probe

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

// chosen is a probe of this run.
type chosen struct {
	*probe
	token string
	na    string // why it is not tried
	void  string // why it proves nothing
}

// battery runs the probes batch by batch and gives each result to emit in the
// order of the catalogue.
func (l *lab) battery(ctx context.Context, emit func(Result) error) error {
	l.git, _ = exec.LookPath("git")
	l.noTerminal = terminalRefuses()
	ids, _ := Choose(l.o.Only)
	var all []*chosen
	var envToken string
	for _, id := range ids {
		c := &chosen{probe: find(id), token: l.prefix + random(8)}
		if c.skip != nil {
			c.na = c.skip(l)
		}
		if c.Name == "environment" {
			envToken = c.token
		}
		all = append(all, c)
	}
	l.env = l.environment(envToken)
	for _, name := range []string{"home", "run", "outside"} {
		if err := os.MkdirAll(filepath.Join(l.dir, name), 0o700); err != nil {
			return fault.New(fault.CantCreate, "no_lab_folder", "%w", err)
		}
	}
	witness, err := l.startWitness(ctx, all)
	if err != nil {
		return err
	}
	defer witness()
	results := map[string]Result{}
	var batches []string
	for _, c := range all {
		if !slices.Contains(batches, c.batch) {
			batches = append(batches, c.batch)
		}
	}
	for _, b := range batches {
		if err := l.batch(ctx, b, all, results); err != nil {
			return err
		}
	}
	for _, c := range all {
		r := results[c.ID]
		if r.Verdict == Held {
			for _, id := range []string{c.Needs, stillWorks[c.Needs]} {
				if why := unmet[results[id].Verdict]; id != "" && why != "" {
					r.Verdict, r.Evidence = Void, fmt.Sprintf("%s (%s) %s, so that holding proves nothing", id, find(id).Name, why)
				}
			}
		}
		if err := emit(r); err != nil {
			return err
		}
	}
	return nil
}

// unmet says what is the matter with a control that has not worked.
var unmet = map[Verdict]string{Fails: "failed", NA: "was not tried", Void: "proves nothing", "": "was not tried"}

// batch lays out what its probes are to find, runs the sandbox command once, and
// judges.
func (l *lab) batch(ctx context.Context, name string, all []*chosen, results map[string]Result) error {
	if err := l.workspace(ctx, name != batchNoGit); err != nil {
		if f := (*fault.Error)(nil); errors.As(err, &f) {
			return err
		}
		return fault.New(fault.CantCreate, "no_lab_folder", "the workspace: %w", err)
	}
	var own []*chosen
	var tasks []task
	for _, c := range all {
		if c.batch != name {
			continue
		}
		own = append(own, c)
		if c.skip != nil && c.na == "" {
			c.na = c.skip(l) // once more: it may depend on the workspace
		} else if c.ID == "S13" && len(l.protected) > 0 {
			c.na = ""
		}
		if c.na != "" {
			continue
		}
		if c.lay != nil {
			if err := c.lay(l, c.token); err != nil {
				return fault.New(fault.CantCreate, "no_lab_folder", "laying out %s: %w", c.ID, err)
			}
		}
		tasks = append(tasks, task{c.ID, c.token})
	}
	if len(tasks) > 0 {
		fctx, stop := context.WithCancel(ctx)
		if name == batchFlood {
			go l.countFlood(fctx, tasks[0].Token)
		}
		err := l.sandbox(ctx, name, own, tasks)
		stop()
		if err != nil {
			return err
		}
		if strings.HasPrefix(name, batchGit) || name == batchNoGit {
			l.gitAfterwards(ctx)
		}
		time.Sleep(grace)
	}
	if l.died() != nil {
		return fault.New(fault.Bug, "lab_failed", "%w", l.died())
	}
	for _, c := range own {
		results[c.ID] = l.judge(c)
	}
	return nil
}

func (l *lab) died() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead
}

// judge decides from what canaries and host have to say.
func (l *lab) judge(c *chosen) Result {
	r := Result{ID: c.ID, Name: c.Name, Title: c.Title}
	if c.na != "" {
		r.Verdict, r.Evidence = NA, c.na
		return r
	}
	var got string
	var events []event
	if c.leak != nil {
		got = c.leak(l, c.token)
	} else {
		events = l.sightings(c.token, func(e event) bool { return c.counts(l, e) })
		if len(events) > 0 {
			got = evidence(events[0], c.token)
		}
	}
	switch {
	case c.control && got != "":
		r.Verdict = Works
	case c.control:
		r.Verdict, r.Evidence = Fails, "nothing arrived"
	case got == "" && c.proxied && !l.proxied:
		r.Verdict, r.Evidence = NA, "the sandbox names no proxy to its programs"
	case got == "" && c.void != "":
		r.Verdict, r.Evidence = Void, c.void
	case got == "" && c.dns != "" && !l.asked[c.ID]:
		r.Verdict, r.Evidence = NA, "the allowed name was not looked up while it led astray: it is pinned, or looked up elsewhere"
	case got == "":
		r.Verdict = Held
	case c.residual != "" && l.named(c, events):
		r.Verdict, r.Evidence = Residual, "the document under test says so: "+got
	default:
		r.Verdict = Leak
		r.Evidence = got
		for _, e := range events {
			// Of several, one that is not as the document says.
			if !l.excused(c, e) {
				r.Evidence = evidence(e, c.token)
				break
			}
		}
	}
	return r
}

// counts tells whether a sighting is a leak. Packets on the way to the allowed
// host are what its servers saw, too, and those know where a message ends.
func (c *chosen) counts(l *lab, e event) bool {
	if e.Server == "packet" && c.seen != nil && !elsewhere(l, c.token, e) {
		return false
	}
	return c.seen == nil || c.seen(l, c.token, e)
}

// Texts by which a document's egress.residual names what nobody sees.
const (
	residualOpaque   = "TLS is end to end"
	residualWildcard = "labels below the wildcard"
)

// named tells whether the document names all of what was seen.
func (l *lab) named(c *chosen, events []event) bool {
	return len(events) > 0 && !slices.ContainsFunc(events, func(e event) bool { return !l.excused(c, e) })
}

// excused: the sighting is inside end-to-end TLS to the allowed host itself, or a
// label under the wildcard, and the document says of that host that this passes.
func (l *lab) excused(c *chosen, e event) bool {
	says := func(host, text string) bool {
		return slices.ContainsFunc(l.o.Residual, func(line string) bool {
			hosts, what, _ := strings.Cut(line, ": ")
			return strings.Contains(what, text) && slices.Contains(strings.FieldsFunc(hosts, func(r rune) bool { return r == ',' || r == ' ' }), host)
		})
	}
	switch c.residual {
	case opaque:
		inside := (e.Server == "tls" || e.Server == "http2" && e.SNI != "") && e.SNI == l.o.Allow && e.Dst == l.at(l.zone.AllowIP, 443)
		return inside && says(l.o.Allow, residualOpaque)
	case wildcard:
		return says("*."+l.o.Wildcard, residualWildcard) && (e.Server == "dns" || e.Server == "packet" || !elsewhere(l, c.token, e))
	}
	return false
}

// sandbox runs the command once, and listens to the client.
func (l *lab) sandbox(ctx context.Context, name string, own []*chosen, tasks []task) error {
	limit := l.o.Timeout
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	line := l.expand(l.o.Sandbox, l.client(tasks))
	if name == batchKilled {
		line += "\nexit $?" // a shell does not become its last command then, so that the sandbox is its child
	}
	cmd := l.command(ctx, line)
	if name == batchKilled {
		cmd.Cancel = func() error { return nil } // what is left is looked at first
		defer func() { l.group = cmd.Process }()
	}
	log := l.openLog(name)
	defer log.Close()
	fmt.Fprintf(log, "== %s: %s\n", name, l.o.Sandbox)
	cmd.Stderr = log
	started := map[string]bool{}
	ended := map[string]bool{}
	var wait func() error
	if name == batchTerminal {
		pty, err := l.terminal(cmd)
		if err != nil {
			return fault.New(fault.Host, "no_lab", "a terminal: %w", err)
		}
		if err := cmd.Start(); err != nil {
			return badSandbox(err)
		}
		wait = func() error { return pty(ctx, cmd) }
	} else {
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return badSandbox(err)
		}
		read := make(chan struct{})
		go func() {
			defer close(read)
			l.listen(ctx, stdout, log, started, ended, own)
		}()
		wait = func() error {
			done := make(chan struct{})
			var err error
			go func() { defer close(done); _, err = cmd.Process.Wait() }()
			select {
			case <-done:
			case <-ctx.Done():
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
				<-done
			}
			// What was left behind may hold the pipe open.
			select {
			case <-read:
			case <-time.After(2 * time.Second):
				stdout.Close()
				<-read
			}
			return err
		}
	}
	if name == batchKilled {
		kctx, stop := context.WithCancel(ctx)
		defer stop()
		go l.killWrapper(kctx, cmd.Process.Pid, tasks[0].Token)
	}
	_ = wait()
	if name == batchKilled {
		time.Sleep(killGrace)
		for id := range started {
			ended[id] = true // nobody is left to say so
		}
	}
	if ctx.Err() != nil {
		fmt.Fprintf(log, "== ended after %s\n", limit)
	}
	if name == batchTerminal {
		return nil // the client's words went to the terminal
	}
	for _, c := range own {
		if c.na == "" && !ended[c.ID] {
			c.void = "the client did not get through it"
			if len(started) == 0 {
				c.void = "the client did not run in the sandbox"
			}
		}
	}
	if len(started) == 0 && name == batchMain {
		return fault.New(fault.Unavailable, "bad_sandbox", "the client did not run in the sandbox: %s", l.said(log)).
			WithHint("@PROBE stands for a command with arguments that must not be quoted anew; --inside says what the sandbox calls @WORKSPACE, in which the program lies")
	}
	return nil
}

// killGrace is how long what a killed wrapper has left may take to end.
const killGrace = 3 * time.Second

// killWrapper kills the sandbox command, which is the child of the shell, once
// the client is at work. What that has started itself is its own business.
func (l *lab) killWrapper(ctx context.Context, pid int, token string) {
	for {
		if _, err := os.Lstat(l.ws("beat-" + token)); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
	time.Sleep(200 * time.Millisecond)
	raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	_ = syscall.Kill(pid, syscall.SIGKILL)
	for _, child := range strings.Fields(string(raw)) {
		if n, err := strconv.Atoi(child); err == nil {
			_ = syscall.Kill(n, syscall.SIGKILL)
		}
	}
}

func badSandbox(err error) error {
	return fault.New(fault.Unavailable, "bad_sandbox", "the sandbox command cannot be started: %w", err)
}

// listen reads what the client says. For a probe in which the allowed name leads
// astray it changes that, tells the client, and changes it back.
func (l *lab) listen(ctx context.Context, r io.Reader, log io.Writer, started, ended map[string]bool, own []*chosen) {
	scan := bufio.NewScanner(r)
	scan.Buffer(nil, 1<<20)
	var since time.Time
	for scan.Scan() {
		line := scan.Bytes()
		l.give(line)
		var w word
		if json.Unmarshal(line, &w) != nil || w.Start+w.End+w.Note == "" && w.Proof == nil && w.Found == nil && !w.Proxied {
			fmt.Fprintf(log, "%s\n", line)
			continue
		}
		l.proxied = l.proxied || w.Proxied
		if w.Note != "" {
			fmt.Fprintf(log, "client: %s\n", w.Note)
		}
		if w.Proof != nil {
			l.mu.Lock()
			l.proofs = append(l.proofs, *w.Proof)
			l.mu.Unlock()
		}
		i := slices.IndexFunc(own, func(c *chosen) bool { return c.ID == w.Start+w.End })
		if i < 0 {
			continue
		}
		c := own[i]
		if w.Start != "" {
			started[c.ID] = true
			if c.dns != "" {
				since = time.Now()
				l.resolve(ctx, c.dns)
				_ = os.WriteFile(l.ws(goFile(c.token)), nil, 0o644)
			}
			continue
		}
		ended[c.ID] = true
		if c.dns != "" {
			l.resolve(ctx, dnsPublic)
			l.asked[c.ID] = l.wasAsked(since)
		}
	}
	_, _ = io.Copy(io.Discard, r)
}

// give notes the secrets in a line of the sandbox's output.
func (l *lab) give(line []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range secretsIn(line) {
		l.given[s] = true
	}
}

// resolve changes how the allowed name resolves, here and in the internet.
func (l *lab) resolve(ctx context.Context, mode string) {
	l.zone.set(mode)
	if _, err := io.WriteString(l.modes, mode+"\n"); err != nil {
		return
	}
	select {
	case <-l.modeSet:
	case <-time.After(2 * time.Second):
	case <-ctx.Done():
	}
}

// wasAsked tells whether somebody looked an allowed name up since then.
func (l *lab) wasAsked(since time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.events, func(e event) bool {
		return strings.HasSuffix(e.Server, "dns") && l.zone.allowed(e.Host) && e.At.After(since)
	})
}

// openLog is where the sandbox command's own words go.
func (l *lab) openLog(name string) *os.File {
	f, err := os.OpenFile(filepath.Join(l.dir, "sandbox.log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		f, _ = os.OpenFile(os.DevNull, os.O_RDWR, 0)
	}
	return f
}

// said is the last line of the log.
func (l *lab) said(log *os.File) string {
	raw, _ := os.ReadFile(log.Name())
	return lastLine(raw)
}

// startWitness runs a process of the host that no sandbox should see. Its
// argument is the bait of S12; a signal makes it tell.
func (l *lab) startWitness(ctx context.Context, all []*chosen) (stop func(), err error) {
	i := slices.IndexFunc(all, func(c *chosen) bool { return c.Name == "host-process" })
	if i < 0 {
		return func() {}, nil
	}
	token := all[i].token
	cmd := self(ctx, roleWitness, l.secret(token))
	l.unprivileged(cmd)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fault.New(fault.Host, "no_lab", "a process of the host: %w", err)
	}
	first := make([]byte, 1)
	_, _ = io.ReadFull(out, first)
	go func() {
		buf := make([]byte, 1)
		for {
			if _, err := out.Read(buf); err != nil {
				return
			}
			l.record(event{Server: "host-process", Dst: "signal", Data: []byte(token), At: time.Now()})
		}
	}()
	return func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }, nil
}

// witness writes a byte when it is ready, and one for each signal.
func witness(out io.Writer) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGUSR1)
	_, _ = out.Write([]byte("+"))
	for range signals {
		_, _ = out.Write([]byte("!"))
	}
	return nil
}

// openPTY gives both ends of a new terminal.
func openPTY() (master, slave *os.File, err error) {
	m, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	master = os.NewFile(uintptr(m), "ptmx")
	n, err := unix.IoctlGetInt(m, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, err
	}
	return master, slave, nil
}

// terminalRefuses says why the kernel itself would stop TIOCSTI, or "".
func terminalRefuses() string {
	raw, err := os.ReadFile("/proc/sys/dev/tty/legacy_tiocsti")
	if err == nil && strings.TrimSpace(string(raw)) == "0" {
		return "this kernel lets nobody push characters into a terminal (dev.tty.legacy_tiocsti=0)"
	}
	if master, slave, err := openPTY(); err != nil {
		return "no pseudo-terminal on this host: " + err.Error()
	} else {
		master.Close()
		slave.Close()
	}
	return ""
}

// terminal gives a command a terminal of its own. The function that it returns
// waits for the end, and keeps what is in the terminal's input by then.
func (l *lab) terminal(cmd *exec.Cmd) (func(context.Context, *exec.Cmd) error, error) {
	master, slave, err := openPTY()
	if err != nil {
		return nil, err
	}
	// Raw, and without an echo: what stands in the input later was pushed there.
	if t, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err == nil {
		t.Lflag &^= unix.ECHO | unix.ICANON
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 0, 0
		_ = unix.IoctlSetTermios(int(slave.Fd()), unix.TCSETS, t)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr.Setpgid = false
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	go func() { _, _ = io.Copy(io.Discard, master) }()
	return func(ctx context.Context, cmd *exec.Cmd) error {
		err := cmd.Wait()
		buf := make([]byte, 4096)
		_ = unix.SetNonblock(int(slave.Fd()), true)
		if n, rerr := unix.Read(int(slave.Fd()), buf); rerr == nil {
			l.pushed = string(buf[:n])
		}
		slave.Close()
		master.Close()
		return err
	}, nil
}
