package dlp

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sources gives about size bytes of Go's own source code.
func sources(tb testing.TB, size int) []byte {
	var out []byte
	err := filepath.WalkDir(filepath.Join(runtime.GOROOT(), "src", "net"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		b, err := os.ReadFile(path)
		if out = append(out, b...); len(out) >= size {
			return fs.SkipAll
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return out[:min(size, len(out))]
}

// conversation is what an agent sends: source code in JSON.
func conversation(tb testing.TB, text []byte) []byte {
	type block struct {
		Type string `json:"type"`
		Text string `json:"text"`
	}
	type message struct {
		Role    string  `json:"role"`
		Content []block `json:"content"`
	}
	var ms []message
	for i := 0; i < len(text); i += 8 << 10 {
		role := []string{"user", "assistant"}[i>>13&1]
		ms = append(ms, message{role, []block{{"text", string(text[i:min(len(text), i+8<<10)])}}})
	}
	b, err := json.Marshal(map[string]any{"model": "claude", "max_tokens": 1024, "messages": ms})
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func BenchmarkScan(b *testing.B) {
	const size = 1 << 20
	random := make([]byte, size*3/4)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(random)
	src := sources(b, size)
	for _, c := range []struct {
		name string
		text []byte
	}{
		{"json", conversation(b, src)[:size]},
		{"source", src},
		{"aaaa", []byte(strings.Repeat("a", size))},
		{"base64", []byte(base64.StdEncoding.EncodeToString(random))},
		{"keywords", []byte(strings.Repeat(`api_key="aaaaaaaaaaaaaaaa" `, size/27))},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := New(map[string]string{"KEY": "correct horse battery staple"}, NoisyRules)
			b.SetBytes(int64(len(c.text)))
			before := used()
			for b.Loop() {
				err := s.Each(context.Background(), c.text, Options{}, func(f Finding) bool { return true })
				if err != nil {
					b.Fatal(err)
				}
			}
			mib := float64(b.N) * float64(len(c.text)) / (1 << 20)
			b.ReportMetric((used()-before).Seconds()*1000/mib, "cpu-ms/MiB")
		})
	}
}

// used is the CPU time of this process, which a busy machine does not stretch as
// it does the clock.
func used() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
