// Command bottle-egress adds the egress section to documents, prints the
// configuration for pipelock, and serves one bottle's gate.
package main

import (
	"github.com/bottle-tools/bottle/cmd/bottle-egress/cli"
	"github.com/bottle-tools/bottle/lib/tool"
)

func main() { tool.Main("bottle-egress", cli.Run) }
