package plan

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"strconv"
	"strings"
	"sync"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/bottle-tools/bottle/lib/fault"
)

// node is what the gate knows of one place in the document: its members, and
// whether a member that is not among them is refused.
type node struct {
	members map[string]*node
	folded  map[string]string // case-folded name -> name
	elem    *node             // of an array
	strict  bool
}

// sections lists the members of the envelope and who decodes them strictly:
// what a stage enforces must hold nothing it does not understand, what it only
// reports may grow.
var sections = map[string]struct {
	typ    reflect.Type
	strict bool
}{
	"format_version": {reflect.TypeFor[string](), true},
	"bottle":         {reflect.TypeFor[Bottle](), true},
	"signatures":     {reflect.TypeFor[[]Signature](), true},
	"egress":         {reflect.TypeFor[Egress](), true},
	"pack":           {reflect.TypeFor[Pack](), false},
	"vm":             {reflect.TypeFor[VM](), false},
	"diagnostics":    {reflect.TypeFor[[]Diagnostic](), false},
	"error":          {reflect.TypeFor[Failure](), false},
}

var envelope = sync.OnceValue(func() *node {
	n := &node{members: map[string]*node{}, folded: map[string]string{}}
	for name, s := range sections {
		n.add(name, nodeOf(s.typ, s.strict))
	}
	return n
})

func (n *node) add(name string, m *node) {
	n.members[name] = m
	n.folded[strings.ToLower(name)] = name
}

func nodeOf(t reflect.Type, strict bool) *node {
	switch t.Kind() {
	case reflect.Pointer:
		return nodeOf(t.Elem(), strict)
	case reflect.Slice:
		return &node{elem: nodeOf(t.Elem(), strict)}
	case reflect.Struct:
		n := &node{members: map[string]*node{}, folded: map[string]string{}, strict: strict}
		for f := range t.Fields() {
			if f.Anonymous {
				for name, m := range nodeOf(f.Type, strict).members {
					n.add(name, m)
				}
				continue
			}
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			n.add(name, nodeOf(f.Type, strict))
		}
		return n
	}
	return &node{}
}

// Gate refuses every document that two JSON readers could read differently, or
// that is too large or too deep to be read safely: duplicate members at any
// depth, case variants of known members, unknown members in enforced sections,
// trailing data, bad UTF-8 and lone surrogates, numbers outside float64, depth,
// size, and a format_version of another major. Errors are faults with exit 65.
//
// It has to come before any parser is trusted: gjson takes the first of two
// equal members, encoding/json the last and in any letter case.
func Gate(b []byte) error {
	if len(b) > MaxBytes {
		return fault.New(fault.Data, "too_large", "document is larger than %d MiB", MaxBytes>>20).
			WithHint("split the input into documents of their own lines")
	}
	if len(bytes.TrimSpace(b)) == 0 {
		return fault.New(fault.Data, "empty_input", "empty input where a document was expected").
			WithHint("pipe the output of bottle-plan into this command")
	}
	g := gate{dec: jsontext.NewDecoder(bytes.NewReader(b)), size: len(b)}
	if k := g.dec.PeekKind(); k != '{' && k != jsontext.KindInvalid {
		if _, err := g.dec.ReadToken(); err != nil {
			return g.syntax(err) // "nonsense" begins like null
		}
		return fault.New(fault.Data, "not_an_object", "document is %s, not a JSON object", kindName(k)).
			WithHint("pipe the output of bottle-plan into this command")
	}
	if err := g.value(envelope()); err != nil {
		return err
	}
	if _, err := g.dec.ReadToken(); !errors.Is(err, io.EOF) {
		return fault.New(fault.Data, "trailing_data", "data after the end of the document, at byte %d", g.dec.InputOffset()).
			WithHint("write one document a line")
	}
	return g.version()
}

type gate struct {
	dec *jsontext.Decoder
	// what the version rule needs, seen on the way
	versionSeen bool
	versionText string
	size        int
}

func (g *gate) value(n *node) error {
	tok, err := g.dec.ReadToken()
	if err != nil {
		return g.syntax(err)
	}
	if d := g.dec.StackDepth(); d > MaxDepth {
		return fault.New(fault.Data, "too_deep", "document is nested deeper than %d levels", MaxDepth).
			WithHint("no bottle tool writes such a document; look at what produced it")
	}
	switch tok.Kind() {
	case '{':
		return g.object(n)
	case '[':
		for g.dec.PeekKind() != ']' {
			if err := g.value(n.element()); err != nil {
				return err
			}
		}
		if _, err := g.dec.ReadToken(); err != nil {
			return g.syntax(err)
		}
	case '0':
		f, err := strconv.ParseFloat(tok.String(), 64)
		if err != nil || math.IsInf(f, 0) {
			return g.refuse("bad_number", "number %s does not fit 64 bits", tok)
		}
	case 'n':
		if n != nil {
			return g.refuse("null", "null where a value was expected")
		}
	case '"':
		if g.dec.StackPointer() == "/format_version" {
			g.versionSeen, g.versionText = true, tok.String()
		}
	}
	return nil
}

