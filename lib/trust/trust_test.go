package trust

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, to, path string) {
	t.Helper()
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

func bottle(change func(*plan.Bottle)) *plan.Bottle {
	b := &plan.Bottle{
		ID: "dev", Manifest: plan.ManifestRef{Name: "bottle.json", SHA256: plan.SHA256([]byte("m"))},
		Image: plan.Image{Kind: "host"}, Workspace: plan.Workspace{Path: ".", Mode: "rw"},
	}
	if change != nil {
		change(b)
	}
	return b
}

func TestNeeded(t *testing.T) {
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	at := Place{Base: filepath.Join(top, "p"), Home: filepath.Join(top, "home")}
	write(t, filepath.Join(at.Base, "inside/f"), "x")
	write(t, filepath.Join(at.Base, "tool"), "#!/bin/sh\n")
	write(t, filepath.Join(at.Base, "hidden/.env"), "x")
	write(t, filepath.Join(top, "out/f"), "x")
	write(t, filepath.Join(at.Home, "key"), "x")
	link(t, "../out", filepath.Join(at.Base, "escape"))
	link(t, "inside", filepath.Join(at.Base, "within"))
	link(t, "nowhere/at/all", filepath.Join(at.Base, "dangling"))
	link(t, "p", filepath.Join(top, "linked"))

	for _, tc := range []struct {
		name string
		b    func(*plan.Bottle)
		want []string
	}{
		{"nothing", nil, nil},
		{"env secret that a preset vouches for", func(b *plan.Bottle) {
			b.Secrets = []plan.Secret{{Name: "K", From: "env:ANTHROPIC_API_KEY", Inject: []plan.Injection{{Host: "api.anthropic.com", Header: "x-api-key"}}}}
		}, nil},
		{"env secret", func(b *plan.Bottle) {
			b.Secrets = []plan.Secret{{Name: "K", From: "env:ANTHROPIC_API_KEY", Inject: []plan.Injection{
				{Host: "api.anthropic.com", Header: "x-api-key"}, {Host: "api.example.com", Header: "x-api-key"}}}}
		}, []string{"secret K sends your $ANTHROPIC_API_KEY to api.example.com, in header x-api-key"}},
		{"env secret, and a root", func(b *plan.Bottle) {
			b.Egress.Roots = []plan.Root{{Path: "inside/f"}}
			b.Secrets = []plan.Secret{{Name: "K", From: "env:ANTHROPIC_API_KEY", Inject: []plan.Injection{{Host: "api.anthropic.com", Header: "x-api-key"}}}}
		}, []string{"secret K sends your $ANTHROPIC_API_KEY to api.anthropic.com, in header x-api-key"}},
		{"hidden file inside", func(b *plan.Bottle) {
			b.Hide = []string{".env"}
			b.Secrets = []plan.Secret{{Name: "K", From: "file:hidden/.env", Inject: []plan.Injection{{Host: "api.example.com", Header: "x-api-key"}}}}
		}, []string{"secret K sends hidden/.env, which is hidden from the guest, to api.example.com, in header x-api-key"}},
		{"file inside", func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "file:inside/f"}} }, nil},
		{"file inside, absent", func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "file:new/dir/f"}} }, nil},
		{"file inside, absolute", func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "file:" + at.Base + "/inside/f"}} }, nil},
		{"file by a symlink inside", func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "file:within/f"}} }, nil},
		{"file above", func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "file:../out/f"}} }, []string{"secret K reads ../out/f"}},
		{"file by a symlink", func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "file:escape/f"}} }, []string{"secret K reads escape/f -> " + top + "/out/f"}},
		{"absent file by a symlink", func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "file:escape/new"}} }, []string{"secret K reads escape/new -> " + top + "/out/new"}},
		{"dangling", func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "file:dangling"}} }, []string{"secret K reads dangling"}},
		{"file of the home", func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "file:~/key"}} }, []string{"secret K reads ~/key"}},
		{"command", func(b *plan.Bottle) {
			b.Secrets = []plan.Secret{{Name: "K", From: "command", Command: []string{"pass", "show", "x y"}}}
		}, []string{`secret K runs ["pass" "show" "x y"]`}},
		{"command with a file", func(b *plan.Bottle) {
			b.Secrets = []plan.Secret{{Name: "K", From: "command", Command: []string{"sh", "./tool"}}}
		}, []string{`secret K runs ["sh" "./tool"] (./tool is ` + plan.SHA256([]byte("#!/bin/sh\n")) + ")"}},
		{"mount", func(b *plan.Bottle) {
			b.Mounts = []plan.Mount{{Source: "/etc", Target: "/e", Mode: "ro"}, {Source: "inside", Target: "/i", Mode: "ro"}}
		}, []string{"mount at /e (ro) shows the guest /etc"}},
		{"mount of a part at its place", func(b *plan.Bottle) {
			b.Hide = []string{".env*"}
			b.Mounts = []plan.Mount{{Source: "inside", Target: "/workspace/inside", Mode: "rw"}, {Source: "hidden", Target: "/workspace/hidden", Mode: "ro"}}
		}, nil},
		{"mount past the guard", func(b *plan.Bottle) {
			b.Mounts = []plan.Mount{{Source: ".", Target: "/o", Mode: "rw"}, {Source: "inside", Target: "/workspace/hidden", Mode: "rw"}}
		}, []string{
			"mount at /o (rw) lets the guest change, without a guard over git, .",
			"mount at /workspace/hidden (rw) lets the guest change, without a guard over git, inside",
		}},
		{"mount through a workspace that is no one's to change", func(b *plan.Bottle) {
			b.Workspace.Mode = "scratch"
			b.Mounts = []plan.Mount{{Source: "inside", Target: "/workspace/inside", Mode: "rw"}}
		}, []string{"mount at /workspace/inside (rw) lets the guest change, without a guard over git, inside"}},
		{"mount of hidden files", func(b *plan.Bottle) {
			b.Hide = []string{".env*"}
			b.Workspace.Path = "inside"
			b.Mounts = []plan.Mount{{Source: ".", Target: "/a", Mode: "ro"}, {Source: "hidden/.env", Target: "/b", Mode: "ro"}, {Source: "tool", Target: "/c", Mode: "ro"}}
		}, []string{
			"mount at /a (ro) shows the guest ., with files in it that are hidden in the workspace",
			"mount at /b (ro) shows the guest hidden/.env, with files in it that are hidden in the workspace",
		}},
		{"root", func(b *plan.Bottle) { b.Egress.Roots = []plan.Root{{Path: "/ca.pem"}} }, []string{"trust root /ca.pem"}},
		{"addon", func(b *plan.Bottle) {
			b.Egress.Mitmdump = &plan.Mitmdump{Addons: []plan.Addon{{Path: "inside/f", SHA256: plan.SHA256([]byte("x"))}}}
		}, []string{"mitmdump runs inside/f (" + plan.SHA256([]byte("x")) + "), which reads and changes what inspected hosts are sent"}},
		{"image", func(b *plan.Bottle) { b.Image = plan.Image{Kind: "path", Source: "/"} }, []string{"image /"}},
		{"workspace above", func(b *plan.Bottle) { b.Workspace.Path = ".." }, []string{"workspace (rw) .."}},
		{"workspace by a symlink", func(b *plan.Bottle) { b.Workspace.Path = "escape" }, []string{"workspace (rw) escape -> " + top + "/out"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, base := range []string{at.Base, filepath.Join(top, "linked")} {
				got, err := Needed(bottle(tc.b), Place{Base: base, Home: at.Home})
				if base != at.Base { // the path as typed differs from the resolved one, no more
					if err != nil || len(got) != len(tc.want) {
						t.Errorf("through a symlinked base: %q (%v)", got, err)
					}
					continue
				}
				if err != nil || !slices.Equal(got, tc.want) {
					t.Errorf("%q (%v), want %q", got, err, tc.want)
				}
			}
		})
	}
}

