//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/plan"
	"github.com/bottle-tools/bottle/lib/policy"
)

// bench is one run.
type bench struct {
	w      *world
	raw    *raw
	rounds int
	fleet  int
	cache  string // of the peer
	emit   func(row)
}

// section is a part that stands by itself: one that fails does not stop the next.
type section struct {
	name string
	run  func(*bench) error
}

var sections = []section{
	{"stages", (*bench).stages},
	{"start", (*bench).start},
	{"warm", (*bench).warm},
	{"run", (*bench).wholeRun},
	{"fleet", (*bench).fleetOf},
	{"allowlist", (*bench).allowlist},
	{"gate", (*bench).gates},
	{"dlp", (*bench).screening},
	{"bulk", (*bench).bulk},
	{"live", (*bench).live},
	{"smolvm", (*bench).wrapped},
}

// stages takes the pipeline apart, one after the other, with each stage's
// document in a file; exec stands beside raw runsc in the same sandbox.
func (b *bench) stages() error {
	w := b.w
	file := func(name string) string { return filepath.Join(w.dir, name+".json") }
	stage := func(from, to, name string, args ...string) func() error {
		return func() error {
			cmd := w.command(name, args...)
			out, err := os.Create(file(to))
			if err != nil {
				return err
			}
			defer out.Close()
			cmd.Stdout = out
			if from != "" {
				in, err := os.Open(file(from))
				if err != nil {
					return err
				}
				defer in.Close()
				cmd.Stdin = in
			}
			return w.pipeline(cmd)
		}
	}
	var id, root string
	steps := []struct {
		name string
		run  func() error
	}{
		{"true", func() error { return w.run("/bin/true") }},
		{"plan", stage("", "plan", "bottle-plan", "bash")},
		{"egress", stage("plan", "egress", "bottle-egress")},
		{"pack", stage("egress", "pack", "bottle-pack")},
		{"up", stage("pack", "vm", "bottle-vm", "up")},
		{"ask", func() (err error) { id, root, err = b.where(file("vm")); return err }},
		{"exec", func() error { return w.run("bottle-vm", "exec", id, "--", "true") }},
		{"stock exec", func() error { return b.rawExec(b.raw.stock, id, root) }},
		{"slim exec", func() error { return b.rawExec(b.raw.slim, id, root) }},
		{"down", func() error { return w.run("bottle-vm", "down", id) }},
	}
	took := map[string][]float64{}
	for round := range b.rounds + 1 {
		for _, s := range steps {
			ms, err := milliseconds(s.run)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			if round > 0 {
				took[s.name] = append(took[s.name], ms)
			}
		}
	}
	b.emit(newRow("bottle-plan", "ms", took["plan"], "/bin/true", took["true"], medianAtMost("< 5 ms", 5)))
	b.emit(newRow("exec into a running bottle", "ms", took["exec"], "runsc exec", took["stock exec"], ratioAtMost("<= 25/15 of raw", 25.0/15)))
	b.emit(newRow("  the same beside our runsc", "ms", took["exec"], "bottle-runsc exec", took["slim exec"], nil))
	for _, name := range []string{"plan", "egress", "pack", "up", "exec", "down"} {
		b.emit(newRow("  stage "+name, "ms", took[name], "", nil, nil))
	}
	return nil
}

// where reads a bottle's id and runsc's state folder.
func (b *bench) where(document string) (id, root string, err error) {
	doc, err := os.ReadFile(document)
	if err != nil {
		return "", "", err
	}
	id = gjson.GetBytes(doc, "vm.id").Str
	record, err := os.ReadFile(filepath.Join(gjson.GetBytes(doc, "vm.state_dir").Str, "record.json"))
	return id, filepath.Join(gjson.GetBytes(record, "run_dir").Str, "r"), err
}

func (b *bench) rawExec(runsc, id, root string) error {
	s := sandbox{raw: b.raw, runsc: runsc, id: id, root: root}
	return s.call("exec", id, "/bin/true")
}

