//go:build linux

package smolvm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"
)

// wrapped makes smolvm a script that may change what the real one is asked for.
func (w *world) wrapped(script string) {
	w.t.Helper()
	path := filepath.Join(w.dir, "smolvm")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nreal="+os.Getenv("BOTTLE_SMOLVM")+"\n"+script+"\nexec $real \"$@\"\n"), 0o755); err != nil {
		w.t.Fatal(err)
	}
	w.env = append(w.env, "BOTTLE_SMOLVM="+path)
}

// A smolvm that starts the machine and leaves the socket out, as it once did with
// --from, is no engine for a bottle: up fails, says why, and nothing is left.
func TestSocketIsMissing(t *testing.T) {
	w := newWorld(t, "user")
	w.manifest("")
	w.wrapped(`case "$1 $2" in "machine create")
	n=$#
	while [ $n -gt 0 ]; do
		a=$1; shift; n=$((n - 1))
		if [ "$a" = --mount-socket ]; then shift; n=$((n - 1)); else set -- "$@" "$a"; fi
	done
esac`)
	r := w.sh("bottle-plan sh | bottle-vm up")
	if r.code != 69 || gjson.Get(r.out, "error.code").Str != "gate_socket_missing" || !strings.Contains(r.err, "gate.sock") {
		t.Errorf("%+v", r)
	}
	if got := strings.TrimSpace(w.ok("$BOTTLE_SMOLVM machine ls --json | jq length; bottle-vm ls")); got != "0" {
		t.Errorf("left: %s", got)
	}
}

// What the Smolfile says is what the guest has.
func TestSmolfile(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		w.manifest(`,"env":{"LANG":"C.UTF-8"}`)
		id := w.up()
		machine := w.ok("$BOTTLE_SMOLVM machine status --name " + id + " --json")
		if gjson.Get(machine, "cpus").Int() != 1 || gjson.Get(machine, "memory_mib").Int() != 512 || gjson.Get(machine, "network").Bool() ||
			gjson.Get(machine, "entrypoint.0").Str != "/opt/bottle/guest" || gjson.Get(machine, "labels.owner").Str != "bottle" {
			t.Error(machine)
		}
		in := func(script string) string { return w.ok("bottle-vm exec " + id + " -- sh -c '" + script + "'") }
		if got := in("nproc; pwd; echo $LANG"); got != "1\n/workspace\nC.UTF-8\n" {
			t.Errorf("%q", got)
		}
		// The host's file server holds the read-only folder, for guest root too.
		r := w.sh("$BOTTLE_SMOLVM machine exec --name " + id + " -- sh -c 'mount -o remount,rw /opt/bottle; echo x > /opt/bottle/config.json'")
		if r.code == 0 {
			t.Errorf("guest root wrote to a read-only folder: %+v", r)
		}
		if got := w.ok("cat $(bottle-vm status " + id + " | jq -r .state_dir)/smolvm/guest/config.json"); !strings.HasPrefix(got, "{") {
			t.Errorf("the helper's config: %q", got)
		}
	})
}

// A mount below a home of the image that is closed to all but its owner: the helper
// is root and not that, and has to see the folder to tell of it.
func TestClosedHome(t *testing.T) {
	w := newWorld(t, "user")
	w.ok("mkdir -p more img/home/agent/.cache && echo shown >more/it && chmod 700 img/home/agent")
	w.manifest(`,"mounts":[{"source":"more","target":"/home/agent/.cache"}]`)
	id := w.up()
	if got := w.ok("bottle-vm exec " + id + " -- sh -c 'cat ~/.cache/it; stat -c %a ~'"); got != "shown\n700\n" {
		t.Errorf("%q", got)
	}
	w.ok("bottle-vm down " + id)
}

