//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/bottle-tools/bottle/lib/smolvm"
)

// wrapped measures what lib/smolvm adds to a call of smolvm. No guest is booted:
// a machine that was created and never started has records enough.
func (b *bench) wrapped() (err error) {
	const list, status, create = "smolvm machine ls --json", "smolvm machine status", "smolvm create and delete"
	bin, err := smolvm.Find(os.Getenv)
	if err != nil {
		for _, name := range []string{list, status, create} {
			b.emit(row{Kind: "row", Name: name, Verdict: skipped, Why: "no smolvm (make smolvm): " + err.Error()})
		}
		return nil
	}
	// Records of its own, beside the user's.
	home := filepath.Join(b.w.dir, "smolvm-home")
	if err := os.Mkdir(home, 0o700); err != nil {
		return err
	}
	env := []string{"PATH=/usr/bin:/bin", "HOME=" + home, "SMOLVM_VM_UID_DROP=off"}
	ctx := b.w.ctx
	c, err := smolvm.Open(ctx, bin, env)
	if err != nil {
		return err
	}
	const name, other = "bottle-bench", "bottle-bench-2"
	if err := c.MachineCreate(ctx, name, smolvm.CreateSpec{CPUs: 1, MemMiB: 256}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.MachineDelete(context.WithoutCancel(ctx), name)) }()

	// What a caller of the program itself would write.
	bare := func(args ...string) error {
		cmd := exec.CommandContext(ctx, bin, append([]string{"machine"}, args...)...)
		cmd.Env = env
		if _, err := cmd.Output(); err != nil {
			return fmt.Errorf("smolvm machine %s: %w", args[0], err)
		}
		return nil
	}
	for _, r := range []struct {
		name         string
		ours, beside func() error
		target       *limit
	}{
		{list, func() error { _, err := c.MachineLs(ctx); return err },
			func() error { return bare("ls", "--json") }, addsAtMost("adds <= 3 ms", 3)},
		{status, func() error { _, err := c.MachineStatus(ctx, name); return err },
			func() error { return bare("status", "--name", name, "--json") }, addsAtMost("adds <= 3 ms", 3)},
		// Three calls: a delete is believed when ls shows it.
		{create, func() error {
			if err := c.MachineCreate(ctx, other, smolvm.CreateSpec{CPUs: 1, MemMiB: 256}); err != nil {
				return err
			}
			return c.MachineDelete(ctx, other)
		}, func() error {
			return errors.Join(bare("create", "--name", other, "--cpus", "1", "--mem", "256"), bare("delete", "--name", other, "-f"), bare("ls", "--json"))
		}, addsAtMost("adds <= 9 ms", 9)},
	} {
		var ours, beside []float64
		for round := range 4*b.rounds + 1 { // each takes some milliseconds
			a, aerr := milliseconds(r.ours)
			o, oerr := milliseconds(r.beside)
			if err := errors.Join(aerr, oerr); err != nil {
				return err
			}
			if round > 0 {
				ours, beside = append(ours, a), append(beside, o)
			}
		}
		b.emit(newRow(r.name, "ms", ours, "smolvm "+c.Version.String(), beside, r.target))
	}
	return nil
}
