//go:build !linux

package smolvm

import (
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/smolvm"
)

const mountsOfItsOwn = false

func inMounts(*engine.Spec, []smolvm.Volume, *Base) smolvm.Launch { return nil }
