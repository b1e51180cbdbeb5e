package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/state"
	"github.com/bottle-tools/bottle/lib/tool"
)

// booting is an engine of which only the boot check is asked for.
type booting struct {
	engine.Engine
	version string
	err     error
	boots   int
}

func (b *booting) Name() string                            { return "smolvm" }
func (b *booting) Version(context.Context) (string, error) { return b.version, nil }
func (b *booting) Check(context.Context, string) error     { b.boots++; return b.err }

// What a boot check found is remembered for a host, its kernel and the engine's
// version; a failure only for a while.
func TestBooted(t *testing.T) {
	root := &state.Root{Dir: t.TempDir()}
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	e := &booting{version: "1.9.1"}
	v := &vm{p: &tool.Proc{Now: func() time.Time { return now }}}
	ask := func(boots int, fails bool) {
		t.Helper()
		err := v.booted(context.Background(), e, root)
		if e.boots != boots || (err != nil) != fails {
			t.Fatalf("%d boots, %v", e.boots, err)
		}
		if f := fault.As(err); fails && (f.Exit != fault.Host || f.Code != "engine_unfit" || !strings.Contains(f.Msg, e.err.Error())) {
			t.Fatalf("fault %+v", f)
		}
	}
	file := filepath.Join(root.Dir, checksFile)
	edit := func(old, new string) {
		t.Helper()
		raw, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(raw), old) {
			t.Fatalf("%q is not in %s (%v)", old, raw, err)
		}
		if err := os.WriteFile(file, []byte(strings.ReplaceAll(string(raw), old, new)), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	ask(1, false)
	ask(1, false)
	now = now.Add(1000 * time.Hour)
	ask(1, false) // what worked is believed
	e.version = "1.32.2"
	ask(2, false)
	e.version = "1.9.1"
	ask(2, false) // both are known

	edit(hostKey(), "elsewhere 1.2.3") // as if it had been another host or kernel
	ask(3, false)

	// A failure is told again without a boot, and then tried anew.
	e.version, e.err = "2.0.0", errors.New("no guest boots here")
	ask(4, true)
	now = now.Add(failedFor - time.Second)
	ask(4, true)
	now = now.Add(time.Second)
	ask(5, true)
	e.err = nil
	now = now.Add(failedFor)
	ask(6, false)
	ask(6, false)

	// A failure from the future, of a clock that went wrong, does not hold.
	e.version, e.err = "2.0.1", errors.New("no guest boots here")
	ask(7, true)
	now = now.Add(-time.Hour)
	ask(8, true)

	// A file of another form or a broken one is one that knows nothing.
	for _, text := range []string{`{"a b c":""}`, `{`, ``, `[]`} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		was := e.boots
		ask(was+1, true)
	}
}

// The key names host and kernel as they are.
func TestHostKey(t *testing.T) {
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Skip("SKIPPED: no /proc here")
	}
	host, err := os.Hostname()
	if want := host + " " + strings.TrimSpace(string(kernel)); err != nil || hostKey() != want {
		t.Errorf("%q, want %q (%v)", hostKey(), want, err)
	}
}

// doctor's own boot takes the place of what was remembered, in both directions,
// and one that it cut off itself does not.
func TestDoctorRemembers(t *testing.T) {
	dir := t.TempDir()
	v := &vm{p: &tool.Proc{Now: time.Now, Getenv: func(name string) string {
		return map[string]string{"XDG_STATE_HOME": dir, "XDG_RUNTIME_DIR": dir, "HOME": dir}[name]
	}}}
	root, err := v.root()
	if err != nil {
		t.Fatal(err)
	}
	e := &booting{version: "1.9.1", err: errors.New("you may not open /dev/kvm")}
	if err := v.booted(context.Background(), e, root); err == nil {
		t.Fatal("a failed boot is taken for a good one")
	}
	e.err = nil
	if err := v.booted(context.Background(), e, root); err == nil || e.boots != 1 {
		t.Fatalf("%d boots, %v", e.boots, err)
	}
	if err := v.checkBoot(context.Background(), e); err != nil {
		t.Fatal(err)
	}
	if err := v.booted(context.Background(), e, root); err != nil || e.boots != 2 {
		t.Errorf("doctor's success is not known: %d boots, %v", e.boots, err)
	}
	cut, cancel := context.WithCancel(context.Background())
	cancel()
	e.err = context.Canceled
	if err := v.checkBoot(cut, e); err == nil {
		t.Error("a check that was cut off passes")
	}
	if err := v.booted(context.Background(), e, root); err != nil {
		t.Errorf("a check that was cut off is remembered: %v", err)
	}
	e.err = errors.New("the module is gone")
	if err := v.checkBoot(context.Background(), e); err == nil {
		t.Error("a failed check passes")
	}
	if err := v.booted(context.Background(), e, root); err == nil || !strings.Contains(err.Error(), "module") {
		t.Errorf("doctor's failure is not known: %v", err)
	}
}

// A check that ran out of its time is not told as a bug.
func TestDoctorCutsOff(t *testing.T) {
	var out strings.Builder
	dir := t.TempDir()
	v := &vm{p: &tool.Proc{Name: "bottle-vm", Now: time.Now, Stdout: &out, Stderr: io.Discard, Getenv: func(name string) string {
		return map[string]string{"XDG_STATE_HOME": dir, "XDG_RUNTIME_DIR": dir, "HOME": dir}[name]
	}}}
	_ = v.doctor(context.Background(), time.Nanosecond, false)
	if strings.Contains(out.String(), "bug") || !strings.Contains(out.String(), "it was not done after 1ns") {
		t.Errorf("%s", out.String())
	}
	if f := fault.As(cutOff(time.Second, context.DeadlineExceeded)); f.Exit != fault.Host || f.Code != "check_timeout" || f.Hint == "" {
		t.Errorf("%+v", f)
	}
}
