package main

import (
	"math"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
	_ "unsafe" // for go:linkname

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	sentry "gvisor.dev/gvisor/runsc/boot/filter"
	gofer "gvisor.dev/gvisor/runsc/fsgofer/filter"
)

// The seccomp programs that "make" has compiled (filters_gen.go). Without that
// file there are none, and runsc compiles its rules at each start.
var sentryFilters, goferFilters func() []precompiledseccomp.Program

// gVisor's tables of compiled programs, which its build system fills and its Go
// module leaves empty.

//go:linkname sentryTable gvisor.dev/gvisor/runsc/boot/filter.precompiledPrograms
var sentryTable map[string]precompiledseccomp.Program

//go:linkname goferTable gvisor.dev/gvisor/runsc/fsgofer/filter.precompiledPrograms
var goferTable map[string]precompiledseccomp.Program

// startTime is how long a start is let alone by the garbage collector. It takes a
// twentieth of it, on this and every machine that was tried.
const startTime = 2 * time.Second

// enough memory for a start is a quarter of this; more of it is collected at once.
const enough = 64 << 20

// quicken takes time out of the start of the process that args are for.
func quicken(args []string) {
	debug.SetMemoryLimit(enough)
	debug.SetGCPercent(-1)
	switch verb(args) {
	case "boot":
		sentry.ListPrecompiled() // makes the table, which else is made upon the first look
		register(sentryTable, sentryFilters)
		time.AfterFunc(startTime, collectAgain)
	case "gofer":
		gofer.ListPrecompiled()
		register(goferTable, goferFilters)
		time.AfterFunc(startTime, collectAgain)
	case "run":
		syscall.CloseOnExec(roomDescriptor)
	}
}

// verb gives the subcommand: runsc writes flags before it as --name=value.
func verb(args []string) string {
	for _, a := range args[min(1, len(args)):] {
		if !strings.HasPrefix(a, "-") {
			return a
		}
	}
	return ""
}

func register(table map[string]precompiledseccomp.Program, compiled func() []precompiledseccomp.Program) {
	if compiled == nil {
		return
	}
	for _, p := range compiled() {
		table[p.Name] = p
	}
}

func collectAgain() {
	debug.SetGCPercent(100)
	debug.SetMemoryLimit(math.MaxInt64)
	debug.FreeOSMemory() // a sandbox at rest may not allocate for long
}

// roomDescriptor is lib/runsc's: it is open so that the sandbox is forked with a
// table of 256 descriptors. It is not for the sandbox itself.
const roomDescriptor = 252
