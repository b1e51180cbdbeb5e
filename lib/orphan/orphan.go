// Package orphan decides what is left over: it is given facts (records on disk,
// the processes that live, the time) and gives decisions with their evidence.
// It touches nothing and asks nobody, so every rule can be tested as data.
//
// An orphan is what belongs to a bottle whose keeper is dead or whose owner is
// gone, or to no bottle at all. Never an orphan: what a live bottle uses, a
// bottle being born, anything of another user, and what was set aside from a
// workspace, which is the user's data.
package orphan

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/plan"
)

// DefaultMinAge is how old something without a record has to be: a bottle that
// is being made right now has none yet.
const DefaultMinAge = time.Minute

// Kinds of an orphan, in the order in which a bottle's are removed.
const (
	Process = "process" // keeper, gate, proxy and other host processes
	Sandbox = "sandbox" // gVisor's sandbox and gofer
	Machine = "machine" // a microVM
	Socket  = "socket"  // a runtime folder
	Folder  = "folder"  // a bottle's state folder
	Cache   = "cache"   // an unfinished entry of the image cache
	Base    = "base"    // a prepared machine that bottles are copied from
)

// Orphan is one line of bottle-gc.
type Orphan struct {
	Format   string        `json:"format_version"`
	Kind     string        `json:"kind"`
	ID       string        `json:"id,omitempty"`   // vm.id of the bottle it belongs to, where it has one
	Role     string        `json:"role,omitempty"` // of a process
	Process  *plan.Process `json:"process,omitempty"`
	Path     string        `json:"path,omitempty"`
	Evidence []string      `json:"evidence"`
	Action   string        `json:"action"` // kill | delete | remove: what --apply does
}

// Facts is the world as it was seen at Now.
type Facts struct {
	Now    time.Time
	MinAge time.Duration // 0 is at once, not the default
	UID    int           // ours
	BootID string
	// Seen has the process that holds each pid that a record names. A pid that
	// is free, or a zombie's, is not in it.
	Seen     map[int]plan.Process
	Bottles  []Bottle
	RunDirs  []RunDir
	Machines []VM
	Bases    []Prepared
	BaseLife time.Duration // how long one is kept that nobody uses
	Cache    []string      // folders that dead packers left
	Packers  []Packer
}

// Packer is a process of an engine that makes a pack of an image: its program, or
// the guest that it has booted for that.
type Packer struct {
	plan.Process
	For plan.Process // who asked for the pack
	Dir string       // of the guest; "" for the program
}

// Bottle is one folder of the registry.
type Bottle struct {
	ID       string
	Dir      string
	Inode    uint64
	UID      int       // owner of the folder
	Changed  time.Time // of the record, without one of the folder
	Locked   bool      // somebody holds its lock though its keeper is not alive
	Mounts   []string  // mounted below the folder
	Record   *Record   // nil: never written, or unreadable
	RunDir   string    // where its sockets are, if that folder exists
	NoRecord string    // why there is none
}

// Record is what the decision needs of the bottle's record.
type Record struct {
	UID        int
	Starting   bool
	Stopping   bool
	Creator    plan.Process
	Owner      *plan.Process
	Keeper     *plan.Process
	Processes  []Child
	PlanSHA256 string
}

// Child is a recorded process.
type Child struct {
	Role string
	plan.Process
}

// RunDir is a folder for sockets.
type RunDir struct {
	Path    string
	UID     int
	Inode   uint64
	Changed time.Time
	InUse   bool // somebody answers on a socket in it
}

// VM is a machine of an engine that carries our labels.
type VM struct {
	Name    string        // a vm.id
	State   string        // as the engine calls it
	Created time.Time     // zero when unknown
	Maker   *plan.Process // of a machine for a boot check, which has no bottle: who waits for it
}

// Prepared is a machine that bottles are copied from, one folder of the registry.
type Prepared struct {
	Name    string // of the machine; "" without a record
	Dir     string
	UID     int
	Inode   uint64
	Changed time.Time
	Locked  bool // somebody makes, copies or removes it
	Alive   bool // its monitor runs
	UsedAt  time.Time
	Copies  []string // vm.ids of the bottles that are copies of it
}

