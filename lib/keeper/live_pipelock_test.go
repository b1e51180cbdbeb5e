package keeper

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/pipelock/pipelocktest"
	"github.com/bottle-tools/bottle/lib/plan"
)

const recordings = "../../testscripts/transcripts/pipelock/reload.ndjson"

// fakeProgram makes a pipelock of this test binary that answers a reload with
// the recording of that name.
func fakeProgram(t *testing.T, play string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file, err := filepath.Abs(recordings)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "pipelock")
	script := fmt.Sprintf("#!/bin/sh\nFAKE_PIPELOCK='%s' FAKE_RECORDINGS='%s' exec '%s' \"$@\"\n", play, file, self)
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// fakePipelock speaks as much of the protocol as a keeper needs: its health
// page, a refusal for everybody, and a reload.
func fakePipelock(play string, argv []string) int {
	if argv[0] == "--version" {
		fmt.Println("pipelock version 2.3.0")
		return 0
	}
	file := argv[2]
	listen := ""
	raw, err := os.ReadFile(file)
	if err != nil {
		return 99
	}
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "listen: "); ok {
			listen = v
		}
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			fmt.Fprint(w, `{"status":"healthy"}`)
			return
		}
		fmt.Printf(`{"level":"warn","event":"blocked","method":"CONNECT","target":%q,"scanner":"allowlist"}`+"\n", r.Host)
		http.Error(w, "CONNECT blocked: domain not in allowlist", http.StatusForbidden)
	}))
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM)
	for sig := range signals {
		if sig != syscall.SIGHUP {
			return 0
		}
		fakeReload(play, file)
	}
	return 0
}

func fakeReload(play, file string) {
	raw, err := os.ReadFile(file)
	if err != nil {
		panic(err)
	}
	sum := sha256.Sum256(raw)
	recorded, err := os.ReadFile(os.Getenv("FAKE_RECORDINGS"))
	if err != nil {
		panic(err)
	}
	for line := range strings.Lines(string(recorded)) {
		var r struct{ Name, Stderr, Log string }
		if json.Unmarshal([]byte(line), &r) != nil || r.Name != play {
			continue
		}
		fmt.Fprint(os.Stderr, r.Stderr)
		for line := range strings.Lines(r.Log) {
			var m map[string]any
			if json.Unmarshal([]byte(line), &m) == nil && m["config_hash"] != nil {
				line = strings.Replace(line, m["config_hash"].(string), hex.EncodeToString(sum[:]), 1)
			}
			fmt.Println(strings.TrimRight(line, "\n"))
		}
	}
}

func (k *keeper) runFile(t testing.TB) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(k.bottle.Dir, "pipelock", "conf", "pipelock.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(raw)
	if got := "sha256:" + hex.EncodeToString(sum[:]); got != k.proxy.ref().RunConfigSHA256 {
		t.Errorf("the file is %s, and pipelock said it runs with %s", got, k.proxy.ref().RunConfigSHA256)
	}
	return string(raw)
}

func planned() plan.Rule {
	r := allowing("planned.test", 443)
	r.From = "bottle.json:1:1"
	return r
}

func denyingRange(cidr string) plan.Rule {
	return plan.Rule{CIDR: cidr, Ports: []int{}, Protocol: "any", Verdict: "deny", Class: "cidr"}
}

// What is opened goes through pipelock as well, by a reload that it confirms,
// and what is closed is taken away from it.
func TestLiveThroughPipelock(t *testing.T) {
	k := proxied(t, fakeProgram(t, "reload-add-host"), planned())
	proxy, gate := k.proxy.proc, k.gate.get()
	for _, tt := range []struct {
		c          control.Change
		want, gone string
	}{
		{added(allowing("new.test", 443)), "  - new.test\n", ""},
		{added(denying("planned.test")), "blocklist:\n      - planned.test\n", ""},
		{added(denyingRange("8.8.0.0/16")), "  - 8.8.0.0/16\n", ""},
		{control.Change{All: true}, "  - planned.test\n", "new.test"},
	} {
		if code := k.try(tt.c); code != "" {
			t.Fatalf("%+v: %s", tt.c, code)
		}
		y := k.runFile(t)
		if !strings.Contains(y, tt.want) || tt.gone != "" && strings.Contains(y, tt.gone) {
			t.Errorf("%+v:\n%s", tt.c, y)
		}
	}
	// What pipelock does not carry, it is not told of.
	before := k.runFile(t)
	ssh := allowing("git.test", 22)
	ssh.Protocol = "ssh"
	if code := k.try(added(ssh)); code != "" || k.runFile(t) != before {
		t.Errorf("%q, and pipelock was told", code)
	}
	if k.proxy.proc != proxy || k.gate.get() != gate {
		t.Error("a process was replaced for what a reload can do")
	}
	k.gateHas(t, "allow git.test")
}

