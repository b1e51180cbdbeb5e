//go:build !linux

package smolvm

import (
	"testing"

	"github.com/bottle-tools/bottle/lib/smolvm/smolvmtest"
)

func TestMain(m *testing.M) { smolvmtest.Main(m) }
