// Package smolvm is a thin wrapper around the smolvm command: one function per
// subcommand, nothing decided. It is the only package that executes smolvm.
//
// It speaks two dialects of the command line. From 1.0.2 on a machine is named
// by --name; from 0.2.0 to 1.0.1 create and delete take the name as a
// positional argument. Callers always pass a name and never see the difference.
//
// Flags that only newer releases have are passed where they exist; what needs one
// that does not is refused. A release that is newer than NewestTested is taken to
// know what that one knows; if it does not, the error names the flag.
//
// What smolvm really answers was recorded from 1.9.1 and 1.32.2; the recordings
// are in testscripts/transcripts/smolvm and are replayed by
// testscripts/fakesmolvm. Arguments go to smolvm raw, flags in the order of the
// recordings. Nothing secret is ever an argument: see the exec functions.
//
// Every call has a time limit, ends with its context, and keeps at most a
// bounded part of what smolvm prints.
package smolvm