func TestGrantHoldsForWhatWasShown(t *testing.T) {
	top := t.TempDir()
	root := &state.Root{Dir: filepath.Join(top, "state"), RunDir: filepath.Join(top, "run")}
	at := Place{Base: filepath.Join(top, "p"), Home: top}
	write(t, filepath.Join(at.Base, "tool"), "one")
	command := func(argv ...string) *plan.Bottle {
		return bottle(func(b *plan.Bottle) { b.Secrets = []plan.Secret{{Name: "K", From: "command", Command: argv}} })
	}
	b := command("./tool")

	err := Check(root, b, at, "my dir/bottle.json")
	f := fault.As(err)
	if err == nil || f.Exit != fault.NoPerm || f.Code != "not_trusted" || !strings.Contains(f.Error(), `secret K runs ["./tool"]`) {
		t.Fatalf("before: %v", err)
	}
	if !strings.HasSuffix(f.Hint, "bottle-vm trust -m 'my dir/bottle.json'") {
		t.Errorf("hint %q", f.Hint)
	}
	if got, err := Add(root, at, bottle(nil)); got != nil || err != nil {
		t.Fatalf("nothing to trust: %q, %v", got, err)
	}
	if _, err := os.Stat(root.Dir); err == nil {
		t.Error("nothing to trust, and the state folder was made")
	}
	if got, err := Add(root, at, b, command("./tool", "x")); err != nil || len(got) != 2 {
		t.Fatalf("granting: %q, %v", got, err)
	}
	fi, err := os.Stat(filepath.Join(root.Dir, "trust.json"))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("trust.json: %v %v", fi, err)
	}
	for _, ok := range []*plan.Bottle{b, command("./tool", "x"), bottle(nil)} {
		if err := Check(root, ok, at, "m"); err != nil {
			t.Errorf("granted: %v", err)
		}
	}
	refused := func(what string, b *plan.Bottle, at Place) {
		t.Helper()
		if err := Check(root, b, at, "m"); err == nil || fault.As(err).Code != "not_trusted" {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("a document that was edited", command("./tool", "y"), at)
	other := command("./tool")
	other.Manifest.SHA256 = plan.SHA256([]byte("changed"))
	refused("a manifest that changed", other, at)
	clone := Place{Base: filepath.Join(top, "clone"), Home: top}
	write(t, filepath.Join(clone.Base, "tool"), "one")
	refused("the same manifest in another clone", b, clone)
	write(t, filepath.Join(at.Base, "tool"), "two")
	refused("a script that changed", b, at)
}

func TestUnreadableGrants(t *testing.T) {
	root := &state.Root{Dir: filepath.Join(t.TempDir(), "state")}
	write(t, filepath.Join(root.Dir, "trust.json"), "{")
	at := Place{Base: t.TempDir()}
	b := bottle(func(b *plan.Bottle) { b.Workspace.Path = "/" })
	if err := Check(root, b, at, "m"); err == nil || fault.As(err).Code != "bad_trust" {
		t.Errorf("%v", err)
	}
	if err := os.Chmod(root.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := Check(root, b, at, "m"); err == nil || fault.As(err).Code != "bad_state_dir" {
		t.Errorf("a state folder that others can write: %v", err)
	}
}
