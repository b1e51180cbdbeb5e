package live

import (
	"time"

	"golang.org/x/sys/unix"
)

// Now reads both clocks.
func Now() Instant {
	now := Instant{Wall: time.Now().UnixNano()}
	var ts unix.Timespec
	// It can fail only for a clock that the kernel does not know; this one is as
	// old as Linux 2.6.39.
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) == nil {
		now.Boot = ts.Nano()
	}
	return now
}
