//go:build linux

package main

import (
	"errors"
	"os"
	"path/filepath"
)

// warm puts a sandbox that bottle-runsc restores from a checkpoint beside one that it
// starts: the same one, with nothing in it but its first process, which is the
// least that a restore takes. It is the reason why engine gvisor has no --warm.
func (b *bench) warm() error {
	image := filepath.Join(b.w.dir, "raw", "checkpoint")
	first, err := b.raw.fresh(b.raw.slim)
	if err == nil {
		err = first.run()
	}
	if err == nil {
		err = first.call("checkpoint", "--image-path="+image, "--compression=none", first.id)
	}
	if err := errors.Join(err, first.remove()); err != nil {
		return err
	}
	defer os.RemoveAll(image)
	var box *sandbox
	start := func(how func() error) func() error {
		return func() (err error) {
			if box, err = b.raw.fresh(b.raw.slim); err != nil {
				return err
			}
			return how()
		}
	}
	remove := func() error { return box.remove() }
	restored, cold, err := pairs(b.rounds,
		start(func() error { return box.restore(image) }), start(func() error { return box.run() }), remove, remove)
	if err != nil {
		return err
	}
	b.emit(newRow("restored from a checkpoint", "ms", restored, "bottle-runsc run", cold, ratioAtLeast("slower, so no --warm", 1)))
	return nil
}

func (s *sandbox) restore(image string) error {
	return s.call("restore", "--detach", "--image-path="+image, "--bundle="+s.raw.bundle, s.id)
}
