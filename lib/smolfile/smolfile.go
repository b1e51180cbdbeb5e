// Package smolfile turns a plan into a Smolfile, smolvm's machine description
// in TOML. It is pure.
//
// smolvm refuses a Smolfile with an unknown field, and a Smolfile cannot say
// everything: name, labels, sockets (--mount-socket) and a local image (1.9.1
// takes the image of a Smolfile for a registry's reference) go on the command
// line, by engine smolvm. What is written here is what both pinned versions were
// recorded to accept (testscripts/transcripts/smolvm, smolfile-ok), and they are
// asked by the tests of lib/smolvm.
package smolfile

import (
	"bytes"
	"math"
	"strings"
	"unicode/utf8"

	"github.com/BurntSushi/toml"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Workdir is where commands start in the guest.
const Workdir = "/workspace"

// File is a Smolfile. The guest never gets a network: there is no field for it,
// and "net = false" is always written.
type File struct {
	Env       []plan.EnvVar // the guest's variables; secrets' values never
	Workdir   string        // absolute guest path; empty for the image's own
	CPUs      int           // 1 to 255; 0 leaves smolvm's default
	MemoryMiB int           // 0 leaves smolvm's default

	// Of one host, and so never in a document.
	Entrypoint []string // the workload, run at every start
	Volumes    []string // HOST:GUEST[:ro]
}

// wire has the fields in the order that smolvm names them in.
type wire struct {
	Entrypoint []string `toml:"entrypoint,omitempty"`
	Env        []string `toml:"env,omitempty"`
	Workdir    string   `toml:"workdir,omitempty"`
	CPUs       uint8    `toml:"cpus,omitzero"`
	Memory     uint32   `toml:"memory,omitzero"`
	Net        bool     `toml:"net"`
	Volumes    []string `toml:"volumes,omitempty"`
}

// FromPlan takes what a Smolfile can say from a plan.
func FromPlan(b *plan.Bottle) File {
	return File{
		Env:       b.Env,
		Workdir:   Workdir,
		CPUs:      b.Resources.CPUs,
		MemoryMiB: b.Resources.MemoryMiB,
	}
}

// TOML gives the text. What smolvm could not hold is a fault: 78
// smolfile_limit for a limit beyond its types (cpus is a u8), 65 smolfile_env
// for a variable that no environment can have.
func (f File) TOML() ([]byte, error) {
	if f.CPUs < 0 || f.CPUs > math.MaxUint8 {
		return nil, fault.New(fault.Host, "smolfile_limit", "smolvm takes 1 to %d cpus, not %d", math.MaxUint8, f.CPUs).
			At("resources.cpus").WithHint("ask for fewer cpus")
	}
	if f.MemoryMiB < 0 || f.MemoryMiB > math.MaxUint32 {
		return nil, fault.New(fault.Host, "smolfile_limit", "smolvm takes at most %d MiB of memory, not %d", uint32(math.MaxUint32), f.MemoryMiB).
			At("resources.memory_mib").WithHint("ask for less memory")
	}
	for _, s := range append(append([]string{f.Workdir}, f.Entrypoint...), f.Volumes...) {
		if !utf8.ValidString(s) || strings.Contains(s, "\x00") {
			return nil, fault.New(fault.Host, "smolfile_text", "a Smolfile cannot name %q: TOML is UTF-8", s).
				WithHint("rename it, or use runtime gvisor")
		}
	}
	w := wire{Entrypoint: f.Entrypoint, Workdir: f.Workdir, CPUs: uint8(f.CPUs), Memory: uint32(f.MemoryMiB), Volumes: f.Volumes}
	for _, v := range f.Env {
		if v.Name == "" || strings.ContainsAny(v.Name, "=\x00") || strings.Contains(v.Value, "\x00") {
			return nil, fault.New(fault.Data, "smolfile_env", "variable %q cannot be set", v.Name).
				At("env").WithHint("names are not empty and hold no =, and neither names nor values hold a NUL")
		}
		w.Env = append(w.Env, v.Name+"="+v.Value)
	}
	var out bytes.Buffer
	e := toml.NewEncoder(&out)
	e.Indent = ""
	if err := e.Encode(w); err != nil {
		return nil, fault.New(fault.Bug, "bug", "writing a Smolfile: %w", err)
	}
	return out.Bytes(), nil
}

// Section is the Smolfile for the pack section of a document, empty unless
// smolvm is one of the plan's candidates. bottle-pack writes it and bottle-vm up
// derives it again.
func Section(b *plan.Bottle) (string, error) {
	for _, c := range b.Runtime.Candidates {
		if c.Engine == "smolvm" {
			text, err := FromPlan(b).TOML()
			return string(text), err
		}
	}
	return "", nil
}
