// Command smolvm is the fake of package fakesmolvm as a program, for tests that
// put it on PATH.
package main

import (
	"os"

	"github.com/bottle-tools/bottle/testscripts/fakesmolvm"
)

func main() { os.Exit(fakesmolvm.Main()) }
