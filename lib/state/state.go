// Package state is the registry on disk: one folder a bottle, written before
// anything is started, so that a kill at any instant leaves something that can
// be named and removed.
//
//	$XDG_STATE_HOME/bottle/                 0700 (default ~/.local/state)
//	    bottles/<vm.id>/record.json         Record: what was started, by whom
//	                    document.json       the final document
//	                    lock                held (flock) by the living keeper
//	                    …                   logs, skeleton, engine state
//	    homes/<agent>-<8 hex>/              home: keep
//	    aside/<vm.id>/…                     what was set aside from a .git
//	    warm/<key>/                         prepared machines (engine smolvm)
//	    trust.json                          digests of trusted manifests
//	$XDG_RUNTIME_DIR/bottle/<8 hex>/        sockets (default /tmp/bottle-<uid>)
//
// Records of another user are never acted on, and a folder that others can
// write is refused.
package state

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Root finds the folders of one user.
type Root struct {
	Dir    string // …/bottle, absolute
	RunDir string // short folder that holds the runtime folders
}

// Open gives the Root for the environment, creating nothing.
func Open(getenv func(string) string) (*Root, error) {
	base := getenv("XDG_STATE_HOME")
	if base == "" {
		home := getenv("HOME")
		if home == "" {
			return nil, fault.New(fault.Host, "no_home", "neither XDG_STATE_HOME nor HOME is set").
				WithHint("set one, so that the state of bottles has a place")
		}
		base = filepath.Join(home, ".local", "state")
	}
	if !filepath.IsAbs(base) {
		return nil, fault.New(fault.Usage, "usage", "XDG_STATE_HOME %q is not an absolute path", base)
	}
	run := getenv("XDG_RUNTIME_DIR")
	if run != "" && filepath.IsAbs(run) && ownFolder(run) == nil && len(run) < 60 {
		run = filepath.Join(run, "bottle")
	} else {
		run = filepath.Join("/tmp", "bottle-"+strconv.Itoa(os.Getuid()))
	}
	return &Root{Dir: filepath.Join(base, "bottle"), RunDir: run}, nil
}

// ownFolder refuses a folder that is not ours alone to write.
func ownFolder(dir string) error {
	fi, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err != nil {
		return fault.New(fault.NoPerm, "bad_state_dir", "%w", err).WithHint("set XDG_STATE_HOME to a folder of your own")
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !fi.IsDir():
		return fault.New(fault.NoPerm, "bad_state_dir", "%s is not a folder", dir).WithHint("remove it, or set XDG_STATE_HOME to another place")
	case ok && int(st.Uid) != os.Geteuid():
		return fault.New(fault.NoPerm, "bad_state_dir", "%s belongs to uid %d, not to you", dir, st.Uid).WithHint("set XDG_STATE_HOME to a folder of your own")
	case fi.Mode().Perm()&0o022 != 0:
		return fault.New(fault.NoPerm, "bad_state_dir", "%s can be written by others (mode %o)", dir, fi.Mode().Perm()).WithHint("chmod go-w %s", dir)
	}
	return nil
}

// mkdir makes dir and its parents, dir itself 0700 and ours.
func mkdir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return cannotCreate(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return cannotCreate(err)
	}
	return ownFolder(dir)
}

func cannotCreate(err error) error {
	return fault.New(fault.CantCreate, "cannot_create", "state folder: %w", err).
		WithHint("set XDG_STATE_HOME to a folder that you can write")
}

// Phase of a bottle's life.
const (
	Starting = "starting"
	Ready    = "ready"
	Stopped  = "stopped" // the guest is gone, its records are there for logs and diff
	Stopping = "stopping"
)

