//go:build linux

package helper

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// resolverAddress is where Resolv sends the guest's programs.
const resolverAddress = "127.0.0.1:53"

const (
	// ttl is how long programs may keep an address, in seconds. It stays the
	// name's; the ports that are open behind it may change.
	ttl = 60
	// queries and streams bound what is answered at one time.
	queries = 64
	streams = 64
	// streamIdle ends a TCP connection on which no query comes.
	streamIdle = 10 * time.Second
)

// resolver answers DNS queries about the names that the policy opens. There is
// nobody whom it could ask but the gate, which looks at the policy and resolves
// nothing: what does not resolve does not leave the guest.
type resolver struct {
	// resolve gives the name's address of the kind, the zero Addr where it has
	// none of that kind.
	resolve func(name string, v6 bool) (netip.Addr, error)
	slots   chan struct{}
}

func newResolver(resolve func(string, bool) (netip.Addr, error)) *resolver {
	return &resolver{resolve: resolve, slots: make(chan struct{}, queries)}
}

// servePackets answers until c is closed.
func (r *resolver) servePackets(c net.PacketConn) {
	for {
		buf := make([]byte, 1232)
		n, from, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		r.slots <- struct{}{}
		go func() {
			defer func() { <-r.slots }()
			if a := r.answer(buf[:n]); a != nil {
				_, _ = c.WriteTo(a, from)
			}
		}()
	}
}

// serveStreams answers until l is closed.
func (r *resolver) serveStreams(l net.Listener) {
	slots := make(chan struct{}, streams)
	for {
		slots <- struct{}{}
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			<-slots
			time.Sleep(100 * time.Millisecond)
			continue
		}
		go func() {
			defer func() { <-slots }()
			defer c.Close()
			r.serveStream(c)
		}()
	}
}

func (r *resolver) serveStream(c net.Conn) {
	var length [2]byte
	for {
		_ = c.SetDeadline(time.Now().Add(streamIdle))
		if _, err := io.ReadFull(c, length[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(length[:]))
		if _, err := io.ReadFull(c, query); err != nil {
			return
		}
		a := r.answer(query)
		if a == nil {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...)); err != nil {
			return
		}
	}
}

// answer gives the answer to a query, nil to what is none. Refusals have no SOA
// record, so that nobody keeps them (RFC 2308 section 5): a policy can be
// widened while the guest runs.
func (r *resolver) answer(query []byte) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || h.Response {
		return nil
	}
	out := dnsmessage.Header{ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, RecursionAvailable: true}
	if h.OpCode != 0 {
		return build(dnsmessage.Header{ID: h.ID, Response: true, OpCode: h.OpCode, RCode: dnsmessage.RCodeNotImplemented}, nil, netip.Addr{})
	}
	q, err := p.Question()
	if err != nil {
		out.RCode = dnsmessage.RCodeFormatError
		return build(out, nil, netip.Addr{})
	}
	if _, err := p.Question(); err != dnsmessage.ErrSectionDone {
		out.RCode = dnsmessage.RCodeFormatError
		return build(out, nil, netip.Addr{})
	}
	var ip netip.Addr
	ip, out.RCode = r.look(q)
	return build(out, &q, ip)
}

// look gives the address to answer with, if any. A name that has addresses has no
// other records, which is no error.
func (r *resolver) look(q dnsmessage.Question) (netip.Addr, dnsmessage.RCode) {
	name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	if q.Class != dnsmessage.ClassINET || !askable(name) {
		return netip.Addr{}, dnsmessage.RCodeNameError
	}
	v6 := q.Type == dnsmessage.TypeAAAA
	var ip netip.Addr
	switch {
	case name != "localhost" && !strings.HasSuffix(name, ".localhost"):
		var err error
		ip, err = r.resolve(name, v6)
		if errors.Is(err, errRefused) {
			return netip.Addr{}, dnsmessage.RCodeNameError
		}
		if err != nil {
			return netip.Addr{}, dnsmessage.RCodeServerFailure
		}
	case v6: // RFC 6761 section 6.3
		ip = netip.IPv6Loopback()
	default:
		ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if !v6 && q.Type != dnsmessage.TypeA {
		ip = netip.Addr{}
	}
	return ip, dnsmessage.RCodeSuccess
}

// askable tells whether name is one that a policy could hold. The gate is not
// bothered with others, nor with addresses in reverse.
func askable(name string) bool {
	if name == "" || len(name) > 253 || strings.HasSuffix(name, ".arpa") {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}

func build(h dnsmessage.Header, q *dnsmessage.Question, ip netip.Addr) []byte {
	b := dnsmessage.NewBuilder(make([]byte, 0, 512), h)
	b.EnableCompression()
	if q != nil {
		if b.StartQuestions() != nil || b.Question(*q) != nil {
			return nil
		}
		rh := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: ttl}
		switch {
		case ip.Is4() && (b.StartAnswers() != nil || b.AResource(rh, dnsmessage.AResource{A: ip.As4()}) != nil):
			return nil
		case ip.Is6() && (b.StartAnswers() != nil || b.AAAAResource(rh, dnsmessage.AAAAResource{AAAA: ip.As16()}) != nil):
			return nil
		}
	}
	out, err := b.Finish()
	if err != nil {
		return nil
	}
	return out
}
