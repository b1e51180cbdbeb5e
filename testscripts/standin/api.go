package standin

import (
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Step is one answer of the scripted conversation: either a tool to use or a
// text.
type Step struct {
	Tool  string          `json:"tool,omitempty"`
	Input json.RawMessage `json:"input,omitempty"`
	// Text ends the turn. {result} in it stands for what the last tool gave.
	Text string `json:"text,omitempty"`
	// Hold names a file of Config.Dir: the answer waits until it is there, at
	// most MaxHold. The request is in the log by then.
	Hold string `json:"hold,omitempty"`

	id string // of the tool use
}

// MaxHold bounds the wait of a step with Hold.
const MaxHold = 60 * time.Second

// maxBody is several times what a client sends first (about 50 kB).
const maxBody = 16 << 20

// ReadScript reads the steps from a file: a JSON array.
func ReadScript(path string) ([]Step, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var script []Step
	if err := json.Unmarshal(raw, &script); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return script, nil
}

func checkScript(script []Step) error {
	for i, s := range script {
		switch last := i == len(script)-1; {
		case (s.Tool == "") == (s.Text == ""):
			return fmt.Errorf("step %d has either a tool or a text", i+1)
		case s.Tool != "" && (last || !json.Valid(s.Input)):
			return fmt.Errorf("step %d: a tool has an input, and a step after it", i+1)
		case s.Text != "" && !last:
			return fmt.Errorf("step %d: nothing follows a text", i+1)
		case s.Hold != filepath.Base(s.Hold) && s.Hold != "":
			return fmt.Errorf("step %d: hold is the name of a file", i+1)
		}
	}
	if len(script) == 0 {
		return errors.New("the script is empty")
	}
	return nil
}

// api is the part of the Messages API that an agent needs for one prompt.
type api struct {
	key    string
	script []Step
	dir    string
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/api/hello" {
		writeJSON(w, http.StatusOK, map[string]string{"message": "hello"})
		return
	}
	lw := w.(*logWriter)
	lw.line.KeyIn, lw.line.KeyRight = a.checkKey(r.Header)
	if !lw.line.KeyRight {
		writeError(w, http.StatusUnauthorized, "authentication_error", "invalid x-api-key")
		return
	}
	if r.URL.Path != "/v1/messages" || r.Method != http.MethodPost {
		writeError(w, http.StatusNotFound, "not_found_error", "not found")
		return
	}
	a.messages(lw, r)
}

// checkKey tells in which header a key came, and whether all that came are the
// right one.
func (a *api) checkKey(h http.Header) (in string, right bool) {
	var names []string
	right = true
	check := func(name, value string) {
		names = append(names, name)
		right = right && subtle.ConstantTimeCompare([]byte(value), []byte(a.key)) == 1
	}
	for _, v := range h.Values("X-Api-Key") {
		check("x-api-key", v)
	}
	for _, v := range h.Values("Authorization") {
		bearer, ok := strings.CutPrefix(v, "Bearer ")
		if !ok {
			bearer = ""
		}
		check("authorization", bearer)
	}
	return strings.Join(names, ","), right && len(names) > 0
}

type messagesRequest struct {
	Model    string            `json:"model"`
	Stream   bool              `json:"stream"`
	Tools    []json.RawMessage `json:"tools"`
	Messages []struct {
		Content json.RawMessage `json:"content"` // a string, or blocks
	} `json:"messages"`
}

// toolResults are the texts of the tools that ran so far. failed is the last
// one's, if it was an error.
func (q *messagesRequest) toolResults() (results []string, failed string) {
	for _, m := range q.Messages {
		var blocks []struct {
			Type    string          `json:"type"`
			Content json.RawMessage `json:"content"`
			IsError bool            `json:"is_error"`
		}
		if json.Unmarshal(m.Content, &blocks) != nil {
			continue // a plain string has no tool result
		}
		for _, b := range blocks {
			if b.Type != "tool_result" {
				continue
			}
			text := blockText(b.Content)
			failed = ""
			if b.IsError {
				failed = text
			}
			results = append(results, text)
		}
	}
	return results, failed
}

// blockText is the text of a tool result: a string, or text blocks.
func blockText(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return s
	}
	var blocks []struct {
		Text string `json:"text"`
	}
	_ = json.Unmarshal(raw, &blocks) // another form has no text
	var b strings.Builder
	for _, x := range blocks {
		b.WriteString(x.Text)
	}
	return b.String()
}

