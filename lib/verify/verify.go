// Package verify compares a running bottle with its plan. It reads what the
// kernel says of the bottle's processes, and what the keeper and the gate say of
// themselves, and changes nothing: nothing is sent to the guest.
//
// This package holds what is the same for every engine; engine.Verifier adds
// what an engine knows of its guest.
package verify

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/drift"
	"github.com/bottle-tools/bottle/lib/gateproc"
	"github.com/bottle-tools/bottle/lib/live"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
	"github.com/bottle-tools/bottle/lib/sidecar"
	"github.com/bottle-tools/bottle/lib/state"
)

// Bottle is a running bottle and what it is held against.
type Bottle struct {
	Proc   drift.Proc
	Record *state.Record
	Dir    string // its state folder
	Doc    *plan.Doc
	Plan   *plan.Bottle
	VM     *plan.VM
	Egress *plan.Egress
	// Answer is the keeper's to "report"; AnswerErr is why there is none.
	Answer    *control.Answer
	AnswerErr error
	// Programs is the folder of the tools, and KeeperEnv the names of the
	// variables that a keeper may have.
	Programs  string
	KeeperEnv []string
	// Own are the programs that the engine and the keeper start for a moment.
	Own []string
	// Sockets are those that the engine keeps in the runtime folder, by path.
	Sockets []string
}

// PID of the process that the record names for a role, or 0 if it is not alive.
func (b *Bottle) PID(role string) int {
	for _, c := range slices.Backward(b.Record.Processes) {
		if c.Role == role && state.Alive(c.Process) {
			return c.PID
		}
	}
	return 0
}

// Check does all that is the same for every engine.
func (b *Bottle) Check(f *drift.Findings) {
	b.document(f)
	b.processes(f)
	b.folders(f)
	if b.AnswerErr != nil {
		f.Unknown("gate: rules", "those of the plan", b.AnswerErr)
		f.Unknown("proxy: configuration", "that of the plan", b.AnswerErr)
		f.Unknown("keeper: document", "the one it was started with", b.AnswerErr)
		return
	}
	b.rules(f)
	b.proxy(f)
}

// document compares the record, the document on disk, and the keeper's own.
func (b *Bottle) document(f *drift.Findings) {
	digest, err := plan.Digest(b.Plan)
	if err != nil {
		f.Unknown("document: digest", b.Record.PlanSHA256, err)
		return
	}
	f.Equal("document: digest of bottle", b.Record.PlanSHA256, digest)
	f.Equal("document: vm.id", b.Record.ID, b.VM.ID)
	if b.Answer != nil && b.Answer.Report != nil {
		f.Equal("document: digest of the whole", b.Answer.Report.Document, plan.SHA256(b.Doc.Line()))
	}
	if derived, err := pipelock.Derive(b.Plan); err != nil {
		f.Drift("document: egress", "follows from bottle", err.Error())
	} else {
		was, err1 := plan.Encode(b.Egress)
		is, err2 := plan.Encode(derived)
		if err := errors.Join(err1, err2); err != nil {
			f.Unknown("document: egress", "follows from bottle", err)
		} else {
			f.Equal("document: egress", string(is), string(was))
		}
	}
}

// rules asks what the gate decides by.
func (b *Bottle) rules(f *drift.Findings) {
	r := b.Answer.Report
	if r == nil {
		f.Unknown("gate: rules", b.Egress.RulesSHA256, errors.New("the keeper does not report them"))
		return
	}
	f.Equal("gate: rules", policy.RulesSHA256(b.Plan.Egress.Rules), r.GateRules)
	f.Equal("gate: rules that were added", policy.RulesSHA256(live.Plain(b.Answer.Live)), r.GateLive)
	for _, l := range b.Answer.Live {
		what := fmt.Sprintf("gate: %s %s", l.Verdict, l.Host+l.CIDR)
		if len(l.Ports) > 0 {
			what += " port " + strconv.Itoa(l.Ports[0])
		}
		f.Live(what, "as in the plan", fmt.Sprintf("added by uid %d at %s until %s", l.By, l.Since, cmp.Or(l.Until, "the bottle ends")))
	}
	f.Equal("gate", "up", b.Answer.Gate)
}

