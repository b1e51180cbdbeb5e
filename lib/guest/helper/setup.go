//go:build linux

package helper

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/bottle-tools/bottle/lib/guest"
)

// Where distributions keep the bundle of trusted roots; the first one is what
// a bottle's environment points to.
var bundles = []string{
	"etc/ssl/certs/ca-certificates.crt",
	"etc/pki/tls/certs/ca-bundle.crt",
	"etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
	"etc/ssl/ca-bundle.pem",
	"etc/ssl/cert.pem",
}

// truststores are where Java has its trusted roots: distributions, and the
// images that are made for it.
var truststores = []string{
	"etc/ssl/certs/java/cacerts", "etc/pki/java/cacerts", "etc/pki/ca-trust/extracted/java/cacerts",
	"usr/lib/jvm/*/lib/security/cacerts", "usr/lib/jvm/*/jre/lib/security/cacerts", "usr/java/*/lib/security/cacerts",
	"usr/local/openjdk-*/lib/security/cacerts", "opt/java/openjdk/lib/security/cacerts",
}

const (
	ownCert  = "etc/ssl/certs/bottle-ca.pem"
	cgroups  = "sys/fs/cgroup"
	homeMode = 0o755
)

// setup prepares the guest below root ("/" but in tests). The home comes
// first, as the user the helper was started as: on a kept home that is the
// only one the host knows.
func setup(root string, cfg *guest.Config) error {
	at := func(p string) string { return filepath.Join(root, p) }
	if err := setupHome(at, cfg); err != nil {
		return fmt.Errorf("home: %w", err)
	}
	if err := becomeRoot(); err != nil {
		return err
	}
	if !cfg.Prepared {
		if err := setupEtc(at, cfg); err != nil {
			return err
		}
		if err := setupTrust(at, cfg); err != nil {
			return fmt.Errorf("trusted roots: %w", err)
		}
	}
	if cfg.PidsMax > 0 {
		if err := limitTasks(at, cfg.PidsMax); err != nil {
			return fmt.Errorf("process limit: %w", err)
		}
	}
	return nil
}

// limitTasks sets the limit of the cgroup (v2) that this process is in, and
// with it all others of the guest.
func limitTasks(at func(string) string, n int) error {
	self, err := os.ReadFile(at("proc/self/cgroup"))
	if err != nil {
		return err
	}
	group, ok := strings.CutPrefix(strings.TrimSpace(string(self)), "0::")
	if !ok || group == "/" {
		return fmt.Errorf("this process is in no group of its own (%q)", self)
	}
	f, err := os.OpenFile(at(path.Join(cgroups, group, "pids.max")), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(n))
	return errors.Join(err, f.Close())
}

func setupHome(at func(string) string, cfg *guest.Config) error {
	u := cfg.User
	if err := ensureDir(at(u.Home), u); err != nil {
		return err
	}
	for _, f := range cfg.Files {
		p := at(path.Join(u.Home, path.Clean("/"+f.Path)))
		if _, err := os.Lstat(p); err == nil {
			continue // the user's own
		}
		for _, dir := range parents(path.Clean("/" + f.Path)) {
			if err := ensureDir(at(path.Join(u.Home, dir)), u); err != nil {
				return err
			}
		}
		if err := os.WriteFile(p, []byte(f.Content), 0o600); err != nil {
			return err
		}
		if err := own(p, u); err != nil {
			return err
		}
	}
	return nil
}

// parents lists the folders above p ("/a/b/c": "/a", "/a/b").
func parents(p string) []string {
	var out []string
	for d := path.Dir(p); d != "/" && d != "."; d = path.Dir(d) {
		out = append([]string{d}, out...)
	}
	return out
}

// ensureDir makes dir for u unless it is there, in which case it stays as it is.
func ensureDir(dir string, u guest.User) error {
	err := os.Mkdir(dir, homeMode)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		err = os.Mkdir(dir, homeMode)
	}
	if err != nil {
		return err
	}
	return own(dir, u)
}

func own(p string, u guest.User) error {
	if os.Geteuid() == u.UID {
		return nil
	}
	return os.Lchown(p, u.UID, u.GID)
}

