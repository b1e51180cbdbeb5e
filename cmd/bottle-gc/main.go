// Command bottle-gc lists what dead bottles left behind, with the evidence, and
// removes it when told to.
package main

import (
	"github.com/bottle-tools/bottle/cmd/bottle-gc/cli"
	"github.com/bottle-tools/bottle/lib/tool"
)

func main() { tool.Main("bottle-gc", cli.Run) }
