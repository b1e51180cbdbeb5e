package integration

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/sidecar/sidecartest"
	"github.com/bottle-tools/bottle/testscripts/harness"
)

// addon changes what it sees, says what that was, and tries what it must not.
const addon = `
import colorsys # the file of that name beside this one must not be it

class Addon:
    def request(self, flow):
        flow.request.headers["x-addon"] = "saw " + flow.request.headers.get("x-api-key", "nothing")[:10] # the gate would refuse a whole placeholder
        if flow.request.path == "/elsewhere":
            flow.request.host = "denied.test"
        if flow.request.path == "/unlisted":
            flow.request.path = "/private"
        if flow.request.path == "/rewrite":
            flow.request.path = "/rewritten"

    def response(self, flow):
        flow.response.headers["x-addon-answer"] = "read %d, secret %s" % (len(flow.response.content), "SECRET" in flow.response.text)

addons = [Addon()]
`

func TestMitmdump(t *testing.T) {
	program := sidecartest.Path(t)
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Env = append(w.Env, "BOTTLE_MITMDUMP="+program)
		if r := w.Sh(`"$BOTTLE_MITMDUMP" --version`); r.Code != 0 {
			t.Skipf("SKIPPED: this user cannot run %s: %+v", program, r)
		}
		u := newUpstream(t, "keyed.test", "plain.test", "denied.test")
		w.Env = append(w.Env, "THE_KEY="+secretValue)
		w.Write("upstream.crt", u.ca)
		w.Write("addon.py", strings.ReplaceAll(addon, "SECRET", secretValue))
		w.Write("colorsys.py", "open('"+w.Dir+"/ran', 'w')\n")
		rule := func(host string) string {
			return fmt.Sprintf(`{"host":%q,"ports":[%d],"addresses":["127.0.0.1"]}`, host, u.port)
		}
		w.Manifest(`"runtime":"gvisor","egress":{"proxy":"builtin","roots":["upstream.crt"],
			"allow":[` + rule("keyed.test") + `,` + rule("plain.test") + `],
			"inspect":[{"host":"keyed.test","requests":["GET /a","GET /mirror","GET /elsewhere","GET /unlisted","GET /rewrite","GET /rewritten"]}],
			"mitmdump":{"addons":["./addon.py"]}},
			"secrets":{"THE_KEY":{"from":"env:THE_KEY","inject":[{"host":"keyed.test","header":"x-api-key"}]}}`)

		if r := w.Sh("bottle-plan | bottle-vm up >/dev/null"); r.Code != 77 || !contains(r.Stderr, "mitmdump runs addon.py (sha256:") {
			t.Fatalf("untrusted: %+v", r)
		}
		w.OK("bottle-vm trust && bottle-plan >plan")
		if r := w.Sh("mkdir v && ln -s $BOTTLE_MITMDUMP v/mitmdump && BOTTLE_MITMDUMP=v/mitmdump bottle-vm up <plan"); r.Code != 77 || gjson.Get(r.Out, "error.code").Str != "program_in_reach" {
			t.Errorf("a mitmdump of the workspace: %+v", r)
		}
		if r := w.Sh("BOTTLE_MITMDUMP=/nonexistent bottle-vm up <plan"); r.Code != 69 || gjson.Get(r.Out, "error.code").Str != "no_mitmdump" {
			t.Errorf("no mitmdump: %+v", r)
		}
		if r := w.Sh("BOTTLE_MITMDUMP=/bin/false bottle-vm up <plan"); r.Code != 69 || gjson.Get(r.Out, "error.code").Str != "sidecar_failed" {
			t.Errorf("a mitmdump that ends: %+v", r)
		}
		if r := w.Sh("bottle-egress serve --listen tcp:127.0.0.1:0 <plan"); r.Code != 69 || !contains(r.Stderr, "would run without them") {
			t.Errorf("a gate in the foreground: %+v", r)
		}
		if r := w.Sh("cp addon.py keep && echo '#' >>addon.py && bottle-vm up <plan; mv keep addon.py"); gjson.Get(r.Out, "error.code").Str != "addon_changed" {
			t.Errorf("another addon: %+v", r)
		}
		w.OK("bottle-vm up -o doc.json <plan")
		doc := w.Read("doc.json")
		id := gjson.Get(doc, "vm.id").Str
		if s := gjson.Get(doc, "vm.sidecar"); s.Get("name").Str != "mitmdump" || !strings.HasPrefix(s.Get("run_config_sha256").Str, "sha256:") {
			t.Errorf("vm.sidecar: %s", s.Raw)
		}

		seenThrough(t, w, u, id)
		notThrough(t, w, u, id)
		doors(t, w, id)
		if _, err := os.Stat(w.Dir + "/ran"); err == nil {
			t.Error("a file beside the addon was run on the host")
		}
		verified(t, w, id)
		diesAndComesBack(t, w, u, id)
		verified(t, w, id)
		logs := w.OK("bottle-vm logs " + id)
		if !contains(logs, "mitmdump is back") || contains(logs, secretValue) {
			t.Errorf("logs: %s", logs)
		}
		w.Down(id)
		w.Gone()
	})
}

