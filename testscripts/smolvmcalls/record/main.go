// Command record records what a smolvm answers: see package smolvmcalls, and
// scripts/record-smolvm, which runs it.
//
//	record [-guest] [-image TAR] SMOLVM DIR   writes DIR/VERSION/*.ndjson
//	record dial TARGET...                     what it does inside of a guest
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/bottle-tools/bottle/testscripts/smolvmcalls"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "dial" {
		smolvmcalls.Dial(os.Stdout, os.Args[2:])
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "record: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	guest := flag.Bool("guest", false, "the calls that need a guest, instead of those that need none")
	image := flag.String("image", "", "with -guest: the tar of a root file system")
	flag.Parse()
	if flag.NArg() != 2 || *guest != (*image != "") {
		return fmt.Errorf("usage: record [-guest -image TAR] SMOLVM DIR")
	}
	bin, err := filepath.Abs(flag.Arg(0))
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "record.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	r, err := smolvmcalls.Open(ctx, bin, dir, os.Stderr)
	if err != nil {
		return err
	}
	to := func(file string) string { return filepath.Join(flag.Arg(1), r.Version.String(), file) }
	if *guest {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		recs, err := r.Guest(ctx, *image, self)
		if err != nil {
			return err
		}
		return smolvmcalls.Write(to(smolvmcalls.GuestFile), recs)
	}
	recs, err := r.Records(ctx)
	if err != nil {
		return err
	}
	help, err := r.Help(ctx)
	if err != nil {
		return err
	}
	if err := smolvmcalls.Write(to(smolvmcalls.RecordsFile), recs); err != nil {
		return err
	}
	return smolvmcalls.Write(to(smolvmcalls.HelpFile), help)
}
