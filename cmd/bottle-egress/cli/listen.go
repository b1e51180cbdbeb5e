package cli

import (
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

// maxSocketPath is what fits into sockaddr_un on every system.
const maxSocketPath = 103

// address is where a gate in the foreground listens.
type address struct {
	path string // of a unix socket, absolute
	tcp  netip.AddrPort
}

func parseListen(s string) (address, error) {
	bad := func(format string, args ...any) (address, error) {
		return address{}, fault.New(fault.Usage, "usage", format, args...).
			WithHint("--listen unix:PATH, or --listen tcp:127.0.0.1:PORT")
	}
	scheme, rest, _ := strings.Cut(s, ":")
	switch {
	case s == "":
		return bad("--listen is missing")
	case scheme == "unix" && rest != "":
		abs, err := filepath.Abs(rest)
		if err != nil {
			return bad("--listen %s: %w", s, err)
		}
		if len(abs) > maxSocketPath {
			return bad("--listen: %s is longer than the %d characters that a socket may have", abs, maxSocketPath)
		}
		return address{path: abs}, nil
	case scheme == "tcp":
		a, err := netip.ParseAddrPort(rest)
		switch {
		case err != nil:
			return bad("--listen %s: %q is no address and port", s, rest)
		case !a.Addr().IsLoopback():
			return bad("--listen %s: a gate holds secrets and serves loopback only", s)
		}
		return address{tcp: a}, nil
	}
	return bad("--listen %s is neither unix:PATH nor tcp:ADDRESS:PORT", s)
}

func (a address) listen() (net.Listener, error) {
	if a.path == "" {
		l, err := net.Listen("tcp", a.tcp.String())
		if err != nil {
			return nil, cannotListen(err)
		}
		return l, nil
	}
	if err := a.clear(); err != nil {
		return nil, err
	}
	// Between bind and chmod anybody could connect.
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", a.path)
	syscall.Umask(old)
	if err != nil {
		return nil, cannotListen(err)
	}
	return l, nil
}

func cannotListen(err error) error {
	return fault.New(fault.CantCreate, "cannot_listen", "%w", err).WithHint("choose another --listen")
}

// clear removes a socket on which nobody listens any more.
func (a address) clear() error {
	fi, err := os.Lstat(a.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return cannotListen(err)
	case fi.Mode().Type() != fs.ModeSocket:
		return fault.New(fault.CantCreate, "cannot_listen", "%s exists and is no socket", a.path).WithHint("choose another --listen")
	}
	c, err := net.DialTimeout("unix", a.path, time.Second)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fault.New(fault.CantCreate, "cannot_listen", "%s is in use", a.path).WithHint("choose another --listen, or end the process that listens there")
	}
	if err := os.Remove(a.path); err != nil {
		return cannotListen(err)
	}
	return nil
}

// name is the address as a user would type it.
func (a address) name(l net.Listener) string {
	if a.path != "" {
		return "unix:" + a.path
	}
	return "tcp:" + l.Addr().String()
}
