package probe

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

const (
	otherProxy = 18090 // another sandbox's proxy, on the host's loopback
	grace      = 500 * time.Millisecond
)

// hostPorts are served on every address of the host.
func hostPorts(own int) []int { return []int{22, 80, 443, 2375, otherProxy, own} }

// lab is the laboratory, as its process sees it.
type lab struct {
	o         Options
	dir       string
	prefix    string // of every token
	material  material
	zone      *zone
	spec      spec
	net       addresses
	env       []string
	git       string // the program, "" where there is none
	protected map[string][]byte
	baitCA    string
	audit     string // the log of a running bottle
	// noTerminal is why R03 cannot be decided, or "".
	noTerminal string
	pushed     string
	proxied    bool        // the client was given a proxy
	group      *os.Process // the leader of what a killed wrapper left
	stderr     io.Writer
	modes      io.Writer
	modeSet    chan struct{}

	mu      sync.Mutex
	events  []event
	secrets map[string]string // by the token of the probe that it belongs to
	given   map[string]bool   // what the client gave back
	proofs  []proof
	asked   map[string]bool // by id: the allowed name was asked for while it led astray
	count   map[string]int  // processes of a flood
	dead    error
}

// addresses of the two networks. They look public and are nobody's here.
type addresses struct {
	host, gateway, host6, gateway6 netip.Prefix
	device                         int
}

// labProcess is the laboratory. It ends with stdin.
func labProcess(stdin io.Reader, stdout io.Writer) error {
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	in := bufio.NewReader(stdin)
	first, err := in.ReadBytes('\n')
	if err != nil {
		return fault.New(fault.Bug, "lab_failed", "no configuration: %w", err)
	}
	var cfg labConfig
	if err := json.Unmarshal(first, &cfg); err != nil {
		return fault.New(fault.Bug, "lab_failed", "configuration: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, in)
		cancel()
	}()
	// Children that die with their parent's thread need one that stays.
	runtime.LockOSThread()
	l := &lab{o: cfg.Options, dir: cfg.Dir, prefix: "bp" + random(3), modeSet: make(chan struct{}, 1), stderr: os.Stderr,
		secrets: map[string]string{}, given: map[string]bool{}, asked: map[string]bool{}, count: map[string]int{}, protected: map[string][]byte{}}
	if err := l.setUp(ctx); err != nil {
		return fault.New(fault.Host, "no_lab", "this host does not permit a laboratory: %w", err).
			WithHint("it needs network namespaces, pairs of virtual network devices and /dev, as root or with user namespaces")
	}
	enc := json.NewEncoder(stdout)
	return l.battery(ctx, func(r Result) error { return enc.Encode(r) })
}

func (l *lab) setUp(ctx context.Context) error {
	r := random(6)
	a, b := 1+int(r[0])%200, 1+int(r[1])%200
	v4 := func(last int) netip.Addr { return netip.AddrFrom4([4]byte{51, byte(a), byte(b), byte(last)}) }
	v6 := func(last int) netip.Addr {
		return netip.MustParseAddr(fmt.Sprintf("2a0c:%x%x:%x::%x", a, b, b, last))
	}
	l.net = addresses{host: netip.PrefixFrom(v4(2), 24), gateway: netip.PrefixFrom(v4(1), 24),
		host6: netip.PrefixFrom(v6(2), 64), gateway6: netip.PrefixFrom(v6(1), 64)}
	// The servers are in other blocks, so that the way there is a route.
	other := func(last int) netip.Addr { return netip.AddrFrom4([4]byte{52, byte(b), byte(a), byte(last)}) }
	l.zone = &zone{Allow: l.o.Allow, AllowHTTP: l.o.AllowHTTP, Wildcard: l.o.Wildcard, Deny: l.o.Deny,
		AllowIP: other(10), DenyIP: other(20), HostIP: v4(2), DenyIP6: netip.MustParseAddr(fmt.Sprintf("2a0d:%x%x::20", a, b))}
	var err error
	if l.material, err = newMaterial(l.o.Allow); err != nil {
		return err
	}
	ca, err := l.material.authority()
	if err != nil {
		return err
	}
	if err := l.startInternet(ctx); err != nil {
		return err
	}
	if err := l.names(other(53)); err != nil {
		return err
	}
	hostPort := 20000 + (int(r[2])*251+int(r[3]))%30000
	l.spec = spec{Allow: l.o.Allow, AllowHTTP: l.o.AllowHTTP, Wildcard: l.o.Wildcard, Deny: l.o.Deny,
		AllowIP: l.zone.AllowIP.String(), DenyIP: l.zone.DenyIP.String(), DenyIP6: l.zone.DenyIP6.String(), Resolver: other(53).String(), HostIP: v4(2).String(),
		HostPort: hostPort, Home: filepath.Join(l.dir, "home"), Outside: filepath.Join(l.dir, "outside"), Abstract: "bottle-probe-" + r,
		Workspace: l.ws(""), ECH: echList(l.material.ECHConfig), Pids: l.o.Pids}
	if l.o.Inside != "" {
		l.spec.Workspace = l.o.Inside
	}
	return l.hostCanaries(ctx, ca)
}

// names makes every name resolve in the laboratory.
func (l *lab) names(resolver netip.Addr) error {
	for path, text := range map[string]string{
		"/etc/resolv.conf":   "nameserver " + resolver.String() + "\n",
		"/etc/hosts":         "127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
		"/etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n",
	} {
		if err := covered(l.dir, path, text); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// hostCanaries are the host's own services, none of which a sandbox should reach.
func (l *lab) hostCanaries(ctx context.Context, ca *authority) error {
	c := newCanary("host-", l.zone, ca, l.record)
	if err := c.listen("", hostPorts(l.spec.HostPort)); err != nil {
		return err
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		pc, err := net.ListenPacket("udp", net.JoinHostPort(host, "53"))
		if err != nil {
			return err
		}
		go l.zone.serveUDP(pc, func(e event) { e.Server = "host-" + e.Server; e.At = time.Now(); l.record(e) })
	}
	if err := c.listen("127.0.0.1", []int{53}); err != nil {
		return err
	}
	if _, err := l.sockets(c); err != nil {
		return err
	}
	l.vsock(c)
	return nil
}

// sockets are those of the host that are not of its networks.
func (l *lab) sockets(c *canary) (open []io.Closer, err error) {
	run := filepath.Join(l.dir, "run")
	for server, path := range map[string]string{"abstract": "@" + l.spec.Abstract, "docker.sock": filepath.Join(run, "docker.sock"),
		"ssh-agent": filepath.Join(run, "agent.sock"), "dbus": filepath.Join(run, "bus"), "other-gate": otherGate(l.spec.Home)} {
		if path[0] != '@' {
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return open, err
			}
		}
		s, err := net.Listen("unix", path)
		if err != nil {
			return open, err
		}
		open = append(open, s)
		c.serve(s, server)
	}
	return open, nil
}

// vsock listens where the host's kernel has it. The address of a machine above
// this one is left alone.
func (l *lab) vsock(c *canary) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	port := uint32(1<<20 + time.Now().UnixNano()%(1<<20))
	if unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}) != nil || unix.Listen(fd, 8) != nil {
		unix.Close(fd)
		return
	}
	l.spec.VsockPort, l.spec.VsockCIDs = port, []uint32{1}
	if own, err := ownCID(); err == nil && own > 2 && own != unix.VMADDR_CID_ANY {
		l.spec.VsockCIDs = append(l.spec.VsockCIDs, own)
	} else {
		l.spec.VsockCIDs = append(l.spec.VsockCIDs, unix.VMADDR_CID_HOST)
	}
	go func() {
		for {
			nfd, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return
			}
			go func() {
				defer unix.Close(nfd)
				tv := unix.NsecToTimeval(int64(tryLimit))
				_ = unix.SetsockoptTimeval(nfd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
				buf := make([]byte, 512)
				n, _ := unix.Read(nfd, buf)
				c.report(event{Server: "host-vsock", Dst: fmt.Sprint(port), Data: buf[:max(0, n)]})
			}()
		}
	}()
}

