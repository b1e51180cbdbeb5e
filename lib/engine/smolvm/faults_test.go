//go:build linux

package smolvm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
)

const lsItem = `{"name":%q,"state":%q,"created_at":%d,"labels":%s}`

// What is listed as ours carries both labels; anything may stand beside it.
func TestOwned(t *testing.T) {
	dir := t.TempDir()
	tag := stateTag(dir)
	ours := fmt.Sprintf(`{"owner":"bottle","bottle-state":%q}`, tag)
	self, err := state.Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	check := fmt.Sprintf(`{"owner":"bottle","bottle-state":%q,%q:%q}`, tag, labelMaker, maker()[0].Value)
	items := []string{
		fmt.Sprintf(lsItem, "dev-00000001", "running", 1000, ours),
		fmt.Sprintf(lsItem, "dev-00000002", "running", 1000, `{}`),
		fmt.Sprintf(lsItem, "dev-00000003", "running", 1000, `{"owner":"bottle"}`),
		fmt.Sprintf(lsItem, "dev-00000004", "running", 1000, `{"owner":"bottle","bottle-state":"0123456789abcdef"}`),
		fmt.Sprintf(lsItem, "dev-00000005", "running", 1000, `{"owner":["bottle"],"bottle-state":null}`),
		fmt.Sprintf(lsItem, "dev-00000006", "running", 1000, `null`),
		fmt.Sprintf(lsItem, "dev-00000007", "dreaming", 1000, ours),
		`{"name":"dev-00000008","labels":` + ours + `,"state":null,"created_at":"soon","pid":-1,"new":{"x":[1]}}`,
		fmt.Sprintf(lsItem, "bottle-check-00000009", "created", 1000, check),
	}
	e, _ := scripted(t, version("1.9.1"), answer(0, "["+strings.Join(items, ",")+"]", "", "machine", "ls", "--json"))
	got, err := e.Owned(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, o := range got {
		names = append(names, o.Name+" "+o.State)
	}
	if want := "[dev-00000001 running dev-00000007 dreaming dev-00000008  bottle-check-00000009 created]"; fmt.Sprint(names) != want {
		t.Fatalf("%v, want %v", names, want)
	}
	if !got[0].Created.Equal(time.Unix(1000, 0)) || !got[2].Created.IsZero() || got[0].Maker != nil || got[3].Maker == nil || *got[3].Maker != self {
		t.Errorf("%+v", got)
	}
	for _, bad := range []string{"null", "", "{}", "[null]", `[{"name":null}]`, "[", "[]]", "\x00"} {
		e, _ := scripted(t, version("1.9.1"), answer(0, bad, "what it says\x1b[31m\n", "machine", "ls", "--json"))
		_, err := e.Owned(t.Context(), dir)
		wantFault(t, err, fault.Unavailable, "smolvm_garbage")
	}
	old, _ := scripted(t, version("1.7.9"))
	if list, err := old.Owned(t.Context(), dir); list != nil || err != nil {
		t.Errorf("a smolvm that is too old for a bottle: %v, %v", list, err)
	}
}

// Between list and delete the name can become another machine's.
func TestDeleteOwned(t *testing.T) {
	dir := t.TempDir()
	ours := fmt.Sprintf(`{"owner":"bottle","bottle-state":%q}`, stateTag(dir))
	status := []string{"machine", "status", "--name", "dev-00000001", "--json"}
	listed := Owned{Name: "dev-00000001", Created: time.Unix(1000, 0)}
	dataDir := answer(1, "", notFound, "machine", "data-dir", "--name", "dev-00000001")
	deleted := answer(0, "Deleted machine: x\n", "", "machine", "delete", "--name", "dev-00000001", "-f")
	empty := answer(0, "[]", "", "machine", "ls", "--json")
	for name, c := range map[string]struct {
		now    record
		delete bool
	}{
		"as it was":      {answer(0, fmt.Sprintf(lsItem, "dev-00000001", "running", 1000, ours), "", status...), true},
		"gone":           {answer(1, "", unknown, status...), false},
		"made anew":      {answer(0, fmt.Sprintf(lsItem, "dev-00000001", "running", 1001, ours), "", status...), false},
		"another's":      {answer(0, fmt.Sprintf(lsItem, "dev-00000001", "running", 1000, `{"owner":"bottle"}`), "", status...), false},
		"of no one":      {answer(0, fmt.Sprintf(lsItem, "dev-00000001", "running", 1000, `{}`), "", status...), false},
		"without labels": {answer(0, `{"name":"dev-00000001","created_at":1000}`, "", status...), false},
	} {
		e, f := scripted(t, version("1.9.1"), c.now, dataDir, deleted, empty)
		if err := e.DeleteOwned(t.Context(), dir, listed); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := strings.Contains(f.Calls(t), `"delete"`); got != c.delete {
			t.Errorf("%s: deleted %v\n%s", name, got, f.Calls(t))
		}
	}
	e, f := scripted(t, version("1.9.1"), answer(0, `{"name":"another"}`, "", status...), dataDir)
	wantFault(t, e.DeleteOwned(t.Context(), dir, listed), fault.Unavailable, "smolvm_garbage")
	if strings.Contains(f.Calls(t), `"delete"`) {
		t.Error("deleted after garbage")
	}
}

// A state folder that is reached by a symlink is the same.
func TestStateTag(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "l")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if stateTag(dir) != stateTag(link) || stateTag(dir) != stateTag(dir+"/") || stateTag(dir) == stateTag(filepath.Dir(dir)) {
		t.Error(stateTag(dir), stateTag(link))
	}
}

