package probe

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// How the allowed name resolves while a probe runs.
const (
	dnsPublic   = ""
	dnsLoopback = "loopback"
	dnsMetadata = "metadata"
	dnsPrivate  = "private"
	dnsOwn      = "own"    // the host's own address
	dnsFlip     = "flip"   // public at first, loopback from then on, TTL 0
	dnsDual     = "dual"   // A public, AAAA loopback
	dnsMixed    = "mixed"  // two A records, public and loopback
	dnsMapped   = "mapped" // AAAA ::ffff:127.0.0.1
	dnsNAT64    = "nat64"  // AAAA 64:ff9b::127.0.0.1
)

// zone is what the canary name servers know. Every name has an address: that of
// the allowed host for what the policy lets through, else that of the denied one.
type zone struct {
	Allow, AllowHTTP, Wildcard, Deny string
	AllowIP, DenyIP, DenyIP6, HostIP netip.Addr

	mu    sync.Mutex
	mode  string
	asked int // questions for an allowed name since the mode was set
}

func (z *zone) set(mode string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.mode, z.asked = mode, 0
}

func (z *zone) allowed(name string) bool {
	return name == z.Allow || name == z.AllowHTTP || z.Wildcard != "" && strings.HasSuffix(name, "."+z.Wildcard)
}

var (
	metadataIP = netip.MustParseAddr("169.254.169.254")
	privateIP  = netip.MustParseAddr("10.1.2.3")
	loopback4  = netip.MustParseAddr("127.0.0.1")
)

const (
	typeA, typeCNAME, typeAAAA = 1, 5, 28
	classIN                    = 1
)

// answer gives the addresses of name for a type of question.
func (z *zone) answer(name string, kind uint16) []netip.Addr {
	if !z.allowed(name) {
		switch kind {
		case typeA:
			return []netip.Addr{z.DenyIP}
		case typeAAAA:
			return []netip.Addr{z.DenyIP6}
		}
		return nil
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	if kind == typeA || kind == typeAAAA {
		z.asked++
	}
	v4 := []netip.Addr{z.AllowIP}
	var v6 []netip.Addr
	switch z.mode {
	case dnsLoopback:
		v4, v6 = []netip.Addr{loopback4}, []netip.Addr{netip.IPv6Loopback()}
	case dnsMetadata:
		v4 = []netip.Addr{metadataIP}
	case dnsPrivate:
		v4 = []netip.Addr{privateIP}
	case dnsOwn:
		v4 = []netip.Addr{z.HostIP}
	case dnsFlip:
		if z.asked > 2 { // a lookup asks for A and AAAA
			v4 = []netip.Addr{loopback4}
		}
	case dnsDual:
		v6 = []netip.Addr{netip.IPv6Loopback()}
	case dnsMixed:
		v4 = []netip.Addr{z.AllowIP, loopback4}
	case dnsMapped:
		v4, v6 = nil, []netip.Addr{netip.AddrFrom16(loopback4.As16())}
	case dnsNAT64:
		nat := netip.MustParseAddr("64:ff9b::").As16()
		copy(nat[12:], loopback4.AsSlice())
		v4, v6 = nil, []netip.Addr{netip.AddrFrom16(nat)}
	}
	if kind == typeA {
		return v4
	}
	if kind == typeAAAA {
		return v6
	}
	return nil
}

// reply answers one message; name is what it asks for. A message that is no
// question gets none.
func (z *zone) reply(q []byte) (answer []byte, name string) {
	if len(q) < 12 || q[2]&0x80 != 0 || binary.BigEndian.Uint16(q[4:]) != 1 {
		return nil, ""
	}
	var labels []string
	i := 12
	for {
		if i >= len(q) {
			return nil, ""
		}
		n := int(q[i])
		i++
		if n == 0 {
			break
		}
		if n > 63 || i+n > len(q) {
			return nil, ""
		}
		labels = append(labels, string(q[i:i+n]))
		i += n
	}
	if i+4 > len(q) {
		return nil, ""
	}
	kind := binary.BigEndian.Uint16(q[i:])
	question := q[12 : i+4]
	name = strings.ToLower(strings.Join(labels, "."))
	ips := z.answer(name, kind)
	var body []byte
	for _, ip := range ips {
		raw := ip.AsSlice()
		if kind == typeAAAA {
			b := ip.As16()
			raw = b[:]
		}
		body = record(body, []byte{0xc0, 12}, kind, raw)
	}
	answer = append(answer, q[0], q[1], 0x84|q[2]&1, 0x80, 0, 1, 0, byte(len(ips)), 0, 0, 0, 0)
	return append(append(answer, question...), body...), name
}

func packName(name string) []byte {
	var b []byte
	for _, l := range strings.Split(name, ".") {
		b = append(append(b, byte(len(l))), l...)
	}
	return append(b, 0)
}

func record(b, name []byte, kind uint16, data []byte) []byte {
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint16(b, classIN)
	b = append(b, 0, 0, 0, 0) // no time to live
	b = binary.BigEndian.AppendUint16(b, uint16(len(data)))
	return append(b, data...)
}

// serveUDP answers on an UDP socket until it is closed.
func (z *zone) serveUDP(pc net.PacketConn, saw func(event)) {
	buf := make([]byte, 4096)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		answer, name := z.reply(buf[:n])
		saw(event{Server: "dns", Dst: pc.LocalAddr().String(), Host: name, Data: append([]byte(nil), buf[:n]...)})
		if answer != nil {
			_, _ = pc.WriteTo(answer, from)
		}
	}
}

func (z *zone) serveTCP(c net.Conn, saw func(event)) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(connLimit))
	for {
		var size [2]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		msg := make([]byte, min(int(binary.BigEndian.Uint16(size[:])), 4096))
		n, err := io.ReadFull(c, msg)
		answer, name := z.reply(msg[:n])
		saw(event{Server: "dns", Dst: c.LocalAddr().String(), Host: name, Data: append(size[:], msg[:n]...)})
		if err != nil || answer == nil {
			return
		}
		out := binary.BigEndian.AppendUint16(nil, uint16(len(answer)))
		if _, err := c.Write(append(out, answer...)); err != nil {
			return
		}
	}
}
