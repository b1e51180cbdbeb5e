package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

// logged are the lines of a log and its report, which has to be whole.
func logged(t *testing.T, path string) ([]Event, Report) {
	t.Helper()
	var es []Event
	for l, err := range Read(path) {
		if err != nil {
			t.Fatal(err)
		}
		if !l.Torn {
			es = append(es, l.Event)
		}
	}
	return es, verified(t, path)
}

func verified(t *testing.T, path string) Report {
	t.Helper()
	r, err := Verify(path, "")
	if err != nil || r.Break != nil {
		t.Fatalf("verify: %v %+v", err, r.Break)
	}
	return r
}

func open(t *testing.T, path string, opts Options) *Log {
	t.Helper()
	opts.Bottle = "dev-01234567"
	l, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func allowed(host string) Event {
	return Event{Event: KindConnect, Verdict: Allow, Host: host, Port: 443}
}

func denied(host string) Event {
	return Event{Event: KindConnect, Verdict: Deny, Host: host, Port: 443}
}

type limited struct{ room, calls int }

func (w *limited) Write(p []byte) (int, error) {
	w.calls++
	if w.room < len(p) {
		n := w.room
		w.room = 0
		return n, errors.New("no space left on device")
	}
	w.room -= len(p)
	return len(p), nil
}
func (w *limited) Close() error { return nil }

// A stream that failed stays closed for good: what it has got is not known.
func TestStreamFailsClosed(t *testing.T) {
	w := &limited{room: 300}
	l := New(w, Options{Bottle: "b"})
	var err error
	for range 100 {
		if err = l.Write(allowed("a.example")); err != nil {
			break
		}
	}
	if f := fault.As(err); err == nil || f.Exit != fault.IO || f.Code != "audit_write_failed" || f.Hint == "" {
		t.Fatalf("%+v", err)
	}
	calls := w.calls
	w.room = 1 << 20
	if l.Write(Event{}) == nil || w.calls != calls {
		t.Error("went on after a lost line")
	}
	if retry, err := l.Recover(); retry || err == nil {
		t.Errorf("recovered: %v %v", retry, err)
	}
}

// Writers of one log keep one chain.
func TestConcurrentChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, path, Options{MaxBytes: MinMaxBytes, Keep: 1000})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 200 {
				e := allowed(strings.Repeat("h", 200))
				if n%2 == i%2 {
					e.Verdict = Deny
				}
				if err := l.Write(e); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	es, r := logged(t, path)
	if r.Files < 5 || len(es) != 1600+r.Files-1 || r.Lines != len(es) || r.Dropped != 0 || r.First != 1 {
		t.Errorf("%d events, %+v", len(es), r)
	}
}

func TestOneWriter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, path, Options{})
	_, err := Open(path, Options{})
	if f := fault.As(err); err == nil || f.Code != "audit_log_busy" || f.Exit != fault.TempFail {
		t.Fatalf("%v", err)
	}
	l.Close()
	open(t, path, Options{})
}

