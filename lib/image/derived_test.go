package image

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
)

const by = "program-1.0.thing"

func TestDerive(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	p, _ := b.mustPack(b.put("i.tar", dockerTar(t, someLayers(t)...)))
	made := 0
	build := func(rootfs, dir string) (string, error) {
		made++
		if _, err := os.Stat(filepath.Join(rootfs, "bin")); err != nil {
			t.Errorf("the root file system: %v", err)
		}
		writeFiles(t, dir, map[string][]byte{"rest/of/it": nil})
		out := filepath.Join(dir, "out")
		return out, os.WriteFile(out, []byte("made"), 0o600)
	}
	if found, err := Derived(b.opts.CacheDir, p.Digest); len(found) != 0 || err != nil {
		t.Errorf("there before it was made: %v, %v", found, err)
	}
	var path string
	for i := range 3 {
		got, cached, err := Derive(ctx, b.opts, p.Digest, by, build)
		if err != nil || cached != (i > 0) || made != 1 {
			t.Fatalf("%q, %v, %v, made %d times", got, cached, err, made)
		}
		path = got
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "made" {
		t.Errorf("%q, %v", data, err)
	}
	if found, err := Derived(b.opts.CacheDir, p.Digest); len(found) != 1 || found[by] != path || err != nil {
		t.Errorf("%q, %v", found, err)
	}
	noTemps(t, b.opts.CacheDir)
	// Another program's, and another image's, are others.
	if other, cached, err := Derive(ctx, b.opts, p.Digest, "program-1.1.thing", build); err != nil || cached || other == path {
		t.Errorf("%q, %v, %v", other, cached, err)
	}
	q, _ := b.mustPack(b.put("j.tar", dockerTar(t, someLayers(t)[0])))
	if other, cached, err := Derive(ctx, b.opts, q.Digest, by, build); err != nil || cached || other == path {
		t.Errorf("%q, %v, %v", other, cached, err)
	}
	if err := Remove(ctx, b.opts.CacheDir, p.Digest); err != nil {
		t.Fatal(err)
	}
	if names, _ := readNames(filepath.Join(b.opts.CacheDir, derivedDir)); len(names) != 1 {
		t.Errorf("left: %v", names)
	}
	_, _, err := Derive(ctx, b.opts, p.Digest, by, build)
	wantFault(t, err, fault.NoInput, "image_missing")
	_, _, err = Derive(ctx, b.opts, "sha256:../..", by, build)
	wantFault(t, err, fault.Data, "image_digest")
	for _, bad := range []string{"", "../x", "a/b"} {
		_, _, err = Derive(ctx, b.opts, q.Digest, bad, build)
		wantFault(t, err, fault.Bug, "bug")
	}
}

// What failed on the way left nothing, and is made anew the next time.
func TestDeriveFails(t *testing.T) {
	b := newBench(t)
	p, _ := b.mustPack(b.put("i.tar", dockerTar(t, someLayers(t)...)))
	half := func(err error) func(string, string) (string, error) {
		return func(_, dir string) (string, error) {
			return "", errors.Join(os.WriteFile(filepath.Join(dir, "out"), []byte("ha"), 0o600), err)
		}
	}
	gone, cancel := context.WithCancel(context.Background())
	for _, tt := range []struct {
		name, code string
		exit       int
		ctx        context.Context
		build      func(string, string) (string, error)
	}{
		{"the program's own words", "program_failed", fault.Unavailable, context.Background(), half(fault.New(fault.Unavailable, "program_failed", "it said no").WithHint("ask again"))},
		{"no space", "disk_full", fault.IO, context.Background(), half(unix.ENOSPC)},
		{"nothing was made", "image_io", fault.IO, context.Background(), func(_, dir string) (string, error) { return filepath.Join(dir, "none"), nil }},
		{"cancelled", "interrupted", fault.TempFail, gone, func(_, dir string) (string, error) { cancel(); return "", gone.Err() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := Derive(tt.ctx, b.opts, p.Digest, by, tt.build)
			wantFault(t, err, tt.exit, tt.code)
			noTemps(t, b.opts.CacheDir)
			if found, err := Derived(b.opts.CacheDir, p.Digest); len(found) != 0 || err != nil {
				t.Errorf("there: %v, %v", found, err)
			}
		})
	}
}

// TestDeriveKilled: what a killed process was making is neither used nor kept.
func TestDeriveKilled(t *testing.T) {
	if dir := os.Getenv("IMAGE_TEST_DERIVE"); dir != "" {
		_, _, err := Derive(context.Background(), Options{CacheDir: dir}, os.Getenv("IMAGE_TEST_DIGEST"), by, func(_, tmp string) (string, error) {
			if err := os.WriteFile(filepath.Join(tmp, "out"), []byte("ha"), 0o600); err != nil {
				return "", err
			}
			os.Stdout.WriteString("half\n")
			for { // select {} would be a deadlock, and the end
				time.Sleep(time.Hour)
			}
		})
		t.Fatal(err)
	}
	b := newBench(t)
	p, _ := b.mustPack(b.put("i.tar", dockerTar(t, someLayers(t)...)))
	cmd := exec.Command(os.Args[0], "-test.run=^TestDeriveKilled$")
	cmd.Env = append(os.Environ(), "IMAGE_TEST_DERIVE="+b.opts.CacheDir, "IMAGE_TEST_DIGEST="+p.Digest)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if stale, err := Stale(b.opts.CacheDir); err != nil || len(stale) != 0 {
		t.Errorf("work in progress counts as stale: %v, %v", stale, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if found, err := Derived(b.opts.CacheDir, p.Digest); len(found) != 0 || err != nil {
		t.Errorf("half a file is used: %v, %v", found, err)
	}
	stale, err := Stale(b.opts.CacheDir)
	if err != nil || len(stale) != 1 || !strings.Contains(stale[0], tmpPrefix) {
		t.Errorf("Stale = %v, %v", stale, err)
	}
	path, cached, err := Derive(context.Background(), b.opts, p.Digest, by, func(_, dir string) (string, error) {
		return filepath.Join(dir, "out"), os.WriteFile(filepath.Join(dir, "out"), []byte("whole"), 0o600)
	})
	if data, rerr := os.ReadFile(path); err != nil || cached || rerr != nil || string(data) != "whole" {
		t.Errorf("%v, %v, %q, %v", cached, err, data, rerr)
	}
	noTemps(t, b.opts.CacheDir)
}
