package ca

import (
	"io"
	"os"
	"syscall"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// maxRoot bounds a file of trust roots, in bytes.
const maxRoot = 4 << 20

// PlanRoots reads the trust roots that a plan names, one PEM text a file.
// resolve makes their paths absolute. A file whose digest is not the plan's is
// a fault (65 root_changed); one that is missing, 66.
func PlanRoots(roots []plan.Root, resolve func(string) (string, error)) ([][]byte, error) {
	var all [][]byte
	for _, r := range roots {
		pem, err := planRoot(r, resolve)
		if err != nil {
			return nil, err
		}
		all = append(all, pem)
	}
	return all, nil
}

func planRoot(r plan.Root, resolve func(string) (string, error)) ([]byte, error) {
	path, err := resolve(r.Path)
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
	pem := Certificates(raw)
	if len(pem) == 0 {
		return nil, fault.New(fault.Data, "bad_root", "trust root %s holds no certificate", r.Path).WithHint("give a PEM file of CA certificates")
	}
	return pem, nil
}
