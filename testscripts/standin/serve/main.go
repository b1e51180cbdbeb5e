// Command serve runs the stand-in servers in the foreground for a shell script:
//
//	STANDIN_KEY=… serve -dir DIR -script FILE [-repos DIR]
//
// It ends with its parent, so that a script that is killed leaves nothing.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/bottle-tools/bottle/testscripts/standin"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "standin: error:", err)
		os.Exit(1)
	}
}

func run() error {
	var cfg standin.Config
	var script string
	flag.StringVar(&cfg.Dir, "dir", "", "write "+standin.FileCA+", "+standin.FilePort+" and "+standin.FileLog+" into `DIR`")
	flag.StringVar(&script, "script", "", "the conversation, a JSON `FILE`")
	flag.StringVar(&cfg.Repo, "repos", "", "serve the bare repositories in `DIR`")
	flag.Parse()
	if cfg.Dir == "" || script == "" || flag.NArg() > 0 {
		return errors.New("usage: STANDIN_KEY=... serve -dir DIR -script FILE [-repos DIR]")
	}
	// A command line is for everybody to read, an environment is not.
	cfg.Key = os.Getenv("STANDIN_KEY")
	os.Unsetenv("STANDIN_KEY")
	var err error
	if cfg.Script, err = standin.ReadScript(script); err != nil {
		return err
	}
	parent := os.Getppid()
	s, err := standin.Start(cfg)
	if err != nil {
		return err
	}
	wait(parent)
	return s.Close()
}

// wait returns on a signal, or once the parent is gone.
func wait(parent int) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	tick := time.NewTicker(200 * time.Millisecond)
	for {
		select {
		case <-signals:
			return
		case <-tick.C:
			if os.Getppid() != parent {
				return
			}
		}
	}
}
