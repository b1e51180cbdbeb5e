package probe

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type tlsConn = tls.Conn

func tlsTo(name string) *tls.Config {
	return &tls.Config{ServerName: name, NextProtos: []string{"http/1.1"}}
}

// direct is a probe that sends the token straight to addresses.
func direct(id, name, title string, addresses func(c *inside) []string) *probe {
	return &probe{Info: info(id, name, "", title), try: func(c *inside, token string) {
		for _, a := range addresses(c) {
			send("tcp", a, token)
		}
	}}
}

func join(host string, p int) string { return net.JoinHostPort(host, port(p)) }

func directProbes() []*probe {
	return []*probe{
		direct("N01", "direct-tcp", "TCP straight to a denied address", func(c *inside) []string {
			return []string{join(c.DenyIP, 443), join(c.DenyIP, 80), join(c.DenyIP, 8080)}
		}),
		direct("N02", "direct-tcp-allowed", "TCP straight to the allowed host's address, past the proxy", func(c *inside) []string {
			return []string{join(c.AllowIP, 443), join(c.AllowIP, 80)}
		}),
		direct("N03", "host-loopback", "TCP straight to a service on the host's loopback", func(c *inside) []string { return []string{join("127.0.0.1", c.HostPort)} }),
		direct("N04", "host-loopback-6", "TCP straight to a service on the host's ::1", func(c *inside) []string { return []string{join("::1", c.HostPort)} }),
		{Info: info("N05", "host-loopback-mapped", "", "TCP to ::ffff:127.0.0.1 from an IPv6 socket"), try: mappedLoopback},
		direct("N06", "host-address", "TCP straight to an address of the host's own", func(c *inside) []string { return []string{join(c.HostIP, c.HostPort)} }),
		direct("N07", "metadata", "TCP straight to the cloud's metadata address", func(c *inside) []string { return []string{join(metadataIP.String(), 80)} }),
		direct("N08", "private", "TCP straight to a private address", func(c *inside) []string {
			return []string{join(privateIP.String(), 80), join("192.168.1.1", 80), join("172.16.0.1", 443)}
		}),
		direct("N09", "no-proxy", "TCP by name, with no regard to proxy variables", func(c *inside) []string { return []string{join(c.Deny, 80), join(c.Deny, 443)} }),
		{Info: info("N10", "udp", "", "UDP to a denied address, as QUIC would"), try: func(c *inside, token string) {
			for _, p := range []int{443, 123, 33434} {
				datagram(join(c.DenyIP, p), token)
			}
			datagram(join(c.DenyIP6, 443), token)
		}},
		{Info: info("N11", "raw", "", "raw and packet sockets"), try: rawSockets},
		{Info: info("N12", "vsock", "", "vsock to the host"), try: vsockConnect, skip: func(l *lab) string {
			if l.spec.VsockPort == 0 {
				return "the host has no vsock"
			}
			return ""
		}},
		direct("N13", "direct-ipv6", "TCP straight to a denied IPv6 address", func(c *inside) []string { return []string{join(c.DenyIP6, 443), join(c.DenyIP6, 80)} }),
		{Info: info("N14", "icmp", "", "ICMP echo that carries data"), try: ping},
		{Info: info("N15", "multicast", "", "UDP to multicast and broadcast addresses"), try: func(c *inside, token string) {
			for _, a := range []string{"255.255.255.255:9", "224.0.0.251:5353", "239.255.255.250:1900", "[ff02::fb%wan0]:5353"} {
				datagram(a, token)
			}
		}},
		{Info: info("N16", "protocols", "", "SCTP, UDP-Lite and IP protocols without a name"), try: oddProtocols},
		{Info: info("N17", "interface", "", "giving the network an interface or an address"), try: addAddress, leak: func(l *lab, token string) string {
			addrs, err := net.InterfaceAddrs()
			if err != nil {
				return ""
			}
			for _, a := range addrs {
				if strings.HasPrefix(a.String(), planted.Addr().String()) {
					return "the host's network has the address " + planted.Addr().String()
				}
			}
			return ""
		}},
		{Info: info("L01", "localhost-reach", "", "each port of the host's loopback, straight and through the proxy, by every name of it"), try: func(c *inside, token string) {
			for _, p := range hostPorts(c.HostPort) {
				for _, host := range []string{"127.0.0.1", "::1", "localhost", "0.0.0.0", "127.1.2.3"} {
					send("tcp", join(host, p), token)
				}
			}
			for _, host := range []string{"127.0.0.1", "localhost", "::1", "0.0.0.0", "127.1.2.3", "::", "ip6-localhost", "localhost.localdomain"} {
				for _, p := range []int{c.HostPort, 443, 80} {
					c.tunnel(host, p, token)
				}
			}
			c.eachProxy(func(nc net.Conn) {
				exchange(nc, get("127.0.0.1", fmt.Sprintf("http://127.0.0.1:%d/%s", c.HostPort, token)))
			})
		}},
	}
}

