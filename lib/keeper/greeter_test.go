package keeper

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"path/filepath"
	"slices"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest"
)

func first(c net.Conn, _ bool) net.Conn { return c }

func TestGreeter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g := newGreeter()
	dial := func() (net.Conn, bool) {
		t.Helper()
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		theirs, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		taken := g.greet(theirs)
		if !taken {
			theirs.Close()
		}
		return c, taken
	}
	for range 3 {
		c, taken := dial()
		b := make([]byte, len(guest.Greeting))
		if _, err := io.ReadFull(c, b); err != nil || !taken || string(b) != guest.Greeting {
			t.Errorf("%q, %v, %v", b, taken, err)
		}
	}
	for _, says := range []guest.Report{{Failed: "no"}, {Inodes: []uint64{7, 1 << 63}}} {
		c, _ := dial()
		if err := json.NewEncoder(c).Encode(says); err != nil {
			t.Fatal(err)
		}
		// It closes when it has read.
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Fatal(err)
		}
	}
	if got := <-g.reports; got.Failed != "" || !slices.Equal(got.Inodes, []uint64{7, 1 << 63}) {
		t.Errorf("the last report: %+v", got)
	}
	// What was begun before another boot does not count, told or not.
	for late, c := range map[bool]net.Conn{true: first(dial()), false: first(dial())} {
		say := func() {
			if err := json.NewEncoder(c).Encode(guest.Report{}); err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, c)
		}
		if !late {
			say()
		}
		g.forget()
		if late {
			say()
		}
		select {
		case got := <-g.reports:
			t.Errorf("a report of another boot (late: %v): %+v", late, got)
		default:
		}
	}
	c, _ := dial()
	_, _ = c.Write(append(bytes.Repeat([]byte("x"), 1<<17), '\n'))
	_, _ = io.Copy(io.Discard, c)
	select {
	case got := <-g.reports:
		t.Errorf("a report of nonsense: %+v", got)
	default:
	}
	for range 2 * greetLimit { // nobody hears these
		if _, taken := dial(); !taken {
			t.Error("not taken")
		}
	}
	if g.busy > greetLimit {
		t.Errorf("%d at one time", g.busy)
	}
	if err := g.over(); err != nil {
		t.Error(err)
	}
	if _, taken := dial(); taken {
		t.Error("greeted after the start")
	}
}

func TestGreeterWithoutGuest(t *testing.T) {
	if err := (*greeter)(nil).over(); err != nil {
		t.Errorf("no socket: %v", err)
	}
	err := (&greeter{}).over()
	if f := fault.As(err); err == nil || f.Exit != fault.Unavailable || f.Code != "gate_socket_missing" || f.Hint == "" {
		t.Errorf("nobody came: %#v", err)
	}
	// One that goes away before it can be told anything did not hear it.
	us, them := net.Pipe()
	them.Close()
	g := &greeter{}
	if !g.greet(us) || g.over() == nil {
		t.Error("a connection that was cut counts")
	}
}
