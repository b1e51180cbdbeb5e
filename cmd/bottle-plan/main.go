// Command bottle-plan turns a manifest into plan documents.
package main

import (
	"github.com/bottle-tools/bottle/cmd/bottle-plan/cli"
	"github.com/bottle-tools/bottle/lib/tool"
)

func main() { tool.Main("bottle-plan", cli.Run) }
