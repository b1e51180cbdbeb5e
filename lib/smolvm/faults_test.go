package smolvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

// What the Python package smolvm 0.0.36 is and answers; and what it would be if
// its numbers grew.
func TestPythonPackage(t *testing.T) {
	for _, v := range []string{"0.0.36", "0.2.0", "1.7.9"} {
		dir := t.TempDir()
		python := filepath.Join(dir, "python3")
		if err := os.WriteFile(python, []byte("#!/bin/sh\necho smolvm "+v+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		// A script of pip's, run by a python that answers.
		bin := filepath.Join(dir, "smolvm")
		if err := os.WriteFile(bin, []byte("#!/usr/bin/env "+python+"\n# -*- coding: utf-8 -*-\nimport re\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		_, err := Open(t.Context(), bin, nil)
		f := fault.As(err)
		if !errors.Is(err, ErrWrongProgram) || f.Exit != fault.Unavailable || !strings.Contains(f.Hint, "Python package named smolvm") || !strings.Contains(err.Error(), v) {
			t.Errorf("%s: %v", v, err)
		}
	}
	// A release that is too old is told so, and not called another program.
	c := script(t, "echo smolvm 1.7.9")
	if got, err := Open(t.Context(), c.Bin, nil); err != nil || got.Version != (Version{1, 7, 9}) {
		t.Errorf("%v, %v", got, err)
	}
}

func TestDiskFull(t *testing.T) {
	for _, stderr := range []string{
		"Error: storage operation failed: create disk: No space left on device (os error 28)\n",
		`{"error":{"code":"SMOLVM_ERROR","message":"config operation failed: open database: database or disk is full"}}` + "\n",
		"Error: agent: KvmOpen…: Disk quota exceeded (os error 122)\n",
	} {
		c := script(t, "echo '"+stderr+"' >&2; exit 1")
		err := c.MachineCreate(t.Context(), "a", CreateSpec{})
		if f := fault.As(err); !errors.Is(err, ErrDiskFull) || f.Exit != fault.CantCreate || f.Code != "smolvm_disk_full" || !strings.Contains(err.Error(), "full") && !strings.Contains(err.Error(), "No space") && !strings.Contains(err.Error(), "quota") {
			t.Errorf("%q: %v", stderr, err)
		}
	}
}

// The caller's own time limit is smolvm's failure to answer, and no bug of ours.
func TestCallersTimeLimit(t *testing.T) {
	c := script(t, "exec sleep 60")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err := c.MachineStart(ctx, "a")
	if f := fault.As(err); !errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) || f.Exit != fault.Unavailable || f.Code != "smolvm_timeout" {
		t.Errorf("%v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	time.AfterFunc(200*time.Millisecond, stop)
	if err := c.MachineStart(ctx, "a"); !errors.Is(err, context.Canceled) || errors.Is(err, ErrTimeout) {
		t.Errorf("interrupted: %v", err)
	}
}

// A command that is given up takes smolvm's helpers along.
func TestAttachedEndsTheGroup(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	c := script(t, "sleep 600 & echo $! >"+pidFile+".new; mv "+pidFile+".new "+pidFile+"; wait")
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for range 3000 {
			if _, err := os.Stat(pidFile); err == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	if _, err := c.MachineExecAttached(ctx, "a", Attached{}, "true"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	waitGone(t, pidFile)
}
