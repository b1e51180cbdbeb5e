// Package programs compiles gVisor's seccomp rules for the options that the
// bottle tools run it with.
package programs

import (
	"maps"
	"slices"
	_ "unsafe" // for go:linkname

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/pkg/sentry/platform/systrap"
	sentry "gvisor.dev/gvisor/runsc/boot/filter/config"
	gofer "gvisor.dev/gvisor/runsc/fsgofer/filter/config"
)

// What PrecompiledPrograms of both packages does for each variant that it knows.
// Of the sentry's that are 576, with GPUs and host networks, and take 40 s of CPU
// time; hence not by it.

//go:linkname sentryRules gvisor.dev/gvisor/runsc/boot/filter/config.rules
func sentryRules(sentry.Options, precompiledseccomp.Values) (allow, deny seccomp.SyscallRules)

//go:linkname goferRules gvisor.dev/gvisor/runsc/fsgofer/filter/config.rules
func goferRules(gofer.Options, precompiledseccomp.Values) (allow, deny seccomp.SyscallRules)

// SentryOptions are the sandboxes that there are: no network, no devices, with
// the gofer's folders opened by the sandbox itself (directfs) and without.
func SentryOptions() (all []sentry.Options) {
	for _, direct := range []bool{true, false} {
		all = append(all, sentry.Options{Platform: systrapInfo{(*systrap.Systrap)(nil).SeccompInfo()}, HostFilesystem: direct})
	}
	return all
}

// systrapInfo is what systrap says of itself, but for one rule: a thread of the
// sandbox may be killed by the process itself, and systrap says who that is with
// the process id of whoever asks (os.Getpid in pkg/sentry/platform/systrap/filters.go).
// Here that is the compiler, so it has to be a variable.
type systrapInfo struct{ platform.SeccompInfo }

func (i systrapInfo) SyscallFilters(vars precompiledseccomp.Values) seccomp.SyscallRules {
	const ownPID = "self_pid" // selfPIDVarName in runsc/boot/filter/config
	rules := i.SeccompInfo.SyscallFilters(vars)
	rules.Remove(unix.SYS_RT_TGSIGQUEUEINFO) // Set takes nothing that is there
	rules.Set(unix.SYS_RT_TGSIGQUEUEINFO, seccomp.PerArg{
		seccomp.EqualTo(vars.GetUint64(ownPID)),
		seccomp.AnyValue{},
		seccomp.EqualTo(unix.SIGKILL),
	})
	return rules
}

// GoferOptions are the file servers that there are: no host sockets.
func GoferOptions() (all []gofer.Options) {
	for _, direct := range []bool{true, false} {
		for _, lisafs := range []bool{true, false} {
			all = append(all, gofer.Options{DirectFS: direct, LisafsNeeded: lisafs})
		}
	}
	return all
}

// Sentry compiles the programs of sandboxes.
func Sentry() ([]precompiledseccomp.Program, error) {
	var all []precompiledseccomp.Program
	for _, o := range SentryOptions() {
		p, err := compile(o.ConfigKey(), o.Vars(), sentry.SeccompOptions(o), func(v precompiledseccomp.Values) (allow, deny seccomp.SyscallRules) {
			return sentryRules(o, v)
		})
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// Gofer compiles the programs of file servers.
func Gofer() ([]precompiledseccomp.Program, error) {
	var all []precompiledseccomp.Program
	for _, o := range GoferOptions() {
		p, err := compile(o.ConfigKey(), o.Vars(), seccomp.ProgramOptions{}, func(v precompiledseccomp.Values) (allow, deny seccomp.SyscallRules) {
			return goferRules(o, v)
		})
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// compile leaves room for what is known at run time only (the process id, a
// descriptor). It fails if the program hangs on that in any other way.
func compile(name string, vars precompiledseccomp.Values, options seccomp.ProgramOptions,
	rules func(precompiledseccomp.Values) (allow, deny seccomp.SyscallRules)) (precompiledseccomp.Program, error) {
	return precompiledseccomp.Precompile(name, slices.Collect(maps.Keys(vars)), func(v precompiledseccomp.Values) *seccomp.Program {
		allow, deny := rules(v)
		// Else it is what the kernel of the machine that compiles can do. Linux has
		// this one since 4.14, and gVisor needs a newer one.
		options.DefaultAction = seccomp.KillProcess
		return &seccomp.Program{
			RuleSets: []seccomp.RuleSet{{Rules: deny.Copy()}, {Rules: allow.Copy(), Action: seccomp.Allow}},
			Options:  options,
		}
	})
}
