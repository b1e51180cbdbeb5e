// Package sidecar runs mitmproxy's mitmdump beside a bottle's gate: a proxy that
// lets addons of the user's own read and change the requests of inspected hosts.
// It is the one package that starts mitmdump.
//
// The gate is in front of it and behind it. In front it holds the guest's
// request against the policy; behind it, it does so again with what the addons
// made of it, and only there checks addresses, puts secrets in and takes them
// out of answers. So an addon sees placeholders, and cannot reach what the guest
// could not.
package sidecar

import (
	"os"
	"path/filepath"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Name is what the sidecar is called in documents, logs and records.
const Name = "mitmdump"

// Find looks for mitmdump: $BOTTLE_MITMDUMP, then the absolute folders of $PATH.
// Its version is not asked for, since that takes as long as a start; Ready sees
// whether it does what is needed. The error is a fault 69 (no_mitmdump).
func Find(getenv func(string) string) (string, error) {
	if path := getenv("BOTTLE_MITMDUMP"); path != "" {
		abs, err := filepath.Abs(path)
		if err != nil || !executable(abs) {
			return "", missing("BOTTLE_MITMDUMP is %s, which is not an executable file", path)
		}
		return abs, nil
	}
	for _, dir := range filepath.SplitList(getenv("PATH")) {
		// A relative folder of PATH would run what a workspace holds.
		if path := filepath.Join(dir, "mitmdump"); filepath.IsAbs(dir) && executable(path) {
			return path, nil
		}
	}
	return "", missing("mitmdump is not on PATH")
}

func missing(format string, args ...any) error {
	return fault.New(fault.Unavailable, "no_mitmdump", format, args...).
		WithHint(`install mitmproxy 9 or newer (pip install mitmproxy) and set BOTTLE_MITMDUMP, or take egress.mitmdump out of the manifest`)
}

func executable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode().Perm()&0o111 != 0
}