func (n *node) element() *node {
	if n == nil {
		return nil
	}
	return n.elem
}

func (g *gate) object(n *node) error {
	for {
		tok, err := g.dec.ReadToken()
		if err != nil {
			return g.syntax(err)
		}
		if tok.Kind() == '}' {
			return nil
		}
		name := tok.String()
		var child *node
		if n != nil && n.members != nil {
			var known bool
			if child, known = n.members[name]; !known {
				if as, folds := n.folded[strings.ToLower(foldLong(name))]; folds {
					return g.refuse("case_variant", "member %q differs from %q only in letter case", name, as)
				}
				if n.strict {
					return g.refuse("unknown_member", "unknown member %q", name)
				}
			}
		}
		if err := g.value(child); err != nil {
			return err
		}
	}
}

// foldLong maps the two letters outside ASCII that fold to ASCII ones, as
// encoding/json folds them: U+017F and U+212A.
func foldLong(s string) string {
	return strings.NewReplacer("ſ", "s", "K", "k").Replace(s)
}

func (g *gate) syntax(err error) error {
	var syn *jsontext.SyntacticError
	if !errors.As(err, &syn) {
		return fault.New(fault.Data, "bad_json", "not JSON: %v", err)
	}
	where := fmt.Sprintf("byte %d", syn.ByteOffset)
	if syn.JSONPointer != "" {
		where += " (" + string(syn.JSONPointer) + ")"
	}
	if errors.Is(err, jsontext.ErrDuplicateName) {
		return fault.New(fault.Data, "duplicate_member", "duplicate member at %s", where).
			WithHint("two JSON readers would read this document differently; keep one")
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return fault.New(fault.Data, "bad_json", "document ends in the middle, at byte %d", g.size)
	}
	f := fault.New(fault.Data, "bad_json", "not JSON at %s: %v", where, syn.Err)
	if strings.Contains(syn.Err.Error(), "'/'") {
		return f.WithHint("documents have no comments; a manifest is read by bottle-plan")
	}
	return f.WithHint("a document is one line of JSON, as bottle-plan prints it")
}

func (g *gate) refuse(code, format string, args ...any) error {
	return fault.New(fault.Data, code, format, args...).At(dotted(string(g.dec.StackPointer())))
}

// dotted writes a JSON pointer the way people write paths: a.b[2].c.
func dotted(pointer string) string {
	var b strings.Builder
	for _, p := range strings.Split(strings.TrimPrefix(pointer, "/"), "/") {
		p = strings.NewReplacer("~1", "/", "~0", "~").Replace(p)
		if _, err := strconv.Atoi(p); err == nil {
			fmt.Fprintf(&b, "[%s]", p)
			continue
		}
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		b.WriteString(p)
	}
	return b.String()
}

func (g *gate) version() error {
	if !g.versionSeen {
		return fault.New(fault.Data, "no_version", "document has no format_version").
			WithHint("it starts every document of the bottle tools: %q", `"format_version":"`+FormatVersion+`"`)
	}
	return CheckVersion(g.versionText)
}

// CheckVersion refuses a MAJOR.MINOR of another major than FormatVersion's.
func CheckVersion(v string) error {
	major, minor, ok := strings.Cut(v, ".")
	_, errMajor := strconv.ParseUint(major, 10, 31)
	_, errMinor := strconv.ParseUint(minor, 10, 31)
	if !ok || errMajor != nil || errMinor != nil {
		return fault.New(fault.Data, "bad_version", "format_version %q is not MAJOR.MINOR", v)
	}
	if want, _, _ := strings.Cut(FormatVersion, "."); major != want {
		return fault.New(fault.Data, "bad_version", "format_version %s is not of major %s", v, want).
			WithHint("use bottle tools of one version along the whole pipe")
	}
	return nil
}

func kindName(k jsontext.Kind) string {
	switch k {
	case '[':
		return "an array"
	case '"':
		return "a string"
	case '0':
		return "a number"
	case 'n':
		return "null"
	}
	return "a boolean"
}
