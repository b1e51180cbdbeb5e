//go:build linux

package runsc

import (
	"slices"
	"strings"
	"testing"
)

// The arguments of a sandbox and its gofer as runsc made them.
func TestCheckArgv(t *testing.T) {
	const (
		sandbox = "runsc-sandbox --root=/run/r --log=/proc/self/fd/4 --host-uds=none --host-fifo=none --host-settings=ignore --in-sandbox-cgroup=v2 " +
			"--overlay2=root:memory --network=none --ignore-cgroups=true --log-fd=3 boot --bundle=/mnt --gofer-mount-confs=lisafs:memory,lisafs:none " +
			"--apply-caps=true --setup-root --total-host-memory 25276514304 --total-memory 25276514304 --io-fds=4 --dev-io-fd=-1 --mounts-fd=22 " +
			"--start-sync-fd=23 --pin-ring-fd=24 --controller-fd=25 --spec-fd=26 --stdio-fds=27 --pass-fd=30:3 a-ce3d8753"
		gofer = "runsc-gofer --overlay2=root:memory --host-uds=none --host-fifo=none --host-settings=ignore --network=none --in-sandbox-cgroup=v2 " +
			"--root=/run/r --log=/proc/self/fd/4 --ignore-cgroups=true --log-fd=3 gofer --bundle /mnt --gofer-mount-confs=lisafs:memory --spec-fd=4 " +
			"--mounts-fd=5 --rpc-fd=6 --pin-ring-fd=7 --sync-sentry-exit-fd=8 --io-fds=9 --sync-chroot-fd=27 a-ce3d8753"
	)
	r := Runsc{Path: "/bin/runsc", Root: "/run/r"}
	for _, tt := range []struct {
		name, argv, verb string
		cgroups          bool
		wrong            string // names, sorted
	}{
		{"sandbox", sandbox, "boot", true, ""},
		{"gofer", gofer, "gofer", true, ""},
		{"no cgroups were asked for", sandbox, "boot", false, "in-sandbox-cgroup"},
		{"host sockets", strings.Replace(sandbox, "--host-uds=none", "--host-uds=all", 1), "boot", true, "host-uds"},
		{"network", strings.Replace(sandbox, "--network=none", "--network=host", 1), "boot", true, "network"},
		{"no word of the network", strings.Replace(sandbox, "--network=none ", "", 1), "boot", true, "network"},
		{"another root", strings.Replace(gofer, "/run/r", "/tmp/r", 1), "gofer", true, "root"},
		{"one flag more", strings.Replace(sandbox, " boot ", " --debug-log=/tmp/x --TESTONLY-unsafe-nonroot boot ", 1), "boot", true, "TESTONLY-unsafe-nonroot debug-log"},
		{"a device", strings.Replace(sandbox, " a-ce3d8753", " --nvidia-driver-version=1 a-ce3d8753", 1), "boot", true, "boot nvidia-driver-version"},
		{"another command", strings.Replace(sandbox, " boot ", " restore ", 1), "boot", true, ""},
		{"nothing", "", "boot", true, ""},
	} {
		wrong := r.CheckArgv(strings.Fields(tt.argv), tt.verb, RunOptions{InternalCgroups: tt.cgroups})
		var names []string
		for name := range wrong {
			names = append(names, name)
		}
		slices.Sort(names)
		got := strings.Join(names, " ")
		if tt.name == "another command" || tt.name == "nothing" {
			if got == "" {
				t.Errorf("%s: nothing is wrong", tt.name)
			}
			continue
		}
		if got != tt.wrong {
			t.Errorf("%s: %q, want %q (%v)", tt.name, got, tt.wrong, wrong)
		}
	}
}
