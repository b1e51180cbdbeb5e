package smolvmcalls

import (
	"strings"

	"github.com/bottle-tools/bottle/lib/smolvm"
)

// sinceErrorFormat is from when on the wrapper asks for errors as JSON.
var sinceErrorFormat = smolvm.Version{1, 28, 1}

// table collects calls for one version.
type table struct {
	v     smolvm.Version
	calls []Call
}

// plain is a call as somebody types it.
func (t *table) plain(name string, argv ...string) *Call {
	t.calls = append(t.calls, Call{Name: name, Argv: argv})
	return &t.calls[len(t.calls)-1]
}

// wrapped is a call as the wrapper (lib/smolvm) makes it: with --error-format
// where that exists, before the command for the guest.
func (t *table) wrapped(name string, argv ...string) *Call {
	if !t.v.Less(sinceErrorFormat) {
		at := len(argv)
		for i, a := range argv {
			if a == "--" {
				at = i
				break
			}
		}
		argv = append(append(append([]string{}, argv[:at]...), "--error-format", "json"), argv[at:]...)
	}
	return t.plain(name, argv...)
}

// exec is a command in vm-a.
func (t *table) exec(name string, argv ...string) *Call {
	c := t.wrapped(name, append([]string{"machine", "exec", "--name", "vm-a"}, argv...)...)
	c.Slow = true
	return c
}

// cp is the wrapper's, which has --error-format first.
func (t *table) cp(name, src, dst string) *Call {
	argv := []string{"machine", "cp"}
	if !t.v.Less(sinceErrorFormat) {
		argv = append(argv, "--error-format", "json")
	}
	return t.plain(name, append(argv, src, dst)...)
}

