package unit

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/testscripts/harness"
)

// TestHugeInput sends what is far too large or too deep for a golden file. Each
// has to be refused quickly, and with a document.
func TestHugeInput(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED: -short")
	}
	bin := harness.Links(t)
	dir := t.TempDir()
	const head = `{"format_version":"1.0","x-a":`
	for _, c := range []struct {
		name, tool, args string
		input            func() *bytes.Buffer
		code             string
	}{
		{"100 MB document", "bottle-egress", "", func() *bytes.Buffer { return fill(head+`"`, 'a', 100<<20, `"}`) }, "too_large"},
		{"100 MB of white space", "bottle-egress", "", func() *bytes.Buffer { return fill("", ' ', 100<<20, "") }, "empty_input"},
		{"100 MB line that is no JSON", "bottle-pack", "", func() *bytes.Buffer { return fill("", 'x', 100<<20, "") }, "too_large"},
		{"100,000 deep document", "bottle-egress", "", func() *bytes.Buffer { return deep(head, 100_000, "}") }, "too_deep"},
		{"100,000 deep document to up", "bottle-vm", "up", func() *bytes.Buffer { return deep(head, 100_000, "}") }, "too_deep"},
		{"100 MB manifest", "bottle-plan", "-m -", func() *bytes.Buffer { return fill(`{"format_version":"`, '1', 100<<20, `"}`) }, "too_large"},
		{"100,000 deep manifest", "bottle-plan", "-m -", func() *bytes.Buffer { return deep(`{"format_version":"1.0","bottles":`, 100_000, "}") }, "too_deep"},
		{"100,000 open brackets", "bottle-plan", "-m -", func() *bytes.Buffer { return fill("", '[', 100_000, "") }, "too_deep"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), filepath.Join(bin, c.tool), strings.Fields(c.args)...)
			cmd.Env = []string{"HOME=" + dir, "XDG_STATE_HOME=" + dir, "PATH=" + bin}
			cmd.Stdin = c.input()
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if took := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(); took > 20*time.Second {
				t.Errorf("computed for %s", took)
			}
			if err == nil || cmd.ProcessState.ExitCode() != 65 || gjson.GetBytes(out, "error.exit").Int() != 65 || gjson.GetBytes(out, "error.code").Str != c.code {
				t.Errorf("%v, %.300s, stderr %.300s; want 65 %s", err, out, stderr.String(), c.code)
			}
			if len(out) > 4096 || stderr.Len() > 4096 {
				t.Errorf("the answer has %d and %d bytes", len(out), stderr.Len())
			}
		})
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("something was written: %v %v", entries, err)
	}
}

func fill(head string, b byte, n int, tail string) *bytes.Buffer {
	buf := bytes.NewBuffer(make([]byte, 0, n+len(head)+len(tail)))
	buf.WriteString(head)
	buf.Write(bytes.Repeat([]byte{b}, n))
	buf.WriteString(tail)
	return buf
}

func deep(head string, n int, tail string) *bytes.Buffer {
	return bytes.NewBufferString(head + strings.Repeat("[", n) + strings.Repeat("]", n) + tail + fmt.Sprintln())
}
