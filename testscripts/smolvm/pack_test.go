//go:build linux

package smolvm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

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