// A pack of the image: made once, where this smolvm can; what starts from it has
// the socket, no network, and an image that no other machine can write to.
func TestPack(t *testing.T) {
	w := newWorld(t, "user")
	w.manifest("")
	cache := "--cache " + filepath.Join(w.dir, "images")
	pack := "bottle-plan sh | bottle-pack --smolmachine " + cache
	r := w.sh(pack)
	if r.code == 78 && gjson.Get(r.out, "error.code").Str == "smolvm_pack" {
		// This version cannot, and says so itself.
		if got := w.ok("$BOTTLE_SMOLVM pack create --help"); strings.Contains(got, "rootfs directory") {
			t.Errorf("refused, though its help says that it can: %s", got)
		}
		return
	}
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	began := time.Now()
	doc := w.ok(pack)
	t.Logf("the second time it took %s", time.Since(began).Round(time.Millisecond))
	made := strings.Fields(w.ok("ls images/derived; ls images | grep -c ^tmp- || :"))
	if len(made) != 2 || made[1] != "0" {
		t.Fatalf("in the cache: %v", made)
	}
	sum := w.ok("sha256sum images/derived/*")
	if err := os.WriteFile(filepath.Join(w.dir, "doc"), []byte(doc), 0o644); err != nil {
		t.Fatal(err)
	}

	ids := [2]string{}
	for i := range ids {
		began := time.Now()
		ids[i] = gjson.Get(w.ok("bottle-vm up "+cache+" <doc"), "vm.id").Str
		t.Logf("up from a pack took %s", time.Since(began).Round(time.Millisecond))
	}
	for _, id := range ids {
		dir := strings.TrimSpace(w.ok("bottle-vm status " + id + " | jq -r .state_dir"))
		if got := w.ok("ls " + dir + "/smolvm"); strings.Contains(got, "rootfs") || strings.Contains(got, "Smolfile") {
			t.Errorf("not started from the pack: %s", got)
		}
		machine := w.ok("$BOTTLE_SMOLVM machine status --name " + id + " --json")
		if gjson.Get(machine, "network").Bool() || gjson.Get(machine, "cpus").Int() != 1 || gjson.Get(machine, "memory_mib").Int() != 512 || gjson.Get(machine, "mounts").Int() != 2 {
			t.Error(machine)
		}
		if got := w.ok("bottle-vm exec " + id + " -- sh -c 'cat /proc/net/route; ls /sys/class/net; ls /run/bottle/gate.sock; pwd'"); strings.Contains(got, "eth") || !strings.Contains(got, "gate.sock\n/workspace\n") {
			t.Errorf("in the guest: %q", got)
		}
	}
	// Guest root of one writes wherever the image's parts are attached.
	w.sh("$BOTTLE_SMOLVM machine exec --name " + ids[0] + ` -- sh -c 'mkdir -p /m; mount -t virtiofs smolvm_layers /m; for d in / /m /m/* /m/*/*; do [ ! -d "$d" ] || echo x > "$d/planted"; done; echo x > /bin/planted'`)
	if got := w.ok("find " + filepath.Join(w.dir, "images") + " -name planted"); got != "" {
		t.Errorf("the cache was written to: %s", got)
	}
	if r := w.sh("bottle-vm exec " + ids[1] + " -- sh -c 'find / -xdev -name planted; ls /planted /bin/planted'"); r.out != "" {
		t.Errorf("another bottle has it: %+v", r)
	}
	w.ok("bottle-vm down " + ids[0])
	id := gjson.Get(w.ok("bottle-vm up "+cache+" <doc"), "vm.id").Str
	if r := w.sh("bottle-vm exec " + id + " -- sh -c 'find / -xdev -name planted; ls /planted /bin/planted'"); r.out != "" {
		t.Errorf("the next bottle has it: %+v", r)
	}
	// Stopped and started again it has its disk, the socket, and still no network.
	w.ok("bottle-vm exec " + id + " -- sh -c 'echo kept >$HOME/kept' && bottle-vm stop " + id + " && bottle-vm start " + id)
	if got := w.ok("bottle-vm exec " + id + " -- sh -c 'cat $HOME/kept; ls /sys/class/net; ls /run/bottle/gate.sock'"); !strings.HasPrefix(got, "kept\n") || strings.Contains(got, "eth") || !strings.HasSuffix(got, "gate.sock\n") {
		t.Errorf("started again: %q", got)
	}
	if r := w.sh("bottle-vm exec " + id + " -- wget -T 60 -O- http://denied.test/"); !strings.Contains(r.err, "403") {
		t.Errorf("started again, no gate: %+v", r)
	}
	if got := w.ok("sha256sum images/derived/*"); got != sum {
		t.Errorf("the pack changed: %s%s", sum, got)
	}
}