// proxy compares pipelock's file with the policy and with what it says it runs.
func (b *Bottle) proxy(f *drift.Findings) {
	if b.VM.Proxy.Name != "pipelock" {
		return
	}
	f.Equal("proxy", "up", b.Answer.Proxy)
	file := filepath.Join(b.Dir, "pipelock", "conf", "pipelock.yaml")
	run, err := os.ReadFile(file)
	if err != nil {
		f.Unknown("proxy: configuration", "that of the plan", err)
		return
	}
	with := *b.Plan
	with.Egress.Rules = slices.Concat(with.Egress.Rules, live.Plain(b.Answer.Live))
	want, err := pipelock.YAML(&with)
	if err != nil {
		f.Unknown("proxy: configuration", "that of the plan", err)
		return
	}
	if _, err := pipelock.CheckRun(run, want, filepath.Join(b.Dir, "pipelock", "kill"), b.VM.ID); err != nil {
		f.Drift("proxy: configuration "+file, "what follows from the rules", err.Error())
	}
	if r := b.Answer.Report; r != nil {
		f.Equal("proxy: digest of "+file, r.ProxyConfig, plan.SHA256(run))
		// A restart takes other ports and looks at the host's addresses anew: the
		// digest in the document is that of the first start.
	}
	if _, err := os.Lstat(filepath.Join(b.Dir, "pipelock", "kill")); !errors.Is(err, fs.ErrNotExist) {
		f.Drift("proxy: kill switch", "absent", "thrown")
	}
}

// processes looks at keeper, gate and proxy, and for others.
func (b *Bottle) processes(f *drift.Findings) {
	keeper := 0
	if b.Record.Keeper != nil && state.Alive(*b.Record.Keeper) {
		keeper = b.Record.Keeper.PID
	}
	tool := func(name string) string { return filepath.Join(b.Programs, name) }
	listens := []string{"unix " + control.Socket(b.Record.RunDir)}
	if b.VM.Runtime != "gvisor" {
		listens = append(listens, "unix "+filepath.Join(b.Record.RunDir, "gate.sock"))
	}
	var gateListens []string
	aside := b.aside()
	if aside != nil {
		// The keeper holds it so that no other takes it while a gate is replaced.
		gateListens = []string{"tcp " + aside.Back}
		listens = append(listens, gateListens...)
	}
	b.process(f, "keeper", keeper, tool("bottle-keeper"), []string{tool("bottle-keeper")}, b.KeeperEnv, listens)
	b.process(f, "gate", b.PID("gate"), tool("bottle-egress"), []string{tool("bottle-egress"), "serve", "--keeper"}, gateproc.EnvNames, gateListens)
	own := append([]string{tool("bottle-keeper"), tool("bottle-egress")}, b.Own...)
	known := []int{b.PID("gate")}
	if b.VM.Proxy.Name == "pipelock" {
		path := b.pipelock(keeper)
		config := filepath.Join(b.Dir, "pipelock", "conf", "pipelock.yaml")
		b.process(f, "proxy", b.PID("proxy"), path, []string{path, "run", "--config", config}, []string{"HOME", "PATH"}, b.proxyPorts(config))
		own = append(own, path)
		known = append(known, b.PID("proxy"))
	}
	b.sidecar(f, aside)
	children, err := b.Proc.Children(keeper)
	if err != nil {
		f.Unknown("keeper: children", "gate, proxy and guest", err)
	}
	for _, c := range b.Record.Processes {
		known = append(known, c.PID)
	}
	for _, pid := range children {
		if exe, _, err := b.Proc.Exe(pid); err == nil && !slices.Contains(known, pid) && !slices.Contains(own, exe) {
			f.Drift("keeper: children", "gate, proxy and guest", fmt.Sprintf("process %d, %s", pid, exe))
		}
	}
}

// aside is how the keeper has started mitmdump; nil for a plan without one, and
// where the keeper does not tell.
func (b *Bottle) aside() *control.Sidecar {
	if b.Plan.Egress.Mitmdump == nil || b.Answer == nil || b.Answer.Report == nil {
		return nil
	}
	return b.Answer.Report.Sidecar
}

// sidecar looks at mitmdump: its process, and the copies in its folder of what
// it runs.
func (b *Bottle) sidecar(f *drift.Findings, aside *control.Sidecar) {
	m := b.Plan.Egress.Mitmdump
	switch {
	case m == nil:
		f.Equal("sidecar", "none", cmp.Or(b.sidecarName(), "none"))
		return
	case aside == nil:
		f.Unknown("sidecar", "as planned", errors.New("the keeper does not tell how it was started"))
		return
	}
	f.Equal("sidecar", "up", b.Answer.Sidecar)
	dir := filepath.Join(b.Dir, sidecar.Name)
	want, err := sidecar.Planned(m.Addons)
	if err != nil {
		f.Unknown("sidecar: configuration", "that of the plan", err)
		return
	}
	if b.VM.Sidecar == nil || b.VM.Sidecar.RunConfigSHA256 != want {
		f.Drift("document: vm.sidecar", want, "another one")
	}
	if is, err := sidecar.Digest(dir, m.Addons, aside.Listen); err != nil {
		f.Drift("sidecar: configuration "+dir, "what follows from the plan", err.Error())
	} else {
		f.Equal("sidecar: configuration "+dir, want, is)
	}
	for _, d := range []string{dir, filepath.Join(dir, "conf"), filepath.Join(dir, "home")} {
		drift.CheckMode(f, d, 0o700, fs.ModeDir)
	}
	pid := b.PID(sidecar.Name)
	if pid == 0 {
		f.Drift("sidecar", "running", "not running")
		return
	}
	// It may be a script: then its interpreter, with an argument at most, stands
	// in front.
	argv := sidecar.Argv(aside.Program, dir, aside.Back)
	if got, err := b.Proc.Argv(pid); err != nil {
		f.Unknown("sidecar: arguments", strings.Join(argv, " "), err)
	} else if at := len(got) - len(argv); at < 0 || at > 2 || !slices.Equal(got[at:], argv) {
		f.Drift("sidecar: arguments", strings.Join(argv, " "), strings.Join(got, " "))
	}
	if exe, replaced, err := b.Proc.Exe(pid); err != nil {
		f.Unknown("sidecar: program", aside.Program, err)
	} else if replaced {
		f.Drift("sidecar: program", aside.Program, exe+", which was replaced or removed since")
	}
	drift.CheckEnv(f, b.Proc, "sidecar", pid, sidecar.EnvNames)
	drift.CheckSockets(f, b.Proc, "sidecar", pid, []string{"tcp " + aside.Listen})
}

