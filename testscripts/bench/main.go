//go:build linux

// Command bench measures what the bottle tools claim about speed and memory,
// with what each claim is a ratio of beside it, taking turns in one run. It
// prints a table, or JSON lines. docs/benchmarks.md tells what the rows mean.
//
// Its status is 0 even if a target is missed, and 1 if something could not be
// measured. A number on a busy machine is no test.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	code, err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: error: %v\n", err)
	}
	os.Exit(code)
}

type options struct {
	repo, json, cache string
	only              *regexp.Regexp
	rounds, fleet     int
	ownNetwork        bool   // this is the process that gates starts in namespaces
	relay             string // this is startRelay's process
	bulk              string
	address           string // of the one that bulk starts in a bottle
}

func parse(args []string, stderr io.Writer) (*options, error) {
	var o options
	only := ""
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.repo, "repo", ".", "`FOLDER` with bin and scripts in it")
	fs.StringVar(&o.json, "json", "", "write JSON lines to `FILE`; - for stdout, in place of the table")
	fs.StringVar(&o.cache, "cache", "", "`FOLDER` that the peer is installed into; below the user's cache if not given")
	fs.StringVar(&only, "only", "", "only the sections that match `REGEXP`: "+sectionNames())
	fs.IntVar(&o.rounds, "rounds", 12, "rounds of each comparison; fewer than 10 are no median")
	fs.IntVar(&o.fleet, "fleet", 20, "bottles that are started at once")
	fs.BoolVar(&o.ownNetwork, "own-network", false, "for the bench itself: the rows that need a network of their own")
	fs.StringVar(&o.relay, "relay", "", "for the bench itself: a relay that checks nothing, at `SOCKET`")
	fs.StringVar(&o.bulk, "bulk", "", "for the bench itself: get, put or http, from the `ADDRESS` that follows")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if o.bulk != "" {
		o.address = fs.Arg(0)
		return &o, nil
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if o.rounds < 1 || o.fleet < 1 {
		return nil, errors.New("-rounds and -fleet are at least 1")
	}
	var err error
	if o.only, err = regexp.Compile(only); err != nil {
		return nil, fmt.Errorf("-only: %w", err)
	}
	if !slices.ContainsFunc(sections, func(s section) bool { return o.only.MatchString(s.name) }) {
		return nil, fmt.Errorf("-only %s is no section; there are %s", only, sectionNames())
	}
	if o.repo, err = filepath.Abs(o.repo); err != nil {
		return nil, err
	}
	if o.cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, err
		}
		o.cache = filepath.Join(base, "bottle-bench", "srt")
	}
	return &o, nil
}

func sectionNames() string {
	var names []string
	for _, s := range sections {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (code int, err error) {
	o, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0, nil
	}
	if err != nil {
		return 64, err
	}
	if o.relay != "" {
		return 1, serveRelay(o.relay)
	}
	if o.bulk != "" {
		mbs, err := moveBulk(o.bulk, o.address)
		if err != nil {
			return 1, err
		}
		fmt.Fprintf(stdout, "%.1f\n", mbs)
		return 0, nil
	}
	lines, people := io.Discard, stdout
	switch o.json {
	case "":
	case "-":
		lines, people = stdout, io.Discard
	default:
		f, err := os.Create(o.json)
		if err != nil {
			return 73, err
		}
		defer f.Close()
		lines = f
	}
	w, err := newWorld(ctx, o.repo)
	defer func() {
		if cerr := w.close(); cerr != nil {
			code, err = 1, errors.Join(err, fmt.Errorf("clearing up: %w", cerr))
		}
	}()
	if err != nil {
		return 1, err
	}
	if o.ownNetwork {
		lines, people = stdout, io.Discard
	}
	encode := json.NewEncoder(lines)
	encode.SetEscapeHTML(false)
	before := host()
	if !o.ownNetwork {
		fmt.Fprintln(people, before)
		_ = encode.Encode(before)
	}
	var rows []row
	b := &bench{w: w, rounds: o.rounds, fleet: o.fleet, cache: o.cache}
	b.emit = func(r row) {
		if r.Ours != nil && r.Ours.N < enough && r.Verdict != info {
			r.Why = strings.TrimPrefix(r.Why+fmt.Sprintf("; %d rounds only", r.Ours.N), "; ")
		}
		rows = append(rows, r)
		_ = encode.Encode(r)
	}
	if o.ownNetwork {
		err := b.insideNetwork()
		if err != nil {
			code = 1
		}
		return code, err
	}
	code = measure(ctx, b, o, stderr)
	after := host()
	_ = encode.Encode(after)
	fmt.Fprint(people, "\n", table(rows), "\n", after, "\n")
	return code, context.Cause(ctx)
}

// measure runs the sections; one that fails is a row of its own.
func measure(ctx context.Context, b *bench, o *options, stderr io.Writer) int {
	fail := func(name string, err error) int {
		fmt.Fprintf(stderr, "bench: error: %s: %v\n", name, err)
		b.emit(row{Kind: "row", Name: name, Verdict: failed, Why: strings.ReplaceAll(err.Error(), "\n", "; ")})
		return 1
	}
	var err error
	if b.raw, err = newRaw(b.w); err != nil {
		return fail("raw runsc", err)
	}
	code := 0
	for _, s := range sections {
		if !o.only.MatchString(s.name) || ctx.Err() != nil {
			continue
		}
		fmt.Fprintf(stderr, "bench: %s\n", s.name)
		if err := s.run(b); err != nil {
			code = fail(s.name, err)
		}
	}
	if ctx.Err() != nil {
		return 130
	}
	return code
}

// machine is what the numbers depend on.
type machine struct {
	Kind   string `json:"kind"` // "machine"
	Time   string `json:"time"`
	Kernel string `json:"kernel"`
	Arch   string `json:"arch"`
	CPUs   int    `json:"cpus"`
	UID    int    `json:"uid"`
	Load   string `json:"load"` // averages over 1, 5 and 15 minutes
}

func host() machine {
	m := machine{Kind: "machine", Time: time.Now().UTC().Format(time.RFC3339), Arch: runtime.GOARCH, CPUs: runtime.NumCPU(), UID: os.Getuid()}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		if f := strings.Fields(string(b)); len(f) >= 3 {
			m.Load = strings.Join(f[:3], " ")
		}
	}
	return m
}

func (m machine) String() string {
	return fmt.Sprintf("%s  Linux %s %s, %d CPUs, uid %d, load %s", m.Time, m.Kernel, m.Arch, m.CPUs, m.UID, m.Load)
}