// Files are numbered in the order in which they were written, the oldest are
// dropped, and the log says so before it happens. All of it over restarts.
func TestRotation(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.jsonl")
	for round := range 4 {
		l := open(t, path, Options{MaxBytes: MinMaxBytes, Keep: 3, Head: must(Tail(path))})
		for i := range 300 {
			if err := l.Write(allowed(fmt.Sprintf("%d-%d-%s.example", round, i, strings.Repeat("x", 200)))); err != nil {
				t.Fatal(err)
			}
		}
		head := l.Head()
		l.Close()
		if got := must(Tail(path)); got != head {
			t.Fatalf("%v %v", got, head)
		}
	}
	files, err := Files(path)
	if err != nil || len(files) != 4 || files[3] != path {
		t.Fatalf("%v %v", files, err)
	}
	for _, f := range files {
		if st, err := os.Stat(f); err != nil || st.Size() > MinMaxBytes+1024 || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, st, err)
		}
	}
	es, r := logged(t, path)
	if r.First == 1 || r.Dropped != es[0].File-1 || es[0].Event != KindRotate || filepath.Base(files[0]) != fmt.Sprintf("audit.jsonl.%06d", es[0].File) {
		t.Errorf("%+v %+v", r, es[0])
	}
	if last := es[len(es)-1]; last.Seq != r.Head.Seq || !strings.HasPrefix(last.Host, "3-299-") {
		t.Errorf("%+v", last)
	}
	// Keeping fewer removes the rest.
	l := open(t, path, Options{MaxBytes: MinMaxBytes, Keep: 1})
	for range 300 {
		l.Write(denied(strings.Repeat("y", 250)))
	}
	l.Close()
	if r = verified(t, path); r.Files != 2 {
		t.Errorf("%+v", r)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A crash between any two steps of a rotation leaves a log that goes on.
func TestBrokenOffRotation(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(path string)
	}{
		{"after the rename", func(path string) { os.Rename(path, numbered(path, 1)) }},
		{"before the first line", func(path string) { os.Rename(path, numbered(path, 1)); os.WriteFile(path, nil, 0o600) }},
		{"in the first line", func(path string) {
			os.Rename(path, numbered(path, 1))
			os.WriteFile(path, []byte(`{"time":"2026-`), 0o600)
		}},
	} {
		path := filepath.Join(t.TempDir(), "audit.jsonl")
		l := open(t, path, Options{})
		l.Write(allowed("a.example"))
		head := l.Head()
		l.Close()
		c.make(path)
		l = open(t, path, Options{Head: head})
		if err := l.Write(allowed("b.example")); err != nil {
			t.Fatal(err)
		}
		l.Close()
		es, r := logged(t, path)
		if len(es) != 3 || es[1].Event != KindRotate || es[1].File != 2 || es[2].Seq != 3 || r.Files != 2 {
			t.Errorf("%s: %+v", c.name, es)
		}
	}
}

// TestTorn: whatever a crash leaves of a line, the next one accounts for.
func TestTorn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	for i := range 3 {
		l := open(t, path, Options{})
		l.Start()
		l.Write(allowed("a.example"))
		l.Close()
		add(t, path, fmt.Sprintf(`{"time":"2026","seq":%d`, 3*i))
		if i == 1 { // it crashed again before it wrote more
			l := open(t, path, Options{})
			l.file.Close()
			l.mu.Lock()
			l.gone, l.err = true, errors.New("killed")
			l.mu.Unlock()
			add(t, path, `{"ti`)
		}
		r, err := Verify(path, "")
		if err != nil || r.Break == nil || !strings.Contains(r.Break.Reason, "ended while it wrote") {
			t.Fatalf("a torn end is passed over: %v %+v", err, r)
		}
	}
	open(t, path, Options{}).Start()
	if _, r := logged(t, path); r.Torn != 3 || r.Lines != 7 {
		t.Errorf("%+v", r)
	}
}

