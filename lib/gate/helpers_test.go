package gate

import (
	"encoding/json"
	"io"
	"log"
	"os"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/audit"
)

var quiet = log.New(io.Discard, "", 0)

func readEvents(t testing.TB, path string) []audit.Event {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []audit.Event
	for line := range strings.Lines(string(b)) {
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		var e audit.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		out = append(out, e)
	}
	return out
}
