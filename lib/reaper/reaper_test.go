//go:build linux

package reaper

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/gitguard"
	"github.com/bottle-tools/bottle/lib/orphan"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

// The test binary plays the processes of a bottle: what it does is its first
// argument.
func TestMain(m *testing.M) {
	if len(os.Args) < 2 {
		os.Exit(m.Run())
	}
	switch os.Args[1] {
	case "play-sleeper": // ends with its stdin or by a signal
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	case "play-deaf":
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
		time.Sleep(time.Hour) // select {} would be a deadlock, and the end
	}
	os.Exit(m.Run())
}

type host struct {
	t    *testing.T
	root *state.Root
}

func newHost(t *testing.T) host {
	t.Helper()
	top, err := os.MkdirTemp("", "reaper") // short: sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	return host{t, &state.Root{Dir: filepath.Join(top, "state"), RunDir: filepath.Join(top, "run")}}
}

// process starts a real one and gives its identity.
func (h host) process(play string) plan.Process {
	h.t.Helper()
	cmd := exec.Command(os.Args[0], play)
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		h.t.Fatal(err)
	}
	go cmd.Wait()
	h.t.Cleanup(func() { in.Close(); _ = cmd.Process.Kill() })
	p, err := state.Identify(cmd.Process.Pid)
	if err != nil {
		h.t.Fatal(err)
	}
	return p
}

func (h host) dead() plan.Process {
	h.t.Helper()
	p := h.process("play-sleeper")
	if err := state.Kill(p, 0); err != nil {
		h.t.Fatal(err)
	}
	return p
}

func (h host) bottle(change func(*state.Record)) (*state.Bottle, *state.Record) {
	h.t.Helper()
	b, rec, err := h.root.Create("dev", state.Record{CreatedAt: time.Now(), Creator: h.dead(), PlanSHA256: plan.SHA256(nil)})
	if err != nil {
		h.t.Fatal(err)
	}
	rec.Phase = state.Ready
	change(rec)
	if err := b.Save(rec); err != nil {
		h.t.Fatal(err)
	}
	return b, rec
}

func (h host) collect(minAge time.Duration) []orphan.Orphan {
	h.t.Helper()
	f, err := Collect(context.Background(), h.root, time.Now(), minAge, Sources{})
	if err != nil {
		h.t.Fatal(err)
	}
	return orphan.Decide(f)
}

func kinds(all []orphan.Orphan) string {
	var out []string
	for _, o := range all {
		out = append(out, o.Kind)
	}
	return strings.Join(out, " ")
}

func (h host) gone(b *state.Bottle, rec *state.Record) {
	h.t.Helper()
	for _, dir := range []string{b.Dir, rec.RunDir} {
		if _, err := os.Lstat(dir); err == nil {
			h.t.Errorf("%s is still there", dir)
		}
	}
	for _, c := range rec.Processes {
		if state.Alive(c.Process) {
			h.t.Errorf("%s is alive", c.Role)
		}
	}
	if left := h.collect(0); len(left) != 0 {
		h.t.Errorf("left: %+v", left)
	}
}

func TestDeadKeeper(t *testing.T) {
	h := newHost(t)
	gate, sandbox := h.process("play-sleeper"), h.process("play-deaf")
	keeper := h.dead()
	b, rec := h.bottle(func(r *state.Record) {
		r.Keeper = &keeper
		r.Processes = []state.Child{{Role: "gate", Process: gate}, {Role: "sandbox", Process: sandbox}, {Role: "proxy", Process: h.dead()}}
	})
	live := h.process("play-sleeper")
	other, otherRec := h.bottle(func(r *state.Record) { r.Keeper = &live })

	all := h.collect(time.Minute)
	if kinds(all) != "process sandbox socket folder" || all[0].ID != b.ID {
		t.Fatalf("%+v", all)
	}
	var done []orphan.Orphan
	err := Apply(context.Background(), h.root, all, time.Now, time.Minute, nil, Sources{}, func(o orphan.Orphan) { done = append(done, o) })
	if err != nil || len(done) != len(all) {
		t.Fatalf("%d done, %v", len(done), err)
	}
	h.gone(b, rec)
	if _, err := other.Load(); err != nil || !state.Alive(live) {
		t.Errorf("a live bottle was touched: %v", err)
	}
	// A second time is fine, and takes its time from nothing.
	if err := Remove(context.Background(), h.root, b, rec, nil); err != nil {
		t.Error(err)
	}
	if err := Remove(context.Background(), h.root, other, otherRec, nil); err != nil {
		t.Error(err)
	}
	h.gone(other, otherRec)
}