func (a *api) messages(w *logWriter, r *http.Request) {
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var q messagesRequest
	if err == nil {
		err = json.Unmarshal(raw, &q)
	}
	if err != nil {
		writeError(w, http.StatusBadRequest, "invalid_request_error", err.Error())
		return
	}
	step := a.next(w, &q)
	if q.Stream {
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Cache-Control", "no-store")
	} else {
		w.Header().Set("Content-Type", "application/json")
	}
	w.WriteHeader(http.StatusOK)
	if !a.hold(r, step.Hold) {
		panic(http.ErrAbortHandler)
	}
	if q.Stream {
		stream(w, q.Model, step)
		return
	}
	m := message(q.Model)
	m["content"], m["stop_reason"] = []any{step.block(true)}, step.stopReason()
	_ = json.NewEncoder(w).Encode(m)
}

// next picks the answer. A request without tools is one of the client's own,
// for a title or the like, and no part of the conversation.
func (a *api) next(w *logWriter, q *messagesRequest) Step {
	if len(q.Tools) == 0 {
		return Step{Text: "ok"}
	}
	results, failed := q.toolResults()
	if failed != "" {
		return Step{Text: "the tool failed: " + failed}
	}
	if len(results) >= len(a.script) {
		return Step{Text: "the script has ended"}
	}
	w.line.Step = len(results) + 1
	s := a.script[len(results)]
	s.id = fmt.Sprintf("toolu_%d", len(results)+1)
	if len(results) > 0 {
		s.Text = strings.ReplaceAll(s.Text, "{result}", strings.TrimSpace(results[len(results)-1]))
	}
	return s
}

// hold waits for the file; false if the client went away or time is up.
func (a *api) hold(r *http.Request, name string) bool {
	if name == "" {
		return true
	}
	end := time.After(MaxHold)
	for {
		if _, err := os.Stat(filepath.Join(a.dir, name)); err == nil {
			return true
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-end:
			return false
		case <-r.Context().Done():
			return false
		}
	}
}

// block is the content block; whole or as it starts in a stream.
func (s Step) block(whole bool) map[string]any {
	b := map[string]any{"type": "text", "text": ""}
	if s.Tool != "" {
		b = map[string]any{"type": "tool_use", "id": s.id, "name": s.Tool, "input": json.RawMessage("{}")}
	}
	if whole && s.Tool != "" {
		b["input"] = s.Input
	} else if whole {
		b["text"] = s.Text
	}
	return b
}

func (s Step) delta() map[string]any {
	if s.Tool != "" {
		return map[string]any{"type": "input_json_delta", "partial_json": string(s.Input)}
	}
	return map[string]any{"type": "text_delta", "text": s.Text}
}

func (s Step) stopReason() string {
	if s.Tool != "" {
		return "tool_use"
	}
	return "end_turn"
}

func message(model string) map[string]any {
	return map[string]any{
		"id": "msg_standin", "type": "message", "role": "assistant", "model": model,
		"content": []any{}, "stop_reason": nil, "stop_sequence": nil,
		"usage": map[string]any{"input_tokens": 1, "output_tokens": 1, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0},
	}
}

// stream sends an answer as server-sent events, each as soon as it is written.
func stream(w http.ResponseWriter, model string, s Step) {
	rc := http.NewResponseController(w)
	for _, e := range []map[string]any{
		{"type": "message_start", "message": message(model)},
		{"type": "content_block_start", "index": 0, "content_block": s.block(false)},
		{"type": "content_block_delta", "index": 0, "delta": s.delta()},
		{"type": "content_block_stop", "index": 0},
		{"type": "message_delta", "delta": map[string]any{"stop_reason": s.stopReason(), "stop_sequence": nil}, "usage": map[string]any{"output_tokens": 1}},
		{"type": "message_stop"},
	} {
		raw, err := json.Marshal(e)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if _, err := fmt.Fprintf(w, "event: %s\ndata: %s\n\n", e["type"], raw); err != nil {
			return // the client is gone
		}
		_ = rc.Flush()
	}
}

func writeError(w http.ResponseWriter, status int, kind, text string) {
	writeJSON(w, status, map[string]any{"type": "error", "error": map[string]string{"type": kind, "message": text}})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client is gone
}
