//go:build linux

package runner

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/guest"
)

const marker = "0123456789abcdef0123456789abcdef"

func newRunner(t *testing.T, request string) Runner {
	t.Helper()
	r := Runner{Requests: t.TempDir(), States: filepath.Join(t.TempDir(), "states")}
	if request != "" {
		if err := os.WriteFile(filepath.Join(r.Requests, marker+".json"), []byte(request), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func TestBadRequests(t *testing.T) {
	for name, request := range map[string]string{
		"none": "", "not JSON": "{", "no argv": `{"dir":"/"}`, "empty program": `{"argv":[""],"dir":"/"}`,
		"relative dir": `{"argv":["true"],"dir":"x"}`, "negative uid": `{"argv":["true"],"dir":"/","uid":-1}`,
	} {
		var errs bytes.Buffer
		if status, ok := newRunner(t, request).Main([]string{"run", marker}, io.Discard, &errs); status != ownFailure || !ok || errs.Len() == 0 {
			t.Errorf("%s: %d, %v, %q", name, status, ok, errs.String())
		}
	}
	r := newRunner(t, "")
	for _, args := range [][]string{{"run", "../../etc/passwd"}, {"ran", "../x"}, {"ran", marker}, {"signal", "../x", "15"}, {"signal", marker, "0"}, {"signal", marker, "65"}, {"signal", marker, "TERM"}} {
		if status, ok := r.Main(args, io.Discard, io.Discard); status != ownFailure || !ok {
			t.Errorf("%q: %d, %v", args, status, ok)
		}
	}
	for _, args := range [][]string{nil, {"init"}, {"run"}, {"ran", "a", "b"}} {
		if _, ok := r.Main(args, io.Discard, io.Discard); ok {
			t.Errorf("%q was taken", args)
		}
	}
	if status, ok := r.Main([]string{"sync"}, io.Discard, io.Discard); status != 0 || !ok {
		t.Errorf("sync: %d, %v", status, ok)
	}
	// Too late, or too early, for a signal.
	if status, ok := r.Main([]string{"signal", marker, "15"}, io.Discard, io.Discard); status != 0 || !ok {
		t.Errorf("signal to nothing: %d", status)
	}
}

// The proof is there once, and only where it is needed.
func TestRan(t *testing.T) {
	r := newRunner(t, "")
	if err := os.MkdirAll(r.States, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := r.end(marker, 3); err != nil {
		t.Error(err)
	}
	if status, _ := r.Main([]string{"ran", marker}, io.Discard, io.Discard); status != ownFailure {
		t.Errorf("an unambiguous status was kept: %d", status)
	}
	if err := r.end(marker, 1); err != nil {
		t.Error(err)
	}
	var out bytes.Buffer
	if status, _ := r.Main([]string{"ran", marker}, &out, io.Discard); status != 0 || out.String() != `{"pid":0,"ended":true,"status":1}`+"\n" {
		t.Errorf("%d %q", status, out.String())
	}
	if status, _ := r.Main([]string{"ran", marker}, io.Discard, io.Discard); status != ownFailure {
		t.Errorf("asked twice: %d", status)
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"a/tool": 0o644, "b/tool": 0o755, "b/data": 0o644} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{"PATH=" + dir + "/a:b:"}
	if got, err := lookPath("tool", env, dir); got != dir+"/b/tool" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := lookPath("data", env, dir); startStatus(err) != notExecutable {
		t.Errorf("not executable: %v", err)
	}
	if _, err := lookPath("none", env, dir); startStatus(err) != notFound {
		t.Errorf("not there: %v", err)
	}
	if got, err := lookPath("./x", env, "/w"); got != "/w/x" || err != nil {
		t.Errorf("relative: %q, %v", got, err)
	}
	if got, err := lookPath("sh", nil, "/"); !strings.HasSuffix(got, "/sh") || err != nil {
		t.Errorf("without PATH: %q, %v", got, err)
	}
}

func TestAwait(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr, dir := l.Addr().String(), t.TempDir()
	gate := func(name, says string) string {
		path := filepath.Join(dir, name)
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, says)
				if says != "" {
					c.Close()
				}
			}
		}()
		return path
	}
	good := gate("good", guest.Greeting)
	for _, tt := range []struct {
		name, addr, socket string
		status             int
		says               string
	}{
		{"ready", addr, good, 0, ""},
		{"no socket", addr, filepath.Join(dir, "none"), NoGate, "none"},
		{"closed at once, as smolvm's agent does without a host", addr, gate("shut", "\n"), NoGate, "nobody answers"},
		{"silent", addr, gate("silent", ""), NoGate, "nobody answers"},
		{"somebody else", addr, gate("other", strings.Repeat("x", 100)), NoGate, "not the keeper"},
		{"no helper", "127.0.0.1:1", good, ownFailure, "not ready"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			limit := 300 * time.Millisecond
			if tt.name == "ready" || tt.name == "somebody else" { // known at once
				limit = 20 * time.Second
			}
			status, err := await(tt.addr, tt.socket, limit)
			if status != tt.status || (err == nil) != (tt.status == 0) || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("status %d, %v", status, err)
			}
		})
	}
	var out, errs strings.Builder
	fi, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	inode := fmt.Sprintln(fi.Sys().(*syscall.Stat_t).Ino)
	for want, folders := range map[string][]string{"": nil, inode: {dir}} {
		out.Reset()
		if status, ok := (Runner{}).Main(append([]string{"await", addr, good}, folders...), &out, &errs); status != 0 || !ok || errs.Len() != 0 || out.String() != want {
			t.Errorf("%d, %v, %q, %s", status, ok, out.String(), errs.String())
		}
	}
	if status, _ := (Runner{}).Main([]string{"await", addr, good, dir + "/none"}, &out, &errs); status != ownFailure || !strings.Contains(errs.String(), "none") {
		t.Errorf("%d, %s", status, errs.String())
	}
}
