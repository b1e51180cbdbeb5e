package probe

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

const (
	tryLimit  = 4 * time.Second // of one connection
	taskLimit = 20 * time.Second
)

// inside is the client: what runs in the sandbox.
type inside struct {
	spec
	out  *bufio.Writer
	mu   sync.Mutex
	ways []way
}

// way is how a connection is asked for: through a proxy that the environment
// names, or by itself.
type way struct {
	name  string
	proxy string // host:port of an HTTP proxy, "" for none
	socks string // host:port of a SOCKS5 proxy
}

// client runs the probes of its one argument.
func client(args []string, stdout io.Writer) error {
	if len(args) != 1 {
		return fault.New(fault.Usage, "usage", "client takes one argument, which bottle-probe run gives it").WithHint("see bottle-probe --help")
	}
	raw, err := base64.RawURLEncoding.DecodeString(args[0])
	c := &inside{out: bufio.NewWriter(stdout)}
	if err == nil {
		err = json.Unmarshal(raw, &c.spec)
	}
	if err != nil {
		return fault.New(fault.Usage, "usage", "client: the argument is not what bottle-probe run made: %w", err)
	}
	c.ways = findWays(os.Getenv)
	if len(c.ways) > 1 {
		c.say(word{Proxied: true})
	}
	_ = os.MkdirAll(c.Workspace, 0o755)
	var one []task
	var wg sync.WaitGroup
	slots := make(chan struct{}, 6)
	for _, t := range c.Probes {
		p := find(t.ID)
		if p == nil || p.try == nil {
			continue
		}
		if p.alone() {
			one = append(one, t)
			continue
		}
		wg.Add(1)
		slots <- struct{}{}
		go func() {
			defer func() { <-slots; wg.Done() }()
			c.run(p, t.Token)
		}()
	}
	wg.Wait()
	slices.SortStableFunc(one, func(a, b task) int { return cmp.Compare(order(a), order(b)) })
	for _, t := range one {
		c.run(find(t.ID), t.Token)
	}
	return nil
}

func order(t task) int {
	if find(t.ID).last {
		return 1
	}
	return 0
}

// run tries one probe, and not for ever: what it waits for may never come.
func (c *inside) run(p *probe, token string) {
	c.say(word{Start: p.ID})
	if p.dns != "" {
		c.waitFor(token)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if r := recover(); r != nil {
				c.say(word{Note: fmt.Sprintf("%s: %v", p.ID, r)})
			}
		}()
		p.try(c, token)
	}()
	select {
	case <-done:
	case <-time.After(taskLimit):
	}
	c.say(word{End: p.ID})
	if p.dns != "" {
		time.Sleep(100 * time.Millisecond)
	}
}

// goFile appears in the workspace when the laboratory has made names resolve as
// a probe wants it. A sandbox that shows a copy has to do with the time alone.
func goFile(token string) string { return ".bottle-probe-go-" + token }

func (c *inside) waitFor(token string) {
	for until := time.Now().Add(1500 * time.Millisecond); time.Now().Before(until); time.Sleep(25 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(c.Workspace, goFile(token))); err == nil {
			return
		}
	}
}

func (c *inside) say(w word) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := json.Marshal(w)
	if err != nil {
		return
	}
	_, _ = c.out.Write(append(b, '\n'))
	_ = c.out.Flush()
}

// found gives secrets back that are in text.
func (c *inside) found(text []byte) {
	if all := secretsIn(text); len(all) > 0 {
		c.say(word{Found: all})
	}
}

func findWays(getenv func(string) string) []way {
	ways := []way{{name: "direct"}}
	seen := map[string]bool{}
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"} {
		v := getenv(name)
		if v == "" {
			continue
		}
		if !strings.Contains(v, "://") {
			v = "http://" + v
		}
		u, err := url.Parse(v)
		if err != nil || u.Host == "" || seen[v] {
			continue
		}
		seen[v] = true
		switch {
		case strings.HasPrefix(u.Scheme, "socks"):
			ways = append(ways, way{name: "socks", socks: u.Host})
		default:
			ways = append(ways, way{name: "proxy", proxy: proxyAddress(u)})
		}
	}
	return ways
}

func proxyAddress(u *url.URL) string {
	if u.Port() != "" {
		return u.Host
	}
	return net.JoinHostPort(u.Hostname(), "80")
}

// auth is the Proxy-Authorization of the environment, which some sandboxes use
// to tell their own clients.
func auth() string {
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} {
		if u, err := url.Parse(os.Getenv(name)); err == nil && u.User != nil {
			pw, _ := u.User.Password()
			return "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(u.User.Username()+":"+pw)) + "\r\n"
		}
	}
	return ""
}

// each tries f on every way, each with a connection to host and port.
func (c *inside) each(host string, port int, f func(nc net.Conn)) {
	for _, w := range c.ways {
		nc, err := w.dial(host, port)
		if err != nil {
			continue
		}
		_ = nc.SetDeadline(time.Now().Add(tryLimit))
		f(nc)
		nc.Close()
	}
}

// eachProxy is each without the way that uses no proxy.
func (c *inside) eachProxy(f func(nc net.Conn)) {
	for _, w := range c.ways {
		if w.proxy == "" {
			continue
		}
		nc, err := net.DialTimeout("tcp", w.proxy, tryLimit)
		if err != nil {
			continue
		}
		_ = nc.SetDeadline(time.Now().Add(tryLimit))
		f(nc)
		nc.Close()
	}
}

// dial connects to host, which may have any form, and port.
func (w way) dial(host string, port int) (net.Conn, error) {
	switch {
	case w.socks != "":
		return socks(w.socks, host, port)
	case w.proxy != "":
		return connect(w.proxy, host, port)
	}
	d := net.Dialer{Timeout: tryLimit}
	return d.Dial("tcp", net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(port)))
}

