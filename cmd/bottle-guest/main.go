//go:build linux

// Command bottle-guest is the first process of a bottle's guest: it prepares
// the guest, relays its loopback proxy port to the gate, and reaps orphans.
// With tar-out or tar-in it copies for bottle-vm cp.
package main

import (
	"os"

	"github.com/bottle-tools/bottle/cmd/bottle-guest/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }
