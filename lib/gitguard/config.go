package gitguard

import (
	"os"
	"path/filepath"
	"strings"
)

const maxConfig = 1 << 20

// readConfig gives the values of core.hooksPath and of all include paths in a
// git configuration (git-config(1), "CONFIGURATION FILE"), conditional includes
// too, whatever their condition. What cannot be read has none.
func readConfig(file string) (hooks, includes []string) {
	fi, err := os.Stat(file)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() > maxConfig {
		return nil, nil
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, nil
	}
	return parseConfig(string(raw))
}

func parseConfig(text string) (hooks, includes []string) {
	text = strings.ReplaceAll(text, "\r\n", "\n")
	text = strings.ReplaceAll(text, "\\\n", "")
	section := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			head, rest, _ := cutHeader(line[1:])
			section = strings.ToLower(head)
			line = strings.TrimSpace(rest) // a key may follow on the same line
		}
		key, value, _ := strings.Cut(line, "=")
		value = unquote(strings.TrimSpace(value))
		if value == "" {
			continue
		}
		switch strings.ToLower(strings.TrimSpace(key)) {
		case "hookspath":
			if section == "core" {
				hooks = append(hooks, value)
			}
		case "path":
			if section == "include" || strings.HasPrefix(section, "includeif") {
				includes = append(includes, value)
			}
		}
	}
	return hooks, includes
}

// cutHeader splits at the ] that ends a section header; one inside the quoted
// subsection does not.
func cutHeader(s string) (head, rest string, ok bool) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && quoted:
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ']' && !quoted:
			return strings.TrimSpace(s[:i]), s[i+1:], true
		}
	}
	return s, "", false
}

// unquote resolves quotes, escapes and comments of a value.
func unquote(s string) string {
	var b strings.Builder
	quoted := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			quoted = !quoted
		case c == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		case (c == '#' || c == ';') && !quoted:
			return strings.TrimSpace(b.String())
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// expand makes a path of a configuration absolute.
func expand(p, base, home string) string {
	if rest, ok := strings.CutPrefix(p, "~/"); ok && home != "" {
		return filepath.Join(home, rest)
	}
	if filepath.IsAbs(p) {
		return filepath.Clean(p)
	}
	return filepath.Join(base, p)
}