func add(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(text)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The first break is found, with its place, whatever was done to the log.
func TestVerifyFindsBreaks(t *testing.T) {
	dir := t.TempDir()
	orig := filepath.Join(dir, "orig")
	l := open(t, orig, Options{MaxBytes: MinMaxBytes, Keep: 3})
	for i := range 1500 {
		l.Write(denied(fmt.Sprintf("%d-%s.example", i, strings.Repeat("x", 100))))
	}
	l.Write(Event{Event: KindStop})
	l.Close()
	files := must(Files(orig))
	if len(files) != 4 {
		t.Fatal(files)
	}
	suffixes := make([]string, 4)
	for i, f := range files {
		suffixes[i] = strings.TrimPrefix(f, orig)
	}
	whole := verified(t, orig)
	if !whole.Ended || whole.Dropped == 0 {
		t.Fatalf("%+v", whole)
	}
	edit := func(i int, f func(lines [][]byte) [][]byte) func(path string) {
		return func(path string) {
			lines := bytes.SplitAfter(must(os.ReadFile(path+suffixes[i])), []byte("\n"))
			os.WriteFile(path+suffixes[i], bytes.Join(f(lines[:len(lines)-1]), nil), 0o600)
		}
	}
	for i, c := range []struct {
		name string
		do   func(path string)
		file int
		line int
		want string
	}{
		{"a byte changed", edit(1, func(ls [][]byte) [][]byte { ls[9] = bytes.Replace(ls[9], []byte("deny"), []byte("Deny"), 1); return ls }), 1, 11, "was changed"},
		{"white space added", edit(1, func(ls [][]byte) [][]byte { ls[9] = bytes.Replace(ls[9], []byte(`,`), []byte(`, `), 1); return ls }), 1, 11, "was changed"},
		{"a line removed", edit(2, func(ls [][]byte) [][]byte { return append(ls[:20:20], ls[21:]...) }), 2, 21, "missing"},
		{"a line twice", edit(2, func(ls [][]byte) [][]byte { return append(ls[:20:20], ls[19:]...) }), 2, 21, "twice"},
		{"lines swapped", edit(0, func(ls [][]byte) [][]byte { ls[4], ls[5] = ls[5], ls[4]; return ls }), 0, 5, "missing"},
		{"an empty line", edit(0, func(ls [][]byte) [][]byte { ls[4] = append(ls[4], '\n'); return ls }), 0, 6, "no event"},
		{"garbage", edit(3, func(ls [][]byte) [][]byte { ls[4] = []byte("x\n"); return ls }), 3, 6, "missing"},
		{"last line of a file", edit(1, func(ls [][]byte) [][]byte { return ls[:len(ls)-1] }), 2, 1, "missing"},
		{"a file removed", func(p string) { os.Remove(p + suffixes[1]) }, 2, 1, "missing"},
		{"the oldest file removed", func(p string) { os.Remove(p + suffixes[0]) }, 1, 1, "no line of the log says"},
		{"the first line removed", edit(0, func(ls [][]byte) [][]byte { return ls[1:] }), 0, 1, "begins with"},
		{"files exchanged", func(p string) {
			os.Rename(p+suffixes[0], p+"x")
			os.Rename(p+suffixes[1], p+suffixes[0])
			os.Rename(p+"x", p+suffixes[1])
		}, 1, 1, "missing"},
		{"cut in a line", func(p string) { st, _ := os.Stat(p); os.Truncate(p, st.Size()-5) }, 3, -1, "cut short"},
	} {
		path := filepath.Join(dir, fmt.Sprint("t", i))
		for _, s := range suffixes {
			os.WriteFile(path+s, must(os.ReadFile(orig+s)), 0o600)
		}
		c.do(path)
		r, err := Verify(path, "")
		if err != nil || r.Break == nil {
			t.Errorf("%s: not found: %v", c.name, err)
			continue
		}
		if r.Break.File != path+suffixes[c.file] || c.line > 0 && r.Break.Line != c.line || !strings.Contains(r.Break.Reason, c.want) {
			t.Errorf("%s: %+v, want file %d, line %d, %q", c.name, r.Break, c.file, c.line, c.want)
		}
	}
	// Whole lines taken from the end leave a whole chain: only who knows the
	// head can tell, and that it does not end in order.
	path := filepath.Join(dir, "cut")
	for _, s := range suffixes {
		os.WriteFile(path+s, must(os.ReadFile(orig+s)), 0o600)
	}
	edit(3, func(ls [][]byte) [][]byte { return ls[:len(ls)-2] })(path)
	if r := verified(t, path); r.Ended || r.Head == whole.Head {
		t.Errorf("%+v", r)
	}
	if r, err := Verify(path, whole.Head.SHA256); err != nil || r.Break == nil || !strings.Contains(r.Break.Reason, "was cut") {
		t.Errorf("%+v %v", r, err)
	}
	if r, err := Verify(orig, whole.Head.SHA256); err != nil || r.Break != nil {
		t.Errorf("%+v %v", r.Break, err)
	}
	if _, err := Open(path, Options{Head: whole.Head}); fault.As(err) == nil || fault.As(err).Code != "audit_log_changed" {
		t.Errorf("a gate goes on with it: %v", err)
	}
}

// No byte before the last line can be another one.
func TestVerifyFindsEveryByte(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, path, Options{})
	l.Start()
	l.Write(denied("a.example"))
	l.Close()
	add(t, path, `{"ti`) // and what a crash left
	l = open(t, path, Options{})
	l.Write(denied("b.example"))
	l.Write(Event{Event: KindStop})
	l.Close()
	verified(t, path)
	raw := must(os.ReadFile(path))
	last := bytes.LastIndexByte(raw[:len(raw)-1], '\n') + 1
	for i := range last {
		for _, c := range []byte{raw[i] ^ 1, ' ', '\n'} {
			changed := bytes.Clone(raw)
			if changed[i] = c; c == raw[i] {
				continue
			}
			os.WriteFile(path, changed, 0o600)
			if r, err := Verify(path, ""); err == nil && r.Break == nil {
				t.Fatalf("byte %d of %d, %q instead of %q, is not found", i, last, c, raw[i])
			}
		}
	}
}

