package integration

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// TestSigned: a bottle starts with a plan that somebody has signed who may, and
// with no other.
func TestSigned(t *testing.T) {
	for _, name := range []string{"ssh-keygen", "jq"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("SKIPPED: %s is not installed, so no signed plan was started", name)
		}
	}
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Manifest(`"runtime":"gvisor","egress":{"allow":["api.example.com"]}`)
		own := filepath.Join(w.Home, "signers")
		w.OK(`ssh-keygen -q -t ed25519 -N '' -f "$HOME/key" && ssh-keygen -q -t ed25519 -N '' -f "$HOME/other" &&
			printf 'alice@example.com namespaces="bottle-plan@bottle-tools.github.io" %s\n' "$(cut -d' ' -f1,2 "$HOME/key.pub")" >"$HOME/signers" &&
			chmod 600 "$HOME/signers" && cp "$HOME/signers" signers`)
		w.OK(`bottle-plan | bottle-plan sign -k "$HOME/key" >signed`)

		// Refused, with nothing started.
		for name, c := range map[string]struct{ script, code string }{
			"not signed":       {`bottle-plan | bottle-vm up --require-signed ~/signers`, "not_signed"},
			"edited":           {`jq -c '.bottle.egress.rules[0].host="evil.example"' signed | bottle-vm up --require-signed ~/signers`, "bad_signature"},
			"a stranger":       {`bottle-plan | bottle-plan sign -k ~/other | bottle-vm up --require-signed ~/signers`, "signer_not_allowed"},
			"revoked":          {`bottle-vm up --require-signed ~/signers --revoked ~/key.pub <signed`, "signer_not_allowed"},
			"by environment":   {`bottle-plan | BOTTLE_REQUIRE_SIGNED=$HOME/signers bottle-vm up`, "not_signed"},
			"of the workspace": {`bottle-vm up --require-signed signers <signed`, "signers_in_reach"},
			"of the state":     {`mkdir -p $XDG_STATE_HOME/bottle/homes/x && cp ~/signers $XDG_STATE_HOME/bottle/homes/x && bottle-vm up --require-signed $XDG_STATE_HOME/bottle/homes/x/signers <signed`, "signers_in_reach"},
			"another digest":   {`bottle-vm up --expect sha256:` + strings.Repeat("0", 64) + ` <signed`, "unexpected_plan"},
		} {
			r := w.Sh(c.script)
			if got := gjson.Get(r.Out, "error.code").Str; r.Code != 77 || got != c.code {
				t.Errorf("%s: %+v", name, r)
			}
		}
		if r := w.Sh("bottle run bash -- true"); r.Code != 0 {
			t.Errorf("without the demand: %+v", r)
		}
		if r := w.Sh("BOTTLE_REQUIRE_SIGNED=$HOME/signers bottle run bash -- true"); r.Code != 125 || !contains(r.Stderr, "is not signed") {
			t.Errorf("the driver: %+v", r)
		}
		if r := w.Sh("bottle-vm up --require-signed '' <signed"); r.Code != 64 {
			t.Errorf("an empty file name: %+v", r)
		}
		if r := w.Sh("bottle-vm up --revoked ~/key.pub <signed"); r.Code != 64 {
			t.Errorf("revoked alone: %+v", r)
		}
		w.Gone()

		// Started, and it is written down whose word it was.
		start := func(script string) {
			t.Helper()
			doc := w.OK(script)
			id := gjson.Get(doc, "vm.id").Str
			if who := gjson.Get(doc, "vm.signed.0"); id == "" || who.Get("name").Str != "alice@example.com" || !strings.HasPrefix(who.Get("key").Str, "ED25519 SHA256:") {
				t.Errorf("%s: vm.signed: %s", script, who.Raw)
			}
			w.Down(id)
		}
		start(`bottle-egress <signed | bottle-pack | bottle-vm up --require-signed ~/signers --expect "$(bottle-plan --hash)"`)
		w.OK(`bottle-plan | bottle-plan sign -k ~/other --detach >bottle.json.sig && bottle-plan | bottle-plan sign -k ~/key --detach >>bottle.json.sig`)
		start(`bottle-plan | BOTTLE_REQUIRE_SIGNED=` + own + ` bottle-vm up`)
		if r := w.Sh("BOTTLE_REQUIRE_SIGNED=$HOME/signers bottle run bash -- echo in"); r.Code != 0 || r.Out != "in\n" {
			t.Errorf("the driver: %+v", r)
		}
		if r := w.Sh("bottle-plan | bottle-plan verify -f ~/signers | cmp - /dev/fd/3 3<<EOF\n$(bottle-plan)\nEOF"); r.Code != 0 || !contains(r.Stderr, "bash is signed by alice@example.com with ED25519 SHA256:") {
			t.Errorf("verify: %+v", r)
		}
		// The manifest is a part of what is signed, and so are its old signatures of no use.
		w.Manifest(`"runtime":"gvisor","egress":{"allow":["api.example.com","evil.example"]}`)
		if r := w.Sh("bottle-plan | bottle-plan verify -f ~/signers"); r.Code != 77 || gjson.Get(r.Out, "error.code").Str != "bad_signature" {
			t.Errorf("verify: %+v", r)
		}
	})
}

// TestTrustedScript: what a secret's command runs is a copy of what was trusted,
// and not what lies in the guest's folder by then.
func TestTrustedScript(t *testing.T) {
	harness.EachUser(t, func(t *testing.T, w *harness.World) {
		w.Write("key.sh", "#!/bin/sh\necho \"$0\" >>~/where\necho a-value-0123456789\n")
		w.OK("chmod +x key.sh")
		w.Manifest(`"runtime":"gvisor","egress":{"allow":["api.test"]},
			"secrets":{"K":{"from":{"command":["./key.sh"]},"inject":[{"host":"api.test","header":"x-key"}]}}`)
		w.OK("bottle-vm trust")
		id := w.Up()
		w.Down(id)
		if r := w.Sh("(bottle-plan | timeout 2 bottle-egress serve --listen tcp:127.0.0.1:0) 2>&1"); contains(r.Out, "is missing") {
			t.Errorf("a gate in the foreground: %+v", r)
		}
		ran := strings.Fields(w.Read(filepath.Join(w.Home, "where")))
		if len(ran) != 2 {
			t.Errorf("run as %q", ran)
		}
		for _, path := range ran {
			if strings.HasPrefix(path, w.Dir) || filepath.Base(path) != "key.sh" {
				t.Errorf("run as %s", path)
			}
		}
		w.OK("echo '#' >>key.sh")
		if r := w.Sh("bottle-plan | bottle-vm up"); r.Code != 77 || gjson.Get(r.Out, "error.code").Str != "not_trusted" {
			t.Errorf("another script: %+v", r)
		}
		w.Gone()
	})
}
