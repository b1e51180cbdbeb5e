package gate

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// A full disk shuts the gate: what is open is cut, nothing leaves, everybody is
// told why, and with room on the disk it is open again, without a hole in the
// log.
func TestFullDiskShutsAndReopens(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("SKIPPED: no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	path := filepath.Join(dir, "audit.jsonl")
	log, err := audit.Open(path, audit.Options{Bottle: "t-01234567"})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	said := &safeBuffer{}
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, func(c *Config) { c.Audit, c.Log = log, said })
	_, _, tunnel := g.connect(hostPort("tcp.test", port))
	code := ""
	for range 1000 {
		status, f, c := g.connect(hostPort("tcp.test", port))
		c.Close()
		if status != 200 {
			code = fmt.Sprint(status, " ", f.Error.Code)
			break
		}
	}
	if code != "503 audit_failed" {
		t.Fatalf("%q", code)
	}
	tunnel.SetDeadline(time.Now().Add(patience))
	if b, err := io.ReadAll(tunnel); len(b) > 0 || os.IsTimeout(err) {
		t.Errorf("a tunnel stays open without a log: %q %v", b, err)
	}
	resp, b := g.get("http://denied.test/")
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !strings.Contains(string(b), "audit_failed") {
		t.Errorf("%s %s", resp.Status, b)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if status, _, c := g.connect(hostPort("tcp.test", port)); status == 200 {
			c.Close()
			break
		}
		if time.Now().After(until) {
			t.Fatal("it stays shut with room on the disk")
		}
	}
	if s := said.String(); !strings.Contains(s, "no space left on device") || !strings.Contains(s, "can be written again") {
		t.Errorf("it says %q", s)
	}
	g.gate.Close()
	<-g.done
	g.done <- nil
	log.Close()
	if r, err := audit.Verify(path, ""); err != nil || r.Break != nil || !r.Ended {
		t.Errorf("%+v %v", r, err)
	}
	opened, closed := 0, 0
	for _, e := range readEvents(t, path) {
		switch {
		case e.Event == audit.KindConnect && e.Verdict == audit.Allow:
			opened++
		case e.Event == audit.KindClose:
			closed++
		}
	}
	if opened != closed {
		t.Errorf("%d tunnels were opened, %d closed", opened, closed)
	}
}

// A log that is taken away ends the gate.
func TestRemovedLogEndsGate(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) { io.Copy(c, c) })
	g := start(t, []plan.Rule{tcpRule("tcp.test", port)}, nil, nil)
	if status, f, _ := g.connect(hostPort("tcp.test", port)); status != 200 {
		t.Fatal(status, f)
	}
	os.Remove(g.log)
	if status, f, _ := g.connect(hostPort("tcp.test", port)); status != 503 || f.Error.Code != "audit_failed" {
		t.Errorf("%d %+v", status, f)
	}
	err := <-g.done
	if f := fault.As(err); err == nil || f.Code != "audit_log_changed" {
		t.Errorf("%v", err)
	}
	g.done <- nil
}
