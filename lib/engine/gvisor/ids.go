//go:build linux

package gvisor

import (
	"bufio"
	"fmt"
	"hash/fnv"
	"strings"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/runsc"
)

// systemd leaves 0x70000000–0x7fffffff unassigned (UIDS-GIDS.md), and nobody
// else hands ids out there either.
const (
	spareBase  = 0x70000000
	spareCount = 0x0fff0000
)

// idMaps are the ids of a guest on the host.
type idMaps struct {
	uids, gids []runsc.IDMapping
	user       runsc.User // as whom the first process starts
}

// mapIDs maps the bottle's user, and nobody else, to the owner of the
// workspace. runsc started by root needs the guest's root mapped as well: it
// gets an id of its own for each bottle that owns nothing on the host, and
// sandbox and gofer run as that.
//
// uidRange and gidRange are /proc/self/uid_map and gid_map of the caller.
func mapIDs(id, user string, euid, hostUID, hostGID int, uidRange, gidRange string) (idMaps, error) {
	if user == "root" {
		return idMaps{uids: one(0, hostUID), gids: one(0, hostGID)}, nil
	}
	m := idMaps{
		uids: one(engine.GuestUID, hostUID), gids: one(engine.GuestUID, hostGID),
		user: runsc.User{UID: engine.GuestUID, GID: engine.GuestUID},
	}
	if euid != 0 {
		return m, nil
	}
	uid, okU := spareID(uidRange, id, hostUID)
	gid, okG := spareID(gidRange, id, hostGID)
	if !okU || !okG {
		return idMaps{}, fault.New(fault.Host, "no_user_ids", "root here is a container's, with a single user id").
			WithHint("run as a plain user, or set \"user\": \"root\" for the bottle")
	}
	m.uids = append(m.uids, one(0, uid)...)
	m.gids = append(m.gids, one(0, gid)...)
	return m, nil
}

func one(guest, host int) []runsc.IDMapping {
	return []runsc.IDMapping{{ContainerID: guest, HostID: host, Size: 1}}
}

// spareID picks an id that is mapped in ranges (lines of "inside outside
// count"), belongs to nobody, and differs from avoid.
func spareID(ranges, id string, avoid int) (int, bool) {
	h := fnv.New32a()
	h.Write([]byte(id))
	want := spareBase + int(h.Sum32()%spareCount)
	if want == avoid {
		want++
	}
	last := -1
	sc := bufio.NewScanner(strings.NewReader(ranges))
	for sc.Scan() {
		var inside, outside, count int
		if n, _ := fmt.Sscan(sc.Text(), &inside, &outside, &count); n != 3 {
			continue
		}
		if want >= inside && want-inside < count {
			return want, true
		}
		// In a container with a few ids, the highest is the least used.
		for top := inside + count - 1; top >= inside && top > 0; top-- {
			if top != avoid {
				last = max(last, top)
				break
			}
		}
	}
	return last, last > 0
}