// setupEtc gives an image the few files that programs look for.
func setupEtc(at func(string) string, cfg *guest.Config) error {
	for _, d := range []string{"etc", "tmp", "run"} {
		if err := os.MkdirAll(at(d), 0o755); err != nil {
			return err
		}
	}
	u := cfg.User
	accounts := []struct{ file, name, line string }{
		{"etc/passwd", "root", "root:x:0:0:root:/root:/bin/sh"},
		{"etc/group", "root", "root:x:0:"},
		{"etc/passwd", u.Name, fmt.Sprintf("%s:x:%d:%d::%s:%s", u.Name, u.UID, u.GID, u.Home, shell(at))},
		{"etc/group", u.Name, fmt.Sprintf("%s:x:%d:", u.Name, u.GID)},
	}
	for _, a := range accounts {
		if err := ensureAccount(at(a.file), a.name, a.line); err != nil {
			return err
		}
	}
	files := map[string]string{
		"etc/hosts":       Hosts(cfg.Hostname),
		"etc/hostname":    cfg.Hostname + "\n",
		"etc/resolv.conf": Resolv,
	}
	for name, content := range files {
		if err := replaceFile(at(name), []byte(content)); err != nil {
			return err
		}
	}
	if _, err := os.Stat(at("etc/nsswitch.conf")); errors.Is(err, fs.ErrNotExist) {
		return replaceFile(at("etc/nsswitch.conf"), []byte(NSSwitch))
	}
	return nil
}

// Hosts is /etc/hosts of a guest.
func Hosts(hostname string) string {
	return "127.0.0.1 localhost " + hostname + "\n::1 localhost ip6-localhost\n"
}

// Resolv is /etc/resolv.conf of a guest: the helper, and nobody else.
const Resolv = "nameserver 127.0.0.1\n"

// NSSwitch is /etc/nsswitch.conf of a guest.
const NSSwitch = "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\nprotocols: files\nservices: files\n"

func shell(at func(string) string) string {
	if _, err := os.Stat(at("bin/bash")); err == nil {
		return "/bin/bash"
	}
	return "/bin/sh"
}

// ensureAccount puts line first unless it is there already: whatever else the
// image calls by that id or name, lookups find the bottle's.
func ensureAccount(file, name, line string) error {
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var keep []string
	for l := range strings.Lines(string(old)) {
		l = strings.TrimSuffix(l, "\n")
		if n, _, _ := strings.Cut(l, ":"); n == name {
			if name == "root" {
				return nil // the image's own root is as good
			}
			continue
		}
		keep = append(keep, l)
	}
	return replaceFile(file, []byte(strings.Join(append([]string{line}, keep...), "\n")+"\n"))
}

// replaceFile writes a new file in place of whatever is there, a symbolic link
// (resolv.conf often is one) or a file of somebody else's.
func replaceFile(p string, content []byte) error {
	if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.WriteFile(p, content, 0o644)
}

// setupTrust makes the guest trust the bottle's own CA.
func setupTrust(at func(string) string, cfg *guest.Config) error {
	if cfg.CACert == "" {
		return nil
	}
	if err := os.MkdirAll(at("etc/ssl/certs"), 0o755); err != nil {
		return err
	}
	if err := replaceFile(at(ownCert), []byte(cfg.CACert)); err != nil {
		return err
	}
	// Two names may be one file (links): it gets the certificate once.
	done := map[string]bool{}
	for _, b := range bundles {
		if err := appendCert(at(b), cfg.CACert, done); err != nil {
			return err
		}
	}
	if err := setupTruststores(at, cfg); err != nil {
		return err
	}
	first := at(bundles[0])
	if _, err := os.Stat(first); err == nil || cfg.CABundle == "" {
		return nil
	}
	whole, err := os.ReadFile(at(cfg.CABundle))
	if err != nil {
		return err
	}
	return replaceFile(first, whole)
}

// setupTruststores replaces Java's trusted roots, where there are any.
func setupTruststores(at func(string) string, cfg *guest.Config) error {
	if cfg.Truststore == "" {
		return nil
	}
	for _, pattern := range truststores {
		// The pattern is a constant and well-formed.
		files, _ := filepath.Glob(at(pattern))
		for _, f := range files {
			real, err := filepath.EvalSymlinks(f)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			whole, err := os.ReadFile(at(cfg.Truststore))
			if err != nil {
				return err
			}
			if err := replaceFile(real, whole); err != nil {
				return err
			}
		}
	}
	return nil
}

func appendCert(file, cert string, done map[string]bool) error {
	real, err := filepath.EvalSymlinks(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if done[real] {
		return nil
	}
	done[real] = true
	old, err := os.ReadFile(real)
	if err != nil {
		return err
	}
	if bytes.Contains(old, []byte(strings.TrimSpace(cert))) {
		return nil
	}
	if len(old) > 0 && old[len(old)-1] != '\n' {
		old = append(old, '\n')
	}
	return replaceFile(real, append(old, cert...))
}
