// Package standin is a local stand-in for the servers that an agent talks to,
// so that a demo or a test runs whole and offline: the Anthropic API with a
// scripted conversation, a git server, and a plain page, all behind TLS on one
// loopback port, told apart by server name.
//
// Its certificates come from a certificate authority that is made at start and
// whose key never leaves memory.
package standin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// Names of the servers.
const (
	APIHost  = "api.anthropic.com"
	GitHost  = "git.demo.test"
	PageHost = "pages.demo.test"
)

// Page is what every GET to PageHost is answered with.
const Page = "hello from an allowed host\n"

// Files that Start writes into Config.Dir. FilePort comes last: who can read it
// can connect.
const (
	FileCA   = "ca.pem"
	FilePort = "port"
	FileLog  = "requests.jsonl"
)

// Config says what to serve.
type Config struct {
	Dir  string // gets the files above; has to exist
	Key  string // the key that the API takes; everything else is a 401
	Repo string // folder of bare repositories for GitHost; "" for none
	// Script is the conversation. The step that answers a request is the number
	// of tool results in it, so a client may start over at any time.
	Script []Step
	Addr   string // to listen on; "" is a free port of 127.0.0.1
}

// Server is a running stand-in.
type Server struct {
	Addr string // host:port
	CA   string // path of the authority's certificate, PEM

	http *http.Server
	log  *requestLog
	done chan error
}

// Start listens and serves until Close.
func Start(cfg Config) (*Server, error) {
	if cfg.Key == "" {
		return nil, errors.New("no key: without one every request would be refused")
	}
	if err := checkScript(cfg.Script); err != nil {
		return nil, err
	}
	auth, err := newAuthority()
	if err != nil {
		return nil, err
	}
	hosts := map[string]http.Handler{
		APIHost:  &api{key: cfg.Key, script: cfg.Script, dir: cfg.Dir},
		PageHost: http.HandlerFunc(page),
	}
	if cfg.Repo != "" {
		if hosts[GitHost], err = gitHandler(cfg.Repo); err != nil {
			return nil, err
		}
	}
	certs := make(map[string]*tls.Certificate)
	for host := range hosts {
		if certs[host], err = auth.issue(host); err != nil {
			return nil, err
		}
	}
	s := &Server{CA: filepath.Join(cfg.Dir, FileCA), done: make(chan error, 1)}
	if err := os.WriteFile(s.CA, auth.pem, 0o644); err != nil {
		return nil, err
	}
	if s.log, err = openLog(filepath.Join(cfg.Dir, FileLog)); err != nil {
		return nil, err
	}
	addr := cfg.Addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		s.log.close()
		return nil, err
	}
	s.Addr = l.Addr().String()
	s.http = &http.Server{
		Handler:           s.route(hosts),
		ReadHeaderTimeout: 10 * time.Second,
		TLSConfig: &tls.Config{GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c, ok := certs[h.ServerName]; ok {
				return c, nil
			}
			return nil, fmt.Errorf("no server %q here", h.ServerName)
		}},
	}
	go func() { s.done <- s.http.ServeTLS(l, "", "") }()
	if err := s.writePort(cfg.Dir, l.Addr().(*net.TCPAddr).Port); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// writePort is atomic, so that a reader who waits for the file sees all of it.
func (s *Server) writePort(dir string, port int) error {
	tmp := filepath.Join(dir, "."+FilePort)
	if err := os.WriteFile(tmp, []byte(strconv.Itoa(port)+"\n"), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, FilePort))
}

// Close ends the server, open connections included.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		s.http.Close()
	}
	err := <-s.done
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return errors.Join(err, s.log.close())
}

// route picks the server by the name in the TLS handshake. A Host header that
// says otherwise is refused: a client that reaches one name must not be able to
// speak to another.
func (s *Server) route(hosts map[string]http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		lw := &logWriter{ResponseWriter: w, log: s.log, line: line{
			Host: r.TLS.ServerName, Method: r.Method, Path: r.URL.RequestURI(),
		}}
		defer lw.finish()
		h, ok := hosts[r.TLS.ServerName]
		if !ok || host != r.TLS.ServerName {
			http.Error(lw, "wrong host", http.StatusMisdirectedRequest)
			return
		}
		h.ServeHTTP(lw, r)
	})
}

func page(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprint(w, Page)
}

// gitHandler serves the repositories of a folder by git's own CGI program,
// reading only: a push is refused by it.
func gitHandler(root string) (http.Handler, error) {
	git, err := exec.LookPath("git")
	if err != nil {
		return nil, err
	}
	if root, err = filepath.Abs(root); err != nil {
		return nil, err
	}
	return &cgi.Handler{
		Path: git, Args: []string{"http-backend"}, Dir: root,
		Env: []string{"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=" + os.DevNull},
	}, nil
}
