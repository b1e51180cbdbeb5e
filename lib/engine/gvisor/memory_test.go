//go:build linux

package gvisor

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// BenchmarkMemory is the proportional set size of a sandbox, with its helper
// idle, in MB: of one among ten.
func BenchmarkMemory(b *testing.B) {
	const n = 10
	var roots []string
	for i := range n {
		s := newSpec(b, fmt.Sprintf("pss-%08d", i))
		start(b, s, nil)
		roots = append(roots, filepath.Join(s.RunDir, "r"))
	}
	total := 0
	seen := map[int]bool{}
	for _, root := range roots {
		for _, p := range processesOf(root) {
			total += pss(b, p.PID)
			seen[p.PID] = true
		}
	}
	// The guest's own processes are children of the sandbox.
	entries, err := os.ReadDir("/proc")
	if err != nil {
		b.Fatal(err)
	}
	for grown := true; grown; {
		grown = false
		for _, e := range entries {
			pid, err := strconv.Atoi(e.Name())
			if err != nil || seen[pid] {
				continue
			}
			status, err := os.ReadFile("/proc/" + e.Name() + "/status")
			if err != nil {
				continue
			}
			if ppid := field(string(status), "PPid:"); len(ppid) == 1 {
				if parent, _ := strconv.Atoi(ppid[0]); seen[parent] {
					total += pss(b, pid)
					seen[pid], grown = true, true
				}
			}
		}
	}
	b.ReportMetric(float64(total)/n/1024, "MB/bottle")
	b.ReportMetric(0, "ns/op")
}

func pss(b *testing.B, pid int) int {
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	f := field(string(rollup), "Pss:")
	if len(f) == 0 {
		return 0
	}
	kb, err := strconv.Atoi(f[0])
	if err != nil {
		b.Fatal(err)
	}
	return kb
}
