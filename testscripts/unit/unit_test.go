// Package unit runs the tools without a bottle: as links to the test binary, in
// real pipes, with real exit statuses.
package unit

import (
	"testing"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

func TestSuite(t *testing.T) { harness.Suite{Dir: "."}.Run(t) }
