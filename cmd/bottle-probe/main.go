// Command bottle-probe tries to get out of a sandbox, and reports what got out.
package main

import (
	"os"

	"github.com/bottle-tools/bottle/cmd/bottle-probe/cli"
	"github.com/bottle-tools/bottle/lib/tool"
)

func main() {
	// In the sandbox it is not the tool that people call.
	if status, ok := cli.Role(os.Args[1:], os.Stdin, os.Stdout, os.Stderr); ok {
		os.Exit(status)
	}
	tool.Main("bottle-probe", cli.Run)
}
