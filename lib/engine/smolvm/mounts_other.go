//go:build !linux

package smolvm

import (
	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/smolvm"
)

const (
	mountsOfItsOwn = false
	inMountsVerb   = "in-mounts"
)

func inMounts(*engine.Spec, []smolvm.Volume, *Base) smolvm.Launch { return nil }

func withImage(*engine.Spec) smolvm.Launch { return nil }

func notMounted(error) (string, bool) { return "", false }
