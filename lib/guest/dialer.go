package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/bottle-tools/bottle/lib/fdpass"
)

// Dialer is the guest's end of the protocol. Dial may be called concurrently.
type Dialer struct {
	conn *fdpass.Conn

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan answer
	dead    error
	gone    chan struct{}
}

type answer struct {
	conn net.Conn
	err  error
}

// NewDialer takes over f, the guest's end of the Broker's socket.
func NewDialer(f *os.File) (*Dialer, error) {
	conn, err := fdpass.New(f)
	if err != nil {
		return nil, err
	}
	d := &Dialer{conn: conn, waiting: map[uint64]chan answer{}, gone: make(chan struct{})}
	go d.receive()
	return d, nil
}

// Gone is closed when the host's end is: its keeper has died or has ended the
// bottle.
func (d *Dialer) Gone() <-chan struct{} { return d.gone }

// Ready tells the host that the set-up is done.
func (d *Dialer) Ready() error { return d.conn.Send(packet{Kind: kindReady}.encode(), nil) }

// Failed tells the host why the set-up failed.
func (d *Dialer) Failed(err error) error {
	return d.conn.Send(packet{Kind: kindFailed, Text: err.Error()}.encode(), nil)
}

// Dial asks for a connection to service.
func (d *Dialer) Dial(ctx context.Context, service string) (net.Conn, error) {
	ch := make(chan answer, 1)
	d.mu.Lock()
	if d.dead != nil {
		d.mu.Unlock()
		return nil, d.dead
	}
	d.next++
	id := d.next
	d.waiting[id] = ch
	d.mu.Unlock()
	if err := d.conn.Send(packet{Kind: kindDial, ID: id, Service: service}.encode(), nil); err != nil {
		d.forget(id)
		return nil, err
	}
	select {
	case a := <-ch:
		return a.conn, a.err
	case <-ctx.Done():
		if !d.forget(id) { // the answer is there already
			if a := <-ch; a.conn != nil {
				a.conn.Close()
			}
		}
		return nil, ctx.Err()
	}
}

// forget gives up on an answer; false means that it was delivered already.
func (d *Dialer) forget(id uint64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, ok := d.waiting[id]
	delete(d.waiting, id)
	return ok
}

func (d *Dialer) receive() {
	for {
		msg, f, err := d.conn.Recv()
		if errors.Is(err, fdpass.ErrMessage) {
			continue
		}
		if err != nil {
			d.fail(fmt.Errorf("the host is gone: %w", err))
			close(d.gone)
			return
		}
		a := answer{}
		p, err := decode(msg)
		switch {
		case err != nil:
		case p.Kind == kindConn && f != nil:
			a.conn, a.err = net.FileConn(f)
		case p.Kind == kindRefused:
			a.err = fmt.Errorf("refused by the host: %s", p.Text)
		default:
			err = errors.New("not an answer")
		}
		if f != nil {
			f.Close()
		}
		if err == nil {
			d.deliver(p.ID, a)
		}
	}
}

func (d *Dialer) deliver(id uint64, a answer) {
	d.mu.Lock()
	ch, ok := d.waiting[id]
	delete(d.waiting, id)
	if ok {
		ch <- a // buffered, and nobody else has this id
	}
	d.mu.Unlock()
	if !ok && a.conn != nil {
		a.conn.Close()
	}
}

func (d *Dialer) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = err
	for id, ch := range d.waiting {
		delete(d.waiting, id)
		ch <- answer{err: err}
	}
}

// Close ends the dialer; connections it made live on.
func (d *Dialer) Close() error { return d.conn.Close() }