// flaky fails on demand.
type flaky struct {
	file
	writes, syncs, shortens atomic.Pointer[error]
	torn                    atomic.Int64 // bytes of a failing write that are written
	synced                  atomic.Int64
	block                   chan struct{} // a sync waits for it
}

func (f *flaky) Write(p []byte) (int, error) {
	if err := f.writes.Load(); err != nil {
		n, _ := f.file.Write(p[:min(int(f.torn.Load()), len(p))])
		return n, *err
	}
	return f.file.Write(p)
}

func (f *flaky) Sync(size int64) error {
	f.synced.Add(1)
	if f.block != nil {
		<-f.block
	}
	if err := f.syncs.Load(); err != nil {
		return *err
	}
	return f.file.Sync(size)
}

func (f *flaky) Truncate(size int64) error {
	if err := f.shortens.Load(); err != nil {
		return *err
	}
	return f.file.Truncate(size)
}

// While one sync is under way, the decisions that come share the next one.
func TestGroupCommit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, path, Options{})
	f := &flaky{file: l.file, block: make(chan struct{})}
	l.file = f
	var done atomic.Int64
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if err := l.Write(allowed("a.example")); err != nil {
				t.Error(err)
			}
			done.Add(1)
		})
	}
	await(t, "all are written", func() bool { return l.Head().Seq == 100 })
	if n := done.Load(); n != 0 {
		t.Errorf("%d decisions were taken before they were durable", n)
	}
	close(f.block)
	wg.Wait()
	if n := f.synced.Load(); n > 2 {
		t.Errorf("%d syncs for 100 decisions at a time", n)
	}
	// What nothing hangs on waits for nobody, and is durable soon after.
	n := f.synced.Load()
	for range 50 {
		l.Write(denied("b.example"))
		l.Write(Event{Event: KindClose})
	}
	await(t, "denials are durable", func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.held) == 0 })
	if n = f.synced.Load() - n; n != 1 {
		t.Errorf("%d syncs for a hundred lines on which nothing hangs", n)
	}
}

func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for until := time.Now().Add(time.Minute); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%s: never", what)
		}
	}
}

// Whatever fails, no line is lost, none stands twice, and nothing that was
// refused stands there as allowed.
func TestRecover(t *testing.T) {
	for _, errno := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EIO} {
		for _, what := range []string{"write", "torn write", "sync", "lazy sync"} {
			t.Run(what+" "+errno.Error(), func(t *testing.T) { t.Parallel(); testRecover(t, what, errno) })
		}
	}
}

