package guest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"syscall"
	"time"
)

// Report is what the helper answers to the Greeting, as a line of JSON: that the
// guest is set up, or why it could not be.
type Report struct {
	Inodes []uint64 `json:"inodes"` // of Config.Folders, in that order
	Failed string   `json:"failed,omitempty"`
}

// maxReport bounds what a keeper reads of it.
const maxReport = 64 << 10

// ErrStranger is Greet's error where somebody answers who is not the keeper.
var ErrStranger = errors.New("answers somebody who is not the keeper")

// Until tries again and again: until it works, a stranger answers, or the deadline
// has passed.
func Until(deadline time.Time, try func() error) error {
	for {
		err := try()
		if err == nil || errors.Is(err, ErrStranger) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Greet hears on socket what the keeper says there as long as the guest is being
// started, and answers with r, unless that is nil. Connecting alone proves nothing:
// smolvm's agent takes the connection itself, and closes it when there is nobody on
// the host.
func Greet(socket string, deadline time.Time, r *Report) error {
	return Until(deadline, func() error { return greet(socket, deadline, r) })
}

func greet(socket string, deadline time.Time, r *Report) error {
	c, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	heard := make([]byte, len(Greeting))
	if n, err := io.ReadFull(c, heard); err != nil {
		return fmt.Errorf("%s is there, and nobody answers on it: %d bytes, %w", socket, n, err)
	}
	if string(heard) != Greeting {
		return fmt.Errorf("on %s %w: %q", socket, ErrStranger, heard)
	}
	if r == nil {
		return nil
	}
	return json.NewEncoder(c).Encode(r)
}

// ReadReport reads one; ok is false where somebody only listened. The guest may
// have written anything.
func ReadReport(r io.Reader) (report Report, ok bool) {
	line, err := bufio.NewReader(io.LimitReader(r, maxReport)).ReadBytes('\n')
	if err != nil || json.Unmarshal(line, &report) != nil {
		return Report{}, false
	}
	report.Failed = printable(report.Failed)
	return report, true
}

// Inodes gives the inode numbers of the paths, which a file server of the host
// passes through as they are.
func Inodes(paths []string) (all []uint64, err error) {
	for _, p := range paths {
		var st syscall.Stat_t
		if err := syscall.Stat(p, &st); err != nil {
			return all, &fs.PathError{Op: "stat", Path: p, Err: err}
		}
		all = append(all, st.Ino)
	}
	return all, nil
}
