// Package secret fetches the values that the gate injects, on the host and at
// the last moment. No value is ever in a document, a log, an argument list or
// an error. It is the one package that runs the commands of command secrets.
package secret

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/trust"
)

// Limits of a secret and of the command that prints it.
const (
	MaxBytes   = 64 << 10
	TimeLimit  = 30 * time.Second
	maxStderr  = 500
	graceDrain = 200 * time.Millisecond
)

// Options is what Resolve needs of the world.
type Options struct {
	Base   string              // the manifest's folder, absolute
	Home   string              // for ~, and where commands run
	Getenv func(string) string // for env:NAME
	// Environ is what commands get; nil is the environment of this process.
	Environ []string
	Warn    func(format string, args ...any) // may be nil
	// Scripts are files that commands name, in the bytes that were trusted: copies
	// of them are run. One that is nil was not there.
	Scripts trust.Scripts
	// TimeLimit bounds each command; 0 is the constant.
	TimeLimit time.Duration
}

// Missing is a secret without a value. It doesn't stop a bottle: the gate
// answers its first use with 403 secret_missing.
type Missing struct {
	Name string
	Why  string // one line, without the value
}

// Resolve fetches all secrets. The caller has passed trust.Check before.
//
// A secret that is not there is in missing; one that is there and cannot be
// used is an error (fault 65 bad_secret, or 77 for a file that others can
// write), all of them joined.
func Resolve(ctx context.Context, secrets []plan.Secret, o Options) (values map[string]string, missing []Missing, err error) {
	values = make(map[string]string, len(secrets))
	var errs []error
	for _, s := range secrets {
		v, err := o.fetch(ctx, s)
		var absent absentError
		switch {
		case ctx.Err() != nil:
			return nil, nil, ctx.Err()
		case errors.As(err, &absent):
			missing = append(missing, Missing{s.Name, string(absent)})
			continue
		case err == nil:
			err = checkValue(s.Name, v)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		values[s.Name] = v
	}
	if err := errors.Join(errs...); err != nil {
		return nil, missing, err
	}
	return values, missing, nil
}

// absentError says why there is no value.
type absentError string

func (a absentError) Error() string { return string(a) }

func absent(format string, args ...any) error { return absentError(fmt.Sprintf(format, args...)) }

func (o Options) fetch(ctx context.Context, s plan.Secret) (string, error) {
	kind, rest, _ := strings.Cut(s.From, ":")
	var v string
	var err error
	switch kind {
	case "env":
		v = o.Getenv(rest)
		if v == "" {
			return "", absent("the variable %s is not set", rest)
		}
		return v, nil
	case "file":
		v, err = o.file(s.Name, rest)
	case "command":
		v, err = o.command(ctx, s)
	default:
		return "", bad(s.Name, "from is not env:NAME, file:PATH or command")
	}
	if err == nil && v == "" {
		return "", absent("its %s gave nothing", kind)
	}
	return v, err
}

func bad(name, format string, args ...any) error {
	return fault.New(fault.Data, "bad_secret", "secret %s: %s", name, fmt.Sprintf(format, args...))
}

// checkValue refuses what cannot be the value of a header (RFC 9110 5.5): it
// could end the header and start another.
func checkValue(name, v string) error {
	if len(v) > MaxBytes {
		return bad(name, "is longer than %d KiB", MaxBytes>>10)
	}
	if strings.ContainsFunc(v, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
		return fault.New(fault.Data, "bad_secret", "secret %s: holds a control character or a line break and cannot be sent in a header", name).
			WithHint("give the value alone, on one line")
	}
	return nil
}

// file reads a secret file. A path inside the manifest's folder must not leave
// it through a symlink: the guest could have put it there.
func (o Options) file(name, path string) (string, error) {
	f, err := o.open(path)
	var told *fault.Error
	switch {
	case errors.As(err, &told):
		return "", fmt.Errorf("secret %s: %w", name, err)
	case errors.Is(err, fs.ErrNotExist):
		return "", absent("the file %s does not exist", path)
	case errors.Is(err, fs.ErrPermission):
		return "", absent("the file %s may not be read", path)
	case err != nil:
		return "", fault.New(fault.NoInput, "bad_secret", "secret %s: opening %s: %w", name, path, err).
			WithHint("write the real path; a symlink must not lead out of the manifest's folder")
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", fault.New(fault.IO, "read_failed", "secret %s: %w", name, err)
	}
	switch {
	case !fi.Mode().IsRegular():
		return "", bad(name, "%s is not a regular file", path)
	case fi.Mode().Perm()&0o002 != 0:
		return "", fault.New(fault.NoPerm, "bad_secret", "secret %s: everybody can write %s", name, path).WithHint("chmod o-w %s", path)
	case fi.Mode().Perm()&0o004 != 0 && o.Warn != nil:
		o.Warn("secret %s: every user of this machine can read %s; chmod o-r it", name, path)
	}
	raw, err := io.ReadAll(io.LimitReader(f, MaxBytes+1))
	if err != nil {
		return "", fault.New(fault.IO, "read_failed", "secret %s: reading %s: %w", name, path, err)
	}
	if len(raw) > MaxBytes {
		return "", bad(name, "%s is larger than %d KiB", path, MaxBytes>>10)
	}
	return strings.TrimRight(string(raw), "\r\n"), nil
}

func (o Options) open(path string) (*os.File, error) {
	abs, err := trust.Place{Base: o.Base, Home: o.Home}.Path(path)
	if err != nil {
		return nil, err
	}
	const flags = os.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC // a FIFO must not block us
	if !trust.Within(o.Base, abs) {
		return os.OpenFile(abs, flags, 0)
	}
	root, err := os.OpenRoot(o.Base)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	rel, err := filepath.Rel(o.Base, abs)
	if err != nil {
		return nil, err
	}
	return root.OpenFile(rel, flags, 0)
}

// command runs the argument list, without a shell. It runs in the user's home:
// the manifest's folder is usually the workspace, and many programs (python,
// make, git) take code from the folder they stand in, which the guest can
// write. Scripts of that folder are run as copies, by themselves. Arguments that are paths (./x, ../x, ~/x) start from where the
// manifest says.
func (o Options) command(ctx context.Context, s plan.Secret) (string, error) {
	argv, err := trust.Place{Base: o.Base, Home: o.Home}.Command(s.Command)
	if err != nil {
		return "", err
	}
	dir, err := o.copies(argv)
	if dir != "" {
		defer os.RemoveAll(dir)
	}
	if err != nil {
		return "", err
	}
	limit := o.TimeLimit
	if limit == 0 {
		limit = TimeLimit
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir, cmd.Env = o.Home, o.Environ
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	// A session of its own: no terminal to type into or to read from, and the
	// time limit ends its children too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = graceDrain
	stdout, stderr := &bounded{max: MaxBytes + 2}, &bounded{max: maxStderr}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	err = cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it has exited; something it left behind holds the pipes
	}
	switch {
	case ctx.Err() == context.DeadlineExceeded:
		return "", absent("%s did not end within %s", s.Command[0], limit)
	case err != nil:
		return "", absent("%s", failure(s.Command[0], err, stderr.buf.String()))
	case stdout.over:
		return "", bad(s.Name, "%s printed more than %d KiB", s.Command[0], MaxBytes>>10)
	}
	return strings.TrimSpace(stdout.buf.String()), nil
}

// copies puts copies of scripts, each in a folder in which nothing else is, in
// their places in argv, and gives the folder to remove.
func (o Options) copies(argv []string) (dir string, err error) {
	for i, abs := range argv {
		content, ok := o.Scripts[abs]
		if !ok {
			continue
		}
		if content == nil {
			return dir, absent("%s was not found", abs)
		}
		if dir == "" {
			if dir, err = os.MkdirTemp("", "bottle-secret-"); err != nil {
				return "", cannotCopy(err)
			}
		}
		own := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(own, 0o700); err != nil {
			return dir, cannotCopy(err)
		}
		argv[i] = filepath.Join(own, filepath.Base(abs))
		if err := os.WriteFile(argv[i], content, 0o500); err != nil {
			return dir, cannotCopy(err)
		}
	}
	return dir, nil
}

func cannotCopy(err error) error {
	return fault.New(fault.CantCreate, "cannot_create", "a copy of what a secret's command runs: %w", err)
}

// failure is one line about a command that failed; what it said on stderr is
// shown, what it printed on stdout may be the secret and is not.
func failure(name string, err error, stderr string) string {
	var exit *exec.ExitError
	why := ""
	switch {
	case errors.As(err, &exit):
		why = fmt.Sprintf("%s failed (%s)", name, exit)
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		why = name + " was not found"
	default:
		why = fmt.Sprintf("%s could not be run: %s", name, err)
	}
	if said := strings.Join(strings.Fields(stderr), " "); said != "" {
		why += ": " + said
	}
	return why
}

// bounded keeps the first max bytes and swallows the rest.
type bounded struct {
	buf  bytes.Buffer
	max  int
	over bool
}

func (b *bounded) Write(p []byte) (int, error) {
	if room := b.max - b.buf.Len(); len(p) > room {
		b.over = true
		b.buf.Write(p[:room])
		return len(p), nil
	}
	return b.buf.Write(p)
}
