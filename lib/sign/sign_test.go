package sign

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/trust"
)

// keygen runs the real ssh-keygen.
func keygen(t *testing.T, args ...string) {
	t.Helper()
	program, err := exec.LookPath("ssh-keygen")
	if err != nil {
		t.Skip("SKIPPED: ssh-keygen is not installed (Debian: openssh-client), so no signature was made or checked")
	}
	if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen %q: %v %s", args, err, out)
	}
}

// key makes a key of a kind, such as "ed25519", and gives its file and its
// public half.
func key(t *testing.T, kind, passphrase string) (file, public string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "key")
	keygen(t, "-q", "-t", kind, "-N", passphrase, "-C", "test", "-f", file)
	raw, err := os.ReadFile(file + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	return file, strings.Join(strings.Fields(string(raw))[:2], " ")
}

func bottle() *plan.Bottle {
	return &plan.Bottle{
		ID: "claude", Agent: "claude", Manifest: plan.ManifestRef{Name: "bottle.json", SHA256: plan.SHA256([]byte("m"))},
		Image: plan.Image{Kind: "host"}, Workspace: plan.Workspace{Path: ".", Mode: "rw"}, Command: []string{"true"},
		Egress: plan.Policy{Proxy: "auto", Rules: []plan.Rule{{Host: "api.example.com", Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: "exact"}}},
	}
}