// play runs a script under the argv that smolvm's processes have.
func play(t *testing.T, argv ...string) *exec.Cmd {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, argv[0]), []byte("sleep 60 & wait\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("sh", argv...)
	c.Dir = dir
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	return c
}

// A call that a killed keeper has left is ended before the machine is: it would
// boot what is not there any more.
func TestDeleteEndsCallsInFlight(t *testing.T) {
	s := newSpec(t)
	if err := stage(s, nil); err != nil {
		t.Fatal(err)
	}
	start := play(t, "machine", "start", "--name", s.ID)
	create := play(t, "machine", "create", "--name", s.ID, "--cpus", "1")
	fork := play(t, "machine", "fork", "--golden", "bottle-warm-0", "--name", s.ID)
	branch := play(t, "machine", "branch", "--from", "bottle-warm-0", "--name", s.ID, "--no-wait-ready")
	becoming := play(t, inMountsVerb, "/opt/smolvm", "machine", "start", "--name", s.ID)
	other := play(t, "machine", "start", "--name", s.ID+"0")
	looks := play(t, "machine", "status", "--name", s.ID, "--json")
	time.Sleep(100 * time.Millisecond) // until each has its argv
	e, _ := scripted(t, version("1.9.1"),
		answer(1, "", unknown, "machine", "status", "--name", s.ID, "--json"),
		answer(1, "", notFound, "machine", "data-dir", "--name", s.ID))
	if err := e.Delete(t.Context(), refOf(s)); err != nil {
		t.Fatal(err)
	}
	if exists(start.Process.Pid) || exists(create.Process.Pid) || exists(fork.Process.Pid) || exists(branch.Process.Pid) || exists(becoming.Process.Pid) {
		t.Error("a call in flight goes on")
	}
	if !exists(other.Process.Pid) || !exists(looks.Process.Pid) {
		t.Error("another call was ended")
	}
}

// Without a smolvm the guest ends all the same; the record stays until smolvm can
// remove the rest.
func TestDeleteWithoutSmolvm(t *testing.T) {
	s := newSpec(t)
	if err := stage(s, nil); err != nil {
		t.Fatal(err)
	}
	rec, err := json.Marshal(machineRecord{Name: s.ID, DataDir: vmDir(s)})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(machineFile(s.Dir), rec, 0o600); err != nil {
		t.Fatal(err)
	}
	monitor := play(t, "_boot-vm", vmDir(s)+"/boot-config.json")
	time.Sleep(100 * time.Millisecond)
	e := New([]string{"PATH=/nonexistent"})
	wantFault(t, e.Delete(t.Context(), refOf(s)), fault.Unavailable, "smolvm_missing")
	if exists(monitor.Process.Pid) {
		t.Error("the guest runs on")
	}
	if _, err := os.Stat(machineFile(s.Dir)); err != nil {
		t.Errorf("what a second try needs is gone: %v", err)
	}
}

// smolvm's folder is closed before anything is in it, and never one that holds
// more than a machine.
func TestDataDir(t *testing.T) {
	s := newSpec(t)
	if err := stage(s, nil); err != nil {
		t.Fatal(err)
	}
	remembered := func(answered string) error {
		e, _ := scripted(t, version("1.9.1"), answer(0, answered+"\n", "", "machine", "data-dir", "--name", s.ID))
		c, err := e.client(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return remember(t.Context(), c, s.ID, s.Dir, nil)
	}
	for _, bad := range []string{"/", "/tmp", s.RunDir, s.Dir, filepath.Dir(s.Dir) + "/./", "/usr/"} {
		before, err := os.Stat(bad)
		if err != nil {
			t.Fatal(err)
		}
		wantFault(t, remembered(bad), fault.IO, "smolvm_data_dir")
		if after, err := os.Stat(bad); err != nil || after.Mode() != before.Mode() {
			t.Errorf("%s: %v, was %v", bad, after.Mode(), before.Mode())
		}
	}
	if err := remembered(vmDir(s)); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(vmDir(s)); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi, err)
	}
	file := filepath.Join(s.RunDir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantFault(t, remembered(filepath.Join(file, "vm")), fault.IO, "smolvm_data_dir")
}

