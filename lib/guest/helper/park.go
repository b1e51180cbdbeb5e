//go:build linux

package helper

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/guest"
)

// The first process of a machine that bottles are copied from does nothing but
// wait to be told which bottle it is. It knows no bottle, and holds nothing that
// one must not know of another.

// Park waits to be adopted, and becomes self with args then: a new process in
// all but its number, with nothing left of the one that was copied. before is called
// when it can be adopted.
func Park(self string, args []string, before func() error) error {
	adopted, child := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(adopted, unix.SIGUSR1)
	signal.Notify(child, unix.SIGCHLD)
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPIPE)
	if err := before(); err != nil {
		return err
	}
	for {
		select {
		case <-adopted:
			return fmt.Errorf("becoming %s: %w", self, unix.Exec(self, args, os.Environ()))
		case <-child:
			for pid := 1; pid > 0; {
				pid, _ = unix.Wait4(-1, nil, unix.WNOHANG, nil)
			}
		}
	}
}

// Parked finds the process that Park keeps, by its command line: smolvm 1.9.1 makes
// it the first one of its container, and 1.32.2 has one of its own before it. Nothing
// of a bottle runs yet that could call itself so.
func Parked(proc, self string) (pid int, err error) {
	dirs, err := os.ReadDir(proc)
	if err != nil {
		return 0, err
	}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		argv, err := os.ReadFile(filepath.Join(proc, d.Name(), "cmdline"))
		if err == nil && string(argv) == self+"\x00park\x00" {
			return pid, nil
		}
	}
	return 0, errors.New("no helper waits in this machine")
}

// Adopt makes the guest that it runs in one of its own and wakes the parked
// process. Random numbers come first: all that follows may draw some.
func Adopt(r io.Reader, parked int) error {
	var a guest.Adoption
	if err := json.NewDecoder(io.LimitReader(r, 64<<10)).Decode(&a); err != nil {
		return fmt.Errorf("what to become: %w", err)
	}
	if err := check(a); err != nil {
		return err
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"random numbers", func() error { return reseed(a.Seed) }},
		{"clock", func() error { return setClock(time.Unix(0, a.UnixNano)) }},
		{"host name", func() error { return unix.Sethostname([]byte(a.Hostname)) }},
		{"machine id", func() error { return setMachineID("/", a.MachineID) }},
		{"boot id", func() error { return coverBootID(a.BootID) }},
		{"the helper", func() error { return unix.Kill(parked, unix.SIGUSR1) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return nil
}

var (
	machineIDForm = regexp.MustCompile(`^[0-9a-f]{32}$`)
	bootIDForm    = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

func check(a guest.Adoption) error {
	switch {
	case a.Hostname == "":
		return errors.New("no host name")
	case len(a.Seed) != guest.SeedSize:
		return fmt.Errorf("a seed of %d bytes, and not of %d", len(a.Seed), guest.SeedSize)
	case !machineIDForm.MatchString(a.MachineID):
		return fmt.Errorf("%q is no machine id", a.MachineID)
	case !bootIDForm.MatchString(a.BootID):
		return fmt.Errorf("%q is no boot id", a.BootID)
	case a.UnixNano <= 0:
		return errors.New("no time")
	}
	return nil
}

// reseed mixes seed into the kernel's random numbers, counts it, and has them
// begun anew with it at once: what is only written to /dev/urandom is not used
// before the kernel's next turn, up to a minute later.
func reseed(seed []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info of random(4): the bits that it counts for, its size,
	// and the bytes.
	info := binary.NativeEndian.AppendUint32(nil, uint32(len(seed)*8))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(seed)))
	info = append(info, seed...)
	if err := ioctl(f, unix.RNDADDENTROPY, info); err != nil {
		return fmt.Errorf("adding: %w", err)
	}
	if err := ioctl(f, rndReseedCRNG, nil); err != nil {
		return fmt.Errorf("beginning anew: %w", err)
	}
	return nil
}

// setClock takes back what passed since the copied machine stood still.
func setClock(now time.Time) error {
	ts := unix.NsecToTimespec(now.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// setMachineID replaces the one that smolvm gives a copy: it draws it from the
// random numbers that all copies of a machine share, so that it is the same in
// each.
func setMachineID(root, id string) error {
	if err := replaceFile(filepath.Join(root, "etc/machine-id"), []byte(id+"\n")); err != nil {
		return err
	}
	bus := filepath.Join(root, "var/lib/dbus/machine-id")
	fi, err := os.Lstat(bus)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
		return nil
	}
	if err != nil {
		return err
	}
	return replaceFile(bus, []byte(id+"\n"))
}

// bootIDFile is what the kernel calls this boot; the copies of a machine have
// one boot.
const bootIDFile = "/proc/sys/kernel/random/boot_id"

// coverBootID mounts another over it. Guest root can undo that, and has its own
// guest's boot id then.
func coverBootID(id string) error {
	f, err := os.CreateTemp("/run", "boot-id.*")
	if err != nil {
		return err
	}
	_, err = f.WriteString(id + "\n")
	if err = errors.Join(err, f.Chmod(0o444), f.Close()); err != nil {
		return err
	}
	if err := unix.Mount(f.Name(), bootIDFile, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return os.Remove(f.Name()) // the mount keeps it
}
