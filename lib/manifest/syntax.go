package manifest

import (
	"bytes"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/tailscale/hujson"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Limits of a manifest, checked before it is parsed: it comes with a cloned
// repository, and the syntax tree is some fifty times as large as the text.
const (
	MaxBytes  = 32 << 20
	MaxFile   = 4 << 20 // a file that it names
	maxDepth  = 100
	maxValues = 2_000_000
	// maxProblems is how many problems are told at once.
	maxProblems = 20
)

// Problems are all that is wrong with a manifest, in the order of the file. Each is a *fault.Error of exit 65 or, for a file that it names, 66.
type Problems []*fault.Error

func (p Problems) Error() string {
	if len(p) == 1 {
		return p[0].Error()
	}
	return fmt.Sprintf("%s (and %d more)", p[0].Error(), len(p)-1)
}

// Unwrap makes fault.As and errors.As see the first problem.
func (p Problems) Unwrap() []error {
	errs := make([]error, len(p))
	for i := range p {
		errs[i] = p[i]
	}
	return errs
}

// loader reads one manifest and collects what is wrong with it.
type loader struct {
	name     string // for messages: base name of the file
	data     []byte
	newlines []int // offsets
	read     func(path string) ([]byte, error)
	problems []problem
	more     int // problems beyond maxProblems
}

// problem is a fault and the offset of what it is about.
type problem struct {
	offset int
	fault  *fault.Error
}

// node is one value and the path that leads to it, as in bottles.dev.env. The
// path is put together when it is asked for: most values are never named.
type node struct {
	v     *hujson.Value
	base  string // path of what holds it
	name  string // in an object
	index int    // in an array, from 1; 0 for a member
}

func (n node) path() string {
	if n.index > 0 {
		return n.base + "[" + strconv.Itoa(n.index-1) + "]"
	}
	return join(n.base, n.name)
}

type member struct{ node }

// members are those of one object, in the order of the file.
type members []member

// get gives a member; ok is false if the object does not have it.
func (m members) get(name string) (node, bool) {
	for i := range m {
		if m[i].name == name {
			return m[i].node, true
		}
	}
	return node{}, false
}

// parse gives the syntax tree, or nil with a problem recorded.
func (l *loader) parse() *hujson.Value {
	if !l.scan() {
		return nil
	}
	// A comment on the last line may lack its newline.
	v, err := hujson.Parse(append(bytes.Clone(l.data), '\n'))
	if err != nil {
		l.syntax(err)
		return nil
	}
	return &v
}

// scan checks the bytes, and bounds what the parser will build.
func (l *loader) scan() bool {
	switch {
	case len(l.data) > MaxBytes:
		return l.fail("too_large", "the manifest is larger than %d MiB", "split it into several manifests", MaxBytes>>20)
	case len(bytes.TrimSpace(l.data)) == 0:
		return l.fail("empty_manifest", "the manifest is empty", "bottle-plan init prints one to start from")
	case bytes.HasPrefix(l.data, []byte("\xef\xbb\xbf")):
		return l.fail("bad_utf8", "the manifest starts with a byte order mark", "save it as UTF-8 without one")
	case !utf8.Valid(l.data):
		return l.fail("bad_utf8", "the manifest is not UTF-8", "save it as UTF-8")
	}
	depth, values := 0, 0
	for i := 0; i < len(l.data); i++ {
		switch c := l.data[i]; c {
		case '\n':
			l.newlines = append(l.newlines, i)
		case '"':
			for i++; i < len(l.data) && l.data[i] != '"' && l.data[i] != '\n'; i++ {
				if l.data[i] == '\\' {
					i++
				}
			}
			if i < len(l.data) && l.data[i] == '\n' {
				i--
			}
		case '/':
			i = l.skipComment(i)
		case '{', '[':
			if depth++; depth > maxDepth {
				l.add(i, "", "too_deep", "values are nested more than %d deep", "a manifest needs fewer than ten levels", maxDepth)
				return false
			}
		case '}', ']':
			depth--
		case ',':
			if values++; values > maxValues {
				l.add(i, "", "too_large", "the manifest has more than %d values", "split it into several manifests", maxValues)
				return false
			}
		}
	}
	return true
}

// skipComment gives the offset of the last byte of the comment at i that is not
// a newline, or i if there is none.
func (l *loader) skipComment(i int) int {
	rest := l.data[i:]
	switch {
	case bytes.HasPrefix(rest, []byte("//")):
		if n := bytes.IndexByte(rest, '\n'); n >= 0 {
			return i + n - 1
		}
		return len(l.data)
	case bytes.HasPrefix(rest, []byte("/*")):
		n := bytes.Index(rest[2:], []byte("*/"))
		if n < 0 {
			return len(l.data)
		}
		for j := i; j < i+n; j++ {
			if l.data[j] == '\n' {
				l.newlines = append(l.newlines, j)
			}
		}
		return i + n + 3
	}
	return i
}

// syntax turns the parser's error into a problem.
func (l *loader) syntax(err error) {
	where, msg, hint := l.name, err.Error(), "the manifest is JSON; // and /* */ comments and trailing commas are allowed"
	var line, column int
	if _, err := fmt.Sscanf(msg, "hujson: line %d, column %d:", &line, &column); err == nil {
		msg = strings.SplitN(msg, ": ", 3)[2]
		where = fmt.Sprintf("%s:%d:%d", l.name, line, column)
	}
	switch {
	case strings.Contains(msg, "invalid literal"):
		msg, hint = "a value is neither a string, number, true, false, object nor array", "strings stand in double quotes, and control characters in them are escaped"
	case strings.Contains(msg, "unexpected EOF"):
		where = l.position(len(l.data))
		msg, hint = "the manifest ends in the middle", "is a closing bracket, quote or comment end missing?"
	case strings.Contains(msg, "after object value"), strings.Contains(msg, "after array value"):
		hint = "is a comma missing before it?"
	case strings.Contains(msg, "after top-level value"):
		hint = "a manifest is one object; remove what is behind it"
	case strings.Contains(msg, "at start of object name"):
		hint = "member names stand in double quotes"
	}
	l.record(0, fault.New(fault.Data, "bad_syntax", "%s", msg).WithHint("%s", hint).At(where))
}

// position is the place of an offset as "file:line:column", both from 1, the
// column in bytes.
func (l *loader) position(offset int) string {
	line := sort.SearchInts(l.newlines, offset)
	start := 0
	if line > 0 {
		start = l.newlines[line-1] + 1
	}
	return l.name + ":" + strconv.Itoa(line+1) + ":" + strconv.Itoa(offset-start+1)
}

// from is the provenance of a rule.
func (l *loader) from(n node) string { return l.position(n.v.StartOffset) + " " + n.path() }

func (l *loader) record(offset int, f *fault.Error) {
	if len(l.problems) == maxProblems {
		l.more++
		return
	}
	l.problems = append(l.problems, problem{offset, f})
}

// fail records a problem of the whole file.
func (l *loader) fail(code, format, hint string, args ...any) bool {
	l.record(0, fault.New(fault.Data, code, format, args...).WithHint("%s", hint).At(l.name))
	return false
}

// add records a problem at an offset.
func (l *loader) add(offset int, path, code, format, hint string, args ...any) {
	where := l.position(offset)
	if path != "" {
		where += ": " + path
	}
	f := fault.New(fault.Data, code, format, args...).At(where)
	if hint != "" {
		f = f.WithHint("%s", hint)
	}
	l.record(offset, f)
}

// bad records a problem with a value.
func (l *loader) bad(n node, code, format, hint string, args ...any) {
	l.add(n.v.StartOffset, n.path(), code, format, hint, args...)
}

// badErr records what another package found wrong with a value.
func (l *loader) badErr(n node, err error) {
	f := fault.As(err)
	l.record(n.v.StartOffset, f.At(l.position(n.v.StartOffset)+": "+n.path()))
}

// kind names the type of a value for messages.
func kind(n node) string {
	switch n.v.Value.Kind() {
	case '{':
		return "an object"
	case '[':
		return "an array"
	case '"':
		return "a string"
	case '0':
		return "a number"
	case 't', 'f':
		return "a boolean"
	}
	return "null"
}

func (l *loader) wrongType(n node, want string) {
	hint := ""
	switch k := n.v.Value.Kind(); {
	case k == 'n':
		hint = "remove the member to get its default"
	case want == "a string" && (k == '0' || k == 't' || k == 'f'):
		hint = "put it in double quotes"
	case want == "a whole number" && k == '"':
		hint = "write the number alone, without quotes and unit"
	case want == "an array" && k == '"':
		hint = "put it in [ ]"
	}
	l.bad(n, "wrong_type", "is %s and has to be %s", hint, kind(n), want)
}

// object reads an object whose members are fixed. It refuses unknown members,
// and two spellings of one.
func (l *loader) object(n node, known ...string) (members, bool) {
	ms, ok := l.mapping(n)
	if !ok {
		return nil, false
	}
	return l.known(ms, known...), true
}

// known keeps the members with one of the names and refuses the others.
func (l *loader) known(ms members, known ...string) members {
	return slices.DeleteFunc(ms, func(m member) bool {
		if slices.Contains(known, m.name) {
			return false
		}
		l.unknown(m, known)
		return true
	})
}

func (l *loader) unknown(m member, known []string) {
	for _, k := range known {
		if strings.EqualFold(k, m.name) {
			l.bad(m.node, "case_variant", "member %s differs from %q only in case", "names are case-sensitive: write "+strconv.Quote(k), quote(m.name), k)
			return
		}
	}
	hint := "known here: " + strings.Join(known, ", ")
	if k := nearest(m.name, known); k != "" {
		hint = fmt.Sprintf("did you mean %q?", k)
	}
	l.bad(m.node, "unknown_member", "unknown member %s", hint, quote(m.name))
}

// mapping reads an object whose member names are the user's. A name that
// stands twice is refused: readers differ in which one counts.
func (l *loader) mapping(n node) (members, bool) {
	obj, ok := n.v.Value.(*hujson.Object)
	if !ok {
		l.wrongType(n, "an object")
		return nil, false
	}
	out := make(members, 0, len(obj.Members))
	var seen map[string]bool
	if len(obj.Members) > 16 {
		seen = make(map[string]bool, len(obj.Members))
	}
	base := n.path()
	for i := range obj.Members {
		m := &obj.Members[i]
		name := unquote(m.Name.Value.(hujson.Literal))
		child := node{v: &m.Value, base: base, name: name}
		twice := false
		if seen != nil {
			twice, seen[name] = seen[name], true
		} else {
			_, twice = out.get(name)
		}
		if twice {
			l.add(m.Name.StartOffset, child.path(), "duplicate_member", "member %s stands twice", "keep one of the two", quote(name))
			continue
		}
		out = append(out, member{child})
	}
	return out, true
}

func join(base, name string) string {
	switch {
	case base == "" && name == "":
		return ""
	case !plainMember(name):
		return base + "[" + quote(name) + "]"
	case base == "":
		return name
	}
	return base + "." + name
}

// plainMember tells if a name can stand in a path as it is.
func plainMember(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '_' || r == '-' || r == '$')
	})
}

