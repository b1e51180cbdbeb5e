package keeper

import (
	"os"

	"github.com/bottle-tools/bottle/lib/mountns"
)

// InMounts is what the keeper starts itself for where a program has to see
// folders of one bottle at paths that several share.
func InMounts(args []string) (status int, ok bool) {
	if len(args) == 0 || args[0] != mountns.Verb {
		return 0, false
	}
	return mountns.Main(args[1:], os.Stderr), true
}
