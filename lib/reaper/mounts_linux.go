package reaper

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/trust"
)

// mountsBelow gives the mount points at or below dir, deepest first.
func mountsBelow(dir string) ([]string, error) {
	dir, err := filepath.EvalSymlinks(dir) // the table has resolved paths
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading the mount table: %w", err)
	}
	return parseMounts(raw, dir), nil
}

// parseMounts reads proc_pid_mountinfo(5): field 5 is the mount point, with
// space, tab, newline and backslash as octal escapes. Later mounts hide earlier
// ones, so the reverse of the table's order is that of unmounting.
func parseMounts(raw []byte, dir string) []string {
	var below []string
	for line := range bytes.Lines(raw) {
		f := bytes.Fields(line)
		if len(f) < 5 {
			continue
		}
		if path := unescape(string(f[4])); trust.Within(dir, path) {
			below = append(below, path)
		}
	}
	slices.Reverse(below)
	return below
}

func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// unmountBelow leaves nothing mounted at or below dir, or says why: a removal
// must never walk through a mount.
func unmountBelow(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		_ = unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if len(mounts) == 0 {
		return nil
	}
	left, err := mountsBelow(dir)
	if err != nil || len(left) == 0 {
		return err
	}
	return fault.New(fault.NoPerm, "still_mounted", "%s is still mounted, so %s stays", left[0], dir).
		WithHint("umount %s as root, then bottle-gc --apply", left[0])
}
