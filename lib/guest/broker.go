package guest

import (
	"errors"
	"io"
	"net"
	"os"

	"github.com/bottle-tools/bottle/lib/fdpass"
)

// streamBuffer is for what a guest sends over one connection, in bytes.
const streamBuffer = 512 << 10

// Broker is the host's end of the protocol; the keeper runs one per bottle.
//
// Requests are served one after the other, so there is never more than one in
// flight: a guest that asks faster waits in its own socket's queue.
type Broker struct {
	Conn *fdpass.Conn
	// Services has one taker for each name the guest may ask for. A taker owns
	// the host's end of the connection from then on, closes it on an error, and
	// must not block: nobody else is served meanwhile.
	Services map[string]func(*os.File) error
	// Ready is called once, when the guest's set-up is done.
	Ready func()
	// Failed is called at most once, with a printable line (up to 1 KiB) from
	// the guest, when the set-up failed.
	Failed func(reason string)

	settled bool // ready or failed was seen
}

// Serve answers until the guest is gone (nil) or Conn is closed (nil).
func (b *Broker) Serve() error {
	for {
		msg, err := b.Conn.RecvOnly()
		switch {
		case errors.Is(err, fdpass.ErrMessage):
			continue
		case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			return err
		}
		p, err := decode(msg)
		if err != nil {
			continue // nothing in it could be answered
		}
		if err := b.handle(p); err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
	}
}

func (b *Broker) handle(p packet) error {
	switch p.Kind {
	case kindReady:
		if !b.settled && b.Ready != nil {
			b.Ready()
		}
		b.settled = true
	case kindFailed:
		if !b.settled && b.Failed != nil {
			b.Failed(printable(p.Text))
		}
		b.settled = true
	case kindDial:
		return b.dial(p)
	}
	return nil // a kind of a later version: not for us
}

// dial gives the guest its end first: a taker that fails closes the host's
// end, and the guest sees the end of the stream.
func (b *Broker) dial(p packet) error {
	take, ok := b.Services[p.Service]
	if !ok {
		return b.refuse(p.ID, "no such service")
	}
	host, far, err := fdpass.Stream()
	if err != nil {
		return b.refuse(p.ID, "the host is out of descriptors")
	}
	// The guest's kernel reads and writes as much at once as this says when it gets
	// the descriptor. What the guest leaves in it is its own memory.
	fdpass.SetSendBuffer(far, streamBuffer)
	err = b.Conn.Send(packet{Kind: kindConn, ID: p.ID}.encode(), far)
	far.Close()
	if err != nil {
		host.Close()
		return b.gone(err)
	}
	// The taker reports its own failures; to the guest the stream just ends.
	_ = take(host)
	return nil
}

func (b *Broker) refuse(id uint64, why string) error {
	return b.gone(b.Conn.Send(packet{Kind: kindRefused, ID: id, Text: why}.encode(), nil))
}

// gone lets a guest that ended between request and answer show up as the end
// of file that Serve reads next.
func (b *Broker) gone(err error) error {
	if err == nil || errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
