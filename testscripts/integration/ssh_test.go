package integration

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/pipelock/pipelocktest"
	"github.com/bottle-tools/bottle/testscripts/harness"
)

// sshdAddr is an address as Tailscale and carriers give them (RFC 6598).
const sshdAddr = "100.64.0.7"

// TestSSHRoot and the others push to and clone from a real sshd, on a machine of
// its own as far as the bottle's network can tell, from inside a bottle.
func TestSSHRoot(t *testing.T) { overSSH(t, harness.NewWorld, "builtin") }

func TestSSHPlain(t *testing.T) { overSSH(t, harness.PlainWorld, "builtin") }

// TestSSHPipelock: pipelock closes what is not TLS, so ssh rules leave from the
// gate beside it.
func TestSSHPipelock(t *testing.T) { overSSH(t, harness.NewWorld, "pipelock") }

func overSSH(t *testing.T, world func(testing.TB) *harness.World, proxy string) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: making networks and running sshd takes root")
	}
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		sshd = "/usr/sbin/sshd"
	}
	for _, program := range []string{sshd, "ssh", "ssh-keygen", "ip", "git"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("SKIPPED: no %s on this machine: ssh rules are not tried with a real sshd", program)
		}
	}
	var program string
	if proxy == "pipelock" {
		program = pipelocktest.Path(t)
	}
	if !inside(t, "127.0.0.1 localhost\n") {
		return
	}
	w := world(t)
	w.Env = append(w.Env, "BOTTLE_PIPELOCK="+program)
	hostKey := startSSHD(t, w, sshd)
	w.Manifest(`"runtime":"gvisor","egress":{"proxy":"` + proxy + `","allow":["example.com",
		{"host":"git.test","protocol":"ssh","addresses":["` + sshdAddr + `"]},
		{"cidr":"` + sshdAddr + `/32","protocol":"ssh","ports":[22]},
		{"cidr":"100.64.0.0/24","protocol":"ssh","ports":[2222]}]}`)
	w.OK("bottle-plan | bottle-vm up -o doc.json")
	id := gjson.Get(w.Read("doc.json"), "vm.id").Str
	if proxy == "pipelock" {
		proxyUp(t, w, id)
	}

	// The key and what is known of the host lie where ssh looks for them.
	known := ""
	for _, name := range []string{"git.test", sshdAddr, "[" + sshdAddr + "]:2222"} {
		known += name + " " + hostKey
	}
	w.Write("known", known)
	if r := w.Exec(id, "umask 077; mkdir ~/.ssh; cp /workspace/testkey ~/.ssh/id_ed25519; cp /workspace/known ~/.ssh/known_hosts; git config --global user.email a@example.com; git config --global user.name agent"); r.Code != 0 {
		t.Fatalf("%+v", r)
	}
	repo := filepath.Join(filepath.Dir(w.Dir), "repo.git")
	for i, url := range []string{"root@git.test:" + repo, "ssh://root@" + sshdAddr + repo, "ssh://root@" + sshdAddr + ":2222" + repo} {
		script := fmt.Sprintf("set -e; cd /tmp; git clone -q %s c%d; cd c%d; echo %d >>file; git add file; git commit -qm change%d; git push -q origin HEAD:main; git log --format=%%s | wc -l", url, i, i, i, i)
		if r := w.Exec(id, script); r.Code != 0 || strings.TrimSpace(r.Out) != strconv.Itoa(i+2) {
			t.Errorf("%s\n%+v\n%s", script, r, w.OK("cat "+w.State+"/bottle/audit/*"))
		}
	}
	if r := w.Exec(id, "ssh -o BatchMode=yes root@git.test 'head -c 5000000 /dev/zero; cat' </workspace/known | tail -c "+strconv.Itoa(len(known))); r.Out != known {
		t.Errorf("both directions: %+v", r)
	}
	// The bottle's other rules are about other hosts, ports and protocols.
	for _, c := range []struct{ script, want string }{
		{"ssh -o BatchMode=yes root@other.test true", "Could not resolve hostname"},
		{"ssh -o BatchMode=yes -p 2022 root@git.test true", "Connection refused"},
		{"ssh -o BatchMode=yes root@100.64.1.7 true", "Network is unreachable"},
		{"ssh -o BatchMode=yes root@100.64.0.8 true", "Connection re"},
		{direct + "curl -sS -m 20 http://git.test:22/", "curl: ("},
	} {
		if r := w.Exec(id, c.script); r.Code == 0 || !contains(r.Stderr, c.want) {
			t.Errorf("%s: %+v", c.script, r)
		}
	}
	log := w.OK("cat " + w.State + "/bottle/audit/*")
	has(t, "audit log", log, `"code":"not_ssh"`, "the client began with something else")
	if contains(log, `"via":"proxy"`) {
		t.Errorf("ssh went through the proxy:\n%s", log)
	}
}

// startSSHD runs sshd on sshdAddr in a network of its own, which a wire connects
// with the test's. It makes the repository repo.git and the key pair whose
// private half is the workspace's testkey, and gives the host's public key.
func startSSHD(t *testing.T, w *harness.World, sshd string) string {
	t.Helper()
	top := filepath.Dir(w.Dir)
	conf := filepath.Join(top, "sshd_config")
	sh := func(script string) {
		t.Helper()
		if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
			t.Fatalf("%s\n%v: %s", script, err, out)
		}
	}
	sh(fmt.Sprintf(`cd %s
ssh-keygen -q -t ed25519 -N '' -f hostkey
ssh-keygen -q -t ed25519 -N '' -f w/testkey
git init -q --bare -b main repo.git
git init -q -b main first && cd first && echo 0 >file && git add file
git -c user.name=a -c user.email=a@example.com commit -qm first && git push -q ../repo.git main`, top))
	for _, name := range []string{"testkey", "testkey.pub"} {
		if err := os.Chown(filepath.Join(w.Dir, name), w.UID(), -1); err != nil {
			t.Fatal(err)
		}
	}
	text := fmt.Sprintf("Port 22\nPort 2222\nListenAddress %s\nHostKey %s/hostkey\nAuthorizedKeysFile %s/testkey.pub\n"+
		"PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nPidFile none\nUseDNS no\n", sshdAddr, top, w.Dir)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// The wire's far end can be given to it once it has its network.
	cmd := exec.Command("unshare", "-n", "-m", "sh", "-ec", `read line
ip link set lo up; ip addr add `+sshdAddr+`/24 dev far; ip link set far up
mount -t tmpfs tmpfs /run; mkdir -m 755 /run/sshd
exec `+sshd+` -D -e -f `+conf)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said strings.Builder
	cmd.Stderr = &said
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Log(said.String())
		}
	})
	harness.Eventually(t, harness.Limit, func() string { // unshare has done its work
		own, _ := os.Readlink("/proc/self/ns/net")
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)); err != nil || ns == own {
			return fmt.Sprintf("sshd has no network of its own: %s, %v", ns, err)
		}
		return ""
	})
	sh(fmt.Sprintf("ip link add near type veth peer name far; ip link set far netns %d; ip addr add 100.64.0.1/24 dev near; ip link set near up", cmd.Process.Pid))
	if _, err := io.WriteString(stdin, "go\n"); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Limit, func() string {
		out, err := exec.Command("ssh-keyscan", "-T", "2", "-t", "ed25519", sshdAddr).Output()
		if err != nil || len(out) == 0 {
			return fmt.Sprintf("sshd does not answer: %v", err)
		}
		return ""
	})
	key, err := os.ReadFile(filepath.Join(top, "hostkey.pub"))
	if err != nil {
		t.Fatal(err)
	}
	return string(key)
}
