package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/bottle-tools/bottle/lib/fault"
)

func lines(t *testing.T, path string) []Event {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var es []Event
	for l := range strings.Lines(string(b)) {
		if strings.TrimSpace(l) == "" {
			continue
		}
		var e Event
		if err := json.Unmarshal([]byte(l), &e); err != nil {
			t.Fatalf("line %q: %v", l, err)
		}
		es = append(es, e)
	}
	return es
}

func TestWriteAndResume(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.FixedZone("x", 3600))
	opts := Options{Bottle: "dev-01234567", Now: func() time.Time { return at }}
	l, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	rule := 0
	if err := l.Write(Event{Event: KindConnect, Verdict: Allow, Host: "a.example", Port: 443, Rule: &rule}); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if l.Write(Event{}) == nil {
		t.Error("a closed log took a line")
	}
	st, _ := os.Stat(path)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	// A crash in the middle of a line.
	f, _ := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	f.WriteString(`{"time":"2026`)
	f.Close()
	l, err = Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	l.Write(Event{Event: KindStop})
	l.Close()
	b, _ := os.ReadFile(path)
	first := `{"time":"2026-01-02T02:04:05.000000678Z","bottle":"dev-01234567","seq":1,"event":"connect","verdict":"allow","host":"a.example","port":443,"rule":0}` + "\n"
	torn := `{"time":"2026` + "\n"
	// Digests as sha256sum prints them, not as the package computes them.
	sum := func(s string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(s))) }
	want := first + torn + `{"time":"2026-01-02T02:04:05.000000678Z","bottle":"dev-01234567","seq":2,"event":"stop",` +
		`"torn":{"bytes":14,"sha256":"` + sum(torn) + `"},"prev":"` + sum(first) + `"}` + "\n"
	if string(b) != want {
		t.Errorf("got\n%s\nwant\n%s", b, want)
	}
}

func TestHostileMembers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(path, Options{Bottle: "b"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	long := strings.Repeat("ü", 100_000)
	if err := l.Write(Event{Event: KindRequest, Host: "x\n{\"verdict\":\"allow\"}\u009b2J\u202e", Path: long, Method: "\x00\x1b[2J\x7f", SNI: "\xff\xfe", Reason: long}); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(path)
	if bytes.Count(b, []byte("\n")) != 1 || len(b) > 8<<10 || !utf8.Valid(b) {
		t.Fatalf("%d bytes, %d lines", len(b), bytes.Count(b, []byte("\n")))
	}
	for _, c := range string(b[:len(b)-1]) {
		if fault.Control(c) {
			t.Fatalf("control character %#x", c)
		}
	}
	if e := lines(t, path)[0]; e.Host != "x\n{\"verdict\":\"allow\"}\u009b2J\u202e" || e.Method != "\x00\x1b[2J\x7f" || !strings.HasSuffix(e.Path, "ü…") {
		t.Errorf("%q %q", e.Host, e.Path[len(e.Path)-8:])
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	os.WriteFile(file, nil, 0o600)
	link := filepath.Join(dir, "link")
	os.Symlink(file, link)
	shared := filepath.Join(dir, "shared")
	os.WriteFile(shared, nil, 0o600)
	os.Chmod(shared, 0o666)
	hard := filepath.Join(dir, "hard")
	os.WriteFile(hard, nil, 0o600)
	os.Link(hard, filepath.Join(dir, "hard2"))
	for _, c := range []struct {
		path, code string
		exit       int
	}{
		{link, "audit_log_untrusted", fault.NoPerm},
		{shared, "audit_log_untrusted", fault.NoPerm},
		{hard, "audit_log_untrusted", fault.NoPerm},
		{filepath.Join(dir, "missing", "log"), "audit_log_failed", fault.CantCreate},
		{dir, "audit_log_failed", fault.CantCreate},
	} {
		_, err := Open(c.path, Options{})
		if f := fault.As(err); err == nil || f.Code != c.code || f.Exit != c.exit || f.Hint == "" {
			t.Errorf("%s: %+v", c.path, err)
		}
	}
}
