package cli

import (
	"bufio"
	"bytes"
	"errors"
	"io/fs"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/policy"
)

// packageHost is one host that a package tool fetches from.
type packageHost struct {
	host string
	port int
	why  string // which tool, and which setting said so
}

// packageTools are the tools of --with.
var packageTools = map[string]struct {
	read  func(*settings)
	where string
	how   string // what to do if there is none
}{
	"npm": {readNPM, "~/.npmrc and npm_config_registry", `set one with "npm config set registry URL" and run this again, or add the registry's host to egress.allow`},
	"pip": {readPip, "~/.config/pip/pip.conf, ~/.pip/pip.conf and PIP_INDEX_URL", `set one with "pip config set global.index-url URL" and run this again, or add the index's host to egress.allow`},
	"go":  {readGo, "GOPROXY and ~/.config/go/env", `set one with "go env -w GOPROXY=URL" and run this again, or add the proxy's host to egress.allow`},
}

// settings collects the hosts of one tool. Only the user's home and environment
// are read, never the working folder.
type settings struct {
	tool   string
	home   string
	getenv func(string) string
	warn   func(format string, args ...any)
	hosts  []packageHost
}

// lines gives the lines of a file in the home, without comments and blanks; none
// if there is no such file.
func (s *settings) lines(name string) []string {
	if s.home == "" {
		return nil
	}
	data, err := readRegular(filepath.Join(s.home, name), manifest.MaxFile)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.warn("%s: ~/%s cannot be read: %v", s.tool, name, errors.Unwrap(err))
		}
		return nil
	}
	var out []string
	sc := bufio.NewScanner(bytes.NewReader(data))
	sc.Buffer(nil, manifest.MaxFile)
	for sc.Scan() {
		line := strings.TrimSpace(sc.Text())
		if line != "" && line[0] != '#' && line[0] != ';' {
			out = append(out, line)
		}
	}
	return out
}

// add takes the host out of a URL. Only the host and port are kept and shown:
// such URLs often hold passwords.
func (s *settings) add(raw, where string) {
	raw = strings.Trim(strings.TrimSpace(raw), `"'`)
	if raw == "" {
		return
	}
	if strings.Contains(raw, "$") {
		s.warn("%s: %s uses a variable, which is not expanded; add the host to egress.allow by hand", s.tool, where)
		return
	}
	u, err := url.Parse(raw)
	if err != nil || u.Hostname() == "" {
		s.warn("%s: %s holds no URL; add the host to egress.allow by hand", s.tool, where)
		return
	}
	if u.Scheme != "https" {
		s.warn("%s: %s is not https; if you mean it, add the host %s to egress.allow by hand with \"protocol\": \"http\"", s.tool, where, u.Hostname())
		return
	}
	port := 443
	if u.Port() != "" {
		port, err = strconv.Atoi(u.Port())
	}
	if err == nil {
		err = policy.CheckPort(port)
	}
	e, hostErr := policy.Normalize(u.Hostname())
	switch {
	case err != nil:
		s.warn("%s: %s has no usable port", s.tool, where)
	case hostErr != nil:
		s.warn("%s: %s: %s; %s", s.tool, where, fault.As(hostErr).Msg, fault.As(hostErr).Hint)
	case e.Class == policy.ClassWildcard:
		s.warn("%s: %s names no single host", s.tool, where)
	case e.Host == "":
		s.hosts = append(s.hosts, packageHost{e.Prefix.Addr().String(), port, s.tool + ", from " + where})
	default:
		s.hosts = append(s.hosts, packageHost{e.Host, port, s.tool + ", from " + where})
	}
}

// readNPM reads registry and @scope:registry, ini without sections.
func readNPM(s *settings) {
	for _, line := range s.lines(".npmrc") {
		key, value, ok := strings.Cut(line, "=")
		key = strings.TrimSpace(key)
		if ok && (key == "registry" || strings.HasPrefix(key, "@") && strings.HasSuffix(key, ":registry")) {
			s.add(value, "~/.npmrc")
		}
	}
	for _, name := range []string{"npm_config_registry", "NPM_CONFIG_REGISTRY"} {
		s.add(s.getenv(name), name)
	}
}

// readPip reads index-url and extra-index-url of any section; the latter may
// hold several, also on lines that follow.
func readPip(s *settings) {
	for _, name := range []string{".config/pip/pip.conf", ".pip/pip.conf"} {
		key := ""
		for _, line := range s.lines(name) {
			value := line
			if k, v, ok := strings.Cut(line, "="); ok && !strings.Contains(k, "://") {
				key, value = strings.TrimSpace(k), v
			} else if strings.HasPrefix(line, "[") {
				key = ""
			}
			if key == "index-url" || key == "extra-index-url" {
				s.addAll(value, "~/"+name)
			}
		}
	}
	s.addAll(s.getenv("PIP_INDEX_URL"), "PIP_INDEX_URL")
	s.addAll(s.getenv("PIP_EXTRA_INDEX_URL"), "PIP_EXTRA_INDEX_URL")
}

func (s *settings) addAll(list, where string) {
	for _, raw := range strings.Fields(list) {
		s.add(raw, where)
	}
}

// readGo reads GOPROXY as the go command does: the environment, else the file
// that go env -w writes.
func readGo(s *settings) {
	value, where := s.getenv("GOPROXY"), "GOPROXY"
	if value == "" {
		for _, line := range s.lines(".config/go/env") {
			if v, ok := strings.CutPrefix(line, "GOPROXY="); ok {
				value, where = v, "~/.config/go/env"
			}
		}
	}
	for _, part := range strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == '|' }) {
		switch part = strings.TrimSpace(part); part {
		case "off":
		case "direct":
			s.warn("go: %s has \"direct\", which fetches from the hosts of the modules; those are not opened", where)
		default:
			s.add(part, where)
		}
	}
}
