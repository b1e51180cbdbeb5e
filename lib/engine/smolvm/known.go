package smolvm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
)

// knownFile is the version of the smolvm that bottles were started with last, in
// the state folder. Every command would have to ask for it.
const knownFile = "smolvm-version.json"

// known is knownFile.
type known struct {
	Program string         `json:"program"` // see identity
	Version smolvm.Version `json:"version"`
}

// open gives a client for the program, which is asked for its version unless that
// is known.
func (e *Engine) open(ctx context.Context, bin string) (*smolvm.Client, error) {
	program := identity(bin)
	if k := e.readKnown(); k.Program != "" && k.Program == program {
		return &smolvm.Client{Bin: bin, Env: e.env, Version: k.Version}, nil
	}
	c, err := smolvm.Open(ctx, bin, e.env)
	if err == nil && program == identity(bin) { // it is what has answered
		e.asked = known{program, c.Version}
	}
	return c, err
}

func (e *Engine) readKnown() (k known) {
	root, err := state.Open(e.getenv)
	if err != nil {
		return known{}
	}
	raw, err := os.ReadFile(filepath.Join(root.Dir, knownFile))
	if err != nil || json.Unmarshal(raw, &k) != nil {
		return known{}
	}
	return k
}

// note writes down what was asked for. Whoever only looks (a dry run, ls) leaves
// nothing. That it cannot be written costs the next command a question.
func (e *Engine) note() {
	e.mu.Lock()
	k := e.asked
	e.mu.Unlock()
	if k.Program == "" {
		return
	}
	if root, err := state.Open(e.getenv); err == nil {
		_ = root.WriteFile(knownFile, k)
	}
}

// identity tells a program from every other, and from what it was before it was
// changed; "" for one that may start another, whose version changes without it: a
// script, or a manager of versions.
func identity(bin string) string {
	real, err := filepath.EvalSymlinks(bin)
	if err != nil || filepath.Base(real) != "smolvm" {
		return ""
	}
	f, err := os.Open(real)
	if err != nil {
		return ""
	}
	defer f.Close()
	var magic [2]byte
	if _, err := f.Read(magic[:]); err != nil || string(magic[:]) == "#!" {
		return ""
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return ""
	}
	return fmt.Sprintf("%s %d:%d %d %d %d", real, st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano())
}