// seenThrough: the addon's changes arrive on both sides, and the key is put in
// behind it and taken out before it.
func seenThrough(t *testing.T, w *harness.World, u *upstream, id string) {
	t.Helper()
	answer := func(path string) string {
		r := w.Exec(id, fmt.Sprintf(`curl -sS -m 20 -i -H "x-api-key: $THE_KEY" https://keyed.test:%d%s`, u.port, path))
		return r.Out + r.Stderr
	}
	if got := answer("/a"); !contains(got, "200 OK") || !contains(got, "served keyed.test/a") || !contains(got, "read ") || contains(got, secretValue) {
		t.Fatalf("through mitmdump: %s\n%s", got, w.OK("bottle-vm logs "+id))
	}
	if got := u.headers("X-Addon"); len(got) != 1 || got[0] != "saw bottle-pla" {
		t.Errorf("the addon saw %q", got)
	}
	if got := u.headers("X-Api-Key"); len(got) != 1 || got[0] != secretValue {
		t.Errorf("the host got %q", got)
	}
	if got := answer("/rewrite"); !contains(got, "served keyed.test/rewritten") {
		t.Errorf("rewritten: %s", got)
	}
	if got := answer("/mirror"); !contains(got, "secret False") || contains(got, secretValue) {
		t.Errorf("a key that the host gives back: %s", got)
	}
	audit := w.OK("bottle-vm logs --audit " + id)
	var via, sender bool
	for _, line := range strings.Split(audit, "\n") {
		if gjson.Get(line, "event").Str == "request" && gjson.Get(line, "verdict").Str == "allow" {
			via = via || gjson.Get(line, "via").Str == "mitmdump" && gjson.Get(line, "secret").Str == ""
			sender = sender || gjson.Get(line, "sender").Str == "mitmdump" && gjson.Get(line, "secret").Str == "THE_KEY"
		}
	}
	if !via || !sender {
		t.Errorf("the audit log tells not both halves:\n%s", audit)
	}
}

// notThrough: an addon gets nowhere that the guest could not, and sees nothing
// of what is end to end.
func notThrough(t *testing.T, w *harness.World, u *upstream, id string) {
	t.Helper()
	for path, code := range map[string]string{"/elsewhere": "not_in_allowlist", "/unlisted": "request_not_allowed"} {
		r := w.Exec(id, fmt.Sprintf(`curl -sS -m 20 https://keyed.test:%d%s`, u.port, path))
		if contains(r.Out, "served ") {
			t.Errorf("%s: %+v", path, r)
		}
		denied := false
		for _, line := range strings.Split(w.OK("bottle-vm logs --audit "+id), "\n") {
			denied = denied || gjson.Get(line, "sender").Str == "mitmdump" && gjson.Get(line, "verdict").Str == "deny" && gjson.Get(line, "code").Str == code
		}
		if !denied {
			t.Errorf("%s: no denial in the audit log", path)
		}
	}
	seen := len(u.headers("X-Addon"))
	if code, status, body := get(w, id, "plain.test", u.port, "/p", "--cacert", "/workspace/upstream.crt"); code != 0 || status != "200 200" || !contains(body, "served plain.test/p") {
		t.Errorf("end to end: %d %s %s", code, status, body)
	}
	if len(u.headers("X-Addon")) != seen {
		t.Error("the addon saw what is end to end")
	}
}