// Records are the calls that need no guest. They depend on each other.
func Records(v smolvm.Version) []Call {
	t := &table{v: v}
	t.plain("version", "--version")
	t.plain("ls-json-empty", "machine", "ls", "--json")
	t.plain("ls-empty", "machine", "ls")

	t.wrapped("create", "machine", "create", "--name", "vm-a", "--cpus", "1", "--mem", "512", "--label", "owner=bottle")
	t.wrapped("create-duplicate", "machine", "create", "--name", "vm-a", "--cpus", "1", "--mem", "512")
	t.plain("create-positional", "machine", "create", "vm-pos")
	for _, n := range badNames {
		arg := []string{"--name", n.name}
		if strings.HasPrefix(n.name, "-") {
			arg = []string{"--name=" + n.name}
		}
		t.wrapped("create-name-"+n.what, append([]string{"machine", "create"}, arg...)...)
	}
	t.plain("ls-json-created", "machine", "ls", "--json")
	t.plain("ls-created", "machine", "ls")
	t.plain("status-created", "machine", "status", "--name", "vm-a")
	t.wrapped("status-json-created", "machine", "status", "--name", "vm-a", "--json")
	t.wrapped("data-dir", "machine", "data-dir", "--name", "vm-a")
	t.wrapped("exec-created", "machine", "exec", "--name", "vm-a", "--", "true")
	t.cp("cp-created", W+"/f1", "vm-a:/workspace/f1")
	t.wrapped("stop-created", "machine", "stop", "--name", "vm-a")
	t.plain("egress-events-created", "machine", "egress-events", "--name", "vm-a", "--json")

	// No such machine.
	for _, verb := range []string{"start", "stop", "data-dir"} {
		t.wrapped(verb+"-unknown", "machine", verb, "--name", "nope")
	}
	t.plain("status-unknown", "machine", "status", "--name", "nope")
	t.wrapped("status-json-unknown", "machine", "status", "--name", "nope", "--json")
	t.plain("delete-unknown", "machine", "delete", "--name", "nope")
	t.wrapped("delete-f-unknown", "machine", "delete", "--name", "nope", "-f")
	t.plain("exec-unknown-text", "machine", "exec", "--name", "nope", "--", "true")
	t.wrapped("exec-unknown", "machine", "exec", "--name", "nope", "-w", "/", "--", "true")
	t.cp("cp-unknown", "/etc/hostname", "nope:/tmp/x")
	t.plain("egress-events-unknown", "machine", "egress-events", "--name", "nope", "--json")

	// Arguments that are refused, and flags that only some versions know.
	t.plain("create-unknown-flag", "machine", "create", "--name", "x", "--no-such-flag")
	t.plain("unknown-verb", "machine", "frobnicate-it")
	t.plain("create-cpus-999", "machine", "create", "--name", "x", "--cpus", "999")
	t.wrapped("create-cpus-0", "machine", "create", "--name", "x", "--cpus", "0")
	t.plain("exec-no-command", "machine", "exec", "--name", "vm-a")
	t.plain("exec-unknown-flag", "machine", "exec", "--name", "vm-a", "--bogus", "--", "true")
	t.plain("start-json", "machine", "start", "--name", "vm-a", "--json")
	t.plain("cp-r", "machine", "cp", "-r", W+"/dir", "vm-a:/workspace/dir")
	t.plain("delete-positional", "machine", "delete", "vm-a")
	t.plain("error-format", "machine", "status", "--name", "nope", "--error-format", "json")
	t.plain("state-dir", "machine", "ls", "--json", "--state-dir", W+"/state")
	t.plain("exec-user-unknown", "machine", "exec", "--name", "nope", "--user", "1000", "--", "true")
	t.plain("credential", "machine", "create", "--name", "vm-c", "--credential", "TOKEN=TOKEN@api.example.com")
	t.plain("credential-status", "machine", "status", "--name", "vm-c", "--json")
	t.plain("credential-delete", "machine", "delete", "--name", "vm-c", "-f")

	// What a bottle is made of.
	t.wrapped("create-full", "machine", "create", "--name", "vm-f", "--cpus", "2", "--mem", "300", "--label", "owner=bottle", "--label", "k=a=b c",
		"--image", W+"/rootfs/", "-v", W+":/workspace", "-v", W+"/dir:/opt/bottle:ro", "--mount-socket", W+"/gate.sock:/run/bottle/gate.sock",
		"--", "/opt/bottle/guest", "init", "/opt/bottle/config.json")
	t.wrapped("status-full", "machine", "status", "--name", "vm-f", "--json")
	t.wrapped("delete-full", "machine", "delete", "--name", "vm-f", "-f")
	t.wrapped("create-volume-file", "machine", "create", "--name", "x", "-v", W+"/f1:/x")
	t.wrapped("create-volume-none", "machine", "create", "--name", "x", "-v", W+"/none:/x")
	t.wrapped("create-image-registry", "machine", "create", "--name", "x", "--image", "alpine")
	t.plain("delete-image-registry", "machine", "delete", "--name", "x", "-f") // newer ones make it
	t.wrapped("create-image-none-tar", "machine", "create", "--name", "x", "--image", "./none.tar")
	t.wrapped("create-image-none-dir", "machine", "create", "--name", "x", "--image", "./nonedir/")
	t.wrapped("create-image-dockerfile", "machine", "create", "--name", "x", "--image", "./Dockerfile").Files = map[string]string{"Dockerfile": "FROM scratch\n"}
	t.wrapped("create-from-none", "machine", "create", "--name", "x", "--from", "none.smolmachine")
	t.plain("create-tsi-cidr", "machine", "create", "--name", "x", "--net-backend", "tsi", "--allow-cidr", "127.0.0.2/32")

	t.wrapped("pack-from-unknown", "pack", "create", "--from-vm", "nope", "-o", "p3")
	t.plain("pack-no-image", "pack", "create", "-o", "p3")
	t.plain("pack-no-output", "pack", "create", "--image", "x.tar")

	t.smolfiles()

	// A delete that is none: without -f, nobody to ask.
	t.plain("delete-unasked", "machine", "delete", "--name", "vm-a")
	t.plain("ls-json-after-unasked", "machine", "ls", "--json")
	t.plain("delete-yes", "machine", "delete", "--name", "vm-a").Stdin = "y\n"
	t.wrapped("delete-f", "machine", "delete", "--name", "vm-a", "-f")
	t.plain("create-unnamed", "machine", "create") // clear removes it: its name is chance
	return t.calls
}

