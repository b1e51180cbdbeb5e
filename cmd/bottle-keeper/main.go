// Command bottle-keeper is the host process of one bottle. bottle-vm up starts
// it; by hand there is nothing to do with it.
package main

import (
	"context"
	"os"
	"syscall"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/keeper"
	"github.com/bottle-tools/bottle/lib/tool"
)

func main() {
	tool.Main("bottle-keeper", func(ctx context.Context, p *tool.Proc) int {
		if len(p.Args) > 0 {
			return p.Report(fault.New(fault.Usage, "usage", "bottle-keeper takes no arguments").
				WithHint("bottle-vm up starts it"))
		}
		syscall.CloseOnExec(keeper.ReplyFD) // none of the processes it starts may hold it
		reply := os.NewFile(keeper.ReplyFD, "reply")
		return p.Report(keeper.Run(ctx, p.Stdin, reply, os.Stderr))
	})
}