func ownCID() (uint32, error) {
	const getLocalCID = 0x7b9
	fd, err := unix.Open("/dev/vsock", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	v, err := unix.IoctlGetUint32(fd, getLocalCID)
	return v, err
}

// record keeps what a canary saw. Of one connection the last, which is the
// longest, counts.
func (l *lab) record(e event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.Server == "gone" {
		l.dead = errors.New("the canary internet has ended")
		return
	}
	for i := len(l.events) - 1; e.Conn != 0 && i >= 0 && i > len(l.events)-500; i-- {
		if l.events[i].Conn == e.Conn && l.events[i].Server == e.Server && !strings.HasSuffix(e.Server, "http2") {
			l.events[i] = e
			return
		}
	}
	if len(l.events) < 100_000 {
		l.events = append(l.events, e)
	}
}

func (l *lab) at(ip netip.Addr, port int) string {
	return netip.AddrPortFrom(ip, uint16(port)).String()
}

func (l *lab) ws(name string) string { return filepath.Join(l.dir, "ws", name) }

// carries tells whether a sighting has the token, wherever it is.
func carries(e event, token string) bool {
	return bytes.Contains(bytes.ToLower(e.Data), []byte(token)) || strings.Contains(strings.ToLower(e.SNI+" "+e.Host), token) || carried(e.Data, token)
}

// sightings are what the canaries saw of a token, of which only tells what is a
// leak (nil: all).
func (l *lab) sightings(token string, only func(event) bool) []event {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []event
	for _, e := range l.events {
		e.Dst = unmapped(e.Dst)
		if carries(e, token) && (only == nil || only(e)) {
			all = append(all, e)
		}
	}
	// What a server understood says more than a packet.
	i := slices.IndexFunc(all, func(e event) bool { return e.Server != "packet" })
	if i > 0 {
		all[0], all[i] = all[i], all[0]
	}
	return all
}

func (l *lab) sighting(token string, only func(event) bool) string {
	if all := l.sightings(token, only); len(all) > 0 {
		return evidence(all[0], token)
	}
	return ""
}

func unmapped(dst string) string {
	ap, err := netip.ParseAddrPort(dst)
	if err != nil {
		return dst
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}

// secret is the bait of the probe with a token.
func (l *lab) secret(token string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.secrets[token] == "" {
		l.secrets[token] = bait + random(24)
	}
	return l.secrets[token]
}

// stolen tells whether a probe's bait was given back.
func (l *lab) stolen(token string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.secrets[token]; s != "" && l.given[s] {
		return "the sandbox gave back the secret that was laid out"
	}
	return ""
}

func (l *lab) proven(token string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.proofs {
		if subject, ok := p.holds(token); ok {
			return "the sandbox signed with the key of " + subject
		}
	}
	return ""
}

// lay writes a file of the laboratory.
func (l *lab) lay(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o600)
}

// contains looks for a token in a file of the host, and follows no link.
func (l *lab) contains(path, token string) string {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	raw, _ := io.ReadAll(io.LimitReader(f, 1<<20))
	if bytes.Contains(raw, []byte(token)) {
		rel, _ := filepath.Rel(l.dir, path)
		return "the host's " + rel + " holds what the sandbox wrote"
	}
	return ""
}

// changed tells whether the manifest in the workspace is another one now.
func (l *lab) changed() string {
	for name, want := range l.protected {
		got, err := os.ReadFile(l.ws(name))
		if err != nil || !bytes.Equal(got, want) {
			return name + " was changed by the sandbox"
		}
	}
	return ""
}

// workspace makes the folder that the sandbox works in, and the home, anew.
func (l *lab) workspace(ctx context.Context, git bool) error {
	for _, d := range []string{"ws", "home/.ssh", "home/.aws"} {
		if d == "ws" {
			removeAll(l.ws(""))
		}
		if err := os.MkdirAll(filepath.Join(l.dir, d), 0o700); err != nil {
			return err
		}
	}
	for _, gone := range []string{"home/.gitconfig", "home/.config/git/config"} {
		_ = os.Remove(filepath.Join(l.dir, gone))
	}
	if err := l.lay(filepath.Join(l.dir, "home/.bashrc"), "# the host's\n"); err != nil {
		return err
	}
	if l.o.Files != "" {
		if err := os.CopyFS(l.ws(""), os.DirFS(l.o.Files)); err != nil {
			return err
		}
	}
	if err := copySelf(l.ws(programName)); err != nil {
		return err
	}
	if err := os.WriteFile(l.ws("README"), []byte("a workspace\n"), 0o644); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(l.dir, "outside"), 0o700); err != nil {
		return err
	}
	for _, path := range []string{filepath.Join(l.dir, "ca.pem"), l.o.CA, l.ws("canary-ca.pem")} {
		if path != "" {
			if err := os.WriteFile(path, l.material.pem(), 0o644); err != nil {
				return err
			}
		}
	}
	if git && l.git != "" && !l.o.Plain {
		for _, args := range [][]string{{"init", "-q", "-b", "main"}, {"add", "README"}, {"commit", "-q", "-m", "first"}} {
			if out, err := l.runGit(ctx, args...); err != nil {
				return fmt.Errorf("git %s: %w: %s", args[0], err, out)
			}
		}
	}
	if l.o.Setup != "" {
		cmd := l.command(ctx, l.expand(l.o.Setup, ""))
		if out, err := cmd.CombinedOutput(); err != nil {
			return fault.New(fault.NoInput, "setup_failed", "--setup: %w: %s", err, lastLine(out))
		}
	}
	if l.o.Document != "" && l.o.Residual == nil {
		if err := l.document(); err != nil {
			return err
		}
	}
	clear(l.protected)
	if raw, err := os.ReadFile(l.ws(manifestName)); err == nil {
		l.protected[manifestName] = raw
	}
	return nil
}

