package integration

import (
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"
	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/pipelock/pipelocktest"
	"github.com/bottle-tools/bottle/lib/sidecar/sidecartest"
	"github.com/bottle-tools/bottle/testscripts/harness"
)

// inside gives the test a network of its own, where names lead to a server that
// pipelock takes for a public one, and keeps its user namespace.
func inside(t *testing.T, hosts string) bool {
	t.Helper()
	const mark = "BOTTLE_TEST_IN_NETWORK" // of pipelocktest
	if os.Getenv(mark) != "" {
		return pipelocktest.OwnNetwork(t, hosts)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=120s")
	cmd.Env = append(os.Environ(), mark+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	cmd.WaitDelay = 20 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil || !contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// TestPipelockRoot and TestPipelockPlain are the whole chain with pipelock
// behind the gate. Each has a network of its own, which is without the server's
// address until pipelock has looked which addresses are the host's own.
func TestPipelockRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: not root")
	}
	pipelocked(t, harness.NewWorld)
}

func TestPipelockPlain(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: as a plain user a test cannot have a network of its own and keep its user too")
	}
	pipelocked(t, harness.PlainWorld)
}

func pipelocked(t *testing.T, world func(testing.TB) *harness.World) {
	program := pipelocktest.Path(t)
	if !inside(t, "127.0.0.1 localhost\n"+pipelocktest.PublicAddr+" example.com keys.example.com other.example.com\n") {
		return
	}
	// Its certificate is the same in every process.
	throwaway := httptest.NewTLSServer(http.NotFoundHandler())
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: throwaway.Certificate().Raw})
	throwaway.Close()
	w := world(t)
	w.Write("upstream.crt", string(root))
	w.Env = append(w.Env, "BOTTLE_PIPELOCK="+program, "THE_KEY="+secretValue)
	w.Manifest(`"runtime":"gvisor","egress":{"proxy":"pipelock","roots":["upstream.crt"],"allow":["example.com","keys.example.com"]},
		"secrets":{"THE_KEY":{"from":"env:THE_KEY","inject":[{"host":"keys.example.com","header":"x-api-key"}]}}`)
	w.OK("bottle-vm trust")
	if up := w.Sh("bottle-plan | bottle-egress | bottle-pack | bottle-vm up -o doc.json"); up.Code != 0 {
		t.Fatalf("up: %+v", up)
	}
	doc := w.Read("doc.json")
	id := gjson.Get(doc, "vm.id").Str
	if got := gjson.Get(doc, "vm.proxy"); got.Get("name").Str != "pipelock" || !strings.HasPrefix(got.Get("run_config_sha256").Str, "sha256:") {
		t.Errorf("vm.proxy: %s", got.Raw)
	}
	proxyUp(t, w, id)
	pipelocktest.Serve(t, 443, true, http.HandlerFunc(mirror))
	asPlanned := func(when string) {
		t.Helper()
		if r := w.Sh("bottle-vm verify " + id); r.Code != 0 || r.Out+r.Stderr != "" {
			t.Errorf("%s: verify: %+v", when, r)
		}
	}
	asPlanned("fresh")
	throughPipelock(t, w, id)
	asPlanned("after a restart of pipelock")
	liveThroughPipelock(t, w, id)
	asPlanned("after live rules")
	config := w.State + "/bottle/bottles/" + id + "/pipelock/conf/pipelock.yaml"
	w.Write(config, strings.Replace(w.Read(config), "  - example.com\n", "  - example.com\n  - other.example.com\n", 1))
	if r := w.Sh("bottle-vm verify " + id); r.Code != 1 || !contains(r.Out, "api_allowlist has other.example.com") || !contains(r.Out, "proxy: digest of") {
		t.Errorf("another configuration: %+v", r)
	}
}

// liveThroughPipelock opens a host that pipelock has to learn of, and closes
// one.
func liveThroughPipelock(t *testing.T, w *harness.World, id string) {
	t.Helper()
	reach := func(host string) string {
		_, status, body := get(w, id, host, 443, "/", "-k")
		return status + " " + body
	}
	pid := pipelockPid(w)
	w.OK("bottle-egress allow --bottle " + id + " other.example.com")
	if got := reach("other.example.com"); !contains(got, `served other.example.com with ""`) {
		t.Errorf("allowed: %s", got)
	}
	w.OK("bottle-egress deny --bottle " + id + " example.com")
	if got := reach("example.com"); !contains(got, " 403") {
		t.Errorf("denied: %s", got)
	}
	// pipelock would resolve and dial by itself: it has to have learnt the range.
	w.OK("bottle-egress deny --bottle " + id + " " + pipelocktest.PublicAddr + "/32")
	if got := reach("other.example.com"); !contains(got, " 403") {
		t.Errorf("its address is denied: %s", got)
	}
	w.OK("bottle-egress revert --bottle " + id + " " + pipelocktest.PublicAddr + "/32 example.com")
	if got := reach("example.com"); !contains(got, `served example.com with ""`) {
		t.Errorf("reverted: %s", got)
	}
	w.OK("bottle-egress revert --bottle " + id + " --all")
	if got := reach("other.example.com"); !contains(got, " 403") {
		t.Errorf("reverted: %s", got)
	}
	if now := pipelockPid(w); now != pid {
		t.Errorf("pipelock was restarted: %d, before %d", now, pid)
	}
}

