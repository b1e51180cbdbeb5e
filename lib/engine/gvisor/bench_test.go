//go:build linux

package gvisor

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/engine"
	"github.com/bottle-tools/bottle/lib/runsc"
)

// raw is runsc as one would call it by hand, for comparison: the smallest
// useful sandbox over the host's /usr.
type raw struct{ path, root, bundle string }

func newRaw(b testing.TB) raw {
	b.Helper()
	dir := base(b)
	r := raw{filepath.Join(programs, runsc.Name), dir + "/r", dir}
	rootfs := dir + "/rootfs"
	for _, d := range []string{"proc", "dev", "sys", "tmp", "run", "usr", "etc/alternatives", "workspace", "ws"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			b.Fatal(err)
		}
	}
	for _, l := range []string{"bin", "lib", "lib64"} {
		os.Symlink("usr/"+l, filepath.Join(rootfs, l))
	}
	spec := runsc.NewSpec(runsc.Container{Hostname: "raw", Rootfs: rootfs, Args: []string{"/bin/sleep", "1000"},
		Env: []string{"PATH=/usr/bin:/bin"}, UIDs: one(0, os.Geteuid()), GIDs: one(0, os.Getegid()), OpenFiles: 1024, WorkingDirectory: "/",
		Binds: []runsc.Bind{{Source: "/usr", Target: "/usr", ReadOnly: true}, {Source: "/etc/alternatives", Target: "/etc/alternatives", ReadOnly: true},
			{Source: rootfs + "/ws", Target: "/workspace"}}})
	if err := os.WriteFile(dir+"/config.json", runsc.Encode(spec), 0o600); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unmountBelow(r.root) })
	return r
}

func (r raw) do(b testing.TB, args ...string) {
	b.Helper()
	cmd := exec.Command(r.path, append([]string{"--root=" + r.root, "--ignore-cgroups", "--network=none", "--overlay2=root:memory"}, args...)...)
	if err := cmd.Run(); err != nil {
		b.Fatalf("runsc %v: %v", args, err)
	}
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Microseconds()) / 1000
}

func timed(fn func()) time.Duration {
	t := time.Now()
	fn()
	return time.Since(t)
}

// BenchmarkBottle compares start and exec with raw runsc, in turns: medians in
// milliseconds, and how many times raw runsc's they are.
func BenchmarkBottle(b *testing.B) {
	testEngine(b)
	const rounds = 12
	r := newRaw(b)
	var rawStart, rawExec, start1, exec1, delete1, rawDelete []time.Duration
	for i := range rounds {
		id := fmt.Sprintf("raw%04d", i)
		rawStart = append(rawStart, timed(func() { r.do(b, "run", "--detach", "--bundle", r.bundle, id) }))
		rawExec = append(rawExec, timed(func() { r.do(b, "exec", id, "/bin/true") }))
		rawDelete = append(rawDelete, timed(func() { r.do(b, "delete", "--force", id) }))

		var bt *bottle
		s := newSpec(b, fmt.Sprintf("bench-%08d", i))
		start1 = append(start1, timed(func() { bt = start(b, s, nil) }))
		exec1 = append(exec1, timed(func() {
			if n, err := bt.Exec(context.Background(), bt.ref, engine.ExecRequest{Argv: []string{"/bin/true"}}); n != 0 || err != nil {
				b.Fatal(n, err)
			}
		}))
		delete1 = append(delete1, timed(func() {
			if err := bt.Delete(context.Background(), bt.ref); err != nil {
				b.Fatal(err)
			}
		}))
	}
	for _, m := range []struct {
		name      string
		ours, raw []time.Duration
	}{{"start", start1, rawStart}, {"exec", exec1, rawExec}, {"delete", delete1, rawDelete}} {
		b.ReportMetric(median(m.ours), m.name+"-ms")
		b.ReportMetric(median(m.ours)/median(m.raw), m.name+"/raw")
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkOutput is the speed of a command's stdout, in MB/s.
func BenchmarkOutput(b *testing.B) {
	bt := start(b, newSpec(b, "output-00000001"), nil)
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer null.Close()
	const size = 256 << 20
	b.SetBytes(size)
	for b.Loop() {
		status, err := bt.Exec(context.Background(), bt.ref, engine.ExecRequest{Argv: []string{"head", "-c", fmt.Sprint(size), "/dev/zero"}, Stdout: null})
		if status != 0 || err != nil {
			b.Fatal(status, err)
		}
	}
}

// BenchmarkRelay is bulk from the host through the relay to a client.
func BenchmarkRelay(b *testing.B) {
	const size = 256 << 20
	bt := start(b, newSpec(b, "relay-00000001"), func(f *os.File) error {
		go func() {
			defer f.Close()
			var one [1]byte
			if n, _ := f.Read(one[:]); n == 0 {
				return
			}
			buf := make([]byte, 256<<10)
			for left := size; left > 0; left -= len(buf) {
				if _, err := f.Write(buf); err != nil {
					return
				}
			}
		}()
		return nil
	})
	b.SetBytes(size)
	for b.Loop() {
		status, _, msg := bt.run(b, "", "python3", "-c", `
import socket
s = socket.create_connection(("127.0.0.1", 3128)); s.sendall(b"x")
buf = bytearray(1 << 20); n = 0
while True:
    k = s.recv_into(buf)
    if not k: break
    n += k
assert n == 256 << 20, n`)
		if status != 0 {
			b.Fatal(msg)
		}
	}
}

// BenchmarkTwenty starts twenty at once, ours and raw runsc's in turns: median
// seconds until all are up (ours: until each helper has said so).
func BenchmarkTwenty(b *testing.B) {
	testEngine(b)
	const n, rounds = 20, 3
	r := newRaw(b)
	var ours, plain []time.Duration
	for round := range rounds {
		plain = append(plain, timed(func() {
			together(n, func(i int) { r.do(b, "run", "--detach", "--bundle", r.bundle, fmt.Sprintf("raw%02d%02d", round, i)) })
		}))
		together(n, func(i int) { r.do(b, "delete", "--force", fmt.Sprintf("raw%02d%02d", round, i)) })
		specs, bottles := make([]*engine.Spec, n), make([]*bottle, n)
		for i := range n {
			specs[i] = newSpec(b, fmt.Sprintf("twenty-%02d%06d", round, i))
		}
		ours = append(ours, timed(func() { together(n, func(i int) { bottles[i] = start(b, specs[i], nil) }) }))
		together(n, func(i int) { bottles[i].Delete(context.Background(), bottles[i].ref) })
	}
	b.ReportMetric(median(ours)/1000, "s")
	b.ReportMetric(median(ours)/median(plain), "x/raw")
	b.ReportMetric(0, "ns/op")
}

func together(n int, fn func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { fn(i) })
	}
	wg.Wait()
}