// Record is the one file that down and gc need. It is rewritten atomically
// whenever something was started, before the next thing is.
type Record struct {
	Format    string        `json:"format_version"`
	ID        string        `json:"id"`
	UID       int           `json:"uid"`
	Phase     string        `json:"phase"`
	CreatedAt time.Time     `json:"created_at"`
	Creator   plan.Process  `json:"creator"`         // the up that is making it
	Owner     *plan.Process `json:"owner,omitempty"` // --owner: the bottle ends with it
	Keeper    *plan.Process `json:"keeper,omitempty"`
	Processes []Child       `json:"processes"`
	Engine    string        `json:"engine,omitempty"`
	RunDir    string        `json:"run_dir"`
	// Digest of the plan, so that evidence can be tied to a policy.
	PlanSHA256  string `json:"plan_sha256"`
	ManifestDir string `json:"manifest_dir"`
	Workspace   string `json:"workspace"`
	Exe         string `json:"exe"` // the program that the processes run
}

// Child is one started process and what it is for.
type Child struct {
	Role string `json:"role"` // keeper | gate | proxy | sandbox | gofer | machine | …
	plan.Process
}

// Bottle is one folder of the registry.
type Bottle struct {
	ID   string
	Dir  string
	Root *Root
}

func (r *Root) bottles() string { return filepath.Join(r.Dir, "bottles") }

// Warm is the folder of prepared machines; it need not exist.
func (r *Root) Warm() string { return filepath.Join(r.Dir, "warm") }

// Bottle names a bottle's folder; it need not exist.
func (r *Root) Bottle(id string) *Bottle {
	return &Bottle{ID: id, Dir: filepath.Join(r.bottles(), id), Root: r}
}

// Create makes the folder of a new bottle: <name>-<8 hex>, with its record in it
// before it returns.
func (r *Root) Create(name string, rec Record) (*Bottle, *Record, error) {
	for _, dir := range []string{r.Dir, r.bottles(), r.RunDir} {
		if err := mkdir(dir); err != nil {
			return nil, nil, err
		}
	}
	for range 100 {
		var hex8 [4]byte
		_, _ = rand.Read(hex8[:])
		short := hex.EncodeToString(hex8[:])
		b := r.Bottle(name + "-" + short)
		run := filepath.Join(r.RunDir, short)
		// The runtime folder first: it is found through the record, so a
		// record must never be missing for one. An empty one is harmless.
		if err := os.Mkdir(run, 0o700); errors.Is(err, fs.ErrExist) {
			continue
		} else if err != nil {
			return nil, nil, cannotCreate(err)
		}
		if err := os.Mkdir(b.Dir, 0o700); err != nil {
			os.Remove(run)
			if errors.Is(err, fs.ErrExist) {
				continue
			}
			return nil, nil, cannotCreate(err)
		}
		rec.Format, rec.ID, rec.UID, rec.Phase, rec.RunDir = "1.0", b.ID, os.Geteuid(), Starting, run
		if rec.Processes == nil {
			rec.Processes = []Child{}
		}
		if err := b.Save(&rec); err != nil {
			os.Remove(run)
			os.RemoveAll(b.Dir)
			return nil, nil, err
		}
		return b, &rec, nil
	}
	return nil, nil, fault.New(fault.CantCreate, "cannot_create", "no free bottle id after 100 tries")
}

// Path of a file in the bottle's folder.
func (b *Bottle) Path(name string) string { return filepath.Join(b.Dir, name) }

// Save writes the record atomically.
func (b *Bottle) Save(rec *Record) error {
	raw, err := json.Marshal(rec)
	if err != nil {
		return fault.New(fault.Bug, "bug", "encoding a record: %w", err)
	}
	return b.WriteFile("record.json", append(raw, '\n'))
}

// WriteFile puts a file into the bottle's folder, all or nothing.
//
// It is not synced to the disk, which would take longer than all the rest of a
// bottle's start on a busy one: a kill of any process leaves the file whole,
// and a crash of the machine ends everything that a record could name. A record
// torn by that is ErrNoRecord, a folder to be removed.
func (b *Bottle) WriteFile(name string, data []byte) error {
	return writeFile(b.Path(name), data, false)
}

// writeFile replaces a file all or nothing; with durable it is on the disk when
// this returns.
func writeFile(path string, data []byte, durable bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fault.New(fault.CantCreate, "cannot_create", "%w", err)
	}
	_, err = f.Write(data)
	if durable {
		err = errors.Join(err, f.Sync())
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fault.New(fault.IO, "write_failed", "writing state: %w", err)
	}
	return nil
}

