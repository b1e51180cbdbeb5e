package smolvmcalls

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// HostPort is where the recorder listens on the host's loopback while guests are
// asked what they reach.
const HostPort = "18001"

const answer = "from the host\n"

// serve answers on a unix socket and on a loopback port of the host.
func serve(socket string) (stop func(), err error) {
	if err := os.RemoveAll(socket); err != nil {
		return nil, err
	}
	u, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	t, err := net.Listen("tcp", "127.0.0.1:"+HostPort)
	if err != nil {
		return nil, errors.Join(err, u.Close())
	}
	for _, l := range []net.Listener{u, t} {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, answer)
				c.Close()
			}
		}()
	}
	return func() { u.Close(); t.Close() }, nil
}

// Dial is what the recorder does in a guest: it says of each "unix=PATH" and
// "tcp=HOST:PORT" whether the host answers there.
func Dial(out io.Writer, targets []string) {
	for _, target := range targets {
		network, address, _ := strings.Cut(target, "=")
		fmt.Fprintf(out, "%s: %s\n", target, dial(network, address))
	}
}

func dial(network, address string) string {
	c, err := net.DialTimeout(network, address, 5*time.Second)
	if err != nil {
		return "no connection"
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	b, _ := io.ReadAll(io.LimitReader(c, 100))
	if string(b) == answer {
		return "the host answers"
	}
	return "no answer"
}
