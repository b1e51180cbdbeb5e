//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// screening is what the gate's process computes for a body of one MiB that it
// looks through for secrets, from its first byte in to its last byte out.
func (b *bench) screening() error {
	o, err := newOrigin(loopback, 0)
	if err != nil {
		return err
	}
	defer o.close()
	g, err := b.startGate("dlp", gateManifest([]any{map[string]any{"host": "web.bench.test", "ports": []int{o.webPort},
		"protocol": "http", "addresses": []string{loopback}}}))
	if err != nil {
		return err
	}
	defer g.stop()
	source, err := ownSource(filepath.Join(b.w.repo, "lib"))
	if err != nil {
		return err
	}
	random := make([]byte, 3<<18)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(random) // never fails
	for _, c := range []struct {
		name string
		body []byte
		most *limit
	}{
		{"look through a MiB of JSON", inJSON(source), medianAtMost("<= 200 ms, 50 aimed at", 200)},
		{"look through a MiB of base64", []byte(base64.StdEncoding.EncodeToString(random)), medianAtMost("<= 200 ms", 200)},
		{"look through a MiB of one letter", bytes.Repeat([]byte("a"), 1<<20), medianAtMost("<= 200 ms", 200)},
	} {
		var took []float64
		for round := range b.rounds + 1 {
			before, err := g.cpu()
			if err != nil {
				return err
			}
			if err := g.post(fmt.Sprintf("web.bench.test:%d", o.webPort), c.body); err != nil {
				return err
			}
			after, err := g.cpu()
			if err != nil {
				return err
			}
			if round > 0 { // the first reads the rules
				took = append(took, (after-before)*(1<<20)/float64(len(c.body)))
			}
		}
		b.emit(newRow(c.name, "ms", took, "", nil, c.most))
	}
	return nil
}

// post sends a body on a connection of its own. That it is let through is part of
// it.
func (g *gateProcess) post(host string, body []byte) error {
	c, err := net.Dial("unix", g.sock)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(aLongWait))
	fmt.Fprintf(c, "POST http://%s/ HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n", host, host, len(body))
	if _, err := c.Write(body); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	said, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", host, resp.Status, said)
	}
	return err
}

// ownSource is a MiB of this project's own Go code, without the tests, which are
// about keys.
func ownSource(root string) (string, error) {
	var out strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		out.Write(b)
		return err
	})
	if out.Len() == 0 && err == nil {
		err = fmt.Errorf("%s holds no Go code", root)
	}
	text := out.String()
	for len(text) < 1<<20 {
		text += text
	}
	return text[:1<<20], err
}

// inJSON is a text as an agent sends it to its API.
func inJSON(text string) []byte {
	var parts []map[string]string
	for i := 0; i < len(text); i += 8 << 10 {
		parts = append(parts, map[string]string{"type": "text", "text": text[i:min(len(text), i+8<<10)]})
	}
	// Strings always encode.
	b, _ := json.Marshal(map[string]any{"model": "m", "messages": []any{map[string]any{"role": "user", "content": parts}}})
	return b
}