func testRecover(t *testing.T, what string, errno error) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, path, Options{})
	f := &flaky{file: l.file}
	l.file = f
	told := make(chan error, 10)
	l.OnFailure(func(err error) { told <- err })
	l.Start()
	l.Write(denied("before.example")) // not durable yet
	switch what {
	case "torn write":
		f.torn.Store(40)
		f.writes.Store(&errno)
	case "write":
		f.writes.Store(&errno)
	default:
		f.syncs.Store(&errno)
	}
	if what != "lazy sync" {
		err := l.Write(allowed("refused.example"))
		if fl := fault.As(err); err == nil || fl.Code != "audit_write_failed" || fl.Exit != fault.IO || !errors.Is(err, errno) {
			t.Fatalf("%v", err)
		}
	}
	if err := <-told; !errors.Is(err, errno) {
		t.Fatal(err)
	}
	l.Write(Event{Event: KindClose, Host: "meanwhile.example", BytesOut: 7})
	if l.Write(Event{Event: KindChange, Verdict: Allow, Host: "change.example"}) == nil {
		t.Error("a change that is not written down is made")
	}
	if l.Write(allowed("closed.example")) == nil {
		t.Fatal("it is open")
	}
	if retry, err := l.Recover(); !retry || err == nil {
		t.Fatalf("%v %v", retry, err)
	}
	f.writes.Store(nil)
	f.shortens.Store(&errno)
	if retry, err := l.Recover(); !retry || err == nil {
		t.Fatalf("%v %v", retry, err)
	}
	f.shortens.Store(nil)
	f.syncs.Store(nil)
	if retry, err := l.Recover(); retry || err != nil {
		t.Fatalf("%v %v", retry, err)
	}
	if err := l.Write(allowed("after.example")); err != nil {
		t.Fatal(err)
	}
	l.Close()
	es, _ := logged(t, path)
	var got []string
	for _, e := range es {
		got = append(got, strings.Join([]string{e.Event, e.Verdict, e.Host}, " "))
	}
	want := "start  ; connect deny before.example; connect deny refused.example; close  meanwhile.example; change allow change.example; connect deny closed.example; reopen  ; connect allow after.example"
	if what == "lazy sync" {
		want = strings.Replace(want, "connect deny refused.example; ", "", 1)
	}
	if s := strings.Join(got, "; "); s != want {
		t.Errorf("got  %s\nwant %s", s, want)
	}
	if e := es[len(es)-4]; e.Event != KindChange || !strings.Contains(e.Reason, "told that it failed") {
		t.Errorf("%+v", e)
	}
	if e := es[len(es)-2]; !strings.Contains(e.Reason, errno.Error()) {
		t.Errorf("%+v", e)
	}
}

// What a closed log keeps is bounded, and it says how much it did not keep.
func TestHeldIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, path, Options{})
	f := &flaky{file: l.file}
	l.file = f
	full := error(syscall.ENOSPC)
	f.writes.Store(&full)
	for range maxHeld + 100 {
		l.Write(Event{Event: KindClose})
	}
	if len(l.held) != maxHeld {
		t.Fatal(len(l.held))
	}
	f.writes.Store(nil)
	if _, err := l.Recover(); err != nil {
		t.Fatal(err)
	}
	l.Close()
	es, _ := logged(t, path)
	if e := es[len(es)-1]; len(es) != maxHeld+1 || !strings.Contains(e.Reason, "100 lines were not kept") {
		t.Errorf("%d %+v", len(es), e)
	}
}

// A log that is taken away from its gate is not written to any more, and does
// not come back.
func TestChangedWhileOpen(t *testing.T) {
	for name, do := range map[string]func(path string){
		"removed":   func(p string) { os.Remove(p) },
		"moved":     func(p string) { os.Rename(p, p+".old") },
		"replaced":  func(p string) { os.Rename(p, p+".old"); os.WriteFile(p, must(os.ReadFile(p+".old")), 0o600) },
		"shortened": func(p string) { os.Truncate(p, 10) },
	} {
		path := filepath.Join(t.TempDir(), "audit.jsonl")
		l := open(t, path, Options{})
		l.Write(allowed("a.example"))
		do(path)
		err := l.Write(allowed("b.example"))
		if f := fault.As(err); err == nil || f.Code != "audit_log_changed" || f.Exit != fault.NoPerm {
			t.Errorf("%s: %v", name, err)
		}
		if retry, err := l.Recover(); retry || err == nil {
			t.Errorf("%s: recovered", name)
		}
	}
}

