//go:build linux

package smolvm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"
)

// begin starts a script that runs on while the test does something to it. end
// waits for it.
func (w *world) begin(script string) (cmd *exec.Cmd, end func() result) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	cmd = exec.CommandContext(ctx, "/bin/sh", "-c", script)
	cmd.Dir, cmd.Env = w.dir, w.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	return cmd, func() result {
		defer cancel()
		_ = cmd.Wait()
		return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
	}
}

// awaited polls until f gives something.
func awaited(t *testing.T, limit time.Duration, what string, f func() string) string {
	t.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if s := f(); s != "" {
			return s
		}
	}
	t.Fatalf("after %s: no %s", limit, what)
	return ""
}

// processesOf gives the pids of the user's processes with all parts in their argv.
func (w *world) processesOf(parts ...string) (pids []int) {
	entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		w.t.Fatal(err)
	}
next:
	for _, e := range entries {
		b, err := os.ReadFile(e)
		fi, serr := os.Stat(filepath.Dir(e))
		if err != nil || serr != nil || fi.Sys().(*syscall.Stat_t).Uid != w.cred.Uid {
			continue
		}
		line := strings.ReplaceAll(string(b), "\x00", " ")
		for _, p := range parts {
			if !strings.Contains(line, p) {
				continue next
			}
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(e)))
		if err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func one(pids []int) string {
	if len(pids) == 0 {
		return ""
	}
	return strconv.Itoa(pids[0])
}

// dataDir is smolvm's folder for a machine.
func (w *world) dataDir(id string) string {
	return strings.TrimSpace(w.ok("$BOTTLE_SMOLVM machine data-dir --name " + id))
}

func tooSlow(r result) bool { return strings.Contains(r.err, "did not become ready within") }

// watched starts a bottle, and notes whether smolvm's folder was open meanwhile.
func watched(w *world, open *string) result {
	_, end := w.begin("bottle-plan sh | bottle-vm up --print-id")
	booted := make(chan result, 1)
	go func() { booted <- end() }()
	for {
		select {
		case r := <-booted:
			return r
		case <-time.After(20 * time.Millisecond):
		}
		for _, pid := range w.processesOf("_boot-vm") {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			argv := strings.Split(string(b), "\x00")
			if len(argv) < 3 {
				continue
			}
			dir := filepath.Dir(argv[2])
			if fi, err := os.Stat(dir); err == nil && fi.Mode().Perm()&0o077 != 0 {
				*open = dir + " " + fi.Mode().String()
			}
		}
	}
}

