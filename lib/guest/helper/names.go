//go:build linux

package helper

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/guest"
)

// Clients that know nothing of proxies get to the gate by name: each name that
// the policy opens has an address of its own in 127.64.0.0/10, all of which a
// guest takes for its own, and a connection to it becomes CONNECT name:port. The
// first names that are asked for in IPv6 have one of that kind, too; of those the
// guest has as many as its device was given, see ownNames.
//
// An address is never given to a second name, so that one which a client has
// kept cannot come to mean another; when all four million are used up, further
// names do not resolve. Guests make up names below a wildcard, so what is held
// for names is bounded, and the name that was not used for longest goes first.
var (
	firstAddress  = netip.MustParseAddr("127.64.0.1")
	lastAddress   = netip.MustParseAddr("127.127.255.254")
	firstAddress6 = netip.MustParseAddr("fd62:6f74:746c:65::1") // a unique local prefix, RFC 4193
)

const (
	maxNames     = 4096
	maxListeners = 4096
	addresses6   = 32
)

// names is what the resolver and the listeners share.
type names struct {
	asker    *asker
	resolver *resolver
	relay    *relay // to the gate
	stderr   io.Writer
	slots    chan struct{} // connections at one time

	mu        sync.Mutex
	byName    map[string]*entry
	byAddress map[netip.Addr]*entry
	used      list.List // of *entry, the latest first
	next      netip.Addr
	left6     []netip.Addr // without a name
	listening int

	// Since start:
	literals []literal
	anywhere map[int]bool // ports that are listened to on all IPv4 addresses
}

// entry is a name that has an address.
type entry struct {
	name      string
	address   netip.Addr
	address6  netip.Addr // the zero Addr for most
	services  []guest.Service
	listeners map[netip.AddrPort]net.Listener
	place     *list.Element
}

// literal is a block of addresses that the policy opens as such.
type literal struct {
	prefix   netip.Prefix
	services []guest.Service
}

// target is what a client has connected to.
type target struct {
	host     string
	port     int
	protocol string // of the rule; "" where no rule has the port any more
}

func newNames(r *relay, stderr io.Writer) *names {
	return &names{relay: r, asker: &asker{dial: r.connect}, stderr: stderr, slots: make(chan struct{}, maxConns),
		byName: map[string]*entry{}, byAddress: map[netip.Addr]*entry{}, next: firstAddress}
}

// start begins to resolve, and to listen for the addresses that the policy opens
// as such.
func (n *names) start(addresses []guest.Address) error {
	packets, err := net.ListenPacket("udp4", resolverAddress)
	if err != nil {
		return fmt.Errorf("resolver: %w", err)
	}
	if err := n.listenLiterals(addresses); err != nil {
		return err
	}
	n.resolver = newResolver(n.resolve)
	go n.resolver.servePackets(packets)
	return nil
}

// complete does what nobody waits for: it resolves over TCP, too, and gives names
// IPv6 addresses.
func (n *names) complete() error {
	streams, err := listenTCP(resolverAddress)
	if err != nil {
		return fmt.Errorf("resolver: %w", err)
	}
	go n.resolver.serveStreams(streams)
	all, err := ownNames()
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.left6 = all
	n.mu.Unlock()
	return nil
}

// resolve gives the address of a name that the policy opens, in IPv6 the zero
// Addr where it has none. errRefused: it opens nothing of the name.
func (n *names) resolve(name string, v6 bool) (netip.Addr, error) {
	open, err := n.asker.ask(name)
	if err != nil {
		return netip.Addr{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	e, ok := n.byName[name]
	if !ok {
		if e, err = n.add(name); err != nil {
			return netip.Addr{}, err
		}
	}
	n.used.MoveToFront(e.place)
	e.services = open.Services
	ip := e.address
	if v6 {
		if !e.address6.IsValid() && len(n.left6) > 0 {
			e.address6, n.left6 = n.left6[0], n.left6[1:]
			n.byAddress[e.address6] = e
		}
		ip = e.address6
	}
	if ip.IsValid() {
		n.listen(e, ip)
	}
	return ip, nil
}

func (n *names) add(name string) (*entry, error) {
	if !n.next.IsValid() {
		return nil, errors.New("all addresses for names are used up")
	}
	for len(n.byName) >= maxNames {
		n.forget(n.used.Back())
	}
	e := &entry{name: name, address: n.next, listeners: map[netip.AddrPort]net.Listener{}}
	if n.next == lastAddress {
		n.next = netip.Addr{}
	} else {
		n.next = n.next.Next()
	}
	e.place = n.used.PushFront(e)
	n.byName[name], n.byAddress[e.address] = e, e
	return e, nil
}

func (n *names) forget(place *list.Element) {
	e := n.used.Remove(place).(*entry)
	delete(n.byName, e.name)
	delete(n.byAddress, e.address)
	delete(n.byAddress, e.address6)
	for _, l := range e.listeners {
		l.Close()
	}
	n.listening -= len(e.listeners)
}

// listen opens the ports of e on its address ip. It is done when the name is asked
// for, and on that address alone: a bottle that uses proxies listens on nothing,
// and what the agent itself serves on such a port of 127.0.0.1 is not in the way.
func (n *names) listen(e *entry, ip netip.Addr) {
	for _, s := range e.services {
		at := netip.AddrPortFrom(ip, uint16(s.Port))
		if _, ok := e.listeners[at]; ok || ip.Is4() && n.anywhere[s.Port] {
			continue
		}
		for n.listening >= maxListeners && n.used.Back() != e.place {
			n.forget(n.used.Back())
		}
		if n.listening >= maxListeners {
			return
		}
		l, err := listenTCP(at.String())
		if err != nil {
			// Somebody in the guest holds the port on all addresses.
			fmt.Fprintf(n.stderr, "%s port %d: %v\n", e.name, s.Port, err)
			continue
		}
		e.listeners[at] = l
		n.listening++
		go n.serve(l)
	}
}

// listenTCP sends no keep-alives: the far end is in the same kernel.
func listenTCP(address string) (net.Listener, error) {
	c := net.ListenConfig{KeepAlive: -1}
	network := "tcp4" // or 0.0.0.0 would be all addresses of both kinds
	if address[0] == '[' {
		network = "tcp6"
	}
	return c.Listen(context.Background(), network, address)
}

// serve accepts until l is closed. A place is taken behind that: there may be as
// many listeners as places.
func (n *names) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(100 * time.Millisecond) // out of descriptors, most likely
			continue
		}
		n.slots <- struct{}{}
		go func() {
			defer func() { <-n.slots }()
			n.handle(c.(*net.TCPConn))
		}()
	}
}

