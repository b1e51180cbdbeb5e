//go:build linux

package smolvm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"
)

// laboratoryLimit bounds the battery: a few boots, and a hundred probes that are
// emulated instruction by instruction.
const laboratoryLimit = 40 * time.Minute

// notAsked are the probes that say nothing about a microVM, each with a part of
// the reason that bottle-probe has to give.
var notAsked = map[string]string{
	"C05": "no --allow '*.…' was given", "D06": "no --allow '*.…' was given",
	"C08": "only beside a running bottle",
	"R02": "no limit was claimed",                               // smolvm has none: a plan with one is refused
	"S06": "--plain", "S13": "the workspace holds no such file", // and with files to hide or pin
	"S09": "--plain", "S10": "--plain", "G01": "--plain", "G02": "--plain", "G03": "--plain", "G04": "--plain",
	"G05": "--plain", "G06": "--plain", "G07": "--plain", "G08": "--plain", "G11": "--plain", "G12": "--plain",
}

// The whole battery from inside of a microVM, in the laboratory of bottle-probe
// run. Guest and host user are root: a plain user's laboratory is a user
// namespace, in which the folders above the image cache seem to be nobody's, so
// that up refuses it. The manifest lies beside the workspace, since a file that is
// pinned in it cannot be held.
func TestProbeLaboratory(t *testing.T) {
	w := newWorld(t, "root")
	w.ok("mkdir policy")
	policy := fmt.Sprintf(`{"format_version":"1.0","bottles":{"dev":{"runtime":"smolvm","image":%q,"user":"root",
		"workspace":{"path":"../ws","mode":"rw"},"hide":["!*.pem"],"resources":{"cpus":1,"memory_mib":512},
		"egress":{"roots":["../ws/canary-ca.pem"],"allow":["allowed.test",{"host":"plain.test","ports":[80],"protocol":"http"}],"inspect":["allowed.test"]}}},
		"agents":{"sh":{"bottle":"dev","command":["sh"]}}}`, filepath.Join(w.dir, "img"))
	if err := os.WriteFile(filepath.Join(w.dir, "policy", "bottle.json"), []byte(policy), 0o644); err != nil {
		t.Fatal(err)
	}
	command := func(more string) string {
		return fmt.Sprintf(`bottle-probe run --allow allowed.test --allow-http plain.test --deny denied.test --inside /workspace --timeout 30m --log probe.log %s \
			--setup 'mkdir -p ../policy && cp %s/policy/bottle.json ../policy/ && bottle-vm trust -m ../policy/bottle.json' \
			--sandbox 'XDG_CACHE_HOME=%s BOTTLE_MANIFEST=@WORKSPACE/../policy/bottle.json bottle run sh -- @PROBE'`,
			more, w.dir, filepath.Join(os.TempDir(), "cache-root"))
	}
	// A repository in the workspace is refused, before anything boots.
	if r := w.sh(command("--only git-hook")); r.code != 69 || !strings.Contains(r.err, "cannot be mounted over a part of /workspace") {
		t.Errorf("a workspace with a repository: %+v", r)
	}
	only := ""
	if words := os.Getenv("BOTTLE_RIG_PROBES"); words != "" {
		only = "--only " + words
	}
	begun := time.Now()
	r := w.within(laboratoryLimit, command("--plain "+only))
	count := map[string]int{}
	for line := range strings.Lines(r.out) {
		v := gjson.Parse(line)
		id, verdict, evidence := v.Get("id").Str, v.Get("verdict").Str, v.Get("evidence").Str
		count[verdict]++
		t.Logf("%s %s %s: %s (%s)", id, verdict, v.Get("name").Str, v.Get("title").Str, evidence)
		switch why, excused := notAsked[id]; {
		case verdict == "n/a" && excused && strings.Contains(evidence, why):
		case verdict == "held" || verdict == "works":
		default:
			t.Errorf("%s", line)
		}
	}
	if r.code != 0 || count["works"] < 2 || only == "" && count["held"] < 100 {
		t.Errorf("status %d, %v, %s", r.code, count, r.err)
	}
	if t.Failed() {
		t.Logf("what the sandbox said:\n%s", w.ok("cat probe.log"))
	}
	measured(t, "bottle-probe run", map[string]any{"verdicts": count, "seconds": int(time.Since(begun).Seconds())})
}
