package image

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
)

// The index spares a second look at a source that has not changed. It belongs
// to the owner of the cache, as everything there does.

// stamp is what tells that a source is the one seen before. The change time is
// part of it, which nobody but root can set back.
type stamp struct {
	print  string
	newest time.Time
}

type stamper struct {
	sum    hash.Hash
	newest time.Time
}

func (s *stamper) add(p string, fi fs.FileInfo) {
	var dev, ino, uid uint64
	var ctime time.Time
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		dev, ino, uid, ctime = uint64(st.Dev), st.Ino, uint64(st.Uid), changeTime(st)
	}
	fmt.Fprintf(s.sum, "%q %d %d %d %o %d %d %d\n", p, dev, ino, uid, fi.Mode(), fi.Size(), fi.ModTime().UnixNano(), ctime.UnixNano())
	for _, t := range []time.Time{fi.ModTime(), ctime} {
		if t.After(s.newest) {
			s.newest = t
		}
	}
}

func (s *stamper) stamp() stamp {
	return stamp{print: hex.EncodeToString(s.sum.Sum(nil)), newest: s.newest}
}

func stampFile(fi fs.FileInfo) stamp {
	s := stamper{sum: sha256.New()}
	s.add("", fi)
	return s.stamp()
}

// stampTree also refuses a folder with something mounted in it, /proc for one:
// what is there belongs to a running system.
func stampTree(ctx context.Context, root *os.Root, o Options) (stamp, error) {
	p := newProgress(o, "looking for changes")
	defer p.done()
	s := stamper{sum: sha256.New()}
	top, err := root.Lstat(".")
	if err != nil {
		return stamp{}, err
	}
	var n int64
	err = walk(ctx, root, func(_ *os.Root, at string, fi fs.FileInfo) error {
		if fi.IsDir() && deviceOf(fi) != deviceOf(top) {
			return fault.New(fault.Data, "image_mounted", "%s is on another file system than the folder it is in", quote(at)).
				WithHint("unmount it, or make a copy of the root file system without it")
		}
		if n++; n > o.Limits.Entries {
			return errTooBig("the folder has more than %d entries", o.Limits.Entries)
		}
		s.add(at, fi)
		p.step(1, 0)
		return nil
	})
	return s.stamp(), err
}

func deviceOf(fi fs.FileInfo) uint64 {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return uint64(st.Dev)
}

// fileID tells that two names are one file.
type fileID struct{ dev, ino uint64 }

func idOf(fi fs.FileInfo) (id fileID, many bool) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || st.Nlink < 2 {
		return fileID{}, false
	}
	return fileID{uint64(st.Dev), st.Ino}, true
}

// settled is how old a source's last change must be before it is remembered: a
// file may change twice within the resolution of its time stamps.
const settled = 2 * time.Second

type indexed struct {
	Stamp  string `json:"stamp"`
	Digest string `json:"digest"`
	Kind   string `json:"kind"`
}

func (c *cache) indexPath(s source) string {
	sum := sha256.Sum256([]byte(s.path + "\x00" + c.opts.Platform))
	return filepath.Join(c.dir, "index", hex.EncodeToString(sum[:])+".json")
}

// indexed gives the entry that s was packed to, if s is the same as then.
func (c *cache) indexed(s source) (packed, bool) {
	if s.stamp.print == "" {
		return packed{}, false
	}
	data, err := os.ReadFile(c.indexPath(s))
	if err != nil {
		return packed{}, false
	}
	var rec indexed
	if json.Unmarshal(data, &rec) != nil || rec.Stamp != s.stamp.print {
		return packed{}, false
	}
	e, ok := c.use(rec.Digest)
	return packed{entry: e, kind: rec.Kind, cached: true}, ok
}

// remember notes what s was packed to. Failing to costs time only.
func (c *cache) remember(s source, r packed) {
	if s.stamp.print == "" || c.opts.Now().Sub(s.stamp.newest) < settled {
		return
	}
	data, err := json.Marshal(indexed{Stamp: s.stamp.print, Digest: r.entry.Digest, Kind: r.kind})
	if err != nil {
		return
	}
	tmp := filepath.Join(c.dir, "index", tmpPrefix+rand.Text())
	err = os.WriteFile(tmp, data, 0o600)
	if err := errors.Join(err, os.Rename(tmp, c.indexPath(s))); err != nil {
		_ = os.Remove(tmp)
	}
}
