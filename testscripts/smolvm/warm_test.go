//go:build linux

package smolvm

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"
	"golang.org/x/sys/unix"
)

// base is what is known of the one prepared machine of a world.
type base struct {
	name, dir    string
	pid          int
	cold, warm   int64
	data, record string
}

func (w *world) base() base {
	w.t.Helper()
	files, _ := filepath.Glob(filepath.Join(w.dir, ".local/state/bottle/warm/*/base.json"))
	if len(files) != 1 {
		w.t.Fatalf("prepared machines: %v", files)
	}
	raw, err := os.ReadFile(files[0])
	if err != nil {
		w.t.Fatal(err)
	}
	dir := filepath.Dir(files[0])
	machine, err := os.ReadFile(filepath.Join(dir, "smolvm/machine.json"))
	if err != nil {
		w.t.Fatal(err)
	}
	v := gjson.ParseBytes(raw)
	return base{v.Get("name").Str, dir, int(v.Get("monitor.pid").Int()), v.Get("cold_ms").Int(), v.Get("warm_ms").Int(),
		gjson.GetBytes(machine, "data_dir").Str, files[0]}
}

// forget ages the prepared machines, so that gc takes them.
func (w *world) forget() {
	w.t.Helper()
	b := w.base()
	raw, err := os.ReadFile(b.record)
	if err != nil {
		w.t.Fatal(err)
	}
	used := gjson.GetBytes(raw, "used_at").Raw
	raw = bytes.Replace(raw, []byte(used), []byte(`"2001-01-01T00:00:00Z"`), 1)
	if err := os.WriteFile(b.record, raw, 0o600); err != nil {
		w.t.Fatal(err)
	}
	out := w.ok("bottle-gc --apply --min-age 0s -v")
	if got := gjson.Get(out, "kind").Str; got != "base" {
		w.t.Errorf("gc removed %s", out)
	}
	if _, err := os.Stat(b.dir); !errors.Is(err, os.ErrNotExist) {
		w.t.Errorf("%s is still there: %v", b.dir, err)
	}
}

func (w *world) warm(more string) (id, doc string) {
	w.t.Helper()
	doc = w.ok("bottle-plan sh | bottle-vm up --warm " + more)
	return gjson.Get(doc, "vm.id").Str, doc
}

