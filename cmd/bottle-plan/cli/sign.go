package cli

import (
	"context"
	"os"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/sign"
	"github.com/bottle-tools/bottle/lib/tool"
)

func signCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-plan sign")
	out := p.OutputFlags(fs)
	var key string
	var detach bool
	fs.StringVar(&key, "k", "", "sign with the SSH key in `FILE`, or with the public key in it whose private half ssh-agent holds")
	fs.BoolVar(&detach, "detach", false, "print the signatures instead of the documents")
	return &tool.Command{
		Name:       "sign",
		ShortUsage: "bottle-plan AGENT | bottle-plan sign -k KEY [--detach] [-o FILE]",
		ShortHelp:  "add your signature, made with an SSH key, to documents",
		LongHelp: `
Signs what bottle-plan --hash digests, with ssh-keygen -Y sign: the bottle
section, which is the policy, and with it the manifest's digest. Any key that
ssh-keygen takes will do; ssh-keygen asks for a passphrase by itself. Signatures
are added to those that are there.

With --detach, they are for a file beside the manifest, which bottle-vm up and
bottle-plan verify look into by themselves; those of several agents and people
stand in it one behind the other.

  bottle-plan claude | bottle-plan sign -k ~/.ssh/id_ed25519 | bottle-vm up --require-signed signers
  bottle-plan --all | bottle-plan sign -k ~/.ssh/id_ed25519 --detach >bottle.json.sig`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			if key == "" {
				return fault.New(fault.Usage, "usage", "no key to sign with").WithHint("-k ~/.ssh/id_ed25519")
			}
			var made []byte
			return p.Filter(ctx, "sign", out, func(ctx context.Context, d *plan.Doc) error {
				made = nil
				sig, err := addSignature(ctx, p, d, key)
				made = []byte(sig.SSH)
				return err
			}, tool.Render(func(d *plan.Doc) []byte {
				switch {
				case !detach:
					return d.Line()
				case d.Failure() != nil:
					return nil // it stands on stderr; a document is no signature
				}
				return made[:max(0, len(made)-1)] // a line gets its end where it is written
			}))
		},
	}
}

func addSignature(ctx context.Context, p *tool.Proc, d *plan.Doc, key string) (plan.Signature, error) {
	var none plan.Signature
	b, err := d.Bottle()
	if err != nil {
		return none, err
	}
	sigs, err := d.Signatures()
	if err != nil {
		return none, err
	}
	sig, err := sign.Sign(ctx, b, key, os.Environ(), p.Stderr)
	if err != nil {
		return none, err
	}
	return sig, d.Set("signatures", append(sigs, sig))
}