// Where pipelock refuses a reload it is restarted, at the same place, so that
// the gate stays.
func TestLiveRestartsPipelock(t *testing.T) {
	k := proxied(t, fakeProgram(t, "reload-add-trusted-domain"), planned())
	addr, pid, gate := k.proxy.addr(), k.proxy.proc.PID(), k.gate.get()
	if code := k.try(added(allowing("new.test", 443))); code != "" {
		t.Fatal(code)
	}
	if !strings.Contains(k.runFile(t), "  - new.test\n") || k.proxy.proc.PID() == pid {
		t.Errorf("process %d, before %d:\n%s", k.proxy.proc.PID(), pid, k.runFile(t))
	}
	if k.proxy.addr() != addr {
		t.Skipf("SKIPPED: somebody else took the port %s meanwhile", addr)
	}
	if k.gate.get() != gate {
		t.Error("the gate was replaced")
	}
	k.gateHas(t, "allow new.test")
}

// A pipelock that dies comes back with what was added.
func TestLiveOutlivesPipelock(t *testing.T) {
	k := proxied(t, fakeProgram(t, "reload-add-host"), planned())
	if code := k.try(added(allowing("new.test", 443))); code != "" {
		t.Fatal(code)
	}
	pid := k.proxy.proc.PID()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		k.proxy.mu.Lock()
		now := k.proxy.proc.PID()
		k.proxy.mu.Unlock()
		if now != pid {
			break
		}
		if i == 6000 {
			t.Fatal("no new pipelock")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !strings.Contains(k.runFile(t), "  - new.test\n") {
		t.Error(k.runFile(t))
	}
}

// More hosts than pipelock is given are refused, and nothing changes.
func TestLiveTooManyForPipelock(t *testing.T) {
	rules := []plan.Rule{planned()}
	for i := range 1999 {
		r := allowing(fmt.Sprintf("h%d.test", i), 443)
		r.From = "bottle.json:1:1"
		rules = append(rules, r)
	}
	k := proxied(t, fakeProgram(t, "reload-add-host"), rules...)
	if code := k.try(added(allowing("new.test", 443))); code != "too_many_hosts" {
		t.Error(code)
	}
	k.gateHas(t)
}

// The real program takes each kind of change by a reload.
func TestLiveRealPipelock(t *testing.T) {
	k := proxied(t, pipelocktest.Path(t), planned())
	proc := k.proxy.proc
	for _, c := range []control.Change{
		added(allowing("new.test", 443)), added(denying("planned.test")), added(denyingRange("8.8.0.0/16")), {All: true},
	} {
		if code := k.try(c); code != "" {
			t.Fatalf("%+v: %s", c, code)
		}
		k.runFile(t)
		if k.proxy.proc != proc {
			t.Errorf("%+v needed a restart", c)
			proc = k.proxy.proc
		}
	}
}

// Through pipelock a widening is in force when it has confirmed it.
func BenchmarkLiveChangePipelock(b *testing.B) {
	program := os.Getenv("BOTTLE_PIPELOCK")
	if program == "" {
		b.Skip("SKIPPED: BOTTLE_PIPELOCK is not set, so there is no real pipelock to be measured")
	}
	k := proxied(b, program, planned())
	l, err := k.control()
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	for _, change := range []string{"allow", "revert"} {
		b.Run(change, func(b *testing.B) {
			b.StopTimer()
			for i := range b.N {
				host := fmt.Sprintf("h%d.test", i)
				allow := added(allowing(host, 443))
				revert := control.Change{Revert: []control.Target{{Host: host}}}
				timed, other := &allow, &revert
				if change == "revert" {
					timed, other = other, timed
				}
				if change == "revert" {
					ask(b, k, other)
				}
				b.StartTimer()
				ask(b, k, timed)
				b.StopTimer()
				if change == "allow" {
					ask(b, k, other)
				}
			}
		})
	}
}

func ask(b *testing.B, k *keeper, c *control.Change) {
	b.Helper()
	if _, err := control.Ask(k.rec.RunDir, control.Request{Do: "change", Change: c}, time.Minute); err != nil {
		b.Fatal(err)
	}
}
