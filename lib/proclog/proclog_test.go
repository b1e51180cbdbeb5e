package proclog

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBounded(t *testing.T) {
	l := &File{Path: filepath.Join(t.TempDir(), "log")}
	line := []byte(strings.Repeat("x", 1<<16-1) + "\n")
	for range 3 * Max / len(line) {
		l.Write(line)
	}
	l.Close()
	for _, p := range []string{l.Path, l.Path + ".1"} {
		if fi, err := os.Stat(p); err != nil || fi.Size() > Max {
			t.Errorf("%s: %v %v", p, fi, err)
		}
	}
	// A disk that takes nothing does not stop the program.
	full := &File{Path: filepath.Join(t.TempDir(), "missing", "log")}
	full.Write(line)
	full.Close()
}
