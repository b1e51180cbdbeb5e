package smolvm

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// UnpackTimeout is what a start may take on top of a boot when it has to unpack
// first: ten seconds to half a minute natively, six minutes and more under
// emulation. One that is cut off has to begin anew.
const UnpackTimeout = 30 * time.Minute

// templates are the file systems of a machine's disks. Newer packages bring them
// compressed (30 GiB of nothing in one MB), and the first start unpacks them.
var templates = []string{"storage-template.ext4", "overlay-template.ext4"}

// Unpacks tells whether the next start will first unpack what smolvm comes with.
// smolvm does that once for an installation, beside the program, or once for a
// user, in the cache folder, where the program's folder cannot be written to
// (seen with 1.32.2).
func (c *Client) Unpacks() bool {
	bin, err := filepath.EvalSymlinks(c.Bin)
	if err != nil {
		return false
	}
	dir := filepath.Dir(bin)
	for _, name := range templates {
		if !regular(filepath.Join(dir, name+".zst")) {
			continue
		}
		if !regular(filepath.Join(dir, name)) && !regular(filepath.Join(c.cacheDir(), name)) {
			return true
		}
	}
	return false
}

func regular(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular()
}

// cacheDir is smolvm's own: from the environment that it will run in.
func (c *Client) cacheDir() string {
	env := c.Env
	if env == nil {
		env = os.Environ()
	}
	value := map[string]string{}
	for _, kv := range env {
		name, v, _ := strings.Cut(kv, "=")
		value[name] = v
	}
	dir := value["XDG_CACHE_HOME"]
	switch {
	case runtime.GOOS == "darwin":
		dir = filepath.Join(value["HOME"], "Library", "Caches")
	case !filepath.IsAbs(dir):
		dir = filepath.Join(value["HOME"], ".cache")
	}
	return filepath.Join(dir, "smolvm")
}
