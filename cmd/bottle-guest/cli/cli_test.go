//go:build linux

package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bottle-tools/bottle/lib/fault"
)

func TestStatuses(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "config.json")
	if err := os.WriteFile(bad, []byte(`{"transport":"pigeon"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   []string
		status int
		stderr string
	}{
		{[]string{"--help"}, fault.OK, ""},
		{[]string{"frobnicate"}, fault.Usage, "usage: bottle-guest"},
		{[]string{"tar-out"}, fault.Usage, "usage: bottle-guest"},
		{[]string{"tar-in", "a", "b"}, fault.Usage, "usage: bottle-guest"},
		{[]string{"tar-out", dir + "/none"}, fault.NoInput, "bottle-guest: error: lstat " + dir + "/none: no such file or directory\n"},
		{[]string{"init", dir + "/none"}, fault.Host, "no such file or directory"},
		{[]string{"init", bad}, fault.Host, `unknown transport "pigeon"`},
	} {
		var out, errOut bytes.Buffer
		status := Main(c.args, strings.NewReader(""), &out, &errOut)
		if status != c.status || !strings.Contains(errOut.String(), c.stderr) {
			t.Errorf("%q: %d, %q", c.args, status, errOut.String())
		}
	}
}

func TestTarThroughTheCommand(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	if err := os.WriteFile(src+"/f", []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	var stream, errOut bytes.Buffer
	if status := Main([]string{"tar-out", src + "/f"}, nil, &stream, &errOut); status != 0 {
		t.Fatal(status, errOut.String())
	}
	if status := Main([]string{"tar-in", dst}, &stream, nil, &errOut); status != 0 {
		t.Fatal(status, errOut.String())
	}
	if b, err := os.ReadFile(dst + "/f"); err != nil || string(b) != "content" {
		t.Errorf("%q, %v", b, err)
	}
}
