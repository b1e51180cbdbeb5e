package smolvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/smolvm"
)

// maxSocketPath is what a unix address holds, without the final zero.
const maxSocketPath = 107

// Prepare refuses what smolvm cannot hold. A guest is root in its own kernel:
// it can undo any mount made in the guest. What holds is what the host's virtiofs
// server holds, which is one folder, whole, read-only or not.
func (e *Engine) Prepare(ctx context.Context, s *engine.Spec) error {
	if err := e.Available(ctx); err != nil {
		return err
	}
	if err := checkSpec(s, os.Geteuid()); err != nil {
		return err
	}
	if fi, err := os.Stat(s.GuestHelper); err != nil || !fi.Mode().IsRegular() {
		return fault.New(fault.Unavailable, "helper_missing", "the guest helper %s is missing", s.GuestHelper).WithHint("run make")
	}
	vs, err := volumes(s)
	if err != nil || s.Warm == nil {
		return err
	}
	c, err := e.client(ctx)
	if err != nil {
		return err
	}
	return checkWarm(c, s, vs, os.Geteuid())
}

func checkSpec(s *engine.Spec, euid int) error {
	b := s.Bottle
	switch {
	case s.Rootfs == "":
		return refuse("smolvm_image", "image", "name an image (a rootfs folder, a docker-archive, a reference), or use runtime gvisor",
			"a microVM cannot take the host's own files for its image")
	case b.Resources.Pids > 0:
		return refuse("smolvm_pids", "resources.pids", "leave it out, or use runtime gvisor",
			"a process limit cannot be held in a guest kernel of its own")
	case s.HostUID != euid:
		return refuse("smolvm_host_uid", "workspace", "run it as the workspace's owner, or use runtime gvisor",
			"the guest's writes would belong to uid %d, not to the workspace's owner, uid %d", euid, s.HostUID)
	case euid == 0 && b.User == "agent" && !s.ReadOnly && !openToAll(s.Workspace):
		return refuse("smolvm_root_workspace", "workspace", "run it as a plain user who owns the workspace, say \"user\": \"root\", or use runtime gvisor",
			"the workspace belongs to root, and the guest's agent, who is not, could not write to it")
	case s.GateSocket != "" && (!filepath.IsAbs(s.GateSocket) || len(s.GateSocket) > maxSocketPath || strings.Contains(s.GateSocket, ":")):
		// Before Start there may be none yet.
		return refuse("smolvm_socket", "", "use a shorter runtime folder without a colon in its path",
			"%q cannot be the gate's socket", s.GateSocket)
	}
	return nil
}

// openToAll tells whether everybody may write to dir.
func openToAll(dir string) bool {
	fi, err := os.Stat(dir)
	return err == nil && fi.Mode().Perm()&0o002 != 0
}

// volumes gives the folders that the guest gets, in mount order, or refuses.
func volumes(s *engine.Spec) ([]smolvm.Volume, error) {
	vs := []smolvm.Volume{
		{Host: guestDir(s.Dir), Guest: engine.GuestDir, ReadOnly: true},
		{Host: s.Workspace, Guest: engine.GuestWorkspace, ReadOnly: s.ReadOnly},
	}
	if s.Home != "" {
		vs = append(vs, smolvm.Volume{Host: s.Home, Guest: engine.GuestHome})
	}
	for _, b := range s.Binds {
		v := smolvm.Volume{Host: b.Source, Guest: filepath.Clean(b.Target), ReadOnly: b.ReadOnly}
		if strings.Contains(v.Guest, ":") {
			// It reads HOST:GUEST[:ro|:rw] from the end.
			return nil, refuse("smolvm_mount_target", "mounts", "mount it elsewhere, or use runtime gvisor",
				"%q cannot be mounted: smolvm would read what follows the colon as something else", v.Guest)
		}
		if below, ok := holder(vs, v.Guest); ok && redundant(below, v) {
			continue
		} else if ok && !hidesNothing(below, v) {
			return nil, refuse("smolvm_nested_mount", "mounts", "use runtime gvisor, or workspace mode scratch without .git and hidden files, or mount it elsewhere",
				"%s cannot be mounted over a part of %s: guest root could take the mount away", v.Guest, below.Guest)
		}
		for _, o := range vs {
			if inside(o.Guest, v.Guest) {
				return nil, refuse("smolvm_nested_mount", "mounts", "use runtime gvisor, or mount it elsewhere",
					"%s cannot be mounted: %s is below it", v.Guest, o.Guest)
			}
		}
		fi, err := os.Stat(v.Host)
		if err != nil {
			return nil, fault.New(fault.NoInput, "no_mount", "%w", err).WithHint("make it, or take the mount out of the manifest")
		}
		if !fi.IsDir() {
			return nil, refuse("smolvm_file_mount", "mounts", "mount its folder, or use runtime gvisor",
				"%s is a file, and only folders can be mounted", v.Host)
		}
		vs = append(vs, v)
	}
	return vs, nil
}

// holder gives the volume that guest path p lies in.
func holder(vs []smolvm.Volume, p string) (smolvm.Volume, bool) {
	for _, v := range vs {
		if p == v.Guest || inside(p, v.Guest) {
			return v, true
		}
	}
	return smolvm.Volume{}, false
}

// inside tells whether the clean path p is below dir.
func inside(p, dir string) bool {
	return strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}

// hidesNothing tells whether guest root gains nothing by taking the mount v
// away: it lies over an empty folder that stays read-only, or over nothing in
// the home, which is the bottle's own. In a writable workspace even an empty
// folder (.git/hooks) may be what a mount is there to guard.
func hidesNothing(below, v smolvm.Volume) bool {
	home := below.Guest == engine.GuestHome
	if !below.ReadOnly && !home {
		return false
	}
	rel, err := filepath.Rel(below.Guest, v.Guest)
	if err != nil || rel == "." {
		return false
	}
	under := filepath.Join(below.Host, rel)
	fi, err := os.Lstat(under)
	if errors.Is(err, os.ErrNotExist) {
		return home
	}
	if err != nil || !fi.IsDir() {
		return false
	}
	entries, err := os.ReadDir(under)
	return err == nil && len(entries) == 0
}

// redundant tells whether mounting v changes nothing: the same host path is
// there already, and is no more writable than asked for.
func redundant(below, v smolvm.Volume) bool {
	rel, err := filepath.Rel(below.Guest, v.Guest)
	if err != nil || filepath.Join(below.Host, rel) != filepath.Clean(v.Host) {
		return false
	}
	return below.ReadOnly == v.ReadOnly || below.ReadOnly
}
