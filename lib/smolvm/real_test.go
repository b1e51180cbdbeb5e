package smolvm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/smolfile"
	"github.com/bottle-tools/bottle/lib/smolvm/smolvmtest"
)

// The releases that the recordings were made from.
var realVersions = []string{"1.9.1", "1.32.2"}

// real gives a client of the real program with an empty state of its own.
func real(t *testing.T, version string) *Client {
	t.Helper()
	bin := smolvmtest.Real(t, version)
	home := t.TempDir()
	c, err := Open(t.Context(), bin, []string{"HOME=" + home, "PATH=/usr/bin:/bin"})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func each(t *testing.T, f func(t *testing.T, c *Client)) {
	for _, v := range realVersions {
		t.Run(v, func(t *testing.T) { f(t, real(t, v)) })
	}
}

func TestRealVersionAndHelp(t *testing.T) {
	each(t, func(t *testing.T, c *Client) {
		if !strings.HasSuffix(t.Name(), c.Version.String()) {
			t.Errorf("version %s", c.Version)
		}
		for _, sub := range [][]string{nil, {"machine", "create"}, {"machine", "exec"}, {"pack", "create"}} {
			if text, err := c.Help(t.Context(), sub...); err != nil || !strings.Contains(text, "Usage: smolvm") {
				t.Errorf("%q: %v, %.80q", sub, err, text)
			}
		}
		getenv := func(k string) string { return map[string]string{"BOTTLE_SMOLVM": c.Bin}[k] }
		if ok, err := IsAvailable(t.Context(), getenv, c.Env); !ok || err != nil {
			t.Errorf("IsAvailable: %v, %v", ok, err)
		}
	})
}

func TestRealMachineRecords(t *testing.T) {
	each(t, func(t *testing.T, c *Client) {
		ctx := t.Context()
		dir := t.TempDir()
		if list, err := c.MachineLs(ctx); err != nil || len(list) != 0 {
			t.Fatalf("ls: %v, %v", list, err)
		}
		spec := CreateSpec{
			CPUs: 2, MemMiB: 300, Labels: []Label{{"owner", "bottle"}, {"k", "a=b c"}}, Image: dir + "/",
			Volumes: []Volume{{dir, "/workspace", false}, {dir, "/opt/bottle", true}},
			Sockets: []Socket{{filepath.Join(dir, "gate.sock"), "/run/bottle/gate.sock"}},
			Command: []string{"/opt/bottle/guest", "--flag"},
		}
		name := "bottle-" + strings.Repeat("a", 121) // 128 characters: the longest
		if err := c.MachineCreate(ctx, name, spec); err != nil {
			t.Fatal(err)
		}
		m, err := c.MachineStatus(ctx, name)
		if err != nil || m.State != "created" || m.CPUs != 2 || m.MemoryMiB != 300 || m.PID != 0 || m.Network ||
			m.Labels["owner"] != "bottle" || m.Labels["k"] != "a=b c" || m.CreatedAt == 0 || !strings.Contains(m.Image, dir) {
			t.Errorf("status: %+v, %v", m, err)
		}
		if err := c.MachineCreate(ctx, name, CreateSpec{}); !errors.Is(err, ErrAlreadyExists) {
			t.Errorf("duplicate: %v", err)
		}
		if d, err := c.MachineDataDir(ctx, name); err != nil || !filepath.IsAbs(d) {
			t.Errorf("data-dir: %q, %v", d, err)
		}
		if err := c.MachineStop(ctx, name); err != nil {
			t.Errorf("stop of one that never ran: %v", err)
		}
		if _, err := c.MachineExec(ctx, name, ExecOptions{}, "true"); !errors.Is(err, ErrNotRunning) {
			t.Errorf("exec: %v", err)
		}
		if _, err := c.MachineExecAttached(ctx, name, Attached{}, "true"); !errors.Is(err, ErrNotRunning) {
			t.Errorf("exec attached: %v", err)
		}
		if err := c.MachineCp(ctx, "/etc/hostname", name+":/x"); !errors.Is(err, ErrNotRunning) {
			t.Errorf("cp: %v", err)
		}
		if err := c.MachineDelete(ctx, name); err != nil {
			t.Errorf("delete: %v", err)
		}
		if err := c.MachineDelete(ctx, name); !errors.Is(err, ErrNotFound) {
			t.Errorf("second delete: %v", err)
		}
		if list, err := c.MachineLs(ctx); err != nil || len(list) != 0 {
			t.Errorf("left over: %v, %v", list, err)
		}
	})
}

// The real, strict parsers take every field that a plan's Smolfile can have, and
// read it as it was meant; they take nothing that they do not know.
func TestRealSmolfile(t *testing.T) {
	each(t, func(t *testing.T, c *Client) {
		ctx, dir := t.Context(), t.TempDir()
		write := func(text string) string {
			path := filepath.Join(dir, "Smolfile")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			return path
		}
		odd := filepath.Join(dir, "a \"b\" = [x] é")
		if err := os.Mkdir(odd, 0o755); err != nil {
			t.Fatal(err)
		}
		b := &plan.Bottle{
			Env:       []plan.EnvVar{{Name: "LANG", Value: "C.UTF-8"}, {Name: "ODD", Value: "a \"b\"\n'c' \\ = é\t\x1b"}, {Name: "EMPTY"}},
			Resources: plan.Resources{CPUs: 3, MemoryMiB: 777},
		}
		f := smolfile.FromPlan(b)
		f.Entrypoint = []string{"/opt/bottle/guest", "init", "/opt/bottle/config.json"}
		f.Volumes = []string{odd + ":/workspace", dir + ":/opt/bottle:ro"}
		text, err := f.TOML()
		if err != nil {
			t.Fatal(err)
		}
		spec := CreateSpec{Labels: []Label{{"owner", "bottle"}}, Image: dir + "/", Smolfile: write(string(text)),
			Sockets: []Socket{{filepath.Join(dir, "gate.sock"), "/run/bottle/gate.sock"}}}
		if err := c.MachineCreate(ctx, "full", spec); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		m, err := c.MachineStatus(ctx, "full")
		if err != nil || m.CPUs != 3 || m.MemoryMiB != 777 || m.Mounts != 2 || m.Network || m.Labels["owner"] != "bottle" || !strings.HasPrefix(m.Image, "local-dir:") {
			t.Errorf("status: %+v, %v", m, err)
		}
		r, err := c.call(ctx, "machine status", DefaultTimeout, []string{"machine", "status", "--name", "full", "--json"})
		if got := gjson.GetBytes(r.Stdout, "entrypoint").Raw; err != nil || !slices.Equal(words(got), f.Entrypoint) {
			t.Errorf("entrypoint %s, %v", got, err)
		}
		// The section of a document is a whole Smolfile.
		b.Runtime.Candidates = []plan.Candidate{{Engine: "smolvm"}}
		section, err := smolfile.Section(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.MachineCreate(ctx, "section", CreateSpec{Image: dir + "/", Smolfile: write(section)}); err != nil {
			t.Errorf("%v\n%s", err, section)
		}
		for _, line := range []string{"cpuz = 2", "mount_sockets = [\"/a:/b\"]", "cpus = 256", "net = \"no\"", "[network]\nallow = []"} {
			err := c.MachineCreate(ctx, "bad", CreateSpec{Image: dir + "/", Smolfile: write(line + "\n")})
			var e *Error
			if !errors.As(err, &e) || !strings.Contains(e.Stderr, "TOML parse error") {
				t.Errorf("%q: %v", line, err)
			}
		}
		// What is in a pack cannot be described by a Smolfile as well.
		if err := c.MachineCreate(ctx, "bad", CreateSpec{From: filepath.Join(dir, "x.smolmachine"), Smolfile: write(section)}); !errors.Is(err, ErrUsage) {
			t.Errorf("--from with a Smolfile: %v", err)
		}
		if err := c.MachineCreate(ctx, "bad", CreateSpec{From: filepath.Join(dir, "x.smolmachine")}); err == nil || !strings.Contains(err.Error(), "file not found") {
			t.Errorf("--from of nothing: %v", err)
		}
	})
}

func words(jsonArray string) (all []string) {
	for _, v := range gjson.Parse(jsonArray).Array() {
		all = append(all, v.Str)
	}
	return all
}

func TestRealErrors(t *testing.T) {
	each(t, func(t *testing.T, c *Client) {
		ctx := t.Context()
		for _, name := range []string{"bad name!", "../x", "", "-x", "Vm_A.1", strings.Repeat("a", 129)} {
			if err := c.MachineCreate(ctx, name, CreateSpec{}); !errors.Is(err, ErrInvalidName) {
				t.Errorf("create %q: %v", name, err)
			}
		}
		for what, call := range map[string]func() error{
			"status": func() error { _, err := c.MachineStatus(ctx, "nope"); return err },
			"start":  func() error { return c.MachineStart(ctx, "nope") },
			"delete": func() error { return c.MachineDelete(ctx, "nope") },
			"exec":   func() error { _, err := c.MachineExec(ctx, "nope", ExecOptions{}, "true"); return err },
			"cp":     func() error { return c.MachineCp(ctx, "/etc/hostname", "nope:/tmp/x") },
			"dir":    func() error { _, err := c.MachineDataDir(ctx, "nope"); return err },
		} {
			if err := call(); !errors.Is(err, ErrNotFound) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if err := c.MachineCreate(ctx, "x", CreateSpec{Volumes: []Volume{{"/etc/hostname", "/x", false}}}); err == nil || !strings.Contains(err.Error(), "director") {
			t.Errorf("a file as a volume: %v", err)
		}
		if err := c.MachineCreate(ctx, "x", CreateSpec{Image: "./none.tar"}); !errors.Is(err, ErrFailed) && !errors.Is(err, ErrNotFound) {
			t.Errorf("no such image: %v", err)
		}
		old := *c
		old.Version = Version{1, 0, 1}
		if err := old.MachineCreate(ctx, "vm-pos", CreateSpec{}); !errors.Is(err, ErrUsage) {
			t.Errorf("positional name: %v", err)
		}
	})
}

// Flags that only newer releases have: used where they are, refused where not.
func TestRealNewerFlags(t *testing.T) {
	each(t, func(t *testing.T, c *Client) {
		ctx := t.Context()
		newer := !c.Version.Less(sinceStateDir)
		// smolvm itself, without the wrapper's knowledge of versions.
		help, err := c.Help(ctx, "machine", "create")
		if err != nil || strings.Contains(help, "--state-dir") != newer || strings.Contains(help, "--credential") != newer || strings.Contains(help, "--error-format") != newer {
			t.Errorf("machine create --help of %s: %v", c.Version, err)
		}
		there := *c
		there.StateDir = filepath.Join(t.TempDir(), "state")
		credential := CreateSpec{Credentials: []Credential{{"TOKEN", "TOKEN", []string{"api.example.com"}}}}
		createErr := there.MachineCreate(ctx, "a", CreateSpec{CPUs: 1, MemMiB: 256})
		credentialErr := c.MachineCreate(ctx, "b", credential)
		_, userErr := there.MachineExec(ctx, "a", ExecOptions{User: "1000"}, "id")
		if !newer {
			for flag, err := range map[string]error{"--state-dir": createErr, "--credential": credentialErr} {
				if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), flag) {
					t.Errorf("%s: %v", flag, err)
				}
			}
			if _, err := c.MachineExec(ctx, "a", ExecOptions{User: "1000"}, "id"); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "--user") {
				t.Errorf("--user: %v", err)
			}
			if list, err := c.MachineLs(ctx); err != nil || len(list) != 0 {
				t.Errorf("a refusal made something: %v, %v", list, err)
			}
			return
		}
		if err := errors.Join(createErr, credentialErr); err != nil {
			t.Fatal(err)
		}
		if !errors.Is(userErr, ErrNotRunning) {
			t.Errorf("exec --user on one that does not run: %v", userErr)
		}
		if m, err := c.MachineStatus(ctx, "b"); err != nil || !m.Network {
			t.Errorf("--credential does not imply a network any more: %+v, %v", m, err)
		}
		if _, err := c.MachineStatus(ctx, "a"); !errors.Is(err, ErrNotFound) {
			t.Errorf("--state-dir: found from without: %v", err)
		}
		if m, err := there.MachineStatus(ctx, "a"); err != nil || m.State != "created" {
			t.Errorf("--state-dir: %+v, %v", m, err)
		}
		if d, err := there.MachineDataDir(ctx, "a"); err != nil || !strings.HasPrefix(d, there.StateDir) {
			t.Errorf("--state-dir: data-dir %q, %v", d, err)
		}
		if err := errors.Join(there.MachineDelete(ctx, "a"), c.MachineDelete(ctx, "b")); err != nil {
			t.Error(err)
		}
	})
}

