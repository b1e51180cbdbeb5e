package gitguard

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/go-json-experiment/json"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
)

// StateFile is the name under which a keeper keeps its guard in the bottle's
// folder, for a reaper to find.
const StateFile = "guard.json"

// saved is what a guard knows of the start, so that another process can sweep
// when the one that watched was killed. It holds the texts of git configurations
// and belongs into a folder that only its user can read.
type saved struct {
	Options Options     `json:"options"`
	Known   []savedID   `json:"known"`
	Repos   []savedRepo `json:"repos"`
	Bares   []string    `json:"bares"`
	Outer   []string    `json:"outer"`
	Pins    []savedPin  `json:"pins"`
}

type savedID struct {
	Dev uint64 `json:"dev,string"`
	Ino uint64 `json:"ino,string"`
}

type savedRepo struct {
	savedID
	Absent []string `json:"absent"`
	Pinned []string `json:"pinned"`
	Todo   string   `json:"todo"`
}

type savedPin struct {
	savedID
	Path    string      `json:"path"`
	Bind    engine.Bind `json:"bind"`
	Restore bool        `json:"restore"`
	Config  bool        `json:"config"`
	Text    []byte      `json:"text"`
	Mode    uint32      `json:"mode"`
	UID     int         `json:"uid"`
	GID     int         `json:"gid"`
}

// Persist writes what the guard knows into file (0600, all or nothing), for
// Resume. A Sweep that succeeds removes the file again.
func (g *Guard) Persist(file string) error {
	s := saved{Options: g.opts, Bares: g.bares, Outer: keys(g.outer)}
	for i := range g.known {
		s.Known = append(s.Known, savedID{i.dev, i.ino})
	}
	for i, r := range g.repos {
		s.Repos = append(s.Repos, savedRepo{savedID{i.dev, i.ino}, keys(r.absent), keys(r.pinned), r.todo})
	}
	for path, p := range g.pins {
		s.Pins = append(s.Pins, savedPin{savedID{p.id.dev, p.id.ino}, path, p.bind, p.restore, p.config, p.text, p.mode, p.uid, p.gid})
	}
	raw, err := json.Marshal(s)
	if err != nil {
		return fault.New(fault.Bug, "bug", "encoding the guard: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	_, err = f.Write(raw)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		os.Remove(f.Name())
		return fault.New(fault.IO, "write_failed", "writing state: %w", err)
	}
	g.file = file
	return nil
}

// Resume gives the guard that Persist wrote, or nil where there is none. It is
// good for a Sweep in the same boot: identities of files don't outlive one.
func Resume(file string) (*Guard, error) {
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var s saved
	if err == nil {
		err = json.Unmarshal(raw, &s)
	}
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	g := newGuard(s.Options)
	g.file, g.bares = file, s.Bares
	for _, i := range s.Known {
		g.known[i.id()] = true
	}
	for _, r := range s.Repos {
		g.repos[r.id()] = &gitDir{absent: set(r.Absent), pinned: set(r.Pinned), todo: r.Todo}
	}
	g.outer = set(s.Outer)
	for _, p := range s.Pins {
		g.pins[p.Path] = &pin{bind: p.Bind, id: p.id(), restore: p.Restore, config: p.Config, text: p.Text, mode: p.Mode, uid: p.UID, gid: p.GID}
	}
	return g, nil
}

func (i savedID) id() id { return id{i.Dev, i.Ino} }

func keys(m map[string]bool) []string {
	var all []string
	for k := range m {
		all = append(all, k)
	}
	return all
}

func set(names []string) map[string]bool {
	m := map[string]bool{}
	for _, n := range names {
		m[n] = true
	}
	return m
}
