package gitleaks

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/dlp"
)

// BenchmarkJSON: the same MiB of JSON for gitleaks' own detector, in pieces as
// large as it reads itself, and for lib/dlp, which decodes as well.
func BenchmarkJSON(b *testing.B) {
	names, err := filepath.Glob(filepath.Join(runtime.GOROOT(), "src", "net", "http", "*.go"))
	if err != nil {
		b.Fatal(err)
	}
	var texts []string
	size := 0
	for _, n := range names {
		text, err := os.ReadFile(n)
		if err != nil {
			b.Fatal(err)
		}
		texts = append(texts, string(text))
		if size += len(text); size > 1<<20 {
			break
		}
	}
	body, err := json.Marshal(texts)
	if err != nil {
		b.Fatal(err)
	}
	run := func(name string, scan func()) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(body)))
			before := used()
			for b.Loop() {
				scan()
			}
			b.ReportMetric((used()-before).Seconds()*1000*(1<<20)/float64(b.N*len(body)), "cpu-ms/MiB")
		})
	}
	run("gitleaks", func() {
		d := detector()
		d.MaxDecodeDepth = 5
		for i := 0; i < len(body); i += fragment {
			d.DetectBytes(body[i:min(len(body), i+fragment)])
		}
	})
	run("bottle", func() {
		if err := scanner.Each(context.Background(), body, dlp.Options{}, func(dlp.Finding) bool { return true }); err != nil {
			b.Fatal(err)
		}
	})
}

func used() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
