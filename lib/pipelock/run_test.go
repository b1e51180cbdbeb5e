package pipelock

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

func sha(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func wantFault(t *testing.T, err error, code string, text string) {
	t.Helper()
	f := fault.As(err)
	if err == nil || f.Exit != fault.Unavailable || f.Code != code || !strings.Contains(f.Error(), text) {
		t.Errorf("got %+v, want %s about %q", f, code, text)
	}
	if f != nil && (strings.Contains(f.Error(), "\n") || len(f.Error()) > 1200) {
		t.Errorf("not one short line: %q", f.Error())
	}
}

func TestFind(t *testing.T) {
	getenv := func(m map[string]string) func(string) string { return func(k string) string { return m[k] } }
	ok := fakeProgram(t, "version-2.3.0")
	dir := filepath.Dir(ok.Path)
	t.Chdir(dir)
	for _, env := range []map[string]string{
		{"BOTTLE_PIPELOCK": ok.Path},
		{"BOTTLE_PIPELOCK": "./pipelock"}, // the user's own word
		{"PATH": "/nonexistent:" + dir},
	} {
		p, err := Find(t.Context(), getenv(env))
		if err != nil || p.Path != ok.Path || p.Version != "2.3.0" {
			t.Errorf("%v: %+v %v", env, p, err)
		}
	}
	for _, v := range []string{"0.1.0-dev", "2-6-g40865129", "v2.2.0", "2.2.1", "3.0.0", "10.0.0"} {
		if _, err := Find(t.Context(), getenv(map[string]string{"BOTTLE_PIPELOCK": fakeProgram(t, "version-"+v).Path})); err != nil {
			t.Errorf("%s: %v", v, err)
		}
	}
	for _, v := range []string{"2.1.2", "1.9.0", "v2.0.0", "0.3.0"} {
		_, err := Find(t.Context(), getenv(map[string]string{"BOTTLE_PIPELOCK": fakeProgram(t, "version-"+v).Path}))
		wantFault(t, err, "proxy_too_old", v)
	}
	plain := filepath.Join(dir, "plain")
	os.WriteFile(plain, nil, 0o600)
	for _, env := range []map[string]string{
		{}, {"PATH": "."}, {"PATH": ":"}, {"PATH": "/nonexistent"},
		{"BOTTLE_PIPELOCK": "/nonexistent/pipelock", "PATH": dir}, {"BOTTLE_PIPELOCK": plain}, {"BOTTLE_PIPELOCK": dir},
	} {
		_, err := Find(t.Context(), getenv(env))
		wantFault(t, err, "proxy_missing", "")
	}
	for play, text := range map[string]string{"version-garbage": "is not pipelock", "version-fails": "cannot start"} {
		_, err := Find(t.Context(), getenv(map[string]string{"BOTTLE_PIPELOCK": fakeProgram(t, play).Path}))
		wantFault(t, err, "proxy_refuses", text)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	t0 := time.Now()
	_, err := Find(ctx, getenv(map[string]string{"BOTTLE_PIPELOCK": fakeProgram(t, "hang").Path}))
	wantFault(t, err, "proxy_refuses", "did not answer")
	if d := time.Since(t0); d > 30*time.Second {
		t.Errorf("a program that hangs was waited for %s", d)
	}
}

// Every recorded check, as the real program answered it.
func TestCheckAgainstRecordings(t *testing.T) {
	all, err := load(filepath.Join(recordings, "check.ndjson"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, r := range all {
		if len(r.Argv) != 4 { // check --url
			continue
		}
		n++
		err := fakeProgram(t, r.Name).Check(t.Context(), []byte(r.Config))
		if r.Exit == 0 {
			if err != nil {
				t.Errorf("%s: %v", r.Name, err)
			}
			continue
		}
		first, _, _ := strings.Cut(strings.TrimPrefix(r.Stderr, "Config validation FAILED: "), "\n")
		if len(first) > 200 {
			first = first[:200]
		}
		wantFault(t, err, "proxy_refuses", strings.Join(strings.Fields(first), " "))
	}
	if n < 30 {
		t.Fatalf("only %d recordings", n)
	}
}

func start(t *testing.T, play string) (*Proc, error) {
	t.Helper()
	p, err := fakeProgram(t, play).Start(t.Context(), Options{Dir: t.TempDir(), Policy: mustYAML(t, tls("a.example")), InstanceID: "dev-01234567"})
	if err == nil {
		t.Cleanup(func() { p.Stop() })
	}
	return p, err
}

func TestStartAndStop(t *testing.T) {
	t.Setenv("ANTHROPIC_API_KEY", "secret") // must not get through
	for _, play := range []string{"serve", "floods"} {
		p, err := start(t, play)
		if err != nil {
			t.Fatalf("%s: %v", play, err)
		}
		file, err := os.ReadFile(p.config)
		if err != nil || "sha256:"+sha(file) != p.RunConfigSHA256() {
			t.Errorf("%s: digest %s of %v", play, p.RunConfigSHA256(), err)
		}
		for path, mode := range map[string]os.FileMode{"conf": 0o700, "home": 0o700, "conf/pipelock.yaml": 0o600, "pipelock.log": 0o600} {
			if fi, err := os.Stat(filepath.Join(p.opts.Dir, path)); err != nil || fi.Mode().Perm() != mode {
				t.Errorf("%s: %v %v", path, fi, err)
			}
		}
		if p.PID() <= 1 || p.Addr().Port() == 0 {
			t.Errorf("pid %d, address %s", p.PID(), p.Addr())
		}
		if err := errors.Join(p.Stop(), p.Stop(), p.Wait()); err != nil {
			t.Error(err)
		}
		if _, err := net.DialTimeout("tcp", p.Addr().String(), time.Second); err == nil {
			t.Error("it still listens")
		}
		last := readLog(t, filepath.Join(p.opts.Dir, "pipelock.log"))
		if !strings.Contains(last[len(last)-1], `"event":"blocked"`) {
			t.Errorf("log ends in %q", last[len(last)-1])
		}
	}
}

func TestStartFailures(t *testing.T) {
	t.Parallel()
	for play, want := range map[string][2]string{
		// Recorded.
		"run-bad-config":        {"proxy_died", "field nope not found in type config.Config"},
		"run-port-in-use":       {"proxy_died", "address already in use"},
		"run-listen-unix":       {"proxy_died", "listen tcp: lookup tcp"},
		"run-secrets-file-perm": {"proxy_died", "unsafe permissions"},
		// Played.
		"dies":   {"proxy_died", "exit status 7"},
		"open":   {"proxy_unhealthy", "has to answer 403"},
		"silent": {"proxy_unhealthy", "log a refused request"},
	} {
		t.Run(play, func(t *testing.T) {
			t.Parallel()
			_, err := start(t, play)
			wantFault(t, err, want[0], want[1])
		})
	}
	t.Run("deaf", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		_, err := fakeProgram(t, "deaf").Start(ctx, Options{Dir: t.TempDir(), Policy: mustYAML(t, tls("a.example")), InstanceID: "x"})
		wantFault(t, err, "proxy_unhealthy", "did not answer")
	})
	t.Run("no program", func(t *testing.T) {
		t.Parallel()
		_, err := (&Program{Path: "/nonexistent/pipelock"}).Start(t.Context(), Options{Dir: t.TempDir(), Policy: mustYAML(t, tls("a.example")), InstanceID: "x"})
		wantFault(t, err, "proxy_refuses", "no such file")
	})
}

func TestStopInsists(t *testing.T) {
	t.Parallel()
	p, err := start(t, "stubborn")
	if err != nil {
		t.Fatal(err)
	}
	t0 := time.Now()
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if d := time.Since(t0); d < stopTimeout || d > stopTimeout+30*time.Second {
		t.Errorf("took %s", d)
	}
	wantFault(t, p.Wait(), "proxy_died", "signal: killed")
}

func TestReload(t *testing.T) {
	t.Parallel()
	for play, want := range map[string]string{
		"reload:reload-add-host":         "", // recorded
		"reload:reload-remove-host":      "",
		"reload:reload-mode-to-balanced": "rejected: security downgrade from strict mode",
		"reload:reload-bad-yaml":         "did not find expected node content",
		"reload:reload-empty-allowlist":  "strict mode requires at least one domain",
		"serve":                          "did not reload in time",
	} {
		t.Run(strings.TrimPrefix(play, "reload:"), func(t *testing.T) {
			t.Parallel()
			p, err := start(t, play)
			if err != nil {
				t.Fatal(err)
			}
			before, _ := os.ReadFile(p.config)
			hash := p.RunConfigSHA256()
			if err := p.Reload(t.Context(), mustYAML(t, tls("a.example"))); err != nil {
				t.Errorf("the same policy again: %v", err)
			}
			err = p.Reload(t.Context(), mustYAML(t, tls("a.example"), tls("b.example")))
			after, _ := os.ReadFile(p.config)
			if want == "" {
				if err != nil || !strings.Contains(string(after), "b.example") || p.RunConfigSHA256() != "sha256:"+sha(after) {
					t.Errorf("%v\n%s", err, after)
				}
				return
			}
			code := "proxy_reload_refused"
			if play == "serve" {
				code = "proxy_unhealthy"
			}
			wantFault(t, err, code, want)
			if string(after) != string(before) || p.RunConfigSHA256() != hash {
				t.Error("the refused policy stayed in the file")
			}
		})
	}
}

// A script that does not exec pipelock leaves nothing behind either.
func TestStopOfScript(t *testing.T) {
	t.Parallel()
	p, err := start(t, "wrapped")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if c, err := net.DialTimeout("tcp", p.Addr().String(), time.Second); err == nil {
		c.Close()
		t.Error("pipelock outlived its script")
	}
}

func TestReloadOfDead(t *testing.T) {
	p, err := start(t, "serve")
	if err != nil {
		t.Fatal(err)
	}
	p.Kill()
	wantFault(t, p.Reload(t.Context(), mustYAML(t, tls("b.example"))), "proxy_died", "signal: killed")
}

// A pipelock of the workspace would run what a guest has put there; it is not
// even asked for its version.
func TestChooseInReach(t *testing.T) {
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	bin, ran := filepath.Join(top, "repo", "bin"), filepath.Join(top, "ran")
	if err := os.MkdirAll(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "pipelock"), []byte("#!/bin/sh\ntouch "+ran+"\necho pipelock version v2.2.0\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	b := &plan.Bottle{Egress: plan.Policy{Proxy: "auto"}}
	e := &plan.Egress{Pipelock: &plan.PipelockYAML{YAML: "x"}}
	path := func(k string) string { return map[string]string{"PATH": bin + ":/usr/bin"}[k] }
	if _, _, err := Choose(t.Context(), b, e, path, []string{filepath.Join(top, "repo")}); err == nil || fault.As(err).Code != "program_in_reach" || fault.As(err).Exit != fault.NoPerm {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("it has run")
	}
	if p, _, err := Choose(t.Context(), b, e, path, []string{filepath.Join(top, "other")}); err != nil || p == nil {
		t.Errorf("out of reach: %v %v", p, err)
	}
}

func TestChoose(t *testing.T) {
	good, old := fakeProgram(t, "version-2.3.0").Path, fakeProgram(t, "version-1.0.0").Path
	for _, c := range []struct {
		proxy, program string
		rules          []plan.Rule
		chosen         bool
		why, code      string
	}{
		{"builtin", good, []plan.Rule{tls("a.example")}, false, "asks for the built-in proxy", ""},
		{"pipelock", good, []plan.Rule{tls("a.example")}, true, "asks for pipelock", ""},
		{"auto", good, []plan.Rule{tls("a.example")}, true, "pipelock 2.3.0 is installed", ""},
		{"auto", "/nonexistent", []plan.Rule{tls("a.example")}, false, "/nonexistent", ""},
		{"auto", old, []plan.Rule{tls("a.example")}, false, "does not check its configuration", ""},
		{"pipelock", "/nonexistent", []plan.Rule{tls("a.example")}, false, "", "proxy_missing"},
		{"pipelock", old, []plan.Rule{tls("a.example")}, false, "", "proxy_too_old"},
		{"pipelock", "/nonexistent", nil, false, "nothing to carry", ""},
		{"pipelock", "/nonexistent", []plan.Rule{allow("a.example", "ssh", 22)}, false, "nothing to carry", ""},
	} {
		b := bottle(c.rules...)
		b.Egress.Proxy = c.proxy
		e, err := Derive(b)
		if err != nil {
			t.Fatal(err)
		}
		p, why, err := Choose(t.Context(), b, e, func(k string) string { return map[string]string{"BOTTLE_PIPELOCK": c.program}[k] }, nil)
		if c.code != "" {
			wantFault(t, err, c.code, "")
			continue
		}
		if err != nil || (p != nil) != c.chosen || !strings.Contains(why, c.why) {
			t.Errorf("%+v: %v %q %v", c, p, why, err)
		}
	}
}

// A refusal that pipelock tells again is not the answer to the next reload; one
// that follows is.
func TestRefusalIsToldTwice(t *testing.T) {
	const refusal = `{"event":"error","method":"CONFIG_RELOAD","error":"rejected: security downgrade from strict mode"}`
	const success = `{"event":"config_reload","status":"success","config_hash":"new"}`
	line := func(s string) event { return event{line: []byte(s)} }
	match := sparing(reloaded("new"))
	if done, err := match(line(refusal)); done || err != nil {
		t.Errorf("told again: %v, %v", done, err)
	}
	if done, err := match(line(success)); !done || err != nil {
		t.Errorf("taken: %v, %v", done, err)
	}
	match = sparing(reloaded("new"))
	_, _ = match(line(refusal))
	if done, err := match(line(refusal)); !done {
		t.Errorf("refused: %v, %v", done, err)
	} else {
		wantFault(t, err, "proxy_reload_refused", "security downgrade")
	}
}
