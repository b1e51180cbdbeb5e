//go:build linux

package gvisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"

	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/guest/helper"
	"github.com/bottle-tools/bottle/lib/runsc"
)

// maxHostFile bounds what is copied of the host's settings.
const maxHostFile = 4 << 20

// skeletonDirs of a guest with image host; the mounts are laid over some.
var skeletonDirs = []string{
	"dev", "proc", "sys", "run", "mnt", "root", "srv", "home", "etc/ssl/certs", "opt/bottle",
	"var/cache", "var/lib", "var/log", "workspace",
}

// stickyDirs can be written by everyone in the guest.
var stickyDirs = []string{"tmp", "var/tmp"}

// makeSkeleton builds the root folder of a guest with image host in dir: links
// and folders as on the host, an /etc of our own, and mountpoints. Nothing of
// it holds a secret, but for the sandbox's user to read it, it is open to all
// within the bottle's folder, which is not.
func makeSkeleton(dir string, s *engine.Spec, owner ownership) error {
	for _, d := range skeletonDirs {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	for _, d := range stickyDirs {
		p := filepath.Join(dir, d)
		if err := errors.Join(os.MkdirAll(p, 0o755), os.Chmod(p, 0o777|fs.ModeSticky)); err != nil {
			return err
		}
	}
	for _, name := range hostRoots {
		if target, err := os.Readlink("/" + name); err == nil {
			if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	home := filepath.Join(dir, engine.GuestHome)
	if err := os.Mkdir(home, 0o755); err != nil {
		return err
	}
	if err := owner.give(home); err != nil {
		return err
	}
	for _, p := range hostFiles {
		if p == javaRoots && len(s.CACert) > 0 {
			if _, err := os.Stat(p); err == nil {
				if err := writeTruststore(filepath.Join(dir, p), s); err != nil {
					return err
				}
			}
			continue
		}
		if err := copyHostFile(p, filepath.Join(dir, p)); err != nil {
			return err
		}
	}
	for name, content := range etcFiles(s) {
		if err := writeNew(filepath.Join(dir, "etc", name), content); err != nil {
			return err
		}
	}
	return os.Symlink("/proc/self/mounts", filepath.Join(dir, "etc/mtab"))
}

func etcFiles(s *engine.Spec) map[string][]byte {
	id := strconv.Itoa(engine.GuestUID)
	files := map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/sh\n" +
			engine.GuestUser + ":x:" + id + ":" + id + "::" + engine.GuestHome + ":" + hostShell() + "\n" +
			"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
		"group":         "root:x:0:\n" + engine.GuestUser + ":x:" + id + ":\nnogroup:x:65534:\n",
		"hosts":         helper.Hosts(s.ID),
		"hostname":      s.ID + "\n",
		"resolv.conf":   helper.Resolv,
		"nsswitch.conf": helper.NSSwitch,
		"shells":        "/bin/sh\n/bin/bash\n",
	}
	out := make(map[string][]byte, len(files)+2)
	for name, text := range files {
		out[name] = []byte(text)
	}
	out["ssl/certs/ca-certificates.crt"] = s.CABundle
	if len(s.CACert) > 0 {
		out["ssl/certs/bottle-ca.pem"] = s.CACert
	}
	return out
}

// writeTruststore writes what Java trusts in place of the host's own, which lacks
// the bottle's authority.
func writeTruststore(p string, s *engine.Spec) error {
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	return writeNew(p, ca.Truststore(s.CABundle))
}

func hostShell() string {
	if _, err := os.Stat("/bin/bash"); err == nil {
		return "/bin/bash"
	}
	return "/bin/sh"
}

// copyHostFile copies a small file that everyone may read; a link is followed.
// What is missing or not like that is left out.
func copyHostFile(src, dst string) error {
	fi, err := os.Stat(src)
	if err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm()&0o004 == 0 || fi.Size() > maxHostFile {
		return nil
	}
	b, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	return writeNew(dst, b)
}

// writeNew makes a file that all may read, whatever the umask.
func writeNew(p string, content []byte) error {
	f, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Chmod(0o644), f.Close())
}

// ownership is who the guest's user is on the host.
type ownership struct{ uid, gid int }

func (o ownership) give(p string) error {
	if os.Geteuid() != 0 || o.uid == 0 {
		return nil
	}
	return os.Lchown(p, o.uid, o.gid)
}

// guestFiles are all that the engine's own folder in the guest may hold; Verify
// goes by them.
var guestFiles = []string{
	filepath.Base(engine.GuestHelper), filepath.Base(engine.GuestConfig), bundleFile, caFile, filepath.Base(engine.GuestTruststore),
}

var bundleFile = filepath.Base(engine.GuestBundle)

const caFile = "ca.pem"

// writeGuestDir fills dir, which becomes GuestDir in the guest: the helper's
// config, the trust files, and a mountpoint for the helper itself.
func writeGuestDir(dir string, s *engine.Spec, prepared bool) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	files := map[string][]byte{
		filepath.Base(engine.GuestHelper): nil,
		filepath.Base(engine.GuestConfig): runsc.Encode(guestConfig(s, prepared)),
		bundleFile:                        s.CABundle,
		caFile:                            s.CACert,
	}
	if len(s.CACert) > 0 {
		files[path.Base(engine.GuestTruststore)] = ca.Truststore(s.CABundle)
	}
	for _, name := range guestFiles {
		content, ok := files[name]
		if !ok {
			continue
		}
		if err := writeNew(filepath.Join(dir, name), content); err != nil {
			return err
		}
	}
	return nil
}

func guestConfig(s *engine.Spec, prepared bool) *guest.Config {
	c := s.GuestConfig(engine.GuestUserOf(s.Bottle.User, engine.GuestUID, engine.GuestUID))
	c.Transport, c.FD, c.Prepared = guest.TransportFD, 3, prepared
	c.PidsMax = pidsMax(s.Bottle.Resources.Pids)
	return c
}

// pidsMax leaves room for the helper, whose threads count like processes.
func pidsMax(limit int) int {
	if limit == 0 {
		return 0
	}
	return limit + helperTasks
}

// helperTasks is what the helper may use of the guest's tasks.
const helperTasks = 16

// makeDir makes an own folder that all may enter, whatever the umask.
func makeDir(p string) error {
	if err := os.Mkdir(p, 0o755); err != nil {
		return fmt.Errorf("bottle folder: %w", err)
	}
	return os.Chmod(p, 0o755)
}
