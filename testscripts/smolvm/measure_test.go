//go:build linux

package smolvm

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"
)

// measured is a line of what the rig measured: for people and their scripts, not
// for a verdict on a machine that is emulated.
func measured(t *testing.T, what string, v map[string]any) {
	t.Helper()
	v["measured"], v["emulated"], v["smolvm"] = what, true, os.Getenv("BOTTLE_SMOLVM")
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println(string(raw))
}

// TestProbe tries what bottle-probe knows beside a running bottle, as an agent and
// as root of the guest.
func TestProbe(t *testing.T) {
	w := newWorld(t, "user")
	w.manifest(`,"egress":{"allow":["allowed.test",{"host":"plain.test","ports":[80],"protocol":"http"}],"inspect":["allowed.test"]}`)
	id := w.up()
	r := w.sh("bottle-probe " + id)
	count := map[string]int{}
	for line := range strings.Lines(r.out) {
		v := gjson.Parse(line)
		verdict := v.Get("verdict").Str
		count[verdict]++
		switch verdict {
		case "held", "works":
			t.Logf("%s %s: %s", v.Get("id").Str, verdict, v.Get("title").Str)
		case "n/a":
			if !strings.Contains(v.Get("evidence").Str, "laboratory") {
				t.Logf("%s n/a: %s (%s)", v.Get("id").Str, v.Get("title").Str, v.Get("evidence").Str)
			}
		default:
			t.Error(line)
		}
	}
	if r.code != 0 || count["works"] != 1 || count["held"] < 12 {
		t.Errorf("status %d, %v, %s", r.code, count, r.err)
	}
	measured(t, "bottle-probe ID", map[string]any{"verdicts": count})
}

// TestMeasured: how long until a command has run in a new bottle, beside the same
// by smolvm alone, and what a bottle holds of memory.
func TestMeasured(t *testing.T) { eachUser(t, measure) }

func measure(t *testing.T, w *world) {
	w.manifest("")
	warm := w.sh("bottle-plan sh | bottle-vm up --warm --print-id >id && bottle-vm down $(cat id)")
	if warm.code == 0 {
		t.Cleanup(w.forget)
	} else if warm.code != 78 {
		t.Errorf("a warm start: %+v", warm)
	}
	rounds := 3
	if n, err := strconv.Atoi(os.Getenv("BOTTLE_RIG_ROUNDS")); err == nil && n > 0 {
		rounds = n
	}
	timed := func(script string) float64 {
		begun := time.Now()
		w.ok(script)
		return float64(time.Since(begun).Milliseconds())
	}
	w.ok("mkdir more")
	const limits = " --cpus 1 --mem 512"
	took := map[string][]float64{}
	for round := range rounds + 1 { // the first warms caches
		ours := timed("bottle-plan sh | bottle-vm up --print-id >id && bottle-vm exec $(cat id) -- true")
		if round == rounds {
			w.memory(t)
		}
		w.ok("bottle-vm down $(cat id)")
		copied := 0.0
		if warm.code == 0 {
			copied = timed("bottle-plan sh | bottle-vm up --warm --print-id >id && bottle-vm exec $(cat id) -- true")
			w.ok("bottle-vm down $(cat id)")
		}
		bare := timed("$BOTTLE_SMOLVM machine create --name bare --image $PWD/img/" + limits + " >/dev/null && $BOTTLE_SMOLVM machine start --name bare >/dev/null && " +
			"until $BOTTLE_SMOLVM machine exec --name bare -- true; do sleep 0.2; done")
		w.ok("$BOTTLE_SMOLVM machine delete --name bare -f")
		run := timed("$BOTTLE_SMOLVM machine run --image $PWD/img/" + limits + " -- true")
		// A bottle has two folders of the host, which smolvm alone takes its time for.
		folders := timed("$BOTTLE_SMOLVM machine run --image $PWD/img/" + limits + " -v $PWD/more:/opt/bottle:ro -v $PWD/ws:/workspace -- true")
		if round > 0 {
			for name, ms := range map[string]float64{"bottle": ours, "bottle --warm": copied, "create+start+exec": bare, "machine run": run, "machine run with two folders": folders} {
				if ms > 0 {
					took[name] = append(took[name], ms)
				}
			}
		}
	}
	median := func(name string) float64 {
		s := slices.Sorted(slices.Values(took[name]))
		return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
	}
	ratios := map[string]float64{}
	for _, ours := range []string{"bottle", "bottle --warm"} {
		if took[ours] == nil {
			continue
		}
		for _, theirs := range []string{"machine run", "machine run with two folders", "create+start+exec"} {
			ratios[ours+" / "+theirs] = median(ours) / median(theirs)
		}
	}
	measured(t, "create to first exec", map[string]any{"unit": "ms", "rounds": took, "ratios": ratios, "target": 1.1})
}

var pss = regexp.MustCompile(`(?m)^(Rss|Pss): +(\d+) kB$`)

// memory of each process of the one bottle that runs.
func (w *world) memory(t *testing.T) {
	t.Helper()
	record := w.ok("cat $(bottle-vm status $(cat id) | jq -r .state_dir)/record.json")
	pids := map[string]int64{"keeper": gjson.Get(record, "keeper.pid").Int()}
	for _, c := range gjson.Get(record, "processes").Array() {
		pids[c.Get("role").Str] = c.Get("pid").Int()
	}
	sizes, total := map[string]any{}, 0
	for role, pid := range pids {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			t.Fatal(err)
		}
		size := map[string]int{}
		for _, m := range pss.FindAllStringSubmatch(string(raw), -1) {
			n, _ := strconv.Atoi(m[2])
			size[strings.ToLower(m[1])] = n
		}
		sizes[role], total = size, total+size["pss"]
	}
	if len(sizes) < 3 {
		t.Errorf("processes: %v", pids)
	}
	measured(t, "memory of a bottle at rest", map[string]any{"unit": "KiB", "processes": sizes, "pss": total, "guest_memory_mib": 512})
}
