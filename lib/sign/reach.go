package sign

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/trust"
)

const (
	maxSigners = 1 << 20
	maxLinks   = 40
)

func readGuarded(path string, away []string) ([]byte, error) {
	abs, err := filepath.Abs(path)
	if err == nil {
		err = guarded(abs, away)
	}
	if f := fault.As(err); f != nil && f.Exit != fault.Bug {
		return nil, err
	}
	var raw []byte
	if err == nil {
		raw, err = trust.ReadFile(abs, maxSigners)
	}
	if err != nil {
		return nil, fault.New(fault.NoInput, "no_signers", "signers: %w", err).
			WithHint("give a file as in ssh-keygen(1), ALLOWED SIGNERS: NAME namespaces=%q ssh-ed25519 AAAA…", Namespace)
	}
	return raw, nil
}

// guarded walks to abs as the kernel does, through every symlink, and refuses a
// step that a guest or another user could change.
func guarded(abs string, away []string) error {
	here, rest := "/", strings.Split(strings.Trim(abs, "/"), "/")
	for links := 0; len(rest) > 0; {
		if err := own(abs, here); err != nil {
			return err
		}
		step := rest[0]
		rest = rest[1:]
		switch step {
		case "", ".":
			continue
		case "..":
			here = filepath.Dir(here)
			continue
		}
		next := filepath.Join(here, step)
		for _, dir := range away {
			if trust.Within(dir, next) {
				return fault.New(fault.NoPerm, "signers_in_reach", "%s lies in %s (%s), which belongs to the bottle: a guest or a repository would say whose signature counts", abs, dir, next).
					WithHint("keep it where no bottle and no checkout comes, such as ~/.config/bottle/allowed_signers")
			}
		}
		fi, err := os.Lstat(next)
		if err != nil {
			return err
		}
		if fi.Mode()&os.ModeSymlink == 0 {
			here = next
			continue
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() { // in a sticky folder
			return fault.New(fault.NoPerm, "signers_in_reach", "%s: the link %s belongs to uid %d, who could say whose signature counts", abs, next, st.Uid).
				WithHint("keep it in a folder of your own")
		}
		if links++; links > maxLinks {
			return &os.PathError{Op: "open", Path: abs, Err: syscall.ELOOP}
		}
		target, err := os.Readlink(next)
		if err != nil {
			return err
		}
		if filepath.IsAbs(target) {
			here = "/"
		}
		rest = append(strings.Split(strings.Trim(target, "/"), "/"), rest...)
	}
	return own(abs, here)
}

// own refuses a folder or file on the way that another user could change. In a
// sticky folder each name belongs to its owner.
func own(abs, step string) error {
	fi, err := os.Lstat(step)
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !fi.IsDir() && !fi.Mode().IsRegular():
		return &os.PathError{Op: "read", Path: step, Err: errors.New("not a regular file")}
	case ok && st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fault.New(fault.NoPerm, "signers_in_reach", "%s: %s belongs to uid %d, who could say whose signature counts", abs, step, st.Uid).
			WithHint("keep it in a folder of your own")
	case fi.Mode().Perm()&0o022 != 0 && fi.Mode()&os.ModeSticky == 0:
		return fault.New(fault.NoPerm, "signers_in_reach", "%s: %s can be written by others (mode %o), who could say whose signature counts", abs, step, fi.Mode().Perm()).
			WithHint("keep it in a folder that only you can write")
	}
	return nil
}
