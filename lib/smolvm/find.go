package smolvm

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
)

// Find gives the path of the smolvm to use: $BOTTLE_SMOLVM if it is set, else
// the first on PATH, else the newest below <data>/bottle/smolvm (as
// <version>/smol/smolvm, <version>/smolvm or smolvm itself), where data is
// $XDG_DATA_HOME or ~/.local/share. A BOTTLE_SMOLVM that names nothing
// executable is an error and not skipped: somebody meant it.
func Find(getenv func(string) string) (string, error) {
	if p := getenv("BOTTLE_SMOLVM"); p != "" {
		if !filepath.IsAbs(p) {
			return "", missing("BOTTLE_SMOLVM is not an absolute path: " + p)
		}
		if err := executable(p); err != nil {
			return "", missing("BOTTLE_SMOLVM: " + err.Error())
		}
		return p, nil
	}
	if p := lookPath(getenv("PATH")); p != "" {
		return p, nil
	}
	if p := installed(InstallDir(getenv)); p != "" {
		return p, nil
	}
	return "", missing("neither in BOTTLE_SMOLVM nor on PATH nor below the bottle tools' data folder")
}

func missing(detail string) *Error { return &Error{Kind: ErrMissing, Exit: -1, Detail: detail} }

// IsAvailable tells whether there is a smolvm that answers with its version.
// The error says why not, or what went wrong while asking.
func IsAvailable(ctx context.Context, getenv func(string) string, env []string) (bool, error) {
	bin, err := Find(getenv)
	if err != nil {
		return false, err
	}
	if _, err := Open(ctx, bin, env); err != nil {
		return false, err
	}
	return true, nil
}

// lookPath is exec.LookPath on a PATH given as a value. Relative entries are
// skipped: what runs must not depend on the folder a command was typed in.
func lookPath(path string) string {
	for _, dir := range filepath.SplitList(path) {
		if !filepath.IsAbs(dir) {
			continue
		}
		if p := filepath.Join(dir, "smolvm"); executable(p) == nil {
			return p
		}
	}
	return ""
}

func executable(p string) error {
	fi, err := os.Stat(p)
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o111 == 0 {
		return &fs.PathError{Op: "exec", Path: p, Err: fs.ErrPermission}
	}
	return nil
}

// InstallDir is where Find looks for smolvms that were installed for the bottle
// tools, one folder a version; "" without a home.
func InstallDir(getenv func(string) string) string {
	data := dataHome(getenv)
	if data == "" {
		return ""
	}
	return filepath.Join(data, "bottle", "smolvm")
}

func dataHome(getenv func(string) string) string {
	if d := getenv("XDG_DATA_HOME"); filepath.IsAbs(d) {
		return d
	}
	if h := getenv("HOME"); filepath.IsAbs(h) {
		return filepath.Join(h, ".local", "share")
	}
	return ""
}

// installed gives the newest smolvm below root, or "".
func installed(root string) string {
	if root == "" {
		return ""
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return ""
	}
	var versions []Version
	for _, e := range entries {
		if v, err := ParseVersion("smolvm " + e.Name()); err == nil && v.String() == e.Name() {
			versions = append(versions, v)
		}
	}
	sort.Slice(versions, func(i, j int) bool { return versions[j].Less(versions[i]) })
	candidates := []string{}
	for _, v := range versions {
		candidates = append(candidates, filepath.Join(root, v.String(), "smol", "smolvm"), filepath.Join(root, v.String(), "smolvm"))
	}
	for _, p := range append(candidates, filepath.Join(root, "smolvm")) {
		if executable(p) == nil {
			return p
		}
	}
	return ""
}
