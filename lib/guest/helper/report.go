//go:build linux

package helper

import (
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/bottle-tools/bottle/lib/guest"
)

// Times to find the keeper on the gate's socket. It is there before the guest is;
// where it is not, smolvm has left the socket out, or somebody has started the
// machine by hand, and the guest goes on.
const (
	reportLimit = 20 * time.Second
	failedLimit = 2 * time.Second
)

// reporter gives what tells the keeper by the gate's socket that the guest is
// ready, and has folders of these inode numbers, or why it is not.
func reporter(cfg *guest.Config, inodes []uint64, stderr io.Writer) (ready func() error, failed func(error) error) {
	tell := func(limit time.Duration, r guest.Report) error {
		i := slices.IndexFunc(cfg.Relays, func(r guest.Relay) bool { return r.Service == guest.ServiceEgress })
		if i < 0 {
			return nil // that is what failed
		}
		return guest.Greet(cfg.Relays[i].Socket, time.Now().Add(limit), &r)
	}
	ready = func() error {
		go func() {
			if err := tell(reportLimit, guest.Report{Inodes: inodes}); err != nil {
				fmt.Fprintf(stderr, "the keeper was not told: %v\n", err)
			}
		}()
		return nil
	}
	return ready, func(why error) error { return tell(failedLimit, guest.Report{Failed: why.Error()}) }
}
