package secret

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/trust"
)

const value = "s3cr3t-value-0123456789"

func place(t *testing.T) (Options, func(name, content string, mode os.FileMode) string) {
	t.Helper()
	top := t.TempDir()
	base, home := filepath.Join(top, "project"), filepath.Join(top, "home")
	for _, d := range []string{base, home} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	env := map[string]string{"TOKEN": value, "LINES": "a\r\nx-evil: 1", "EMPTY": ""}
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(top, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return Options{Base: base, Home: home, Getenv: func(k string) string { return env[k] }}, write
}

func one(s plan.Secret, o Options) (string, []Missing, error) {
	s.Name = "KEY"
	values, missing, err := Resolve(context.Background(), []plan.Secret{s}, o)
	return values["KEY"], missing, err
}

func TestSources(t *testing.T) {
	o, write := place(t)
	write("project/key", value+"\n", 0o600)
	write("project/empty", "\n", 0o600)
	write("project/crlf", value+"\r\n", 0o600)
	write("project/two", value+"\nmore\n", 0o600)
	write("project/open", value, 0o606)
	write("project/big", strings.Repeat("a", MaxBytes+1), 0o600)
	write("home/key", value, 0o600)
	outside := write("outside", value, 0o600)
	write("project/print", "#!/bin/sh\necho "+value+"\n", 0o700)
	if err := os.Symlink(outside, filepath.Join(o.Base, "link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(o.Base, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		secret  plan.Secret
		want    string
		missing string // part of the reason
		exit    int
		err     string
	}{
		{name: "env", secret: plan.Secret{From: "env:TOKEN"}, want: value},
		{name: "env unset", secret: plan.Secret{From: "env:NOPE"}, missing: "NOPE is not set"},
		{name: "env empty", secret: plan.Secret{From: "env:EMPTY"}, missing: "EMPTY is not set"},
		{name: "env with a header in it", secret: plan.Secret{From: "env:LINES"}, exit: 65, err: "secret KEY: holds a control character"},
		{name: "file", secret: plan.Secret{From: "file:key"}, want: value},
		{name: "file with CRLF", secret: plan.Secret{From: "file:./crlf"}, want: value},
		{name: "file in the home", secret: plan.Secret{From: "file:~/key"}, want: value},
		{name: "absolute file", secret: plan.Secret{From: "file:" + outside}, want: value},
		{name: "file absent", secret: plan.Secret{From: "file:nope"}, missing: "nope does not exist"},
		{name: "file empty", secret: plan.Secret{From: "file:empty"}, missing: "gave nothing"},
		{name: "file of two lines", secret: plan.Secret{From: "file:two"}, exit: 65, err: "control character"},
		{name: "file too large", secret: plan.Secret{From: "file:big"}, exit: 65, err: "larger than 64 KiB"},
		{name: "file that all can write", secret: plan.Secret{From: "file:open"}, exit: 77, err: "everybody can write"},
		{name: "folder", secret: plan.Secret{From: "file:."}, exit: 65, err: "not a regular file"},
		{name: "fifo", secret: plan.Secret{From: "file:fifo"}, exit: 65, err: "not a regular file"},
		{name: "symlink out of the folder", secret: plan.Secret{From: "file:link"}, exit: 66, err: "must not lead out"},
		{name: "another user's home", secret: plan.Secret{From: "file:~root/key"}, exit: 65, err: "another user's home"},
		{name: "command", secret: plan.Secret{From: "command", Command: []string{"echo", value}}, want: value},
		{name: "command of the folder", secret: plan.Secret{From: "command", Command: []string{"./print"}}, want: value},
		{name: "path argument", secret: plan.Secret{From: "command", Command: []string{"sh", "./print"}}, want: value},
		{name: "no shell", secret: plan.Secret{From: "command", Command: []string{"echo", "$(id)", ";", "*"}}, want: "$(id) ; *"},
		{name: "runs in the home", secret: plan.Secret{From: "command", Command: []string{"pwd"}}, want: o.Home},
		{name: "no terminal, no input", secret: plan.Secret{From: "command", Command: []string{"sh", "-c", "cat; (: </dev/tty) || echo none"}}, want: "none"},
		{name: "command fails", secret: plan.Secret{From: "command", Command: []string{"sh", "-c", "echo " + value + "; echo locked >&2; exit 3"}}, missing: "sh failed (exit status 3): locked"},
		{name: "command not there", secret: plan.Secret{From: "command", Command: []string{"no-such-program-here"}}, missing: "was not found"},
		{name: "command says nothing", secret: plan.Secret{From: "command", Command: []string{"true"}}, missing: "gave nothing"},
		{name: "command says too much", secret: plan.Secret{From: "command", Command: []string{"head", "-c", "70000", "/dev/zero"}}, exit: 65, err: "more than 64 KiB"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, missing, err := one(tc.secret, o)
			switch {
			case tc.exit != 0:
				if err == nil || fault.As(err).Exit != tc.exit || !strings.Contains(err.Error()+fault.As(err).Hint, tc.err) {
					t.Fatalf("error %v (exit %d), want exit %d with %q", err, fault.As(err).Exit, tc.exit, tc.err)
				}
			case err != nil:
				t.Fatal(err)
			case tc.missing != "":
				if len(missing) != 1 || missing[0].Name != "KEY" || !strings.Contains(missing[0].Why, tc.missing) {
					t.Fatalf("missing %q, want %q", missing, tc.missing)
				}
			case got != tc.want || len(missing) != 0:
				t.Fatalf("%q, missing %q; want %q", got, missing, tc.want)
			}
			all := got
			if tc.want == value {
				all = ""
			}
			for _, m := range missing {
				all += m.Why
			}
			if err != nil {
				all += err.Error() + fault.As(err).Hint
			}
			if strings.Contains(all, value) {
				t.Fatalf("the value shows: %s", all)
			}
		})
	}
}

func TestCommandTimeLimit(t *testing.T) {
	o, _ := place(t)
	o.TimeLimit = 100 * time.Millisecond
	start := time.Now()
	// The grandchild holds the pipe open: it has to go too.
	_, missing, err := one(plan.Secret{From: "command", Command: []string{"sh", "-c", "sleep 300 & sleep 300"}}, o)
	if err != nil || len(missing) != 1 || !strings.Contains(missing[0].Why, "did not end within 100ms") {
		t.Fatalf("missing %q, error %v", missing, err)
	}
	if d := time.Since(start); d > time.Minute {
		t.Fatalf("took %s", d)
	}
}

func TestCanceled(t *testing.T) {
	o, _ := place(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _, err := Resolve(ctx, []plan.Secret{{Name: "KEY", From: "command", Command: []string{"sleep", "20"}}}, o)
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
}

func TestReadableFileWarns(t *testing.T) {
	o, write := place(t)
	write("project/key", value, 0o644)
	warned := ""
	o.Warn = func(format string, args ...any) { warned += format }
	if got, _, err := one(plan.Secret{From: "file:key"}, o); got != value || err != nil || !strings.Contains(warned, "every user of this machine") {
		t.Fatalf("%q, %v, warned %q", got, err, warned)
	}
}

// TestExchangedScript: a guest in the same folder exchanges a script once the
// user's word about it was looked up. What was read then is what runs.
func TestExchangedScript(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	o, write := place(t)
	ran := filepath.Join(o.Home, "ran")
	script := write("project/print", "#!/bin/sh\necho "+value+"\n", 0o700)
	write("home/own", "#!/bin/sh\ncat \"$(dirname \"$0\")\"/beside\n", 0o700)
	write("home/beside", "beside-value-0123456789", 0o600)
	evil := "#!/bin/sh\ntouch " + ran + "\necho evil\n"
	b := &plan.Bottle{Workspace: plan.Workspace{Path: "."}}
	for _, argv := range [][]string{{"./print"}, {"sh", "./print"}, {script}, {"sh", "./late"}, {"./late"}, {"~/own"}} {
		b.Secrets = append(b.Secrets, plan.Secret{Name: fmt.Sprintf("S%d", len(b.Secrets)), From: "command", Command: argv})
	}
	at := trust.Place{Base: o.Base, Home: o.Home}
	lines, err := trust.Needed(b, at)
	if err != nil {
		t.Fatal(err)
	}
	if at.Scripts, err = trust.ReadScripts(b, at); err != nil {
		t.Fatal(err)
	}
	write("project/print", evil, 0o700)
	write("project/late", evil, 0o700)
	if now, err := trust.Needed(b, at); err != nil || !slices.Equal(now, lines) {
		t.Errorf("what is asked is not what was read: %v %q, %q", err, now, lines)
	}
	o.Scripts = at.Scripts
	tmp := os.Getenv("TMPDIR")
	t.Setenv("TMPDIR", o.Base)
	if _, err := trust.ReadScripts(b, at); err == nil || fault.As(err).Code != "temp_in_reach" || fault.As(err).Exit != fault.NoPerm {
		t.Errorf("copies where the guest writes: %v", err)
	}
	t.Setenv("TMPDIR", tmp)
	values, missing, err := Resolve(context.Background(), b.Secrets, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"S0", "S1", "S2"} {
		if values[name] != value {
			t.Errorf("%s is %q", name, values[name])
		}
	}
	if values["S5"] != "beside-value-0123456789" {
		t.Errorf("a script that no guest reaches is not run where it lies: %q", values["S5"])
	}
	if len(missing) != 2 || !strings.Contains(missing[0].Why, "was not found") {
		t.Errorf("%+v", missing)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("what was put in its place has run")
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "bottle-secret-*")); len(left) != 0 {
		t.Errorf("left: %q", left)
	}
}