// unquote reads a string of the syntax tree, which is known to be valid.
func unquote(lit hujson.Literal) string {
	if bytes.IndexByte(lit, '\\') < 0 {
		return string(lit[1 : len(lit)-1])
	}
	return lit.String()
}

// list reads an array.
func (l *loader) list(n node) []node {
	arr, ok := n.v.Value.(*hujson.Array)
	if !ok {
		l.wrongType(n, "an array")
		return nil
	}
	out, base := make([]node, len(arr.Elements)), n.path()
	for i := range arr.Elements {
		out[i] = node{v: &arr.Elements[i], base: base, index: i + 1}
	}
	return out
}

// str reads a string. NUL, and characters that JSON cannot hold (half of a
// surrogate pair), are refused everywhere.
func (l *loader) str(n node) (string, bool) {
	if n.v.Value.Kind() != '"' {
		l.wrongType(n, "a string")
		return "", false
	}
	lit := n.v.Value.(hujson.Literal)
	s := unquote(lit)
	if strings.ContainsRune(s, utf8.RuneError) {
		l.bad(n, "bad_utf8", "holds a character that is not valid Unicode", "write the character itself")
		return "", false
	}
	if strings.Contains(s, "\x00") {
		l.bad(n, "bad_string", "holds a NUL character", "remove it")
		return "", false
	}
	return s, true
}

