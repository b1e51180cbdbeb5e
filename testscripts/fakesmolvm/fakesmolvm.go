// Package fakesmolvm replays recorded calls of smolvm: a smolvm that answers
// exactly what the real one answered, and fails loudly on anything else.
//
// It reads every *.ndjson and *.json below the folders in $BOTTLE_TRANSCRIPTS
// (a list like PATH). A record is a JSON object
//
//	{"name":…, "argv":["smolvm",…], "exit":0, "stdout":…, "stderr":…, "stdin":…, "smolvm":"1.9.1"}
//
// of which argv and exit are needed; a *.json file holds one record or an array
// of them. Records of other programs (argv[0]) are passed over. Arguments must
// match exactly from argv[1] on; a recorded stdin must match too.
//
// Several records of the same arguments are given in the order of the files'
// names and lines, the last one for ever. That needs memory between calls: the
// file $BOTTLE_TRANSCRIPT_STATE. Without it only one record may match, unless
// all of them answer alike. $BOTTLE_TRANSCRIPT_VERSION keeps to the records of
// one version; records without a version always count.
//
// The recordings hold <PID> where a process id stood; it is given back as
// $BOTTLE_TRANSCRIPT_PID, or as 4194304, which no Linux process can have.
//
// Each call is appended to $BOTTLE_TRANSCRIPT_LOG as one line
// {"argv":[…],"record":NAME,"exit":N}; record is "" for an unexpected call.
package fakesmolvm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Unexpected is the exit status for a call that was never recorded and for a
// replayer that is set up wrongly. smolvm itself never uses it.
const Unexpected = 97

// Record is one recorded call.
type Record struct {
	Name    string   `json:"name"`
	Argv    []string `json:"argv"`
	Exit    *int     `json:"exit"`
	Stdout  string   `json:"stdout"`
	Stderr  string   `json:"stderr"`
	Stdin   *string  `json:"stdin"`
	Version string   `json:"smolvm"`
}

// Main replays the call of this process and gives the status to exit with.
func Main() int {
	return Run(os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr)
}

// Run replays one call; args are without the program's name.
func Run(args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) int {
	rec, err := choose(args, getenv, stdin)
	if lerr := logCall(getenv("BOTTLE_TRANSCRIPT_LOG"), args, rec); err == nil {
		err = lerr
	}
	if err != nil {
		fmt.Fprintf(stderr, "fake smolvm: %v\n", err)
		return Unexpected
	}
	// stdout and stderr are what callers check; a closed one is their choice.
	pid := getenv("BOTTLE_TRANSCRIPT_PID")
	if pid == "" {
		pid = "4194304"
	}
	_, _ = io.WriteString(stderr, strings.ReplaceAll(rec.Stderr, "<PID>", pid))
	_, _ = io.WriteString(stdout, strings.ReplaceAll(rec.Stdout, "<PID>", pid))
	return *rec.Exit
}

func choose(args []string, getenv func(string) string, stdin io.Reader) (*Record, error) {
	roots := filepath.SplitList(getenv("BOTTLE_TRANSCRIPTS"))
	if len(roots) == 0 {
		return nil, errors.New("BOTTLE_TRANSCRIPTS is not set")
	}
	all, err := Load(roots...)
	if err != nil {
		return nil, err
	}
	var found []Record
	version := getenv("BOTTLE_TRANSCRIPT_VERSION")
	for _, r := range all {
		if slices.Equal(r.Argv[1:], args) && (version == "" || r.Version == "" || r.Version == version) {
			found = append(found, r)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("unexpected call, no recording (version %q): %q", version, args)
	}
	n, err := next(getenv("BOTTLE_TRANSCRIPT_STATE"), args, found)
	if err != nil {
		return nil, err
	}
	r := &found[n]
	return r, checkStdin(r, stdin)
}

// checkStdin compares what came in with the recording, where stdin was passed on
// to the guest (-i). Without -i smolvm does not read it.
func checkStdin(r *Record, stdin io.Reader) error {
	if r.Stdin == nil || !slices.Contains(r.Argv, "-i") {
		return nil
	}
	got, err := io.ReadAll(io.LimitReader(stdin, 1<<20))
	if err != nil {
		return err
	}
	if string(got) != *r.Stdin {
		return fmt.Errorf("unexpected stdin for %s: %q instead of %q", r.Name, got, *r.Stdin)
	}
	return nil
}

// Load reads the records of smolvm below the roots, in the order of file names.
func Load(roots ...string) ([]Record, error) {
	var out []Record
	for _, root := range roots {
		files := 0
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			ext := filepath.Ext(path)
			if ext != ".ndjson" && ext != ".json" {
				return nil
			}
			files++
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			recs, err := parse(data, ext == ".json")
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			out = append(out, recs...)
			return nil
		})
		if err != nil {
			return nil, err
		}
		if files == 0 {
			return nil, fmt.Errorf("no *.ndjson or *.json below %s", root)
		}
	}
	return out, nil
}

func parse(data []byte, mayBeArray bool) ([]Record, error) {
	var all []Record
	if t := bytes.TrimSpace(data); mayBeArray && bytes.HasPrefix(t, []byte("[")) {
		if err := json.Unmarshal(t, &all); err != nil {
			return nil, err
		}
	} else {
		dec := json.NewDecoder(bytes.NewReader(data))
		for {
			var r Record
			err := dec.Decode(&r)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("record %d: %w", len(all)+1, err)
			}
			all = append(all, r)
		}
	}
	var ours []Record
	for i, r := range all {
		if len(r.Argv) == 0 || filepath.Base(r.Argv[0]) != "smolvm" {
			continue
		}
		if r.Exit == nil {
			return nil, fmt.Errorf("record %d (%s) has no exit", i+1, r.Name)
		}
		ours = append(ours, r)
	}
	return ours, nil
}

// next gives the index of the record whose turn it is.
func next(state string, args []string, found []Record) (int, error) {
	if state == "" {
		for _, r := range found[1:] {
			if *r.Exit != *found[0].Exit || r.Stdout != found[0].Stdout || r.Stderr != found[0].Stderr {
				return 0, fmt.Errorf("%d recordings of %q answer differently (%s, %s): set BOTTLE_TRANSCRIPT_VERSION or BOTTLE_TRANSCRIPT_STATE", len(found), args, found[0].Name, r.Name)
			}
		}
		return 0, nil
	}
	f, err := os.OpenFile(state, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return 0, err
	}
	seen := map[string]int{}
	data, err := io.ReadAll(f)
	if err != nil {
		return 0, err
	}
	if len(data) > 0 {
		if err := json.Unmarshal(data, &seen); err != nil {
			return 0, fmt.Errorf("%s: %w", state, err)
		}
	}
	key := strings.Join(args, "\x00")
	n := min(seen[key], len(found)-1)
	seen[key]++
	data, err = json.Marshal(seen)
	if err != nil {
		return 0, err
	}
	if err := f.Truncate(0); err != nil {
		return 0, err
	}
	_, err = f.WriteAt(data, 0)
	return n, err
}

func logCall(path string, args []string, rec *Record) error {
	if path == "" {
		return nil
	}
	line := struct {
		Argv   []string `json:"argv"`
		Record string   `json:"record"`
		Exit   int      `json:"exit"`
	}{append([]string{"smolvm"}, args...), "", Unexpected}
	if rec != nil {
		line.Record, line.Exit = rec.Name, *rec.Exit
	}
	data, err := json.Marshal(line)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	return errors.Join(err, f.Close())
}
