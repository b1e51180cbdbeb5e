//go:build linux

package gvisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/runsc"
)

// hostFolders are what a guest with image host sees of the host, read-only:
// programs and libraries, and the settings that those cannot do without. Not
// /etc/ssl (private keys), /opt or /var.
var hostFolders = []string{"/usr", "/etc/alternatives"}

// hostSettings are globs of further folders, for java, python, perl and fonts.
var hostSettings = []string{"/etc/java-*", "/etc/python3*", "/etc/perl", "/etc/fonts"}

// hostFiles are copied if they are there and readable by all.
var hostFiles = []string{
	"/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/mime.types", "/etc/protocols", "/etc/services",
	"/etc/timezone", "/etc/localtime", "/etc/inputrc", "/etc/ssl/openssl.cnf", javaRoots,
}

// javaRoots is what Java trusts, on Debian and its kin.
const javaRoots = "/etc/ssl/certs/java/cacerts"

// hostRoots are the folders of / that are links into /usr on most systems.
var hostRoots = []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"}

// reserved guest paths are the engine's own: nothing may be mounted on or
// below them, or above so that they disappear.
var reserved = []string{"/proc", "/sys", "/dev", engine.GuestDir}

// layout is what the guest's file system is made of.
type layout struct {
	rootfs string // host folder
	binds  []runsc.Bind
	// prepared: rootfs is a skeleton of ours, in which mountpoints may be made.
	prepared bool
}

// systemBinds looks at the host below root ("/").
func systemBinds(root string) []runsc.Bind {
	var out []runsc.Bind
	add := func(p string) {
		if fi, err := os.Lstat(filepath.Join(root, p)); err == nil && fi.IsDir() {
			out = append(out, runsc.Bind{Source: filepath.Join(root, p), Target: p, ReadOnly: true})
		}
	}
	for _, p := range hostFolders {
		add(p)
	}
	for _, glob := range hostSettings {
		found, _ := filepath.Glob(filepath.Join(root, glob))
		for _, p := range found {
			add("/" + strings.TrimPrefix(strings.TrimPrefix(p, root), "/"))
		}
	}
	for _, p := range hostRoots { // a system that has not merged them into /usr
		add("/" + p)
	}
	return out
}

// planBinds gives all binds in mount order and checks that each has a
// mountpoint, so that runsc never makes one on the host: in a skeleton it is
// made here, everywhere else it has to be there. ours is the engine's own
// folder for the guest, empty an empty file.
func planBinds(s *engine.Spec, l *layout, ours, empty string) error {
	l.binds = append(l.binds,
		runsc.Bind{Source: ours, Target: engine.GuestDir, ReadOnly: true},
		runsc.Bind{Source: s.GuestHelper, Target: engine.GuestHelper, ReadOnly: true},
		runsc.Bind{Source: s.Workspace, Target: engine.GuestWorkspace, ReadOnly: s.ReadOnly},
	)
	if s.Home != "" {
		l.binds = append(l.binds, runsc.Bind{Source: s.Home, Target: engine.GuestHome})
	}
	checked := len(l.binds)
	for _, b := range s.Binds {
		if err := checkTarget(b.Target); err != nil {
			return err
		}
		source := b.Source
		if source == os.DevNull {
			source = empty // the usual way to hide a file
		}
		l.binds = append(l.binds, runsc.Bind{Source: source, Target: path.Clean(b.Target), ReadOnly: b.ReadOnly})
	}
	for i := range l.binds {
		l.binds[i].NoExec = noexec(l.binds[i].Source)
		if l.prepared && i >= checked {
			l.binds[i].Target = l.throughLinks(l.binds[i].Target)
		}
		if err := l.mountpoint(i); err != nil {
			return err
		}
	}
	return nil
}

func checkTarget(target string) error {
	if !path.IsAbs(target) || path.Clean(target) == "/" {
		return badTarget(target, "is not an absolute path below /")
	}
	t := path.Clean(target)
	for _, r := range reserved {
		if under(t, r) || under(r, t) {
			return badTarget(target, "is kept for the bottle itself")
		}
	}
	if under(engine.GuestWorkspace, t) {
		return badTarget(target, "would cover the workspace")
	}
	return nil
}

func badTarget(target, why string) error {
	return fault.New(fault.Data, "mount_target", "mount target %q %s", target, why).
		WithHint("choose another target, such as /opt/NAME")
}

// under tells whether p is dir or below it.
func under(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}

// throughLinks follows the links at the top of the skeleton: /lib/x is
// /usr/lib/x.
func (l *layout) throughLinks(target string) string {
	top, rest, _ := strings.Cut(strings.TrimPrefix(target, "/"), "/")
	if link, err := os.Readlink(filepath.Join(l.rootfs, top)); err == nil && !path.IsAbs(link) {
		return path.Join("/", link, rest)
	}
	return target
}

// mountpoint checks or makes the mountpoint of the i-th bind.
func (l *layout) mountpoint(i int) error {
	b := l.binds[i]
	src, err := os.Lstat(b.Source)
	if err != nil {
		return fault.New(fault.NoInput, "mount_missing", "cannot mount %s at %s: %w", b.Source, b.Target, err)
	}
	dir := src.IsDir()
	if !dir && !src.Mode().IsRegular() {
		return fault.New(fault.Data, "mount_source", "cannot mount %s at %s: neither a file nor a folder", b.Source, b.Target)
	}
	base, rel, create := l.rootfs, strings.TrimPrefix(b.Target, "/"), l.prepared
	// What a later mount covers is gone, so the last one above the target counts.
	for _, m := range slices.Backward(l.binds[:i]) {
		if under(b.Target, m.Target) {
			base, rel, create = m.Source, strings.TrimPrefix(strings.TrimPrefix(b.Target, m.Target), "/"), false
			break
		}
	}
	return findMountpoint(base, rel, b.Target, dir, create)
}

func findMountpoint(base, rel, target string, dir, create bool) error {
	at := base
	parts := []string{"."} // a mount over another one: its own root
	if rel != "" {
		parts = strings.Split(rel, "/")
	}
	for i, part := range parts {
		at = filepath.Join(at, part)
		last := i == len(parts)-1
		fi, err := os.Lstat(at)
		switch {
		case errors.Is(err, fs.ErrNotExist) && create:
			err = makeMountpoint(at, !last || dir)
		case errors.Is(err, fs.ErrNotExist):
			err = fault.New(fault.Host, "mountpoint_missing", "nothing to mount on at %s: %s does not exist", target, at).
				WithHint("make it, or choose a target outside of other mounts")
		case err != nil:
		case fi.Mode()&fs.ModeSymlink != 0:
			err = fault.New(fault.Host, "mountpoint_link", "cannot mount at %s: %s is a symbolic link", target, at).
				WithHint("give the target that it leads to")
		case fi.IsDir() != (!last || dir):
			err = fault.New(fault.Host, "mountpoint_kind", "cannot mount at %s: %s is a %s", target, at, kind(fi.IsDir())).
				WithHint("a folder can only be mounted on a folder, a file on a file")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func kind(dir bool) string {
	if dir {
		return "folder"
	}
	return "file"
}

func makeMountpoint(p string, dir bool) error {
	if dir {
		return os.Mkdir(p, 0o755)
	}
	f, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("mountpoint: %w", err)
	}
	return f.Close()
}
