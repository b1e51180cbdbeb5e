//go:build linux

// Package cli is the body of bottle-guest. It uses no flag library: the binary
// is in every guest, and its callers are the bottle tools alone.
package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"runtime/debug"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/engine/smolvm/runner"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/guest/helper"
	"github.com/bottle-tools/bottle/lib/tarfs"
)

const usage = `usage: bottle-guest [init [CONFIG]]
       bottle-guest tar-out PATH
       bottle-guest tar-in DIR
       bottle-guest cover pin|hide PATH
       bottle-guest park
       bottle-guest parked
       bottle-guest adopt

init is what the bottle tools start as the first process of a guest; CONFIG is
` + engine.GuestConfig + ` by default. tar-out writes PATH as a tar stream to
stdout, tar-in unpacks one from stdin below DIR; cover mounts over PATH,
read-only. park is the first process of a machine that bottles are copied from,
and parked ends when that waits; adopt, in the copy, makes it one bottle's own, as
stdin says. Example:

    bottle-guest tar-out /workspace/report | tar -tf -
`

// parkLimit is what the helper of a machine that was just started gets to wait in it.
const parkLimit = 20 * time.Second

// Main runs the helper and gives its exit status (lib/fault).
func Main(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		args = []string{"init"}
	}
	// What the smolvm engine has it do beside.
	if status, ok := runner.Main(args, stdout, stderr); ok {
		return status
	}
	verb, rest := args[0], args[1:]
	switch {
	case verb == "help" || verb == "--help" || verb == "-h":
		fmt.Fprint(stdout, usage)
		return fault.OK
	case verb == "init" && len(rest) <= 1:
		config := engine.GuestConfig
		if len(rest) == 1 {
			config = rest[0]
		}
		// It lives as long as the guest and holds next to nothing: memory is
		// worth more than the time to collect it.
		debug.SetGCPercent(25)
		return report(stderr, fault.Host, helper.Run(config, stderr))
	case verb == "tar-out" && len(rest) == 1:
		if _, err := os.Lstat(path.Clean(rest[0])); errors.Is(err, fs.ErrNotExist) {
			return report(stderr, fault.NoInput, err)
		}
		return report(stderr, fault.IO, tarfs.Out(rest[0], stdout, stderr))
	case verb == "tar-in" && len(rest) == 1:
		return report(stderr, fault.IO, tarfs.In(rest[0], stdin))
	case verb == "park" && len(rest) == 0:
		return report(stderr, fault.Host, helper.Park(runner.LocalHelper, []string{engine.GuestHelper, "init", engine.GuestConfig},
			func() error { return helper.CopySelf(runner.LocalHelper) }))
	case verb == "parked" && len(rest) == 0:
		return report(stderr, fault.Host, guest.Until(time.Now().Add(parkLimit), func() error {
			if _, err := os.Lstat(runner.LocalHelper); err != nil {
				return err
			}
			_, err := helper.Parked("/proc", engine.GuestHelper)
			return err
		}))
	case verb == "adopt" && len(rest) == 0:
		parked, err := helper.Parked("/proc", engine.GuestHelper)
		if err == nil {
			err = helper.Adopt(stdin, parked)
		}
		return report(stderr, fault.Host, err)
	case verb == "cover" && len(rest) == 2 && (rest[0] == helper.CoverPin || rest[0] == helper.CoverHide):
		return report(stderr, fault.IO, helper.Cover(rest[0], rest[1]))
	}
	fmt.Fprint(stderr, usage)
	return fault.Usage
}

func report(stderr io.Writer, status int, err error) int {
	if err == nil {
		return fault.OK
	}
	fmt.Fprintf(stderr, "bottle-guest: error: %v\n", err)
	return status
}
