// Command dlpcorpus measures what lib/dlp finds where nothing is to be found:
// source code that everybody has, and the requests that an agent would send
// with it. docs/dlp.md publishes what it prints.
//
//	go run ./testscripts/dlpcorpus [-v] [FOLDER...]
//
// Without folders it takes the sources of the Go that runs it and the module
// cache, without gitleaks itself, whose files are full of examples. Every rule
// counts, those too that are off by default.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/bottle-tools/bottle/lib/dlp"
)

// Bounds that make a run take minutes.
const (
	maxFile    = 256 << 10
	perRequest = 12 // files in a conversation
)

var (
	verbose = flag.Bool("v", false, "name the files")
	most    = flag.Int64("mib", 256, "how many `MiB` of each folder at most")
)

func main() {
	flag.Parse()
	folders := flag.Args()
	if len(folders) == 0 {
		out, err := exec.Command("go", "env", "GOROOT", "GOMODCACHE").Output()
		if err != nil {
			fmt.Fprintln(os.Stderr, "dlpcorpus: go env:", err)
			os.Exit(1)
		}
		lines := strings.Fields(string(out))
		folders = []string{filepath.Join(lines[0], "src"), lines[1]}
	}
	for _, f := range folders {
		if err := measure(f); err != nil {
			fmt.Fprintln(os.Stderr, "dlpcorpus:", err)
			os.Exit(1)
		}
	}
}

type count struct {
	texts, refused int
	bytes          int64
	hit            map[string]int // by rule: texts with a finding
	any, anyOn     int            // texts with one; with one of a rule that is on
	cpu            time.Duration
}

func measure(root string) error {
	files, requests := count{hit: map[string]int{}}, count{hit: map[string]int{}}
	scanner := dlp.New(nil, nil)
	var batch, names []string
	send := func() error {
		body, err := request(batch)
		name := "a request with " + strings.Join(names, ", ")
		batch, names = batch[:0], names[:0]
		if err != nil {
			return err
		}
		return requests.scan(scanner, name, body)
	}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.Contains(path, "gitleaks") || d.Name() == "cache" && filepath.Base(root) == "mod") {
			return fs.SkipDir
		}
		info, err := d.Info()
		if err != nil || !d.Type().IsRegular() || info.Size() == 0 || info.Size() > maxFile {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil || !utf8.Valid(b) || bytes.IndexByte(b, 0) >= 0 {
			return err
		}
		if err := files.scan(scanner, path, b); err != nil {
			return err
		}
		names = append(names, strings.TrimPrefix(path, root))
		if batch = append(batch, string(b)); len(batch) == perRequest {
			if err := send(); err != nil {
				return err
			}
		}
		if files.bytes > *most<<20 {
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", root)
	files.print("files")
	requests.print("requests")
	return nil
}

func (c *count) scan(s *dlp.Scanner, name string, text []byte) error {
	c.texts++
	c.bytes += int64(len(text))
	found := map[string]bool{}
	before := used()
	err := s.Each(context.Background(), text, dlp.Options{}, func(f dlp.Finding) bool {
		if *verbose && !found[f.Rule] && !slices.Contains(dlp.NoisyRules, f.Rule) {
			fmt.Printf("%s: %s: %.80q\n", name, f.Rule, f.Text)
		}
		found[f.Rule] = true
		return true
	})
	c.cpu += used() - before
	if err != nil {
		c.refused++
		fmt.Printf("%s: refused: %v\n", name, err)
		return nil
	}
	if len(found) > 0 {
		c.any++
	}
	on := false
	for r := range found {
		c.hit[r]++
		on = on || !slices.Contains(dlp.NoisyRules, r)
	}
	if on {
		c.anyOn++
	}
	return nil
}

func used() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func (c *count) print(what string) {
	share := func(n int) float64 { return 100 * float64(n) / float64(max(1, c.texts)) }
	mib := float64(c.bytes) / (1 << 20)
	fmt.Printf("  %d %s, %.0f MiB, %.0f ms of CPU a MiB: %d refused unscanned, %d (%.2f %%) with a finding, %d (%.2f %%) with one that blocks\n",
		c.texts, what, mib, float64(c.cpu.Milliseconds())/mib, c.refused, c.any, share(c.any), c.anyOn, share(c.anyOn))
	for _, r := range slices.SortedFunc(maps.Keys(c.hit), func(a, b string) int {
		return cmp.Or(c.hit[b]-c.hit[a], strings.Compare(a, b))
	}) {
		note := ""
		if slices.Contains(dlp.NoisyRules, r) {
			note = " (off)"
		}
		fmt.Printf("    %6d %6.2f %%  %s%s\n", c.hit[r], share(c.hit[r]), r, note)
	}
}

// request is what an agent sends to an API of the usual form: the files as
// results of a tool, each line with its number as agents show them.
func request(files []string) ([]byte, error) {
	type block struct {
		Type      string `json:"type"`
		ID        string `json:"tool_use_id,omitempty"`
		Text      string `json:"text,omitempty"`
		Content   string `json:"content,omitempty"`
		IsError   bool   `json:"is_error,omitempty"`
		CacheHint any    `json:"cache_control,omitempty"`
	}
	type message struct {
		Role    string  `json:"role"`
		Content []block `json:"content"`
	}
	var ms []message
	for i, f := range files {
		var b strings.Builder
		n := 0
		for l := range strings.Lines(f) {
			n++
			fmt.Fprintf(&b, "%6d\t%s", n, l)
		}
		id := fmt.Sprintf("toolu_%022d", i)
		ms = append(ms,
			message{"assistant", []block{{Type: "text", Text: "I will read the next file."}}},
			message{"user", []block{{Type: "tool_result", ID: id, Content: b.String()}}})
	}
	return json.Marshal(map[string]any{"model": "claude-sonnet-4-5", "max_tokens": 32000, "stream": true, "messages": ms,
		"metadata": map[string]string{"user_id": "user_0123456789abcdef_account__session_8d2f1c5e-4b7a-4f6e-9a3b-2c1d0e9f8a7b"}})
}