// A release that lacks flags and that nobody has seen: the old one, taken for a
// new one.
func TestRealUnknownNewerVersion(t *testing.T) {
	c := real(t, "1.9.1")
	c.Version = Version{9, 0, 0}
	ctx := t.Context()
	if err := c.MachineCreate(ctx, "a", CreateSpec{CPUs: 1, MemMiB: 256, Labels: []Label{{"owner", "bottle"}}, Sockets: []Socket{{"/run/a.sock", "/run/b.sock"}}}); err != nil {
		t.Errorf("without --error-format: %v", err)
	}
	if m, err := c.MachineStatus(ctx, "a"); err != nil || m.State != "created" {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := c.MachineExec(ctx, "a", ExecOptions{}, "true"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("exec: %v", err)
	}
	if err := c.MachineDelete(ctx, "a"); err != nil {
		t.Error(err)
	}
	if err := c.MachineDelete(ctx, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("second delete: %v", err)
	}
	c.StateDir = t.TempDir()
	if _, err := c.MachineLs(ctx); !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), "is smolvm 9.0.0, which does not know --state-dir") {
		t.Errorf("a flag that is gone: %v", err)
	}
	_, err := c.MachineExec(ctx, "a", ExecOptions{User: "1000"}, "id")
	if !errors.Is(err, ErrUsage) {
		t.Errorf("exec: %v", err)
	}
}