// start puts the four stages, as a pipe, beside raw runsc with the same
// sandbox: gVisor's own, and then the one that bottles use.
func (b *bench) start() error {
	var id string
	var box *sandbox
	beside := func(runsc string) (ours, raw []float64, err error) {
		return pairs(b.rounds,
			func() (err error) { id, err = b.w.up(4); return err },
			func() (err error) {
				if box, err = b.raw.fresh(runsc); err != nil {
					return err
				}
				return box.run()
			},
			func() error { return b.w.run("bottle-vm", "down", id) },
			func() error { return box.remove() })
	}
	ours, raw, err := beside(b.raw.stock)
	if err != nil {
		return err
	}
	b.emit(newRow("plan | egress | pack | up", "ms", ours, "runsc run", raw, addsAtMost("adds < 20 ms", 20)))
	if ours, raw, err = beside(b.raw.slim); err != nil {
		return err
	}
	b.emit(newRow("  the same beside our runsc", "ms", ours, "bottle-runsc run", raw, nil))
	return nil
}

// wholeRun is one command in a new bottle, from the plan to the last trace
// being gone, beside the peer with an allow list.
func (b *bench) wholeRun() error {
	const name, target = "bottle run bash -- echo hi", "<= 1/2 of srt"
	bottle := filepath.Join(b.w.scripts, "bottle")
	run := func() error {
		out, err := b.w.output(bottle, "run", "bash", "--", "echo", "hi")
		if err == nil && string(out) != "hi\n" {
			err = fmt.Errorf("bottle run printed %q", out)
		}
		return err
	}
	p, err := newPeer(b.w, b.cache)
	if err != nil {
		var ours []float64
		for range b.rounds {
			ms, err := milliseconds(run)
			if err != nil {
				return err
			}
			ours = append(ours, ms)
		}
		r := newRow(name, "ms", ours, "", nil, nil)
		r.Target, r.Verdict, r.Why = target, skipped, "no srt to compare with: "+err.Error()
		b.emit(r)
		return nil
	}
	ours, beside, err := pairs(b.rounds, run, p.run, nil, nil)
	if err != nil {
		return err
	}
	b.emit(newRow(name, "ms", ours, "srt 0.0.83 ("+p.version()+")", beside, ratioAtMost(target, 0.5)))
	return nil
}

// fleetOf starts many at once, and weighs them while they are there.
func (b *bench) fleetOf() error {
	var boxes []*sandbox
	var weight []float64
	roles := map[string][]float64{}
	started := func() ([]string, error) {
		ids, err := b.w.ids()
		ids = slices.DeleteFunc(ids, func(id string) bool { return id == b.raw.bottle })
		if err == nil && len(ids) != b.fleet {
			err = fmt.Errorf("%d bottles are there, and %d were started", len(ids), b.fleet)
		}
		return ids, err
	}
	down := func() error {
		ids, err := started()
		if err != nil {
			return err
		}
		return b.w.run("bottle-vm", append([]string{"down"}, ids...)...)
	}
	weigh := func() error {
		time.Sleep(500 * time.Millisecond) // what is freed after a start has gone back
		ids, err := started()
		if err != nil {
			return err
		}
		for _, id := range ids {
			u, err := memoryOf(b.w, id)
			if err != nil {
				return err
			}
			weight = append(weight, u.total)
			for role, mb := range u.roles {
				roles[role] = append(roles[role], mb)
			}
		}
		return down()
	}
	beside := func(runsc string, after func() error) (ours, raw []float64, err error) {
		return pairs(b.rounds,
			func() error { return together(b.fleet, func(int) error { _, err := b.w.up(2); return err }) },
			func() error {
				boxes = make([]*sandbox, b.fleet)
				return together(b.fleet, func(i int) (err error) {
					if boxes[i], err = b.raw.fresh(runsc); err != nil {
						return err
					}
					return boxes[i].run()
				})
			},
			after,
			func() error {
				return together(b.fleet, func(i int) error { return boxes[i].remove() })
			})
	}
	ours, raw, err := beside(b.raw.stock, weigh)
	if err != nil {
		return err
	}
	b.emit(newRow(fmt.Sprintf("%d bottles up at once", b.fleet), "ms", ours, fmt.Sprintf("%d x runsc run", b.fleet), raw, ratioAtMost("<= 2 x raw", 2)))
	if ours, raw, err = beside(b.raw.slim, down); err != nil {
		return err
	}
	b.emit(newRow("  the same beside our runsc", "ms", ours, fmt.Sprintf("%d x bottle-runsc run", b.fleet), raw, nil))
	b.emit(newRow("memory of a bottle (PSS)", "MB", weight, "", nil, medianAtMost("<= 40 MB (aim 30)", 40)))
	for _, role := range []string{"keeper", "gate", "sandbox", "gofer"} {
		b.emit(newRow("  of it "+role, "MB", roles[role], "", nil, nil))
	}
	return nil
}

