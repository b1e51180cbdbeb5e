//go:build linux

package smolvm

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/tidwall/gjson"
	"golang.org/x/sys/unix"
)

// Guest root can take a device of the guest from its kernel, and speak to the file
// server in the monitor itself. A kernel never asks for a name with a slash, and
// libkrun's authors do not promise what its server does with one.
//
// The test's own program does that in the guest: "rawfuse TAG" takes the device
// with that tag and prints what the server answers, a line of JSON for each request.

func init() {
	if len(os.Args) == 3 && os.Args[1] == "rawfuse" {
		if err := rawFUSE(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// Registers of a virtio device behind MMIO (Virtual I/O Device, version 1.2, 4.2.2).
const (
	regMagic      = 0x00
	regDeviceID   = 0x08
	regFeatures   = 0x20
	regFeatureSel = 0x24
	regQueueSel   = 0x30
	regQueueSize  = 0x38
	regQueueReady = 0x44
	regNotify     = 0x50
	regInterrupt  = 0x60
	regAck        = 0x64
	regStatus     = 0x70
	regDesc       = 0x80
	regAvail      = 0x90
	regUsed       = 0xa0
	regConfig     = 0x100

	idFS      = 26
	queueSize = 16
	pageSize  = 4096
	availAt   = 0x400 // of a queue's page
	usedAt    = 0x800
)

// Requests (linux/fuse.h, protocol 7.31).
const (
	fuseLookup  = 1
	fuseSymlink = 6
	fuseMknod   = 8
	fuseMkdir   = 9
	fuseUnlink  = 10
	fuseRename  = 12
	fuseLink    = 13
	fuseOpen    = 14
	fuseRead    = 15
	fuseInit    = 26
	fuseCreate  = 35
)

type rawDevice struct {
	regs       []byte
	queue      []byte // of requests
	seen       uint16
	in, out    []byte
	inAt, outA uint64
	unique     uint64
}

func (d *rawDevice) reg(at int) *uint32     { return (*uint32)(unsafe.Pointer(&d.regs[at])) }
func (d *rawDevice) get(at int) uint32      { return atomic.LoadUint32(d.reg(at)) }
func (d *rawDevice) set(at int, v uint32)   { atomic.StoreUint32(d.reg(at), v) }
func (d *rawDevice) set64(at int, v uint64) { d.set(at, uint32(v)); d.set(at+4, uint32(v>>32)) }
func (d *rawDevice) index(at int) *uint32   { return (*uint32)(unsafe.Pointer(&d.queue[at])) }
func (d *rawDevice) used() uint16           { return uint16(atomic.LoadUint32(d.index(usedAt)) >> 16) }
func (d *rawDevice) tag() string {
	var b []byte
	for at := regConfig; at < regConfig+36; at += 4 {
		b = binary.LittleEndian.AppendUint32(b, d.get(at))
	}
	return strings.TrimRight(string(b), "\x00")
}

// page gives one of memory, and where it is for a device.
func page() ([]byte, uint64, error) {
	b, err := unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_LOCKED|unix.MAP_POPULATE)
	if err != nil {
		return nil, 0, err
	}
	b[0] = 1
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	var entry [8]byte
	if _, err := f.ReadAt(entry[:], int64(uintptr(unsafe.Pointer(&b[0]))/pageSize*8)); err != nil {
		return nil, 0, err
	}
	frame := binary.LittleEndian.Uint64(entry[:]) & (1<<55 - 1)
	if frame == 0 {
		return nil, 0, errors.New("the kernel does not tell where memory is")
	}
	b[0] = 0
	return b, frame * pageSize, nil
}

// takeDevice finds it by its tag, resets it under the kernel's feet and sets it up anew.
func takeDevice(tag string) (*rawDevice, error) {
	const mem = "/dev/rawfuse-mem"
	if err := unix.Mknod(mem, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 1))); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	f, err := os.OpenFile(mem, os.O_RDWR|unix.O_SYNC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	iomem, err := os.ReadFile("/proc/iomem")
	if err != nil {
		return nil, err
	}
	var tags []string
	for _, m := range regexp.MustCompile(`(?m)^([0-9a-f]+)-[0-9a-f]+ : virtio-mmio\.\d+$`).FindAllStringSubmatch(string(iomem), -1) {
		at, err := strconv.ParseInt(m[1], 16, 64)
		if err != nil {
			return nil, err
		}
		regs, err := unix.Mmap(int(f.Fd()), at, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, err
		}
		d := &rawDevice{regs: regs}
		if d.get(regMagic) != 0x74726976 || d.get(regDeviceID) != idFS {
			continue
		}
		if tags = append(tags, d.tag()); d.tag() == tag {
			return d, d.setUp()
		}
	}
	return nil, fmt.Errorf("no device %s among %q", tag, tags)
}

func (d *rawDevice) setUp() (err error) {
	const acknowledge, driver, driverOK, featuresOK = 1, 2, 4, 8
	d.set(regStatus, 0)
	d.set(regStatus, acknowledge)
	d.set(regStatus, acknowledge|driver)
	for sel, bits := range []uint32{0, 1} { // VIRTIO_F_VERSION_1 alone
		d.set(regFeatureSel, uint32(sel))
		d.set(regFeatures, bits)
	}
	d.set(regStatus, acknowledge|driver|featuresOK)
	for sel := range uint32(2) { // what has priority, and the requests
		queue, at, err := page()
		if err != nil {
			return err
		}
		d.set(regQueueSel, sel)
		d.set(regQueueSize, queueSize)
		d.set64(regDesc, at)
		d.set64(regAvail, at+availAt)
		d.set64(regUsed, at+usedAt)
		d.set(regQueueReady, 1)
		d.queue = queue
	}
	if d.in, d.inAt, err = page(); err != nil {
		return err
	}
	if d.out, d.outA, err = page(); err != nil {
		return err
	}
	d.set(regStatus, acknowledge|driver|featuresOK|driverOK)
	body := binary.LittleEndian.AppendUint32(nil, 7)
	body = append(binary.LittleEndian.AppendUint32(body, 31), make([]byte, 8)...)
	if a := d.ask(fuseInit, 0, body); !a.replied || a.errno != 0 {
		return fmt.Errorf("the server does not begin: %+v, status %x", a, d.get(regStatus))
	}
	return nil
}

type answer struct {
	replied bool
	errno   int32 // 0, or -ENOENT and so on
	body    []byte
}

// ask sends a request about a node (1 is the root) and waits for the answer. A
// server may give a request back without one.
func (d *rawDevice) ask(opcode uint32, node uint64, body []byte) answer {
	le := binary.LittleEndian
	for i := range d.out {
		d.out[i] = 0xee
	}
	d.unique++
	head := le.AppendUint32(nil, uint32(40+len(body)))
	head = le.AppendUint32(head, opcode)
	head = le.AppendUint64(head, d.unique)
	head = le.AppendUint64(head, node)
	copy(d.in, append(append(head, make([]byte, 16)...), body...))
	const next, writable = 1, 2
	// The answer's head and the rest have to be apart for 1.9.1, as Linux has them.
	var desc []byte
	for i, part := range []struct {
		at    uint64
		size  int
		flags uint16
	}{{d.inAt, 40 + len(body), next}, {d.outA, 16, writable | next}, {d.outA + 16, pageSize - 16, writable}} {
		desc = le.AppendUint32(le.AppendUint64(desc, part.at), uint32(part.size))
		desc = le.AppendUint16(le.AppendUint16(desc, part.flags), uint16(i+1))
	}
	copy(d.queue, desc)
	made := le.Uint16(d.queue[availAt+2:])
	le.PutUint16(d.queue[availAt+4+int(made%queueSize)*2:], 0)
	atomic.StoreUint32(d.index(availAt), uint32(made+1)<<16)
	d.set(regNotify, 1)
	for range 5000 {
		if d.used() != d.seen {
			d.seen++
			d.set(regAck, d.get(regInterrupt))
			n := le.Uint32(d.out)
			if n == 0xeeeeeeee || n < 16 || n > pageSize {
				return answer{}
			}
			return answer{true, int32(le.Uint32(d.out[4:])), slices.Clone(d.out[16:n])}
		}
		time.Sleep(time.Millisecond)
	}
	return answer{}
}

func named(fixed int, names ...string) []byte {
	b := make([]byte, fixed)
	for _, n := range names {
		b = append(append(b, n...), 0)
	}
	return b
}

// illegal are names that no kernel asks for.
var illegal = []string{"..", "../outside", "../../../../../../../../etc/passwd", "/etc/passwd", "inside/../../outside", "below/inside", "below/.."}

func rawFUSE(tag string) error {
	d, err := takeDevice(tag)
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	le := binary.LittleEndian
	tell := func(what, name string, a answer, text string) {
		_ = out.Encode(map[string]any{"device": tag, "what": what, "name": name, "replied": a.replied, "errno": a.errno, "text": text})
	}
	mode := func(fixed int, at int, m uint32) []byte { b := make([]byte, fixed); le.PutUint32(b[at:], m); return b }
	create := func(name string) answer {
		b := mode(16, 4, 0o100644)
		le.PutUint32(b, unix.O_CREAT|unix.O_WRONLY)
		return d.ask(fuseCreate, 1, append(b, named(0, name)...))
	}
	// read looks a name up and reads what is there.
	read := func(name string) (answer, string) {
		a := d.ask(fuseLookup, 1, named(0, name))
		if !a.replied || a.errno != 0 || len(a.body) < 104 {
			return a, ""
		}
		node := le.Uint64(a.body)
		o := d.ask(fuseOpen, node, make([]byte, 8))
		if !o.replied || o.errno != 0 {
			return a, ""
		}
		b := make([]byte, 40)
		copy(b, o.body[:8])
		le.PutUint32(b[16:], 200)
		return a, string(d.ask(fuseRead, node, b).body)
	}
	legal := func(when string) {
		a, text := read("inside")
		tell("read", "inside", a, text)
		tell("create", "made-"+when, create("made-"+when), "")
	}
	legal("before")
	inside := le.Uint64(append(d.ask(fuseLookup, 1, named(0, "inside")).body, make([]byte, 8)...))
	for _, name := range illegal {
		a, text := read(name)
		tell("lookup", name, a, text)
		to := strings.Replace(name, "outside", "planted", 1)
		tell("create", to, create(to), "")
		tell("mkdir", to, d.ask(fuseMkdir, 1, append(mode(8, 0, 0o755), named(0, to)...)), "")
		tell("mknod", to, d.ask(fuseMknod, 1, append(mode(16, 0, 0o100644), named(0, to)...)), "")
		tell("symlink", to, d.ask(fuseSymlink, 1, named(0, to, "/etc/passwd")), "")
		tell("link", to, d.ask(fuseLink, 1, append(le.AppendUint64(nil, inside), named(0, to)...)), "")
		tell("rename to", to, d.ask(fuseRename, 1, append(le.AppendUint64(nil, 1), named(0, "made-before", to)...)), "")
		tell("rename from", name, d.ask(fuseRename, 1, append(le.AppendUint64(nil, 1), named(0, name, "taken")...)), "")
		tell("unlink", name, d.ask(fuseUnlink, 1, named(0, name)), "")
	}
	legal("after")
	return nil
}

// The file server serves its folder and nothing else, whatever it is asked for, and
// writes nothing where it was told not to.
func TestRawFUSE(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	eachUser(t, func(t *testing.T, w *world) {
		w.manifest("")
		const secret = "of-the-host-alone"
		w.ok("echo " + secret + " >outside; mkdir -p ws/below; echo of-the-workspace | tee ws/inside >ws/below/inside; cp " + self + " ws/raw")
		id := w.up()
		guest := strings.TrimSpace(w.ok("bottle-vm status "+id+" | jq -r .state_dir")) + "/smolvm/guest"
		w.ok("echo of-the-helper >" + guest + "/inside")
		around := "cat outside; find . -maxdepth 1 -printf '%p %y %l\\n' | sort; " +
			"find " + filepath.Dir(guest) + " -path '*/guest/run' -prune -o -printf '%p %y %s %l\\n' | sort"
		before := w.ok(around)
		w.ok("$BOTTLE_SMOLVM machine exec --name " + id + " -w / -- cp /workspace/raw /dev/raw")
		for _, tt := range []struct {
			tag, holds string
			writable   bool
		}{{"smolvm0", "of-the-helper\n", false}, {"smolvm1", "of-the-workspace\n", true}} {
			out := w.ok("timeout 240 $BOTTLE_SMOLVM machine exec --name " + id + " -w / -- /dev/raw rawfuse " + tt.tag)
			if strings.Contains(out, secret) || strings.Contains(out, "root:x:0:0") {
				t.Errorf("%s: it reads the host's: %s", tt.tag, out)
			}
			asked := 0
			for line := range strings.Lines(out) {
				v := gjson.Parse(line)
				what, name := v.Get("what").Str, v.Get("name").Str
				did := v.Get("replied").Bool() && v.Get("errno").Int() == 0
				switch {
				case what == "read": // the controls: this is how it is done
					if !did || v.Get("text").Str != tt.holds {
						t.Errorf("%s: the control does not work: %s", tt.tag, line)
					}
				case !strings.Contains(name, "/") && name != "..":
					if did != tt.writable {
						t.Errorf("%s: %s", tt.tag, line)
					}
				default:
					asked++
					if did {
						t.Errorf("%s: the server did it: %s", tt.tag, line)
					}
				}
			}
			if want := 9 * len(illegal); asked != want {
				t.Errorf("%s: %d requests, want %d: %s", tt.tag, asked, want, out)
			}
			t.Logf("%s: %d requests with %d names refused", tt.tag, asked, len(illegal))
		}
		if r := w.ok("cat ws/below/inside; ls ws"); r != "of-the-workspace\nbelow\ninside\nmade-after\nmade-before\nraw\n" {
			t.Errorf("the workspace: %q", r)
		}
		if after := w.ok(around); after != before {
			t.Errorf("around the workspace:\n%s\nand before:\n%s", after, before)
		}
		if r := w.sh("ls -d /planted* /tmp/planted* ../planted*"); r.out != "" {
			t.Errorf("planted: %s", r.out)
		}
		w.ok("bottle-vm down " + id)
	})
}
