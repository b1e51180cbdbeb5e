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
	for _, e := range parseEntries(text) {
		switch {
		case e.value == "":
		case e.section == "core" && e.key == "hookspath":
			hooks = append(hooks, e.value)
		case e.key == "path" && (e.section == "include" || strings.HasPrefix(e.section, "includeif.")):
			includes = append(includes, e.value)
		}
	}
	return hooks, includes
}

// entry is one variable: its section in lower case, with the subsection as it
// is ("remote.Origin"); its key in lower case.
type entry struct{ section, key, value string }

// parseEntries gives all variables in order. What is no configuration gives
// entries that are no variable either, so that a change in it shows.
func parseEntries(text string) []entry {
	section := ""
	var all []entry
	for _, line := range joined(text) {
		for strings.HasPrefix(line, "[") {
			head, rest, ok := cutHeader(line[1:])
			if !ok {
				break
			}
			name, sub, quoted := strings.Cut(head, " ")
			section = strings.ToLower(name)
			if quoted {
				section += "." + unquote(strings.TrimSpace(sub))
			}
			line = strings.TrimSpace(rest) // a variable may follow on the same line
		}
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		key, value, _ := strings.Cut(line, "=")
		all = append(all, entry{section, strings.ToLower(strings.TrimSpace(key)), unquote(strings.TrimSpace(value))})
	}
	return all
}

// joined gives the lines of a configuration. One that ends in a backslash goes
// on with the next, unless it is a comment.
func joined(text string) []string {
	var all []string
	goesOn := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if goesOn {
			last := &all[len(all)-1]
			line = strings.TrimSuffix(*last, `\`) + line
			all = all[:len(all)-1]
		}
		all = append(all, line)
		goesOn = strings.HasSuffix(line, `\`) && line[0] != '#' && line[0] != ';'
	}
	return all
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
