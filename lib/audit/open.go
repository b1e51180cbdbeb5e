package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

// changed is the code of a log that somebody else has laid hands on.
const changed = "audit_log_changed"

// Open opens or makes the log at path, 0600, for this process alone: another
// writer is a fault (75). A file that is no regular file of the caller's own,
// or that others may write, is one (77), and so is a log whose last line is not
// opts.Head. Numbers and chain go on where the log ends; a last line that a
// crash cut short is closed, and the next line accounts for it.
func Open(path string, opts Options) (*Log, error) {
	f, err := openActive(path)
	if err != nil {
		return nil, err
	}
	l := newLog(f, opts)
	l.path = path
	l.create = func() (file, error) {
		f, err := create(path)
		if err != nil {
			return nil, err
		}
		return f, nil
	}
	if err := l.resume(f); err != nil {
		f.Close()
		return nil, err
	}
	return l, nil
}

// logFile is the file that is written to.
type logFile struct {
	*os.File
	path string
	info os.FileInfo
}

func newLogFile(f *os.File, path string) (*logFile, error) {
	st, err := f.Stat()
	return &logFile{f, path, st}, err
}

// Sync also looks if the file is still the log: lines in a file that was
// removed, replaced or emptied are lost however durable they are.
func (f *logFile) Sync(size int64) error {
	if err := datasync(f.File); err != nil {
		return err
	}
	st, err := os.Lstat(f.path)
	if err == nil && os.SameFile(st, f.info) && st.Size() >= size {
		return nil
	}
	return wasChanged(f.path, "it was removed, replaced or shortened while its gate wrote to it")
}

func wasChanged(path, how string) error {
	return fault.New(fault.NoPerm, changed, "audit log %s: %s", path, how).
		WithHint("the gate stays closed; keep the file for whoever looks into it, and start the bottle anew")
}

// openActive opens path for appending and locks it.
func openActive(path string) (*logFile, error) {
	for range 100 {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, cannotOpen(path, err)
		}
		lf, err := newLogFile(f, path)
		if err == nil {
			err = trusted(lf.info, path)
		}
		if err == nil {
			err = lock(f, path)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		// The gate that had it may have rotated it just before its end.
		if st, err := os.Lstat(path); err == nil && os.SameFile(st, lf.info) {
			return lf, nil
		}
		f.Close()
	}
	return nil, busy(path)
}

func trusted(st os.FileInfo, path string) error {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o022 != 0 || !ok || int(sys.Uid) != os.Geteuid() || sys.Nlink > 1 {
		return fault.New(fault.NoPerm, "audit_log_untrusted",
			"audit log %s has to be a regular file of the user's own that nobody else may write or link", path).
			WithHint("move it away; a new one is made")
	}
	return nil
}

func lock(f *os.File, path string) error {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return busy(path)
	}
	if err != nil {
		return fault.New(fault.IO, "audit_log_failed", "audit log: locking: %w", err)
	}
	return nil
}

func busy(path string) error {
	return fault.New(fault.TempFail, "audit_log_busy", "another gate writes to audit log %s", path).
		WithHint("give each gate a file of its own")
}

func cannotOpen(path string, err error) error {
	switch {
	case errors.Is(err, syscall.ELOOP):
		return fault.New(fault.NoPerm, "audit_log_untrusted", "audit log %s is a symbolic link", path).
			WithHint("remove it; the log has to be a file of its own")
	case errors.Is(err, fs.ErrPermission):
		return fault.New(fault.NoPerm, "audit_log_denied", "audit log: %w", err).
			WithHint("the bottle's state folder has to belong to the user who runs the gate")
	}
	return fault.New(fault.CantCreate, "audit_log_failed", "audit log: %w", err).
		WithHint("make the folder first, and check the room on its disk")
}

// create makes the file that takes the place of one that was rotated.
func create(path string) (*logFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, wasChanged(path, "another file took its place while it was rotated")
	}
	if err != nil {
		return nil, err
	}
	lf, err := newLogFile(f, path)
	if err == nil {
		err = lock(f, path)
	}
	if err == nil {
		err = syncDir(path)
	}
	if err != nil {
		f.Close()
		_ = os.Remove(path)
		return nil, err
	}
	return lf, nil
}

