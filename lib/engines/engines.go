// Package engines knows all engines of this build by name.
package engines

import (
	"os"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
)

// ByName gives an engine of this build, or nil.
func ByName(name string) engine.Engine {
	exe, err := os.Executable()
	if err != nil {
		exe = ""
	}
	return byName(name, exe)
}

// Find is ByName with an error: an engine that is left out of this build is a
// fault 78.
func Find(name string) (engine.Engine, error) {
	if e := ByName(name); e != nil {
		return e, nil
	}
	return nil, fault.New(fault.Host, "no_such_engine", "engine %q is not part of this build", name).
		WithHint("gvisor needs Linux; smolvm runs on Linux and macOS")
}
