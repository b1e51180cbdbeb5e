package drift

import (
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// CheckProgram compares the program that a process runs with a file.
func CheckProgram(f *Findings, p Proc, role string, pid int, exe string) {
	got, replaced, err := p.Exe(pid)
	what := role + ": program"
	if err != nil {
		f.Unknown(what, exe, err)
		return
	}
	if real, err := filepath.EvalSymlinks(exe); err == nil {
		exe = real
	}
	switch same, err := p.SameProgram(pid, exe); {
	case replaced:
		f.Drift(what, exe, got+", which was replaced or removed since")
	case err != nil:
		f.Unknown(what, exe, err)
	case !same:
		f.Drift(what, exe, got)
	}
}

// CheckEnv compares the names of the variables of a process with those that it
// may have.
func CheckEnv(f *Findings, p Proc, role string, pid int, allowed []string) {
	names, err := p.EnvNames(pid)
	if err != nil {
		f.Unknown(role+": variables", strings.Join(allowed, " "), err)
		return
	}
	f.Only(role+": variable", allowed, names)
}

// CheckSockets compares what a process listens on with what it should.
func CheckSockets(f *Findings, p Proc, role string, pid int, listens []string) {
	what := role + ": listener"
	all, err := p.Sockets(pid)
	if err != nil {
		f.Unknown(what, strings.Join(listens, " "), err)
		return
	}
	var got []string
	for _, s := range all {
		switch {
		case s.Kind == "unlisted":
			f.Drift(role+": socket", "tcp, udp, unix or netlink", "one that no table of its namespace lists")
		case s.Listens:
			got = append(got, s.String())
		}
	}
	f.Same(what, listens, got)
}

// CheckMode compares kind, mode and owner of a file of the caller's own.
func CheckMode(f *Findings, path string, mode fs.FileMode, kind fs.FileMode) {
	fi, err := os.Lstat(path)
	if err != nil {
		f.Unknown("mode of "+path, Octal(uint32(mode)), err)
		return
	}
	f.Equal("kind of "+path, kind.String()[:1], fi.Mode().Type().String()[:1])
	f.Equal("mode of "+path, Octal(uint32(mode)), Octal(uint32(fi.Mode().Perm())))
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		f.Equal("owner of "+path, strconv.Itoa(os.Geteuid()), strconv.Itoa(int(st.Uid)))
	}
}