// tunnel asks the proxies for a host and sends the token through what they give.
func (c *inside) tunnel(host string, p int, token string) {
	for _, w := range c.ways {
		if w.proxy == "" && w.socks == "" {
			continue
		}
		nc, err := w.dial(host, p)
		if err != nil {
			continue
		}
		_ = nc.SetDeadline(time.Now().Add(tryLimit))
		if p == 443 {
			handshake(nc, tlsTo(strings.Trim(host, "[].")), func(tc *tls.Conn) { exchange(tc, get(host, "/"+token)) })
		} else {
			exchange(nc, get(host, "/"+token))
		}
		nc.Close()
	}
}

func datagram(address, token string) {
	nc, err := net.DialTimeout("udp", address, tryLimit)
	if err != nil {
		return
	}
	defer nc.Close()
	if raw, err := nc.(*net.UDPConn).SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1) })
	}
	_, _ = nc.Write([]byte("probe " + token))
}

func mappedLoopback(c *inside, token string) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(int64(tryLimit))
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
	if unix.Connect(fd, &unix.SockaddrInet6{Port: c.HostPort, Addr: loopback4.As16()}) == nil {
		_, _ = unix.Write(fd, []byte(get("mapped", "/"+token)))
		time.Sleep(100 * time.Millisecond)
	}
}

// rawSockets sends the token as a frame on every device, and as a packet with a
// header of our own.
func rawSockets(c *inside, token string) {
	devices, _ := net.Interfaces()
	for _, dev := range devices {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			break
		}
		frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, make([]byte, 6)...)
		frame = append(frame, 0x88, 0xb5) // for local experiments
		frame = append(frame, ("probe " + token + strings.Repeat(" ", 46))...)
		_ = unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: dev.Index, Protocol: 0xb588, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}})
		unix.Close(fd)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	dst := netip.MustParseAddr(c.DenyIP).As4()
	body := "probe " + token
	udp := binary.BigEndian.AppendUint16([]byte{0x30, 0x39, 0, 9}, uint16(8+len(body)))
	udp = append(append(udp, 0, 0), body...)
	ip := append([]byte{0x45, 0, 0, byte(20 + len(udp)), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0, 0, 0, 0, 0}, dst[:]...)
	_ = unix.Sendto(fd, append(ip, udp...), 0, &unix.SockaddrInet4{Addr: dst})
}

func vsockConnect(c *inside, token string) {
	for _, cid := range c.VsockCIDs {
		fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return
		}
		tv := unix.NsecToTimeval(int64(tryLimit))
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
		if unix.Connect(fd, &unix.SockaddrVM{CID: cid, Port: c.VsockPort}) == nil {
			_, _ = unix.Write(fd, []byte(token))
			time.Sleep(100 * time.Millisecond)
		}
		unix.Close(fd)
	}
}

func ping(c *inside, token string) {
	dst := netip.MustParseAddr(c.DenyIP).As4()
	msg := append([]byte{8, 0, 0, 0, 0, 1, 0, 1}, ("probe " + token)...)
	if len(msg)%2 == 1 {
		msg = append(msg, ' ')
	}
	var sum uint32
	for i := 0; i < len(msg); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(msg[i:]))
	}
	sum = sum>>16 + sum&0xffff
	sum += sum >> 16
	binary.BigEndian.PutUint16(msg[2:], ^uint16(sum))
	for _, kind := range []int{unix.SOCK_DGRAM, unix.SOCK_RAW} {
		fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			continue
		}
		_ = unix.Sendto(fd, msg, 0, &unix.SockaddrInet4{Addr: dst})
		unix.Close(fd)
	}
}

func oddProtocols(c *inside, token string) {
	dst := netip.MustParseAddr(c.DenyIP).As4()
	send := func(kind, proto int) {
		fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, proto)
		if err != nil {
			return
		}
		_ = unix.SetNonblock(fd, true)
		_ = unix.Sendto(fd, []byte("probe "+token), 0, &unix.SockaddrInet4{Addr: dst, Port: 443})
		unix.Close(fd)
	}
	send(unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE)
	send(unix.SOCK_SEQPACKET, unix.IPPROTO_SCTP)
	for _, proto := range []int{47, 50, 132, 253} {
		send(unix.SOCK_RAW, proto)
	}
}

// planted is the address that a probe tries to give the host.
var planted = netip.MustParsePrefix("192.0.2.77/32")

func addAddress(c *inside, token string) {
	n, err := openNetlink()
	if err != nil {
		return
	}
	defer n.close()
	if dev, err := net.InterfaceByName("lo"); err == nil {
		_ = n.address(dev.Index, planted)
	}
}

// query is a DNS question of a type for name.
func query(name string, kind uint16) []byte {
	b := []byte{0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	b = append(b, packName(name)...)
	b = binary.BigEndian.AppendUint16(b, kind)
	return binary.BigEndian.AppendUint16(b, classIN)
}

func askUDP(server, name string, kinds ...uint16) {
	if len(kinds) == 0 {
		kinds = []uint16{typeA}
	}
	nc, err := net.DialTimeout("udp", server, tryLimit)
	if err != nil {
		return
	}
	defer nc.Close()
	buf := make([]byte, 512)
	for _, k := range kinds {
		_, _ = nc.Write(query(name, k))
		_ = nc.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		_, _ = nc.Read(buf)
	}
}

func askTCP(server, name string) {
	nc, err := net.DialTimeout("tcp", server, tryLimit)
	if err != nil {
		return
	}
	defer nc.Close()
	q := query(name, typeA)
	_ = nc.SetDeadline(time.Now().Add(time.Second))
	_, _ = nc.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...))
	_, _ = nc.Read(make([]byte, 512))
}

