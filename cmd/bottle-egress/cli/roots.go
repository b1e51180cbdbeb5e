package cli

import (
	"io"
	"os"
	"syscall"

	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/trust"
)

// maxRoot bounds a file of trust roots.
const maxRoot = 4 << 20

// roots are what upstreams are verified against: the host's bundle, and the
// files that the plan names and pins by digest.
func roots(b *plan.Bottle, at trust.Place) ([][]byte, error) {
	system, err := ca.SystemRoots()
	if err != nil {
		return nil, err
	}
	all := [][]byte{system}
	for _, r := range b.Egress.Roots {
		pem, err := root(r, at)
		if err != nil {
			return nil, err
		}
		all = append(all, pem)
	}
	return all, nil
}

func root(r plan.Root, at trust.Place) ([]byte, error) {
	path, err := at.Path(r.Path)
	if err != nil {
		return nil, err
	}
	// A FIFO must not block us.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fault.New(fault.NoInput, "no_root", "trust root: %w", err).WithHint("egress.roots of the manifest names it")
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxRoot+1))
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "trust root: %w", err)
	}
	if plan.SHA256(raw) != r.SHA256 {
		return nil, fault.New(fault.Data, "root_changed", "trust root %s is not the file that was planned (%s)", r.Path, r.SHA256).
			WithHint("look at what changed in it, and plan again")
	}
	pem := ca.Certificates(raw)
	if len(pem) == 0 {
		return nil, fault.New(fault.Data, "bad_root", "trust root %s holds no certificate", r.Path).WithHint("give a PEM file of CA certificates")
	}
	return pem, nil
}
