//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/control"
	"github.com/bottle-tools/bottle/lib/pipelock"
	"github.com/bottle-tools/bottle/lib/plan"
)

// live times a change of a running bottle's rules: from the request at the
// keeper's socket until the answer, at which the rule is in force at the gate,
// written down, and, with pipelock, confirmed by it. Starting bottle-egress comes
// on top of it for a person.
func (b *bench) live() error {
	if err := b.liveWith("builtin", "a host is allowed, live", "a host is denied, live", 10); err != nil {
		return err
	}
	const allowed, denied = "  the same through pipelock", "  denied, with pipelock"
	if _, err := pipelock.Find(b.w.ctx, os.Getenv); err != nil {
		for _, name := range []string{allowed, denied} {
			b.emit(row{Kind: "row", Name: name, Verdict: skipped, Why: "no pipelock: " + err.Error()})
		}
		return nil
	}
	return b.liveWith("pipelock", allowed, denied, 60)
}

func (b *bench) liveWith(proxy, allowed, denied string, most float64) (err error) {
	runDir, id, err := b.liveBottle(proxy)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.w.run("bottle-vm", "down", id)) }()
	change := func(c control.Change) func() error {
		return func() error {
			_, err := control.Ask(runDir, control.Request{Do: "change", Change: &c}, time.Minute)
			return err
		}
	}
	took := map[string][]float64{}
	for round := range b.rounds + 1 {
		host := fmt.Sprintf("h%d.example", round)
		for _, rule := range []plan.Rule{
			{Host: host, Ports: []int{443}, Protocol: "tls", Verdict: "allow", Class: "exact"},
			{Host: host, Ports: []int{}, Protocol: "any", Verdict: "deny", Class: "exact"},
		} {
			ms, err := milliseconds(change(control.Change{Add: []plan.Rule{rule}}))
			if err != nil {
				return err
			}
			if round > 0 {
				took[rule.Verdict] = append(took[rule.Verdict], ms)
			}
		}
		if err := change(control.Change{All: true})(); err != nil {
			return err
		}
	}
	target := medianAtMost(fmt.Sprintf("< %.0f ms", most), most)
	b.emit(newRow(allowed, "ms", took["allow"], "", nil, target))
	b.emit(newRow(denied, "ms", took["deny"], "", nil, target))
	return nil
}

// liveBottle starts a bottle and gives its runtime folder, where its keeper
// listens.
func (b *bench) liveBottle(proxy string) (runDir, id string, err error) {
	other := *b.w
	other.project = filepath.Join(b.w.dir, "live-"+proxy)
	if path := os.Getenv("BOTTLE_PIPELOCK"); path != "" {
		other.env = append(other.env[:len(other.env):len(other.env)], "BOTTLE_PIPELOCK="+path)
	}
	manifest, err := json.Marshal(map[string]any{"format_version": "1.0",
		"bottles": map[string]any{"live": map[string]any{"runtime": "gvisor", "egress": map[string]any{"proxy": proxy, "allow": []string{"a.example"}}}},
		"agents":  map[string]any{"live": map[string]any{"bottle": "live", "command": []string{"true"}}}})
	if err != nil {
		return "", "", err
	}
	if err := errors.Join(os.Mkdir(other.project, 0o700), os.WriteFile(filepath.Join(other.project, "bottle.json"), manifest, 0o600)); err != nil {
		return "", "", err
	}
	var out strings.Builder
	planned, vm := other.command("bottle-plan", "live"), other.command("bottle-vm", "up", "--print-id")
	vm.Stdout = &out
	if err := other.pipeline(planned, vm); err != nil {
		return "", "", err
	}
	id = strings.TrimSpace(out.String())
	record, err := os.ReadFile(filepath.Join(b.w.dir, "state", "bottle", "bottles", id, "record.json"))
	return gjson.GetBytes(record, "run_dir").Str, id, err
}
