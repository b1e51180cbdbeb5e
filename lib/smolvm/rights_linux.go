package smolvm

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// withheld are rights, root's as a rule, that no guest's monitor gets. It does in a shared
// folder what the guest's root asks for, with its own rights: there would be
// devices, the host's disk for one, and programs with capabilities in the
// workspace, for every user of the host who can reach it.
var withheld = []int{unix.CAP_MKNOD, unix.CAP_SETFCAP}

// begin starts cmd without the withheld rights. cmd may have no Pdeathsig: the
// thread that starts it ends at once.
func begin(cmd *exec.Cmd) error {
	begun := make(chan error, 1)
	go func() {
		// Rights are a thread's, and these do not come back: the thread ends with
		// the goroutine.
		runtime.LockOSThread()
		err := withhold()
		if err == nil {
			err = cmd.Start()
		}
		begun <- err
	}()
	return <-begun
}

// withhold takes the rights from what this thread starts. What it cannot take is
// an error, unless it is not there.
func withhold() error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return fmt.Errorf("what rights smolvm would get: %v", err)
	}
	for _, c := range withheld {
		// A plain user hands on the ambient ones, which go with the inheritable ones;
		// those pass by the bounding set where root runs a program, too.
		data[c/32].Inheritable &^= 1 << (c % 32)
		if os.Geteuid() != 0 {
			continue
		}
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0)
		if err == nil && has == 0 {
			continue
		}
		if err == nil {
			err = unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		}
		if err != nil {
			// No %w: that smolvm may not be executed is something else.
			return fmt.Errorf("smolvm cannot be kept from making devices in the workspace: %v", err)
		}
	}
	if err := unix.Capset(&head, &data[0]); err != nil {
		return fmt.Errorf("smolvm cannot be kept from making devices in the workspace: %v", err)
	}
	return nil
}
