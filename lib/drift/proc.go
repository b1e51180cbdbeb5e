package drift

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Proc is a mounted proc file system, proc(5).
type Proc string

// Host is this host's.
const Host Proc = "/proc"

func (p Proc) path(pid int, name ...string) string {
	return filepath.Join(append([]string{string(p), strconv.Itoa(pid)}, name...)...)
}

func (p Proc) list(pid int, name string) ([]string, error) {
	b, err := os.ReadFile(p.path(pid, name))
	if err != nil || len(b) == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"), nil
}

// Argv of a process.
func (p Proc) Argv(pid int) ([]string, error) { return p.list(pid, "cmdline") }

// EnvNames are the names of a process's variables as it was started with; their
// values are not read into anything.
func (p Proc) EnvNames(pid int) ([]string, error) {
	env, err := p.list(pid, "environ")
	names := make([]string, 0, len(env))
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		names = append(names, name)
	}
	slices.Sort(names)
	return names, err
}

// Env gives the value of one variable that a process was started with.
func (p Proc) Env(pid int, name string) string {
	env, _ := p.list(pid, "environ")
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

// Exe is the program of a process; replaced tells that the file is not there any
// more.
func (p Proc) Exe(pid int) (path string, replaced bool, err error) {
	path, err = os.Readlink(p.path(pid, "exe"))
	path, replaced = strings.CutSuffix(path, " (deleted)")
	return path, replaced, err
}

// SameProgram tells if the process runs the very file that is at path now.
func (p Proc) SameProgram(pid int, path string) (bool, error) {
	runs, err := os.Stat(p.path(pid, "exe"))
	if err != nil {
		return false, err
	}
	there, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(runs, there), err
}

// Status gives the fields of /proc/PID/status.
func (p Proc) Status(pid int) (map[string]string, error) {
	b, err := os.ReadFile(p.path(pid, "status"))
	if err != nil {
		return nil, err
	}
	out := make(map[string]string)
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			out[k] = strings.Join(strings.Fields(v), " ")
		}
	}
	return out, nil
}

// Namespace identifies one of a process: net, mnt, user …
func (p Proc) Namespace(pid int, kind string) (string, error) {
	return os.Readlink(p.path(pid, "ns", kind))
}

// IDMap is one line of a uid_map or gid_map.
type IDMap struct{ Inside, Outside, Count int64 }

// UIDMap gives the user ids of a process's namespace.
func (p Proc) UIDMap(pid int) ([]IDMap, error) {
	b, err := os.ReadFile(p.path(pid, "uid_map"))
	if err != nil {
		return nil, err
	}
	var out []IDMap
	for line := range strings.Lines(string(b)) {
		var m IDMap
		if n, _ := fmt.Sscan(line, &m.Inside, &m.Outside, &m.Count); n == 3 {
			out = append(out, m)
		}
	}
	return out, nil
}

// Cgroups are the paths of a process's cgroups.
func (p Proc) Cgroups(pid int) ([]string, error) {
	b, err := os.ReadFile(p.path(pid, "cgroup"))
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			out = append(out, f[2])
		}
	}
	return out, nil
}

// Root is a path as a process sees it.
func (p Proc) Root(pid int, path string) string { return p.path(pid, "root", path) }

// Children are the processes whose parent is pid.
func (p Proc) Children(pid int) ([]int, error) {
	entries, err := os.ReadDir(string(p))
	if err != nil {
		return nil, err
	}
	var out []int
	for _, e := range entries {
		child, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(p.path(child, "stat"))
		if err != nil {
			continue // it ended meanwhile
		}
		// The name is in parentheses and may hold anything.
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) > 1 && f[1] == strconv.Itoa(pid) && f[0] != "Z" {
			out = append(out, child)
		}
	}
	return out, nil
}

// Mount is a line of mountinfo.
type Mount struct {
	Dev     string // major:minor
	Root    string // the folder of that file system which is mounted
	Point   string
	Options []string
	Type    string
}

// ReadOnly tells if the mount is.
func (m Mount) ReadOnly() bool { return slices.Contains(m.Options, "ro") }

// Mounts of a process, in mount order.
func (p Proc) Mounts(pid int) ([]Mount, error) {
	return parseMounts(p.path(pid, "mountinfo"))
}

// OwnMounts are those of the calling process.
func (p Proc) OwnMounts() ([]Mount, error) {
	return parseMounts(filepath.Join(string(p), "self", "mountinfo"))
}

