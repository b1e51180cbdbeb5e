package reaper

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func bindMount(from, to string) error { return unix.Mount(from, to, "", unix.MS_BIND, "") }

func TestParseMounts(t *testing.T) {
	const table = `22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:4 net:[4026531840] /s/b/null-netns rw shared:1 - nsfs nsfs rw
31 22 0:5 / /s/b/with\040space rw - tmpfs tmpfs rw
32 31 0:6 / /s/b/with\040space/deeper\134 rw - tmpfs tmpfs rw
33 22 0:7 / /s/bb rw - tmpfs tmpfs rw
34 22 0:8 / /s/b rw - tmpfs tmpfs rw
short line
`
	got := parseMounts([]byte(table), "/s/b")
	if want := []string{"/s/b", `/s/b/with space/deeper\`, "/s/b/with space", "/s/b/null-netns"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add([]byte("30 22 0:4 / /s/b\\04 rw - x y z"))
	f.Fuzz(func(t *testing.T, table []byte) { parseMounts(table, "/s/b") })
}
