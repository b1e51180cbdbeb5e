package audit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/bottle-tools/bottle/lib/fault"
)

// maxLine bounds what is taken for one line. Those of a gate are far shorter:
// all that a guest can make long is cut.
const maxLine = 1 << 20

// numbered is the name of a file that was rotated out of path: the first one is
// path.000001, and no file changes its number.
func numbered(path string, n int) string { return fmt.Sprintf("%s.%06d", path, n) }

// rotated lists the numbers of the files that were rotated out of path, lowest
// (oldest) first.
func rotated(path string) ([]int, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	var ns []int
	for _, e := range entries {
		text, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".")
		n, err := strconv.Atoi(text)
		if ok && err == nil && n > 0 && e.Name() == filepath.Base(numbered(path, n)) {
			ns = append(ns, n)
		}
	}
	slices.Sort(ns)
	return ns, nil
}

// Files lists the files of the log at path, oldest first. path itself, where
// the gate writes, is the last one. A log that is not there has none.
func Files(path string) ([]string, error) {
	ns, err := rotated(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, cannotRead(err)
	}
	var files []string
	for _, n := range ns {
		files = append(files, numbered(path, n))
	}
	if _, err := os.Lstat(path); err == nil {
		files = append(files, path)
	}
	return files, nil
}

func cannotRead(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NoInput, "no_audit_log", "audit log: %w", err).
			WithHint("a bottle that asked for nothing leaves none; bottle-vm status says where a bottle's log lies")
	}
	return fault.New(fault.IO, "audit_read_failed", "audit log: %w", err)
}

// Line is one line of a log and where it stands.
type Line struct {
	File   string // as it was named when it was opened
	Number int    // in File, from 1
	Raw    []byte // without its newline; the reader does not use it again
	Event  Event
	// Torn is set on bytes that are no event: what a gate had written of a line
	// when it was killed. A later line accounts for them, see Event.Torn.
	Torn bool
}

// Where is FILE:LINE.
func (l Line) Where() string { return l.File + ":" + strconv.Itoa(l.Number) }

// Reader reads the lines of a log in order, over all its files. At the end Next
// gives io.EOF, and may be called again later for what has been added since.
type Reader struct {
	path   string // "" for a single stream
	at     *os.File
	later  []*os.File // opened already, in order
	buf    *bufio.Reader
	held   []byte // of a line without its end
	number int
	seq    uint64 // of the last event
	given  uint64 // lines up to this one were given before their file was shortened
	cut    *Line  // what stood behind the last newline of a file that is done
	name   string
}

// OpenReader reads the log whose newest file is path: path.000001 and those
// after it first. A log that is not there is a fault (66).
func OpenReader(path string) (*Reader, error) {
	r := &Reader{path: path}
	for range 100 {
		err := r.open(0)
		if err == nil {
			r.advance()
			return r, nil
		}
		// The gate may rename or remove one between listing and opening it.
		r.Close()
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, cannotRead(err)
		}
		if all, lerr := Files(path); lerr != nil || len(all) == 0 {
			return nil, cannotRead(err)
		}
	}
	return nil, fault.New(fault.TempFail, "audit_read_failed", "audit log %s is rotated faster than it can be read", path).
		WithHint("try again")
}

// NewReader reads the lines of one stream, called name in Where.
func NewReader(r io.Reader, name string) *Reader {
	return &Reader{buf: bufio.NewReaderSize(r, 64<<10), name: name}
}

// Read yields the lines of the log at path, oldest first. A line that is no
// event comes with Torn set; an error is the last thing that is yielded.
func Read(path string) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		r, err := OpenReader(path)
		if err != nil {
			yield(Line{}, err)
			return
		}
		defer r.Close()
		for {
			l, err := r.Next()
			if err == io.EOF {
				return
			}
			if !yield(l, err) || err != nil {
				return
			}
		}
	}
}

// open opens the files after number n. path itself is opened first: if it is
// rotated meanwhile, it is met again under its number.
func (r *Reader) open(n int) error {
	active, err := openRegular(r.path)
	if err != nil {
		return err
	}
	files := []*os.File{active}
	numbers, err := rotated(r.path)
	for _, m := range numbers {
		if m <= n || err != nil {
			continue
		}
		var f *os.File
		if f, err = openRegular(numbered(r.path, m)); err != nil {
			break
		}
		if sameFile(f, active) {
			f.Close()
			break
		}
		files = slices.Insert(files, len(files)-1, f)
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return err
	}
	r.later = files
	return nil
}

// openRegular opens a file for reading. It never waits for a named pipe.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func sameFile(a, b *os.File) bool {
	x, err := a.Stat()
	if err != nil {
		return false
	}
	y, err := b.Stat()
	return err == nil && os.SameFile(x, y)
}