func (b *Bottle) sidecarName() string {
	if b.VM.Sidecar == nil {
		return ""
	}
	return b.VM.Sidecar.Name
}

// pipelock is the program that the keeper was given, or found.
func (b *Bottle) pipelock(keeper int) string {
	if p := b.Proc.Env(keeper, "BOTTLE_PIPELOCK"); p != "" {
		return p
	}
	for _, dir := range filepath.SplitList(b.Proc.Env(keeper, "PATH")) {
		p := filepath.Join(dir, "pipelock")
		if fi, err := os.Stat(p); err == nil && filepath.IsAbs(dir) && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return p
		}
	}
	return "pipelock"
}

// proxyPorts are where pipelock is to listen, as its file says.
func (b *Bottle) proxyPorts(config string) []string {
	run, err := os.ReadFile(config)
	if err != nil {
		return nil // the configuration is a finding of its own
	}
	listen, metrics, err := pipelock.Ports(run)
	if err != nil {
		return nil
	}
	return []string{"tcp " + listen, "tcp " + metrics}
}

// process looks at one process of ours: its program, arguments, variables and
// sockets.
func (b *Bottle) process(f *drift.Findings, role string, pid int, exe string, argv, env, listens []string) {
	if pid == 0 {
		f.Drift(role, "running", "not running")
		return
	}
	drift.CheckProgram(f, b.Proc, role, pid, exe)
	if got, err := b.Proc.Argv(pid); err != nil {
		f.Unknown(role+": arguments", strings.Join(argv, " "), err)
	} else {
		f.Equal(role+": arguments", strings.Join(argv, " "), strings.Join(got, " "))
	}
	drift.CheckEnv(f, b.Proc, role, pid, env)
	drift.CheckSockets(f, b.Proc, role, pid, listens)
}

// folders looks at the modes of what is the bottle's own, and for more than that
// in its runtime folder.
func (b *Bottle) folders(f *drift.Findings) {
	for _, dir := range []string{b.Dir, b.Record.RunDir} {
		drift.CheckMode(f, dir, 0o700, fs.ModeDir)
	}
	entries, err := os.ReadDir(b.Record.RunDir)
	if err != nil {
		f.Unknown("runtime folder", "readable", err)
	}
	expected := []string{control.Socket(b.Record.RunDir)}
	expected = append(expected, b.Sockets...)
	if b.VM.Runtime != "gvisor" {
		expected = append(expected, filepath.Join(b.Record.RunDir, "gate.sock"))
	}
	var found []string
	for _, e := range entries {
		path := filepath.Join(b.Record.RunDir, e.Name())
		if e.IsDir() {
			inner, err := os.ReadDir(path)
			if err != nil {
				f.Unknown("runtime folder", "readable", err)
			}
			for _, i := range inner {
				if i.Type()&fs.ModeSocket != 0 {
					found = append(found, filepath.Join(path, i.Name()))
				}
			}
			continue
		}
		found = append(found, path)
	}
	f.Same("runtime folder", expected, found)
	for _, name := range []string{"record.json", "document.json", "lock", "keeper.log", "engine.log"} {
		drift.CheckMode(f, filepath.Join(b.Dir, name), 0o600, 0)
	}
	if b.VM.Proxy.Name == "pipelock" {
		drift.CheckMode(f, filepath.Join(b.Dir, "pipelock"), 0o700, fs.ModeDir)
		drift.CheckMode(f, filepath.Join(b.Dir, "pipelock", "conf", "pipelock.yaml"), 0o600, 0)
	}
}
