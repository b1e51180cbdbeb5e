package keeper

import (
	"bufio"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// While there is no gate every connection is told so, whatever it sends, and
// none is kept.
func TestGateDown(t *testing.T) {
	g := &gateKeeper{k: &keeper{}, queue: make(chan *os.File, pending), quit: make(chan struct{})}
	go g.forward()
	defer close(g.quit)
	// Those that were told are let go by and by; more than so many at one time
	// are closed.
	until := func(most int) {
		t.Helper()
		for began := time.Now(); len(telling) > most; time.Sleep(time.Millisecond) {
			if time.Since(began) > time.Minute {
				t.Fatalf("%d connections are kept", len(telling))
			}
		}
	}
	for i := range 3 * cap(telling) {
		until(cap(telling) - 1)
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		mine := os.NewFile(uintptr(fds[0]), "guest")
		if err := g.take(os.NewFile(uintptr(fds[1]), "gate")); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			io.WriteString(mine, "CONNECT api.example.com:443 HTTP/1.1\r\nHost: api.example.com:443\r\n\r\n\x16\x03\x01")
		}
		resp, err := http.ReadResponse(bufio.NewReader(mine), nil)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		var body struct{ Error struct{ Code, Hint string } }
		raw, err := io.ReadAll(resp.Body)
		if err != nil || json.Unmarshal(raw, &body) != nil || resp.StatusCode != 503 || body.Error.Code != "gate_down" || body.Error.Hint == "" ||
			resp.Header.Get("X-Bottle-Decision") != "error" || resp.Header.Get("Retry-After") != "1" {
			t.Fatalf("%s %v %s %v", resp.Status, resp.Header, raw, err)
		}
		mine.Close()
	}
	until(0)
}