// Decide gives the orphans, by bottle, in the order of their removal.
func Decide(f Facts) []Orphan {
	var all []Orphan
	known := map[string]bool{}
	claimed := map[string]bool{}
	for _, b := range f.Bottles {
		known[b.ID] = true
		claimed[shortID(b.ID)] = true
		all = append(all, f.bottle(b)...)
	}
	for _, b := range f.Bases {
		known[b.Name] = true
		claimed[runName(b.Name)] = true
		if why := f.unused(b); why != "" {
			all = append(all, Orphan{Kind: Base, ID: b.Name, Path: b.Dir, Action: "remove",
				Evidence: []string{why, f.changed(b.Changed, b.Inode)}})
		}
	}
	for _, m := range f.Machines {
		if strings.HasPrefix(m.Name, BasePrefix) && !known[m.Name] && !f.elsewhere(m) {
			all = append(all, Orphan{Kind: Machine, ID: m.Name, Action: "delete",
				Evidence: []string{"carries our label and no prepared machine of this name is known", "state " + m.State}})
		}
		if _, ours := plan.SplitVMID(m.Name); !ours || known[m.Name] || f.elsewhere(m) {
			continue
		}
		why := []string{"carries our labels and no bottle of this name exists"}
		if m.Maker != nil {
			gone := f.gone(*m.Maker)
			if gone == "" {
				continue
			}
			why = append(why, "what made it, "+describe(*m.Maker)+", "+gone)
		}
		all = append(all, Orphan{Kind: Machine, ID: m.Name, Action: "delete", Evidence: append(why, "state "+m.State)})
	}
	for _, d := range f.RunDirs {
		if d.UID != f.UID || d.InUse || claimed[filepath.Base(d.Path)] || f.young(d.Changed) {
			continue
		}
		all = append(all, Orphan{Kind: Socket, Path: d.Path, Action: "remove", Evidence: []string{
			"no bottle uses it and nobody answers in it", f.changed(d.Changed, d.Inode)}})
	}
	for _, path := range f.Cache {
		all = append(all, Orphan{Kind: Cache, Path: path, Action: "remove",
			Evidence: []string{"unfinished, and the process that made it is gone (its lock is free)"}})
	}
	for _, p := range f.Packers {
		why := f.gone(p.For)
		if why == "" {
			continue
		}
		o := Orphan{Kind: Process, Role: "packer", Process: &p.Process, Path: p.Dir, Action: "kill", Evidence: []string{
			"alive: " + describe(p.Process), "it makes a pack of an image for " + describe(p.For) + ", which " + why}}
		if p.Dir != "" {
			o.Kind = Machine
		}
		all = append(all, o)
	}
	for i := range all {
		all[i].Format = plan.FormatVersion
	}
	return all
}

// elsewhere tells whether a machine may be of a bottle that another state folder
// of the same user holds: they share the place for sockets.
func (f Facts) elsewhere(m VM) bool {
	return f.young(m.Created) || slices.ContainsFunc(f.RunDirs, func(d RunDir) bool {
		return filepath.Base(d.Path) == runName(m.Name) && (d.InUse || f.young(d.Changed))
	})
}

// unused says why a prepared machine is an orphan, or "".
func (f Facts) unused(b Prepared) string {
	switch {
	case b.UID != f.UID || b.Locked || len(b.Copies) > 0 || f.young(b.Changed):
		return ""
	case b.Name == "":
		return "it has no record that can be read: what made it died before it could write one"
	case !b.Alive:
		return "the machine's monitor is dead"
	case f.Now.Sub(b.UsedAt) >= f.BaseLife:
		return "no bottle is a copy of it, and none was made since " + b.UsedAt.UTC().Format(time.RFC3339)
	}
	return ""
}

// BasePrefix is what the names of prepared machines begin with.
const BasePrefix = "bottle-warm-"

// runName is the name of a machine's folder in the runtime folder.
func runName(machine string) string {
	if key, ok := strings.CutPrefix(machine, BasePrefix); ok {
		return "w" + key
	}
	return shortID(machine)
}

