package smolvm

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/fault"
)

// The kinds of failure, for errors.Is.
var (
	ErrMissing       = errors.New("smolvm is not there")
	ErrWrongProgram  = errors.New("this is not the smolvm that runs microVMs")
	ErrGarbage       = errors.New("smolvm printed something unreadable")
	ErrTooMuch       = errors.New("smolvm printed too much")
	ErrTimeout       = errors.New("smolvm did not answer in time")
	ErrUsage         = errors.New("smolvm does not know these arguments")
	ErrUnsupported   = errors.New("this version of smolvm cannot do that")
	ErrNotFound      = errors.New("no such machine")
	ErrAlreadyExists = errors.New("the machine exists already")
	ErrNotRunning    = errors.New("the machine is not running")
	ErrInvalidName   = errors.New("not a name for a machine")
	ErrInvalidState  = errors.New("the machine is in the wrong state")
	ErrKVM           = errors.New("no working KVM")
	ErrNotReady      = errors.New("the guest did not come up")
	ErrBootExited    = errors.New("the guest ended while it booted, without an error")
	ErrNotDeleted    = errors.New("the machine was not deleted")
	ErrCommand       = errors.New("the guest could not start the command")
	ErrDiskFull      = errors.New("smolvm cannot write to its disk")
	ErrFailed        = errors.New("smolvm failed")
)

// Error is a failure of smolvm itself; a guest command's own status never is
// one. It unwraps to its Kind and to a *fault.Error with the exit status.
type Error struct {
	Kind   error  // one of the Err values above
	Op     string // "machine start": the subcommand, without its arguments
	Exit   int    // smolvm's exit status; -1 if it did not exit by itself
	Code   string // smolvm's own error code where --error-format json gave one
	Stderr string // what smolvm printed, at most 4 KiB
	Detail string // our own words, if any
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("smolvm")
	if e.Op != "" {
		b.WriteString(" " + e.Op)
	}
	b.WriteString(": " + e.Kind.Error())
	if e.Detail != "" {
		b.WriteString(": " + e.Detail)
	}
	if s := oneLine(e.Stderr); s != "" {
		b.WriteString(": " + s)
	}
	return b.String()
}

// Is tells the kind; the chain itself leads to the fault alone, so that the
// error is printed once.
func (e *Error) Is(target error) bool {
	return target == e.Kind || target == context.DeadlineExceeded && e.Kind == ErrTimeout
}

func (e *Error) Unwrap() error { return e.fault() }