// A bottle whose keeper was just giving it to another one, which holds the lock,
// is that one's by now: both end.
func TestSuccessorOfAKeeper(t *testing.T) {
	for name, known := range map[string]bool{"recorded by the old": false, "recorded by itself": true} {
		h := newHost(t)
		old, next := h.process("play-sleeper"), h.process("play-sleeper")
		b, rec := h.bottle(func(r *state.Record) {
			r.Keeper, r.Processes = &old, []state.Child{{Role: "keeper", Process: next}}
		})
		now := *rec
		if known {
			now.Keeper = &next
		}
		if err := b.Save(&now); err != nil {
			t.Fatal(err)
		}
		lock, err := b.Lock()
		if err != nil {
			t.Fatal(err)
		}
		go func() { // a keeper that ends gives its lock up
			state.Await(next, time.Minute)
			lock.Close()
		}()
		begun := time.Now()
		if err := Remove(context.Background(), h.root, b, rec, nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if took := time.Since(begun); took > LockWait/2 {
			t.Errorf("%s: it took %s", name, took)
		}
		h.gone(b, rec)
	}
}

func TestRemoveIsQuick(t *testing.T) {
	h := newHost(t)
	best := time.Hour
	for range 5 {
		keeper, child := h.process("play-sleeper"), h.process("play-deaf")
		time.Sleep(20 * time.Millisecond) // let them get to where they wait
		b, rec := h.bottle(func(r *state.Record) {
			r.Keeper = &keeper
			r.Processes = []state.Child{{Role: "gate", Process: child}}
		})
		start := time.Now()
		if err := Remove(context.Background(), h.root, b, rec, nil); err != nil {
			t.Fatal(err)
		}
		best = min(best, time.Since(start))
		h.gone(b, rec)
	}
	t.Logf("best of 5: %s", best)
	if best > 2*time.Second { // a few milliseconds on a quiet machine
		t.Errorf("took %s", best)
	}
}

func TestOwnerGone(t *testing.T) {
	h := newHost(t)
	keeper, owner := h.process("play-sleeper"), h.process("play-sleeper")
	b, rec := h.bottle(func(r *state.Record) { r.Keeper, r.Owner = &keeper, &owner })
	if all := h.collect(0); len(all) != 0 {
		t.Fatalf("%+v", all)
	}
	if err := state.Kill(owner, 0); err != nil {
		t.Fatal(err)
	}
	all := h.collect(0)
	if kinds(all) != "process socket folder" || all[0].Role != "keeper" {
		t.Fatalf("%+v", all)
	}
	if err := Apply(context.Background(), h.root, all, time.Now, 0, nil, Sources{}, func(orphan.Orphan) {}); err != nil {
		t.Fatal(err)
	}
	h.gone(b, rec)
}

func TestPidUsedAgain(t *testing.T) {
	h := newHost(t)
	bystander := h.process("play-sleeper")
	wrong := bystander
	wrong.StartTime--
	b, rec := h.bottle(func(r *state.Record) {
		r.Keeper = &wrong
		r.Processes = []state.Child{{Role: "gate", Process: wrong}}
	})
	if err := Remove(context.Background(), h.root, b, rec, nil); err != nil {
		t.Fatal(err)
	}
	h.gone(b, rec)
	if !state.Alive(bystander) {
		t.Error("another process was killed for having the pid")
	}
}

func TestBeingBorn(t *testing.T) {
	h := newHost(t)
	creator := h.process("play-sleeper")
	b, rec := h.bottle(func(r *state.Record) { r.Phase, r.Creator = state.Starting, creator })
	if all := h.collect(0); len(all) != 0 {
		t.Fatalf("%+v", all)
	}
	err := Remove(context.Background(), h.root, b, rec, nil)
	if e := fault.As(err); err == nil || e.Exit != fault.TempFail || e.Code != "being_born" {
		t.Fatalf("%v", err)
	}
	// The up itself takes back what it began.
	self, err := state.Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	rec.Creator = self
	if err := b.Save(rec); err != nil {
		t.Fatal(err)
	}
	if err := Remove(context.Background(), h.root, b, rec, nil); err != nil {
		t.Fatal(err)
	}
	h.gone(b, rec)
}

func TestNoRecord(t *testing.T) {
	h := newHost(t)
	b, rec := h.bottle(func(*state.Record) {})
	if err := os.WriteFile(b.Path("record.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if all := h.collect(time.Minute); len(all) != 0 {
		t.Fatalf("young: %+v", all)
	}
	all := h.collect(0)
	if kinds(all) != "socket folder" {
		t.Fatalf("%+v", all)
	}
	// Somebody holds its lock: no orphan now.
	lock, err := b.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if held := h.collect(0); len(held) != 0 {
		t.Errorf("locked: %+v", held)
	}
	lock.Close()
	if err := Apply(context.Background(), h.root, all, time.Now, 0, nil, Sources{}, func(orphan.Orphan) {}); err != nil {
		t.Fatal(err)
	}
	h.gone(b, rec)
}

// What was an orphan when it was listed may have changed by the time it is
// removed.
func TestJudgedAgain(t *testing.T) {
	h := newHost(t)
	dead := h.dead()
	b, rec := h.bottle(func(r *state.Record) { r.Keeper = &dead })
	all := h.collect(0)
	alive := h.process("play-sleeper")
	rec.Keeper = &alive
	if err := b.Save(rec); err != nil {
		t.Fatal(err)
	}
	if err := Apply(context.Background(), h.root, all, time.Now, 0, nil, Sources{}, func(orphan.Orphan) {}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Load(); err != nil || !state.Alive(alive) {
		t.Errorf("a bottle that came to life was removed: %v", err)
	}
}

func TestForeignRecords(t *testing.T) {
	h := newHost(t)
	dead := h.dead()
	b, _ := h.bottle(func(r *state.Record) { r.Keeper, r.UID = &dead, os.Geteuid()+1 })
	if all := h.collect(0); len(all) != 0 {
		t.Errorf("%+v", all)
	}
	err := Remove(context.Background(), h.root, b, &state.Record{ID: b.ID, UID: os.Geteuid() + 1}, nil)
	if err == nil || fault.As(err).Exit != fault.NoPerm {
		t.Errorf("%v", err)
	}
	later, _ := h.bottle(func(r *state.Record) { r.Keeper, r.Format = &dead, "2.0" })
	_, err = Collect(context.Background(), h.root, time.Now(), 0, Sources{})
	if err == nil || !strings.Contains(err.Error(), later.ID) || !strings.Contains(err.Error(), `"2.0"`) {
		t.Errorf("%v", err)
	}
}

func TestSockets(t *testing.T) {
	h := newHost(t)
	h.bottle(func(r *state.Record) { alive := h.process("play-sleeper"); r.Keeper = &alive })
	used, stale := filepath.Join(h.root.RunDir, "11111111"), filepath.Join(h.root.RunDir, "22222222")
	for _, d := range []string{used, stale} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// Of a bottle that another state folder holds.
	l, err := net.Listen("unix", used+"/keeper.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale + "/keeper.sock"})
	if err != nil {
		t.Fatal(err)
	}
	s.SetUnlinkOnClose(false)
	s.Close()
	if all := h.collect(time.Minute); len(all) != 0 {
		t.Errorf("young: %+v", all)
	}
	all := h.collect(0)
	if kinds(all) != "socket" || all[0].Path != stale {
		t.Fatalf("%+v", all)
	}
	if err := Apply(context.Background(), h.root, all, time.Now, 0, nil, Sources{}, func(orphan.Orphan) {}); err != nil {
		t.Fatal(err)
	}
	if left := h.collect(0); len(left) != 0 {
		t.Errorf("%+v", left)
	}
}

// fakeEngine notes what it is asked; only Delete is called by a reaper.
type fakeEngine struct {
	engine.Engine
	err  error
	refs *[]engine.Ref
}

func (e fakeEngine) Delete(_ context.Context, r engine.Ref) error {
	*e.refs = append(*e.refs, r)
	return e.err
}

func TestEngineThatFailsKeepsTheRecord(t *testing.T) {
	h := newHost(t)
	dead, gate := h.dead(), h.process("play-sleeper")
	b, rec := h.bottle(func(r *state.Record) {
		r.Keeper, r.Engine = &dead, "gvisor"
		r.Processes = []state.Child{{Role: "gate", Process: gate}}
	})
	var refs []engine.Ref
	broken := errors.New("broken")
	engines := func(name string) engine.Engine {
		if name != "gvisor" {
			t.Errorf("asked for %q", name)
		}
		return fakeEngine{err: broken, refs: &refs}
	}
	err := Remove(context.Background(), h.root, b, rec, engines)
	if !errors.Is(err, broken) || len(refs) != 1 || refs[0].ID != b.ID || refs[0].Dir != b.Dir || refs[0].RunDir != rec.RunDir {
		t.Fatalf("%v, %+v", err, refs)
	}
	if state.Alive(gate) {
		t.Error("the processes were not ended")
	}
	if _, err := b.Load(); err != nil {
		t.Errorf("the record is gone: %v", err)
	}
	broken = nil
	if err := Remove(context.Background(), h.root, b, rec, engines); err != nil {
		t.Fatal(err)
	}
	h.gone(b, rec)
}

func TestSourcesAndErrors(t *testing.T) {
	h := newHost(t)
	swept, deleted, ended := 0, []string{}, []string{}
	src := Sources{
		Machines: func(context.Context) ([]orphan.VM, error) {
			return []orphan.VM{{Name: "lost-11111111"}, {Name: "stuck-22222222"}}, nil
		},
		DeleteMachine: func(_ context.Context, name string) error {
			deleted = append(deleted, name)
			if strings.HasPrefix(name, "stuck") {
				return fault.New(fault.Unavailable, "stuck", "%s is stuck", name)
			}
			return nil
		},
		StaleCache: func() ([]string, error) { return []string{"/c/tmp-1", "/c/tmp-2"}, nil },
		SweepCache: func() error { swept++; return nil },
		Packers: func() []orphan.Packer {
			self, err := state.Identify(os.Getpid())
			if err != nil {
				t.Fatal(err)
			}
			gone := self
			gone.StartTime++
			return []orphan.Packer{{Process: self, For: self}, {Process: self, For: gone, Dir: "/vms/1"}}
		},
		EndPacker: func(_ context.Context, p orphan.Packer) error { ended = append(ended, p.Dir); return nil },
	}
	f, err := Collect(context.Background(), h.root, time.Now(), time.Minute, src)
	if err != nil {
		t.Fatal(err)
	}
	done := 0
	err = Apply(context.Background(), h.root, orphan.Decide(f), time.Now, time.Minute, nil, src, func(orphan.Orphan) { done++ })
	if err == nil || !strings.Contains(err.Error(), "stuck-22222222 is stuck") || done != 4 || swept != 1 || len(deleted) != 2 || len(ended) != 1 || ended[0] != "/vms/1" {
		t.Errorf("%v, %d done, %d swept, deleted %q", err, done, swept, deleted)
	}
	broken := errors.New("broken")
	src.Machines = func(context.Context) ([]orphan.VM, error) { return nil, broken }
	f, err = Collect(context.Background(), h.root, time.Now(), time.Minute, src)
	if !errors.Is(err, broken) || len(f.Cache) != 2 {
		t.Errorf("one source that fails hides another: %v, %+v", err, f.Cache)
	}
}

// Two at the same bottle: both succeed.
func TestTwoAtOnce(t *testing.T) {
	h := newHost(t)
	keeper := h.process("play-sleeper")
	b, rec := h.bottle(func(r *state.Record) { r.Keeper = &keeper })
	errs := make(chan error, 8)
	for range cap(errs) {
		go func() { errs <- Remove(context.Background(), h.root, b, rec, nil) }()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	h.gone(b, rec)
}

// A keeper that was killed could not sweep the workspace any more.
func TestSweepsForADeadKeeper(t *testing.T) {
	for _, booted := range []bool{false, true} {
		h := newHost(t)
		ws := t.TempDir()
		g, err := gitguard.Plan(gitguard.Options{Workspace: ws, Mode: "rw"})
		if err != nil {
			t.Fatal(err)
		}
		dead := h.dead()
		if booted {
			dead.BootID = "before"
		}
		b, rec := h.bottle(func(r *state.Record) { r.Keeper, r.Workspace = &dead, ws })
		if err := g.Persist(b.Path(gitguard.StateFile)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(ws, ".git"), []byte("gitdir: evil"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Remove(context.Background(), h.root, b, rec, nil); err != nil {
			t.Fatal(err)
		}
		h.gone(b, rec)
		if _, err := os.Lstat(filepath.Join(ws, ".git")); (err == nil) != booted {
			t.Errorf("after a reboot %v: %v", booted, err)
		}
		if _, err := os.Lstat(filepath.Join(h.root.Dir, "aside", b.ID, "001-.git")); (err == nil) == booted {
			t.Errorf("after a reboot %v: set aside: %v", booted, err)
		}
	}
}

// Removal goes neither through a symlink nor through a mount.
func TestStaysInside(t *testing.T) {
	h := newHost(t)
	outside := t.TempDir()
	keep := filepath.Join(outside, "keep")
	if err := os.WriteFile(keep, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dead := h.dead()
	b, rec := h.bottle(func(r *state.Record) { r.Keeper = &dead })
	if err := os.Symlink(outside, b.Path("link")); err != nil {
		t.Fatal(err)
	}
	mounted := b.Path("a mount")
	if err := os.Mkdir(mounted, 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := bindMount(outside, mounted); err != nil {
			t.Logf("NOT SHOWN for mounts: %v", err)
		} else {
			t.Cleanup(func() { _ = unmountBelow(mounted) })
			all := h.collect(0)
			if !slices.ContainsFunc(all[len(all)-1].Evidence, func(s string) bool { return strings.HasSuffix(s, "/a mount") }) {
				t.Errorf("the mount is no evidence: %+v", all)
			}
		}
	} else {
		t.Log("NOT SHOWN for mounts: not root")
	}
	if err := Remove(context.Background(), h.root, b, rec, nil); err != nil {
		t.Fatal(err)
	}
	h.gone(b, rec)
	if _, err := os.Stat(keep); err != nil {
		t.Errorf("removed through a link or a mount: %v", err)
	}
}

func TestRunDirOfOthers(t *testing.T) {
	h := newHost(t)
	dead := h.dead()
	b, rec := h.bottle(func(r *state.Record) { r.Keeper = &dead })
	if err := os.Chmod(h.root.RunDir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := Remove(context.Background(), h.root, b, rec, nil); err == nil || fault.As(err).Code != "bad_state_dir" {
		t.Errorf("%v", err)
	}
	if _, err := b.Load(); err != nil {
		t.Errorf("the record is gone: %v", err)
	}
}
