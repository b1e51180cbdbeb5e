//go:build !linux

package engines

import (
	"os"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engine/smolvm"
)

func byName(name, _ string) engine.Engine {
	if name == "smolvm" {
		return smolvm.New(os.Environ())
	}
	return nil
}
