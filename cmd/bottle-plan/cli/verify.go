package cli

import (
	"context"
	"fmt"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/sign"
	"github.com/bottle-tools/bottle/lib/tool"
	"github.com/bottle-tools/bottle/lib/trust"
)

func verifyCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-plan verify")
	out := p.OutputFlags(fs)
	var signers, revoked tool.Filled
	var dir string
	fs.Var(&signers, "f", "whose signatures count: a `FILE` as in ssh-keygen(1), ALLOWED SIGNERS")
	fs.Var(&revoked, "revoked", "keys that do not count any more: a `FILE` with a KRL, or public keys")
	fs.StringVar(&dir, "dir", "", "the manifest's `FOLDER`; the working folder if not given")
	p.Ambient(fs, "dir", "revoked")
	return &tool.Command{
		Name:       "verify",
		ShortUsage: "bottle-plan AGENT | bottle-plan verify -f ALLOWED_SIGNERS [--revoked FILE] [--dir FOLDER]",
		ShortHelp:  "let through documents that somebody has signed who may",
		LongHelp: `
Looks at the signatures in the document and in the file beside the manifest
(bottle.json.sig), and passes the document on if one of them is about exactly
this plan and FILE allows it; says on stderr whose it is. Otherwise it fails
with 77. FILE has to lie where no bottle and no checkout comes.

  bottle-plan --all | bottle-plan verify -f ~/.config/bottle/allowed_signers >/dev/null`,
		FlagSet: fs,
		Exec: func(ctx context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			if signers == "" {
				return fault.New(fault.Usage, "usage", "it is not said whose signatures count").WithHint("-f ALLOWED_SIGNERS")
			}
			return p.Filter(ctx, "verify", out, func(ctx context.Context, d *plan.Doc) error {
				b, err := d.Bottle()
				if err != nil {
					return err
				}
				base, err := trust.Base(dir, b.Manifest)
				if err != nil {
					return err
				}
				who, err := sign.Check(ctx, d, b, trust.Place{Base: base, Home: p.Getenv("HOME")}, string(signers), string(revoked))
				for _, w := range who {
					fmt.Fprintf(p.Stderr, "%s: %s is signed by %s with %s\n", p.Name, b.ID, w.Name, w.Key)
				}
				return err
			})
		},
	}
}