// Load reads the record. A folder without one is ErrNoRecord.
func (b *Bottle) Load() (*Record, error) {
	if err := ownFolder(b.Dir); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, ErrNotFound
		}
		return nil, err
	}
	raw, err := os.ReadFile(b.Path("record.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoRecord
	}
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	rec := new(Record)
	if err := json.Unmarshal(raw, rec); err != nil || rec.ID != b.ID {
		return nil, ErrNoRecord
	}
	if rec.UID != os.Geteuid() {
		return nil, fault.New(fault.NoPerm, "not_yours", "bottle %s belongs to uid %d", b.ID, rec.UID)
	}
	return rec, nil
}

var (
	// ErrNotFound: there is no folder of that id.
	ErrNotFound = errors.New("no such bottle")
	// ErrNoRecord: there is a folder, and what made it died before it could
	// write a record, or the record is unreadable.
	ErrNoRecord = errors.New("bottle has no record")
)

// Document reads the final document, or nil when there is none yet.
func (b *Bottle) Document() (*plan.Doc, error) {
	raw, err := os.ReadFile(b.Path("document.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	return plan.Parse(raw)
}

// List gives all folders of the registry, by id.
func (r *Root) List() ([]*Bottle, error) {
	for _, dir := range []string{r.Dir, r.bottles()} {
		if err := ownFolder(dir); errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
	}
	entries, err := os.ReadDir(r.bottles())
	if err != nil {
		return nil, fault.New(fault.IO, "read_failed", "reading state: %w", err)
	}
	var all []*Bottle
	for _, e := range entries {
		if _, ok := plan.SplitVMID(e.Name()); ok && e.IsDir() {
			all = append(all, r.Bottle(e.Name()))
		}
	}
	return all, nil
}

// Find resolves an id of the command line: a vm.id, or the name of exactly one
// live bottle.
func (r *Root) Find(id string) (*Bottle, error) {
	if _, ok := plan.SplitVMID(id); ok {
		b := r.Bottle(id)
		if _, err := os.Lstat(b.Dir); err == nil {
			return b, nil
		}
	}
	if err := plan.CheckID(id); err != nil && !strings.Contains(id, "-") {
		return nil, err
	}
	all, err := r.List()
	if err != nil {
		return nil, err
	}
	var found []*Bottle
	for _, b := range all {
		name, _ := plan.SplitVMID(b.ID)
		if name != id {
			continue
		}
		if rec, err := b.Load(); err == nil && rec.Live() {
			found = append(found, b)
		}
	}
	switch len(found) {
	case 0:
		return nil, fault.New(fault.NoInput, "no_such_bottle", "no bottle %q", id).WithHint("bottle-vm ls shows those there are")
	case 1:
		return found[0], nil
	}
	ids := make([]string, len(found))
	for i, b := range found {
		ids[i] = b.ID
	}
	slices.Sort(ids)
	return nil, fault.New(fault.Usage, "ambiguous_id", "%d bottles are called %q", len(found), id).WithHint("say which: %s", strings.Join(ids, ", "))
}

// Live tells whether the bottle's keeper lives, or its up is still at work.
func (r *Record) Live() bool {
	if r.Keeper != nil {
		return Alive(*r.Keeper)
	}
	return r.Phase == Starting && Alive(r.Creator)
}

// Remove deletes the bottle's folders without following a symlink. It is the
// last step of down and gc, after everything in the record is gone.
func (b *Bottle) Remove(rec *Record) error {
	var errs []error
	if rec != nil && filepath.Dir(rec.RunDir) == b.Root.RunDir {
		errs = append(errs, RemoveAll(rec.RunDir))
	}
	errs = append(errs, RemoveAll(b.Dir))
	if err := errors.Join(errs...); err != nil {
		return fault.New(fault.IO, "remove_failed", "removing the state of %s: %w", b.ID, err)
	}
	return nil
}

// RemoveAll removes a tree that a guest may have filled: it never leaves the
// tree through a symlink, and opens folders that were made unreadable.
func RemoveAll(dir string) error {
	err := os.RemoveAll(dir) // unlinkat from open folders; symlinks are removed, not followed
	if err == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			if fi, err := os.Lstat(path); err == nil && fi.IsDir() {
				_ = os.Chmod(path, 0o700)
			}
		}
		return nil
	})
	return os.RemoveAll(dir)
}

