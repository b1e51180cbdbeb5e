// Command bottle-pack adds the pack section to documents: it turns a plan's
// image into a root file system in the cache.
package main

import (
	"github.com/bottle-tools/bottle/cmd/bottle-pack/cli"
	"github.com/bottle-tools/bottle/lib/tool"
)

func main() { tool.Main("bottle-pack", cli.Run) }
