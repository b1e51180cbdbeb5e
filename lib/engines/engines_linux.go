package engines

import (
	"os"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engine/gvisor"
	"github.com/bottle-tools/bottle/lib/engine/smolvm"
)

func byName(name, exe string) engine.Engine {
	switch name {
	case "gvisor":
		return gvisor.New(os.Getenv, exe)
	case "smolvm":
		return smolvm.New(os.Environ())
	}
	return nil
}