// Home makes and gives the folder that keeps an agent's home (home: keep).
func (r *Root) Home(agent, manifestDir string) (string, error) {
	dir := filepath.Join(r.Dir, "homes")
	for _, d := range []string{r.Dir, dir} {
		if err := mkdir(d); err != nil {
			return "", err
		}
	}
	home := filepath.Join(dir, agent+"-"+strings.TrimPrefix(plan.SHA256([]byte(manifestDir)), "sha256:")[:8])
	return home, mkdir(home)
}

// Aside makes and gives the folder for what is taken out of a workspace.
func (r *Root) Aside(id string) (string, error) {
	dir := filepath.Join(r.Dir, "aside")
	for _, d := range []string{r.Dir, dir} {
		if err := mkdir(d); err != nil {
			return "", err
		}
	}
	return r.AsidePath(id), mkdir(r.AsidePath(id))
}

// AsidePath is the folder that Aside makes.
func (r *Root) AsidePath(id string) string { return filepath.Join(r.Dir, "aside", id) }

// Audit is where the bottle's audit log lies, or its newest file: audit.Read
// finds the others. It outlives the bottle: what an agent reached is asked for
// after the agent is gone.
func (r *Root) Audit(id string) string { return filepath.Join(r.Dir, "audit", id+".jsonl") }

// FindAudit resolves an id of the command line to the vm.id of an audit log: a
// live bottle's, or the newest one of that name, since logs outlive bottles.
func (r *Root) FindAudit(id string) (string, error) {
	if _, ok := plan.SplitVMID(id); ok {
		if _, err := os.Lstat(r.Audit(id)); err == nil {
			return id, nil
		}
	}
	b, err := r.Find(id)
	if err == nil {
		return b.ID, nil
	}
	if f := fault.As(err); f.Code != "no_such_bottle" {
		return "", err
	}
	entries, listErr := os.ReadDir(filepath.Join(r.Dir, "audit"))
	if listErr != nil && !errors.Is(listErr, fs.ErrNotExist) {
		return "", fault.New(fault.IO, "read_failed", "reading state: %w", listErr)
	}
	newest, at := "", time.Time{}
	for _, e := range entries {
		vm := strings.TrimSuffix(e.Name(), ".jsonl")
		if name, ok := plan.SplitVMID(vm); !ok || name != id || vm == e.Name() {
			continue
		}
		if fi, err := e.Info(); err == nil && !fi.ModTime().Before(at) {
			newest, at = vm, fi.ModTime()
		}
	}
	if newest == "" {
		return "", fault.New(fault.NoInput, "no_audit_log", "no bottle %q, and no audit log of one", id).
			WithHint("bottle-vm ls shows the bottles; the logs lie in %s; a bottle that asked for nothing leaves none", filepath.Join(r.Dir, "audit"))
	}
	return newest, nil
}

// MakeAudit makes the folder of the audit logs.
func (r *Root) MakeAudit() error { return mkdir(filepath.Join(r.Dir, "audit")) }

// TidyAudit removes the audit log of a bottle that asked for nothing.
func (r *Root) TidyAudit(id string) error {
	path := r.Audit(id)
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || fi.Size() > 4096 {
		return err
	}
	// The files before it hold what was asked for.
	if older, err := filepath.Glob(path + ".*"); err != nil || len(older) > 0 {
		return err
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(raw)) {
		if !strings.Contains(line, `"event":"start"`) && !strings.Contains(line, `"event":"stop"`) {
			return nil
		}
	}
	return os.Remove(path)
}

// WriteFile puts v as JSON into a file of the state folder, all or nothing.
func (r *Root) WriteFile(name string, v any) error {
	if err := mkdir(r.Dir); err != nil {
		return err
	}
	raw, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		return fault.New(fault.Bug, "bug", "encoding %s: %w", name, err)
	}
	return writeFile(filepath.Join(r.Dir, name), append(raw, '\n'), true)
}
