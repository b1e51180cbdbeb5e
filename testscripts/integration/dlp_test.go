package integration

import (
	"encoding/base64"
	"fmt"
	"testing"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// TestSecretsDoNotLeave: what an agent sends is looked through where the gate
// reads it. The log has the rule and the place, and not what it was.
func TestSecretsDoNotLeave(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		u := egressWorld(t, w, "builtin")
		id := w.Up()
		// Of the form of a key of GitHub's, and none.
		const pat = "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a"
		if code, status, body := get(w, id, "keyed.test", u.port, "/x", "-d", "nothing in particular"); code != 0 || status != "200 200" {
			t.Errorf("a harmless body: %d %s %s", code, status, body)
		}
		for name, args := range map[string][]string{
			"body":   {"/x", "-d", `{"text":"the token is ` + pat + `"}`},
			"base64": {"/x", "-d", base64.StdEncoding.EncodeToString([]byte("the token is " + pat))},
			"form":   {"/x", "-F", "file=" + pat},
			"header": {"/x", "-H", "X-Note: " + pat},
			"query":  {"/x?q=" + pat},
			// The value that the guest never sees, as it would be if it did.
			"own": {"/x", "-d", fmt.Sprintf("%x", secretValue)},
		} {
			code, status, body := get(w, id, "keyed.test", u.port, args[0], args[1:]...)
			if code != 0 || status != "403 200" || !contains(body, `"code":"dlp_blocked"`) || contains(body, pat) {
				t.Errorf("%s: %d %s %s", name, code, status, body)
			}
		}
		audit := w.OK("bottle-vm logs --audit " + id)
		has(t, "audit log", audit, `"finding":"github-pat"`, `"finding":"secret:THE_KEY"`)
		if contains(audit, pat) || contains(audit, secretValue) {
			t.Errorf("the audit log holds what was not let out:\n%s", audit)
		}
		w.OK("bottle-vm down " + id)
	})
}
