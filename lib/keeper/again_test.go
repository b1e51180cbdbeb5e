package keeper

import (
	"os"
	"testing"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/state"
)

type noDisk struct{ engine.Engine }

func (noDisk) Name() string { return "gvisor" }

type disk struct {
	noDisk
	engine.Restarter
}

// Only a bottle that is stopped is started again, and only where its guest has a
// disk. The rest takes microVMs: testscripts/smolvm.
func TestAgainRefuses(t *testing.T) {
	for _, tt := range []struct {
		eng   engine.Engine
		phase string
		exit  int
		code  string
	}{
		{noDisk{}, stopped, fault.Host, "no_disk"},
		{noDisk{}, state.Ready, fault.Host, "no_disk"},
		{disk{}, state.Ready, fault.TempFail, "not_stopped"},
		{disk{}, state.Starting, fault.TempFail, "not_stopped"},
		{disk{}, state.Stopping, fault.TempFail, "not_stopped"},
	} {
		k := &keeper{eng: tt.eng, phase: tt.phase, log: os.Stderr, cfg: Config{ID: "x-01234567"}, handed: make(chan struct{})}
		_, err := k.again()
		if f := fault.As(err); f == nil || f.Exit != tt.exit || f.Code != tt.code || f.Hint == "" {
			t.Errorf("%s, %s: %+v", tt.eng.Name(), tt.phase, err)
		}
		if k.phase != tt.phase {
			t.Errorf("phase %s, then %s", tt.phase, k.phase)
		}
		select {
		case <-k.handed:
			t.Error("it was given away")
		default:
		}
	}
}
