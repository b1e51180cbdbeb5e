// Package sign signs plans with SSH keys and checks such signatures, in the way
// that git does it for commits. It is the one package that runs ssh-keygen.
//
// What is signed are the bytes that plan.Digest digests: the bottle section in
// its canonical encoding, and with it the manifest's digest. What is derived
// from it (egress, pack) is not, since up computes it again.
package sign

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/trust"
)

// Namespace keeps a signature of a plan from being taken for one of a commit or
// of a file, and the other way round (ssh-keygen(1), -n).
const Namespace = "bottle-plan@bottle-tools.github.io"

// Limits of what is checked: each signature costs two processes.
const (
	MaxSignatures = 32
	maxSignature  = 16 << 10 // bytes of one, armoured
	maxFile       = MaxSignatures * maxSignature
	checkLimit    = 10 * time.Second
	blockType     = "SSH SIGNATURE"
)

// Sign signs the plan with the key in file key: a private key, or a public one
// whose private half is in the agent. ssh-keygen asks on the terminal for what
// it needs, says on stderr that a security key waits to be touched, and has
// environ. Faults: no_key (66), not_pinned (65), no_ssh_keygen and sign_failed
// (69).
func Sign(ctx context.Context, b *plan.Bottle, key string, environ []string, stderr io.Writer) (plan.Signature, error) {
	var none plan.Signature
	message, err := message(b)
	if err != nil {
		return none, err
	}
	if _, err := os.Stat(key); err != nil {
		return none, fault.New(fault.NoInput, "no_key", "the key: %w", err).
			WithHint("name a private key, or the public key (.pub) of one that ssh-agent holds")
	}
	program, err := find()
	if err != nil {
		return none, err
	}
	cmd := exec.CommandContext(ctx, program, "-q", "-Y", "sign", "-f", key, "-n", Namespace)
	cmd.Env = environ
	var said tail
	cmd.Stdin, cmd.Stderr = bytes.NewReader(message), io.MultiWriter(stderr, &said)
	out, err := cmd.Output()
	if err != nil {
		return none, fault.New(fault.Unavailable, "sign_failed", "ssh-keygen did not sign with %s (%w)%s", key, err, said.reason()).
			WithHint("try it by itself: ssh-keygen -Y sign -f %s -n test </dev/null", key)
	}
	sigs, err := Parse(out, "the answer of ssh-keygen")
	if err != nil {
		return none, err
	}
	if len(sigs) != 1 {
		return none, fault.New(fault.Unavailable, "sign_failed", "ssh-keygen printed %d signatures", len(sigs))
	}
	return sigs[0], nil
}

// message is what a signature of b covers. An image that may be another one
// tomorrow cannot be signed.
func message(b *plan.Bottle) ([]byte, error) {
	if !b.Image.Pinned() {
		return nil, fault.New(fault.Data, "not_pinned", "image %s is not pinned, and a signed plan is about one image", b.Image.Source).
			At("bottle.image").WithHint("write its digest into the manifest: %s@sha256:…", strings.SplitN(b.Image.Source, "@", 2)[0])
	}
	return plan.Encode(b)
}

func find() (string, error) {
	program, err := exec.LookPath("ssh-keygen")
	if err != nil {
		return "", fault.New(fault.Unavailable, "no_ssh_keygen", "ssh-keygen is not on PATH, and it is what signs and checks plans").
			WithHint("install OpenSSH's client, 8.9 or newer (Debian: openssh-client)")
	}
	return program, nil
}

// Parse takes armoured signatures out of text: one behind the other, anything
// between them ignored, as cat and >> leave them. from is for errors.
func Parse(text []byte, from string) ([]plan.Signature, error) {
	var sigs []plan.Signature
	for rest := text; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != blockType || len(b.Headers) > 0 {
			return nil, fault.New(fault.Data, "bad_signatures", "%s: holds a %q, and not only signatures", from, b.Type).
				WithHint("bottle-plan sign --detach prints what belongs there")
		}
		sigs = append(sigs, plan.Signature{SSH: string(pem.EncodeToMemory(b))})
	}
	return sigs, checkSignatures(sigs, from)
}

func checkSignatures(sigs []plan.Signature, from string) error {
	if len(sigs) > MaxSignatures {
		return fault.New(fault.Data, "bad_signatures", "%s: holds %d signatures, and %d are looked at", from, len(sigs), MaxSignatures).
			WithHint("remove those of older plans")
	}
	for i, s := range sigs {
		b, rest := pem.Decode([]byte(s.SSH))
		if b == nil || b.Type != blockType || len(b.Headers) > 0 || len(bytes.TrimSpace(rest)) > 0 || len(s.SSH) > maxSignature || !strings.HasPrefix(s.SSH, "-----BEGIN ") {
			return fault.New(fault.Data, "bad_signatures", "%s: signature %d is not one armoured SSH signature", from, i+1).
				WithHint("bottle-plan sign makes them")
		}
	}
	return nil
}

// File is where signatures lie that are checked in: beside the manifest, under
// its name and ".sig".
func File(base, manifest string) string { return filepath.Join(base, manifest+".sig") }

// Detached reads the signatures beside the manifest; there may be none. Anybody
// may write that file: what is in it counts only if the allowed signers say so.
func Detached(base string, manifest string) ([]plan.Signature, error) {
	if manifest == "-" {
		return nil, nil
	}
	name := File(base, manifest)
	raw, err := trust.ReadFile(name, maxFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fault.New(fault.NoInput, "bad_signatures", "signatures: %w", err).WithHint("move it away, and sign again")
	}
	return Parse(raw, filepath.Base(name))
}

// tail keeps the end of what a program says.
type tail struct{ b []byte }

func (w *tail) Write(p []byte) (int, error) {
	w.b = append(w.b, p...)
	if over := len(w.b) - 1024; over > 0 {
		w.b = w.b[over:]
	}
	return len(p), nil
}

// reason is what was said, for the end of a message.
func (w *tail) reason() string {
	said := fault.Line(strings.TrimSpace(string(w.b)))
	if said == "" {
		return ""
	}
	return fmt.Sprintf(": %s", said)
}
