package gate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
)

// maxAddresses bounds the addresses of one name that are tried.
const maxAddresses = 16

// localAddrs are the host's own addresses, read anew every second: interfaces
// come and go, and a netlink dump for every connection would be slow.
type localAddrs struct {
	read func() ([]netip.Addr, error)
	mu   sync.Mutex
	at   time.Time
	list []netip.Addr
}

func (l *localAddrs) get() ([]netip.Addr, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.at) < time.Second && l.list != nil {
		return l.list, nil
	}
	list, err := l.read()
	if err != nil {
		return nil, err
	}
	l.list, l.at = list, time.Now()
	return list, nil
}

// reach connects to a host that rule allows. address is the IP:port that was
// dialled, "" through the upstream proxy. Errors are *Refusal.
func (g *Gate) reach(ctx context.Context, host string, port int, rule *plan.Rule) (c net.Conn, address string, err error) {
	if g.leavesByProxy(rule) {
		c, err = g.throughProxy(ctx, host, port)
		return c, "", err
	}
	ips, err := g.addresses(ctx, host, port, rule)
	if err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, g.limits.dial)
	defer cancel()
	c, err = g.dialAny(ctx, ips, port)
	switch {
	case err == nil:
		return c, c.RemoteAddr().String(), nil
	case isTimeout(err):
		return nil, "", timedOut(host, port, fmt.Sprintf("%s does not answer on port %d", host, port))
	}
	return nil, "", failed("upstream_unreachable", host, port, "connecting failed: "+errText(err))
}

// leavesByProxy tells which way a rule takes. What the upstream proxy cannot
// hold exactly as written leaves from the gate, which checks it itself.
func (g *Gate) leavesByProxy(rule *plan.Rule) bool {
	return g.cfg.Upstream != "" && pipelock.Carries(*rule)
}

// addresses gives where host may be dialled, each one checked. One bad address
// refuses all: an answer that mixes public and private ones is not honest.
func (g *Gate) addresses(ctx context.Context, host string, port int, rule *plan.Rule) ([]netip.Addr, error) {
	ips, err := g.lookup(ctx, host, port, rule)
	if err != nil {
		return nil, err
	}
	own, err := g.local.get()
	if err != nil {
		return nil, failed("interfaces_unknown", host, port, "the host's own addresses cannot be read: "+errText(err))
	}
	for i, ip := range ips {
		ips[i] = ip.WithZone("").Unmap()
		if err := g.rules().CheckAddr(rule, ips[i], port, own); err != nil {
			f := fault.As(err)
			return nil, refused("address_not_allowed", host, port, host+": "+f.Msg, f.Hint)
		}
	}
	return ips[:min(len(ips), maxAddresses)], nil
}

func (g *Gate) lookup(ctx context.Context, host string, port int, rule *plan.Rule) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{ip}, nil
	}
	if len(rule.Addresses) > 0 {
		return pinned(rule)
	}
	ctx, cancel := context.WithTimeout(ctx, g.limits.resolve)
	defer cancel()
	// With its final dot the name is never tried below a search domain.
	ips, err := g.cfg.Resolver.LookupNetIP(ctx, "ip", host+".")
	var dns *net.DNSError
	switch {
	case err == nil && len(ips) > 0:
		return ips, nil
	case err == nil || errors.As(err, &dns) && dns.IsNotFound:
		return nil, refused("upstream_unresolvable", host, port, host+" has no address",
			"check the spelling; a host that only this machine knows needs \"addresses\" in its entry")
	case isTimeout(err):
		return nil, timedOut(host, port, "the name server does not answer for "+host)
	}
	return nil, failed("upstream_dns_failed", host, port, "the name server failed for "+host)
}

func pinned(rule *plan.Rule) ([]netip.Addr, error) {
	ips := make([]netip.Addr, 0, len(rule.Addresses))
	for _, a := range rule.Addresses {
		ip, err := netip.ParseAddr(a)
		if err != nil {
			return nil, err
		}
		ips = append(ips, ip)
	}
	return ips, nil
}

// nextAfter is how long one address may take before the next one is tried
// beside it, RFC 8305 section 5.
const nextAfter = 250 * time.Millisecond

