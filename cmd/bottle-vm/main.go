// Command bottle-vm starts bottles, runs commands in them and removes them.
package main

import (
	"github.com/bottle-tools/bottle/cmd/bottle-vm/cli"
	"github.com/bottle-tools/bottle/lib/tool"
)

func main() { tool.Main("bottle-vm", cli.Run) }
