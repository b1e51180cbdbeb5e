// Package fault is the one error type that crosses the boundary of a tool: it
// carries the exit status, a stable code that programs may match on, the
// message for people, and what to do about it.
//
// Exit statuses follow sysexits(3); docs/exit-codes.md lists them all.
package fault

import (
	"errors"
	"fmt"
	"strings"
)

// Exit statuses. Everything that is not listed is a bug.
const (
	OK          = 0   // done
	No          = 1   // the expected "no": gc --check found orphans, explain denies
	Widens      = 3   // plan diff: B allows something that A does not
	Usage       = 64  // wrong flags or arguments
	Data        = 65  // bad document or manifest
	NoInput     = 66  // an input file, a workspace or an image is missing
	Unavailable = 69  // engine or proxy missing, or refusing
	Bug         = 70  // a bug of ours
	CantCreate  = 73  // an output or state file cannot be created
	IO          = 74  // reading or writing failed
	TempFail    = 75  // try again: locked
	NoPerm      = 77  // not yours, or not trusted
	Host        = 78  // this host cannot do what the plan asks
	ExecFailed  = 125 // bottle-vm exec: its own failure, not the guest's
	ExecTimeout = 124 // bottle-vm exec --timeout ran out
)

// Error is a failure with its exit status. Code is snake_case and stable. Msg
// is lower case, without a trailing full stop; Hint says what to do.
type Error struct {
	Exit int
	Code string
	Msg  string
	Hint string
	// Where in the input: a path inside the document or manifest such as
	// bottles.dev.egress.allow[2], or a file:line:column. May be empty.
	Where string
	Err   error
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.Where != "" {
		b.WriteString(e.Where)
		b.WriteString(": ")
	}
	b.WriteString(e.Msg)
	if _, ok := e.Err.(silent); e.Err != nil && !ok {
		b.WriteString(": ")
		b.WriteString(e.Err.Error())
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// WithHint returns a copy of e that tells what to do.
func (e *Error) WithHint(format string, args ...any) *Error {
	c := *e
	c.Hint = fmt.Sprintf(format, args...)
	return &c
}

// At returns a copy of e that tells where in the input the trouble is.
func (e *Error) At(where string) *Error {
	c := *e
	c.Where = where
	return &c
}

// New makes an Error; format may use %w.
func New(exit int, code, format string, args ...any) *Error {
	wrapped := fmt.Errorf(format, args...)
	return &Error{Exit: exit, Code: code, Msg: wrapped.Error(), Err: hidden(errors.Unwrap(wrapped))}
}

// hidden keeps a wrapped error reachable for errors.Is and errors.As without
// printing it a second time, since its text is in the message already.
func hidden(err error) error {
	if err == nil {
		return nil
	}
	return silent{err}
}

type silent struct{ err error }

func (s silent) Error() string { return s.err.Error() }
func (s silent) Unwrap() error { return s.err }

// As gives err as an *Error. An error that is none becomes a bug (70): every
// failure that a user can cause has to say what it is.
func As(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		if e == err {
			return e
		}
		// The context around e is worth keeping in the text.
		c := *e
		c.Msg, c.Where, c.Err = err.Error(), "", silent{err}
		return &c
	}
	return &Error{Exit: Bug, Code: "bug", Msg: err.Error(), Err: silent{err},
		Hint: "this is a bug in the bottle tools; please report it with the command that led to it"}
}

// Worst gives the exit status of a stream of documents: the largest one.
func Worst(a, b int) int {
	if b > a {
		return b
	}
	return a
}
