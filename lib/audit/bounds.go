package audit

import (
	"flag"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Bounds are how much of the disk a log may take, as flags have them. Neither
// says anything about what is written.
type Bounds struct {
	MiB   int `json:"mib"`   // of one file
	Files int `json:"files"` // that were rotated, and are kept
}

// DefaultBounds are those of a log if nobody says otherwise: 272 MiB.
var DefaultBounds = Bounds{MiB: DefaultMaxBytes >> 20, Files: DefaultKeep}

// Flags defines the flags of b, which they set to the default.
func (b *Bounds) Flags(fs *flag.FlagSet) (names []string) {
	fs.IntVar(&b.MiB, "audit-mib", DefaultBounds.MiB, "begin another file of the audit log after `N` MiB")
	fs.IntVar(&b.Files, "audit-files", DefaultBounds.Files, "keep `N` files of the audit log, beside the one that is written")
	return []string{"audit-mib", "audit-files"}
}

// Check refuses what is no bound (64).
func (b Bounds) Check() error {
	switch {
	case b.MiB < 1 || b.MiB > 1<<20:
		return fault.New(fault.Usage, "usage", "a file of the audit log may have 1 to %d MiB, and not %d", 1<<20, b.MiB).
			WithHint("--audit-mib, or BOTTLE_AUDIT_MIB")
	case b.Files < 1 || b.Files > 10_000:
		return fault.New(fault.Usage, "usage", "1 to 10000 files of the audit log may be kept, and not %d", b.Files).
			WithHint("--audit-files, or BOTTLE_AUDIT_FILES")
	}
	return nil
}

// Options of a log with these bounds; zero ones are the default.
func (b Bounds) Options(bottle string) Options {
	return Options{Bottle: bottle, MaxBytes: int64(b.MiB) << 20, Keep: b.Files}
}