// text reads a string that people will read: no control characters, which can
// disguise it on a terminal, and not empty.
func (l *loader) text(n node) (string, bool) {
	s, ok := l.str(n)
	switch {
	case !ok:
		return "", false
	case s == "":
		l.bad(n, "bad_string", "is empty", "write a value, or remove the member")
		return "", false
	case strings.ContainsFunc(s, fault.Control):
		l.bad(n, "bad_string", "holds control characters", "remove them")
		return "", false
	}
	return s, true
}

// texts reads an array of strings with at least min members.
func (l *loader) texts(n node, min int) []string {
	out := []string{}
	nodes := l.list(n)
	for _, e := range nodes {
		if s, ok := l.text(e); ok {
			out = append(out, s)
		}
	}
	if _, ok := n.v.Value.(*hujson.Array); ok && len(nodes) < min {
		l.bad(n, "bad_value", "is empty", "write at least one string")
	}
	return out
}

// enum reads one of a few words.
func (l *loader) enum(n node, words ...string) string {
	s, ok := l.str(n)
	if !ok {
		return words[0]
	}
	if slices.Contains(words, s) {
		return s
	}
	hint := "write one of them"
	if w := nearest(s, words); w != "" {
		hint = fmt.Sprintf("did you mean %q?", w)
	}
	l.bad(n, "bad_value", "%s is none of %s", hint, quote(s), strings.Join(words, ", "))
	return words[0]
}

// integer reads a whole number within bounds.
func (l *loader) integer(n node, min, max int) (int, bool) {
	if n.v.Value.Kind() != '0' {
		l.wrongType(n, "a whole number")
		return 0, false
	}
	text := string(n.v.Value.(hujson.Literal))
	v, err := strconv.ParseInt(text, 10, 64)
	if err != nil || v < int64(min) || v > int64(max) {
		l.bad(n, "bad_value", "%s is not a whole number from %d to %d", "", quote(text), min, max)
		return 0, false
	}
	return int(v), true
}

// quote shows what was written, in a length and form that is safe to print.
func quote(s string) string {
	if len(s) > 80 {
		return strconv.QuoteToASCII(s[:77]) + "…"
	}
	return strconv.QuoteToGraphic(s)
}

// nearest gives the word that s was likely meant to be, or "".
func nearest(s string, words []string) string {
	if len(s) > 40 {
		return ""
	}
	best, word := 3, ""
	for _, w := range words {
		if d := distance(strings.ToLower(s), strings.ToLower(w)); d < best && d < len(w) {
			best, word = d, w
		}
	}
	return word
}

// distance is the number of edits (insert, delete, replace) from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range a {
		diagonal := row[0]
		row[0] = i + 1
		for j := range b {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
