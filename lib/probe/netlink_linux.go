package probe

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// netlink is the few requests by which the laboratory's networks are made. The
// programs that do this for people are not on every host.
type netlink struct{ fd int }

func openNetlink() (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &netlink{fd}, nil
}

func (n *netlink) close() { unix.Close(n.fd) }

var native = binary.NativeEndian

// attr is one attribute; those in it are joined by the caller.
func attr(kind uint16, data []byte) []byte {
	b := native.AppendUint16(nil, uint16(4+len(data)))
	b = append(native.AppendUint16(b, kind), data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func u32(v uint32) []byte { return native.AppendUint32(nil, v) }

func zero(s string) []byte { return append([]byte(s), 0) }

// do sends one request and waits for its acknowledgement.
func (n *netlink) do(what string, kind uint16, flags int, body ...[]byte) error {
	var payload []byte
	for _, b := range body {
		payload = append(payload, b...)
	}
	msg := u32(uint32(16 + len(payload)))
	msg = native.AppendUint16(msg, kind)
	msg = native.AppendUint16(msg, uint16(unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags))
	msg = append(msg, u32(1)...)
	msg = append(msg, u32(0)...)
	msg = append(msg, payload...)
	if err := unix.Sendto(n.fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	buf := make([]byte, 16<<10)
	for {
		m, _, err := unix.Recvfrom(n.fd, buf, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if m < 20 || native.Uint16(buf[4:]) != unix.NLMSG_ERROR {
			continue
		}
		if code := int32(native.Uint32(buf[16:])); code != 0 {
			return fmt.Errorf("%s: %w", what, unix.Errno(-code))
		}
		return nil
	}
}

func linkMsg(index int, flags, change uint32) []byte {
	b := make([]byte, 16)
	native.PutUint32(b[4:], uint32(index))
	native.PutUint32(b[8:], flags)
	native.PutUint32(b[12:], change)
	return b
}

// veth makes a pair of devices, one here and one in the network of process pid.
func (n *netlink) veth(here, there string, pid int) error {
	const vethInfoPeer = 1
	peer := append(linkMsg(0, 0, 0), attr(unix.IFLA_IFNAME, zero(there))...)
	peer = append(peer, attr(unix.IFLA_NET_NS_PID, u32(uint32(pid)))...)
	info := append(attr(unix.IFLA_INFO_KIND, []byte("veth")), attr(unix.IFLA_INFO_DATA, attr(vethInfoPeer, peer))...)
	return n.do("making a pair of network devices", unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL,
		linkMsg(0, 0, 0), attr(unix.IFLA_IFNAME, zero(here)), attr(unix.IFLA_LINKINFO, info))
}

// up switches a device on and gives its index.
func (n *netlink) up(name string) (int, error) {
	dev, err := net.InterfaceByName(name)
	if err != nil {
		return 0, err
	}
	return dev.Index, n.do("switching "+name+" on", unix.RTM_NEWLINK, 0, linkMsg(dev.Index, unix.IFF_UP, unix.IFF_UP))
}

func family(ip netip.Addr) byte {
	if ip.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// address gives a device an address, with no look for others who have it.
func (n *netlink) address(index int, p netip.Prefix) error {
	head := make([]byte, 8)
	head[0], head[1], head[2] = family(p.Addr()), byte(p.Bits()), unix.IFA_F_NODAD
	native.PutUint32(head[4:], uint32(index))
	raw := p.Addr().AsSlice()
	return n.do("adding address "+p.String(), unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE,
		head, attr(unix.IFA_LOCAL, raw), attr(unix.IFA_ADDRESS, raw))
}

// Kinds of route.
const (
	routeVia   = iota // by way of a gateway
	routeLocal        // the addresses are this network's own
	routeLink         // they are on the device itself; in the table of routeLocal
)

// route sends dst by way of a device, to gateway if that is not the zero Addr.
func (n *netlink) route(dst netip.Prefix, gateway netip.Addr, index, kind int) error {
	head := make([]byte, 12)
	head[0], head[1] = family(dst.Addr()), byte(dst.Bits())
	head[4], head[5], head[6], head[7] = unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST
	switch kind {
	case routeLocal:
		head[4], head[6], head[7] = unix.RT_TABLE_LOCAL, unix.RT_SCOPE_HOST, unix.RTN_LOCAL
	case routeLink:
		head[4], head[6] = unix.RT_TABLE_LOCAL, unix.RT_SCOPE_LINK
	}
	body := [][]byte{head, attr(unix.RTA_OIF, u32(uint32(index)))}
	if dst.Bits() > 0 {
		body = append(body, attr(unix.RTA_DST, dst.Addr().AsSlice()))
	}
	if gateway.IsValid() {
		body = append(body, attr(unix.RTA_GATEWAY, gateway.AsSlice()))
	}
	return n.do("adding a route to "+dst.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body...)
}
