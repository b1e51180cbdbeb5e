package plan

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/tidwall/gjson"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Doc is one document with its members as they came: what a stage does not set
// is written again byte for byte and in order (white space between tokens
// aside, because a document is one line).
type Doc struct {
	members []member
}

type member struct {
	name string
	raw  jsontext.Value
}

// New starts a document with its bottle section.
func New(b *Bottle) (*Doc, error) {
	d := &Doc{}
	if err := d.Set("format_version", FormatVersion); err != nil {
		return nil, err
	}
	return d, d.Set("bottle", b)
}

// Parse passes b through the Gate and gives the document.
func Parse(b []byte) (*Doc, error) {
	if err := Gate(b); err != nil {
		return nil, err
	}
	d := &Doc{}
	gjson.ParseBytes(b).ForEach(func(k, v gjson.Result) bool {
		d.members = append(d.members, member{k.String(), jsontext.Value(v.Raw)})
		return true
	})
	for i := range d.members {
		if err := d.members[i].raw.Compact(jsontext.AllowInvalidUTF8(false)); err != nil {
			return nil, fault.New(fault.Bug, "bug", "compacting %s: %w", d.members[i].name, err)
		}
	}
	return d, nil
}

// Has tells whether the document has the member.
func (d *Doc) Has(name string) bool { return d.Raw(name) != nil }

// Raw gives a member as it stands, or nil.
func (d *Doc) Raw(name string) []byte {
	for _, m := range d.members {
		if m.name == name {
			return m.raw
		}
	}
	return nil
}

// Set writes one section, in place where it stands already, otherwise before
// the members that come after all sections.
func (d *Doc) Set(name string, v any) error {
	raw, err := Encode(v)
	if err != nil {
		return err
	}
	for i := range d.members {
		if d.members[i].name == name {
			d.members[i].raw = raw
			return nil
		}
	}
	at := len(d.members)
	for i, m := range d.members {
		if rank(m.name) > rank(name) {
			at = i
			break
		}
	}
	d.members = append(d.members[:at], append([]member{{name, raw}}, d.members[at:]...)...)
	return nil
}

func rank(name string) int {
	for i, n := range []string{"format_version", "bottle", "signatures", "egress", "pack", "vm"} {
		if n == name {
			return i
		}
	}
	switch name {
	case "diagnostics":
		return 6
	case "error":
		return 8
	}
	return 7
}

// Encode writes v the way documents are written: compact, members in the order
// of the type, no HTML escapes, nothing null.
func Encode(v any) ([]byte, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fault.New(fault.Bug, "bug", "encoding %T: %w", v, err)
	}
	return raw, nil
}

// Decode reads a section into v. A wrong type is a fault 65; strict refuses
// members that v has no field for.
func Decode(name string, raw []byte, v any, strict bool) error {
	if err := json.Unmarshal(raw, v, json.RejectUnknownMembers(strict)); err != nil {
		return fault.New(fault.Data, "bad_section", "section %s: %s", name, jsonReason(err)).
			WithHint("the section must be as docs/pipeline.md has it; was the document edited by hand?")
	}
	return nil
}

// jsonReason drops the Go types from the library's error text.
func jsonReason(err error) string {
	s := err.Error()
	s = strings.TrimPrefix(s, "json: ")
	// The library says one or the other, by chance (errors.go, errorModalVerb).
	if rest, ok := strings.CutPrefix(s, "unable to "); ok {
		s = "cannot " + rest
	}
	if i := strings.Index(s, " into Go "); i >= 0 {
		rest := s[i:]
		s = s[:i]
		if j := strings.Index(rest, " within "); j >= 0 {
			s += rest[j:]
		}
	}
	return s
}

func (d *Doc) section(name, from string, v any) error {
	raw := d.Raw(name)
	if raw == nil {
		f := fault.New(fault.Data, "no_section", "document has no %s section", name)
		if d.Has("bottles") {
			return f.WithHint("this is a manifest; bottle-plan makes documents of it")
		}
		return f.WithHint("put %s before this command in the pipe", from)
	}
	return Decode(name, raw, v, sections[name].strict)
}

// Bottle decodes and validates the policy section. What Validate cannot judge
// without the policy engine (hosts, ports, CIDRs) is left to lib/policy.
func (d *Doc) Bottle() (*Bottle, error) {
	b := new(Bottle)
	if err := d.section("bottle", "bottle-plan", b); err != nil {
		return nil, err
	}
	return b, b.Validate()
}

// Signatures decodes the section of bottle-plan sign; there may be none.
func (d *Doc) Signatures() ([]Signature, error) {
	raw := d.Raw("signatures")
	if raw == nil {
		return nil, nil
	}
	var s []Signature
	return s, Decode("signatures", raw, &s, true)
}

// Egress decodes the section of bottle-egress.
func (d *Doc) Egress() (*Egress, error) {
	e := new(Egress)
	return e, d.section("egress", "bottle-egress", e)
}

// Pack decodes the section of bottle-pack.
func (d *Doc) Pack() (*Pack, error) {
	p := new(Pack)
	return p, d.section("pack", "bottle-pack", p)
}

// VM decodes the section of bottle-vm up.
func (d *Doc) VM() (*VM, error) {
	v := new(VM)
	return v, d.section("vm", "bottle-vm up", v)
}

// Failure gives the error that an earlier stage left, or nil.
func (d *Doc) Failure() *Failure {
	raw := d.Raw("error")
	if raw == nil {
		return nil
	}
	f := new(Failure)
	if err := Decode("error", raw, f, false); err != nil || f.Exit <= 0 || f.Exit > 255 {
		return &Failure{Stage: "unknown", Code: "bad_section", Exit: fault.Data, Message: "unreadable error section"}
	}
	return f
}

// Fail records err as the document's error, keeping every section it has so
// that down can still act on vm.id.
func (d *Doc) Fail(stage string, err error) *Failure {
	f := NewFailure(stage, err)
	if d.Raw("format_version") == nil {
		_ = d.Set("format_version", FormatVersion)
	}
	_ = d.Set("error", f)
	return f
}

// NewFailure is err as data.
func NewFailure(stage string, err error) *Failure {
	e := fault.As(err)
	return &Failure{Stage: stage, Code: e.Code, Exit: e.Exit, Message: e.Error(), Hint: e.Hint}
}

// Note appends a diagnostic.
func (d *Doc) Note(n Diagnostic) error {
	var all []jsontext.Value
	if raw := d.Raw("diagnostics"); raw != nil {
		if err := Decode("diagnostics", raw, &all, false); err != nil {
			return err
		}
	}
	raw, err := Encode(n)
	if err != nil {
		return err
	}
	return d.Set("diagnostics", append(all, raw))
}

// Line is the document on the wire: compact, without the newline.
func (d *Doc) Line() []byte {
	b := []byte{'{'}
	for i, m := range d.members {
		if i > 0 {
			b = append(b, ',')
		}
		b, _ = jsontext.AppendQuote(b, m.name)
		b = append(b, ':')
		b = append(b, m.raw...)
	}
	return append(b, '}')
}

// Digest is what --hash prints, --expect pins and a signature covers: the
// SHA-256 of the bottle section in its canonical encoding, as "sha256:<hex>".
// It is taken of the decoded section, so white space does not change it.
func Digest(b *Bottle) (string, error) {
	raw, err := Encode(b)
	if err != nil {
		return "", err
	}
	return SHA256(raw), nil
}

// SHA256 writes a digest the way documents do.
func SHA256(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}
