package integration

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// TestInspection: an inspected host from a bottle: what may be asked of it, what
// a client that pins certificates is told, and that it works without.
func TestInspection(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		u := newUpstream(t, "api.test", "keyed.test", "pinned.test")
		w.Write("upstream.crt", u.ca)
		host := func(name string) string {
			return fmt.Sprintf(`{"host":%q,"ports":[%d],"addresses":["127.0.0.1"]}`, name, u.port)
		}
		manifest := func(pinned string) {
			w.Manifest(`"runtime":"gvisor","egress":{"proxy":"builtin","roots":["upstream.crt"],
				"allow":[` + host("api.test") + "," + host("keyed.test") + "," + host("pinned.test") + `],
				"inspect":[{"host":"api.test","requests":["GET /repos/*","POST /repos/{owner}/{repo}/issues"]}` + pinned + `]},
				"secrets":{"THE_KEY":{"from":"env:THE_KEY","inject":[{"host":"keyed.test","header":"x-api-key"}]}}`)
		}
		w.Env = append(w.Env, "THE_KEY="+secretValue)
		manifest(`,"pinned.test"`)
		w.OK("bottle-vm trust")
		id := w.Up()
		checkRequests(t, w, id, u)
		checkPlaceholder(t, w, id, u)

		key := pinOf(u)
		if code, _, out := get(w, id, "pinned.test", u.port, "/p", "--pinnedpubkey", key); code == 0 {
			t.Errorf("the pin of an inspected host holds: %s", out)
		}
		checkJava(t, w, id, u)
		r := w.Sh("bottle-vm down --report " + id)
		has(t, "down --report", r.Stderr,
			fmt.Sprintf("denied api.test:%d (request_not_allowed)", u.port), `add "DELETE /repos/o/r" to the requests of api.test`,
			fmt.Sprintf("denied keyed.test:%d, 3 times (placeholder_misplaced)", u.port), "goes into header x-api-key of keyed.test",
			fmt.Sprintf("not reached: pinned.test:%d (guest_rejects_ca)", u.port), `take "pinned.test" out of egress.inspect`)
		if contains(r.Stderr, secretValue) {
			t.Error("the secret is in the summary")
		}

		// What the hint says helps.
		manifest("")
		w.OK("bottle-vm trust")
		id = w.Up()
		if code, status, out := get(w, id, "pinned.test", u.port, "/p", "--pinnedpubkey", key, "--cacert", "/workspace/upstream.crt"); code != 0 || status != "200 200" {
			t.Errorf("not inspected: %d %s %s", code, status, out)
		}
		if r := w.Sh("bottle-vm down --report " + id); contains(r.Stderr, "pinned.test") {
			t.Errorf("not inspected: %s", r.Stderr)
		}
	})
}

func checkRequests(t *testing.T, w *harness.World, id string, u *upstream) {
	t.Helper()
	for _, c := range []struct {
		path, code string
		flags      []string
	}{
		{"/repos/o/r?q=/user", "", nil},
		{"/repos/o/r/issues", "", []string{"-d", "title=x"}},
		{"/repos/o/r", "request_not_allowed", []string{"-X", "DELETE"}},
		{"/user", "request_not_allowed", nil},
		{"/repos/%2e%2e/user", "ambiguous_path", nil},
		{"/repos/../user", "ambiguous_path", []string{"--path-as-is"}},
		{"/repos/o/r/issues", "override_refused", []string{"-d", "x=y", "-H", "X-HTTP-Method-Override: DELETE"}},
		{"/repos/o/r", "host_mismatch", []string{"-H", "Host: keyed.test"}},
		{"/repos/o/r", "upgrade_refused", []string{"-H", "Connection: Upgrade", "-H", "Upgrade: websocket"}},
	} {
		code, status, body := get(w, id, "api.test", u.port, c.path, c.flags...)
		served, _, _ := strings.Cut("served api.test"+c.path, "?")
		if c.code == "" && (code != 0 || status != "200 200" || !contains(body, served)) ||
			c.code != "" && (status != "403 200" || !contains(body, `"code":"`+c.code+`"`)) {
			t.Errorf("%s %v: %d %s %s", c.path, c.flags, code, status, body)
		}
	}
	audit := w.OK("bottle-vm logs --audit " + id)
	has(t, "audit log", audit, `"method":"DELETE","path":"/repos/o/r"`, `"path":"/repos/%2e%2e/user"`)
	if contains(audit, "?q=") || contains(audit, "title=") {
		t.Errorf("a query or a body is in the audit log:\n%s", audit)
	}
}

func checkPlaceholder(t *testing.T, w *harness.World, id string, u *upstream) {
	t.Helper()
	url := fmt.Sprintf("https://keyed.test:%d/y", u.port)
	if r := w.Exec(id, `curl -sS -m 10 -H "x-api-key: $THE_KEY" `+url+` && curl -sS -m 10 -H 'content-type: application/json' -d "{\"text\":\"my key is $THE_KEY\"}" `+url); strings.Count(r.Out, "served keyed.test/y") != 2 {
		t.Errorf("%+v", r)
	}
	for _, script := range []string{
		`curl -sS -m 10 -H "x-token: $THE_KEY" ` + url, `curl -sS -m 10 "` + url + `?key=$THE_KEY"`,
		`curl -sS -m 10 -u "me:$THE_KEY" ` + fmt.Sprintf("https://api.test:%d/repos/x", u.port), `curl -sS -m 10 -d "key=$THE_KEY" ` + url,
	} {
		if r := w.Exec(id, script); !contains(r.Out, `"code":"placeholder_misplaced"`) {
			t.Errorf("%s: %+v", script, r)
		}
	}
	if got := u.headers("X-Api-Key"); len(got) != 2 || got[0] != secretValue || got[1] != secretValue {
		t.Errorf("the upstream saw x-api-key %q", got)
	}
}

// pinOf is the upstream's key as curl's --pinnedpubkey takes it.
func pinOf(u *upstream) string {
	sum := sha256.Sum256(u.Certificate().RawSubjectPublicKeyInfo)
	return "sha256//" + base64.StdEncoding.EncodeToString(sum[:])
}

// checkJava: Java reads neither PEM nor variables, and trusts the bottle's
// authority all the same.
func checkJava(t *testing.T, w *harness.World, id string, u *upstream) {
	t.Helper()
	t.Run("java", func(t *testing.T) {
		if _, err := exec.LookPath("javac"); err != nil {
			t.Skip("SKIPPED: no Java with a compiler on this machine: that it trusts the bottle's authority is not tried")
		}
		w.Write("Reach.java", `public class Reach { public static void main(String[] a) throws Exception {
			System.out.println(new String(new java.net.URL(a[0]).openStream().readAllBytes())); } }`)
		for _, flags := range []string{"", "-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=3128 ", "-Djavax.net.ssl.trustStore=/opt/bottle/cacerts "} {
			script := fmt.Sprintf("java %s/workspace/Reach.java https://api.test:%d/repos/java", flags, u.port)
			if r := w.Exec(id, script); r.Code != 0 || !contains(r.Out, "served api.test/repos/java") {
				t.Errorf("%s: %+v", script, r)
			}
		}
	})
}
