package standin

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const key = "the-real-key"

var script = []Step{
	{Tool: "Write", Input: json.RawMessage(`{"file_path":"/workspace/a","content":"x"}`)},
	{Tool: "Bash", Input: json.RawMessage(`{"command":"true"}`)},
	{Text: "done: {result}", Hold: "release"},
}

func start(t *testing.T, cfg Config) *Server {
	t.Helper()
	cfg.Dir, cfg.Key = t.TempDir(), key
	if cfg.Script == nil {
		cfg.Script = script
	}
	s, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// client goes to s whatever the host's name is, and trusts its authority alone.
func client(t *testing.T, s *Server) *http.Client {
	t.Helper()
	raw, err := os.ReadFile(s.CA)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(raw) {
		t.Fatal("no certificate in " + s.CA)
	}
	tr := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool},
		Dial:            func(string, string) (net.Conn, error) { return net.Dial("tcp", s.Addr) },
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

func do(t *testing.T, c *http.Client, method, url, body string, header ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			req.Host = header[i+1]
			continue
		}
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(raw)
}

func lines(t *testing.T, s *Server) []line {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(filepath.Dir(s.CA), FileLog))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(raw, []byte(key)) {
		t.Error("the log holds the key")
	}
	var all []line
	for sc := bufio.NewScanner(bytes.NewReader(raw)); sc.Scan(); {
		var l line
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
			t.Fatal(err)
		}
		all = append(all, l)
	}
	return all
}

func TestKey(t *testing.T) {
	for _, tc := range []struct {
		name   string
		header []string
		in     string
		right  bool
	}{
		{"none", nil, "", false},
		{"x-api-key", []string{"X-Api-Key", key}, "x-api-key", true},
		{"bearer", []string{"Authorization", "Bearer " + key}, "authorization", true},
		{"placeholder", []string{"X-Api-Key", "sk-ant-placeholder"}, "x-api-key", false},
		{"prefix", []string{"X-Api-Key", key[:5]}, "x-api-key", false},
		{"no bearer", []string{"Authorization", key}, "authorization", false},
		{"right and wrong", []string{"X-Api-Key", key, "Authorization", "Bearer sk-ant-placeholder"}, "x-api-key,authorization", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := start(t, Config{})
			code, _ := do(t, client(t, s), "GET", "https://"+APIHost+"/api/claude_code/settings", "", tc.header...)
			want := http.StatusUnauthorized
			if tc.right {
				want = http.StatusNotFound
			}
			if code != want {
				t.Errorf("status %d, want %d", code, want)
			}
			if l := lines(t, s); len(l) != 1 || l[0].KeyIn != tc.in || l[0].KeyRight != tc.right || l[0].Status != want {
				t.Errorf("log %+v", l)
			}
		})
	}
}