// document reads what the document under test says that nobody sees.
func (l *lab) document() error {
	f, err := os.Open(l.expand(l.o.Document, ""))
	if err != nil {
		return fault.New(fault.NoInput, "no_document_file", "--document: %w", err).WithHint("--setup has to write it")
	}
	defer f.Close()
	l.o.Residual, err = ReadResidual(f)
	return err
}

const programName = "bottle-probe"

func copySelf(to string) error {
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Chmod(0o755), out.Close())
}

// runGit is the host's own git in the workspace, as its user would call it.
func (l *lab) runGit(ctx context.Context, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, l.git, args...)
	cmd.Dir = l.ws("")
	cmd.Env = append(slices.Clone(l.env), "GIT_AUTHOR_NAME=p", "GIT_AUTHOR_EMAIL=p@example.com", "GIT_COMMITTER_NAME=p", "GIT_COMMITTER_EMAIL=p@example.com",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*", "GIT_PAGER=cat", "GIT_TERMINAL_PROMPT=0")
	cmd.WaitDelay = time.Second
	l.unprivileged(cmd)
	return cmd.CombinedOutput()
}

// gitAfterwards is what people and their editors do in a workspace.
func (l *lab) gitAfterwards(ctx context.Context) {
	for _, args := range [][]string{{"status"}, {"diff"}, {"log", "-1"}, {"add", "-A"}, {"commit", "-m", "work"}, {"checkout", "--", "."}, {"-C", "sub", "status"}, {"-C", "sub", "log"}} {
		_, _ = l.runGit(ctx, args...)
	}
}