// target tells what a connection to a is meant for.
func (n *names) target(a netip.AddrPort) (target, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ip, port := a.Addr().Unmap(), int(a.Port())
	if e, ok := n.byAddress[ip]; ok {
		n.used.MoveToFront(e.place)
		return target{e.name, port, protocolOf(e.services, port)}, true
	}
	for _, l := range n.literals {
		if p := protocolOf(l.services, port); p != "" && l.prefix.Contains(ip) {
			return target{ip.String(), port, p}, true
		}
	}
	return target{}, false
}

func protocolOf(services []guest.Service, port int) string {
	for _, s := range services {
		if s.Port == port {
			return s.Protocol
		}
	}
	return ""
}

func (n *names) handle(client *net.TCPConn) {
	defer client.Close()
	local, ok := client.LocalAddr().(*net.TCPAddr)
	if !ok {
		return
	}
	t, ok := n.target(local.AddrPort())
	if !ok {
		reset(client)
		return
	}
	up, a, err := n.open(t)
	if err != nil {
		fmt.Fprintf(n.stderr, "%s port %d: %v\n", t.host, t.port, err)
		reset(client)
		return
	}
	defer up.Close()
	if a.status != 200 {
		refuse(client, up, a, t.protocol)
		return
	}
	if len(a.rest) > 0 {
		if _, err := client.Write(a.rest); err != nil {
			return
		}
	}
	splice(client, up)
}

// open asks the gate for a tunnel. A gate that is gone is waited for.
func (n *names) open(t target) (up stream, a answer, err error) {
	for _, pause := range tries {
		time.Sleep(pause)
		var c net.Conn
		if c, err = n.relay.upstream(); err != nil {
			return nil, answer{}, err
		}
		up = c.(stream)
		if a, err = openTunnel(up, t.host, t.port); err == nil {
			return up, a, nil
		}
		up.Close()
		if !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
			break
		}
	}
	return nil, answer{}, err
}

// accessDenied is a TLS alert of that meaning, fatal, before any handshake (RFC
// 8446 section 6.2).
var accessDenied = []byte{21, 3, 3, 0, 2, 2, 49}

// refuse tells the client in its own protocol what can be told in it. The whole
// reason is in the gate's log.
func refuse(client *net.TCPConn, up stream, a answer, protocol string) {
	switch {
	case protocol == "http":
		_, _ = client.Write(append(a.head, a.rest...))
		_ = up.SetReadDeadline(time.Now().Add(askTimeout))
		_, _ = io.CopyN(client, up, int64(min(max(a.length-len(a.rest), 0), maxBody)))
	case protocol == "tls" && a.status < 500:
		_, _ = client.Write(accessDenied)
	default:
		reset(client)
		return
	}
	// Closing with bytes unread would reset the connection and take the answer
	// with it.
	_ = client.CloseWrite()
	_ = client.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	_, _ = io.CopyN(io.Discard, client, 256<<10)
}

// reset ends a connection as a host does on which nobody listens.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	c.Close()
}

// listenLiterals listens for the addresses that the policy opens as such. They
// have been made the guest's own. For the ports of a block there is one listener
// on all addresses, and connections to those outside of it are reset.
func (n *names) listenLiterals(addresses []guest.Address) error {
	n.anywhere = map[int]bool{}
	for _, a := range addresses {
		p, err := netip.ParsePrefix(a.CIDR)
		if err != nil {
			return err
		}
		n.literals = append(n.literals, literal{p, a.Services})
		for _, s := range a.Services {
			if !p.IsSingleIP() {
				n.anywhere[s.Port] = true
			}
		}
	}
	var at []netip.AddrPort
	for port := range n.anywhere {
		at = append(at, netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(port)))
	}
	for _, l := range n.literals {
		for _, s := range l.services {
			if ip := l.prefix.Addr(); l.prefix.IsSingleIP() && !(ip.Is4() && n.anywhere[s.Port]) {
				at = append(at, netip.AddrPortFrom(ip, uint16(s.Port)))
			}
		}
	}
	for _, a := range at {
		l, err := listenTCP(a.String())
		if err != nil {
			return err
		}
		go n.serve(l)
	}
	return nil
}