// many is the number of entries in the long allowlist.
const many = 100_000

// allowlist plans a long one, and asks it for decisions.
func (b *bench) allowlist() error {
	path := filepath.Join(b.w.dir, "many.json")
	if err := os.WriteFile(path, longManifest(many), 0o600); err != nil {
		return err
	}
	var doc bytes.Buffer
	planOf := func(out io.Writer) func() error {
		return func() error {
			cmd := b.w.command("bottle-plan", "-m", path, "bash")
			cmd.Stdout = out
			return b.w.pipeline(cmd)
		}
	}
	if err := planOf(&doc)(); err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	ours, _, err := pairs(b.rounds, planOf(null), func() error { return nil }, nil, nil)
	if err != nil {
		return err
	}
	b.emit(newRow("plan of 100,000 entries", "ms", ours, "", nil, medianAtMost("< 500 ms", 500)))

	d, err := plan.Parse(bytes.TrimSpace(doc.Bytes()))
	if err != nil {
		return err
	}
	bottle, err := d.Bottle()
	if err != nil {
		return err
	}
	m, err := policy.Compile(bottle.Egress.Rules)
	if err != nil {
		return err
	}
	took, err := decisions(m)
	if err != nil {
		return err
	}
	b.emit(newRow("a decision among 100,000", "ms", took, "", nil, medianAtMost("< 0.1 ms", 0.1)))
	return nil
}

// longManifest mixes exact names, wildcards and addresses.
func longManifest(n int) []byte {
	allow := make([]any, n)
	for i := range allow {
		switch i % 10 {
		case 0:
			allow[i] = fmt.Sprintf("*.w%d.example%d.org", i, i%1000)
		case 1:
			allow[i] = map[string]string{"cidr": fmt.Sprintf("20.%d.%d.%d/32", i>>16&255, i>>8&255, i&255)}
		default:
			allow[i] = fmt.Sprintf("h%d.example%d.com", i, i%1000)
		}
	}
	raw, err := json.Marshal(map[string]any{
		"format_version": "1.0",
		"bottles":        map[string]any{"dev": map[string]any{"egress": map[string]any{"allow": allow}}},
		"agents":         map[string]any{"bash": map[string]any{"bottle": "dev", "command": []string{"bash"}}},
	})
	if err != nil {
		panic(err) // strings only
	}
	return raw
}

// decisions times single ones, of each kind in turn, and looks that they are right.
func decisions(m *policy.Matcher) ([]float64, error) {
	var took []float64
	var errs []error
	for i := range 10_000 {
		n := i*97%many/10*10 + 2 // an exact name
		host, want := fmt.Sprintf("h%d.example%d.com", n, n%1000), true
		switch i % 4 {
		case 1:
			host = fmt.Sprintf("a.b.w%d.example%d.org", n-2, n%1000-2)
		case 2:
			host, want = fmt.Sprintf("h%d.example%d.net", n, n%1000), false
		case 3:
			k := n - 1
			host = fmt.Sprintf("20.%d.%d.%d", k>>16&255, k>>8&255, k&255)
		}
		start := time.Now()
		d := m.Decide(host, 443)
		took = append(took, float64(time.Since(start).Nanoseconds())/1e6)
		if d.Allow != want {
			errs = append(errs, fmt.Errorf("%s is decided wrongly", host))
		}
	}
	return took, errors.Join(errs...)
}
