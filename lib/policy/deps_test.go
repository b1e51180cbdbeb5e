package policy

import (
	"os/exec"
	"strings"
	"testing"
)

// The pure packages reach, through whatever they import, neither the network
// nor other programs.
func TestPureDependencies(t *testing.T) {
	const module = "github.com/bottle-tools/bottle/lib/"
	for _, pkg := range []string{"plan", "manifest", "policy"} {
		out, err := exec.Command("go", "list", "-deps", module+pkg).CombinedOutput()
		if err != nil {
			t.Fatalf("go list: %v: %s", err, out)
		}
		deps := strings.Fields(string(out))
		if len(deps) < 20 {
			t.Fatalf("%s has only %d dependencies: %s", pkg, len(deps), out)
		}
		for _, d := range deps {
			switch d {
			case "net", "os/exec", "net/http", "crypto/tls", "plugin":
				t.Errorf("lib/%s depends on %s", pkg, d)
			}
			if strings.HasPrefix(d, "github.com/bottle-tools/bottle/cmd/") {
				t.Errorf("lib/%s depends on %s", pkg, d)
			}
		}
	}
}
