//go:build linux

package runner

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
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
	addr := l.Addr().String()
	if err := await(addr, time.Second); err != nil {
		t.Error(err)
	}
	l.Close()
	if err := await(addr, 50*time.Millisecond); err == nil {
		t.Error("nobody listens")
	}
}
