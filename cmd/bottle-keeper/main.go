// Command bottle-keeper is the host process of one bottle. bottle-vm up starts
// it; by hand there is nothing to do with it.
package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"syscall"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/keeper"
	"github.com/bottle-tools/bottle/lib/tool"
)

func main() {
	if status, ok := keeper.InMounts(os.Args[1:]); ok {
		os.Exit(status)
	}
	tool.Main("bottle-keeper", func(ctx context.Context, p *tool.Proc) int {
		if slices.ContainsFunc(p.Args, func(a string) bool { return a == "-h" || a == "--help" }) {
			fmt.Fprintln(p.Stdout, "bottle-keeper: the host process of one bottle\n\n"+
				"bottle-vm up starts it and hands it everything on stdin; by hand there is\n"+
				"nothing to do with it. bottle-vm status ID asks it, bottle-vm down ID ends it.")
			return fault.OK
		}
		if len(p.Args) > 0 {
			return p.Report(fault.New(fault.Usage, "usage", "bottle-keeper takes no arguments").
				WithHint("bottle-vm up starts it"))
		}
		syscall.CloseOnExec(keeper.ReplyFD) // none of the processes it starts may hold it
		reply := os.NewFile(keeper.ReplyFD, "reply")
		return p.Report(keeper.Run(ctx, p.Stdin, reply, os.Stderr))
	})
}
