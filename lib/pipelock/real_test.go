package pipelock

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"
)

// realProgram is the pipelock of this host; without one the test is skipped.
func realProgram(t *testing.T) *Program {
	t.Helper()
	if os.Getenv("BOTTLE_PIPELOCK") == "" {
		if _, err := exec.LookPath("pipelock"); err != nil {
			t.Skip("SKIPPED: no pipelock on PATH and BOTTLE_PIPELOCK is not set: the real program is not asked")
		}
	}
	p, err := Find(t.Context(), os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRealStart(t *testing.T) {
	p := realProgram(t)
	y, err := YAML(bottle(tls("api.example.com")))
	if err != nil {
		t.Fatal(err)
	}
	t0 := time.Now()
	proc, err := p.Start(t.Context(), Options{Dir: t.TempDir(), Policy: y, InstanceID: "dev-0000"})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("start", time.Since(t0))
	y2, err := YAML(bottle(tls("api.example.com"), tls("b.example.com")))
	t0 = time.Now()
	if err := proc.Reload(context.Background(), y2); err != nil {
		t.Error(err)
	}
	t.Log("reload", time.Since(t0))
	t0 = time.Now()
	if err := proc.Stop(); err != nil {
		t.Error(err)
	}
	t.Log("stop", time.Since(t0), proc.Wait())
	b, _ := os.ReadFile(proc.log.path)
	t.Logf("%s", b)
}