func TestConversation(t *testing.T) {
	s := start(t, Config{})
	c := client(t, s)
	ask := func(body string) string {
		t.Helper()
		code, answer := do(t, c, "POST", "https://"+APIHost+"/v1/messages?beta=true", body, "X-Api-Key", key)
		if code != http.StatusOK {
			t.Fatalf("status %d: %s", code, answer)
		}
		return answer
	}
	result := func(texts ...string) string {
		m := `{"role":"user","content":"do it"}`
		for _, x := range texts {
			m += `,{"role":"assistant","content":[]},{"role":"user","content":[{"type":"tool_result","content":` + x + `}]}`
		}
		return `{"model":"m","stream":true,"tools":[{}],"messages":[` + m + `]}`
	}
	if got := ask(result()); !strings.Contains(got, `"name":"Write"`) || !strings.Contains(got, `"id":"toolu_1"`) ||
		!strings.Contains(got, `"partial_json":"{\"file_path\"`) || !strings.Contains(got, `"stop_reason":"tool_use"`) ||
		!strings.HasSuffix(got, "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n") {
		t.Errorf("first answer:\n%s", got)
	}
	if got := ask(result(`"ok"`)); !strings.Contains(got, `"name":"Bash"`) || !strings.Contains(got, `"id":"toolu_2"`) {
		t.Errorf("second answer:\n%s", got)
	}

	last := make(chan string)
	go func() { last <- ask(result(`"ok"`, `[{"type":"text","text":" all well\n"}]`)) }()
	deadline := time.Now().Add(5 * time.Second)
	for l := lines(t, s); l[len(l)-1].Step != 3; l = lines(t, s) {
		if time.Now().After(deadline) {
			t.Fatal("the request that is held is not in the log")
		}
		time.Sleep(5 * time.Millisecond)
	}
	select {
	case <-last:
		t.Fatal("the answer was not held")
	case <-time.After(50 * time.Millisecond):
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(s.CA), "release"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := <-last; !strings.Contains(got, `"text":"done: all well"`) || !strings.Contains(got, `"stop_reason":"end_turn"`) {
		t.Errorf("last answer:\n%s", got)
	}

	if got := ask(result(`"1"`, `"2"`, `"3"`)); !strings.Contains(got, "the script has ended") {
		t.Errorf("after the end:\n%s", got)
	}
	failed := `{"model":"m","tools":[{}],"messages":[{"content":[{"type":"tool_result","content":"no such file","is_error":true}]}]}`
	if got := ask(failed); !strings.Contains(got, "the tool failed: no such file") || !json.Valid([]byte(got)) {
		t.Errorf("after a failed tool: %s", got)
	}
	if got := ask(`{"model":"m","messages":[{"content":"a title"}]}`); !strings.Contains(got, `"text":"ok"`) {
		t.Errorf("without tools: %s", got)
	}
	if code, _ := do(t, c, "POST", "https://"+APIHost+"/v1/messages", "{", "X-Api-Key", key); code != http.StatusBadRequest {
		t.Errorf("status %d for a broken body", code)
	}
}

func TestHosts(t *testing.T) {
	s := start(t, Config{})
	c := client(t, s)
	if code, body := do(t, c, "GET", "https://"+PageHost+"/x", ""); code != http.StatusOK || body != Page {
		t.Errorf("page: %d %q", code, body)
	}
	if code, _ := do(t, c, "GET", "https://"+APIHost+"/api/hello", ""); code != http.StatusOK {
		t.Errorf("hello: %d", code)
	}
	if code, _ := do(t, c, "GET", "https://"+PageHost+"/", "", "Host", APIHost); code != http.StatusMisdirectedRequest {
		t.Errorf("one name in TLS and another in Host: %d", code)
	}
	if _, err := c.Get("https://" + GitHost + "/"); err == nil {
		t.Error("a host that is not served was answered")
	}
	if n := len(lines(t, s)); n != 3 {
		t.Errorf("%d lines in the log, want 3", n)
	}
}

func TestGit(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("SKIPPED, NOT TESTED: git is not installed")
	}
	dir := t.TempDir()
	git := func(env []string, args ...string) (string, error) {
		cmd := exec.Command("git", args...)
		cmd.Dir = dir
		cmd.Env = append([]string{
			"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0",
			"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.test", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.test",
		}, env...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, args := range [][]string{
		{"init", "-q", "src"}, {"-C", "src", "commit", "-q", "--allow-empty", "-m", "the first"},
		{"clone", "-q", "--bare", "src", "repos/p.git"},
	} {
		if out, err := git(nil, args...); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	s := start(t, Config{Repo: filepath.Join(dir, "repos")})
	_, port, err := net.SplitHostPort(s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	tls := []string{"-c", "http.sslCAInfo=" + s.CA, "-c", "http.curloptResolve=" + GitHost + ":" + port + ":127.0.0.1"}
	url := "https://" + GitHost + ":" + port + "/p.git"
	if out, err := git(nil, append(tls, "clone", "-q", url, "clone")...); err != nil {
		t.Fatalf("clone: %v\n%s", err, out)
	}
	if out, err := git(nil, "-C", "clone", "log", "--format=%s"); err != nil || out != "the first\n" {
		t.Errorf("log of the clone: %q %v", out, err)
	}
	if out, err := git(nil, append(append([]string{"-C", "clone"}, tls...), "push", url, "HEAD:refs/heads/other")...); err == nil {
		t.Errorf("a push was taken:\n%s", out)
	}
}

func TestCheckScript(t *testing.T) {
	input := json.RawMessage(`{}`)
	for _, tc := range []struct {
		name string
		s    []Step
		want string
	}{
		{"good", []Step{{Tool: "Bash", Input: input}, {Text: "x"}}, ""},
		{"empty", nil, "empty"},
		{"neither", []Step{{}}, "either"},
		{"both", []Step{{Tool: "Bash", Text: "x"}}, "either"},
		{"tool last", []Step{{Tool: "Bash", Input: input}}, "after it"},
		{"no input", []Step{{Tool: "Bash"}, {Text: "x"}}, "input"},
		{"text first", []Step{{Text: "x"}, {Text: "y"}}, "follows"},
		{"hold outside", []Step{{Text: "x", Hold: "../x"}}, "name of a file"},
	} {
		err := checkScript(tc.s)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}