// On a host where no guest can run, start fails in time, says why, and delete
// leaves nothing. Where it can run, this is a boot.
func TestRealStartAndDelete(t *testing.T) {
	if testing.Short() {
		t.Skip("NOT RUN with -short: start takes up to 30 s where KVM cannot run guests")
	}
	c := real(t, "1.9.1")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := c.MachineCreate(ctx, "boot", CreateSpec{CPUs: 1, MemMiB: 256}); err != nil {
		t.Fatal(err)
	}
	err := c.MachineStart(ctx, "boot")
	if err != nil && !errors.Is(err, ErrNotReady) && !errors.Is(err, ErrBootExited) && !errors.Is(err, ErrKVM) {
		t.Errorf("start: %v", err)
	}
	if err != nil {
		t.Logf("no guest here: %v", err)
	} else if r, err := c.MachineExec(ctx, "boot", ExecOptions{}, "sh", "-c", "exit 3"); err != nil || r.Code != 3 {
		t.Errorf("exec: %+v, %v", r, err)
	}
	if err := c.MachineDelete(ctx, "boot"); err != nil {
		t.Errorf("delete: %v", err)
	}
	if left := monitors(t, envValue(c.Env, "HOME")); len(left) != 0 {
		t.Errorf("guest monitors left: %v", left)
	}
}

func envValue(env []string, name string) string {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

// monitors gives the command lines of guest monitors whose files are below dir.
func monitors(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil && bytes.Contains(data, []byte("_boot-vm\x00"+dir+"/")) {
			out = append(out, strings.ReplaceAll(string(data), "\x00", " "))
		}
	}
	return out
}