// A reader follows a log over its rotation, and sees each line once.
func TestFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	if _, err := OpenReader(path); fault.As(err).Exit != fault.NoInput || fault.As(err).Code != "no_audit_log" {
		t.Fatal(err)
	}
	l := open(t, path, Options{MaxBytes: MinMaxBytes, Keep: 50})
	l.Start()
	r, err := OpenReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	const n = 3000
	go func() {
		for i := range n {
			l.Write(denied(fmt.Sprint(i, strings.Repeat("x", 200))))
		}
		l.Close()
	}()
	var last uint64
	for seen := 0; seen < n; {
		line, err := r.Next()
		if err == io.EOF {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil || line.Torn || line.Event.Seq != last+1 {
			t.Fatalf("%+v after %d: %v", line, last, err)
		}
		last = line.Event.Seq
		if line.Event.Verdict == Deny {
			seen++
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Error(err)
	}
	if line, err := NewReader(strings.NewReader(string(must(os.ReadFile(path)))), "-").Next(); err != nil || line.Event.Event != KindRotate || line.Where() != "-:1" {
		t.Errorf("%+v %v", line, err)
	}
}

// What was seen once is there, or was dropped, or the log was cut.
func TestHolds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	if ok, err := Holds(path, Head{}); !ok || err != nil {
		t.Error("nothing is in every log")
	}
	l := open(t, path, Options{MaxBytes: MinMaxBytes, Keep: 2})
	seen := map[int]Head{}
	for i := range 1500 {
		l.Write(denied(strings.Repeat("x", 200)))
		seen[i] = l.Head()
	}
	l.Close()
	for _, i := range []int{0, 1, 700, 1200, 1498, 1499} {
		if ok, err := Holds(path, seen[i]); !ok || err != nil {
			t.Errorf("line %d: %v", i, err)
		}
	}
	other := seen[1499]
	other.SHA256 = seen[1498].SHA256[:70] + "0"
	if ok, err := Holds(path, other); ok || err != nil {
		t.Errorf("a line that never was: %v", err)
	}
	raw := must(os.ReadFile(path))
	os.WriteFile(path, raw[:bytes.LastIndexByte(raw[:len(raw)-1], '\n')+1], 0o600)
	if ok, err := Holds(path, seen[1499]); ok || err != nil {
		t.Errorf("a log that was cut: %v", err)
	}
	if ok, _ := Holds(path, seen[1498]); !ok {
		t.Error("cut behind it")
	}
	for _, f := range must(Files(path)) {
		os.Remove(f)
	}
	if ok, err := Holds(path, seen[0]); ok || err != nil {
		t.Errorf("a log that is gone: %v", err)
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600)
	os.WriteFile(filepath.Join(dir, "long"), bytes.Repeat([]byte("x"), maxLine+2), 0o600)
	for name, code := range map[string]string{"fifo": "audit_read_failed", "long": "bad_audit_log", ".": "audit_read_failed"} {
		var err error
		for _, err = range Read(filepath.Join(dir, name)) {
		}
		if f := fault.As(err); err == nil || f.Code != code {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// BenchmarkWrite is what an allowed decision costs, on the disk of the working
// folder: alone, with 64 at a time that share syncs, and a refused one.
func BenchmarkWrite(b *testing.B) {
	dir, err := os.MkdirTemp(".", "bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	run := func(name string, e Event, writers int) {
		b.Run(name, func(b *testing.B) {
			l, err := Open(filepath.Join(dir, name), Options{Bottle: "b"})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for range writers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if err := l.Write(e); err != nil {
							b.Error(err)
						}
					}
				})
			}
			wg.Wait()
		})
	}
	run("allow", allowed("api.example.com"), 1)
	run("allow64", allowed("api.example.com"), 64)
	run("deny", denied("api.example.com"), 1)
}
