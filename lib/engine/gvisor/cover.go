//go:build linux

package gvisor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/guest/helper"
	"github.com/bottle-tools/bottle/lib/runsc"
)

var _ engine.Coverer = (*Engine)(nil)

// coverCapabilities are what the helper needs to mount over a path of the
// guest. Nothing else in the guest ever has CAP_SYS_ADMIN.
var coverCapabilities = []string{"CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"}

// Cover mounts over b.Target in the running guest: gVisor drops what was
// mounted over a file that the host has replaced by a rename.
func (e *Engine) Cover(ctx context.Context, r engine.Ref, b engine.Bind) error {
	rs, err := e.runsc(r.RunDir)
	if err != nil {
		return err
	}
	mode := helper.CoverHide
	if filepath.Base(b.Source) == filepath.Base(b.Target) {
		mode = helper.CoverPin
	}
	said, err := os.CreateTemp(r.RunDir, "cover-")
	if err != nil {
		return asFault(err)
	}
	defer os.Remove(said.Name())
	defer said.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return asFault(err)
	}
	defer null.Close()
	p := runsc.NewProcess(runsc.User{}, []string{engine.GuestHelper, "cover", mode, b.Target}, nil, "/", coverCapabilities, false)
	var status int
	err = onThread(func() (err error) {
		status, err = rs.Exec(ctx, runsc.ExecOptions{ID: r.ID, Process: p, Stdin: null, Stdout: null, Stderr: said})
		return err
	})
	if err != nil {
		return asFault(err)
	}
	if status != 0 {
		why, _ := os.ReadFile(said.Name())
		return fault.New(fault.IO, "cover_failed", "%s", strings.TrimSpace(fmt.Sprintf("status %d %s", status, why)))
	}
	return nil
}
