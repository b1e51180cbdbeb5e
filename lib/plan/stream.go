package plan

import (
	"bufio"
	"bytes"
	"errors"
	"io"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Reader takes a stream apart into documents. One document a line is the rule;
// a document that was indented by another program is taken as well, so that
// jq without -c stays usable between two stages.
type Reader struct {
	r    *bufio.Reader
	done bool
	n    int
}

// NewReader reads documents from r.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReaderSize(r, 64<<10)} }

// Next gives the next document that passes the Gate, io.EOF at the end, or a
// fault. After a fault on a document that was readable as a unit the stream
// goes on behind it; after bytes that do not begin like one it ends. An input with no document at all is a fault of its own.
func (r *Reader) Next() (*Doc, error) {
	if r.done {
		return nil, io.EOF
	}
	raw, err := r.chunk()
	if err != nil {
		r.done = true
		return nil, fault.New(fault.IO, "read_failed", "reading documents: %w", err)
	}
	if len(raw) == 0 {
		r.done = true
		if r.n > 0 {
			return nil, io.EOF
		}
	}
	r.n++
	if len(raw) > 0 && raw[0] != '{' && raw[0] != '[' {
		r.done = true // not a stream of documents: one error is enough
	}
	return Parse(raw)
}

// chunk reads one document: up to the end of the line on which its outermost
// bracket closes. It only counts brackets outside strings; whether the bytes
// are JSON is the Gate's to say.
func (r *Reader) chunk() ([]byte, error) {
	var (
		buf              []byte
		depth            int
		inString, escape bool
	)
	for {
		line, err := r.r.ReadSlice('\n')
		if len(buf) == 0 {
			line = bytes.TrimLeft(line, " \t\r\n")
		}
		buf = append(buf, line...)
		for _, c := range line {
			switch {
			case escape:
				escape = false
			case inString:
				escape = c == '\\'
				inString = c != '"'
			case c == '"':
				inString = true
			case c == '{' || c == '[':
				depth++
			case c == '}' || c == ']':
				depth--
			}
		}
		switch {
		case len(buf) > MaxBytes:
			// Nothing behind it can be told apart from it.
			r.done = true
			return buf, nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			r.done = len(buf) > 0
			return buf, nil
		case err != nil:
			return nil, err
		case depth <= 0 && len(buf) > 0:
			return buf, nil
		}
	}
}