// faults gives each kind its exit status, its code and what to do about it.
var faults = map[error]fault.Error{
	ErrMissing:       {Exit: fault.Unavailable, Code: "smolvm_missing", Hint: "bottle-vm doctor --install smolvm installs it (the Python package smolmachines); BOTTLE_SMOLVM names one that is elsewhere"},
	ErrWrongProgram:  {Exit: fault.Unavailable, Code: "smolvm_wrong_program", Hint: "the Python package named smolvm is another project; the right one is smolmachines (its smol/smol-vmm is the smolvm command); set BOTTLE_SMOLVM to it"},
	ErrGarbage:       {Exit: fault.Unavailable, Code: "smolvm_garbage", Hint: "run the same smolvm by hand and see what it prints; reinstall it if need be"},
	ErrTooMuch:       {Exit: fault.Unavailable, Code: "smolvm_garbage", Hint: "run the same smolvm by hand and see what it prints; reinstall it if need be"},
	ErrTimeout:       {Exit: fault.Unavailable, Code: "smolvm_timeout", Hint: "run the same smolvm by hand; a machine that hangs is ended by: smolvm machine delete --name NAME -f"},
	ErrUsage:         {Exit: fault.Unavailable, Code: "smolvm_usage", Hint: InstallHint},
	ErrUnsupported:   {Exit: fault.Host, Code: "smolvm_unsupported", Hint: InstallHint + "; or use runtime gvisor"},
	ErrNotFound:      {Exit: fault.Unavailable, Code: "smolvm_not_found", Hint: "see what there is with: smolvm machine ls"},
	ErrAlreadyExists: {Exit: fault.CantCreate, Code: "smolvm_exists", Hint: "delete it with: smolvm machine delete --name NAME -f"},
	ErrNotRunning:    {Exit: fault.Unavailable, Code: "smolvm_not_running", Hint: "see its state with: smolvm machine status --name NAME"},
	ErrInvalidName:   {Exit: fault.Usage, Code: "smolvm_invalid_name", Hint: "a machine's name starts with a letter or digit, holds letters, digits, - and _, and has at most 128 characters"},
	ErrInvalidState:  {Exit: fault.Unavailable, Code: "smolvm_invalid_state", Hint: "see its state with: smolvm machine status --name NAME"},
	ErrKVM:           {Exit: fault.Host, Code: "smolvm_kvm", Hint: "smolvm needs read and write access to a /dev/kvm that can run guests; use runtime gvisor where there is none"},
	ErrNotReady:      {Exit: fault.Host, Code: "smolvm_not_ready", Hint: "the guest did not start; prove the host with: bottle-vm doctor, or use runtime gvisor"},
	ErrBootExited:    {Exit: fault.Host, Code: "smolvm_not_ready", Hint: "the guest did not start; prove the host with: bottle-vm doctor, or use runtime gvisor"},
	ErrNotDeleted:    {Exit: fault.Unavailable, Code: "smolvm_not_deleted", Hint: "delete it with: smolvm machine delete --name NAME -f"},
	ErrCommand:       {Exit: fault.Unavailable, Code: "smolvm_command", Hint: "the program or the working folder does not exist in the guest"},
	ErrDiskFull:      {Exit: fault.CantCreate, Code: "smolvm_disk_full", Hint: "make room where smolvm keeps its machines (SMOLVM_DATA_DIR, else below ~/.cache/smolvm and ~/.local/share/smolvm), or a quota larger"},
	ErrFailed:        {Exit: fault.Unavailable, Code: "smolvm_failed", Hint: "run the same smolvm command by hand"},
}

func (e *Error) fault() *fault.Error {
	f, ok := faults[e.Kind]
	if !ok {
		f = faults[ErrFailed]
	}
	f.Msg = e.Error()
	return &f
}

// markers are short, stable parts of smolvm's messages. Whole sentences change
// between versions (1.32.2 reworded "not running"), these did not.
var markers = []struct {
	part string
	kind error
}{
	{"No space left on device", ErrDiskFull}, // whatever else failed for it
	{"Disk quota exceeded", ErrDiskFull},
	{"database or disk is full", ErrDiskFull}, // SQLite's words
	{"disk I/O error", ErrDiskFull},           // its words for no room beside the database
	{"KvmOpen", ErrKVM},
	{"KVM not available", ErrKVM},
	{"/dev/kvm", ErrKVM},                  // kvm permission denied: Cannot access /dev/kvm
	{"mount source not found", ErrFailed}, // its code is NOT_FOUND, and no machine is missing
	{"vm not found", ErrNotFound},
	{"' not found", ErrNotFound}, // status --json: machine 'x' not found
	{"already exists", ErrAlreadyExists},
	{"machine name", ErrInvalidName},
	{"is not running", ErrNotRunning},
	{"failed to spawn command", ErrCommand},
	{"invalid vm state", ErrInvalidState},
	{"did not become ready", ErrNotReady},
	{"exited (code 0)", ErrBootExited}, // boot process exited (code 0) before the agent was ready
	{"before the agent was ready", ErrNotReady},
}

// codes are the stable codes of --error-format json that say more than the
// text does.
var codes = map[string]error{
	"NOT_FOUND":              ErrNotFound,
	"INVALID_STATE":          ErrInvalidState,
	"KVM_UNAVAILABLE":        ErrKVM,
	"HYPERVISOR_UNAVAILABLE": ErrKVM,
}

