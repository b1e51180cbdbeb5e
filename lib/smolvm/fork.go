package smolvm

import (
	"context"
	"strings"
)

// MachineStartForkable boots like MachineStart, as a machine that MachineFork can
// copy: its memory is in a file that copies can be mapped from.
func (c *Client) MachineStartForkable(ctx context.Context, name string) error {
	if c.Version.Less(SinceFork) {
		return unsupported("machine start", c.Version, SinceFork, "--forkable")
	}
	_, err := c.verb(ctx, "start", name, c.bootTimeout(), "--forkable")
	return err
}

// MachineFork makes the new machine name, a running copy of base: its memory, its
// disks, its running commands. base stands still from then on, and is what every
// further copy begins with. Newer releases call it branch, and let base run on
// unless they are told.
//
// The copy has base's folders and sockets, by the paths that base was created
// with; what is there is looked up as the copy is made, by its monitor. launch may
// put the call into a mount namespace, and the monitor with it; it may be nil.
func (c *Client) MachineFork(ctx context.Context, base, name string, launch Launch) error {
	const op = "machine fork"
	if c.Version.Less(SinceFork) {
		return unsupported(op, c.Version, SinceFork, "fork")
	}
	for _, n := range []string{base, name} {
		if n == "" || strings.HasPrefix(n, "-") {
			return &Error{Kind: ErrInvalidName, Op: op, Exit: -1, Detail: n}
		}
	}
	args := []string{"machine", "fork", "--golden", base, "--name", name}
	if !c.Version.Less(SinceBranch) {
		args = []string{"machine", "branch", "--from", base, "--name", name, "--no-wait-ready", "--freeze-source"}
	}
	there := *c
	there.launch = launch
	_, err := there.call(ctx, op, c.bootTimeout(), c.common(args))
	return err
}