// dialAny dials the addresses in order, each a little after the one before, and
// takes the first connection that comes about.
func (g *Gate) dialAny(ctx context.Context, ips []netip.Addr, port int) (net.Conn, error) {
	dial := func(ip netip.Addr) (net.Conn, error) {
		return g.cfg.Dial(ctx, "tcp", netip.AddrPortFrom(ip, uint16(port)).String())
	}
	if len(ips) == 1 {
		return dial(ips[0])
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result)
	launched, pending := 0, 0
	launch := func() {
		ip := ips[launched]
		launched++
		pending++
		go func() {
			c, err := dial(ip)
			select {
			case results <- result{c, err}:
			case <-ctx.Done():
				if c != nil {
					c.Close()
				}
			}
		}()
	}
	var first error
	launch()
	for {
		timer := time.NewTimer(nextAfter)
		if launched == len(ips) {
			timer.Stop()
		}
		select {
		case r := <-results:
			timer.Stop()
			pending--
			if r.err == nil {
				return r.conn, nil
			}
			if first == nil {
				first = r.err
			}
			if launched < len(ips) {
				launch()
			} else if pending == 0 {
				return nil, first
			}
		case <-timer.C:
			launch()
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		}
	}
}

// throughProxy asks the upstream proxy for a tunnel.
func (g *Gate) throughProxy(ctx context.Context, host string, port int) (net.Conn, error) {
	c, err := g.dialProxy(ctx, "tcp", g.cfg.Upstream)
	if err != nil {
		var f *Refusal
		if errors.As(err, &f) {
			f.Host, f.Port = host, port
		}
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(g.limits.dial))
	f := askProxy(c, host, port)
	_ = c.SetDeadline(time.Time{})
	if !stop() || f != nil {
		c.Close()
		if f == nil {
			return nil, ctx.Err()
		}
		return nil, f
	}
	return c, nil
}

func askProxy(c net.Conn, host string, port int) *Refusal {
	target := net.JoinHostPort(host, strconv.Itoa(port))
	if _, err := io.WriteString(c, "CONNECT "+target+" HTTP/1.1\r\nHost: "+target+"\r\n\r\n"); err != nil {
		return proxyDown(host, port)
	}
	br := bufio.NewReaderSize(c, 4<<10)
	resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return proxyDown(host, port)
	}
	if resp.StatusCode != http.StatusOK {
		return proxyRefusal(resp, host, port)
	}
	if br.Buffered() > 0 {
		return failed("proxy_failed", host, port, "the proxy sent bytes before the host could")
	}
	return nil
}

// dialProxy connects to the upstream proxy itself.
func (g *Gate) dialProxy(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := g.cfg.Dial(ctx, network, address)
	if err != nil {
		return nil, proxyDown("", 0)
	}
	return c, nil
}

// proxyDown is no decision: the proxy is restarted, and there is no other way.
func proxyDown(host string, port int) *Refusal {
	return &Refusal{Status: http.StatusServiceUnavailable, Code: "proxy_down", Host: host, Port: port, Retry: 1,
		Reason: "the egress proxy is not running; meanwhile nothing leaves the bottle", Hint: "try again in a second"}
}

// proxyRefusal turns an answer of the upstream proxy itself into ours.
func proxyRefusal(resp *http.Response, host string, port int) *Refusal {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	resp.Body.Close()
	reason := "the egress proxy refused it: " + strings.TrimSpace(fault.Line(string(text)))
	switch {
	case resp.StatusCode == http.StatusServiceUnavailable:
		f := proxyDown(host, port)
		f.Code, f.Reason = "proxy_closed", reason
		return f
	case resp.StatusCode == http.StatusTooManyRequests:
		f := refused("proxy_refused", host, port, reason, "send fewer requests")
		f.Status = resp.StatusCode
		return f
	case resp.StatusCode >= 500:
		return failed("upstream_unreachable", host, port, reason)
	}
	return refused("proxy_refused", host, port, reason, "pipelock refused it; bottle-vm logs has its own words")
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &t) && t.Timeout()
}

// errText is an error without the addresses that net puts in front.
func errText(err error) string {
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		return op.Err.Error()
	}
	return err.Error()
}

// asRefusal makes an answer of whatever went wrong.
func asRefusal(err error, host string, port int) *Refusal {
	var f *Refusal
	if errors.As(err, &f) {
		c := *f
		if c.Host == "" {
			c.Host, c.Port = host, port
		}
		return &c
	}
	if isTimeout(err) {
		return timedOut(host, port, "the host did not answer in time")
	}
	return failed("upstream_failed", host, port, errText(err))
}
