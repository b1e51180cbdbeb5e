package tool

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/plan"
)

// Output is where documents go: stdout, or a file that is made when the first
// byte is written and appears under its name when all of them are.
type Output struct {
	p      *Proc
	file   string
	pretty bool
	tmp    *os.File
}

// OutputFlags adds -o and --pretty.
func (p *Proc) OutputFlags(fs *flag.FlagSet) *Output {
	o := &Output{p: p}
	fs.StringVar(&o.file, "o", "", "write documents to `FILE` instead of stdout, all or nothing")
	fs.BoolVar(&o.pretty, "pretty", false, "indent, for people (stages read it, but one line a document is the rule)")
	return o
}

// StdoutOutput is an Output without flags.
func (p *Proc) StdoutOutput() *Output { return &Output{p: p} }

// WriteDoc writes one document.
func (o *Output) WriteDoc(d *plan.Doc) error { return o.WriteLine(d.Line()) }

// WriteLine writes one line of JSON.
func (o *Output) WriteLine(line []byte) error {
	if o.pretty && len(line) > 0 && line[0] == '{' {
		v := jsontext.Value(bytes.Clone(line))
		if err := v.Indent(jsontext.WithIndent("  ")); err != nil {
			return fault.New(fault.Bug, "bug", "indenting a document: %w", err)
		}
		line = v
	}
	w, err := o.writer()
	if err != nil {
		return err
	}
	if _, err := w.Write(append(bytes.Clone(line), '\n')); err != nil {
		return fault.New(fault.IO, "write_failed", "writing %s: %w", o.name(), err).
			WithHint("was the reader of this pipe gone, or is the disk full?")
	}
	return nil
}

func (o *Output) name() string {
	if o.file == "" {
		return "stdout"
	}
	return o.file
}

func (o *Output) writer() (io.Writer, error) {
	if o.file == "" {
		return o.p.Stdout, nil
	}
	if o.tmp == nil {
		if in, ok := o.p.Stdin.(*os.File); ok && sameFile(in, o.file) {
			return nil, o.isInput()
		}
		f, err := os.CreateTemp(filepath.Dir(o.file), "."+filepath.Base(o.file)+".*")
		if err != nil {
			// The name of the temporary file would only confuse.
			var p *fs.PathError
			if errors.As(err, &p) {
				err = p.Err
			}
			return nil, fault.New(fault.CantCreate, "cannot_create", "-o %s: %w", o.file, err).
				WithHint("is there a folder %s that you can write?", filepath.Dir(o.file))
		}
		o.tmp = f
	}
	return o.tmp, nil
}

// NotOver refuses an -o that names the file at path, which the command reads.
func (o *Output) NotOver(path string) error {
	if o.file == "" {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil // whoever reads it will tell
	}
	defer f.Close()
	if sameFile(f, o.file) {
		return o.isInput()
	}
	return nil
}

func (o *Output) isInput() error {
	return fault.New(fault.Usage, "usage", "-o %s is also the input", o.file).WithHint("write to another file")
}

func sameFile(in *os.File, path string) bool {
	a, err := in.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// Close puts the file in place.
func (o *Output) Close() error {
	if o.tmp == nil {
		return nil
	}
	f := o.tmp
	o.tmp = nil
	mode := os.FileMode(0o644)
	if fi, err := os.Stat(o.file); err == nil {
		mode = fi.Mode().Perm()
	}
	err := errors.Join(f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), o.file)
	}
	if err != nil {
		os.Remove(f.Name())
		return fault.New(fault.IO, "write_failed", "writing %s: %w", o.file, err)
	}
	return nil
}

// Input reads the documents on stdin.
type Input struct {
	r    *plan.Reader
	next chan read
}

type read struct {
	doc *plan.Doc
	err error
}

// Input refuses a terminal: a stage without a pipe would wait for ever.
func (p *Proc) Input() (*Input, error) {
	if IsTerminal(p.Stdin) {
		return nil, fault.New(fault.Usage, "usage", "stdin is a terminal, and this command reads documents from a pipe").
			WithHint("bottle-plan AGENT | %s", p.command())
	}
	return &Input{r: plan.NewReader(p.Stdin), next: make(chan read, 1)}, nil
}

// Next gives the next document, io.EOF, a fault for a bad one, or the error of
// ctx: a read of a pipe cannot be interrupted, so it is left behind.
func (in *Input) Next(ctx context.Context) (*plan.Doc, error) {
	go func() {
		d, err := in.r.Next()
		in.next <- read{d, err}
	}()
	select {
	case r := <-in.next:
		return r.doc, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Interrupted is the status of a command that a signal ended: 128+SIGINT.
const Interrupted = 130

// FilterOption changes what Filter does with a document that the stage made.
type FilterOption func(*filter)

type filter struct {
	undo   func(*plan.Doc)
	render func(*plan.Doc) []byte
}

// Undo is called with a document whose stage succeeded and that could not be
// written: what was started for it has to be taken back.
func Undo(f func(*plan.Doc)) FilterOption { return func(o *filter) { o.undo = f } }

// Render writes something else than the document; nil writes nothing.
func Render(f func(*plan.Doc) []byte) FilterOption { return func(o *filter) { o.render = f } }

// Filter runs one stage over every document on stdin: fn changes the document
// or fails; a failure is written as an error document and on stderr; a document
// that already holds an error is forwarded unchanged. All documents are tried;
// the worst status is the stage's.
func (p *Proc) Filter(ctx context.Context, stage string, out *Output, fn func(context.Context, *plan.Doc) error, options ...FilterOption) error {
	o := filter{undo: func(*plan.Doc) {}, render: (*plan.Doc).Line}
	for _, opt := range options {
		opt(&o)
	}
	in, err := p.Input()
	if err != nil {
		return err
	}
	worst := fault.OK
	for {
		d, err := in.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if ctx.Err() != nil {
			return Exit(Interrupted)
		}
		status, err := p.stage(ctx, stage, out, d, err, fn, &o)
		if err != nil {
			return err
		}
		worst = fault.Worst(worst, status)
	}
	if err := out.Close(); err != nil {
		return err
	}
	return Exit(worst)
}

func (p *Proc) stage(ctx context.Context, stage string, out *Output, d *plan.Doc, err error, fn func(context.Context, *plan.Doc) error, o *filter) (int, error) {
	if d == nil {
		d = &plan.Doc{}
	} else if f := d.Failure(); f != nil {
		return f.Exit, o.write(out, d)
	}
	if err == nil {
		err = fn(ctx, d)
	}
	if err == nil {
		if err := o.write(out, d); err != nil {
			o.undo(d)
			return 0, err
		}
		return fault.OK, nil
	}
	var printed exitStatus
	if errors.As(err, &printed) {
		return int(printed), nil
	}
	p.PrintError(err)
	f := d.Fail(stage, err)
	return f.Exit, o.write(out, d)
}

func (o *filter) write(out *Output, d *plan.Doc) error {
	line := o.render(d)
	if line == nil {
		return nil
	}
	return out.WriteLine(line)
}

// FailDoc reports err on stderr and writes an error document on out, for
// commands that begin a pipe.
func (p *Proc) FailDoc(stage string, out *Output, d *plan.Doc, err error) (int, error) {
	if d == nil {
		d = &plan.Doc{}
	}
	p.PrintError(err)
	f := d.Fail(stage, err)
	return f.Exit, out.WriteDoc(d)
}