// syncDir makes the name of a file durable.
func syncDir(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// ending is the end of a file.
type ending struct {
	head  Head   // of the last event; zero without one
	after []byte // what stands behind it
}

// endOf reads the end of a file. One that is long and has no event there was
// not written by a gate.
func endOf(f *os.File, path string) (ending, error) {
	st, err := f.Stat()
	if err != nil {
		return ending{}, cannotRead(err)
	}
	tail := make([]byte, min(st.Size(), 2*maxLine))
	if _, err := f.ReadAt(tail, st.Size()-int64(len(tail))); err != nil && err != io.EOF {
		return ending{}, cannotRead(err)
	}
	for end := bytes.LastIndexByte(tail, '\n') + 1; end > 0; {
		begin := bytes.LastIndexByte(tail[:end-1], '\n') + 1
		var e Event
		if json.Unmarshal(tail[begin:end], &e) == nil && e.Seq > 0 {
			return ending{Head{e.Seq, digest(tail[begin:end])}, tail[end:]}, nil
		}
		end = begin
	}
	if int64(len(tail)) < st.Size() {
		return ending{}, wasChanged(path, "its end holds no line of a gate")
	}
	return ending{after: tail}, nil
}

// Tail is the last line of the log at path; zero if it has none, or if there is
// no log.
func Tail(path string) (Head, error) {
	files, err := Files(path)
	for i := len(files) - 1; i >= 0 && err == nil; i-- {
		var f *os.File
		if f, err = openRegular(files[i]); err != nil {
			return Head{}, cannotRead(err)
		}
		var end ending
		end, err = endOf(f, files[i])
		f.Close()
		if end.head.Seq > 0 {
			return end.head, err
		}
	}
	return Head{}, err
}

// Holds tells if the log at path has the line h, or is by now so far that it was
// dropped. The newest file is looked at first.
func Holds(path string, h Head) (bool, error) {
	if h.Seq == 0 {
		return true, nil
	}
	files, err := Files(path)
	if err != nil || len(files) == 0 {
		return false, err
	}
	for i := len(files) - 1; i >= 0; i-- {
		f, err := openRegular(files[i])
		if err != nil {
			return false, cannotRead(err)
		}
		oldest, found, err := scan(f, h)
		f.Close()
		switch {
		case err != nil || found:
			return found, err
		case i == 0:
			return oldest > h.Seq, nil
		}
	}
	return false, nil
}

// scan looks for a line by its digest, and gives the number of the first one.
func scan(f *os.File, h Head) (first uint64, found bool, err error) {
	r := NewReader(f, f.Name())
	for {
		raw, err := r.line()
		if err == io.EOF {
			return first, false, nil
		}
		if err != nil {
			return first, false, err
		}
		if first == 0 {
			var e Event
			if json.Unmarshal(raw, &e) == nil {
				first = e.Seq
			}
		}
		if digest(append(raw, '\n')) == h.SHA256 {
			return first, true, nil
		}
	}
}

// resume goes on where the log ends.
func (l *Log) resume(f *logFile) error {
	end, err := endOf(f.File, l.path)
	if err != nil {
		return err
	}
	l.head = end.head
	before, err := rotated(l.path)
	if err != nil {
		return cannotRead(err)
	}
	if len(before) > 0 {
		l.number = before[len(before)-1] + 1
	}
	if l.head.Seq == 0 && len(before) > 0 {
		// A rotation that was broken off.
		if l.head, err = Tail(numbered(l.path, before[len(before)-1])); err != nil {
			return err
		}
	}
	if h := l.opts.Head; h.Seq > 0 && h != l.head {
		return wasChanged(l.path, "it does not end with the line that its last gate wrote")
	}
	if l.size, err = f.Seek(0, io.SeekEnd); err != nil {
		return cannotRead(err)
	}
	if err := l.closeTorn(end.after); err != nil {
		return err
	}
	if end.head.Seq == 0 {
		if err := syncDir(l.path); err != nil {
			return cannotOpen(l.path, err)
		}
	}
	l.durable = l.here()
	if end.head.Seq == 0 && len(before) > 0 {
		return l.append(&held{event: l.rotateEvent()})
	}
	return nil
}

// closeTorn ends what a crash has left of a line, so that the next one stays
// readable.
func (l *Log) closeTorn(rest []byte) error {
	if len(rest) == 0 {
		return nil
	}
	if rest[len(rest)-1] != '\n' {
		if _, err := l.file.Write([]byte("\n")); err != nil {
			return fault.New(fault.IO, "audit_write_failed", "audit log: %w", err).WithHint("make room on the disk of the state folder")
		}
		l.size++
		rest = append(rest[:len(rest):len(rest)], '\n')
	}
	l.torn = &Torn{Bytes: int64(len(rest)), SHA256: digest(rest)}
	return nil
}

// rotateEvent begins the present file.
func (l *Log) rotateEvent() Event {
	return Event{Event: KindRotate, Bottle: l.opts.Bottle, Time: l.opts.Now().UTC().Format(time.RFC3339Nano), File: l.number}
}

// rotate makes room: the file gets its number for a name, and a new one takes
// its place. With more than opts.Keep of them the oldest is removed, which a
// line says before it happens.
func (l *Log) rotate() error {
	if l.syncing {
		l.turn.Wait()
		return nil // the caller looks again
	}
	if err := l.file.Sync(l.size); err != nil {
		return err
	}
	l.settle(l.here(), len(l.held))
	l.turn.Broadcast()
	name := numbered(l.path, l.number)
	if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		return wasChanged(name, "it is there already")
	}
	if err := os.Rename(l.path, name); err != nil {
		return err
	}
	l.file.Close()
	l.file = nil
	l.number++
	l.size, l.durable.size = 0, 0
	f, err := l.create()
	if err != nil {
		return err
	}
	l.file = f
	if err := l.add(l.rotateEvent()); err != nil {
		return err
	}
	return l.dropOldest()
}

// add writes the log's own lines.
func (l *Log) add(e Event) error {
	h := &held{event: e}
	line, err := l.encode(&h.event)
	if err == nil {
		err = l.put(h, line)
	}
	if err != nil {
		l.held = append(l.held, h)
	}
	return err
}

func (l *Log) dropOldest() error {
	ns, err := rotated(l.path)
	if err != nil {
		return err
	}
	for ; len(ns) > l.opts.Keep; ns = ns[1:] {
		name := numbered(l.path, ns[0])
		f, err := openRegular(name)
		if err != nil {
			return err
		}
		end, err := endOf(f, name)
		f.Close()
		if err != nil {
			return err
		}
		e := l.rotateEvent()
		e.Event, e.File, e.LastSeq, e.Last = KindDrop, ns[0], end.head.Seq, end.head.SHA256
		if err := l.add(e); err != nil {
			return err
		}
		if err := l.file.Sync(l.size); err != nil {
			return err
		}
		l.settle(l.here(), len(l.held))
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return nil
}
