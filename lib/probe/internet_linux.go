package probe

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The laboratory's devices.
const (
	hostDevice     = "wan0"
	internetDevice = "net0"
)

// internetConfig is what the process behind the canary internet is told.
type internetConfig struct {
	Material material
	Zone     *zone
	Gateway  netip.Prefix
	Gateway6 netip.Prefix
	Prefix   string // with which all tokens of this run begin
}

// internetPorts are served with TCP, on every address there is.
var internetPorts = []int{22, 25, 53, 80, 443, 853, 1080, 3128, 5432, 8080, 8443, 9418}

// internet is the process that has the network where everything is: it reads its
// configuration from in, tells when it is ready, and then writes what it sees to
// out. Lines of in set how the allowed name resolves. It ends with in.
func internet(in io.Reader, out io.Writer) error {
	lines := bufio.NewReader(in)
	first, err := lines.ReadBytes('\n')
	if err != nil {
		return err
	}
	var cfg internetConfig
	if err := json.Unmarshal(first, &cfg); err != nil {
		return err
	}
	var mu sync.Mutex
	saw := func(e event) {
		mu.Lock()
		defer mu.Unlock()
		if e.At.IsZero() {
			e.At = time.Now()
		}
		_, _ = out.Write(e.encode())
	}
	if err := cfg.network(); err != nil {
		return err
	}
	ca, err := cfg.Material.authority()
	if err != nil {
		return err
	}
	c := newCanary("", cfg.Zone, ca, saw)
	if err := c.listen("", internetPorts); err != nil {
		return err
	}
	pc, err := net.ListenPacket("udp", ":53")
	if err != nil {
		return err
	}
	if err := answerFrom(pc); err != nil {
		return err
	}
	go cfg.Zone.serveUDP(newReplier(pc), saw)
	if err := sniff(internetDevice, []byte(cfg.Prefix), saw); err != nil {
		return err
	}
	saw(event{Server: "ready"})
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return nil
		}
		cfg.Zone.set(string(bytes.TrimSpace(line)))
		c.hangUp()
		saw(event{Server: "mode"})
	}
}

// network makes every address of the world this network's own.
func (cfg *internetConfig) network() error {
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer n.close()
	lo, err := n.up("lo")
	if err != nil {
		return err
	}
	dev, err := n.up(internetDevice)
	if err != nil {
		return err
	}
	for _, p := range []netip.Prefix{cfg.Gateway, cfg.Gateway6} {
		if err := n.address(dev, p); err != nil {
			return err
		}
	}
	none := netip.Addr{}
	for _, p := range []string{"0.0.0.0/0", "::/0"} {
		if err := n.route(netip.MustParsePrefix(p), none, lo, routeLocal); err != nil {
			return err
		}
	}
	// The host's network, and what belongs to the wire, has to be looked up in
	// the same table, or the line above covers it.
	for _, p := range []netip.Prefix{cfg.Gateway.Masked(), cfg.Gateway6.Masked(), netip.MustParsePrefix("fe80::/64")} {
		if err := n.route(p, none, dev, routeLink); err != nil {
			return err
		}
	}
	return nil
}

// answerFrom asks for the address that each datagram was sent to, since the
// answer has to come from there.
func answerFrom(pc net.PacketConn) error {
	raw, err := pc.(*net.UDPConn).SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	})
	if err != nil {
		return err
	}
	return serr
}

// replier is a socket on all addresses that answers from the one it was asked at.
type replier struct {
	*net.UDPConn
	mu  sync.Mutex
	oob map[string][]byte
}

func newReplier(pc net.PacketConn) *replier {
	return &replier{UDPConn: pc.(*net.UDPConn), oob: map[string][]byte{}}
}

func (r *replier) ReadFrom(b []byte) (int, net.Addr, error) {
	oob := make([]byte, 256)
	n, on, _, from, err := r.ReadMsgUDP(b, oob)
	if err == nil {
		r.mu.Lock()
		if len(r.oob) > 100 {
			clear(r.oob)
		}
		r.oob[from.String()] = oob[:on]
		r.mu.Unlock()
	}
	return n, from, err
}

