//go:build linux

package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// farListener is a server at a distance: what it sends arrives after the time
// away, which is that of the way to it and back. Only the TCP handshake is as
// fast as on one machine, to the advantage of who connects directly.
type farListener struct {
	net.Listener
	away time.Duration
}

func (l *farListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	f := &farConn{Conn: c, away: l.away, sent: make(chan parcel, 64), done: make(chan struct{})}
	go f.carry()
	return f, nil
}

type farConn struct {
	net.Conn
	away time.Duration
	sent chan parcel // a nil one is the end
	done chan struct{}
}

type parcel struct {
	bytes []byte
	due   time.Time
}

func (c *farConn) carry() {
	defer close(c.done)
	for p := range c.sent {
		if p.bytes == nil {
			return
		}
		time.Sleep(time.Until(p.due))
		_, _ = c.Conn.Write(p.bytes)
	}
}

func (c *farConn) Write(p []byte) (int, error) {
	c.sent <- parcel{bytes.Clone(p), time.Now().Add(c.away)}
	return len(p), nil
}

// What is under way has left already: crypto/tls has writes fail at once after
// its last alert.
func (c *farConn) SetWriteDeadline(time.Time) error { return nil }

func (c *farConn) Close() error {
	c.sent <- parcel{}
	<-c.done
	return c.Conn.Close()
}

// startRelay runs serveRelay in a process of its own, as the gate is one.
func (b *bench) startRelay() (sock string, stop func(), err error) {
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	sock = filepath.Join(b.w.dir, "relay")
	cmd := exec.CommandContext(b.w.ctx, self, "-relay", sock)
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGTERM}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	for deadline := time.Now().Add(aLongWait); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", sock)
		if err == nil {
			return sock, stop, c.Close()
		}
		if time.Now().After(deadline) {
			stop()
			return "", nil, fmt.Errorf("the relay did not come up: %w", err)
		}
	}
}

// serveRelay is the least that a proxy does: it connects to whatever a CONNECT
// names, in one read, and copies. No check, no limit, no log, no time limit.
func serveRelay(sock string) error {
	l, err := net.Listen("unix", sock)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go relayOne(c)
	}
}

func relayOne(c net.Conn) {
	defer c.Close()
	buf := make([]byte, 16<<10)
	n, _ := c.Read(buf)
	head := strings.Fields(string(buf[:n]))
	if len(head) < 2 {
		return
	}
	up, err := net.Dial("tcp", head[1])
	if err != nil {
		return
	}
	defer up.Close()
	if _, err := c.Write([]byte("HTTP/1.1 200 OK\r\n\r\n")); err != nil {
		return
	}
	go func() {
		copyPlain(up, c, buf)
		_ = up.(*net.TCPConn).CloseWrite()
	}()
	copyPlain(c, up, make([]byte, 16<<10))
}

func copyPlain(dst, src net.Conn, buf []byte) {
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
