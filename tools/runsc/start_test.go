package main

import (
	"maps"
	"math"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"

	"gvisor.dev/gvisor/pkg/bpf"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform/systrap"
	sentryfilter "gvisor.dev/gvisor/runsc/boot/filter"
	sentry "gvisor.dev/gvisor/runsc/boot/filter/config"
	goferfilter "gvisor.dev/gvisor/runsc/fsgofer/filter"
	gofer "gvisor.dev/gvisor/runsc/fsgofer/filter/config"

	"github.com/bottle-tools/bottle/tools/runsc/filters/programs"
)

// install is what gVisor's two Install functions do without a compiled program.
func install(t *testing.T, allow, deny seccomp.SyscallRules, o seccomp.ProgramOptions) []bpf.Instruction {
	t.Helper()
	p := seccomp.Program{RuleSets: []seccomp.RuleSet{{Rules: deny}, {Rules: allow, Action: seccomp.Allow}}, Options: o}
	code, _, err := p.Build()
	if err != nil {
		t.Fatal(err)
	}
	return code
}

// Each program that is linked in is the one that gVisor compiles, with another
// descriptor and process id than those it was compiled with.
func TestFiltersAreGVisors(t *testing.T) {
	if sentryFilters == nil || goferFilters == nil {
		t.Fatal("filters_gen.go is missing: make build writes it")
	}
	quicken([]string{"runsc-sandbox", "boot"})
	quicken([]string{"runsc-gofer", "gofer"})
	t.Cleanup(collectAgain)
	same := func(key string, p precompiledseccomp.Program, found bool, vars precompiledseccomp.Values, want []bpf.Instruction) {
		t.Helper()
		if !found {
			t.Fatalf("there is no program for %s", key)
		}
		got, err := p.RenderInstructions(vars)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: another program than gVisor's rules give: run make build", key)
		}
	}
	for _, o := range programs.SentryOptions() {
		o.Platform = (*systrap.Systrap)(nil).SeccompInfo()
		for _, o.ControllerFD = range []uint32{25, 77} {
			allow, deny := sentry.Rules(o)
			p, found := sentryfilter.GetPrecompiled(o.ConfigKey())
			same(o.ConfigKey(), p, found, o.Vars(), install(t, allow, deny, sentry.SeccompOptions(o)))
		}
	}
	for _, o := range programs.GoferOptions() {
		allow, deny := gofer.Rules(o)
		p, found := goferfilter.GetPrecompiled(o.ConfigKey())
		same(o.ConfigKey(), p, found, o.Vars(), install(t, allow, deny, seccomp.ProgramOptions{}))
	}
}

// What is linked in was made from this version of gVisor, and by another process:
// nothing of the one that made it is in it.
func TestFiltersAreFresh(t *testing.T) {
	for _, of := range []struct {
		name   string
		linked func() []precompiledseccomp.Program
		make   func() ([]precompiledseccomp.Program, error)
	}{{"sandbox", sentryFilters, programs.Sentry}, {"file server", goferFilters, programs.Gofer}} {
		fresh, err := of.make()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.EqualFunc(fresh, of.linked(), func(a, b precompiledseccomp.Program) bool {
			return a.Name == b.Name && slices.Equal(a.Bytecode32, b.Bytecode32) &&
				maps.EqualFunc(a.VarOffsets, b.VarOffsets, slices.Equal[[]int])
		}) {
			t.Errorf("%s: filters_gen.go is old: run make build", of.name)
		}
	}
}

func TestVerb(t *testing.T) {
	for argv, want := range map[string]string{
		"":             "",
		"bottle-runsc": "",
		"bottle-runsc --root=/r --ignore-cgroups run --detach boot": "run",
		"runsc-sandbox --root=/run/boot --log-fd=3 boot --bundle=x": "boot",
		"runsc-gofer --root=/r gofer --bundle /boot":                "gofer",
		"/proc/self/exe umount --sync-fd=3 /proc":                   "umount",
		"bottle-runsc --root=/r exec boot true":                     "exec",
	} {
		if got := verb(strings.Fields(argv)); got != want {
			t.Errorf("%q: %q, want %q", argv, got, want)
		}
	}
}

// The descriptor that makes room stays with runsc run, and no child gets it.
func TestRoomDescriptorIsClosed(t *testing.T) {
	f, err := syscall.Open("/dev/null", syscall.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(f)
	if err := syscall.Dup3(f, roomDescriptor, 0); err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(roomDescriptor)
	if exec.Command("test", "-e", "/proc/self/fd/252").Run() != nil {
		t.Fatal("a child has no such descriptor anyway")
	}
	quicken([]string{"bottle-runsc", "run"})
	defer collectAgain()
	if exec.Command("test", "-e", "/proc/self/fd/252").Run() == nil {
		t.Error("a child of runsc run has the descriptor")
	}
}

// A start that needs much memory gets a collector, and so does what comes after.
func TestCollectorComesBack(t *testing.T) {
	quicken([]string{"bottle-runsc", "exec"})
	if limit := debug.SetMemoryLimit(-1); limit != enough {
		t.Errorf("limit %d", limit)
	}
	collectAgain()
	if percent := debug.SetGCPercent(100); percent != 100 {
		t.Errorf("it is at %d %%", percent)
	}
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 {
		t.Errorf("limit %d", limit)
	}
}