func parseMounts(file string) ([]Mount, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var out []Mount
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 7 {
			continue
		}
		m := Mount{Dev: f[2], Root: unescape(f[3]), Point: unescape(f[4]), Options: strings.Split(f[5], ",")}
		if i := slices.Index(f, "-"); i > 0 && i+1 < len(f) {
			m.Type = f[i+1]
		}
		out = append(out, m)
	}
	return out, nil
}

// unescape reads the octal escapes of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Socket is one that a process has open.
type Socket struct {
	Kind  string // tcp | udp | raw | unix | packet | netlink …
	Local string // address, path, or @name of an abstract one
	// Listens: takes connections, or datagrams from anybody.
	Listens bool
}

func (s Socket) String() string { return s.Kind + " " + s.Local }

// netTables are the files of /proc/PID/net and the column (from 0) of the
// inode.
var netTables = []struct {
	file, kind string
	inode      int
}{
	{"tcp", "tcp", 9}, {"tcp6", "tcp", 9}, {"udp", "udp", 9}, {"udp6", "udp", 9}, {"udplite", "udp", 9}, {"udplite6", "udp", 9},
	{"raw", "raw", 9}, {"raw6", "raw", 9}, {"icmp", "icmp", 9}, {"icmp6", "icmp", 9},
	{"unix", "unix", 6}, {"packet", "packet", 8}, {"netlink", "netlink", 9},
}

// Sockets of a process. A socket may belong to the namespace of whoever opened
// it, so the caller's own tables are looked at as well; one that stands in none
// (vsock, or of a third namespace) has the kind "unlisted".
func (p Proc) Sockets(pid int) ([]Socket, error) {
	for try := 0; ; try++ {
		all, err := p.sockets(pid)
		// One that was closed while the tables were read stands in none either.
		if err != nil || try == 5 || !slices.ContainsFunc(all, func(s Socket) bool { return s.Kind == "unlisted" }) {
			return all, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (p Proc) sockets(pid int) ([]Socket, error) {
	fds, err := os.ReadDir(p.path(pid, "fd"))
	if err != nil {
		return nil, err
	}
	inodes := make(map[string]bool)
	for _, fd := range fds {
		link, err := os.Readlink(p.path(pid, "fd", fd.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		if n, ok := strings.CutPrefix(link, "socket:["); ok {
			inodes[strings.TrimSuffix(n, "]")] = true
		}
	}
	var out []Socket
	for _, dir := range []string{p.path(pid, "net"), filepath.Join(string(p), "self", "net")} {
		for _, t := range netTables {
			b, err := os.ReadFile(filepath.Join(dir, t.file))
			if errors.Is(err, fs.ErrNotExist) {
				continue // a kernel without that protocol
			}
			if err != nil {
				return nil, err
			}
			for line := range strings.Lines(string(b)) {
				f := strings.Fields(line)
				if len(f) <= t.inode || !inodes[f[t.inode]] {
					continue
				}
				delete(inodes, f[t.inode])
				out = append(out, socket(t.kind, f))
			}
		}
	}
	for range inodes {
		out = append(out, Socket{Kind: "unlisted"})
	}
	slices.SortFunc(out, func(a, b Socket) int { return strings.Compare(a.String(), b.String()) })
	return out, nil
}

func socket(kind string, f []string) Socket {
	s := Socket{Kind: kind}
	switch kind {
	case "unix":
		if len(f) > 7 {
			s.Local = f[7]
		}
		flags, _ := strconv.ParseUint(f[3], 16, 32)
		s.Listens = flags&0x10000 != 0 || // __SO_ACCEPTCON
			f[4] == "0002" && s.Local != "" // a datagram socket with a name
	case "packet":
		s.Listens = true
	case "netlink":
	default:
		s.Local = address(f[1])
		// 0A is TCP_LISTEN; without a peer everybody may send.
		s.Listens = kind == "tcp" && f[3] == "0A" || kind != "tcp" && strings.Trim(f[2], "0:") == ""
	}
	return s
}

// address reads the kernel's form: 32-bit words in the host's byte order, port.
func address(s string) string {
	host, port, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	n, err2 := strconv.ParseUint(port, 16, 16)
	if err != nil || err2 != nil || len(raw)%4 != 0 {
		return s
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	ip, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(ip.Unmap(), uint16(n)).String()
}

// Devices are the network devices that a process sees.
func (p Proc) Devices(pid int) ([]string, error) {
	b, err := os.ReadFile(p.path(pid, "net", "dev"))
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			out = append(out, strings.TrimSpace(name))
		}
	}
	return out, nil
}