var badNames = []struct{ what, name string }{
	{"space", "bad name!"},
	{"dots", "../x"},
	{"empty", ""},
	{"long", strings.Repeat("a", 130)},
	{"dash", "-x"},
	{"dot", "Vm_A.1"},
}

// Smolfiles: all that bottle-pack writes, and what smolvm's strict parser says of
// what it does not know.
func (t *table) smolfiles() {
	create := func(name, file, text string) {
		c := t.wrapped("smolfile-"+name, "machine", "create", "--name", "sf", "-s", file)
		if text != "" {
			c.Files = map[string]string{file: text}
		}
	}
	create("ok", "ok.toml", `image = "python:3.12-alpine"
entrypoint = ["/app/run"]
cmd = ["serve"]
env = ["PORT=8080"]
workdir = "/app"
cpus = 2
memory = 1024
net = true
[network]
allow_hosts = ["localhost"]
allow_cidrs = ["10.0.0.0/8"]
[dev]
volumes = ["./src:/app"]
ports = ["8080:8080"]
init = ["true"]
[health]
exec = ["true"]
interval = "10s"
timeout = "2s"
retries = 3
startup_grace = "20s"
[secrets]
TOK = { from_env = "PROD_DB_URL" }
`)
	t.wrapped("smolfile-ok-status", "machine", "status", "--name", "sf", "--json")
	t.wrapped("smolfile-ok-delete", "machine", "delete", "--name", "sf", "-f")
	create("none", "none.toml", "")
	create("syntax", "syn.toml", "cpus = = 2\n")
	create("type", "typ.toml", "cpus = \"two\"\n")
	create("unknown", "unk.toml", "cpuz = 2\n")
	create("unknown-network", "unk2.toml", "[network]\nallow_host = [\"x\"]\n")
	create("sockets", "ms.toml", "cpus=1\nmount_sockets=[\"/a:/b\"]\n")
	create("sockets-dev", "ms2.toml", "[dev]\nsockets=[\"/a:/b\"]\n")
}

