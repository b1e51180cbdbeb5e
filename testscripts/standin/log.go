package standin

import (
	"encoding/json"
	"net/http"
	"os"
	"sync"
)

// line is one request in the log. Which key arrived is told, never its value.
type line struct {
	Host   string `json:"host"`
	Method string `json:"method"`
	Path   string `json:"path"`
	Status int    `json:"status"`
	// For the API: whether a key came at all, in which header, and whether it
	// was the right one.
	KeyIn    string `json:"key_in,omitempty"`
	KeyRight bool   `json:"key_right"`
	// Step is the step of the script that answered, counted from 1.
	Step int `json:"step,omitempty"`
}

type requestLog struct {
	mu   sync.Mutex
	file *os.File
}

func openLog(path string) (*requestLog, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	return &requestLog{file: f}, nil
}

func (l *requestLog) write(x line) error {
	raw, err := json.Marshal(x)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err = l.file.Write(append(raw, '\n'))
	return err
}

func (l *requestLog) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Close()
}

// logWriter logs a request the moment its status is known, before the body: a
// reader of the log sees a request while it is still being answered.
type logWriter struct {
	http.ResponseWriter
	log    *requestLog
	line   line
	logged bool
}

func (w *logWriter) WriteHeader(status int) {
	if !w.logged {
		w.logged = true
		w.line.Status = status
		if err := w.log.write(w.line); err != nil {
			// An answer without its line would be a hole in the evidence.
			panic(http.ErrAbortHandler)
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *logWriter) Write(p []byte) (int, error) {
	if !w.logged {
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController find Flush.
func (w *logWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *logWriter) finish() {
	if !w.logged {
		w.WriteHeader(http.StatusOK)
	}
}