// classify makes the typed error of a failed call from its exit status and
// stderr. Source: recordings of 1.9.1 and 1.32.2.
func classify(op string, exit int, stderr string) *Error {
	e := &Error{Op: op, Exit: exit, Kind: ErrFailed, Stderr: bound(stderr, maxStderr)}
	if exit == 2 && hasLine(stderr, "error: ") { // clap, the argument parser
		e.Kind = ErrUsage
		return e
	}
	text := stderr
	if code, msg, ok := jsonError(stderr); ok {
		e.Code, e.Stderr, text = code, bound(msg, maxStderr), msg
	}
	for _, m := range markers {
		if strings.Contains(text, m.part) {
			e.Kind = m.kind
			return e
		}
	}
	if k, ok := codes[e.Code]; ok {
		e.Kind = k
	}
	return e
}

// jsonError finds what --error-format json prints, which ends its line; cp has
// its progress in front of it:
// {"error":{"code":"NOT_FOUND","message":"vm not found: x"}}.
func jsonError(stderr string) (code, message string, ok bool) {
	for line := range strings.Lines(stderr) {
		at := strings.Index(line, `{"error":`)
		if at < 0 {
			continue
		}
		if line = strings.TrimSpace(line[at:]); !gjson.Valid(line) {
			continue
		}
		c, m := gjson.Get(line, "error.code"), gjson.Get(line, "error.message")
		if c.Type == gjson.String && m.Type == gjson.String {
			code, message, ok = c.Str, m.Str, true // the last one counts
		}
	}
	return code, message, ok
}

// looksLikeOwnFailure tells whether a call that ended with exit may be smolvm's
// own failure and not the guest command's. A guest can forge it: see Ran.
func looksLikeOwnFailure(exit int, stderr string) bool {
	switch exit {
	case 1:
		_, _, isJSON := jsonError(stderr)
		return isJSON || hasLine(stderr, "Error: ")
	case 2:
		return hasLine(stderr, "error: ")
	}
	return false
}

func hasLine(s, prefix string) bool {
	return strings.HasPrefix(s, prefix) || strings.Contains(s, "\n"+prefix) || strings.Contains(s, "\r"+prefix)
}

const maxStderr = 4 << 10

// bound keeps the first half and the end of s, n bytes in all: the start says
// what was tried, the end why it failed.
func bound(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const cut = "…"
	head := n / 3
	return strings.ToValidUTF8(s[:head], "") + cut + strings.ToValidUTF8(s[len(s)-(n-head-len(cut)):], "")
}

// oneLine makes what smolvm printed fit for a one-line message: no control
// characters (a guest may have had a say in it), no terminal colours.
func oneLine(s string) string {
	s = ansi().ReplaceAllString(s, "")
	var lines []string
	for _, l := range strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }) {
		l = strings.TrimSpace(fault.Line(l))
		if l != "" {
			lines = append(lines, l)
		}
	}
	return bound(strings.Join(lines, "; "), 1<<10)
}

// failed makes the typed error of a call that this smolvm refused. A flag that it
// does not know is named: a newer smolvm may have given it up.
func (c *Client) failed(op string, r Result) *Error {
	e := classify(op, r.Code, string(r.Stderr))
	if flag := unknownFlag(e); flag != "" {
		e.Detail = fmt.Sprintf("%s is smolvm %s, which does not know %s", c.Bin, c.Version, flag)
	}
	return e
}

// unknownFlag gives the flag that clap does not know, or "".
func unknownFlag(e *Error) string {
	if e.Kind != ErrUsage {
		return ""
	}
	_, rest, ok := strings.Cut(e.Stderr, "unexpected argument '-")
	flag, _, closed := strings.Cut(rest, "'")
	if !ok || !closed || flag == "" {
		return ""
	}
	flag, _, _ = strings.Cut(flag, "=")
	return "-" + flag
}

func unsupported(op string, have, need Version, what string) *Error {
	return &Error{Kind: ErrUnsupported, Op: op, Exit: -1,
		Detail: fmt.Sprintf("%s needs smolvm %s, this is %s", what, need, have)}
}
