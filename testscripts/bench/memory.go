//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/tidwall/gjson"
)

// usage is a bottle's memory in MB (10^6 bytes): the proportional set size of
// its keeper, its gate, its sandbox with all children, and its file server.
type usage struct {
	total float64
	roles map[string]float64
}

// memoryOf sums /proc/PID/smaps_rollup over what the bottle's record names, and
// over their descendants: the guest's processes are children of the sandbox.
func memoryOf(w *world, id string) (usage, error) {
	record, err := os.ReadFile(filepath.Join(w.dir, "state", "bottle", "bottles", id, "record.json"))
	if err != nil {
		return usage{}, err
	}
	roles := map[int]string{int(gjson.GetBytes(record, "keeper.pid").Int()): "keeper"}
	gjson.GetBytes(record, "processes").ForEach(func(_, p gjson.Result) bool {
		roles[int(p.Get("pid").Int())] = p.Get("role").Str
		return true
	})
	parents, err := parents()
	if err != nil {
		return usage{}, err
	}
	u := usage{roles: map[string]float64{}}
	for pid := range parents {
		role := roles[pid]
		for at := pid; role == "" && at > 1; at = parents[at] {
			role = roles[parents[at]]
		}
		if role == "" {
			continue
		}
		mb, err := pss(pid)
		if err != nil {
			return usage{}, err
		}
		u.total += mb
		u.roles[role] += mb
	}
	for _, role := range []string{"keeper", "gate", "sandbox", "gofer"} {
		if u.roles[role] == 0 {
			return usage{}, fmt.Errorf("bottle %s: no memory of its %s was found", id, role)
		}
	}
	return u, nil
}

// parents of all processes, by pid.
func parents() (map[int]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	out := map[int]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // it has ended
		}
		// The name is in parentheses and may hold anything; state and parent follow.
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 2 {
			return nil, fmt.Errorf("unreadable /proc/%d/stat", pid)
		}
		if out[pid], err = strconv.Atoi(f[1]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// pss of one process in MB; one that has ended uses nothing.
func pss(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil || len(b) == 0 {
		return 0, nil
	}
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("Pss:")); ok {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(string(rest)), " kB"), 64)
			return kib * 1024 / 1e6, err
		}
	}
	return 0, fmt.Errorf("no Pss in /proc/%d/smaps_rollup", pid)
}