// A folder that becomes a link, or another one, between check and mount is found
// out, and nothing is left of the start.
func TestExchangedFolder(t *testing.T) {
	s := newSpec(t)
	real := s.Workspace + ".real"
	if err := os.Rename(s.Workspace, real); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, s.Workspace); err != nil {
		t.Fatal(err)
	}
	status := []string{"machine", "status", "--name", s.ID, "--json"}
	e, f := scripted(t, version("1.9.1"), answer(1, "", unknown, status...), answer(1, "", notFound, "machine", "data-dir", "--name", s.ID))
	_, err := e.Start(t.Context(), s)
	wantFault(t, err, fault.NoPerm, "smolvm_mount_changed", s.Workspace)
	if strings.Contains(f.Calls(t), `"create"`) {
		t.Errorf("calls:\n%s", f.Calls(t))
	}

	// Exchanged after it was opened: the monitor has the other one.
	s = newSpec(t)
	other := t.TempDir()
	monitor := monitorFor(t, other, s.Binds[0].Source)
	e, f = scripted(t, version("1.9.1"),
		answer(0, created, "", createArgv(s)...),
		answer(0, vmDir(s)+"\n", "", "machine", "data-dir", "--name", s.ID),
		answer(0, "", starting, "machine", "start", "--name", s.ID),
		answer(0, statusJSON(s.ID, "running", monitor.Pid), "", "machine", "status", "--name", s.ID, "--json"),
		answer(0, "", "", awaits(s.ID)...),
		answer(0, "Deleted machine: x\n", "", "machine", "delete", "--name", s.ID, "-f"),
		answer(0, "[]\n", "", "machine", "ls", "--json"))
	_, err = e.Start(t.Context(), s)
	wantFault(t, err, fault.NoPerm, "smolvm_mount_changed", s.Workspace)
	if !strings.Contains(f.Calls(t), `"delete"`) {
		t.Errorf("calls:\n%s", f.Calls(t))
	}
	if _, err := os.Stat(ownDir(s.Dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("files are left: %v", err)
	}
}

// Of a monitor that tells nothing, the paths are looked at.
func TestExchangedFolderOfAPlainUser(t *testing.T) {
	s := newSpec(t)
	ps, err := pin([]smolvm.Volume{{Host: s.Workspace, Guest: "/workspace"}, {Host: s.RunDir, Guest: "/opt/x"}})
	if err != nil {
		t.Fatal(err)
	}
	defer ps.close()
	if err := ps.still(); err != nil {
		t.Error(err)
	}
	if got := fmt.Sprint(ps.folders()); got != "[/workspace /opt/x]" {
		t.Error(got)
	}
	// What the helper tells, and that of a guest with other folders.
	asked := func(paths ...string) error {
		inodes, err := guest.Inodes(paths)
		if err != nil {
			t.Error(err)
		}
		return ps.seen(inodes)
	}
	if err := asked(s.Workspace, s.RunDir); err != nil {
		t.Error(err)
	}
	wantFault(t, asked(s.RunDir, s.Workspace), fault.NoPerm, "smolvm_mount_changed", "the guest has another folder")
	wantFault(t, asked(s.Workspace), fault.NoPerm, "smolvm_mount_changed", s.RunDir)
	if err := errors.Join(os.Rename(s.Workspace, s.Workspace+".real"), os.Mkdir(s.Workspace, 0o755)); err != nil {
		t.Fatal(err)
	}
	wantFault(t, ps.still(), fault.NoPerm, "smolvm_mount_changed", "another folder")
	if err := errors.Join(os.Remove(s.Workspace), os.Symlink(s.Workspace+".real", s.Workspace)); err != nil {
		t.Fatal(err)
	}
	wantFault(t, ps.still(), fault.NoPerm, "smolvm_mount_changed", s.Workspace)
}

// A target that smolvm would read in another way is refused; whatever stands in
// a host path is not smolvm's to interpret.
func TestMountTargets(t *testing.T) {
	for _, target := range []string{"/opt/x:ro", "/opt/x:rw", "/opt:/workspace", "/:"} {
		s := newSpec(t)
		s.Binds = []engine.Bind{{Source: s.RunDir, Target: target, ReadOnly: true}}
		e, _ := scripted(t, version("1.9.1"))
		wantFault(t, e.Prepare(t.Context(), s), fault.Host, "smolvm_mount_target")
	}
	s := newSpec(t)
	if err := os.Remove(s.Binds[0].Source); err != nil { // since it was resolved
		t.Fatal(err)
	}
	e, _ := scripted(t, version("1.9.1"))
	wantFault(t, e.Prepare(t.Context(), s), fault.NoInput, "no_mount", s.Binds[0].Source)
}