// Guest are the calls that need a guest.
func Guest(v smolvm.Version) []Call {
	t := &table{v: v}
	dial := []string{"/opt/tools/record", "dial"}
	reach := append(append([]string{}, dial...), "unix=/run/bottle/gate.sock", "unix=/run/bottle/late.sock",
		"tcp=127.0.0.1:"+HostPort, "tcp=127.0.0.2:"+HostPort, "tcp=10.0.2.15:"+HostPort, "tcp=[::1]:"+HostPort, "tcp=100.96.0.1:"+HostPort)

	// A machine without an image: what a check of the host boots.
	t.wrapped("guest-create", "machine", "create", "--name", "vm-a", "--cpus", "1", "--mem", "256", "--label", "owner=bottle").Works = true
	// A start that failed may have left a monitor, which a stop ends.
	c := t.wrapped("guest-start", "machine", "start", "--name", "vm-a")
	c.Slow, c.Works, c.Redo = true, true, [][]string{{"machine", "stop", "--name", "vm-a"}}
	t.exec("exec-true", "--", "true").Works = true
	up := [][]string{{"machine", "start", "--name", "vm-a"}, {"machine", "exec", "--name", "vm-a", "--", "true"}}
	c = t.wrapped("start-running", "machine", "start", "--name", "vm-a")
	c.Slow, c.Says, c.Redo = true, "already running", up[1:]
	t.exec("exec-still-running", "--", "true")
	t.plain("ls-json-running", "machine", "ls", "--json").Slow = true
	t.plain("ls-running", "machine", "ls").Slow = true
	t.plain("status-running", "machine", "status", "--name", "vm-a").Slow = true
	t.wrapped("status-json-running", "machine", "status", "--name", "vm-a", "--json").Slow = true

	t.exec("exec-3", "--", "sh", "-c", "exit 3")
	t.exec("exec-255", "--", "sh", "-c", "exit 255")
	t.exec("exec-1", "--", "sh", "-c", "echo guest-says >&2; exit 1")
	t.exec("exec-not-found", "--", "/no/such/cmd")
	t.exec("exec-not-executable", "--", "/etc/passwd")
	t.exec("exec-killed", "--", "sh", "-c", "kill -9 $$")
	t.exec("exec-terminated", "--", "sh", "-c", "kill -15 $$")
	t.exec("exec-timeout", "--timeout", "5s", "--", "sleep", "60")
	t.exec("exec-after-timeout", "--", "sh", "-c", "ps | grep -c '[s]leep 60'")
	t.exec("exec-dir", "-w", "/etc", "--", "sh", "-c", "pwd; id")
	t.exec("exec-dir-none", "-w", "/nodir", "--", "pwd")
	t.exec("exec-env", "-e", "FOO=bar baz", "--", "sh", "-c", "echo $FOO")
	t.exec("exec-stdin-without-i", "--", "cat").Stdin = "hello\nworld\n"
	t.exec("exec-stdin", "-i", "--", "cat").Stdin = "hello\nworld\n"
	t.exec("exec-stdin-exit", "-i", "--", "sh", "-c", "cat; exit 7").Stdin = "abc"
	t.exec("exec-both", "--", "sh", "-c", "echo out; echo err >&2; exit 4")
	c = t.wrapped("exec-both-stream", "machine", "exec", "--stream", "--name", "vm-a", "--", "sh", "-c", "echo out; echo err >&2; exit 4")
	c.Slow = true
	t.plain("exec-no-dashes", "machine", "exec", "--name", "vm-a", "true").Slow = true
	t.exec("exec-user", "--user", "1000", "--", "id")
	// A guest that says what smolvm says.
	t.exec("exec-forged", "--", "sh", "-c", "echo 'Error: vm not found: vm-a' >&2; exit 1")

	t.cp("cp-up", W+"/f1", "vm-a:/workspace/f1")
	t.exec("cp-up-check", "--", "sh", "-c", "cat /workspace/f1; stat -c '%a %u %g %s' /workspace/f1")
	t.cp("cp-up-new-parent", W+"/f1", "vm-a:/newdir/deep/f1")
	t.cp("cp-up-to-dir", W+"/f1", "vm-a:/workspace/")
	t.cp("cp-up-dir", W+"/dir", "vm-a:/workspace/dir")
	t.cp("cp-up-none", W+"/nofile", "vm-a:/workspace/x")
	t.cp("cp-up-big", W+"/big", "vm-a:/workspace/big")
	t.cp("cp-up-relative", W+"/f1", "vm-a:rel/path")
	t.cp("cp-up-dash", "-", "vm-a:/workspace/stdin").Stdin = "x\n"
	t.cp("cp-down", "vm-a:/workspace/f1", W+"/down")
	t.cp("cp-down-none", "vm-a:/workspace/none", W+"/down2")
	t.cp("cp-down-dir", "vm-a:/etc", W+"/etcdir")
	t.cp("cp-down-to-dir", "vm-a:/workspace/f1", W+"/dir/")
	t.cp("cp-down-big", "vm-a:/workspace/big", W+"/big2")
	t.cp("cp-down-overwrite", "vm-a:/workspace/f1", W+"/f1")
	t.cp("cp-guest-guest", "vm-a:/a", "vm-a:/b")
	t.cp("cp-host-host", "/a", "/b")

	t.exec("persist", "--", "sh", "-c", "echo kept >/kept; sync")
	t.plain("update-running", "machine", "update", "--name", "vm-a", "--mem", "320")
	c = t.wrapped("stop", "machine", "stop", "--name", "vm-a")
	c.Slow, c.Says, c.Redo = true, "Stopping machine", up
	t.plain("status-stopped", "machine", "status", "--name", "vm-a")
	t.wrapped("status-json-stopped", "machine", "status", "--name", "vm-a", "--json")
	t.plain("ls-json-stopped", "machine", "ls", "--json")
	t.wrapped("exec-stopped", "machine", "exec", "--name", "vm-a", "--", "ls")
	t.cp("cp-stopped", W+"/f1", "vm-a:/workspace/stopped")
	t.wrapped("stop-stopped", "machine", "stop", "--name", "vm-a")
	t.plain("update-stopped", "machine", "update", "--name", "vm-a", "--mem", "320")
	c = t.wrapped("start-again", "machine", "start", "--name", "vm-a")
	c.Slow, c.Works, c.Redo = true, true, [][]string{{"machine", "stop", "--name", "vm-a"}}
	t.exec("persisted", "--", "cat", "/kept")
	t.exec("exec-settled", "--", "true")
	// Both stop the machine before they find that there is nobody to ask.
	const stopping = `(?m)^Stopping machine .*\n`
	t.plain("delete-unasked-running", "machine", "delete", "--name", "vm-a").Leave = stopping
	t.plain("status-after-unasked", "machine", "status", "--name", "vm-a")
	c = t.plain("start-before-delete", "machine", "start", "--name", "vm-a")
	c.Slow, c.Works, c.Redo = true, true, [][]string{{"machine", "stop", "--name", "vm-a"}}
	t.exec("exec-before-delete", "--", "true")
	t.wrapped("delete-running", "machine", "delete", "--name", "vm-a", "-f").Leave = stopping
	t.plain("ls-json-deleted", "machine", "ls", "--json")

	// A machine as a bottle is one: an image, folders, sockets, a workload.
	t.wrapped("image-create", "machine", "create", "--name", "vm-i", "--cpus", "1", "--mem", "512", "--label", "owner=bottle",
		"--image", W+"/rootfs/", "-v", W+"/dir:/workspace", "-v", W+"/tools:/opt/tools:ro",
		"--mount-socket", W+"/gate.sock:/run/bottle/gate.sock", "--mount-socket", W+"/late.sock:/run/bottle/late.sock",
		"--", "/bin/sleep", "100000").Works = true
	c = t.wrapped("image-start", "machine", "start", "--name", "vm-i")
	c.Slow, c.Works, c.Redo = true, true, [][]string{{"machine", "stop", "--name", "vm-i"}}
	in := func(name string, argv ...string) *Call {
		c := t.wrapped(name, append([]string{"machine", "exec", "--name", "vm-i"}, argv...)...)
		c.Slow = true
		return c
	}
	in("image-exec-true", "--", "true").Works = true
	in("image-exec-3", "--", "sh", "-c", "echo o; echo e >&2; exit 3")
	in("image-exec-1", "--", "sh", "-c", "exit 1")
	in("image-exec-127", "--", "sh", "-c", "exit 127")
	in("image-exec-not-found", "--", "nosuchcmd")
	in("image-exec-timeout", "--timeout", "5s", "--", "sleep", "60")
	in("image-exec-stdin", "-i", "--", "cat").Stdin = "hi\n"
	in("image-exec-id", "--", "sh", "-c", "id; pwd; ls /workspace /opt/tools")
	in("image-exec-user", "--user", "1000:1000", "--", "sh", "-c", "id -u; id -g")
	in("image-read-only", "--", "sh", "-c", "echo x >/opt/tools/x")
	in("image-interfaces", "--", "sh", "-c", "ls /sys/class/net; cat /proc/net/route | wc -l")
	in("image-reach", append([]string{"--"}, reach...)...)
	t.cp("image-cp-up", W+"/big2", "vm-i:/etc/from-host").Slow = true
	t.plain("image-egress-events", "machine", "egress-events", "--name", "vm-i", "--json")
	t.plain("image-ls-json", "machine", "ls", "--json").Slow = true
	c = t.wrapped("image-stop", "machine", "stop", "--name", "vm-i")
	c.Slow, c.Says, c.Redo = true, "Stopping machine", [][]string{{"machine", "start", "--name", "vm-i"}, {"machine", "exec", "--name", "vm-i", "--", "true"}}
	t.wrapped("image-delete", "machine", "delete", "--name", "vm-i", "-f")
	return t.calls
}