// command runs a line of shell in the workspace, as the sandbox command is run:
// with the environment of the caller, but the laboratory's home.
func (l *lab) command(ctx context.Context, line string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", line)
	cmd.Dir = l.ws("")
	cmd.Env = l.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 2 * time.Second
	l.unprivileged(cmd)
	return cmd
}

// unprivileged takes from a command what only the laboratory may. A plain user's
// processes lose it by themselves once nothing is ambient.
func (l *lab) unprivileged(cmd *exec.Cmd) {
	if os.Geteuid() != 0 {
		_ = unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	}
}

// expand puts the laboratory's paths into a command.
func (l *lab) expand(line, probe string) string {
	return strings.NewReplacer("@PROBE", probe, "@WORKSPACE", l.ws(""), "@HOME", filepath.Join(l.dir, "home"), "@CA", filepath.Join(l.dir, "ca.pem")).Replace(line)
}

// client is the command of the client for some probes.
func (l *lab) client(tasks []task) string {
	s := l.spec
	s.Probes = tasks
	raw, err := json.Marshal(s)
	if err != nil { // strings and numbers
		panic(err)
	}
	return filepath.Join(s.Workspace, programName) + " " + roleClient + " " + base64.RawURLEncoding.EncodeToString(raw)
}

func (l *lab) environment(token string) []string {
	run := filepath.Join(l.dir, "run")
	own := map[string]string{
		"HOME": filepath.Join(l.dir, "home"), "XDG_RUNTIME_DIR": run, "SSH_AUTH_SOCK": filepath.Join(run, "agent.sock"),
		"DBUS_SESSION_BUS_ADDRESS": "unix:path=" + filepath.Join(run, "bus"), "DOCKER_HOST": "unix://" + filepath.Join(run, "docker.sock"),
	}
	if token != "" {
		own["CANARY_API_KEY"] = l.secret(token)
	}
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if _, ours := own[name]; !ours && !strings.HasPrefix(name, "XDG_") && !strings.HasPrefix(name, "GIT_") && !isProxy(name) {
			env = append(env, kv)
		}
	}
	for k, v := range own {
		env = append(env, k+"="+v)
	}
	slices.Sort(env)
	return env
}

// isProxy: a proxy of the caller's own is not in the laboratory.
func isProxy(name string) bool {
	switch strings.ToLower(name) {
	case "http_proxy", "https_proxy", "all_proxy", "no_proxy":
		return true
	}
	return false
}

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

// most is the largest number of a flood's processes that were alive at once.
func (l *lab) most(token string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count[token]
}

// countFlood looks how many files were written in the last second.
func (l *lab) countFlood(ctx context.Context, token string) {
	for ctx.Err() == nil {
		entries, _ := os.ReadDir(l.ws("flood-" + token))
		n := 0
		for _, e := range entries {
			if fi, err := e.Info(); err == nil && time.Since(fi.ModTime()) < 1200*time.Millisecond {
				n++
			}
		}
		l.mu.Lock()
		l.count[token] = max(l.count[token], n)
		l.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// outlived looks for the daemon of R01 after the sandbox has ended, and ends it.
func (l *lab) outlived(token string) string {
	beat := l.ws("beat-" + token)
	first, _ := os.ReadFile(beat)
	time.Sleep(time.Second)
	second, _ := os.ReadFile(beat)
	found := ""
	if len(second) > 0 && !bytes.Equal(first, second) {
		found = "its file is still being written"
	}
	for _, pid := range pids() {
		raw, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		if bytes.Contains(raw, []byte(token)) && bytes.Contains(raw, []byte(roleDaemon)) {
			found = fmt.Sprintf("process %d still runs", pid)
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return found
}
