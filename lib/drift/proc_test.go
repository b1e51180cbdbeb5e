package drift

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// fake is a proc file system with one process, 7, and what the caller sees.
func fake(t *testing.T, files, links map[string]string) Proc {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range links {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
	}
	return Proc(root)
}

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestProc(t *testing.T) {
	p := fake(t, map[string]string{
		"7/cmdline":   "prog\x00--flag=a b\x00\x00last\x00",
		"7/environ":   "PATH=/bin\x00TOKEN=secret\x00odd\x00",
		"7/status":    "Name:\tprog\nSeccomp:\t2\nUid:\t1\t1\t1\t1\n",
		"7/uid_map":   "      1000        999          1\n         0 1936137169          1\n",
		"7/cgroup":    "5:memory:/a/bottle-x\n0::/b\n",
		"7/net/dev":   "Inter-| Receive\n face |bytes\n    lo:  0 0\n  eth0: 1 2\n",
		"7/mountinfo": "1 0 254:0 /a\\040b /w\\134x ro,nosuid - ext4 /dev/vda rw\n2 1 0:5 / /w rw shared:1 master:2 - tmpfs none rw\nshort\n",
		"8/stat":      "8 (a) b) S 7 0 0",
		"9/stat":      "9 (z) Z 7 0 0",
		"10/stat":     "10 (other) S 1 0 0",
	}, map[string]string{"7/exe": "/opt/prog (deleted)", "7/ns/net": "net:[1]"})
	if got := must(p.Argv(7))(t); !slices.Equal(got, []string{"prog", "--flag=a b", "", "last"}) {
		t.Errorf("%q", got)
	}
	if got := must(p.EnvNames(7))(t); !slices.Equal(got, []string{"PATH", "TOKEN", "odd"}) {
		t.Errorf("%q", got)
	}
	if got := p.Env(7, "PATH"); got != "/bin" {
		t.Errorf("%q", got)
	}
	if path, replaced, err := p.Exe(7); path != "/opt/prog" || !replaced || err != nil {
		t.Errorf("%q %v %v", path, replaced, err)
	}
	if got := must(p.Status(7))(t); got["Seccomp"] != "2" || got["Uid"] != "1 1 1 1" {
		t.Errorf("%v", got)
	}
	if got := must(p.UIDMap(7))(t); !reflect.DeepEqual(got, []IDMap{{1000, 999, 1}, {0, 1936137169, 1}}) {
		t.Errorf("%v", got)
	}
	if got := must(p.Cgroups(7))(t); !slices.Equal(got, []string{"/a/bottle-x", "/b"}) {
		t.Errorf("%v", got)
	}
	if got := must(p.Devices(7))(t); !slices.Equal(got, []string{"lo", "eth0"}) {
		t.Errorf("%v", got)
	}
	if got := must(p.Children(7))(t); !slices.Equal(got, []int{8}) {
		t.Errorf("%v", got)
	}
	want := []Mount{{"254:0", "/a b", `/w\x`, []string{"ro", "nosuid"}, "ext4"}, {"0:5", "/", "/w", []string{"rw"}, "tmpfs"}}
	if got := must(p.Mounts(7))(t); !reflect.DeepEqual(got, want) || !got[0].ReadOnly() || got[1].ReadOnly() {
		t.Errorf("%+v", got)
	}
	if _, err := p.Mounts(99); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

// The tables of the kernel, as it writes them.
func TestSockets(t *testing.T) {
	p := fake(t, map[string]string{
		"7/net/tcp": `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:A825 00000000:0000 0A 00000000:00000000 00:00000000 00000000   999        0 11 2 x 100 0 0 10 0
   1: 0100007F:A826 0200007F:01BB 01 00000000:00000000 00:00000000 00000000   999        0 12 2 x 100 0 0 10 0
`,
		"7/net/tcp6": `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 13 1 x 100 0 0 10 0
`,
		"7/net/udp": `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  1: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 14 2 x 0
  2: 0100007F:9000 0100007F:0035 01 00000000:00000000 00:00000000 00000000     0        0 15 2 x 0
`,
		"self/net/unix": `Num       RefCount Protocol Flags    Type St Inode Path
0: 00000002 00000000 00010000 0005 01 16 /run/x.sock
0: 00000003 00000000 00000000 0001 03 17
0: 00000002 00000000 00010000 0001 01 18 @abstract
0: 00000002 00000000 00000000 0002 01 19 /run/log
0: 00000002 00000000 00010000 0001 01 20 /not/mine
`,
		"7/net/packet":  "sk               RefCnt Type Proto  Iface R Rmem   User   Inode\nx 3 3 0003 0 1 0 0 21\n",
		"7/net/netlink": "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\nx 0 1 0 0 0 0 2 0 22\n",
	}, map[string]string{
		"7/fd/0": "/dev/null", "7/fd/1": "socket:[11]", "7/fd/2": "socket:[12]", "7/fd/3": "socket:[13]", "7/fd/4": "socket:[14]", "7/fd/5": "socket:[15]",
		"7/fd/6": "socket:[16]", "7/fd/7": "socket:[17]", "7/fd/8": "socket:[18]", "7/fd/9": "socket:[19]", "7/fd/10": "socket:[21]",
		"7/fd/11": "socket:[22]", "7/fd/12": "socket:[99]", "7/fd/13": "pipe:[5]",
	})
	var listening, other []string
	for _, s := range must(p.Sockets(7))(t) {
		if s.Listens {
			listening = append(listening, s.String())
		} else {
			other = append(other, s.Kind)
		}
	}
	if want := []string{"packet ", "tcp 127.0.0.1:43045", "tcp [::1]:8080", "udp 0.0.0.0:53", "unix /run/log", "unix /run/x.sock", "unix @abstract"}; !slices.Equal(listening, want) {
		t.Errorf("%q, want %q", listening, want)
	}
	if want := []string{"netlink", "tcp", "udp", "unix", "unlisted"}; !slices.Equal(slices.Sorted(slices.Values(other)), want) {
		t.Errorf("%q, want %q", other, want)
	}
}

// This very process, by the kernel's own words: a listener of any kind that it
// opens is found.
func TestSocketsOfThisProcess(t *testing.T) {
	if _, err := os.Stat("/proc/self/net/unix"); err != nil {
		t.Skipf("SKIPPED: no /proc here: %v", err)
	}
	find := func() *Findings {
		f := &Findings{Bottle: "b"}
		CheckSockets(f, Host, "test", os.Getpid(), nil)
		return f
	}
	before := len(find().List)
	tcp := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer tcp.Close()
	udp := must(net.ListenPacket("udp", "[::1]:0"))(t)
	defer udp.Close()
	abstract := must(net.Listen("unix", "@"+t.Name()))(t)
	defer abstract.Close()
	f := find()
	for _, want := range []string{"tcp " + tcp.Addr().String(), "udp " + udp.LocalAddr().String(), "unix @" + t.Name()} {
		if !slices.ContainsFunc(f.List, func(x Finding) bool { return x.Kind == Drift && x.What == "test: listener" && x.Found == want }) {
			t.Errorf("%s is not among %v", want, f.List)
		}
	}
	if len(f.List) != before+3 {
		t.Errorf("%v", f.List)
	}
}

func TestChecks(t *testing.T) {
	dir := t.TempDir()
	prog, other := filepath.Join(dir, "prog"), filepath.Join(dir, "other")
	for _, path := range []string{prog, other} {
		if err := os.WriteFile(path, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p := fake(t, map[string]string{"7/environ": "PATH=/bin\x00AWS_SECRET_ACCESS_KEY=shh\x00", "9/environ": ""},
		map[string]string{"7/exe": prog, "8/exe": prog + " (deleted)"})
	f := &Findings{Bottle: "b"}
	CheckProgram(f, p, "ok", 7, prog)
	CheckProgram(f, p, "another", 7, other)
	CheckProgram(f, p, "gone", 8, prog)
	CheckProgram(f, p, "hidden", 99, prog)
	CheckEnv(f, p, "env", 7, []string{"PATH"})
	CheckEnv(f, p, "empty", 9, nil)
	CheckEnv(f, p, "hidden", 99, nil)
	CheckSockets(f, p, "hidden", 99, nil)
	CheckMode(f, prog, 0o755, 0)
	CheckMode(f, prog, 0o600, fs.ModeDir)
	CheckMode(f, filepath.Join(dir, "none"), 0o600, 0)
	f.Same("set", []string{"a", "b"}, []string{"b", "c\x1b[2J\n"})
	f.Unknown("what", "x", errors.New("permission denied"))
	var got []string
	for _, x := range f.List {
		if x.Bottle != "b" || strings.ContainsAny(x.Found+x.What, "\x1b\n") {
			t.Errorf("%+v", x)
		}
		got = append(got, fmt.Sprintf("%s %s", x.Kind, strings.ReplaceAll(x.What, dir, "D")))
	}
	want := []string{"drift another: program", "drift gone: program", "unknown hidden: program", "drift env: variable",
		"unknown hidden: variables", "unknown hidden: listener", "drift kind of D/prog", "drift mode of D/prog", "unknown mode of D/none",
		"drift set", "drift set", "unknown what"}
	if !slices.Equal(got, want) {
		t.Errorf("%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, x := range f.List {
		if strings.Contains(x.Found, "shh") {
			t.Errorf("a value is told: %+v", x)
		}
	}
}
