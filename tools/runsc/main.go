// Command bottle-runsc is gVisor's runsc with the subcommands that the bottle
// tools use and nothing else.
//
// The stock main of the module (runsc/cli/maincli) embeds a prebuilt 47 MB
// helper binary through runsc/gvisorbinaries/embed; nothing here needs it, and
// a program whose every byte comes from source is easier to vouch for. The
// subcommand sets come from maincli of the pinned module version.
//
// Build it with CGO_ENABLED=0: it executes itself in an empty root folder, where
// a dynamically linked program has no loader.
package main

import (
	"os"

	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd"
	"gvisor.dev/gvisor/runsc/cmd/util"
)

const internalGroup = "internal use only"

func main() {
	quicken(os.Args)
	cli.Run(nil, map[util.SubCommand]string{
		new(cmd.Checkpoint): "",
		new(cmd.Create):     "",
		new(cmd.Delete):     "",
		new(cmd.Events):     "",
		new(cmd.Exec):       "",
		new(cmd.Kill):       "",
		new(cmd.List):       "",
		new(cmd.PS):         "",
		new(cmd.Pause):      "",
		new(cmd.Restore):    "",
		new(cmd.Resume):     "",
		new(cmd.Run):        "",
		new(cmd.Start):      "",
		new(cmd.State):      "",
		new(cmd.Tar):        "",
		new(cmd.Wait):       "",

		// runsc re-executes itself under these.
		new(sentrycmd.Boot):   internalGroup,
		new(cmd.Gofer):        internalGroup,
		new(sentrycmd.Umount): internalGroup,
	}, nil)
}