func (r *Reader) advance() {
	if r.at != nil {
		r.at.Close()
	}
	if len(r.held) > 0 {
		r.cut = &Line{File: r.name, Number: r.number + 1, Raw: r.held, Torn: true}
	}
	r.at, r.later = r.later[0], r.later[1:]
	r.name, r.number, r.held = r.at.Name(), 0, nil
	r.buf = bufio.NewReaderSize(r.at, 64<<10)
}

// Next gives the next line, io.EOF at the present end, or a fault.
func (r *Reader) Next() (Line, error) {
	for {
		if cut := r.cut; cut != nil {
			r.cut = nil
			return *cut, nil
		}
		raw, err := r.line()
		if err != nil && err != io.EOF {
			return Line{}, err
		}
		if raw == nil {
			more, err := r.next()
			if err != nil {
				return Line{}, err
			}
			if !more {
				return Line{}, io.EOF
			}
			continue
		}
		r.number++
		l := Line{File: r.name, Number: r.number, Raw: raw}
		if json.Unmarshal(raw, &l.Event) != nil || l.Event.Event == "" || l.Event.Seq == 0 {
			l.Torn, l.Event = true, Event{}
			return l, nil
		}
		if l.Event.Seq <= r.given {
			continue
		}
		r.seq = l.Event.Seq
		return l, nil
	}
}

// Rest is what stands behind the last newline: part of a line that is being
// written, or that never will be. It is valid after io.EOF.
func (r *Reader) Rest() []byte { return r.held }

// line gives the next whole line of the present file, nil if there is none yet.
func (r *Reader) line() ([]byte, error) {
	for {
		part, err := r.buf.ReadSlice('\n')
		r.held = append(r.held, part...)
		switch {
		case err == nil:
			raw := bytes.TrimSuffix(r.held, []byte("\n"))
			r.held = nil
			return raw[:len(raw):len(raw)], nil
		case len(r.held) > maxLine:
			return nil, fault.New(fault.Data, "bad_audit_log", "no line of an audit log has more than %d bytes", maxLine).
				At(r.name + ":" + strconv.Itoa(r.number+1))
		case err == io.EOF:
			return nil, io.EOF
		case err != bufio.ErrBufferFull:
			return nil, cannotRead(err)
		}
	}
}

// next goes on to the file after the present one, which has been read to its
// end. It is false if the present one is the newest.
func (r *Reader) next() (bool, error) {
	if r.path == "" {
		return false, nil
	}
	if len(r.later) > 0 {
		r.advance()
		return true, nil
	}
	st, err := r.at.Stat()
	if err != nil {
		return false, cannotRead(err)
	}
	now, err := os.Stat(r.path)
	switch {
	case err == nil && os.SameFile(st, now):
		return r.shortened(st.Size())
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return false, cannotRead(err)
	}
	// Rotated, or removed. What was written before that is read first.
	if at, err := r.at.Seek(0, io.SeekCurrent); err != nil || at < st.Size() {
		return err == nil, wrapRead(err)
	}
	n, err := r.renamed(st)
	if err != nil || n == 0 {
		return false, err
	}
	if err := r.open(n); errors.Is(err, fs.ErrNotExist) {
		return false, nil // between two steps of a rotation
	} else if err != nil {
		return false, cannotRead(err)
	}
	r.advance()
	return true, nil
}

func wrapRead(err error) error {
	if err == nil {
		return nil
	}
	return cannotRead(err)
}

// renamed finds the number under which the present file stands by now; 0 if
// there is no log any more. One that was dropped as well counts as the one
// before the oldest.
func (r *Reader) renamed(st os.FileInfo) (int, error) {
	ns, err := rotated(r.path)
	if err != nil {
		return 0, cannotRead(err)
	}
	for _, n := range ns {
		if fi, err := os.Stat(numbered(r.path, n)); err == nil && os.SameFile(st, fi) {
			return n, nil
		}
	}
	if len(ns) == 0 {
		return 0, nil
	}
	return ns[0] - 1, nil
}

// shortened notices that the gate has taken back what it could not write
// whole; lines that were given already are not given again.
func (r *Reader) shortened(size int64) (bool, error) {
	at, err := r.at.Seek(0, io.SeekCurrent)
	if err != nil || at <= size {
		return false, wrapRead(err)
	}
	if _, err := r.at.Seek(0, io.SeekStart); err != nil {
		return false, cannotRead(err)
	}
	r.buf.Reset(r.at)
	r.number, r.held, r.given = 0, nil, r.seq
	return true, nil
}

// Close closes what is open.
func (r *Reader) Close() error {
	if r.at != nil {
		r.later = append(r.later, r.at)
	}
	for _, f := range r.later {
		f.Close()
	}
	r.at, r.later = nil, nil
	return nil
}