// nameservers are those of the sandbox's resolv.conf.
func nameservers() []string {
	raw, _ := os.ReadFile("/etc/resolv.conf")
	var all []string
	for _, line := range strings.Split(string(raw), "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			all = append(all, f[1])
		}
	}
	return all
}

func lookup(name string) { _, _ = net.LookupHost(name) }

func dnsProbes() []*probe {
	return []*probe{
		{Info: info("D01", "dns-outside", "", "DNS over UDP straight to an outside resolver, data in the label"), try: func(c *inside, token string) {
			askUDP(join(c.Resolver, 53), token+"."+c.Deny)
			askUDP(join(c.DenyIP, 53), token+"."+c.Deny)
			askUDP(join(c.DenyIP6, 53), token+"."+c.Deny)
		}},
		{Info: info("D02", "dns-loopback", "", "DNS over UDP to a resolver on the host's loopback"), try: func(c *inside, token string) {
			for _, a := range []string{"127.0.0.1", "127.0.0.53", "::1", c.HostIP} {
				askUDP(join(a, 53), token+"."+c.Deny)
			}
		}},
		{Info: info("D03", "dns-libc", "", "the system's resolver asked for a denied name, data in the label"), try: func(c *inside, token string) {
			lookup(token + "." + c.Deny)
			lookup(token + ".example.")
		}},
		{Info: info("D04", "dns-tcp", "", "DNS over TCP"), try: func(c *inside, token string) {
			askTCP(join(c.Resolver, 53), token+"."+c.Deny)
			askTCP(join(c.DenyIP, 53), token+"."+c.Deny)
		}},
		{Info: info("D05", "dns-by-proxy", "", "the proxy asked for a denied name: does it resolve before it denies?"), try: func(c *inside, token string) {
			c.tunnel(token+"."+c.Deny, 443, "x")
			c.eachProxy(func(nc net.Conn) { exchange(nc, get(token+"."+c.Deny, "http://"+token+"."+c.Deny+"/")) })
		}},
		{Info: info("D06", "wildcard-label", "C05", "data in a label under an allowed wildcard"), residual: wildcard, skip: noWildcard, try: func(c *inside, token string) {
			name := token + "." + c.Wildcard
			lookup(name)
			c.inTLS(name, 443, tlsTo(name), func(tc *tlsConn) { exchange(tc, get(name, "/")) })
		}},
		{Info: info("D07", "dns-types", "", "the sandbox's own name servers asked for names of other types, data in the label"), try: func(c *inside, token string) {
			for _, s := range nameservers() {
				askUDP(join(s, 53), token+"."+c.Deny, typeA, typeAAAA, 16, 15, 33, 65, 255)
				askTCP(join(s, 53), token+"."+c.Deny)
			}
		}},
		{Info: info("D08", "dns-encrypted", "", "DNS over TLS and over HTTPS to an outside resolver"), try: func(c *inside, token string) {
			for _, p := range []int{853, 443} {
				for _, w := range c.ways {
					if nc, err := w.dial(c.DenyIP, p); err == nil {
						handshake(nc, tlsTo("dns."+c.Deny), func(tc *tlsConn) { exchange(tc, get("dns."+c.Deny, "/dns-query?dns="+token)) })
						nc.Close()
					}
				}
			}
		}},
		{Info: info("D09", "label-below-allowed", "", "data in a label below an allowed name that is no wildcard"), skip: func(l *lab) string {
			if l.o.Wildcard == l.o.Allow {
				return "every name below " + l.o.Allow + " is allowed"
			}
			return ""
		}, try: func(c *inside, token string) {
			name := token + "." + c.Allow
			lookup(name)
			c.inTLS(name, 443, tlsTo(name), func(tc *tlsConn) { exchange(tc, get(name, "/")) })
			for _, s := range nameservers() {
				askUDP(join(s, 53), name, typeA, 16, 65)
			}
		}},
		{Info: info("D10", "allowed-name-types", "", "an allowed name asked for with data in the rest of the message"), try: func(c *inside, token string) {
			for _, s := range nameservers() {
				if nc, err := net.DialTimeout("udp", join(s, 53), tryLimit); err == nil {
					q := query(c.Allow, typeA)
					q[11] = 1 // one additional record: OPT with a private option
					opt := append([]byte{0, 0, 41, 4, 0, 0, 0, 0, 0}, byte((len(token)+4)>>8), byte(len(token)+4), 0xfd, 0xe9, 0, byte(len(token)))
					_, _ = nc.Write(append(append(q, opt...), token...))
					_ = nc.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
					_, _ = nc.Read(make([]byte, 512))
					nc.Close()
				}
			}
		}},
	}
}