// A warm bottle is a bottle: with a gate, a CA and an identity of its own, and
// nothing of another one, nor has the machine that it is a copy of. It is ready
// sooner than a booted one.
func TestWarm(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		t.Cleanup(func() { // of a test that failed halfway, too
			if files, _ := filepath.Glob(filepath.Join(w.dir, ".local/state/bottle/warm/*/base.json")); len(files) == 1 {
				w.sh("bottle-vm down $(bottle-vm ls | jq -r .id)")
				w.forget()
			}
		})
		const secret = "s3cr3t-that-no-machine-may-hold"
		w.env = append(w.env, "TOKEN="+secret)
		port := greets(t, "127.0.0.1:0", nil)
		w.manifest(fmt.Sprintf(`,"egress":{"allow":[{"host":"web.test","ports":[%d],"protocol":"http","addresses":["127.0.0.1"]},"api.test"],"inspect":["api.test"]},
			"secrets":{"TOKEN":{"from":"env:TOKEN","inject":[{"host":"api.test","header":"x-token"}]}}`, port))
		w.ok("bottle-vm trust && echo here > ws/mine")
		if v := w.ok("$BOTTLE_SMOLVM --version"); w.cred.Uid != 0 && strings.HasPrefix(v, "smolvm 1.9.") {
			if r := w.sh("bottle-plan sh | bottle-vm up --warm"); r.code != 78 || !strings.Contains(r.out, `"warm_user"`) {
				t.Errorf("as a plain user: %+v", r)
			}
			return
		}

		a, doc := w.warm("")
		first := w.base()
		if got := gjson.Get(doc, "vm.warm").Str; got != first.name {
			t.Errorf("vm.warm is %q, and the machine %q", got, first.name)
		}
		var took [2]time.Duration
		begun := time.Now()
		b, _ := w.warm("")
		took[0] = time.Since(begun)
		again := w.base()
		if again.name != first.name || again.pid != first.pid {
			t.Errorf("the second bottle has another machine: %+v, %+v", first, again)
		}

		identity := func(id string) map[string]string {
			out := w.ok("bottle-vm exec " + id + ` -- sh -c 'hostname; cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid;
				tr -d "\n" </etc/ssl/certs/bottle-ca.pem; echo; head -c 16 /dev/urandom | od -An -tx1'`)
			names := []string{"hostname", "/etc/hostname", "machine id", "boot id", "uuid", "CA", "random bytes"}
			lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
			if len(lines) != len(names) {
				t.Fatalf("%q", out)
			}
			is := map[string]string{}
			for i, n := range names {
				is[n] = strings.TrimSpace(lines[i])
			}
			return is
		}
		ia, ib := identity(a), identity(b)
		for name, v := range ia {
			if v == "" || v == ib[name] {
				t.Errorf("%s is the same in both: %q", name, v)
			}
		}
		if ia["hostname"] != a || ib["hostname"] != b || ia["/etc/hostname"] != a {
			t.Errorf("they are %s and %s, and called %v and %v", a, b, ia, ib)
		}
		// The machine stood still; a bottle's clock does not.
		guest, _ := strconv.ParseInt(strings.TrimSpace(w.ok("bottle-vm exec "+b+" -- date +%s")), 10, 64)
		if off := time.Now().Unix() - guest; off < -30 || off > 30 {
			t.Errorf("its clock is off by %d s", off)
		}

		// Each has its own gate: what one asks for, the other's log does not have.
		get := fmt.Sprintf("wget -q -T 20 -O- http://web.test:%d/", port)
		if got := w.ok("bottle-vm exec " + a + " -- " + get); got != "hi\n" {
			t.Errorf("what is allowed answers %q", got)
		}
		w.sh("bottle-vm exec " + b + " -- wget -q -T 5 -O- http://denied.test/")
		la, lb := w.ok("bottle-egress log "+a), w.ok("bottle-egress log "+b)
		if !strings.Contains(la, "web.test") || strings.Contains(la, "denied.test") || strings.Contains(lb, "web.test") || !strings.Contains(lb, "denied.test") {
			t.Errorf("logs:\n%s\n%s", la, lb)
		}
		// Each has a root folder of its own over the common one, and the workspace.
		w.ok("bottle-vm exec " + a + " -- sh -c 'cat /workspace/mine; echo there >/workspace/from-a'")
		if got := w.ok("cat ws/from-a; bottle-vm exec " + b + " -- cat /workspace/mine"); got != "there\nhere\n" {
			t.Errorf("workspace: %q", got)
		}
		if w.cred.Uid == 0 {
			w.ok("bottle-vm exec " + a + " -- sh -c 'echo a >/bin/of-a; rm /bin/date'")
			if r := w.sh("bottle-vm exec " + b + " -- sh -c 'test ! -e /bin/of-a && date >/dev/null'"); r.code != 0 {
				t.Errorf("b has a's root folder: %+v", r)
			}
		}
		if r := w.sh("bottle-vm exec " + a + " -- sh -c 'exit 3'"); r.code != 3 {
			t.Errorf("%+v", r)
		}
		w.ok("mkdir -p d && echo content >d/f && bottle-vm cp d " + a + ":/workspace/")

		needles := map[string]string{"the secret": secret, "a's id": a, "b's id": b,
			"a's CA": ia["CA"][100:160], "b's CA": ib["CA"][100:160], "the allowed host": "web.test"}
		clean(t, again, needles)
		// The search finds what is there.
		if where := search(t, monitorOf(t, w, a), "", map[string]string{"a's id": a}); len(where) == 0 {
			t.Error("a's own id is not found in a's machine: the search is worth nothing")
		}
		if where := search(t, again.pid, again.data, map[string]string{"name": "bottle-warm-"}); len(where) == 0 {
			t.Error("the prepared machine's own name is not found in it: the search is worth nothing")
		}

		// gc knows it; while it is in use it stays, however old.
		if r := w.sh("bottle-gc --check --min-age 0s"); r.code != 0 {
			t.Errorf("gc: %+v", r)
		}
		w.ok("bottle-vm down " + a + " " + b)
		if r := w.sh("bottle-gc --check --min-age 0s"); r.code != 0 {
			t.Errorf("gc of a machine that was just used: %+v", r)
		}

		// Side by side, in turns.
		var cold, warm []time.Duration
		for range pairs() {
			begun := time.Now()
			c := w.up()
			cold = append(cold, time.Since(begun))
			w.ok("bottle-vm down " + c)
			begun = time.Now()
			c, _ = w.warm("")
			warm = append(warm, time.Since(begun))
			w.ok("bottle-vm down " + c)
		}
		t.Logf("EMULATED: up %v; up --warm %v; the second up --warm %v; by its record: boot %d ms, copy %d ms", cold, warm, took[0], again.cold, again.warm)
		if pairs() >= enoughPairs && middle(warm) >= middle(cold) {
			t.Errorf("a warm start takes %v, a cold one %v: it must not be offered", middle(warm), middle(cold))
		}

		// A machine that is gone is prepared anew.
		w.ok(fmt.Sprintf("kill -9 %d", again.pid))
		c, _ := w.warm("")
		if now := w.base(); now.pid == again.pid || now.name != again.name {
			t.Errorf("%+v, was %+v", now, again)
		}
		w.ok("bottle-vm down " + c)

		// One that was slower is not offered.
		raw, err := os.ReadFile(again.record)
		if err != nil {
			t.Fatal(err)
		}
		slow := strings.Replace(string(raw), fmt.Sprintf(`"cold_ms":%d`, w.base().cold), `"cold_ms":1`, 1)
		if err := os.WriteFile(again.record, []byte(slow), 0o600); err != nil {
			t.Fatal(err)
		}
		if r := w.sh("bottle-plan sh | bottle-vm up --warm"); r.code != 78 || !strings.Contains(r.out, `"warm_slower"`) {
			t.Errorf("%+v", r)
		}
	})
}