func shortID(id string) string { return id[strings.LastIndexByte(id, '-')+1:] }

func (f Facts) bottle(b Bottle) []Orphan {
	why := f.dead(b)
	if why == nil {
		return nil
	}
	var all []Orphan
	add := func(o Orphan) {
		o.ID = b.ID
		o.Evidence = append(slices.Clone(why), o.Evidence...)
		all = append(all, o)
	}
	folder := []string{f.changed(b.Changed, b.Inode)}
	if r := b.Record; r != nil {
		seen := map[plan.Process]bool{}
		for _, c := range append(keeper(r), r.Processes...) {
			if seen[c.Process] || f.gone(c.Process) != "" {
				continue
			}
			seen[c.Process] = true
			add(Orphan{Kind: kindOf(c.Role), Role: c.Role, Process: &c.Process, Action: "kill",
				Evidence: []string{"alive: " + describe(c.Process)}})
		}
		folder = append(folder, "plan "+r.PlanSHA256)
	}
	for _, m := range b.Mounts {
		folder = append(folder, "mounted below it: "+m)
	}
	if b.RunDir != "" {
		add(Orphan{Kind: Socket, Path: b.RunDir, Action: "remove", Evidence: []string{"runtime folder of this bottle"}})
	}
	add(Orphan{Kind: Folder, Path: b.Dir, Action: "remove", Evidence: folder})
	return all
}

func keeper(r *Record) []Child {
	if r.Keeper == nil {
		return nil
	}
	return []Child{{"keeper", *r.Keeper}}
}

func kindOf(role string) string {
	switch role {
	case "sandbox", "gofer":
		return Sandbox
	case "machine":
		return Machine
	}
	return Process
}

// dead says why a bottle is an orphan, or nil.
func (f Facts) dead(b Bottle) []string {
	r := b.Record
	switch {
	case b.UID != f.UID || r != nil && r.UID != f.UID:
		return nil
	case r == nil && (b.Locked || f.young(b.Changed)):
		return nil
	case r == nil:
		return []string{b.NoRecord}
	case r.Keeper != nil && f.gone(*r.Keeper) == "":
		return f.ownerGone(b)
	case r.Starting && f.gone(r.Creator) == "":
		return nil // being born; what makes it also takes it back
	case b.Locked:
		return nil // being removed
	case r.Keeper != nil:
		return []string{"keeper " + describe(*r.Keeper) + " " + f.gone(*r.Keeper)}
	case f.gone(r.Creator) == "":
		return []string{"it never had a keeper and is not being made any more"}
	}
	return []string{"it never had a keeper, and what made it, " + describe(r.Creator) + ", " + f.gone(r.Creator)}
}

// ownerGone judges a bottle whose keeper lives. The keeper ends the bottle by
// itself when the owner goes, and gets the time for it.
func (f Facts) ownerGone(b Bottle) []string {
	r := b.Record
	if r.Owner == nil || f.gone(*r.Owner) == "" || r.Stopping && f.young(b.Changed) {
		return nil
	}
	return []string{"owner " + describe(*r.Owner) + " " + f.gone(*r.Owner)}
}

// gone says why a process is not there any more, or "" when it is.
func (f Facts) gone(p plan.Process) string {
	now, ok := f.Seen[p.PID]
	switch {
	case p.BootID != f.BootID:
		return "is from before the last boot"
	case !ok:
		return "is dead"
	case now != p:
		return fmt.Sprintf("is dead (its pid is another process's now, started at %d)", now.StartTime)
	}
	return ""
}

func (f Facts) young(t time.Time) bool { return f.Now.Sub(t) < f.MinAge }

func (f Facts) changed(t time.Time, inode uint64) string {
	return fmt.Sprintf("inode %d, last changed %s", inode, t.UTC().Format(time.RFC3339))
}

func describe(p plan.Process) string {
	return fmt.Sprintf("pid %d (start time %d, boot %s)", p.PID, p.StartTime, p.BootID)
}