func signed(t *testing.T, b *plan.Bottle, key string) plan.Signature {
	t.Helper()
	sig, err := Sign(context.Background(), b, key, nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

// signers writes a file of allowed signers where only we can write.
func signers(t *testing.T, lines ...string) string {
	t.Helper()
	return file(t, strings.Join(lines, "\n")+"\n")
}

func file(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func verify(t *testing.T, b *plan.Bottle, allowed, revoked string, sigs ...plan.Signature) ([]plan.Signer, error) {
	t.Helper()
	s, err := Open(allowed, revoked, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s.Verify(context.Background(), b, sigs)
}

func TestKinds(t *testing.T) {
	for _, kind := range []string{"ed25519", "ecdsa", "rsa"} {
		t.Run(kind, func(t *testing.T) {
			private, public := key(t, kind, "")
			sig := signed(t, bottle(), private)
			who, err := verify(t, bottle(), signers(t, "# a comment", "alice@example.com "+public), "", sig)
			if err != nil || len(who) != 1 || who[0].Name != "alice@example.com" || !strings.HasPrefix(who[0].Key, strings.ToUpper(kind)+" SHA256:") {
				t.Errorf("%+v %v", who, err)
			}
		})
	}
}

// What a signature does not cover, and who may not make one.
func TestRefused(t *testing.T) {
	private, public := key(t, "ed25519", "")
	other, stranger := key(t, "ed25519", "")
	sig := signed(t, bottle(), private)
	changed := func(edit func(*plan.Bottle)) *plan.Bottle {
		b := bottle()
		edit(b)
		return b
	}
	foreign := func(namespace, text string) plan.Signature {
		cmd := exec.Command("ssh-keygen", "-q", "-Y", "sign", "-f", private, "-n", namespace)
		cmd.Stdin = strings.NewReader(text)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return plan.Signature{SSH: string(out)}
	}
	canonical, err := plan.Encode(bottle())
	if err != nil {
		t.Fatal(err)
	}
	krl := filepath.Join(t.TempDir(), "krl")
	keygen(t, "-q", "-k", "-f", krl, private+".pub")
	list, err := os.ReadFile(krl)
	if err != nil {
		t.Fatal(err)
	}
	alice := "alice@example.com " + public
	for name, c := range map[string]struct {
		b         *plan.Bottle
		allowed   []string
		revoked   string
		sigs      []plan.Signature
		exit      int
		code, say string
	}{
		"no signature":          {bottle(), []string{alice}, "", nil, fault.NoPerm, "not_signed", "the plan of claude is not signed"},
		"another host":          {changed(func(b *plan.Bottle) { b.Egress.Rules[0].Host = "evil.example" }), []string{alice}, "", []plan.Signature{sig}, fault.NoPerm, "bad_signature", "what was signed is something else"},
		"another command":       {changed(func(b *plan.Bottle) { b.Command = []string{"false"} }), []string{alice}, "", []plan.Signature{sig}, fault.NoPerm, "bad_signature", ""},
		"another manifest":      {changed(func(b *plan.Bottle) { b.Manifest.SHA256 = plan.SHA256(nil) }), []string{alice}, "", []plan.Signature{sig}, fault.NoPerm, "bad_signature", ""},
		"of a commit":           {bottle(), []string{alice}, "", []plan.Signature{foreign("git", string(canonical))}, fault.NoPerm, "bad_signature", "something else"},
		"of the digest":         {bottle(), []string{alice}, "", []plan.Signature{foreign(Namespace, plan.SHA256(canonical))}, fault.NoPerm, "bad_signature", ""},
		"nobody":                {bottle(), []string{"# nobody"}, "", []plan.Signature{sig}, fault.NoPerm, "signer_not_allowed", "No principal matched"},
		"a stranger":            {bottle(), []string{alice}, "", []plan.Signature{signed(t, bottle(), other)}, fault.NoPerm, "signer_not_allowed", "No principal matched"},
		"for commits only":      {bottle(), []string{`alice@example.com namespaces="git" ` + public}, "", []plan.Signature{sig}, fault.NoPerm, "signer_not_allowed", "not permitted for use in signature namespace"},
		"expired":               {bottle(), []string{`alice@example.com valid-before="20200101" ` + public}, "", []plan.Signature{sig}, fault.NoPerm, "signer_not_allowed", "expired"},
		"not yet":               {bottle(), []string{`alice@example.com valid-after="20990101" ` + public}, "", []plan.Signature{sig}, fault.NoPerm, "signer_not_allowed", ""},
		"revoked":               {bottle(), []string{alice}, file(t, string(list)), []plan.Signature{sig}, fault.NoPerm, "signer_not_allowed", "its key is revoked"},
		"revoked by its key":    {bottle(), []string{alice}, file(t, public+"\n"), []plan.Signature{sig}, fault.NoPerm, "signer_not_allowed", "its key is revoked"},
		"an empty KRL is wrong": {bottle(), []string{alice}, file(t, "nonsense\n"), []plan.Signature{sig}, fault.NoPerm, "signer_not_allowed", ""},
		"no signature at all":   {bottle(), []string{alice}, "", []plan.Signature{{SSH: "-f/etc/passwd"}}, fault.Data, "bad_signatures", "is not one armoured SSH signature"},
		"two in one":            {bottle(), []string{alice}, "", []plan.Signature{{SSH: sig.SSH + sig.SSH}}, fault.Data, "bad_signatures", ""},
		"garbage inside":        {bottle(), []string{alice}, "", []plan.Signature{{SSH: "-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n"}}, fault.NoPerm, "bad_signature", ""},
		"a flood":               {bottle(), []string{alice}, "", make([]plan.Signature, MaxSignatures+1), fault.Data, "bad_signatures", "33 signatures, and 32 are looked at"},
		"an image that moves": {changed(func(b *plan.Bottle) { b.Image = plan.Image{Kind: "reference", Source: "registry.example/tools:1"} }),
			[]string{alice}, "", []plan.Signature{sig}, fault.Data, "not_pinned", "is not pinned"},
	} {
		t.Run(name, func(t *testing.T) {
			who, err := verify(t, c.b, signers(t, c.allowed...), c.revoked, c.sigs...)
			if f := fault.As(err); err == nil || f.Exit != c.exit || f.Code != c.code || !strings.Contains(f.Error(), c.say) || f.Hint == "" {
				t.Errorf("%+v, %v", who, err)
			}
		})
	}
	// One that counts is enough, whatever stands beside it.
	who, err := verify(t, bottle(), signers(t, `*@example.com,!eve@example.com namespaces="`+Namespace+`" `+public, "bob@example.com "+stranger), file(t, ""),
		foreign("git", "x"), signed(t, changed(func(b *plan.Bottle) { b.User = "root" }), private), sig, signed(t, bottle(), other), sig)
	if err != nil || len(who) != 2 || who[1].Name != "bob@example.com" {
		t.Errorf("%+v %v", who, err)
	}
}

// A reference is pinned by a digest at its end and by nothing else.
func TestPinnedImage(t *testing.T) {
	digest := "@" + plan.SHA256([]byte("image"))
	for source, want := range map[string]bool{"registry.example/t": false, "registry.example/t:1": false, "registry.example/t" + digest: true,
		"registry.example/t:1" + digest: true, "registry.example/t@sha256:12": false, "registry.example/t" + digest + ":1": false} {
		if got := (plan.Image{Kind: "reference", Source: source}).Pinned(); got != want {
			t.Errorf("%s: %v", source, got)
		}
	}
}

// A key with a passphrase signs through the agent, by its public half.
func TestAgent(t *testing.T) {
	private, public := key(t, "ed25519", "a passphrase")
	var said bytes.Buffer
	none := []string{"PATH=" + os.Getenv("PATH"), "SSH_ASKPASS=/bin/false", "SSH_ASKPASS_REQUIRE=force", "DISPLAY=:0"}
	if _, err := Sign(context.Background(), bottle(), private, none, &said); err == nil || fault.As(err).Code != "sign_failed" || fault.As(err).Exit != fault.Unavailable {
		t.Fatalf("without its passphrase: %v", err)
	}
	for _, name := range []string{"ssh-agent", "ssh-add"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("SKIPPED: %s is not installed, so no key of an agent was tried", name)
		}
	}
	sock := filepath.Join(t.TempDir(), "s")
	agent := exec.Command("ssh-agent", "-D", "-a", sock)
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		agent.Process.Kill()
		agent.Wait()
	}()
	for range 6000 {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	ask := filepath.Join(t.TempDir(), "ask")
	if err := os.WriteFile(ask, []byte("#!/bin/sh\necho a passphrase\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	add := exec.Command("ssh-add", private)
	add.Env = []string{"PATH=" + os.Getenv("PATH"), "SSH_AUTH_SOCK=" + sock, "SSH_ASKPASS=" + ask, "SSH_ASKPASS_REQUIRE=force", "DISPLAY=:0"}
	if out, err := add.CombinedOutput(); err != nil {
		t.Fatalf("ssh-add: %v %s", err, out)
	}
	alone := file(t, public+"\n")
	sig, err := Sign(context.Background(), bottle(), alone, []string{"SSH_AUTH_SOCK=" + sock}, &said)
	if err != nil {
		t.Fatalf("%v %s", err, &said)
	}
	if who, err := verify(t, bottle(), signers(t, "alice "+public), "", sig); err != nil || len(who) != 1 {
		t.Errorf("%+v %v", who, err)
	}
}

func TestSignRefuses(t *testing.T) {
	private, _ := key(t, "ed25519", "")
	moving := bottle()
	moving.Image = plan.Image{Kind: "reference", Source: "registry.example/tools"}
	for code, c := range map[string]struct {
		b    *plan.Bottle
		key  string
		exit int
	}{
		"not_pinned":  {moving, private, fault.Data},
		"no_key":      {bottle(), private + ".none", fault.NoInput},
		"sign_failed": {bottle(), file(t, "no key\n"), fault.Unavailable},
	} {
		var said bytes.Buffer
		if _, err := Sign(context.Background(), c.b, c.key, nil, &said); err == nil || fault.As(err).Code != code || fault.As(err).Exit != c.exit {
			t.Errorf("%s: %v", code, err)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := Sign(context.Background(), bottle(), private, nil, io.Discard); err == nil || fault.As(err).Code != "no_ssh_keygen" {
		t.Errorf("%v", err)
	}
	if _, err := verify(t, bottle(), file(t, ""), "", plan.Signature{SSH: string(mustRead(t, file(t, sample)))}); err == nil || fault.As(err).Code != "no_ssh_keygen" {
		t.Errorf("%v", err)
	}
}

const sample = "-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n"

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A program that hangs in ssh-keygen's place is not waited for for ever, and one
// that says nothing is no yes.
func TestStandIns(t *testing.T) {
	dir := t.TempDir()
	program := func(script string) {
		if err := os.WriteFile(filepath.Join(dir, "ssh-keygen"), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	program("exit 1")
	if _, err := verify(t, bottle(), file(t, ""), "", plan.Signature{SSH: sample}); err == nil || fault.As(err).Code != "bad_signature" {
		t.Errorf("%v", err)
	}
	// Where a guest writes, the list of signers could become another one.
	t.Setenv("TMPDIR", filepath.Join(dir, "tmp"))
	if s, err := Open(file(t, ""), "", []string{filepath.Join(dir, "tmp")}); err != nil {
		t.Fatal(err)
	} else if _, err := s.Verify(context.Background(), bottle(), []plan.Signature{{SSH: sample}}); err == nil || fault.As(err).Code != "temp_in_reach" {
		t.Errorf("%v", err)
	}
	t.Setenv("TMPDIR", t.TempDir())
	// One of the workspace's says yes to everything.
	program("echo Good; exit 0")
	for _, link := range []string{"", filepath.Join(t.TempDir(), "bin")} {
		if link != "" {
			if err := os.Symlink(dir, link); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", link+":"+os.Getenv("PATH"))
		}
		s, err := Open(file(t, "alice ssh-ed25519 AAAA\n"), "", []string{dir})
		if err != nil {
			t.Fatal(err)
		}
		if who, err := s.Verify(context.Background(), bottle(), []plan.Signature{{SSH: sample}}); err == nil || fault.As(err).Code != "program_in_reach" {
			t.Errorf("%q says %+v %v", link, who, err)
		}
	}
	program("exec sleep 60")
	s, err := Open(file(t, ""), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := s.Verify(ctx, bottle(), []plan.Signature{{SSH: sample}}); err == nil || fault.As(err).Code != "ssh_keygen_hangs" {
		t.Errorf("%v", err)
	}
}

// Who counts is read only from where no guest, repository or other user writes.
func TestReach(t *testing.T) {
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, mode os.FileMode) string {
		path := filepath.Join(top, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := func(to, name string) string {
		path := filepath.Join(top, name)
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := write("own/signers", 0o600)
	inside, mounted, work := write("repo/signers", 0o600), write("data/sub/signers", 0o600), write("work/signers", 0o600)
	link(good, "repo/out")
	away := trust.Reach(&plan.Bottle{Workspace: plan.Workspace{Path: "../work", Mode: "ro"}, Mounts: []plan.Mount{{Source: "~/data", Target: "/d", Mode: "ro"}, {Source: "/no/such/folder"}}},
		trust.Place{Base: filepath.Join(top, "repo"), Home: top})
	shared := write("shared/signers", 0o600)
	if err := os.Chmod(filepath.Dir(shared), 0o770); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(top, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	link("loop", "loop")
	for name, c := range map[string]struct{ path, code string }{
		"good":                               {good, ""},
		"by a link that is ours":             {link("own/../own/signers", "fine"), ""},
		"in the manifest's folder":           {inside, "signers_in_reach"},
		"in the workspace":                   {work, "signers_in_reach"},
		"in a mount":                         {mounted, "signers_in_reach"},
		"a link into the repository":         {link(inside, "in"), "signers_in_reach"},
		"a link of the repository leads out": {link(filepath.Join(top, "repo/out"), "through"), "signers_in_reach"},
		"dots":                               {top + "/own/../repo/signers", "signers_in_reach"},
		"the group can write it":             {write("own/loose", 0o620), "signers_in_reach"},
		"others can exchange it":             {shared, "signers_in_reach"},
		"not there":                          {filepath.Join(top, "own/none"), "no_signers"},
		"a folder":                           {filepath.Join(top, "folder"), "no_signers"},
		"round in circles":                   {filepath.Join(top, "loop"), "no_signers"},
	} {
		_, err := Open(c.path, "", away)
		if f := fault.As(err); c.code == "" && err != nil || c.code != "" && (err == nil || f.Code != c.code || f.Hint == "") {
			t.Errorf("%s: %v", name, err)
		}
		if c.code == "" {
			continue
		}
		if _, err := Open(good, c.path, away); err == nil || fault.As(err).Code != c.code {
			t.Errorf("%s, revoked keys: %v", name, err)
		}
	}
	if os.Geteuid() == 0 {
		sticky := filepath.Join(top, "tmp")
		if err := os.Mkdir(sticky, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(sticky, 0o777|os.ModeSticky); err != nil {
			t.Fatal(err)
		}
		theirs := link(good, "tmp/signers")
		if err := os.Lchown(theirs, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(theirs, "", away); err == nil || fault.As(err).Code != "signers_in_reach" {
			t.Errorf("another user's link: %v", err)
		}
		foreign := write("own/foreign", 0o600)
		if err := os.Chown(foreign, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(foreign, "", away); err == nil || fault.As(err).Code != "signers_in_reach" {
			t.Errorf("another user's: %v", err)
		}
	}
}

func TestDetached(t *testing.T) {
	private, _ := key(t, "ed25519", "")
	sig := signed(t, bottle(), private)
	dir := t.TempDir()
	put := func(text string) {
		if err := os.WriteFile(File(dir, "bottle.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if sigs, err := Detached(dir, "bottle.json"); sigs != nil || err != nil {
		t.Errorf("no file: %v %v", sigs, err)
	}
	put("signed on Monday\n" + sig.SSH + "\n\r\n" + strings.ReplaceAll(sig.SSH, "\n", "\r\n"))
	if sigs, err := Detached(dir, "bottle.json"); err != nil || len(sigs) != 2 || sigs[0] != sig || sigs[1] != sig {
		t.Errorf("%v %v", sigs, err)
	}
	if sigs, err := Detached(dir, "-"); sigs != nil || err != nil {
		t.Errorf("a manifest from stdin: %v %v", sigs, err)
	}
	for name, text := range map[string]string{
		"a certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"headers":       "-----BEGIN SSH SIGNATURE-----\nA: b\n\nAAAA\n-----END SSH SIGNATURE-----\n",
		"a flood":       strings.Repeat(sample, MaxSignatures+1),
		"too long":      fmt.Sprintf("%*s", maxFile+1, ""),
	} {
		put(text)
		if _, err := Detached(dir, "bottle.json"); err == nil || fault.As(err).Code != "bad_signatures" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