// TestPipelockWithMitmdump is the longest chain: gate, mitmdump, gate, pipelock.
func TestPipelockWithMitmdump(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: not root")
	}
	mitmdump := sidecartest.Path(t)
	program := pipelocktest.Path(t)
	if !inside(t, "127.0.0.1 localhost\n"+pipelocktest.PublicAddr+" keys.example.com\n") {
		return
	}
	throwaway := httptest.NewTLSServer(http.NotFoundHandler())
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: throwaway.Certificate().Raw})
	throwaway.Close()
	w := harness.NewWorld(t)
	w.Write("upstream.crt", string(root))
	w.Write("addon.py", "def response(flow):\n    flow.response.headers['x-addon'] = flow.request.headers.get('x-api-key', 'none')\n")
	w.Env = append(w.Env, "BOTTLE_PIPELOCK="+program, "BOTTLE_MITMDUMP="+mitmdump, "THE_KEY="+secretValue)
	w.Manifest(`"runtime":"gvisor","egress":{"proxy":"pipelock","roots":["upstream.crt"],"allow":["keys.example.com"],"mitmdump":{"addons":["addon.py"]}},
		"secrets":{"THE_KEY":{"from":"env:THE_KEY","inject":[{"host":"keys.example.com","header":"x-api-key"}]}}`)
	w.OK("bottle-vm trust")
	id := w.Up()
	proxyUp(t, w, id)
	pipelocktest.Serve(t, 443, true, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, "served %s, key %v", r.Host, r.Header.Get("X-Api-Key") == secretValue)
	}))
	r := w.Exec(id, `curl -sS -i -m 30 -H "x-api-key: $THE_KEY" https://keys.example.com/`)
	if !contains(r.Out, "served keys.example.com, key true") || !contains(strings.ToLower(r.Out), "x-addon: bottle-placeholder") {
		t.Errorf("%+v\n%s\n%s", r, w.OK("bottle-vm logs --audit "+id), w.OK("bottle-vm logs "+id))
	}
	if log := w.OK("bottle-vm logs " + id); !contains(log, "keys.example.com:443") || contains(log, secretValue) {
		t.Errorf("pipelock saw nothing of it:\n%s", log)
	}
}

func proxyUp(t *testing.T, w *harness.World, id string) {
	t.Helper()
	harness.Eventually(t, harness.Limit, func() string {
		if s := w.OK("bottle-vm status " + id); !contains(s, `"proxy":"up"`) {
			return s
		}
		return ""
	})
}

func mirror(rw http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(rw, "served %s with %q", r.Host, r.Header.Get("X-Api-Key"))
}

func throughPipelock(t *testing.T, w *harness.World, id string) {
	t.Helper()
	works := func() string {
		code, status, body := get(w, id, "example.com", 443, "/", "--cacert", "/workspace/upstream.crt")
		if code == 0 && status == "200 200" && contains(body, `served example.com with ""`) {
			return ""
		}
		return fmt.Sprintf("%d %s %s", code, status, body)
	}
	if why := works(); why != "" {
		t.Fatalf("%s\naudit: %s\nlogs: %s", why, w.OK("bottle-vm logs --audit "+id), w.OK("bottle-vm logs "+id))
	}
	if code, status, body := get(w, id, "keys.example.com", 443, "/"); code != 0 || status != "200 200" || !contains(body, "served keys.example.com") || contains(body, secretValue) {
		t.Errorf("injected: %d %s %s", code, status, body)
	}
	if code, status, _ := get(w, id, "other.example.com", 443, "/"); code != 56 || !strings.HasSuffix(status, " 403") {
		t.Errorf("denied: %d %s", code, status)
	}
	pid := pipelockPid(w)
	if pid == 0 {
		t.Fatalf("no pipelock among\n%s", strings.Join(w.Processes(), "\n"))
	}
	// The next pipelock must not find the server's address on this host.
	if err := publicAddr(false); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code, status, _ := get(w, id, "example.com", 443, "/"); code == 0 || strings.HasPrefix(status, "200") {
		t.Errorf("with pipelock dead something was served: %d %s", code, status)
	}
	harness.Eventually(t, harness.Limit, func() string {
		if now := pipelockPid(w); now == 0 || now == pid {
			return "no new pipelock"
		}
		return ""
	})
	proxyUp(t, w, id)
	t.Logf("back %s after pipelock was killed", time.Since(killed).Round(time.Millisecond))
	if err := publicAddr(true); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Limit, works)
}

func pipelockPid(w *harness.World) int {
	for _, p := range w.Processes() {
		if n, cmd, _ := strings.Cut(p, " "); contains(cmd, "pipelock run") {
			pid, _ := strconv.Atoi(n)
			return pid
		}
	}
	return 0
}

// publicAddr takes the server's address from the loopback interface, or gives it
// back; see pipelocktest.Serve.
func publicAddr(there bool) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	alias, err := unix.NewIfreq("lo:1")
	if err != nil {
		return err
	}
	if !there {
		alias.SetUint16(0) // not up
		return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, alias)
	}
	addr := netip.MustParseAddr(pipelocktest.PublicAddr).As4()
	if err := alias.SetInet4Addr(addr[:]); err != nil {
		return err
	}
	return unix.IoctlIfreq(s, unix.SIOCSIFADDR, alias)
}
