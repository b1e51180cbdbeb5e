//go:build linux

// Package helper is the body of bottle-guest: the first process in the guest.
// It prepares what the image lacks, relays the loopback proxy port and the names
// that the policy opens to the gate, and reaps orphans. It runs as the guest's
// root with no capability left but the one for low ports; the agent is another
// user and cannot touch it.
package helper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/guest"
)

// Run is the life of the helper; it returns on failure, and when the keeper is
// gone. configPath is
// usually engine.GuestConfig. Problems that do not stop it go to stderr.
func Run(configPath string, stderr io.Writer) error {
	cfg, err := readConfig(configPath)
	if err != nil {
		return err
	}
	var dial dialFunc
	var gone <-chan struct{}
	var ready func() error
	var failed func(error) error
	switch cfg.Transport {
	case guest.TransportFD:
		unix.CloseOnExec(cfg.FD)
		d, err := guest.NewDialer(os.NewFile(uintptr(cfg.FD), "gate"))
		if err != nil {
			return err
		}
		dial, ready, failed, gone = fdDial(d), d.Ready, d.Failed, d.Gone()
	case guest.TransportUnix:
		dial = socketDial
		var inodes []uint64
		// With all of root's rights, which start gives up, and before anything listens:
		// what is asked by a command then has a helper that can answer.
		if inodes, err = guest.Inodes(cfg.Folders); err == nil {
			err = CopySelf(cfg.Copy)
		}
		ready, failed = reporter(cfg, inodes, stderr)
	default:
		return fmt.Errorf("%s: unknown transport %q", configPath, cfg.Transport)
	}
	var names *names
	if err == nil {
		names, err = start(cfg, dial, stderr)
	}
	if err != nil {
		return errors.Join(err, failed(err))
	}
	if err := ready(); err != nil {
		return errors.Join(err, failed(err))
	}
	if err := names.complete(); err != nil {
		fmt.Fprintf(stderr, "names: %v\n", err)
	}
	if err := drop(unix.CAP_NET_BIND_SERVICE); err != nil {
		return err
	}
	// The engine may have started it with one, which is quicker.
	runtime.GOMAXPROCS(runtime.NumCPU())
	reap(gone)
	return errors.New("the keeper is gone, and the guest ends with it")
}

func readConfig(path string) (*guest.Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var cfg guest.Config
	if err := json.Unmarshal(b, &cfg); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &cfg, nil
}

// start does the set-up, gives up what privileges it has no more use for and
// begins to relay.
func start(cfg *guest.Config, dial dialFunc, stderr io.Writer) (*names, error) {
	if err := setup("/", cfg); err != nil {
		return nil, err
	}
	listeners, relays := make([]net.Listener, len(cfg.Relays)), make([]*relay, len(cfg.Relays))
	var names *names
	for i, r := range cfg.Relays {
		l, err := net.Listen("tcp", r.Listen)
		if err != nil {
			return nil, fmt.Errorf("relay for %s: %w", r.Service, err)
		}
		listeners[i] = l
		relays[i] = newRelay(r, dial, stderr)
		if r.Service == guest.ServiceEgress {
			names = newNames(relays[i], stderr)
		}
	}
	if err := ownAddresses(cfg.Addresses); err != nil {
		return nil, err
	}
	if err := drop(unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_ADMIN); err != nil {
		return nil, err
	}
	if names == nil {
		return nil, errors.New("the config has no way to the gate")
	}
	if err := names.start(cfg.Addresses); err != nil {
		return nil, err
	}
	for i, r := range relays {
		go r.serve(listeners[i])
	}
	return names, nil
}

// CopySelf puts this program at path ("" for nowhere), for root alone: all at once,
// as somebody may run it already.
func CopySelf(path string) (err error) {
	if path == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	from, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.CreateTemp(filepath.Dir(path), "new.*")
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	if err = errors.Join(err, to.Chmod(0o700), to.Close()); err == nil {
		err = os.Rename(to.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(to.Name()))
	}
	return nil
}

// reap collects the orphans that the kernel hands to the first process. It
// returns when the keeper is gone: the end of the first process is the end of
// the guest, and an agent without a keeper would work on with nobody to guard
// the workspace.
func reap(gone <-chan struct{}) {
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	// The usual ways to end a process must not end the guest by accident.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPIPE)
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
		}
		select {
		case <-child:
		case <-gone:
			return
		}
	}
}