func bracketed(host string) string {
	if strings.Contains(host, ":") && !strings.HasPrefix(host, "[") {
		return "[" + host + "]"
	}
	return host
}

// connect asks an HTTP proxy for a tunnel. A refusal is an error.
func connect(proxy, host string, port int) (net.Conn, error) {
	nc, err := net.DialTimeout("tcp", proxy, tryLimit)
	if err != nil {
		return nil, err
	}
	_ = nc.SetDeadline(time.Now().Add(tryLimit))
	target := bracketed(host) + ":" + strconv.Itoa(port)
	fmt.Fprintf(nc, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", target, target, auth())
	br := bufio.NewReader(nc)
	resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
	if err == nil && resp.StatusCode/100 != 2 {
		err = errors.New(resp.Status)
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &buffered{nc, br}, nil
}

type buffered struct {
	net.Conn
	r *bufio.Reader
}

func (b *buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

func socks(proxy, host string, port int) (net.Conn, error) {
	nc, err := net.DialTimeout("tcp", proxy, tryLimit)
	if err != nil {
		return nil, err
	}
	_ = nc.SetDeadline(time.Now().Add(tryLimit))
	msg := []byte{5, 1, 0, 5, 1, 0, 3, byte(len(host))}
	msg = append(append(msg, host...), byte(port>>8), byte(port))
	if ip, err := netip.ParseAddr(host); err == nil && ip.Is4() {
		msg = append(append([]byte{5, 1, 0, 5, 1, 0, 1}, ip.AsSlice()...), byte(port>>8), byte(port))
	}
	_, _ = nc.Write(msg[:3])
	var hello [2]byte
	if _, err := io.ReadFull(nc, hello[:]); err == nil {
		_, err = nc.Write(msg[3:])
		if err == nil {
			var answer [10]byte
			if _, err = io.ReadFull(nc, answer[:]); err == nil && answer[1] == 0 {
				return nc, nil
			}
		}
	}
	nc.Close()
	return nil, errors.New("socks refused")
}

// get is one request for a path, which carries the token.
func get(host, path string, extra ...string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: bottle-probe\r\nAccept: */*\r\n" + strings.Join(extra, "") + "\r\n"
}

// exchange writes each text and reads what comes, up to the time limit.
func exchange(nc net.Conn, texts ...string) string {
	var got bytes.Buffer
	buf := make([]byte, 8<<10)
	for _, text := range texts {
		if _, err := io.WriteString(nc, text); err != nil {
			break
		}
		_ = nc.SetReadDeadline(time.Now().Add(1500 * time.Millisecond))
		n, err := nc.Read(buf)
		got.Write(buf[:n])
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	return got.String()
}

// inTLS does a handshake with host over each way, and gives what is inside to f.
// The certificate is not looked at: who answers is for the servers to say.
func (c *inside) inTLS(host string, port int, conf *tls.Config, f func(tc *tls.Conn)) {
	c.each(host, port, func(nc net.Conn) { handshake(nc, conf, f) })
}

func handshake(nc net.Conn, conf *tls.Config, f func(tc *tls.Conn)) {
	conf = conf.Clone()
	conf.InsecureSkipVerify = true
	tc := tls.Client(nc, conf)
	ctx, cancel := context.WithTimeout(context.Background(), tryLimit)
	defer cancel()
	if tc.HandshakeContext(ctx) == nil {
		f(tc)
	}
}

// overTLS asks the allowed host, with TLS as it should be.
func (c *inside) overTLS(texts ...string) {
	c.inTLS(c.Allow, 443, &tls.Config{ServerName: c.Allow, NextProtos: []string{"http/1.1"}}, func(tc *tls.Conn) { exchange(tc, texts...) })
}

// overHTTP asks the host that is allowed in the clear: a proxy for the absolute
// form, and inside a tunnel or directly for the path. make gets the target's
// prefix: "http://host" or "".
func (c *inside) overHTTP(make func(prefix string) []string) {
	if c.AllowHTTP == "" {
		return
	}
	c.eachProxy(func(nc net.Conn) { exchange(nc, make("http://"+c.AllowHTTP)...) })
	c.each(c.AllowHTTP, 80, func(nc net.Conn) { exchange(nc, make("")...) })
}

// both sends what make gives to the allowed hosts: in the clear and under TLS.
func (c *inside) both(make func(host, prefix string) []string) {
	c.overHTTP(func(prefix string) []string { return make(c.AllowHTTP, prefix) })
	c.overTLS(make(c.Allow, "")...)
}

// send is a plain connection to an address with the token as the first thing.
func send(network, address, token string) {
	nc, err := net.DialTimeout(network, address, tryLimit)
	if err != nil {
		return
	}
	defer nc.Close()
	_ = nc.SetDeadline(time.Now().Add(tryLimit))
	exchange(nc, get(token+".direct", "/"+token))
}

// splitting cuts the first TLS record that is written into records of n bytes.
type splitting struct {
	net.Conn
	n    int
	done bool
}

func (s *splitting) Write(p []byte) (int, error) {
	if s.done || len(p) < 6 || p[0] != 0x16 {
		return s.Conn.Write(p)
	}
	s.done = true
	var out []byte
	for rest := p[5:]; len(rest) > 0; {
		n := min(s.n, len(rest))
		out = append(out, p[0], p[1], p[2], byte(n>>8), byte(n))
		out = append(out, rest[:n]...)
		rest = rest[n:]
	}
	if _, err := s.Conn.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

func port(p int) string { return strconv.Itoa(p) }
