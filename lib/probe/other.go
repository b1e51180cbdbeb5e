//go:build !linux

package probe

import (
	"context"
	"io"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Role is for Linux alone.
func Role([]string, io.Reader, io.Writer, io.Writer) (status int, ok bool) { return 0, false }

// Run refuses: the laboratory is made of Linux's namespaces.
func Run(context.Context, Options, io.Writer, func(Result) error) error {
	return fault.New(fault.Host, "no_lab", "the laboratory needs Linux's namespaces")
}

// Live refuses as Run does.
func Live(context.Context, string, func(string) string, func(Result) error) error {
	return fault.New(fault.Host, "no_lab", "the battery needs Linux")
}

// List has nothing to tell here.
func List() []Info { return nil }

// Choose knows no probe.
func Choose(words []string) (ids []string, unknown string) {
	if len(words) > 0 {
		return nil, words[0]
	}
	return nil, ""
}
