package keeper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/gitguard"
	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/state"
)

// reply is what up reads.
type reply struct{ bytes.Buffer }

func (*reply) Close() error { return nil }

// gone is the pipe of an up that was killed.
type gone struct{}

func (gone) Write([]byte) (int, error) { return 0, os.ErrClosed }
func (gone) Close() error              { return nil }

// A start that fails is told to up, and leaves nothing: because the guard refuses
// the workspace, or because the bottle was removed meanwhile.
func TestStartThatFails(t *testing.T) {
	ended, end := context.WithCancel(t.Context())
	end()
	for code, ctx := range map[string]context.Context{"in_git": t.Context(), "start_ended": ended} {
		t.Run(code, func(t *testing.T) { startThatFails(ctx, t, code) })
	}
}

func startThatFails(ctx context.Context, t *testing.T, code string) {
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	workspace := filepath.Join(top, "p/.git/hooks")
	if err := os.MkdirAll(workspace, 0o700); err != nil {
		t.Fatal(err)
	}
	m, err := manifest.Load([]byte(`{"format_version":"1.0","bottles":{"b":{"runtime":"gvisor","workspace":{"path":".git/hooks"},"egress":{"proxy":"builtin"}}},
		"agents":{"a":{"bottle":"b","command":["true"]}}}`), "bottle.json", nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.Plan("a")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := plan.New(b)
	if err != nil {
		t.Fatal(err)
	}
	self, err := state.Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	root := &state.Root{Dir: filepath.Join(top, "state"), RunDir: filepath.Join(top, "run")}
	folder, rec, err := root.Create("a", state.Record{Creator: self})
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := json.Marshal(Config{
		ID: folder.ID, StateDir: root.Dir, RunRoot: root.RunDir, Document: doc.Line(), Base: filepath.Join(top, "p"),
		Runtime: "gvisor", Workspace: workspace, HostUID: os.Geteuid(), HostGID: os.Getegid(),
	})
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(top, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	var to reply
	err = Run(ctx, bytes.NewReader(append(cfg, '\n')), &to, log)
	var got Reply
	if jerr := json.Unmarshal(to.Bytes(), &got); err == nil || jerr != nil || got.Error == nil || got.Error.Code != code || len(got.Warnings) > 0 {
		t.Errorf("%v; reply %q (%v)", err, to.String(), jerr)
	}
	for _, dir := range []string{folder.Dir, rec.RunDir} {
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left (%v)", dir, err)
		}
	}
}

// A reply that nobody takes is an error: the bottle would be nobody's.
func TestReplyToNobody(t *testing.T) {
	if err := send(gone{}, Reply{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("%v", err)
	}
}

// A guest names what is set aside: it writes no line of its own, and nothing
// that a terminal acts on.
func TestLogIsOneLine(t *testing.T) {
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	k := &keeper{log: log, now: func() time.Time { return time.Unix(0, 0) }}
	k.logf("workspace: %s", "z\x1b[31m\n\u009b2J\r\x7f\xffü/.git")
	got, err := os.ReadFile(log.Name())
	if want := "1970-01-01T00:00:00Z keeper: workspace: z?[31m ?2J ?\ufffdü/.git\n"; err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
}

// A guest that has ever more set aside fills neither the keeper's memory, nor its
// log, nor the answers by which its owner commands it.
func TestFindingsAreBounded(t *testing.T) {
	for name, width := range map[string]int{"many": 10, "long": 4000} {
		log, err := os.Create(filepath.Join(t.TempDir(), "log"))
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		k := &keeper{log: log, now: time.Now}
		g := noGuard()
		const n = 5000
		for i := range n {
			for range 2 {
				g.note(k, gitguard.Finding{Path: fmt.Sprintf("%d%s/.git", i, strings.Repeat("\x01", width)), What: "is no part of the workspace"})
			}
		}
		got := g.report()
		raw, err := json.Marshal(control.Answer{Findings: got})
		if err != nil || len(raw) > 512<<10 {
			t.Errorf("%s: an answer of %d bytes: %v", name, len(raw), err)
		}
		fi, _ := log.Stat()
		if len(got) > maxFound+1 || fi.Size() > 1<<20 || got[len(got)-1] != fmt.Sprintf("%d more findings are not listed", 2*(n-len(got)+1)) {
			t.Errorf("%s: %d findings, the last: %s; a log of %d bytes", name, len(got), got[len(got)-1], fi.Size())
		}
	}
}
