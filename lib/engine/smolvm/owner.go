package smolvm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/smolvm"
	"github.com/bottle-tools/bottle/lib/state"
)

// Labels of the machines that the bottle tools make. What does not carry the
// first two, with just these values, is never ended or deleted: smolvm's own
// list has the machines of every program and of every state folder of a user.
const (
	labelOwner = "owner"        // ownerValue
	labelState = "bottle-state" // which state folder its bottle is in: stateTag
	labelMaker = "bottle-maker" // of a boot check's machine: who waits for it

	ownerValue = "bottle"
)

// stateTag names a state folder. A machine of another one is that one's to end,
// though it may have a bottle's name and be the same user's.
func stateTag(dir string) string {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	sum := sha256.Sum256([]byte(filepath.Clean(dir)))
	return hex.EncodeToString(sum[:8])
}

// tagOf is stateTag for a bottle's own folder, <state folder>/bottles/<id>.
func tagOf(bottleDir string) string { return stateTag(filepath.Dir(filepath.Dir(bottleDir))) }

func ownLabels(tag string) []smolvm.Label {
	return []smolvm.Label{{Key: labelOwner, Value: ownerValue}, {Key: labelState, Value: tag}}
}

// maker is this process, for a machine that has no bottle whose keeper could be
// asked after.
func maker() []smolvm.Label {
	p, err := state.Identify(os.Getpid())
	if err != nil {
		return nil
	}
	return []smolvm.Label{{Key: labelMaker, Value: fmt.Sprintf("%d.%d.%s", p.PID, p.StartTime, p.BootID)}}
}

func parseMaker(s string) *plan.Process {
	pid, rest, ok1 := strings.Cut(s, ".")
	start, boot, ok2 := strings.Cut(rest, ".")
	p := plan.Process{BootID: boot}
	var err1, err2 error
	p.PID, err1 = strconv.Atoi(pid)
	p.StartTime, err2 = strconv.ParseUint(start, 10, 64)
	if !ok1 || !ok2 || err1 != nil || err2 != nil {
		return nil
	}
	return &p
}

// isOurs tells whether the machine was made for a bottle of this state folder.
func isOurs(m smolvm.Machine, tag string) bool {
	return m.Labels[labelOwner] == ownerValue && m.Labels[labelState] == tag
}

func ours(m smolvm.Machine, tag string) error {
	if isOurs(m, tag) {
		return nil
	}
	return fault.New(fault.NoPerm, "smolvm_foreign_machine", "the smolvm machine %s was not made by the bottle tools for this state folder", m.Name).
		WithHint("look at it with: smolvm machine status --name %s", m.Name)
}

// Owned is a machine that was made for a bottle of one state folder.
type Owned struct {
	Name, State string
	Created     time.Time     // zero when smolvm does not tell
	Maker       *plan.Process // of a boot check: the process that waits for it
}

// Owned lists the machines of a state folder, whatever became of their bottles.
// A smolvm that is too old for a bottle has none.
func (e *Engine) Owned(ctx context.Context, stateDir string) ([]Owned, error) {
	c, err := e.client(ctx)
	if err != nil {
		return nil, err
	}
	if checkVersion(c) != nil {
		return nil, nil
	}
	all, err := c.MachineLs(ctx)
	if err != nil {
		return nil, err
	}
	var list []Owned
	for _, m := range all {
		if isOurs(m, stateTag(stateDir)) {
			list = append(list, owned(m))
		}
	}
	return list, nil
}

func owned(m smolvm.Machine) Owned {
	o := Owned{Name: m.Name, State: m.State, Maker: parseMaker(m.Labels[labelMaker])}
	if m.CreatedAt > 0 {
		o.Created = time.Unix(m.CreatedAt, 0)
	}
	return o
}

// DeleteOwned ends the machine that Owned has listed, and no other: one that has
// got its name since is left alone. One that is gone is success.
func (e *Engine) DeleteOwned(ctx context.Context, stateDir string, o Owned) error {
	c, err := e.client(ctx)
	if err != nil {
		return err
	}
	return e.remove(ctx, c, o.Name, "", func(m smolvm.Machine) (bool, error) {
		return isOurs(m, stateTag(stateDir)) && owned(m).Created.Equal(o.Created), nil
	})
}
