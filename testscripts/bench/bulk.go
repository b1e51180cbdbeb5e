//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// bulkSize is what is moved in one round, in bytes.
const bulkSize = 512 << 20

// bulk moves a large body into a bottle and out of it, through the guest's
// kernel, its helper and the gate, beside the same two programs with nothing in
// between. The program in the bottle is this one, which asks for nothing but an
// address: names lead to the gate.
func (b *bench) bulk() error {
	server, err := newBulkServer()
	if err != nil {
		return err
	}
	defer server.close()
	id, err := b.bulkBottle(server)
	if err != nil {
		return err
	}
	defer func() { _ = b.w.run("bottle-vm", "down", id) }()
	for _, r := range []struct{ name, way string }{
		{"bulk into a bottle, tcp rule", "get raw.test:" + server.raw},
		{"bulk out of a bottle, tcp rule", "put raw.test:" + server.raw},
		{"bulk into a bottle, http rule", "http web.test:" + server.web},
	} {
		how, address, _ := strings.Cut(r.way, " ")
		_, port, _ := net.SplitHostPort(address)
		var ours, beside []float64
		for round := range b.rounds + 1 {
			out, err := b.w.output("bottle-vm", "exec", id, "--", "/workspace/bench", "-bulk", how, address)
			if err != nil {
				return err
			}
			through, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
			if err != nil {
				return err
			}
			direct, err := moveBulk(how, net.JoinHostPort(loopback, port))
			if err != nil {
				return err
			}
			if round > 0 {
				ours, beside = append(ours, through), append(beside, direct)
			}
		}
		b.emit(newRow(r.name, "MB/s", ours, "direct", beside, medianAtLeast(">= 400 MB/s", 400)))
	}
	return nil
}

// bulkBottle starts a bottle that may reach the server, with this program in its
// workspace.
func (b *bench) bulkBottle(s *bulkServer) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	project := filepath.Join(b.w.dir, "bulk")
	if err := os.Mkdir(project, 0o700); err != nil {
		return "", err
	}
	program, err := os.ReadFile(self)
	if err != nil {
		return "", err
	}
	rule := func(host, port, protocol string) map[string]any {
		n, _ := strconv.Atoi(port)
		return map[string]any{"host": host, "ports": []int{n}, "protocol": protocol, "addresses": []string{loopback}}
	}
	manifest, err := json.Marshal(map[string]any{"format_version": "1.0",
		"bottles": map[string]any{"bulk": map[string]any{"runtime": "gvisor", "egress": map[string]any{"proxy": "builtin",
			"allow": []any{rule("raw.test", s.raw, "tcp"), rule("web.test", s.web, "http")}}}},
		"agents": map[string]any{"bulk": map[string]any{"bottle": "bulk", "command": []string{"true"}}}})
	if err != nil {
		return "", err
	}
	if err := errors.Join(os.WriteFile(filepath.Join(project, "bench"), program, 0o700),
		os.WriteFile(filepath.Join(project, "bottle.json"), manifest, 0o600)); err != nil {
		return "", err
	}
	other := *b.w
	other.project = project
	var id strings.Builder
	plan, vm := other.command("bottle-plan", "bulk"), other.command("bottle-vm", "up", "--print-id")
	vm.Stdout = &id
	err = other.pipeline(plan, vm)
	return strings.TrimSpace(id.String()), err
}

// bulkServer gives and takes bulkSize bytes on loopback.
type bulkServer struct {
	listeners []net.Listener
	raw, web  string // ports
}

func newBulkServer() (*bulkServer, error) {
	s := &bulkServer{}
	port := func() (string, error) {
		l, err := net.Listen("tcp", loopback+":0")
		if err != nil {
			return "", err
		}
		s.listeners = append(s.listeners, l)
		_, p, err := net.SplitHostPort(l.Addr().String())
		return p, err
	}
	var err error
	if s.raw, err = port(); err == nil {
		s.web, err = port()
	}
	if err != nil {
		s.close()
		return nil, err
	}
	go func() {
		for {
			c, err := s.listeners[0].Accept()
			if err != nil {
				return
			}
			go bulkPeer(c)
		}
	}()
	go http.Serve(s.listeners[1], http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(bulkSize))
		_ = writeBulk(w)
	}))
	return s, nil
}

func (s *bulkServer) close() {
	for _, l := range s.listeners {
		l.Close()
	}
}

// bulkPeer does what the first byte asks for.
func bulkPeer(c net.Conn) {
	defer c.Close()
	var what [1]byte
	if _, err := io.ReadFull(c, what[:]); err != nil {
		return
	}
	if what[0] == 'g' {
		_ = writeBulk(c)
		return
	}
	if readBulk(c) == nil {
		_, _ = c.Write(what[:])
	}
}

func writeBulk(w io.Writer) error {
	buf := make([]byte, 256<<10)
	for range bulkSize / len(buf) {
		if _, err := w.Write(buf); err != nil {
			return err
		}
	}
	return nil
}

func readBulk(r io.Reader) error {
	buf := make([]byte, 256<<10)
	for left := int64(bulkSize); left > 0; {
		n, err := r.Read(buf[:min(left, int64(len(buf)))])
		if left -= int64(n); err != nil && left > 0 {
			return err
		}
	}
	return nil
}

// moveBulk is the client: get, put or http. It gives MB/s, the connection's
// making included.
func moveBulk(how, address string) (float64, error) {
	begun := time.Now()
	c, err := net.Dial("tcp", address)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	switch how {
	case "get":
		if _, err = c.Write([]byte("g")); err == nil {
			err = readBulk(c)
		}
	case "put":
		if _, err = c.Write([]byte("p")); err == nil {
			err = writeBulk(c)
		}
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
	case "http":
		if _, err = fmt.Fprintf(c, "GET /bulk HTTP/1.1\r\nHost: %s\r\n\r\n", address); err != nil {
			break
		}
		var resp *http.Response
		if resp, err = http.ReadResponse(bufio.NewReaderSize(c, 256<<10), nil); err != nil {
			break
		}
		if resp.StatusCode != http.StatusOK {
			return 0, fmt.Errorf("the server answered %s", resp.Status)
		}
		err = readBulk(resp.Body)
	default:
		err = fmt.Errorf("no way to move it: %q", how)
	}
	return bulkSize / 1e6 / time.Since(begun).Seconds(), err
}