// doors: both ports are shut to who does not know the word, which no argument
// tells.
func doors(t *testing.T, w *harness.World, id string) {
	t.Helper()
	var back string
	for _, p := range w.Processes() {
		if contains(p, "bottle:") {
			t.Errorf("a password in an argument: %s", p)
		}
		if _, rest, ok := strings.Cut(p, "upstream:http://"); ok {
			back = strings.Fields(rest)[0]
		}
	}
	if back == "" {
		t.Fatalf("no mitmdump among %q", w.Processes())
	}
	for _, auth := range []string{"", "--proxy-user bottle:guess"} {
		r := w.Sh("curl -sS -m 10 " + auth + " -o /dev/null -w '%{http_connect}' -k -x http://" + back + " https://keyed.test/a")
		if r.Out != "407" {
			t.Errorf("the way back, %q: %+v", auth, r)
		}
		if r := w.Sh("curl -sS -m 10 " + auth + " -x http://" + back + " http://keyed.test/a"); !contains(r.Out, "not_inspected") {
			t.Errorf("a plain request, %q: %+v", auth, r)
		}
	}
}

// verified: a bottle with a sidecar is as planned, until its copy of an addon is
// another one.
func verified(t *testing.T, w *harness.World, id string) {
	t.Helper()
	if r := w.Sh("bottle-vm verify " + id); r.Code != 0 || r.Out+r.Stderr != "" {
		t.Errorf("verify: %+v", r)
	}
	conf := w.State + "/bottle/bottles/" + id + "/mitmdump/conf/"
	for name, what := range map[string]string{"addon-0/addon.py": "sidecar: configuration", "config.yaml": "sidecar: configuration", "addon-0/colorsys.py": "holds more"} {
		before, err := os.ReadFile(conf + name)
		after := string(before) + "\n#"
		if name == "config.yaml" {
			after = strings.Replace(after[:len(after)-2], `"ssl_insecure":false`, `"ssl_insecure":true`, 1)
		}
		if werr := os.WriteFile(conf+name, []byte(after), 0o600); werr != nil {
			t.Fatal(werr)
		}
		if r := w.Sh("bottle-vm verify " + id); r.Code != 1 || !contains(r.Out, what) || strings.Count(r.Out, "\n") != 1 {
			t.Errorf("%s was changed: %+v", name, r)
		}
		if err != nil {
			os.Remove(conf + name)
		} else if err := os.WriteFile(conf+name, before, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// diesAndComesBack: meanwhile there is no way to inspected hosts.
func diesAndComesBack(t *testing.T, w *harness.World, u *upstream, id string) {
	t.Helper()
	pid := 0
	for _, p := range w.Processes() {
		if contains(p, "upstream:http://") {
			pid, _ = strconv.Atoi(strings.Fields(p)[0])
		}
	}
	if pid == 0 {
		t.Fatal("no mitmdump")
	}
	before := len(u.headers("X-Api-Key"))
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ask := fmt.Sprintf(`curl -sS -m 20 -H "x-api-key: $THE_KEY" https://keyed.test:%d/a`, u.port)
	if r := w.Exec(id, ask); !contains(r.Out, `"code":"sidecar_down"`) {
		t.Errorf("while it is down: %+v", r)
	}
	if n := len(u.headers("X-Api-Key")); n != before {
		t.Error("a request got round mitmdump")
	}
	harness.Eventually(t, 60*time.Second, func() string {
		if s := w.OK("bottle-vm status " + id); !contains(s, `"sidecar":"up"`) || !contains(s, `"gate":"up"`) {
			return s
		}
		if r := w.Exec(id, ask); !contains(r.Out, "served keyed.test/a") {
			return fmt.Sprintf("%+v", r)
		}
		return ""
	})
	saw := u.headers("X-Addon")
	if n := len(u.headers("X-Api-Key")); n <= before || saw[len(saw)-1] != "saw bottle-pla" {
		t.Errorf("afterwards: %d, %q", n, saw)
	}
}