// enoughPairs make a median that is worth a verdict.
const enoughPairs = 3

// pairs is how often a cold and a warm start are compared: each takes minutes
// under emulation.
func pairs() int {
	n, err := strconv.Atoi(os.Getenv("BOTTLE_RIG_PAIRS"))
	if err != nil || n < 1 {
		return 1
	}
	return n
}

func middle(ds []time.Duration) time.Duration {
	sorted := append([]time.Duration(nil), ds...)
	for i := range sorted {
		for j := range i {
			if sorted[i] < sorted[j] {
				sorted[i], sorted[j] = sorted[j], sorted[i]
			}
		}
	}
	return sorted[len(sorted)/2]
}

func monitorOf(t *testing.T, w *world, id string) int {
	t.Helper()
	return int(gjson.Get(w.ok("$BOTTLE_SMOLVM machine status --name "+id+" --json"), "pid").Int())
}

// clean makes sure that none of needles is in the machine: its memory, its disks,
// its folders.
func clean(t *testing.T, b base, needles map[string]string) {
	t.Helper()
	for _, where := range append(search(t, b.pid, b.data, needles), search(t, 0, b.dir, needles)...) {
		t.Errorf("the prepared machine holds %s", where)
	}
}

// search looks through a process's memory and a folder's files, holes left out.
func search(t *testing.T, pid int, dir string, needles map[string]string) (found []string) {
	t.Helper()
	look := func(what string, r io.Reader) {
		const overlap = 128
		buf, keep := make([]byte, 1<<20), 0
		for {
			n, err := r.Read(buf[keep:])
			part := buf[:keep+n]
			for name, needle := range needles {
				if bytes.Contains(part, []byte(needle)) {
					found = append(found, name+" in "+what)
				}
			}
			if err != nil {
				return
			}
			keep = copy(buf, part[max(0, len(part)-overlap):])
		}
	}
	if pid > 0 {
		maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
		if err != nil {
			t.Fatal(err)
		}
		defer maps.Close()
		mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
		if err != nil {
			t.Fatal(err)
		}
		defer mem.Close()
		looked := int64(0)
		for s := bufio.NewScanner(maps); s.Scan(); {
			var from, to int64
			var mode string
			if _, err := fmt.Sscanf(s.Text(), "%x-%x %s", &from, &to, &mode); err != nil || mode[0] != 'r' || strings.HasSuffix(s.Text(), "[vvar]") {
				continue
			}
			look("memory, "+s.Text(), io.NewSectionReader(mem, from, to-from))
			looked += to - from
		}
		if looked < 64<<20 {
			t.Errorf("only %d bytes of memory could be looked at", looked)
		}
	}
	if dir == "" {
		return found
	}
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for at := int64(0); ; {
			from, err := f.Seek(at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return nil
			}
			if err != nil {
				return err
			}
			if at, err = f.Seek(from, unix.SEEK_HOLE); err != nil {
				return err
			}
			look(path, io.NewSectionReader(f, from, at-from))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