func (r *replier) WriteTo(b []byte, to net.Addr) (int, error) {
	r.mu.Lock()
	oob := r.oob[to.String()]
	r.mu.Unlock()
	n, _, err := r.WriteMsgUDP(b, oob, to.(*net.UDPAddr))
	return n, err
}

// sniff notes every packet that arrives with a token in the clear, whatever
// protocol it has.
func sniff(device string, prefix []byte, saw func(event)) error {
	dev, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	const all = 0x0300 // ETH_P_ALL in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
	if err != nil {
		return fmt.Errorf("a socket for packets: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: dev.Index}); err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 70<<10)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err == unix.EINTR || err == unix.ENETDOWN {
				continue
			}
			if err != nil {
				return
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			if i := bytes.Index(bytes.ToLower(buf[:n]), prefix); i >= 0 {
				saw(event{Server: "packet", Dst: target(buf[:n]), Data: bytes.Clone(buf[max(0, i-64):min(n, i+128)])})
			}
		}
	}()
	return nil
}

// target describes where a packet was going.
func target(p []byte) string {
	if len(p) < 34 {
		return "a short packet"
	}
	switch kind, ip := int(p[12])<<8|int(p[13]), p[14:]; {
	case kind == unix.ETH_P_IP:
		return netip.AddrFrom4([4]byte(ip[16:20])).String() + " protocol " + strconv.Itoa(int(ip[9]))
	case kind == unix.ETH_P_IPV6 && len(ip) >= 40:
		return netip.AddrFrom16([16]byte(ip[24:40])).String() + " protocol " + strconv.Itoa(int(ip[6]))
	default:
		return fmt.Sprintf("ethernet type %04x", kind)
	}
}

// startInternet launches the process, in a network of its own, and connects that
// with this one.
func (l *lab) startInternet(ctx context.Context) error {
	cmd := self(ctx, roleInternet)
	cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWNET
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the canary internet: %w", err)
	}
	l.modes = stdin
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer n.close()
	if err := n.veth(hostDevice, internetDevice, cmd.Process.Pid); err != nil {
		return err
	}
	if err := l.hostNetwork(n); err != nil {
		return err
	}
	cfg, err := json.Marshal(internetConfig{Material: l.material, Zone: l.zone, Gateway: l.net.gateway, Gateway6: l.net.gateway6, Prefix: l.prefix})
	if err != nil {
		return err
	}
	if _, err := stdin.Write(append(cfg, '\n')); err != nil {
		return err
	}
	ready := make(chan struct{})
	go func() {
		for dec := json.NewDecoder(stdout); ; {
			var e event
			if dec.Decode(&e) != nil {
				break
			}
			switch e.Server {
			case "ready":
				close(ready)
			case "mode":
				l.modeSet <- struct{}{}
			default:
				l.record(e)
			}
		}
		l.record(event{Server: "gone"})
	}()
	select {
	case <-ready:
		return l.routes(n)
	case <-time.After(10 * time.Second):
		return fmt.Errorf("the canary internet did not become ready")
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *lab) hostNetwork(n *netlink) error {
	if _, err := n.up("lo"); err != nil {
		return err
	}
	dev, err := n.up(hostDevice)
	if err != nil {
		return err
	}
	for _, p := range []netip.Prefix{l.net.host, l.net.host6} {
		if err := n.address(dev, p); err != nil {
			return err
		}
	}
	l.net.device = dev
	return nil
}

// routes sends everything to the internet, once the other end is up.
func (l *lab) routes(n *netlink) error {
	if err := n.route(netip.MustParsePrefix("0.0.0.0/0"), l.net.gateway.Addr(), l.net.device, routeVia); err != nil {
		return err
	}
	return n.route(netip.MustParsePrefix("::/0"), l.net.gateway6.Addr(), l.net.device, routeVia)
}
