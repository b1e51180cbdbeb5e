package sign

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/trust"
)

// Signers are those whose word counts.
type Signers struct {
	path             string // as the user gave it
	allowed, revoked []byte
	away             []string
}

// Open reads a file of allowed signers (ssh-keygen(1), ALLOWED SIGNERS) and, if
// revoked is not empty, one of revoked keys (a KRL, or public keys, one a line).
// What decides whose plans run must be out of reach of what runs: a file that
// lies in one of the folders away, which guests may write, is refused, however
// it is reached, and so is one that other users could exchange. Faults:
// no_signers (66), signers_in_reach (77).
func Open(path, revoked string, away []string) (*Signers, error) {
	s := &Signers{path: path, away: away}
	var err error
	if s.allowed, err = readGuarded(path, away); err != nil {
		return nil, err
	}
	if revoked != "" {
		s.revoked, err = readGuarded(revoked, away)
	}
	return s, err
}

// Verify gives those who have signed exactly this plan and may. One is enough;
// none is a refusal. Faults: not_signed, bad_signature and signer_not_allowed
// (77), bad_signatures and not_pinned (65), no_ssh_keygen (69), program_in_reach (77).
func (s *Signers) Verify(ctx context.Context, b *plan.Bottle, sigs []plan.Signature) ([]plan.Signer, error) {
	message, err := message(b)
	if err != nil {
		return nil, err
	}
	if len(sigs) == 0 {
		return nil, fault.New(fault.NoPerm, "not_signed", "the plan of %s is not signed, and %s says who has to", b.Agent, s.path).
			WithHint("bottle-plan %s | bottle-plan sign -k KEY signs it", b.Agent)
	}
	if err := checkSignatures(sigs, "signatures"); err != nil {
		return nil, err
	}
	program, err := find()
	if err != nil {
		return nil, err
	}
	if err := trust.Program("ssh-keygen", program, s.away); err != nil {
		return nil, err // it would say yes to everything
	}
	if err := trust.Temp(s.away); err != nil {
		return nil, err
	}
	c := check{program: program, message: message}
	if c.dir, err = os.MkdirTemp("", "bottle-sign-"); err != nil {
		return nil, fault.New(fault.CantCreate, "cannot_create", "a folder for ssh-keygen: %w", err)
	}
	defer os.RemoveAll(c.dir)
	// Copies: what was read is what is checked.
	if err := c.write("allowed_signers", s.allowed); err != nil {
		return nil, err
	}
	if s.revoked != nil {
		c.krl = true
		if err := c.write("revoked_keys", s.revoked); err != nil {
			return nil, err
		}
	}
	var good []plan.Signer
	var strangers []string
	for _, sig := range sigs {
		who, stranger, err := c.signature(ctx, sig)
		switch {
		case err != nil:
			return nil, err
		case who != nil && !slices.Contains(good, *who):
			good = append(good, *who)
		case stranger != "" && !slices.Contains(strangers, stranger):
			strangers = append(strangers, stranger)
		}
	}
	switch {
	case len(good) > 0:
		return good, nil
	case len(strangers) > 0:
		return nil, fault.New(fault.NoPerm, "signer_not_allowed", "the plan of %s is signed, but %s does not allow it: %s", b.Agent, s.path, strings.Join(strangers, "; ")).
			WithHint("let somebody sign whom the file names, for namespace %s", Namespace)
	}
	digest := plan.SHA256(message)
	return nil, fault.New(fault.NoPerm, "bad_signature", "no signature is about this plan of %s (%s): what was signed is something else", b.Agent, digest).
		WithHint("the plan was changed, or the signature is not one of a plan; look at what changed, and sign again")
}

// check is one round with ssh-keygen, over files in a folder of its own.
type check struct {
	program, dir string
	message      []byte
	krl          bool
}

func (c *check) write(name string, b []byte) error {
	if err := os.WriteFile(filepath.Join(c.dir, name), b, 0o600); err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "a file for ssh-keygen: %w", err)
	}
	return nil
}

// signature gives who made sig, if it is good and theirs to make. stranger says
// why a good one does not count; both are empty for one about other bytes.
func (c *check) signature(ctx context.Context, sig plan.Signature) (who *plan.Signer, stranger string, err error) {
	if err := c.write("sig", []byte(sig.SSH)); err != nil {
		return nil, "", err
	}
	out, why, err := c.run(ctx, "find-principals", "-f", "allowed_signers")
	if err != nil {
		return nil, "", err
	}
	for _, name := range strings.Split(strings.TrimRight(out, "\n"), "\n") {
		if name == "" {
			continue
		}
		args := []string{"-f", "allowed_signers", "-I", name, "-n", Namespace}
		if c.krl {
			args = append(args, "-r", "revoked_keys")
		}
		said, no, err := c.run(ctx, "verify", args...)
		if err != nil {
			return nil, "", err
		}
		if no == "" {
			return &plan.Signer{Name: fault.Line(name), Key: keyOf(said)}, "", nil
		}
		why = no
	}
	// Is it nothing to us, or made by somebody who may not?
	said, no, err := c.run(ctx, "check-novalidate", "-n", Namespace)
	if err != nil || no != "" {
		return nil, "", err
	}
	return nil, keyOf(said) + " (" + why + ")", nil
}

// run gives what ssh-keygen prints, or why it says no; "" is yes. Its
// environment is empty: no agent and no configuration of anybody's.
func (c *check) run(ctx context.Context, verb string, args ...string) (out, no string, err error) {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.program, append([]string{"-Y", verb, "-s", "sig"}, args...)...)
	cmd.Dir, cmd.Env = c.dir, []string{"LC_ALL=C"}
	var said tail
	cmd.Stdin, cmd.Stderr = bytes.NewReader(c.message), &said
	raw, err := cmd.Output()
	switch {
	case ctx.Err() != nil:
		return "", "", fault.New(fault.Unavailable, "ssh_keygen_hangs", "ssh-keygen -Y %s did not end within %s", verb, checkLimit)
	case cmd.ProcessState == nil:
		return "", "", fault.New(fault.Unavailable, "no_ssh_keygen", "ssh-keygen: %w", err)
	case err != nil:
		no = strings.TrimPrefix(said.reason(), ": ")
		if no == "" { // of a revoked key it says nothing
			no = "ssh-keygen says no"
			if c.krl {
				no = "its key is revoked"
			}
		}
	}
	return string(raw), no, nil
}

// keyOf takes type and fingerprint out of: Good "N" signature [for WHO] with
// ED25519 key SHA256:….
func keyOf(said string) string {
	line := strings.TrimSpace(said)
	if i := strings.LastIndex(line, " with "); i >= 0 {
		return fault.Line(strings.Replace(line[i+len(" with "):], " key ", " ", 1))
	}
	return ""
}

// Check is Open and Verify for a document: over the signatures that it holds
// and those beside its manifest. away are further folders that guests write.
func Check(ctx context.Context, d *plan.Doc, b *plan.Bottle, at trust.Place, signers, revoked string, away ...string) ([]plan.Signer, error) {
	s, err := Open(signers, revoked, append(trust.Reach(b, at), away...))
	if err != nil {
		return nil, err
	}
	sigs, err := d.Signatures()
	if err != nil {
		return nil, err
	}
	beside, err := Detached(at.Base, b.Manifest.Name)
	if err != nil {
		return nil, err
	}
	for _, sig := range beside {
		if !slices.Contains(sigs, sig) {
			sigs = append(sigs, sig)
		}
	}
	return s.Verify(ctx, b, sigs)
}