// A guest that stops answering, and one that is deleted behind our back.
func TestFaultsOfAGuest(t *testing.T) {
	w := newWorld(t, "user")
	w.manifest("")

	// Its sockets are nobody else's at any time of the boot. smolvm itself gives a
	// boot 30 seconds, which a busy host that emulates does not always make.
	open := ""
	var r result
	for try, looking := 1, true; looking || r.code == 78 && tooSlow(r) && try <= 5; try++ {
		r, looking = watched(w, &open), false
	}
	if r.code != 0 {
		t.Fatalf("up: %+v", r)
	}
	if open != "" {
		t.Errorf("smolvm's folder was open to others while the guest booted: %s", open)
	}
	id := strings.TrimSpace(r.out)
	w.ok("bottle-vm exec " + id + " -- true")
	monitor, err := strconv.Atoi(awaited(t, time.Minute, "monitor", func() string { return one(w.processesOf("_boot-vm", w.dataDir(id)+"/")) }))
	if err != nil {
		t.Fatal(err)
	}

	// Frozen in the middle of a command: Ctrl-C still works.
	cmd, end := w.begin("exec bottle-vm exec " + id + " -- sh -c 'echo began >/workspace/began; exec sleep 10000'")
	awaited(t, 2*time.Minute, "command", func() string { b, _ := os.ReadFile(filepath.Join(w.dir, "ws", "began")); return string(b) })
	if err := syscall.Kill(monitor, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	_ = cmd.Process.Signal(syscall.SIGINT)
	if r := end(); r.code != 125 || !strings.Contains(r.err, "does not answer") || time.Since(begun) > 2*time.Minute {
		t.Errorf("exec of a frozen guest, interrupted, after %s: %+v", time.Since(begun), r)
	} else {
		t.Logf("interrupted after %s: %s", time.Since(begun).Round(100*time.Millisecond), r.err)
	}
	begun = time.Now()
	if r := w.sh("bottle-vm exec " + id + " -- true"); r.code != 125 || !strings.Contains(r.err, "does not answer") {
		t.Errorf("exec of a frozen guest: %+v", r)
	}
	t.Logf("given up after %s", time.Since(begun).Round(100*time.Millisecond))
	if r := w.sh("bottle-vm exec --timeout 5s " + id + " -- true"); r.code != 124 && r.code != 125 {
		t.Errorf("exec --timeout of a frozen guest: %+v", r)
	}
	if err := syscall.Kill(monitor, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if r := w.sh("bottle-vm exec " + id + " -- true"); r.code != 0 {
		t.Errorf("it goes on, and does not answer: %+v", r)
	}

	// A machine of somebody else that looks like ours.
	w.ok("$BOTTLE_SMOLVM machine create --name sh-00000001 --cpus 1 --mem 256 --label owner=bottle")
	if r := w.sh("bottle-gc --apply --min-age 0s -v"); r.code != 0 || r.out != "" {
		t.Errorf("gc: %+v", r)
	}
	w.ok("$BOTTLE_SMOLVM machine delete -f --name sh-00000001")

	// Deleted behind our back.
	w.ok("$BOTTLE_SMOLVM machine delete -f --name " + id)
	awaited(t, time.Minute, "end that the keeper has seen", func() string {
		if gjson.Get(w.ok("bottle-vm status "+id), "phase").Str == "stopped" {
			return "stopped"
		}
		return ""
	})
	for script, code := range map[string]int{
		"bottle-vm exec " + id + " -- true":           125,
		"bottle-vm cp bottle.json " + id + ":/tmp/":   69,
		"bottle-vm cp " + id + ":/etc/passwd taken":   69,
		"bottle-vm stop " + id:                        0,
		"bottle-gc --check":                           0,
		"bottle-vm ls | grep '\"phase\":\"stopped\"'": 0,
	} {
		if r := w.sh(script); r.code != code || code != 0 && strings.Count(r.err, "\n") != 1 {
			t.Errorf("%s: %+v, want %d", script, r, code)
		}
	}
	w.ok("bottle-vm down " + id)
}

// Killed in the middle of a boot, and a workspace that is exchanged in it.
func TestFaultsOfABoot(t *testing.T) {
	w := newWorld(t, "user")
	w.manifest("")
	up, end := w.begin("bottle-plan sh | exec bottle-vm up")
	awaited(t, 2*time.Minute, "monitor", func() string { return one(w.processesOf("_boot-vm")) })
	keeper := w.processesOf("bottle-keeper")
	if len(keeper) != 1 {
		t.Fatalf("keepers: %v", keeper)
	}
	_ = syscall.Kill(keeper[0], syscall.SIGKILL)
	for _, pid := range w.processesOf("bottle-vm up") {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	_ = up.Process.Kill()
	end()
	r := w.sh("bottle-gc --min-age 0s")
	if r.code != 0 || !strings.Contains(r.out, `"kind":"folder"`) {
		t.Errorf("what is left is no orphan: %+v", r)
	}
	t.Logf("in flight: starts %v, monitors %v", w.processesOf("machine start --name"), w.processesOf("_boot-vm"))
	if r := w.sh("bottle-gc --apply --min-age 0s"); r.code != 0 || r.err != "" {
		t.Errorf("gc: %+v", r)
	}
	time.Sleep(5 * time.Second) // a start that goes on would boot by now
	if left := append(w.processesOf("machine start --name"), w.processesOf("_boot-vm")...); len(left) != 0 {
		t.Errorf("processes are left: %v", left)
	}

	// smolvm has the path by now, and opens it again.
	w.ok("mkdir other && echo wrong >other/marker && echo right >ws/marker")
	for try := 1; try == 1 || tooSlow(r) && try <= 5; try++ {
		w.ok("if [ -L ws ]; then rm ws && mv ws.real ws; fi")
		_, end = w.begin("bottle-plan sh | bottle-vm up --print-id")
		awaited(t, 2*time.Minute, "start", func() string { return one(w.processesOf("machine start --name")) })
		w.ok("mv ws ws.real && ln -s other ws")
		r = end()
	}
	if r.code == 0 {
		id := strings.TrimSpace(r.out)
		if got := w.ok("bottle-vm exec " + id + " -- cat /workspace/marker"); got != "right\n" {
			t.Errorf("the guest has what took the workspace's place: %q", got)
		} else {
			t.Error("the exchange came too late to prove anything")
		}
		w.ok("bottle-vm down " + id)
	} else if r.code != 77 || !strings.Contains(r.err, "was exchanged while the bottle was made") {
		t.Errorf("up: %+v", r)
	} else {
		t.Log(r.err)
	}
}
